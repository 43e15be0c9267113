"""Native audio models, tiny and random: as our three parts they compute what their own classes do, and go back."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from audio_llm.cli import main
from audio_llm.errors import AudioError, CheckpointError, ConfigError, DataError
from audio_llm.language import prompts, tekken
from audio_llm.model.build import load_model, load_processor
from audio_llm.model.encoder import build_encoder
from audio_llm.model.native import absorb, native_kind, write_native
from audio_llm.model.validate import check_checkpoint
from tests.native_models import ENDS, KINDS, MARKS, OMNI, ONE_FORM, PROCESSORS, TEMPLATES, Stock, make_native, sound

SECONDS = (0.5, 2.4, 30.0)  # but for Omni the last is the whole window
COUNTS = {"voxtral": [375, 375, 375], "glm_asr": [6, 30, 375]}  # embeddings; it hears the silence up to 30 s as well
LIMITS = dict.fromkeys(KINDS, 300) | {"qwen2_audio": 30, "audio_flamingo_3": 90, "glm_asr": 90}  # seconds
needs_mistral = pytest.mark.skipif("voxtral" not in KINDS, reason="needs mistral-common")


@pytest.fixture(scope="module")
def native(made_once) -> Callable[[str], Path]:
    """``native(kind)`` → the folder of a native model, made once."""
    return lambda kind: made_once(f"native-{kind}", lambda folder: make_native(kind, folder))


@pytest.fixture(scope="module")
def absorbed(made_once, native) -> Callable[[str], Path]:
    """``absorbed(kind)`` → the checkpoint that was made of it."""
    return lambda kind: made_once(f"absorbed-{kind}", lambda folder: absorb(native(kind), folder))


class Words:
    question, choices = "Which sound is heard?", ("dog", "rain")


def batch(processor, clips: list[np.ndarray]):
    """One prompt a clip, left padded."""
    prompt = processor.render(prompts.conversation(Words()), generate=True)
    return processor(text=[prompt] * len(clips), audio=[[clip] for clip in clips])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_its_own_class(kind, native, absorbed):
    stock, model, processor = Stock(native(kind)), load_model(absorbed(kind)), load_processor(absorbed(kind))
    clips = [sound(seconds, number) for number, seconds in enumerate(SECONDS)]
    inputs = batch(processor, clips)
    counts = (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist()
    assert counts == COUNTS.get(kind, [12, 60, 750]) == [processor.audio_tokens(clip.shape[1]) for clip in clips]
    expected = stock.logits(inputs["input_ids"], inputs["attention_mask"], clips)
    heard = inputs["attention_mask"].bool()
    # Omni's class counts positions from a prompt's first word on, the other one from the padding on: rounding differs.
    places = {} if kind not in OMNI else {"position_ids": (heard.long().cumsum(1) - 1).clamp(min=0)}
    with torch.inference_mode():
        found = model(**inputs, **places).logits
    assert float((found - expected)[heard].abs().max()) <= 1e-5
    other = stock.logits(inputs["input_ids"][2:], inputs["attention_mask"][2:], [sound(30.0, 9)])
    assert float((other[0, -1] - expected[2, -1]).abs().max()) > 1e-2  # it is the sound that is heard
    with torch.inference_mode():  # alone, and beside others (whose positions begin later, which rounds otherwise)
        alone = model(**batch(processor, clips[:1])).logits[0, -1]
    assert float((alone - found[0, -1]).abs().max()) <= 5e-5


LONG = [kind for kind in (*PROCESSORS, "voxtral") if kind in KINDS]


@pytest.mark.parametrize("kind", LONG)
def test_a_long_clip_is_several_windows_as_in_its_own_class(kind, native, absorbed):
    stock, model, processor = Stock(native(kind)), load_model(absorbed(kind)), load_processor(absorbed(kind))
    lengths = [1.3, 61.3, 30.03, 60.0, 30.0001, 30.02]
    if kind == "music_flamingo":
        lengths = lengths[:-2]  # its class ends in an IndexError for these
    clips = [sound(seconds, number) for number, seconds in enumerate(lengths)]
    clips[1][:, 16000:] *= 1e-4  # a loud second and a quiet minute: the one may set the floor of the other
    inputs = batch(processor, clips)
    # Of the last two, the processors of the others have no token for what lies behind the first window.
    own = {"voxtral": [375, 1125, 750, 750, 750, 750], "glm_asr": [16, 766, 375, 750, 375, 375]}
    expected = own.get(kind, [32, 1532, 751, 1500, 750, 750])
    assert [processor.audio_tokens(clip.shape[1]) for clip in clips] == expected[: len(clips)]
    assert processor.audio_tokens(480001) == expected[-1]
    expected = stock.logits(inputs["input_ids"], inputs["attention_mask"], clips)
    with torch.inference_mode():
        found = model(**inputs).logits
    assert float((found - expected)[inputs["attention_mask"].bool()].abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_ids_of_a_prompt_are_those_of_the_published_processor(kind, native, absorbed):
    stock, processor = Stock(native(kind)).processor, load_processor(absorbed(kind))
    turn = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Which sound is heard?"}]}]
    text = stock.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    expected = stock(text=[text], audio=[sound(31.7)[0]])["input_ids"]
    ours = processor(text=[processor.render(turn, generate=True)], audio=[[sound(31.7)]])
    assert torch.equal(ours["input_ids"], expected)
    if kind == "glm_asr":
        return
    twice = processor.render([{"role": "user", "content": [{"type": "audio"}, *turn[0]["content"]]}], generate=True)
    with pytest.raises(AudioError, match="1 audio placeholders for 2 audios"):  # its template writes one mark a turn
        processor(text=[twice], audio=[[sound(1.0), sound(2.0)]])


@needs_mistral
def test_a_conversation_is_the_one_of_mistral_common(native, absorbed, tmp_path):
    """Its processor has no template: that library encodes the turns, and fills the sound with silence."""
    clip = (sound(31.7) * 32768).round() / 32768  # it hands sounds on as 16 bits
    soundfile.write(tmp_path / "a.wav", clip[0], 16000)
    stock = transformers.VoxtralProcessor.from_pretrained(native("voxtral"))
    processor = load_processor(absorbed("voxtral"))
    turns = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Which sound is heard?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [{"type": "text", "text": "Of which \n\nsize?"}]},
    ]
    ours = processor(text=[processor.render(turns, generate=True)], audio=[[clip]])
    turns[0]["content"][0]["path"] = str(tmp_path / "a.wav")
    expected = stock.apply_chat_template(turns)
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    model, theirs = load_model(absorbed("voxtral")), Stock(native("voxtral")).model
    with torch.inference_mode():
        assert float((model(**ours).logits - theirs(**expected).logits).abs().max()) <= 1e-5
    with pytest.raises(ConfigError, match="Sound beside a system message"):
        processor.render([{"role": "system", "content": "Listen."}, turns[0]])


@needs_mistral
def test_a_tokenizer_file_that_cannot_be_read_exactly_is_refused(native, tmp_path, monkeypatch):
    folder = copied(native("voxtral"), tmp_path / "model")
    facts = json.loads((folder / "tekken.json").read_text())

    def refused(change: Callable[[dict[str, Any]], object], told: str) -> None:
        changed = copy.deepcopy(facts)
        change(changed)
        (folder / "tekken.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=rf"tekken\.json: {told}"):
            absorb(folder, tmp_path / "out")

    refused(lambda f: f["config"].update(version="v3"), "expected a tokenizer for turns with sound, found")
    refused(lambda f: f.pop("vocab"), "expected a tokenizer for turns with sound, found 'vocab'")
    refused(lambda f: f.pop("audio"), "expected a tokenizer for turns with sound, found")
    encoded = tekken._encoded
    monkeypatch.setattr(tekken, "_encoded", lambda *given: [*encoded(*given), 7])
    refused(lambda f: None, "expected the ids that mistral-common gives its turns, found others for turns of user")
    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.mistral", None)
    refused(lambda f: None, "expected mistral-common, .* found none. Install it")


def test_what_pads_is_not_what_stands_for_a_sound(native, tmp_path):
    folder = copied(native("glm_asr"), tmp_path / "model")
    rewrite(folder / "tokenizer_config.json", {"pad_token": "<|pad|>"})
    processor = load_processor(absorb(folder, tmp_path / "out"))
    assert processor.audio_token == "<|pad|>" and processor.tokenizer.pad_token == "<|endoftext|>"


def test_a_template_without_a_mark_for_sound_is_refused(native, tmp_path):
    folder = copied(native("qwen2_audio"), tmp_path / "model")
    for template, found in (("{{ messages[0]['role'] }}", "0"), ("{{ raise_exception('Only words.') }}", "Only words")):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(CheckpointError, match=rf"expected one <.AUDIO.> for a message's sound, found .*{found}"):
            absorb(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ONE_FORM)
def test_sounds_that_end_with_a_frame_a_chunk_or_the_window(kind, native, absorbed):
    stock, model, processor = Stock(native(kind)), load_model(absorbed(kind)), load_processor(absorbed(kind))
    for seconds in (0.0601 if kind == "glm_asr" else 0.0201, 1.9999, 2.0001, 4.03, 29.975, 29.99):
        clip = sound(seconds)
        inputs = batch(processor, [clip])
        assert processor.audio_tokens(clip.shape[1]) == stock.embeddings(clip)
        expected = stock.logits(inputs["input_ids"], inputs["attention_mask"], [clip])
        with torch.inference_mode():
            assert float((model(**inputs).logits - expected).abs().max()) <= 1e-5, seconds


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_trained_goes_back_byte_for_byte(kind, native, absorbed, tmp_path):
    assert main(["convert", "native", str(absorbed(kind)), str(tmp_path / "out"), *form_of(kind)]) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (native(kind), tmp_path / "out"))
    assert list(expected) == list(found)
    assert all(same_bytes(expected[key], found[key]) for key in expected)
    names = {path.name for path in native(kind).iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    for name in names - {"model.safetensors"}:
        assert (native(kind) / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def form_of(kind: str) -> list[str]:
    return ["--form", kind] if kind in OMNI else []


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_bfloat16_stays_and_comes_back_from_float32(native, tmp_path):
    half = copied(native("qwen2_audio"), tmp_path / "half")
    state = load_file(half / "model.safetensors")
    save_file({key: value.bfloat16() for key, value in state.items()}, half / "model.safetensors", {"format": "pt"})
    checkpoint = absorb(half, tmp_path / "checkpoint")
    stored = load_file(checkpoint / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    model = load_model(checkpoint, dtype=torch.float32)  # as training loads it
    model.save_pretrained(checkpoint)
    assert {value.dtype for value in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    write_native(checkpoint, tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(half / "model.safetensors")
    assert all(same_bytes(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OMNI])
def test_a_freshly_built_model_is_read_as_well_and_written_by_the_published_names(kind, native, tmp_path):
    fresh = make_native(kind, tmp_path / "fresh", fresh=True)
    assert any(key.startswith("language_model.model.model.") for key in load_file(fresh / "model.safetensors"))
    write_native(absorb(fresh, tmp_path / "checkpoint"), tmp_path / "out")
    found, published = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", native(kind)))
    assert set(found) == set(published)
    assert all(torch.equal(found[key], published[key]) for key in found)


def test_a_thinker_goes_into_either_form(native, absorbed, tmp_path):
    thinker, whole = load_file(native("thinker") / "model.safetensors"), load_file(native("omni") / "model.safetensors")
    for kind in ("thinker", "omni"):
        write_native(absorbed(kind), tmp_path / f"{kind}-omni")  # the usual form
        write_native(absorbed(kind), tmp_path / f"{kind}-thinker", form="thinker")
    found = load_file(tmp_path / "thinker-omni" / "model.safetensors")
    assert set(found) == {key for key in whole if key.startswith("thinker.")}
    assert all(torch.equal(value, thinker[key.removeprefix("thinker.")]) for key, value in found.items())
    assert set(load_file(tmp_path / "omni-omni" / "model.safetensors")) == set(whole)  # the talker too
    assert set(load_file(tmp_path / "omni-thinker" / "model.safetensors")) == set(thinker)
    ids = torch.tensor([[5, 6, 7]])
    expected = Stock(native("thinker")).logits(ids, torch.ones_like(ids), [])
    for folder in sorted(tmp_path.iterdir()):
        assert native_kind(folder) is not None
        assert torch.equal(Stock(folder).logits(ids, torch.ones_like(ids), []), expected), folder.name


@pytest.mark.parametrize("kind", KINDS)
def test_its_template_and_marks_are_kept(kind, native, absorbed):
    processor, folder = load_processor(absorbed(kind)), absorbed(kind)
    rendered = processor.render(prompts.conversation(Words(), audios=2), generate=True)
    plain = processor.tokenizer.apply_chat_template(
        prompts.conversation(Words(), audios=2),
        chat_template=TEMPLATES[kind],
        tokenize=False,
        add_generation_prompt=True,
    )
    if kind == "music_flamingo":  # whose processor writes these, and not its template
        plain = plain.replace("<sound>", "<|sound_bos|><sound><|sound_eos|>")
    assert rendered == plain and MARKS[kind][0] in rendered
    words = f"{MARKS[kind][0]}a{MARKS[kind][-1]}b"
    for content in (words, [{"type": "text", "text": words}]):
        turn = [{"role": "user", "content": content}]
        with pytest.raises(DataError, match="no special token of the model"):
            processor.render(turn)
        typed = processor.tokenizer.apply_chat_template(turn, tokenize=False)  # as a client of another program's would
        assert f"ab{'[/INST]' if kind == 'voxtral' else ENDS[kind]}" in typed and MARKS[kind][0] not in typed
    config = check_checkpoint(folder)
    words = processor.tokenizer.convert_ids_to_tokens([config["audio_token_id"], *config["audio_marks"]])
    own = [] if kind == "voxtral" else ["<|audio|>"]  # one of our small tokenizer's
    assert sorted(words) == sorted([*MARKS[kind], *own])
    generation = json.loads((folder / "generation_config.json").read_text())
    assert sorted(generation["suppress_tokens"]) == sorted(processor.config.forbidden_token_ids)
    assert "repetition_penalty" not in generation
    assert (
        processor.tokenizer.eos_token == ENDS[kind] and processor.tokenizer.eos_token_id in generation["eos_token_id"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_hear_is_refused(kind, absorbed):
    processor, model = load_processor(absorbed(kind)), load_model(absorbed(kind))
    limit = LIMITS[kind]
    extractor = processor.feature_extractor
    with pytest.raises(AudioError, match=rf"at most {limit} s .\d windows.*found {limit + 1}\.00 s"):
        extractor.validate(np.zeros((1, 16000 * (limit + 1)), np.float32))
    with pytest.raises(AudioError, match=r"1 channel \(mono\).*hearing left"):
        extractor.validate(np.zeros((2, 16000), np.float32))
    with pytest.raises(AudioError, match="finite"):
        extractor.validate(np.full((1, 16000), np.nan, np.float32))
    with pytest.raises(AudioError, match="at least 16 samples"):
        extractor.validate(np.zeros((1, 15), np.float32))
    least = 375 if kind == "voxtral" else 1  # none in the published code of the others up to 320 samples
    assert processor.audio_tokens(16) == processor.audio_tokens(641) == least
    prompt = processor.render(prompts.conversation(Words()), generate=True)
    with pytest.raises(AudioError, match="1 audio placeholders for 0 audios"):
        processor(text=[prompt])
    with pytest.raises(ValueError, match="placeholder ids but no audio"):
        model(input_ids=torch.tensor([[5, processor.audio_token_id]]))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns(".*", "audio-llm")))


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda f: edited(f, lambda s: s.pop("audio_tower.conv1.weight")),
        r"missing model\.audio_encoder\.conv1",
    ),
    "unknown": (lambda f: edited(f, lambda s: s.update(strange=torch.ones(2))), "unknown strange"),
    "shape": (
        lambda f: edited(f, lambda s: s.update({"language_model.model.norm.weight": torch.ones(3)})),
        r"norm\.weight: expected \(64,\), found \(3,\)",
    ),
    "head": (lambda f: edited(f, lambda s: s.pop("language_model.lm_head.weight")), r"expected lm_head\.weight"),
    "quantised": (
        lambda f: edited(f, lambda s: s.update({"language_model.model.norm.weight": torch.ones(64).to(torch.int8)})),
        "weights that are not quantised",
    ),
    "mel": (
        lambda f: (f / "preprocessor_config.json").write_text(
            (f / "preprocessor_config.json").read_text().replace('"hop_length": 160', '"hop_length": 200')
        ),
        "expected hop_length 160, found 200",
    ),
    "template": (
        lambda f: [path.unlink() for path in f.glob("chat_template.*")],
        "expected a chat template",
    ),
    "torn": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "safetensors file",
    ),
    "a layer less": (  # Transformers refuses it by an error of its own kind
        lambda f: rewrite(f / "config.json", {"text_config": {"num_hidden_layers": 1, "layer_types": ["a", "b"]}}),
        r"config\.json: expected a configuration that Transformers knows, found .*layer_types",
    ),
    "a tensor under two names": (
        lambda f: edited(
            f, lambda s: s.update({"language_model.model.model.norm.weight": s["language_model.model.norm.weight"] * 2})
        ),
        r"norm\.weight once, found a second one",
    ),
    "kind": (
        lambda f: (f / "config.json").write_text(json.dumps({"model_type": "qwen3"})),
        r"expected a native model \(audioflamingo3, .*, qwen2_audio, voxtral\), found qwen3",
    ),
}


@pytest.mark.parametrize("defect", DAMAGE)
def test_a_damaged_folder_is_refused_in_a_sentence(defect, native, tmp_path):
    damage, told = DAMAGE[defect]
    folder = copied(native("qwen2_audio"), tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=told):
        absorb(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ANOTHER = {  # what a configuration may say and the three parts do not compute
    "activation": (
        "audio_flamingo_3",
        {"projector_hidden_act": "relu"},
        "projector_hidden_act: expected gelu, found relu",
    ),
    "language model": (
        "audio_flamingo_3",
        {"text_config": {"model_type": "llama"}},
        "text_config: expected model_type qwen2, found llama",
    ),
    "no marks": (
        "music_flamingo",
        {"audio_bos_token_id": 5},
        r"special tokens of the ids \(5, .*\) for what stands around a sound, found none",
    ),
    "rotation": (
        "music_flamingo",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1200.0, "factor": 2.0}},
        "rope_parameters: expected rope_type default, found linear",
    ),
    "heads": (
        "glm_asr",
        {"audio_config": {"hidden_size": 32, "intermediate_size": 128, "num_key_value_heads": 2}},
        "num_key_value_heads: expected 20, found 2",
    ),
    "groups": (
        "voxtral",
        {"audio_config": {"hidden_size": 32, "intermediate_size": 130}},
        r"intermediate_size: expected a multiple of hidden_size \(32\).*found 130",
    ),
}


@pytest.mark.parametrize("what", ANOTHER)
def test_a_model_that_computes_something_else_is_refused_in_a_sentence(what, native, tmp_path):
    kind, facts, told = ANOTHER[what]
    if kind not in KINDS:
        pytest.skip("needs mistral-common")
    folder = copied(native(kind), tmp_path / "model")
    rewrite(folder / "config.json", facts)
    with pytest.raises(CheckpointError, match=told):
        absorb(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "why"),
    [("granite_speech", "wears an adapter where there is sound"), ("midashenglm", "a program in its own folder")],
)
def test_an_audio_model_that_is_not_three_parts_is_refused_with_the_reason(kind, why, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    soundfile.write(tmp_path / "a.wav", sound(1.0)[0], 16000)
    for command in (["ask", str(tmp_path / "a.wav"), "What?", "--model"], ["serve"], ["convert", "native"]):
        words = [*command, str(tmp_path), *(["out"] if "native" in command else [])]
        assert main(words) == 2
        told = capsys.readouterr().err
        assert f"encoder, projector and language model alone, found {kind}: " in told and why in told, command


@pytest.mark.parametrize("longest", [20, "long"])
def test_a_processor_that_hears_no_whole_window_is_refused(longest, native, tmp_path):
    folder = copied(native("audio_flamingo_3"), tmp_path / "model")
    rewrite(folder / "processor_config.json", {"max_audio_len": longest})
    with pytest.raises(CheckpointError, match=r"processor_config\.json: expected max_audio_len, 30 s or more"):
        absorb(folder, tmp_path / "out")


def rewrite(path: Path, facts: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize("flag", [True, False, None], ids=str)
@pytest.mark.parametrize("weights", ["other", "equal"])
def test_whether_a_head_is_tied_is_told_by_the_weights(flag, weights, native, tmp_path):
    """Published flags lie: without one, Transformers takes the class's own, vLLM that of the language model."""
    folder = copied(native("qwen2_audio"), tmp_path / "model")
    facts = json.loads((folder / "config.json").read_text())
    facts["text_config"].pop("tie_word_embeddings", None)
    facts.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(facts | ({} if flag is None else {"tie_word_embeddings": flag})))
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if weights == "equal":
        edited(folder, lambda state: state.update({head: state[table].clone()}))
    config = check_checkpoint(absorb(folder, tmp_path / "out"))
    tied = flag is True and weights == "equal"
    assert config["tie_word_embeddings"] is tied
    write_native(tmp_path / "out", tmp_path / "back")
    found, expected = (load_file(path / "model.safetensors")[head] for path in (tmp_path / "back", folder))
    assert torch.equal(found, expected)


