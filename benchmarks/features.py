"""Front ends: this package, librosa, Transformers' feature extractors and, where it can be imported, torchaudio.

    python benchmarks/features.py --seconds 60 --out features.json

Milliseconds of processor time for a 10 s clip on one thread. The contestants of a front end take turns, round after
round, and a ratio is the median over the rounds, so that what else the machine does falls on all of them. Constants
(filter banks, windows) are made before. All start from samples in memory and end with the same features: how far theirs
are from ours is printed beside them. The exit code is 1 where ours is not as many times as fast as the best of the
others as is wanted of it. `batch` is ours on 32 clips at once, per clip, and its gain is against the same 32
clips one after the other, with all features kept.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from audio_llm.encoders import features
from audio_llm.model.encoder import build_encoder

SECONDS, BATCH = 10, 32
WANTED = 2.0  # times as fast as the best of the others, for the front ends of one channel
TORCHAUDIO = "torchaudio"  # an option of this benchmark only: the package itself never uses it

Samples = np.ndarray  # (channels, time) float32
Array = np.ndarray


@dataclass
class FrontEnd:
    """`ours` maps ``(batch, channels, time)`` to features; `others` map one clip ``(channels, time)`` to the same.

    An alternative in `comparable` has no such features and does work of the same size instead.
    """

    name: str
    rate: int
    channels: int
    ours: Callable[[Tensor], Tensor]
    others: dict[str, Callable[[Samples], Array]] = field(default_factory=dict)
    wanted: float | None = None
    comparable: tuple[str, ...] = ()


def optional(name: str) -> Any:
    """The module, or None where it is absent or broken (its builds for CUDA fail beside a torch for CPUs)."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def librosa_power(clip: Samples, n_fft: int, hop: int, pad: str = "reflect", win: int | None = None) -> Array:
    transform = librosa.stft(clip, n_fft=n_fft, hop_length=hop, win_length=win, pad_mode=pad)
    return transform.real**2 + transform.imag**2  # (..., bins, frames); half the time of abs()**2


# ----------------------------------------------------------------------------------------------------- front ends


def kaldi_fbank() -> FrontEnd:
    """25 ms windows every 10 ms, 128 mels, 16 kHz (BEATs)."""
    bank = mel_filter_bank(257, 128, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    window = window_function(400, "povey", periodic=False)
    mels = librosa.filters.mel(sr=16000, n_fft=512, n_mels=128, fmin=20, htk=True)

    def transformers(clip: Samples) -> Array:
        return spectrogram(
            clip[0] * 32768.0,
            window,
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            preemphasis=0.97,
            mel_filters=bank,
            log_mel="log",
            mel_floor=1.192092955078125e-07,
            remove_dc_offset=True,
        ).T

    def log_mel_of_that_size(clip: Samples) -> Array:
        return np.log(np.maximum(mels @ librosa_power(clip[0], 512, 160, win=400), 1e-10)).T

    end = FrontEnd("Kaldi fbank", 16000, 1, lambda x: features.kaldi_fbank(x[:, 0], 128), wanted=WANTED)
    end.others = {"Transformers": transformers, "librosa": log_mel_of_that_size}
    end.comparable = ("librosa",)
    if kaldi := optional(f"{TORCHAUDIO}.compliance.kaldi"):
        settings = {"num_mel_bins": 128, "sample_frequency": 16000.0, "window_type": "povey"}

        def other(clip: Samples) -> Array:
            return kaldi.fbank(torch.from_numpy(clip) * 32768.0, **settings).numpy()

        end.others[TORCHAUDIO] = other
    return end


def whisper_log_mel() -> FrontEnd:
    """25 ms windows every 10 ms, 80 mels, 16 kHz, on 10 s instead of 30 s for all (Whisper)."""
    extractor = WhisperFeatureExtractor(chunk_length=SECONDS)
    mels = librosa.filters.mel(sr=16000, n_fft=400, n_mels=80)

    def scaled(level: Array) -> Array:
        return (np.maximum(level, level.max() - 8.0) + 4.0) / 4.0

    def transformers(clip: Samples) -> Array:
        return extractor(clip[0], sampling_rate=16000, return_tensors="np").input_features[0].T

    def by_librosa(clip: Samples) -> Array:
        return scaled(np.log10(np.maximum(mels @ librosa_power(clip[0], 400, 160)[:, :-1], 1e-10)).T)

    end = FrontEnd("Whisper log-mel", 16000, 1, lambda x: features.whisper_log_mel(x[:, 0]), wanted=WANTED)
    end.others = {"Transformers": transformers, "librosa": by_librosa}
    if transforms := optional(f"{TORCHAUDIO}.transforms"):
        module = transforms.MelSpectrogram(16000, 400, hop_length=160, n_mels=80, norm="slaney", mel_scale="slaney")

        def other(clip: Samples) -> Array:
            power = module(torch.from_numpy(clip[0]))[:, :-1]
            return scaled(power.clamp(min=1e-10).log10().T.numpy())

        end.others[TORCHAUDIO] = other
    return end


def urbansound_mel() -> FrontEnd:
    """2048-point windows every 512 samples, 128 mels, 22.05 kHz, decibels under the clip's maximum (UrbanSound CNN)."""
    rate, n_fft, hop = 22050, 2048, 512
    mels = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=128)

    def ours(waveform: Tensor) -> Tensor:
        bank = features.mel_bank(rate, n_fft, 128, 0.0, rate / 2, waveform.device)
        return features.relative_decibels(features.power_mel(waveform, bank, n_fft, hop))[:, 0]

    def by_librosa(clip: Samples) -> Array:
        return librosa.power_to_db(mels @ librosa_power(clip[0], n_fft, hop, "constant"), ref=np.max).T

    end = FrontEnd("UrbanSound mel", rate, 1, ours, {"librosa": by_librosa}, WANTED)
    if transforms := optional(f"{TORCHAUDIO}.transforms"):
        settings = {"hop_length": hop, "n_mels": 128, "norm": "slaney", "mel_scale": "slaney", "pad_mode": "constant"}
        module = transforms.MelSpectrogram(rate, n_fft, **settings)

        def other(clip: Samples) -> Array:
            level = 10.0 * module(torch.from_numpy(clip[0])).clamp(min=1e-10).log10()
            return (level - level.max()).clamp(min=-80.0).T.numpy()

        end.others[TORCHAUDIO] = other
    return end


