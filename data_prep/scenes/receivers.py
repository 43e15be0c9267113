"""What arrives at the microphones from one direction: spherical head, SOFA measurement, stereo, FOA, mono.

Directions are unit vectors ``(n, 3)`` in the listener's frame: x to the front, y to the left, z up. A head answers with
the transfer function from a plane wave (phase reference: the centre of the head) to each channel.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol

import numpy as np

from audio_llm.errors import AudioError, ConfigError, describe, require

SPEED_OF_SOUND = 343.0  # m/s at 20 °C, as in pyroomacoustics

Array = np.ndarray


class Head(Protocol):
    """A way to turn plane waves into channels."""

    layout: str
    seconds: float  # how long an impulse response of one direction lasts

    def transfer(self, directions: Array, frequencies: Array) -> Array:
        """Complex ``(n, channels, frequencies)`` for unit `directions` (n, 3) at `frequencies` in Hz."""
        ...

    def diffuse(self, rng: np.random.Generator, samples: int) -> Array:
        """A diffuse field of unit power at the centre: ``(channels, samples)`` white noise."""
        ...


def unit_vectors(azimuth: Array | float, elevation: Array | float) -> Array:
    """Degrees (azimuth counter-clockwise, 0 front, 90 left; elevation up) → unit vectors (..., 3)."""
    a, e = np.radians(azimuth), np.radians(elevation)
    return np.stack([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.broadcast_to(np.sin(e), np.shape(a))], axis=-1)


def angles(vectors: Array) -> tuple[Array, Array, Array]:
    """(azimuth in (−180, 180] degrees, elevation in degrees, distance) of `vectors` (..., 3)."""
    x, y, z = np.moveaxis(np.asarray(vectors, dtype=np.float64), -1, 0)
    return np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y))), np.sqrt(x * x + y * y + z * z)


# ------------------------------------------------------------------------------------------------ spherical head


class StructuralHead:
    """Structural model of Brown & Duda (1998), "A structural model for binaural sound synthesis", IEEE TSAP 6(5).

    Per ear: Woodworth's delay around a sphere, the one-pole one-zero head shadow (their eqs. 3-5 with α_min 0.1,
    θ_min 150°) and the five pinna echoes of their table 1 (delays move with elevation), ears at ±100° azimuth. Their
    pinna delays are given for the frontal half; here the formula runs on over the top to the rear (interaural-polar
    elevation 90…270°), so that front and back colour a sound differently. The torso is left out.
    """

    layout = "binaural"
    seconds = 0.004
    EAR_AZIMUTH = 100.0
    ALPHA_MIN, THETA_MIN = 0.1, 150.0
    # reflection coefficient, amplitude A, offset B (both in samples at 44.1 kHz), elevation factor D
    PINNA = ((0.5, 1, 2, 1.0), (-1.0, 5, 4, 0.5), (0.5, 5, 7, 0.5), (-0.25, 5, 11, 0.5), (0.25, 5, 13, 0.5))
    PINNA_RATE = 44_100.0

    def __init__(self, radius: float = 0.0875) -> None:
        self.radius = radius

    def transfer(self, directions: Array, frequencies: Array) -> Array:
        mirrored = directions * np.array([1.0, -1.0, 1.0])  # the right ear is the left ear of the mirrored world
        return np.stack([self._left_ear(directions, frequencies), self._left_ear(mirrored, frequencies)], axis=1)

    def diffuse(self, rng: np.random.Generator, samples: int) -> Array:
        return rng.standard_normal((2, samples))

    def _left_ear(self, directions: Array, frequencies: Array) -> Array:
        ear = unit_vectors(self.EAR_AZIMUTH, 0.0)
        incidence = np.arccos(np.clip(directions @ ear, -1.0, 1.0))[:, None]  # (n, 1), 0 = straight into the ear
        travel = self.radius / SPEED_OF_SOUND
        delay = travel * np.where(incidence < np.pi / 2, -np.cos(incidence), incidence - np.pi / 2)
        omega = 2 * np.pi * frequencies[None]
        alpha = (1 + self.ALPHA_MIN / 2) + (1 - self.ALPHA_MIN / 2) * np.cos(
            incidence / np.radians(self.THETA_MIN) * np.pi
        )
        beta = 2 / travel
        shadow = (beta + 1j * alpha * omega) / (beta + 1j * omega)
        table = _pinna_table(tuple(frequencies.tolist()))
        return shadow * np.exp(-1j * omega * delay) * table[_pinna_index(directions)]


PINNA_STEP = 5.0  # degrees; the echo delays move by at most 0.2 samples (44.1 kHz) per step


def _pinna_index(directions: Array) -> tuple[Array, Array]:
    """Rows of the pinna table: interaural-polar lateral angle −90…90° and elevation −90…270°."""
    x, y, z = directions.T
    lateral = np.degrees(np.arcsin(np.clip(y, -1.0, 1.0)))
    polar = (np.degrees(np.arctan2(z, x)) + 90.0) % 360.0
    rows = np.rint((lateral + 90.0) / PINNA_STEP).astype(int)
    return rows, np.rint(polar / PINNA_STEP).astype(int)


@functools.lru_cache(maxsize=4)
def _pinna_table(frequencies: tuple[float, ...]) -> Array:
    """Transfer functions (lateral, polar, frequencies) of the pinna echoes, the direct wave included."""
    lateral = np.radians(np.arange(-90.0, 90.1, PINNA_STEP))[:, None]
    polar = np.radians(np.arange(-90.0, 270.1, PINNA_STEP))[None]
    omega = 2 * np.pi * np.array(frequencies)
    total = np.ones((lateral.shape[0], polar.shape[1], len(omega)), dtype=complex)
    for reflection, amplitude, offset, factor in StructuralHead.PINNA:
        delay = amplitude * np.cos(lateral / 2) * np.sin(factor * (np.pi / 2 - polar)) + offset
        seconds = np.maximum(delay, 0.0) / StructuralHead.PINNA_RATE  # behind and below the formula would go negative
        total += reflection * np.exp(-1j * omega * seconds[..., None])
    return total


# ------------------------------------------------------------------------------------------------ measured head


class SofaHead:
    """Measured head-related impulse responses (AES69 SOFA, SimpleFreeFieldHRIR): the nearest measured direction.

    The delay common to all directions (the measuring distance) is taken off. Raises :class:`AudioError` for a file
    that is not of that convention.
    """

    layout = "binaural"

    def __init__(self, path: str | Path) -> None:
        require("sofar", "a SOFA head", "demo")
        import sofar

        try:
            data = sofar.read_sofa(str(path), verify=False, verbose=False)
        except Exception as error:  # the reader raises whatever its HDF5 layer does
            raise AudioError(f"SOFA file '{path}': cannot be read ({error}).") from error
        responses = np.asarray(getattr(data, "Data_IR", np.zeros(0)), dtype=np.float64)
        if responses.ndim != 3 or responses.shape[1] != 2:
            found = f"data of shape {responses.shape}"
            raise AudioError(describe(f"SOFA file '{path}'", "SimpleFreeFieldHRIR with two receivers", found))
        positions = np.asarray(data.SourcePosition, dtype=np.float64)
        if str(getattr(data, "SourcePosition_Type", "spherical")).startswith("cartesian"):
            positions = np.stack(angles(positions), axis=-1)
        self.directions = unit_vectors(positions[:, 0], positions[:, 1])
        self.rate = float(np.ravel(data.Data_SamplingRate)[0])
        peaks = np.abs(responses).max(axis=(1, 2), keepdims=True)
        first = int((np.abs(responses) > 0.1 * peaks).argmax(axis=2).min())
        self.responses = responses[:, :, max(0, first - round(0.0005 * self.rate)) :]
        self.lead = min(first, round(0.0005 * self.rate)) / self.rate
        self.seconds = self.responses.shape[2] / self.rate + 0.001

    def transfer(self, directions: Array, frequencies: Array) -> Array:
        nearest = np.argmax(directions @ self.directions.T, axis=1)
        return self._spectra(tuple(frequencies.tolist()))[nearest]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one head per process)
    def _spectra(self, frequencies: tuple[float, ...]) -> Array:
        times = np.arange(self.responses.shape[2]) / self.rate - self.lead
        kernel = np.exp(-2j * np.pi * np.outer(times, np.array(frequencies)))
        kernel *= np.array(frequencies) <= self.rate / 2
        return self.responses @ kernel

    def diffuse(self, rng: np.random.Generator, samples: int) -> Array:
        return rng.standard_normal((2, samples))


# ------------------------------------------------------------------------------------------------ microphones


class Ambisonics:
    """First-order Ambisonics, ACN order W Y Z X, SN3D (AmbiX); ``mono`` is W alone.

    ``stereo`` is the mid-side decoding of DCASE 2025 task 3: left = W + Y, right = W − Y (two cardioids to the sides).
    """

    seconds = 0.001

    def __init__(self, layout: str) -> None:
        self.layout = layout
        decoders = {"foa": np.eye(4), "stereo": [[1.0, 1.0, 0, 0], [1.0, -1.0, 0, 0]], "mono": [[1.0, 0, 0, 0]]}
        self.decoder = np.array(decoders[layout])

    def transfer(self, directions: Array, frequencies: Array) -> Array:
        x, y, z = directions.T
        gains = np.stack([np.ones_like(x), y, z, x], axis=1) @ self.decoder.T
        return np.broadcast_to(gains[..., None], (*gains.shape, len(frequencies))).astype(complex)

    def diffuse(self, rng: np.random.Generator, samples: int) -> Array:
        figure_of_eight = 1 / np.sqrt(3)  # mean power of cos² over the sphere
        return self.decoder @ (rng.standard_normal((4, samples)) * np.array([[1.0], *[[figure_of_eight]] * 3]))


LAYOUTS = ("binaural", "stereo", "foa", "mono")


def build(layout: str, *, sofa: str | None = None, radius: float = 0.0875) -> Head:
    """The head for a channel `layout`; `sofa` replaces the spherical head by a measured one."""
    if layout == "binaural":
        return SofaHead(sofa) if sofa else StructuralHead(radius)
    if layout not in LAYOUTS:
        raise ConfigError(f"audio.layout: expected one of {', '.join(LAYOUTS)}, found '{layout}'.")
    if sofa:
        raise ConfigError(f"head.sofa: a SOFA file needs audio.layout=binaural, found '{layout}'.")
    return Ambisonics(layout)
