"""Projectors of every kind: so many embeddings as they say, the same alone and in a padded batch, as loud as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from audio_llm.errors import AudioError, CheckpointError, ConfigError
from audio_llm.language.prompts import AUDIO_TOKEN
from audio_llm.model.build import load_model, load_processor
from audio_llm.model.projector import build_projector
from audio_llm.model.validate import audio_marks, check_checkpoint
from tests.conftest import PROJECTORS, WHISPER

KINDS = [
    PROJECTORS["qformer"],
    {"name": "linear"},
    {"name": "linear", "norm": False, "bias": False},
    {"name": "linear", "group": 3},
    {"name": "mlp", "group": 4},
    {"name": "mlp", "group": 2, "hidden_size": 24, "norm": False},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_window_alone_and_in_a_padded_batch(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    projector = build_projector(fields, 16, 32).eval()
    counts = torch.tensor([11, 1, 6, 8])
    mask = torch.arange(13) < counts[:, None]
    tokens = torch.randn(4, 13, 16).masked_fill(~mask[..., None], torch.nan if "name" in fields else 9.0)
    together, valid = projector(tokens, mask)
    assert together.shape[:2] == valid.shape and together[valid].isfinite().all()
    for row, count in enumerate(counts.tolist()):
        wanted = projector.config.count(0, lambda _, count=count: count)
        assert valid[row].tolist() == [place < wanted for place in range(valid.shape[1])]
        alone, kept = projector(tokens[row : row + 1, :count], mask[row : row + 1, :count])
        torch.testing.assert_close(together[row][valid[row]], alone[kept], atol=1e-5, rtol=1e-5)
    together[valid].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in projector.linear.parameters())


def test_a_plain_linear_can_be_said() -> None:
    """As Qwen2-Audio has it: nothing but the weights of one ``nn.Linear``."""
    projector = build_projector({"name": "linear", "norm": False}, 6, 4)
    plain = nn.Linear(6, 4)
    assert {name: tuple(value.shape) for name, value in projector.state_dict().items()} == {
        f"linear.{name}": tuple(value.shape) for name, value in plain.state_dict().items()
    }
    plain.load_state_dict(projector.linear.state_dict())
    tokens, mask = torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found, valid = projector(tokens, mask)
    assert torch.equal(found[valid], plain(tokens)[mask]) and torch.equal(valid, mask)
    projector = build_projector({"name": "linear", "norm": False, "bias": False}, 6, 6)
    nn.init.eye_(projector.linear.weight)  # and none at all
    assert torch.equal(projector(tokens, mask)[0][mask], tokens[mask])


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_fresh_one_is_as_loud_as_it_is_told(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    projector = build_projector(fields, 64, 128)
    projector.set_loudness(0.02)
    with torch.no_grad():
        embeddings, _ = projector(torch.randn(8, 12, 64), torch.ones(8, 12, dtype=torch.bool))
    assert 0.01 < embeddings.square().mean().sqrt() < 0.03


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"name": "linaer"}, r"projector.name: expected one of linear, .* found 'linaer' \(did you mean 'linear'"),
        ({"name": "torch.nn:Linear"}, r"found 'torch.nn:Linear' \(it has no 'config_class'"),
        ({"name": "linear", "num_query_tokens": 4}, "unknown key 'num_query_tokens'"),
        ({"name": "mlp", "group": 0}, "projector.group: expected 1 or more tokens, found 0"),
    ],
)
def test_what_cannot_be_built_is_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_projector(fields, 8, 8)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_longer_sound_has_more_placeholders(checkpoint, projector: str) -> None:
    folder = checkpoint(channels=1, projector=projector)
    model, processor = load_model(folder), load_processor(folder)
    group, window = PROJECTORS[projector]["group"], 10240
    assert processor.feature_extractor.window_samples == window and WHISPER["window_seconds"] == 0.64
    found = []
    for samples in (16, 320, 321, 4000, window, window + 1, 2 * window + 700):
        clip = np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32)
        inputs = processor(text=[f"{AUDIO_TOKEN} what?"], audio=[[clip]])
        count = int((inputs["input_ids"] == processor.audio_token_id).sum())
        whole, rest = divmod(samples, window)
        tokens = -(-rest // 320)  # 20 ms each, the last one cut short
        by_hand = whole * -(-32 // group) + -(-tokens // group)
        assert count == processor.audio_tokens(samples) == by_hand
        assert len(model.get_audio_features(inputs["input_audio"], inputs["audio_lengths"])) == count
        found.append(count)
    assert found[0] == 1 and found == sorted(found) and found[-1] > 2 * found[4]


# ----------------------------------------------------------------------------------------------------------- the marks


def with_marks(folder: Path, out: Path) -> Path:
    """The checkpoint of `folder` with other marks of audio than ours, as published models have them."""
    model, processor = load_model(folder), load_processor(folder)
    words = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    processor.tokenizer.add_special_tokens({"extra_special_tokens": words}, replace_extra_special_tokens=False)
    ids = processor.tokenizer.convert_tokens_to_ids(words)
    model.resize_token_embeddings(max(ids) + 1)
    model.config.audio_token_id, model.config.audio_marks = ids[0], ids[1:]
    model.generation_config.suppress_tokens = model.config.forbidden_token_ids
    written = processor.chat_template.replace(f"'{AUDIO_TOKEN}' }}}}", "'<|audio_bos|><|AUDIO|><|audio_eos|>' }}")
    assert written != processor.chat_template
    processor.chat_template = written
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def test_the_marks_are_the_checkpoints(checkpoint, tmp_path: Path) -> None:
    """Placeholder and what stands around it; none of them is ever said."""
    from audio_llm.answering.base import Options, Request
    from audio_llm.answering.engines import TransformersEngine
    from audio_llm.audio import Waveform
    from eval.benchmarks.base import Item

    folder = with_marks(checkpoint(channels=1, projector="mlp"), tmp_path / "marked")
    config = check_checkpoint(folder)
    assert audio_marks(folder, config) == ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    model, processor = load_model(folder), load_processor(folder)
    clip = 0.1 * np.random.default_rng(0).standard_normal((1, 5000)).astype(np.float32)
    prompt = processor.render(
        [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Which?"}]}], generate=True
    )
    inputs = processor(text=[prompt], audio=[[clip]])
    ids, marks = inputs["input_ids"][0].tolist(), model.config.forbidden_token_ids
    assert len(marks) == 3 and ids.count(marks[0]) == processor.audio_tokens(5000) == 4
    start = ids.index(marks[0])
    assert ids[start - 1] == marks[1] and ids[start + 4] == marks[2]
    with torch.no_grad():  # the marks made the likeliest words
        hidden = model.model(**{k: v for k, v in inputs.items() if k != "audio_windows"}).last_hidden_state[0, -1]
        for mark in marks:
            model.lm_head.weight[mark] = 20 * hidden / hidden.square().sum()
    model.generation_config.suppress_tokens = None  # the engine's guard has to stand alone
    model.save_pretrained(folder)
    engine = TransformersEngine(Options(model=folder))
    item = Item("a", "Which?", [], "x", "sound", "t", "c")
    request = Request(item, (Waveform(clip, 16000, "mono"),), max_tokens=4)
    (answer,) = engine.generate([request])
    assert not answer.error and not any(word in answer.raw for word in ("<|AUDIO|>", "<|audio_bos|>"))
    said = engine._model.generate(**engine._encode([prompt], [request]), max_new_tokens=1, do_sample=False)
    assert int(said[0, -1]) in marks  # without the guard it would be


def test_marks_that_are_none_are_refused(checkpoint, tmp_path: Path) -> None:
    import json
    import shutil

    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace(AUDIO_TOKEN, "<audio>"))
    with pytest.raises(CheckpointError, match=r"a chat template that writes <\|audio\|>"):
        check_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(template)
    for changes, match in (
        ({"audio_token_id": 60}, "a special token of the id 60"),
        ({"audio_marks": [10**6]}, "audio_marks inside the vocabulary"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=match):
            check_checkpoint(folder)


def test_sound_too_short_for_an_embedding_is_refused(checkpoint) -> None:
    extractor = load_processor(checkpoint(channels=1, projector="linear")).feature_extractor
    extractor.min_samples = 321  # of an encoder whose first token comes later
    with pytest.raises(AudioError, match="at least 321 samples, found 320"):
        extractor([np.zeros((1, 320), np.float32)])
