"""librosa with its compiled functions in a cache of our own, which one process fills at a time.

librosa's inner loops are compiled by Numba and kept on disk. Numba writes that cache without a lock, and two processes
that compile at once, such as two workers of a first run, can leave one behind that kills every later process which
loads it (a segmentation fault at a null address, librosa 0.11, Numba 0.65).
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


def cache_folder() -> Path:
    """Where compiled functions are kept: ``NUMBA_CACHE_DIR``, else below the user's own cache."""
    if said := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "audio-llm" / "numba"


@cache
def librosa() -> Any:
    """The package, with what :mod:`data_prep.corpus.acoustics` calls compiled, once on a machine (ten seconds)."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115 (closed below)
    except (OSError, RuntimeError):  # a user without a home, as in containers: this process compiles for itself
        folder = Path(tempfile.mkdtemp(prefix="audio-llm-numba-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115 (closed below)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, whatever becomes of the process
        if "librosa" not in sys.modules:  # a function's cache is decided when it is defined
            import numba

            numba.config.CACHE_DIR = str(folder)
        import librosa

        _compile(librosa)
    return librosa


def _compile(package: Any) -> None:
    """Call what is compiled with the types that it will be called with."""
    clicks = np.zeros(16_000, np.float32)
    clicks[::2000] = 1
    levels = package.power_to_db(package.feature.melspectrogram(y=clicks, sr=16_000, hop_length=256))
    strength = package.onset.onset_strength(S=levels, sr=16_000, hop_length=256)
    package.onset.onset_detect(onset_envelope=strength, sr=16_000, hop_length=256, units="frames", delta=0.1)
    frames = package.util.frame(strength, frame_length=32, hop_length=8)
    tempogram = package.util.normalize(package.autocorrelate(frames, axis=0), axis=0)
    package.feature.tempo(tg=tempogram, sr=16_000, hop_length=256)
    package.yin(clicks, fmin=65.0, fmax=2000.0, sr=16_000, frame_length=2048, hop_length=1024)