def spatial_ast_planes() -> FrontEnd:
    """Log-mel magnitude of two ears and their phase difference, 128 mels, 32 kHz (Spatial-AST)."""
    encoder = _on_meta({"name": "spatial_ast"})
    mels = librosa.filters.mel(sr=32000, n_fft=1024, n_mels=128, fmin=50, fmax=14000)

    def by_librosa(clip: Samples) -> Array:
        transform = librosa.stft(clip, n_fft=1024, hop_length=320, pad_mode="reflect")
        magnitude = np.abs(transform)
        levels = 10.0 * np.log10(np.maximum(mels @ magnitude, 1e-10))
        unit = transform / np.where(magnitude == 0, 1.0, magnitude)
        difference = unit[1] * unit[0].conj()
        return np.concatenate((levels, mels @ np.stack((difference.real, difference.imag)))).swapaxes(1, 2)

    return FrontEnd("Spatial-AST planes", 32000, 2, encoder.raw_planes, {"librosa": by_librosa})


def seld_planes(layout: str) -> FrontEnd:
    """Log-mel power and intensity of ambisonics, 64 mels, 24 kHz (PSELDNets); stereo: W and Y of it alone."""
    encoder = _on_meta({"name": "cnn14", "preset": "tiny", **_SELD, "layout": layout})
    mels = librosa.filters.mel(sr=24000, n_fft=1024, n_mels=64, fmin=20, fmax=12000, htk=True)

    def by_librosa(clip: Samples) -> Array:
        if layout == "stereo":
            clip = np.stack((clip[0] + clip[1], clip[0] - clip[1])) / 2
        transform = librosa.stft(clip, n_fft=1024, hop_length=480, win_length=960, pad_mode="reflect")
        power = transform.real**2 + transform.imag**2
        levels = np.log10(np.maximum(mels @ power, 1e-10))
        active = transform.real[:1] * transform.real[1:] + transform.imag[:1] * transform.imag[1:]
        directions = mels @ (active / (np.sqrt((active**2).sum(axis=0)) + 1e-8))
        if layout == "stereo":
            nothing = np.zeros_like(levels)
            levels, directions = np.concatenate((levels, nothing - 10.0)), np.concatenate((directions, nothing))
        return np.concatenate((levels, directions)).swapaxes(1, 2)

    name, channels = ("PSELD stereo", 2) if layout == "stereo" else ("PSELD FOA", 4)
    return FrontEnd(name, 24000, channels, encoder.planes, {"librosa": by_librosa})


# The published front end on windows of this benchmark's length.
_SELD = {
    "sample_rate": 24000,
    "n_fft": 1024,
    "win_length": 960,
    "hop": 480,
    "fmax": 12000.0,
    "peak_normalize": False,
    "window_seconds": float(SECONDS),
}


def _on_meta(config: dict[str, Any]) -> Any:
    """The encoder without memory for its weights: front ends have none."""
    with torch.device("meta"):
        return build_encoder(config)


FRONT_ENDS: tuple[Callable[[], FrontEnd], ...] = (
    kaldi_fbank,
    whisper_log_mel,
    urbansound_mel,
    spatial_ast_planes,
    functools.partial(seld_planes, "stereo"),
    functools.partial(seld_planes, "foa"),
)


