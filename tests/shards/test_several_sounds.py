"""Samples of several sounds: members by WebDataset's rule, one byte range a sound, old shards as they were."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from audio_llm.audio import Waveform, sha256
from audio_llm.cli import main
from audio_llm.errors import AudioError, ShardError
from audio_llm.shards.index import ShardIndex
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import AudioInfo, Sample
from audio_llm.shards.writer import ShardWriter

RATE = 16000


def wave(seed: int, channels: int = 1, seconds: float = 0.05) -> Waveform:
    """What 16 bits give back."""
    samples = np.random.default_rng(seed).integers(-9000, 9000, (channels, int(seconds * RATE)))
    return Waveform((samples / 32768).astype(np.float32), RATE, {1: "mono", 2: "stereo"}[channels])


def sample(name: str, **fields) -> Sample:
    return Sample(name, "pair", question="Which is louder?", answer="the first", **fields)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Samples of one, two and three sounds, with one and two channels, in two shards."""
    with ShardWriter(tmp_path / "mixed", samples_per_shard=2) as writer:
        writer.write(sample("one"), wave(1))
        writer.write(sample("three", places=[0, 5, 16]), [wave(2), wave(3, channels=2, seconds=0.1), wave(4)])
        writer.write(sample("two"), [wave(5), wave(5)])
    return tmp_path / "mixed"


def test_every_sound_comes_back(mixed: Path) -> None:
    written = [[wave(1)], [wave(2), wave(3, 2, 0.1), wave(4)], [wave(5), wave(5)]]
    for dataset in (ShardDataset(mixed), ShardDataset(mixed, verify=True)):  # scanned, then from the cache
        for item, waves in zip((dataset[i] for i in range(3)), written, strict=True):
            assert item["sample"].audio == [AudioInfo.of(wave) for wave in waves]
            assert [w.layout for w in item["waveforms"]] == [w.layout for w in waves]
            for heard, expected in zip(item["waveforms"], waves, strict=True):
                np.testing.assert_array_equal(heard.samples, expected.samples)
        assert [round(float(s), 3) for s in dataset.indexes[0].seconds] == [0.05, 0.2, 0.1]
    assert dataset.load_sample(1).places == [0, 5, 16]
    assert [info.sha256 for info in dataset.load_sample(1).audio] == [sha256(wave) for wave in written[1]]


def test_the_members_are_those_of_webdataset(mixed: Path) -> None:
    """WebDataset's own reader finds each sound under its name, and parts no sample."""
    paths = [str(path) for path in sorted(mixed.glob("*.tar"))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [item["__key__"] for item in found] == ["one", "three", "two"]
    names = [{name for name in item if not name.startswith("__")} for item in found]
    assert names == [{"flac", "json"}, {"flac", "audio1.flac", "audio2.flac", "json"}, {"flac", "audio1.flac", "json"}]
    samples, rate = soundfile.read(io.BytesIO(found[1]["audio1.flac"]), dtype="float32")
    assert rate == RATE
    np.testing.assert_array_equal(samples.T, wave(3, 2, 0.1).samples)


def test_one_sound_is_an_object_as_ever(mixed: Path) -> None:
    dataset = ShardDataset(mixed)
    one, three = (json.loads(dataset.load_sample(i).to_json()) for i in (0, 1))
    assert list(one) == ["id", "task", "question", "answer", "audio", "version"] and isinstance(one["audio"], dict)
    assert [info["channels"] for info in three["audio"]] == [1, 2, 1]
    for tree in (one, three):
        assert json.loads(Sample.from_json(json.dumps(tree)).to_json()) == tree
        assert Sample.from_trusted_json(json.dumps(tree)) == Sample.from_json(json.dumps(tree))


def test_nobody_hears_a_part(mixed: Path) -> None:
    """Whoever hears one sound is told of the others; a layout or a rate that does not fit is seen in every sound."""
    dataset = ShardDataset(mixed)
    assert dataset.load_waveform(0).num_samples == 800
    with pytest.raises(AudioError, match="sample 'three': expected one sound, found 3"):
        dataset.load_waveform(1)
    with pytest.raises(AudioError, match="three: expected layout mono, found stereo"):
        ShardDataset(mixed, layouts=["mono"])
    assert len(ShardDataset(mixed, layouts=["mono", "stereo"], sample_rate=RATE)) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a.audio1.flac": None}, "an audio member for each of the 2 sounds of its JSON, found flac"),
        ({"a.audio2.flac": b"more"}, "each of the 2 sounds of its JSON, found audio1.flac, audio2.flac, flac"),
        ({"a.audio1.flac": None, "a.audio2.flac": b"x"}, "each of the 2 sounds of its JSON, found audio2.flac, flac"),
        ({"a.audio1.wav": b"twice"}, "each of the 2 sounds of its JSON, found audio1.flac, audio1.wav, flac"),
        ({"a.flac": None}, "no audio member"),
        ({"a.json": None}, "no json member"),
    ],
)
def test_a_sample_without_one_of_its_sounds_is_a_reject(change: dict, expected: str, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "whole") as writer:
        writer.write(sample("a"), [wave(1), wave(2)])
        writer.write(sample("b"), wave(3))
    with tarfile.open(tmp_path / "whole" / "shard-000000.tar") as tar:
        members = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    (tmp_path / "broken").mkdir()
    with tarfile.open(tmp_path / "broken" / "shard.tar", "w") as tar:
        for name, data in (members | change).items():
            if data is not None:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    index = ShardIndex.load(tmp_path / "broken", max_reject_share=0.5)
    assert [row.key for row in index.rows] == ["b"] and index.reject_count == 1
    assert expected in index.rejects[0].reason


