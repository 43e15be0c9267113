"""``audio-llm ask`` with a checkpoint in this process, and what it refuses; the server's part: test_vllm_server."""

from __future__ import annotations

import json
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
        (["what?", "--model", "{model}", "--constrain", "--choices", "a"], "--engine vllm"),
        (["{mono}", "what?", "--model", "{model}"], "--hearing duplicate"),
    ],
)
def test_says_what_is_wrong(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    mono = tmp_path / "mono.wav"
    mono.write_bytes(encode(Waveform(np.zeros((1, 16000), np.float32), 16000, "mono"), "wav"))
    assert cli.main(["ask", *(word.format(model=checkpoint(), mono=mono) for word in words)]) == 2
    assert reason in capsys.readouterr().err


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
