"""Sounds that the encoder's cache knows: nothing is decoded, and what is learnt is the same to the last bit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio_llm import audio
from audio_llm.model.build import load_model, load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import AudioInfo
from audio_llm.shards.writer import ShardWriter
from audio_llm.training import sft
from audio_llm.training.encoder_cache import EncoderCache
from audio_llm.training.examples import Example, Examples, collate
from audio_llm.training.sounds import Sounds
from tests.training.test_sft import losses, order, recipe_of

DECODE = "audio_llm.shards.rendering.decode"  # what decodes every sound of a shard


def frozen(folder: Path) -> Any:
    return load_model(folder).eval().requires_grad_(False).model


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the sounds that are decoded in this process."""
    names: list[str] = []
    decode = audio.decode
    monkeypatch.setattr(DECODE, lambda data, **how: names.append(how["name"]) or decode(data, **how))
    return names


def listen(cache: EncoderCache, examples: list[Example], processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of a batch, as the trainer gets them."""
    batch = collate(examples, processor.tokenizer)
    return cache(batch.get("input_audio"), batch.get("audio_lengths"), batch["kept"])


def test_a_run_that_decodes_nothing_learns_the_same(checkpoint, several, tmp_path, decoded):
    """Losses and orders are equal to the last bit with an empty cache, with one that knows all sounds, also in workers
    of the loader, and with one that has the tokens alone, as earlier versions left it."""
    cache = tmp_path / "cache"
    shares = {"silent_share": 0.3, "swap_share": 0.4, "order_share": 0.3}
    for name in ("empty", "known", "workers", "tokens"):
        decoded.clear()
        if name == "tokens":
            with closing(sqlite3.connect(next(cache.glob("*.sqlite")))) as table, table:
                table.execute("drop table sounds")
        with pytest.MonkeyPatch.context() as patch:
            if name == "workers":
                patch.setattr(DECODE, None)  # they are forked: to decode would fail
            changes = {"workers": 2 * (name == "workers"), **shares}
            run = recipe_of(tmp_path / name, checkpoint(), several(), steps=8, encoder_cache=cache, data=changes)
            found = sft.run(run)["encoder_cache"]
        assert losses(tmp_path / name) == losses(tmp_path / "empty") and len(losses(tmp_path / name)) == 8
        assert order(tmp_path / name) == order(tmp_path / "empty")
        if name in ("known", "workers"):
            assert decoded == [] and found["misses"] == 0 < found["hits"]
        else:  # of both 24 sounds, each in its first epoch; the loader reads a batch ahead of the first tokens
            assert 24 <= len(decoded) < 36 and set(decoded) == {*decoded[:24]}


def test_a_resumed_run_is_the_unbroken_one(checkpoint, shards, tmp_path):
    run = {"steps": 8, "save_steps": 3, "encoder_cache": tmp_path / "cache", "keep_checkpoints": 9}
    whole = recipe_of(tmp_path / "run", checkpoint(), shards(), **run)
    sft.run(whole)
    expected = losses(tmp_path / "run")
    for later in ("checkpoint-6", "checkpoint-8"):
        if (tmp_path / "run" / later).exists():
            (tmp_path / "run" / later).rename(tmp_path / later)
    (tmp_path / "run" / "result.json").unlink()
    assert sft.run(whole)["encoder_cache"]["misses"] == 0
    assert losses(tmp_path / "run") == expected and len(expected) == 8


HEARINGS = {("two", "two"): ["refuse"], ("two", "one"): ["duplicate"], ("one", "one"): ["refuse"]}
HEARINGS[("one", "two")] = ["left", "right", "mean"]


@pytest.mark.parametrize("model", ["one", "two"])
def test_no_setting_gets_what_another_one_left(checkpoint, shards, several, tmp_path, model):
    """One cache for all settings: what comes from it is always what the encoder makes of the sound that is decoded
    with the same ones."""
    channels = {"one": 1, "two": 2}
    folder, store = checkpoint(channels=channels[model]), tmp_path / "cache"
    processor, network = load_processor(folder), frozen(folder)
    known = 0

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([(data, hearing) for (m, data), found in HEARINGS.items() if m == model for hearing in found]),
        st.booleans(),
        st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2),
        st.integers(0, 3),
        st.sampled_from([0.15, 0.4, 0.64]),
        st.sampled_from([1, 2000]),
    )
    def check(data_hearing, many, shares, seed, window, rest):
        nonlocal known
        data, hearing = data_hearing
        dataset = ShardDataset((several if many else shards)(channels=channels[data]))
        extractor = processor.feature_extractor
        extractor.window_seconds, extractor.max_windows, extractor.least_rest = window, 8, rest
        how = {"silent_share": shares[0], "swap_share": shares[1], "seed": seed, "hearing": hearing}
        cache = EncoderCache(store, network)
        places = [0, 1, 2, 5]
        expected = [Examples(ShardDataset(dataset.indexes), processor, **how)[place] for place in places]
        batch = collate(expected, processor.tokenizer)
        with torch.no_grad():
            tokens, mask = network.encode_audio(batch["input_audio"], batch["audio_lengths"])
        for turn in range(2):
            examples = Examples(dataset, processor, **how, cache=cache)
            found = [examples[place] for place in places]
            known += sum(one.input_audio is None for one in found)
            assert turn == 0 or all(one.input_audio is None for one in found)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
                assert torch.equal(one.audio_lengths, other.audio_lengths) and one.row == other.row
            again, same = listen(cache, found, processor)
            width = min(mask.shape[1], same.shape[1])
            assert torch.equal(same[:, :width], mask[:, :width]) and same.sum() == mask.sum()
            assert torch.allclose(again[same], tokens[mask], atol=1e-4)

    check()
    assert known >= 60


def test_all_that_decides_a_window_is_in_its_key(checkpoint, shards, monkeypatch):
    """One change at a time: no two keys are equal."""
    processor, dataset = load_processor(checkpoint()), ShardDataset(shards())
    extractor, info = processor.feature_extractor, dataset.load_sample(0).audio[0]

    def key(info: AudioInfo = info, silent: bool = False, mirrored: bool = False, hearing: str = "refuse") -> bytes:
        return Sounds(dataset, extractor, hearing).keys(0, [info], silent, mirrored)[0]

    found = {"plain": key(), "silent": key(silent=True), "mirrored": key(mirrored=True)}
    found |= {"both": key(silent=True, mirrored=True)}
    found |= {hearing: key(hearing=hearing) for hearing in audio.HEARINGS if hearing != "refuse"}
    for item in dataclasses.fields(AudioInfo):
        found[item.name] = key(dataclasses.replace(info, **{item.name: "other"}))
    told = {name: value for name, value in vars(extractor).items() if isinstance(value, (int, float, list))}
    assert {"sampling_rate", "window_seconds", "max_windows", "least_rest", "layouts", "num_channels"} <= set(told)
    for name, value in told.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extractor, name, [*value, "other"] if isinstance(value, list) else value + 1)
            found[f"extractor.{name}"] = key()
    for name, value in {"layouts": ("other",), "sample_rate": 1}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, name, value)
            found[f"shards.{name}"] = key()
    for name in ("__version__", "soundfile.__libsndfile_version__"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"audio_llm.training.sounds.{name}", "other")
            found[name] = key()
    members = dataset.load_audio_bytes(0)
    for place in (0, len(members[0]) // 2, -1):
        changed = bytearray(members[0])
        changed[place] ^= 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "load_audio_bytes", lambda _, data=bytes(changed): [data])
            found[f"byte {place}"] = key()
    assert len(set(found.values())) == len(found) and key() == found["plain"]
    assert Sounds(dataset, extractor, "refuse").keys(0, [], False, False) == []  # its JSON does not tell of it
    monkeypatch.setattr(dataset, "load_audio_bytes", lambda _: [b'{"render": {}}'])
    assert Sounds(dataset, extractor, "refuse").keys(0, [info], False, False) == []  # files elsewhere decide it


def make_wav(folder: Path, source: Path) -> Path:
    """The samples of `source` as WAV, which has no checksum of its own."""
    with ShardWriter(folder, format="wav") as writer:
        for item in ShardDataset(source):
            writer.write(item["sample"], item["waveforms"])
    return folder


def change(dataset: ShardDataset, position: int, old: bytes | None) -> None:
    """Change one bit of a sample's sound, or one digit of its JSON behind `old`, in the shard."""
    folder, row = dataset.locate(position)
    with open(folder / row.shard, "r+b") as shard:
        place = row.audio_offset + row.audio_size // 2
        if old is not None:
            shard.seek(row.json_offset)
            place = row.json_offset + shard.read(row.json_size).index(old) + len(old)
        shard.seek(place)
        byte = shard.read(1)[0]
        shard.seek(place)
        shard.write(bytes([byte ^ 1]) if old is None else (b"1" if byte == ord("0") else b"0"))


@pytest.mark.parametrize("old", [None, b'"sha256": "'], ids=["sound", "checksum"])
def test_what_does_not_fit_its_checksum_is_refused_however_much_is_known(checkpoint, shards, tmp_path, old):
    processor, network = load_processor(checkpoint()), frozen(checkpoint())
    folder = make_wav(tmp_path / "wav", shards(6))
    cache = EncoderCache(tmp_path / "cache", network)
    dataset = ShardDataset(folder)
    examples = Examples(dataset, processor, cache=cache)
    listen(cache, [examples[place] for place in range(6)], processor)
    assert all(examples[place].input_audio is None for place in range(6))
    change(dataset, 2, old)
    # Whoever compared it before decodes it as it is now, and leaves nothing of it to others.
    dataset.close()
    if old is None:
        again = examples[2]
        assert again.input_audio is not None and again.kept.sounds == []
        listen(cache, [again], processor)
        assert examples[2].input_audio is not None
    examples = Examples(ShardDataset(folder), processor, cache=cache)
    (reject,) = examples[2].rejects
    assert "SHA-256 in its JSON" in reject[1] and examples[3].input_audio is None


def test_damaged_entries_are_not_known(checkpoint, shards, tmp_path, decoded):
    processor, network = load_processor(checkpoint()), frozen(checkpoint())
    cache = EncoderCache(tmp_path, network)
    examples = Examples(ShardDataset(shards()), processor, cache=cache)
    expected, mask = listen(cache, [examples[0], examples[1]], processor)
    for table, column in (("sounds", "windows"), ("windows", "data")):
        with closing(sqlite3.connect(cache.store.path)) as connection, connection:
            ((key, data),) = connection.execute(f"select key, {column} from {table} limit 1").fetchall()
            broken = data[:3] + bytes([data[3] ^ 1]) + data[4:]
            connection.execute(f"update {table} set {column} = ? where key = ?", (broken, key))
        decoded.clear()
        again, same = listen(cache, [examples[0], examples[1]], processor)
        assert len(decoded) == 1 and torch.equal(same, mask)
        assert torch.allclose(again[mask], expected[mask], atol=1e-5)  # alone, not beside the other


def test_other_processes_open_the_file_themselves(checkpoint, shards, tmp_path):
    """A fork neither uses nor closes the connection of its parent, and a store travels to where nothing is forked."""
    processor, network = load_processor(checkpoint()), frozen(checkpoint())
    cache = EncoderCache(tmp_path, network)
    examples = Examples(ShardDataset(shards()), processor, cache=cache)
    listen(cache, [examples[0]], processor)
    first = cache.store._connection
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(
            cache.store.sounds, [examples.sounds.keys(0, examples.shards.load_sample(0).audio, False, False)]
        )
    assert cache.store._connection is first
    moved = pickle.loads(pickle.dumps(examples.sounds))
    assert moved.read(0, False, False)["heard"].kept.tokens and moved.store._connection is not first


def test_nothing_is_kept_without_room(checkpoint, shards, tmp_path, decoded):
    """A full folder: every epoch decodes, and hears the same."""
    processor, network = load_processor(checkpoint()), frozen(checkpoint())
    cache = EncoderCache(tmp_path, network, limit_gib=2**18 / 2**30)
    examples = Examples(ShardDataset(shards()), processor, cache=cache)
    with pytest.warns(UserWarning, match="takes no more windows"):
        first = [listen(cache, [examples[place] for place in range(24)], processor)]
    first += [listen(cache, [examples[place] for place in range(24)], processor)]
    assert len(decoded) == 48 and torch.equal(first[0][0], first[1][0]) and not cache.store.sounds([b"x" * 16])
