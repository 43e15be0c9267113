"""``audio-llm ask`` with a checkpoint in this process, and what it refuses; the server's part: test_vllm_server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from audio_llm import cli
from audio_llm.answering.ask import ask
from audio_llm.audio import Waveform, decode, encode
from audio_llm.language import prompts


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ask") / "clip.flac"
    samples = np.random.default_rng(0).normal(0, 0.1, (2, 44100)).astype(np.float32)
    path.write_bytes(encode(Waveform(samples, 44100, "binaural"), "flac"))
    return path


def test_answers_about_two_files(checkpoint, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", str(clip), str(clip), "Are they the same?", "--model", str(checkpoint()), "--max-tokens", "8"]
    capsys.readouterr()  # what building the checkpoint printed
    assert cli.main([*words, "--json", "--style", "think"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["raw"].startswith("<think>")
    assert cli.main([*words, "--choices", "yes", "no"]) == 1, "a random model names no choice in eight tokens"
    assert "choice:   no choice (" in capsys.readouterr().out


def test_a_mono_file_is_heard_where_that_is_asked_for(checkpoint, clip: Path, tmp_path: Path) -> None:
    """`--hearing duplicate` gives the reply to a file with the same sound in both channels; without it: see below."""
    samples = decode(clip).samples[:1]
    replies = []
    for name, rows, more in (("one", [0], {"hearing": "duplicate"}), ("two", [0, 0], {})):
        path = tmp_path / f"{name}.wav"
        path.write_bytes(encode(Waveform(samples[rows], 44100, "mono" if len(rows) == 1 else "stereo"), "wav"))
        replies.append(ask(str(checkpoint()), "What is heard?", [path], max_tokens=8, **more))
    assert replies[0] == replies[1]


def test_a_request_says_what_is_heard(clip: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.exceptions import VLLMValidationError

    from audio_llm.serving.media import MultiChannelAudioIO

    one = encode(Waveform(decode(clip).samples[:1], 44100, "mono"), "wav")
    samples, _ = MultiChannelAudioIO(hearing="duplicate").load_bytes(one)
    assert samples.shape[0] == 2 and np.array_equal(samples[0], samples[1])
    assert MultiChannelAudioIO().load_bytes(one)[0].shape[0] == 1
    assert MultiChannelAudioIO(hearing="mean").load_bytes(clip.read_bytes())[0].shape[0] == 1
    with pytest.raises(VLLMValidationError, match="did you mean 'duplicate'"):
        MultiChannelAudioIO(hearing="duplicat").load_bytes(one)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere.wav", "what?", "--model", "{model}"], "no such file"),
        (["what?"], "either --url"),
        (["what?", "--model", "{model}", "--url", "http://127.0.0.1:9"], "either --url"),
        (["what?", "--url", "127.0.0.1:9"], "--url: expected http://HOST:PORT"),
        (["what?", "--model", "{model}", "--engine", "vlm"], "did you mean 'vllm'"),
        (["what?", "--url", "http://127.0.0.1:9"], "audio-llm serve MODEL"),
        (["what?", "--model", "nowhere"], "config.json"),
        (["what?", "--model", "{model}", "--adapter", "nowhere"], "adapter_config.json"),
        (["what?", "--model", "{model}", "--constrain"], "--choices"),
        (["what?", "--model", "{model}", "--constrain", "--choices", "a", "b"], "--engine vllm"),
        (["what?", "--model", "{model}", "--choices", "left"], "choices: expected 2 to 26 that differ"),
        (["what?", "--model", "{model}", "--choices", "left", "Left"], "choices: expected 2 to 26 that differ"),
        (["what?", "--model", "{model}", "--max-tokens", "0"], "max_tokens: expected a number of 1 or more, found 0"),
        (["what?", "--model", "{model}", "--temperature", "-1"], "temperature: expected 0 to 2, found -1.0"),
        (["what?", "--model", "{model}", "--seed", "-1"], "seed: expected 0 to"),
        (["{mono}", "what?", "--model", "{model}"], "--hearing duplicate"),
        (["{mono}", " ", "--model", "{model}"], "question: expected words, found none"),
        (["{mono}", "--model", "{model}"], "ask: expected files, then a question, found the file"),
        (["{mono}", "--choices", "a", "b", "what?", "--model", "{model}"], "--choices behind the question"),
    ],
)
def test_says_what_is_wrong(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    mono = tmp_path / "mono.wav"
    mono.write_bytes(encode(Waveform(np.zeros((1, 16000), np.float32), 16000, "mono"), "wav"))
    assert cli.main(["ask", *(word.format(model=checkpoint(), mono=mono) for word in words)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "demo"])
def test_a_port_is_one(verb: str, checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, str(checkpoint()), "--port", "99999"]) == 2
    assert "--port: expected 1 to 65535, found 99999" in capsys.readouterr().err


def test_a_checkpoint_without_its_words_is_none(
    checkpoint, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers makes a tokenizer that knows no word of it, and every reply is empty."""
    shutil.copytree(checkpoint(), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert cli.main(["ask", str(clip), "What?", "--model", str(tmp_path / "model")]) == 2
    assert "expected the tokenizer's words (tokenizer.json), found none" in capsys.readouterr().err


def test_grammar_admits_exactly_the_replies_of_a_style() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    choices = ['the "dog"', "rain\\snow", "été"]
    compiled = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([chr(i) for i in range(32, 127)])).compile_grammar
    for style in prompts.STYLES:
        grammar = xgrammar.Grammar.from_ebnf(prompts.reply_grammar(choices, style))
        lead = {"answer": "", "think": "<think>I hear</think>\n"}.get(
            style, "<think>I hear</think>\n<semantic_elements>who: dog</semantic_elements>\n"
        )
        for letter, choice in zip("ABC", choices, strict=True):
            said = f"({letter}) {choice}"
            assert accepts(compiled(grammar), said if style == "plain" else f"{lead}<answer>{said}</answer>")
        assert not accepts(compiled(grammar), f"{lead}<answer>(B) été</answer>")
        assert not accepts(compiled(grammar), f"{lead}<answer>cat</answer>")


