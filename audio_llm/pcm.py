"""Integer samples and floats: one scale both ways, so that decode → encode → decode is exact."""

from __future__ import annotations

import sys

import numpy as np

INT16_SCALE = 32768.0
PART = 2**14  # samples of a channel whose arrays stay in a processor's cache


def to_float(frames: np.ndarray) -> np.ndarray:
    """``(time, channels)`` int16 → ``(channels, time)`` float32 in [-1, 1), exactly.

    Two channels are pulled apart as halves of 32-bit words, which numpy vectorises; a strided copy takes twice as long.
    """
    if frames.shape[1] == 2 and frames.flags.c_contiguous and sys.byteorder == "little":
        samples = np.empty((2, len(frames)), np.float32)
        pairs = frames.view("<i4")[:, 0]
        samples[0] = pairs << 16
        samples[1] = pairs & np.int32(-65536)
        samples *= np.float32(1 / INT16_SCALE / 65536)
        return samples
    samples = frames.T.astype(np.float32, order="C")
    samples *= np.float32(1 / INT16_SCALE)
    return samples


def rounded(samples: np.ndarray, bits: int) -> np.ndarray:
    """``(channels, time)`` float32 in [-1, 1] → int16 for 16 `bits`, else int32, to the nearest; full scale is 1."""
    full = 2 ** (bits - 1)
    integers = np.empty(samples.shape, np.int16 if bits == 16 else np.int32)
    for start in range(0, samples.shape[1], PART):
        scaled = samples[:, start : start + PART] * np.float32(full)  # exact: a power of two
        np.rint(scaled, out=scaled)
        if scaled.max(initial=0.0) > full - 1:  # 1 itself
            np.minimum(scaled, full - 1, out=scaled)
        integers[:, start : start + PART] = scaled
    return integers