def test_a_damaged_further_sound_is_told_by_its_number(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, format="wav") as writer:  # no checksums of its own: the JSON's are compared
        writer.write(sample("a"), [wave(1), wave(2)])
    (row,) = ShardIndex.load(tmp_path).rows
    with open(tmp_path / row.shard, "r+b") as shard:
        shard.seek(row.further[0].offset + row.further[0].size - 8)
        shard.write(bytes(8))
    with pytest.raises(AudioError, match=r"a, sound 2 of 2: expected samples of the SHA-256"):
        ShardDataset(tmp_path)[0]


@pytest.mark.parametrize("places", [[1], [3, 1], [0, 17], [-1, 0], "0", [True, 1], [0.0, 1.0]])
def test_places_are_of_the_question(places) -> None:
    with pytest.raises(ShardError, match="places: expected"):
        sample("a", places=places, audio=[AudioInfo.of(wave(1))] * 2).validate()


def test_a_cache_that_points_elsewhere_is_made_again(mixed: Path) -> None:
    index = ShardIndex.load(mixed)
    for column, value in ((0, 9), (1, -1), (2, 2**40), (3, 7)):  # sample, offset, size, layout
        with np.load(mixed / "index.npz") as cache:
            columns = dict(cache)
        columns["further"][0, column] = value
        np.savez(mixed / "index.npz", **columns)
        np.testing.assert_array_equal(ShardIndex.load(mixed).further, index.further)


def test_a_writer_goes_on_from_its_journal_and_its_index(tmp_path: Path, monkeypatch) -> None:
    """Stopped after two shards and continued: the bytes and the index of a run in one piece, and nothing is scanned."""

    def write(folder: Path, stop: int = 9) -> None:
        with ShardWriter(folder, samples_per_shard=2) as writer:
            for number in range(7):
                if f"s{number}" not in writer:
                    if number == stop:
                        raise KeyboardInterrupt
                    writer.write(sample(f"s{number}"), [wave(10 * number + place) for place in range(1 + number % 3)])

    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", stop=5)
    monkeypatch.setattr("audio_llm.shards.writer.scan_shard", None)
    write(tmp_path / "parts")
    write(tmp_path / "parts")  # finished: taken over from its index
    for path in sorted((tmp_path / "whole").glob("*.tar")):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
    kept = ShardIndex.kept(tmp_path / "parts")
    monkeypatch.undo()
    (tmp_path / "whole" / "index.npz").unlink()
    scanned = ShardIndex.load(tmp_path / "whole")
    assert kept is not None and kept.rows == scanned.rows and len(scanned.further) == 6
    assert [row for part in scanned.parts() for row in part.rows] == scanned.rows


def test_inspect_shows_every_sound(mixed: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(mixed), "--sample", "three", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "audio 1: mono" in shown and "audio 2: stereo" in shown and "audio 3: mono" in shown
    assert "sounds before characters: 0, 5, 16" in shown and "6 sounds" in shown
    assert "sounds per sample: 2 1 (50%)  3 1 (50%)" in shown
    assert page.read_text().count("<audio ") == 3
