"""Copies of a sound are found whatever was done to them, other sounds are not taken for copies, sides stay apart."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from scipy import signal

from audio_llm import config as recipes
from audio_llm.audio import Waveform, decode
from audio_llm.datasets.folders import listing
from audio_llm.errors import DataError
from audio_llm.inspection import fingerprints
from audio_llm.inspection.fingerprints import Fingerprint, fingerprint, pairs, score
from data_prep.corpus.recipe import CorpusConfig
from data_prep.tasks.corpus import prepare
from tests.conftest import make_shards
from tests.paths import SHARED

RATE = 16000
KINDS = ("gain", "mp3", "shift", "crop", "noise")


def scene(seed: int, seconds: float = 4.0) -> np.ndarray:
    """(time,) float of events in noise, which no other seed gives."""
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    found = 0.02 * draw.normal(size=len(time))
    for _ in range(12):
        start, pitch, decay = draw.uniform(0, seconds), draw.uniform(300, 3500), draw.uniform(2, 12)
        after = np.maximum(time - start, 0)
        glide = pitch * (1 + draw.uniform(-0.2, 0.2) * after)
        found += 0.15 * (time >= start) * np.exp(-decay * after) * np.sin(2 * np.pi * glide * after)
    return found


def copy(samples: np.ndarray, rate: int, kind: str, draw: np.random.Generator) -> np.ndarray:
    """What became of a recording of (time,) on its way."""
    if kind == "gain":
        return samples * 10 ** (draw.uniform(-20, -3) / 20)
    if kind == "mp3":
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.9)
        file.seek(0)
        return soundfile.read(file)[0]
    if kind == "shift":
        late = int(draw.uniform(0.05, 1) * rate)
        return np.concatenate([np.zeros(late), samples[:-late]])
    if kind == "crop":
        length = int(len(samples) * 0.6)
        first = int(draw.uniform(0, len(samples) - length))
        return samples[first : first + length]
    return samples + draw.normal(0, np.sqrt(np.mean(samples**2)) * 10 ** (-15 / 20), len(samples))


def printed(samples: np.ndarray, rate: int = RATE) -> Fingerprint:
    return fingerprint(Waveform(samples[None].astype(np.float32), rate, "mono"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_known_again_and_another_sound_is_not(kind: str) -> None:
    draw = np.random.default_rng(5)
    prints = [printed(scene(seed)) for seed in range(8)]
    copies = [printed(copy(scene(seed), RATE, kind, draw)) for seed in range(8)]
    found = {(one, two) for one, two, _ in pairs([*prints, *copies])}
    assert found == {(number, 8 + number) for number in range(8)}
    between = {(one, two) for one, two, _ in pairs(copies, prints)}
    assert between == {(number, number) for number in range(8)}
    for one, two, reached in pairs(copies, prints):
        assert reached == score(copies[one], prints[two]) == pytest.approx(score(prints[two], copies[one]))


def test_bits_are_those_of_the_published_method() -> None:
    """Against SciPy's spectrogram and a loop over frames and bits as the paper has it."""
    samples = scene(3, 2.0)
    low = soxr.resample(samples.astype(np.float32), RATE, fingerprints.RATE, quality="HQ")
    window = signal.windows.hann(fingerprints.WINDOW)
    step = fingerprints.WINDOW - fingerprints.HOP
    frequencies, _, power = signal.spectrogram(
        low.astype(float), fingerprints.RATE, window, noverlap=step, detrend=False, scaling="spectrum", mode="psd"
    )
    edges = np.geomspace(fingerprints.LOW, fingerprints.HIGH, 34)
    bands = [power[(frequencies >= a) & (frequencies < b)].sum(0) for a, b in itertools.pairwise(edges)]
    found = printed(samples)
    assert len(found.words) == power.shape[1] - 1 > 60
    equal = 0
    for frame, word in enumerate(found.words):
        for bit in range(32):
            now = bands[bit][frame + 1] - bands[bit + 1][frame + 1]
            before = bands[bit][frame] - bands[bit + 1][frame]
            equal += (now - before > 0) == bool(int(word) >> bit & 1)
    assert equal > 0.999 * 32 * len(found.words)


def test_a_fingerprint_is_text_and_silence_is_no_sound() -> None:
    one = printed(np.concatenate([np.zeros(RATE), scene(1, 1.5), np.zeros(RATE)]))
    other = Fingerprint.decode(one.encode())
    assert np.array_equal(one.words, other.words) and np.array_equal(one.sounds, other.sounds)
    assert not one.sounds[:20].any() and one.sounds[50:100].all()
    with pytest.raises(ValueError):
        Fingerprint.decode("3:nothing")
    silent = printed(np.zeros(2 * RATE))
    assert not silent.sounds.any() and score(silent, silent) == 0 and list(pairs([silent, silent])) == []
    assert list(pairs([])) == list(pairs([one])) == []
    stereo = np.stack([scene(1), 0.5 * scene(1)]).astype(np.float32)
    assert score(fingerprint(Waveform(stereo, RATE, "stereo")), printed(scene(1))) > 8


# ------------------------------------------------------------------------------------------------ in a run


def recipe(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> CorpusConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "corpus": "mine",
        "source": {"name": "recordings", "format": "jsonl", "path": str(folder / "rows.jsonl")},
        "stages": {"cut": {}, "fingerprint": {}, "deduplicate": keys},
        "engine": {"name": "local", "workers": 1},
    }
    return recipes.build(CorpusConfig, tree)