def accepts(compiled, text: str) -> bool:
    import xgrammar

    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


def test_a_dry_clip_is_heard_in_the_room_of_its_response(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo of BAT: it answers as about the file that holds the rendered scene."""
    rng = np.random.default_rng(4)
    clips, rooms = [tmp_path / f"{n}.wav" for n in range(2)], [tmp_path / f"{n}.npy" for n in range(2)]
    wet = []
    for clip, room in zip(clips, rooms, strict=True):
        dry, response = rng.normal(0, 0.02, 8000), rng.normal(0, 0.05, (2, 200))
        clip.write_bytes(encode(Waveform(dry[None].astype(np.float32), 16000, "mono"), "wav", "FLOAT"))
        np.save(room, response)
        dry = dry.astype(np.float32) * (10 ** (-14 / 20) / np.sqrt(np.mean(dry.astype(np.float32) ** 2)))
        wet.append(np.stack([np.convolve(dry, one) for one in response]))
    scene = np.zeros((2, 16000), np.float32)
    scene[:, : wet[0].shape[1]] = (wet[0] + wet[1]) / 2
    file = tmp_path / "scene.wav"
    file.write_bytes(encode(Waveform(scene, 16000, "binaural"), "wav", "FLOAT"))
    model = ["--model", str(checkpoint()), "--max-tokens", "8", "--beams", "2"]
    capsys.readouterr()  # what building the checkpoint printed
    given = [
        part for pair in zip(clips, rooms, strict=True) for part in ("--dry", str(pair[0]), "--response", str(pair[1]))
    ]
    assert cli.main(["ask", *given, "Where?", "--response-rate", "16000", "--seconds", "1", *model]) == 0
    heard = capsys.readouterr().out
    assert cli.main(["ask", str(file), "Where?", *model]) == 0
    assert capsys.readouterr().out == heard and heard.startswith("answer:")
    for words, reason in (
        (["--dry", str(clips[0]), "Where?"], "--dry with a --response each"),
        ([str(file), "--dry", str(clips[0]), "--response", str(rooms[0]), "Where?"], "1 files, 1 --dry"),
        (["--dry", str(clips[0]), "--response", str(clips[0]), "Where?"], "an .npy file"),
        (["--dry", str(clips[0]), "--response", str(rooms[0]), "Where?", "--response-rate", "3"], "4000 to 192000 Hz"),
        ([str(file), "Where?", "--beams", "3", "--temperature", "1"], "temperature 0 and free replies"),
        ([str(file), "Where?", "--beams", "99"], "beams: expected 1 to 16"),
    ):
        assert cli.main(["ask", *words, *model[:2], *([] if "--beams" in words else model[2:])]) == 2
        assert reason in capsys.readouterr().err