def test_a_source_that_is_another_model_or_gone_is_refused(native, absorbed, tmp_path):
    other = copied(native("qwen2_audio"), tmp_path / "other")
    edited(other, lambda state: state["audio_tower.conv1.weight"].add_(1.0))
    with pytest.raises(CheckpointError, match=r"expected the weights that the checkpoint came from.*--source"):
        write_native(absorbed("qwen2_audio"), tmp_path / "out", other)
    with pytest.raises(CheckpointError, match="expected a folder of qwen2_audio"):
        write_native(absorbed("qwen2_audio"), tmp_path / "out", native("thinker"))
    with pytest.raises(CheckpointError, match="form: expected none, for there is but one, found thinker"):
        write_native(absorbed("qwen2_audio"), tmp_path / "out", form="thinker")
    moved = copied(native("qwen2_audio"), tmp_path / "moved")
    assert write_native(absorbed("qwen2_audio"), tmp_path / "out", moved).is_dir()


def test_convert_takes_a_native_folder_and_refuses_what_says_nothing(native, absorbed, tmp_path, capsys):
    assert main(["convert", "native", str(native("qwen2_audio")), str(tmp_path / "out")]) == 0
    assert check_checkpoint(tmp_path / "out")["native"]["model_type"] == "qwen2_audio"
    assert main(["convert", "native", str(native("thinker")), str(tmp_path / "o"), "--form", "omni"]) == 2
    assert "Leave --form out" in capsys.readouterr().err


def test_a_tower_is_an_encoder_for_other_language_models_too(native, absorbed):
    for kind in KINDS:
        encoder = build_encoder({"name": load_model(absorbed(kind)).config.encoder["name"], "published": native(kind)})
        theirs = load_model(absorbed(kind)).model.audio_encoder
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "name", ["qwen2_audio", "qwen2_5_omni", "audio_flamingo_3", "music_flamingo", "voxtral", "glm_asr"]
)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "preset": "tiny"}).train()
    clip, length = torch.from_numpy(sound(2.1))[None], torch.tensor([33600])
    found = []
    for encoder.gradient_checkpointing in (False, True):
        encoder.zero_grad()
        tokens, mask = encoder(clip, length)
        tokens[mask].square().mean().backward()
        found.append({key: value.grad.clone() for key, value in encoder.named_parameters()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert any(value.abs().max() > 0 for key, value in found[0].items() if "layers.0." in key)