def planted(folder: Path) -> list[dict[str, Any]]:
    """Six sounds; copies of the first three, two stretches of one recording, two items of one text."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", scene(number), RATE)
        rows.append({"id": f"{number}", "audio": f"{number}.wav", "text": f"Sound {number}."})
    soundfile.write(folder / "same.flac", soundfile.read(folder / "0.wav")[0], RATE)
    soundfile.write(folder / "crop.wav", copy(scene(1), RATE, "crop", draw), RATE)
    soundfile.write(folder / "noise.wav", copy(scene(2), RATE, "noise", draw), RATE)
    rows += [{"id": name.split(".")[0], "audio": name} for name in ("same.flac", "crop.wav", "noise.wav")]
    rows += [{"id": "part", "audio": "3.wav", "start": 0.0, "end": 1.0}]
    return [*rows, {"id": "words", "audio": "5.wav", "start": 1.0, "end": 3.0, "text": "SOUND 4"}]


def outcome(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Component by item, and reason by item that fell out."""
    kept = [json.loads(line) for line in (out / "items" / "deduplicate.jsonl").open()]
    lost = [json.loads(line) for line in (out / "rejects.jsonl").open()]
    name = len("mine-")
    return (
        {item["id"][name:]: item["fields"]["component"] for item in kept},
        {item["item"][name:]: item["reason"] for item in lost},
    )


def test_copies_fall_out_and_what_hangs_together_is_one_component(tmp_path: Path) -> None:
    rows = planted(tmp_path)
    (tmp_path / "bench").mkdir()
    soundfile.write(tmp_path / "bench" / "x.wav", 0.3 * scene(4), RATE)
    out = tmp_path / "out"
    made = prepare(recipe(tmp_path, rows, against=[str(tmp_path / "bench")], text="join"), out, quiet=True)
    kept, lost = outcome(out)
    near = dict.fromkeys(("crop", "noise", "part", "words"), "near_duplicate")
    assert lost == near | {"same": "exact_duplicate", "4": "contaminated"}
    assert kept == {"0": "0.wav", "1": "1.wav", "2": "2.wav", "3": "3.wav", "5": "4.wav"}
    assert made.manifest["components"] == 5
    # A benchmark that has other sounds is another setting, and a copy is joined where it is not to be removed.
    soundfile.write(tmp_path / "bench" / "x.wav", scene(77), RATE)
    prepare(
        recipe(tmp_path, rows, against=[str(tmp_path / "bench")], exact="join", near="join", text="join"),
        out,
        quiet=True,
    )
    kept, lost = outcome(out)
    assert lost == {} and kept["crop"] == "1.wav" and kept["same"] == "0.wav" == kept["0"] and kept["part"] == "3.wav"
    assert kept["4"] == kept["words"] == kept["5"] == "4.wav"
    prepare(recipe(tmp_path, rows, exact="keep", near="keep"), out, quiet=True)
    kept, lost = outcome(out)
    assert lost == {} and kept["crop"] == "crop.wav" and kept["part"] == kept["3"] and kept["4"] != kept["words"]
    prepare(recipe(tmp_path, rows, exact="keep", near="keep", text="remove"), out, quiet=True)
    assert outcome(out)[1] == {"words": "same_text"}


def test_a_benchmark_that_is_damaged_is_told_of_with_a_cure_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clip that cannot be read is let be, with a note; shards of which much is lost are refused."""
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", scene(number), RATE)
    rows = [{"id": f"{number}", "audio": f"{number}.wav"} for number in range(2)]
    (tmp_path / "files").mkdir()
    soundfile.write(tmp_path / "files" / "x.wav", scene(0), RATE)
    (tmp_path / "files" / "y.wav").write_bytes(b"RIFF")
    prepare(recipe(tmp_path, rows, against=[str(tmp_path / "files")]), tmp_path / "out", quiet=True)
    assert outcome(tmp_path / "out")[1] == {"0": "contaminated"}
    assert "1 of its sounds cannot be read, and no copies of them are looked for; the first: y.wav" in (
        capsys.readouterr().err
    )
    bench = make_shards(tmp_path / "bench", count=8)
    (tar,) = bench.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:40_000])
    with pytest.raises(DataError, match=r"Mend that folder, or take it out of deduplicate\.against") as refused:
        prepare(recipe(tmp_path, rows, against=[str(bench)]), tmp_path / "out", quiet=True)
    assert "max_reject_share" not in str(refused.value)
    prepare(recipe(tmp_path, rows), tmp_path / "out", quiet=True)
    assert outcome(tmp_path / "out")[1] == {}


@pytest.mark.slow
@pytest.mark.shared("data/esc10")
@pytest.mark.parametrize("seed", range(3))
def test_copies_of_real_recordings(seed: int) -> None:
    """ESC-10 and 50 copies. Two of its recordings are cut from one: their samples correlate by 0.97."""
    folder = SHARED / "data" / "esc10" / "audio"
    files = [folder / file for file in listing(folder).files]
    twins = {frozenset({f"2-28314-{part}-12.ogg", f"2-30322-{part}-12.ogg"}) for part in "AB"}
    draw = np.random.default_rng(seed)
    origin = draw.choice(len(files), 50, replace=False)
    prints = [fingerprint(decode(file)) for file in files]
    for number, place in enumerate(origin):
        samples, rate = soundfile.read(files[place])
        prints.append(printed(copy(samples, rate, KINDS[number % 5], draw), rate))
    names = [file.name for file in files] + [files[place].name for place in origin]
    found = {(one, two) for one, two, _ in pairs(prints)}
    true = {(int(place), len(files) + number) for number, place in enumerate(origin)}
    false = {pair for pair in found - true if frozenset(names[place] for place in pair) not in twins}
    assert len(found & true) >= 48 and len(false) <= 1, (len(found & true), false)