# ------------------------------------------------------------------------------------------------------ measuring


def clips(end: FrontEnd) -> Array:
    """``(BATCH, channels, time)`` float32: noise, which no code path finds easier than another."""
    noise = np.random.default_rng(0).standard_normal((BATCH, end.channels, SECONDS * end.rate), dtype=np.float32)
    return 0.1 * noise


def difference(end: FrontEnd, name: str, clip: Samples) -> float | None:
    """Largest distance of an alternative's features from ours; None where it does not compute the same."""
    if name in end.comparable:
        return None
    with torch.inference_mode():
        ours = end.ours(torch.from_numpy(clip)[None])[0].numpy()
    theirs = end.others[name](clip)
    return float(np.abs(ours - theirs.reshape(ours.shape)).max())


def measure(runs: dict[str, tuple[Callable[[], Any], int]], seconds: float) -> dict[str, list[float]]:
    """Name → milliseconds of processor time per clip, one value per round; `runs` are a call and its clips."""
    for run, _ in runs.values():
        run()  # makes the constants and imports what is imported late
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < 3:
        for name in names:
            run, count = runs[name]
            repeats = -(-8 // count)  # a clock tick is too coarse for one clip
            start = time.process_time()
            for _ in range(repeats):
                run()
            times[name].append(1000 * (time.process_time() - start) / (repeats * count))
        names = names[1:] + names[:1]  # nobody always runs after the same other one
    return times


@torch.inference_mode()
def compare(end: FrontEnd, seconds: float) -> dict[str, Any]:
    """One row of the results."""
    batch = clips(end)
    tensor, clip = torch.from_numpy(batch), batch[0]
    # The next clip every time: to hear one again and again, out of the cache, is nobody's work.
    turn = itertools.cycle(range(BATCH))
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: end.ours(tensor[(i := next(turn)) : i + 1]), 1),
        "singly": (lambda: [end.ours(tensor[i : i + 1]) for i in range(BATCH)], BATCH),
        "batch": (lambda: end.ours(tensor), BATCH),
    }
    for name, other in end.others.items():
        runs[name] = (lambda other=other: other(batch[next(turn)]), 1)
    times = measure(runs, seconds)

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))

    ratios = {name: round(ratio(name), 2) for name in end.others}
    return {
        "front_end": end.name,
        "rounds": len(times["ours"]),
        "milliseconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "times_as_fast_as": ratios,
        "times_as_fast_as_the_best": min(ratios.values()),
        "batch_gain": round(statistics.median(a / b for a, b in zip(times["singly"], times["batch"], strict=True)), 2),
        "wanted": end.wanted,
        "difference": {name: difference(end, name, clip) for name in end.others},
    }


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    times, parts = row["milliseconds"], []
    for name, ratio in row["times_as_fast_as"].items():
        apart = row["difference"][name]
        same = "other features" if apart is None else f"differs by {apart:.0e}"
        parts.append(f"{ratio:.2f} x {name} ({times[name]:.2f} ms, {same})")
    wanted = f", wanted {row['wanted']:g} x the best" if row["wanted"] else ""
    start = f"{row['front_end']:<19}{times['ours']:>8.2f}{times['batch']:>8.2f}{row['batch_gain']:>7.2f}   "
    return start + ", ".join(parts) + wanted


def missed(results: list[dict[str, Any]]) -> list[str]:
    """A sentence for every front end that is slower than is wanted of it."""
    return [
        f"{row['front_end']}: wanted {row['wanted']:g} x the best, found {row['times_as_fast_as_the_best']:.2f} x"
        for row in results
        if row["wanted"] and row["times_as_fast_as_the_best"] < row["wanted"]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time in all")
    parser.add_argument("--only", help="front ends with this in their name")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with threadpool_limits(1):
        ends = [end for end in (make() for make in FRONT_ENDS) if (args.only or "").lower() in end.name.lower()]
        print(f"ms of processor time per clip of {SECONDS} s, one thread; torchaudio: ", end="")
        print("measured" if optional(TORCHAUDIO) else "cannot be imported")
        print(f"{'front end':<19}{'ours':>8}{'batch':>8}{'gain':>7}   times as fast as")
        for end in ends:
            results.append(compare(end, args.seconds / len(ends)))
            print(line(results[-1]), flush=True)
    if args.out:
        settings = {"clip_seconds": SECONDS, "batch": BATCH, "torch": torch.__version__, "librosa": librosa.__version__}
        args.out.write_text(json.dumps({"benchmark": "features", **settings, "results": results}, indent=1) + "\n")
    for sentence in missed(results):
        print(sentence, file=sys.stderr)
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
