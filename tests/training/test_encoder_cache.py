"""The cache of a frozen encoder: the same training, and an encoder that is not run twice for one clip."""

from __future__ import annotations

import pytest
import torch

from audio_llm.errors import ConfigError, TrainingError
from audio_llm.model.build import load_model
from audio_llm.model.encoder import AudioEncoder
from audio_llm.training import grpo, sft
from audio_llm.training.encoder_cache import EncoderCache, encoder_digest
from tests.training.test_grpo import make_recipe, transformers_engine
from tests.training.test_sft import losses, recipe_of


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Windows that went through an encoder, one entry per forward pass."""
    seen: list[int] = []
    forward = AudioEncoder.forward

    def counted(self, waveform, lengths):
        seen.append(len(waveform))
        return forward(self, waveform, lengths)

    monkeypatch.setattr(AudioEncoder, "forward", counted)
    return seen


def windows(count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(count, 2, 8000, generator=generator), torch.tensor([8000, 5000, 8000][:count])


def test_training_from_the_cache_is_the_same_training(checkpoint, shards, tmp_path, calls):
    run = {"steps": 6, "batch_size": 4}
    sft.run(recipe_of(tmp_path / "plain", checkpoint(), shards(), **run))
    first = sft.run(recipe_of(tmp_path / "first", checkpoint(), shards(), encoder_cache=tmp_path / "cache", **run))
    assert first["encoder_cache"]["misses"] > 0
    calls.clear()
    second = sft.run(recipe_of(tmp_path / "second", checkpoint(), shards(), encoder_cache=tmp_path / "cache", **run))
    assert calls == [] and second["encoder_cache"] == {"hits": 24, "misses": 0}
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "first") == pytest.approx(plain, abs=1e-5)
    assert losses(tmp_path / "second") == pytest.approx(plain, abs=1e-5)


def test_a_window_is_encoded_once_and_read_as_it_was(checkpoint, tmp_path, calls):
    model = load_model(checkpoint()).eval()
    model.requires_grad_(False)
    audio, lengths = windows()
    tokens, mask = model.model.encode_audio(audio, lengths)
    calls.clear()
    cache = EncoderCache(tmp_path, model.model)
    for _ in range(2):
        again, same = cache(audio, lengths)
        assert torch.allclose(again, tokens, atol=1e-5) and torch.equal(same, mask)
    assert calls == [3] and (cache.hits, cache.misses) == (3, 3)
    audio[1, :, 6000:] = 1.0  # after its length: not a part of the clip
    cache(audio, lengths)
    audio[1, :, 100] += 0.01
    cache(audio, lengths)
    assert (cache.hits, cache.misses) == (8, 4)


def test_another_encoder_has_another_key(checkpoint, tmp_path):
    model = load_model(checkpoint()).eval()
    model.requires_grad_(False)
    before = encoder_digest(model.model.audio_encoder)
    assert encoder_digest(load_model(checkpoint()).model.audio_encoder) == before
    parameter = next(model.model.audio_encoder.parameters())
    parameter.flatten()[0] += 1e-3
    assert encoder_digest(model.model.audio_encoder) != before


def test_damaged_files_are_computed_again(checkpoint, tmp_path, calls):
    model = load_model(checkpoint()).eval()
    model.requires_grad_(False)
    cache = EncoderCache(tmp_path, model.model)
    tokens, _ = cache(*windows())
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    again, _ = EncoderCache(tmp_path, model.model)(*windows())
    assert calls == [3, 3] and torch.equal(again, tokens)


def test_a_trained_encoder_and_an_unwritable_folder_are_refused(checkpoint, shards, tmp_path):
    with pytest.raises(ConfigError, match="encoder: frozen"):
        changes = {"train": {"encoder": "full"}, "encoder_cache": tmp_path / "c", "steps": 1}
        sft.run(recipe_of(tmp_path / "run", checkpoint(), shards(), **changes))
    model = load_model(checkpoint())
    model.requires_grad_(False)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="can be written"):
        EncoderCache(tmp_path / "file", model.model)(*windows())


def test_grpo_reads_the_same_cache(checkpoint, shards, tmp_path, calls):
    def run(name: str) -> dict[str, int]:
        recipe = make_recipe(checkpoint, shards, tmp_path / name, steps=2, encoder_cache=tmp_path / "cache")
        return grpo.run(recipe, transformers_engine)["encoder_cache"]

    filled = run("first")
    calls.clear()
    assert run("second") == {"hits": sum(filled.values()), "misses": 0} and calls == []
    assert filled["misses"] > 0
