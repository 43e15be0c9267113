"""What ``kind: manifest`` stores of files of every kind, to the byte: rounded by NumPy, encoded by libsndfile."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

from tests.data_prep.manifest_tools import made, write_lines

KINDS = [
    *(("wav", "PCM_U8"), ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "FLOAT"), ("wav", "ULAW")),
    *(("flac", "PCM_16"), ("flac", "PCM_24"), ("mp3", "MPEG_LAYER_III"), ("ogg", "VORBIS"), ("aiff", "PCM_16")),
]
STRETCHES = {"whole": (None, None), "cut": (0.05, 0.2), "rest": (0.1, None)}


def files(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Sounds of each kind, mono and stereo, at two rates: samples (time, channels) float32 as libsndfile decodes."""
    found = {}
    for number, (form, subtype) in enumerate(KINDS):
        for channels, rate in ((1, 16000), (2, 16000), (1, 22050), (2, 44100)):
            name = f"{number}-{channels}-{rate}.{form}"
            noise = np.random.default_rng(len(found)).uniform(-0.3, 0.3, (int(0.3 * rate), channels))
            soundfile.write(folder / name, noise, rate, subtype=subtype)
            found[name] = (soundfile.read(folder / name, dtype="float32", always_2d=True)[0], rate)
    return found


def stored(samples: np.ndarray, rate: int, layout: str) -> tuple[bytes, str]:
    """FLAC of (time, channels), and the hash of what it holds."""
    integers = np.clip(np.round(samples.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, integers, rate, format="FLAC", subtype="PCM_16")
    digest = hashlib.sha256(f"{layout} {rate} {integers.T.shape}\n".encode())
    for channel in integers.T:
        digest.update((channel / np.float32(32768)).astype("<f4").tobytes())
    return file.getvalue(), digest.hexdigest()


def within_a_step(first: bytes, second: bytes) -> bool:
    one, other = (soundfile.read(io.BytesIO(data), dtype="int16")[0].astype(int) for data in (first, second))
    return one.shape == other.shape and int(np.abs(one - other).max()) <= 1


def written(folder: Path) -> dict[str, bytes]:
    members = {}
    for path in (folder / "out" / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return members


def prepared(folder: Path, **audio: object) -> tuple[dict[str, tuple[np.ndarray, int]], dict[str, bytes]]:
    sounds = files(folder)
    rows = [
        {"audio": name, "question": f"{name} {what}?", "answer": "rain", "start": start, "end": end}
        | {"id": f"{name.replace('.', '-')}-{what}"}
        for name in sounds
        for what, (start, end) in STRETCHES.items()
    ]
    write_lines(folder / "rows.jsonl", rows)
    told = made(folder, format="jsonl", path=str(folder / "rows.jsonl"), audio=audio)
    assert told["rejects"] == 0
    return sounds, written(folder)


def test_every_kind_of_file_is_stored_rounded_once(tmp_path: Path) -> None:
    sounds, members = prepared(tmp_path)
    for name, (samples, rate) in sounds.items():
        for what, (start, end) in STRETCHES.items():
            first, last = round((start or 0) * rate), len(samples) if end is None else round(end * rate)
            layout = "mono" if samples.shape[1] == 1 else "stereo"
            content, digest = stored(samples[first:last], rate, layout)
            key = f"mine-{name.replace('.', '-')}-{what}"
            if name.endswith("mp3"):  # whose decoder's last bit depends on where in memory it writes
                assert within_a_step(members[f"{key}.flac"], content), key
                continue
            assert members[f"{key}.flac"] == content, key
            assert json.loads(members[f"{key}.json"])["audio"]["sha256"] == digest, key


def test_what_is_resampled_and_mixed_is_stored_as_soxr_and_a_mean_make_it(tmp_path: Path) -> None:
    sounds, members = prepared(tmp_path, sample_rate=16000, layouts=["mono"], hearing="mean")
    for name, (samples, rate) in sounds.items():
        mono = samples.T.mean(axis=0, keepdims=True) if samples.shape[1] == 2 else samples.T
        heard = soxr.resample(mono.T, rate, 16000, quality="HQ") if rate != 16000 else mono.T
        if np.abs(heard).max() <= 1:
            content, _ = stored(heard, 16000, "mono")
            found = members[f"mine-{name.replace('.', '-')}-whole.flac"]
            assert within_a_step(found, content) if name.endswith("mp3") else found == content, name
