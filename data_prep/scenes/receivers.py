"""What arrives at the microphones from one direction: spherical head, SOFA measurement, stereo, FOA, mono.

Directions are unit vectors ``(n, 3)`` in the listener's frame: x to the front, y to the left, z up. A head answers with
the transfer function from a plane wave (phase reference: the centre of the head) to each channel.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Protocol

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


def _hertz(data: Any, name: str) -> float:
    units = str(getattr(data, "Data_SamplingRate_Units", "hertz")).strip().lower()
    rates = np.unique(np.asarray(data.Data_SamplingRate, dtype=np.float64))
    scale = {"hertz": 1.0, "hz": 1.0, "kilohertz": 1000.0, "khz": 1000.0}.get(units)
    if scale is None or len(rates) != 1 or not 1000 <= rates[0] * scale <= 1e6:
        raise AudioError(describe(name, "one sampling rate in hertz", f"{rates.tolist()[:3]} {units}"))
    return float(rates[0] * scale)


def _cartesian(data: Any, field: str, name: str, default: Any = None) -> Array:
    """Positions ``(n, 3)`` in metres: SOFA has them cartesian, or as azimuth, elevation and radius."""
    found = getattr(data, field, None)
    positions = np.asarray(default if found is None else found, dtype=np.float64)
    positions = positions[..., 0] if positions.ndim == 3 else np.atleast_2d(positions)  # receivers: (r, 3, 1 or m)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise AudioError(describe(name, f"{field} of three coordinates", f"shape {positions.shape}"))
    like = "ListenerView" if field == "ListenerUp" else field  # an up has no type of its own
    kind = str(getattr(data, f"{like}_Type", "spherical" if field == "SourcePosition" else "cartesian"))
    if found is None or not kind.lower().startswith("spherical"):
        return positions
    if str(getattr(data, f"{like}_Units", "degree")).strip().lower().startswith("rad"):
        positions = positions * np.array([180 / np.pi, 180 / np.pi, 1.0])
    elif len(positions) > 8 and np.abs(positions[:, :2]).max() <= 2 * np.pi + 0.01:
        found_angles = f"none above {np.abs(positions[:, :2]).max():.2f}, which looks like radians"
        raise AudioError(describe(name, f"{field} in degrees, as its units say", found_angles))
    return unit_vectors(positions[:, 0], positions[:, 1]) * positions[:, 2:]


def _axes(data: Any, name: str) -> Array:
    """Rows: front, left, up of the listener, by ListenerView and ListenerUp."""
    view = _one(data, "ListenerView", name, [[1, 0, 0]])[0]
    up = _one(data, "ListenerUp", name, [[0, 0, 1]])[0]
    left = np.cross(up, view)
    if not np.linalg.norm(left) > 1e-6 * np.linalg.norm(up) * np.linalg.norm(view):
        raise AudioError(describe(name, "a listener who looks across its up", f"view {view}, up {up}"))
    axes = np.stack([view, left, np.cross(view, left)])
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def _one(data: Any, field: str, name: str, default: Any) -> Array:
    """A vector that holds for all measurements."""
    found = _cartesian(data, field, name, default)
    if np.ptp(found, axis=0).max() > 1e-6:
        raise AudioError(describe(name, f"one {field}", f"{len(found)} different ones"))
    return found


def _delayed(responses: Array, delays: Array, name: str) -> Array:
    """Responses ``(m, 2, n)`` with the delays in samples ``(m or 1, 2 or 1)`` of SOFA's ``Data.Delay`` in them."""
    delays = delays.T if delays.shape not in (part := {(1, 1), (1, 2), responses.shape[:2]}) else delays
    if delays.shape not in part or not np.isfinite(delays).all() or np.abs(delays).max() > 96_000:
        raise AudioError(describe(name, f"delays of shape {responses.shape[:2]}", f"shape {delays.shape}"))
    delays = np.broadcast_to(delays - delays.min(), responses.shape[:2])
    if not delays.any():
        return responses
    length = responses.shape[2] + int(np.ceil(delays.max())) + 1
    size = 1 << (length + 64).bit_length()  # a fraction of a sample rings a little; it may not wrap around
    turn = np.exp(-2j * np.pi * np.fft.rfftfreq(size) * delays[..., None])
    return np.fft.irfft(np.fft.rfft(responses, size) * turn, size)[..., :length]


def _check_sides(responses: Array, directions: Array, rate: float, name: str) -> None:
    """Raise :class:`AudioError` where sounds from the left are neither louder nor earlier in the left ear.

    Whole samples of the strongest rise decide the time; measured heads differ by 0.3 to 0.8 ms and 5 to 20 dB.
    """
    side = directions[:, 1]
    far = np.abs(side) > 0.7
    if not far.any():
        return
    level = np.sum(responses[far] ** 2, axis=2) + 1e-30
    louder = np.sign(side[far]) * 10 * np.log10(level[:, 0] / level[:, 1])
    peaks = np.abs(responses[far]).max(axis=2, keepdims=True)
    onset = (np.abs(responses[far]) > 0.3 * peaks).argmax(axis=2)
    earlier = np.sign(side[far]) * (onset[:, 1] - onset[:, 0]) / rate * 1e3  # ms
    if np.median(louder) < -1.0 or np.median(earlier) < -0.05:
        found = f"{np.median(louder):.1f} dB and {np.median(earlier):.2f} ms the other way"
        cure = (
            "Its receivers or its azimuths are swapped: azimuth counts counter-clockwise, receiver 1 is the left ear."
        )
        raise AudioError(describe(name, "sounds of the left louder and earlier in the left ear", found, cure))


class SofaHead:
    """Measured head-related impulse responses (AES69 SOFA, SimpleFreeFieldHRIR): the nearest measured direction.

    Delays that stand beside the responses are put back into them, positions are read in either coordinate type, in
    degrees or radians, seen from where the listener looks, and the receiver on the left is the left ear. The delay
    common to all directions (the measuring distance) is taken off. Raises :class:`AudioError` for a file that is not of
    that convention, and for a head whose left ear does not hear sounds of the left first or louder.
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
        name = f"SOFA file '{path}'"
        self.rate = _hertz(data, name)
        if getattr(data, "Data_Delay", None) is not None:
            responses = _delayed(responses, np.atleast_2d(np.asarray(data.Data_Delay, dtype=np.float64)), name)
        axes = _axes(data, name)
        directions = _cartesian(data, "SourcePosition", name) - _cartesian(data, "ListenerPosition", name, [[0, 0, 0]])
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        if len(directions) != len(responses) or not np.isfinite(lengths).all() or not (lengths > 0).all():
            found = f"{len(directions)} of shape {directions.shape}"
            raise AudioError(describe(name, f"{len(responses)} source positions away from the listener", found))
        self.directions = directions / lengths @ axes.T
        ears = _cartesian(data, "ReceiverPosition", name, [[0, 0.09, 0], [0, -0.09, 0]])  # in the listener's own axes
        if len(ears) == 2 and ears[0, 1] < ears[1, 1]:
            responses = responses[:, ::-1]
        _check_sides(responses, self.directions, self.rate, name)
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
