"""The cache of a frozen encoder: the same training, and an encoder that is not run twice for one clip."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from audio_llm.errors import ConfigError, TrainingError
from audio_llm.model.build import load_model
from audio_llm.model.encoder import AudioEncoder
from audio_llm.training import grpo, sft
from audio_llm.training.encoder_cache import EncoderCache, TokenStore, encoder_digest
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


def frozen(checkpoint):
    model = load_model(checkpoint()).eval()
    return model.requires_grad_(False).model


def test_damaged_entries_and_files_are_computed_again(checkpoint, tmp_path, calls):
    model = frozen(checkpoint)
    tokens, _ = EncoderCache(tmp_path, model)(*windows())
    (path,) = tmp_path.glob("*.sqlite")
    with closing(sqlite3.connect(path)) as table, table:
        ((data,),) = table.execute("select data from windows limit 1").fetchall()
        table.execute("update windows set data = ? where data = ?", (bytes([data[0] ^ 1]) + data[1:], data))
    again, _ = EncoderCache(tmp_path, model)(*windows())
    assert calls == [3, 1] and torch.allclose(again, tokens, atol=1e-6)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="begun anew"):
        again, _ = EncoderCache(tmp_path, model)(*windows())
    assert calls == [3, 1, 3] and torch.equal(again, tokens)
    EncoderCache(tmp_path, model)(*windows())
    assert calls == [3, 1, 3]


def test_half_precision_is_half_the_size_and_the_same_in_every_epoch(checkpoint, tmp_path):
    model, sizes = frozen(checkpoint), {}
    exact, mask = model.encode_audio(*windows())
    for dtype in (torch.float32, torch.bfloat16):
        cache = EncoderCache(tmp_path / str(dtype), model, dtype)
        first, second = cache(*windows()), cache(*windows())
        assert first[0].dtype == torch.float32 and torch.equal(first[0], second[0]) and torch.equal(second[1], mask)
        valid = first[0][mask]
        assert torch.equal(valid, exact[mask].to(dtype).float()) or torch.allclose(valid, exact[mask], rtol=2**-7)
        with closing(sqlite3.connect(cache.store.path)) as table:
            sizes[dtype] = table.execute("select sum(length(data)) - sum(count) from windows").fetchone()[0]
    assert sizes[torch.float32] == 2 * sizes[torch.bfloat16] == 4 * exact.numel()


def test_a_full_folder_keeps_what_it_has(checkpoint, tmp_path, calls):
    model, limit = frozen(checkpoint), 2**19
    cache = EncoderCache(tmp_path, model, limit_gib=limit / 2**30)
    with pytest.warns(UserWarning, match="takes no more windows") as told:
        for seed in range(100):
            cache(*windows(seed=seed))
    assert len(told) == 1 and calls == [3] * 100
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < limit + 2**18
    cache(*windows(seed=0))
    tokens, mask = cache(*windows(seed=99))
    assert cache.hits == 3 and torch.allclose(tokens, model.encode_audio(*windows(seed=99))[0], atol=1e-5)


FILL = """
import itertools, sys, torch
from pathlib import Path
from audio_llm.training.encoder_cache import TokenStore
store = TokenStore(Path(sys.argv[1]), torch.float32, 2**30)
for name in itertools.count(50):
    store.write({b"%016d" % name: (torch.full((5, 8), float(name)), torch.arange(5) < name % 5)})
    print(name, flush=True)
"""


def test_processes_fill_one_file_together_and_a_killed_one_harms_nothing(tmp_path):
    arguments = [sys.executable, "-c", FILL, str(tmp_path / "a.sqlite")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "50\n"
        store = TokenStore(tmp_path / "a.sqlite", torch.float32, 2**30)
        for name in range(100):  # both write 50 and what follows
            store.write({b"%016d" % name: (torch.full((5, 8), float(name)), torch.arange(5) < name % 5)})
        other.kill()
        last = max(map(int, other.stdout.read().split()), default=50)
    store = TokenStore(tmp_path / "a.sqlite", torch.float32, 2**30)
    names = range(max(100, last + 1))
    found = store.read([b"%016d" % name for name in names])
    assert len(found) == len(names)
    for name in names:
        tokens, mask = found[b"%016d" % name]
        assert (tokens == name).all() and tokens.shape == (5, 8) and mask.tolist() == [n < name % 5 for n in range(5)]
    store.write({b"after the killed.": (torch.zeros(1, 8), torch.ones(1, dtype=torch.bool))})
    assert len(store.read([b"after the killed."])) == 1


def test_a_trained_encoder_and_an_unwritable_folder_are_refused(checkpoint, shards, tmp_path):
    with pytest.raises(ConfigError, match="encoder: frozen"):
        changes = {"train": {"encoder": "full"}, "encoder_cache": tmp_path / "c", "steps": 1}
        sft.run(recipe_of(tmp_path / "run", checkpoint(), shards(), **changes))
    model = load_model(checkpoint())
    model.requires_grad_(False)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="can be written"):
        EncoderCache(tmp_path / "file", model.model)(*windows())
    with pytest.raises(ConfigError, match="encoder_cache_gib: expected a finite number above 0, found 0"):
        recipe_of(tmp_path / "run", checkpoint(), shards(), encoder_cache_gib=0, steps=1).check()


def test_grpo_reads_the_same_cache(checkpoint, shards, tmp_path, calls):
    def run(name: str) -> dict[str, int]:
        recipe = make_recipe(checkpoint, shards, tmp_path / name, steps=2, encoder_cache=tmp_path / "cache")
        return grpo.run(recipe, transformers_engine)["encoder_cache"]

    filled = run("first")
    calls.clear()
    assert run("second") == {"hits": sum(filled.values()), "misses": 0} and calls == []
    assert filled["misses"] > 0
