"""Built-in sounds: small synthesisers, so that a machine without any recording can make scenes.

Every draw of a class is a new "recording": pitch, rate, timbre and rhythm come from its seed. They are toys with the
gross acoustics of the thing they are named after (pitched or noisy, steady or struck, low or high), not field audio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np

Array = np.ndarray
Synthesiser = Callable[[np.random.Generator, int, int], Array]


def synthesise(label: str, seed: int, seconds: float, sample_rate: int) -> Array:
    """One recording of class `label`: (time,) float32, peak 1. The same arguments give the same samples.

    Raises ``KeyError`` for a class that is not in ``CLASSES``.
    """
    digest = hashlib.sha256(f"{label}:{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    samples = CLASSES[label](rng, round(seconds * sample_rate), sample_rate)
    return (samples / (np.abs(samples).max() + 1e-12)).astype(np.float32)


def _times(n: int, rate: int) -> Array:
    return np.arange(n) / rate


def _tone(frequency: Array | float, n: int, rate: int, phase: float = 0.0) -> Array:
    """A sine whose `frequency` (Hz) may change with time."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(frequency, n)) / rate + phase)


def _mix(parts: Iterable[Array]) -> Array:
    return np.sum(list(parts), axis=0)


def _band(rng: np.random.Generator, n: int, rate: int, low: float, high: float, order: int = 2) -> Array:
    """Gaussian noise between `low` and `high` Hz."""
    return _filter(rng.standard_normal(n), rate, [max(low, 20.0), min(high, 0.47 * rate)], "bandpass", order)


def _filter(samples: Array, rate: int, edges: list[float] | float, kind: str, order: int) -> Array:
    from scipy import signal  # seconds to import, and a run that is up to date needs no sound

    return signal.sosfilt(signal.butter(order, edges, kind, fs=rate, output="sos"), samples)


def _gate(cycles: Array, duty: float = 0.5) -> Array:
    """Whether a square wave is on, at `cycles` since the start."""
    return cycles % 1.0 < duty


def _strikes(
    rng: np.random.Generator, n: int, rate: int, per_second: float, jitter: float, make: Callable[[], Array]
) -> Array:
    """Repeat `make()` about `per_second` times a second; the first one starts at once."""
    out = np.zeros(n)
    start = 0.0
    while start < n:
        grain = make()[: n - int(start)]
        out[int(start) : int(start) + len(grain)] += grain * rng.uniform(0.7, 1.0)
        start += rate / per_second * rng.uniform(1 - jitter, 1 + jitter)
    return out


def _decay(n: int, rate: int, seconds: float) -> Array:
    return np.exp(-_times(n, rate) / seconds)


def _siren(rng: np.random.Generator, n: int, rate: int) -> Array:
    low, high, speed = rng.uniform(500, 700), rng.uniform(1100, 1600), rng.uniform(0.8, 2.0)
    sweep = 0.5 + 0.5 * np.sin(2 * np.pi * speed * _times(n, rate) + rng.uniform(0, 6.28))
    frequency = low * (high / low) ** sweep
    return _mix(_tone(k * frequency, n, rate) / k**1.5 for k in (1, 2, 3))


def _alarm(rng: np.random.Generator, n: int, rate: int) -> Array:
    frequency, speed = rng.uniform(1800, 2600), rng.uniform(4, 7)
    gate = _gate(speed * _times(n, rate))
    return (_tone(frequency, n, rate) + _tone(3 * frequency, n, rate) / 3) * np.convolve(gate, np.ones(32) / 32, "same")


def _bell(rng: np.random.Generator, n: int, rate: int) -> Array:
    base = rng.uniform(380, 700)
    partials = [(1.0, 0.5), (2.0, 1.0), (2.4, 0.8), (3.0, 0.6), (4.5, 0.4), (5.33, 0.3)]  # minor-third bell

    def strike() -> Array:
        return _mix(g * _tone(base * f, n, rate) * _decay(n, rate, 0.5 / f**0.5) for f, g in partials)

    return _strikes(rng, n, rate, rng.uniform(1.2, 2.2), 0.05, strike)


def _whistle(rng: np.random.Generator, n: int, rate: int) -> Array:
    t = _times(n, rate)
    glide = rng.uniform(900, 1500) * (1 + 0.25 * np.sin(2 * np.pi * rng.uniform(0.3, 0.8) * t + rng.uniform(0, 6.28)))
    frequency = glide * (1 + 0.02 * np.sin(2 * np.pi * rng.uniform(5, 7) * t))
    return _tone(frequency, n, rate) + 0.08 * _band(rng, n, rate, 800, 5000)


def _bird(rng: np.random.Generator, n: int, rate: int) -> Array:
    length, base = int(rate * rng.uniform(0.06, 0.12)), rng.uniform(2800, 4200)

    def chirp() -> Array:
        sweep = np.linspace(rng.uniform(0.75, 0.9), rng.uniform(1.2, 1.5), length)
        return _tone(base * sweep, length, rate) * np.hanning(length)

    return _strikes(rng, n, rate, rng.uniform(4, 7), 0.35, chirp)


def _cricket(rng: np.random.Generator, n: int, rate: int) -> Array:
    t = _times(n, rate)
    carrier = _tone(rng.uniform(4600, 5600), n, rate)
    pulses = np.maximum(0, np.sin(2 * np.pi * rng.uniform(28, 40) * t)) ** 2
    song = _gate(rng.uniform(2.0, 3.0) * t, 0.6)
    return carrier * pulses * np.convolve(song, np.hanning(64) / 32, "same")


def _frog(rng: np.random.Generator, n: int, rate: int) -> Array:
    length, pulse = int(rate * rng.uniform(0.18, 0.3)), rng.uniform(35, 60)
    centre = rng.uniform(450, 900)

    def croak() -> Array:
        train = 2 * (pulse * _times(length, rate) % 1.0) - 1
        return _filter(train, rate, [0.8 * centre, 1.25 * centre], "bandpass", 1) * np.hanning(length)

    return _strikes(rng, n, rate, rng.uniform(1.8, 3.0), 0.15, croak)


def _rain(rng: np.random.Generator, n: int, rate: int) -> Array:
    drops = np.where(rng.random(n) < 600 / rate, rng.exponential(1.0, n), 0)
    hiss = _band(rng, n, rate, rng.uniform(1500, 2500), 7500, 1)
    return hiss / hiss.std() + 0.6 * _filter(drops, rate, 2500.0, "highpass", 1) * 4


def _wind(rng: np.random.Generator, n: int, rate: int) -> Array:
    gust = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.3, 0.9) * _times(n, rate) + rng.uniform(0, 6.28))
    low = rng.uniform(120, 200)
    return (_band(rng, n, rate, low, 3 * low, 1) + 0.5 * _band(rng, n, rate, 2 * low, 5 * low)) * gust


def _engine(rng: np.random.Generator, n: int, rate: int) -> Array:
    base = rng.uniform(45, 80) * (1 + 0.06 * np.sin(2 * np.pi * rng.uniform(0.3, 1.0) * _times(n, rate)))
    weights = rng.uniform(0.4, 1.0, 24) / np.arange(1, 25) ** 0.6
    tone = _mix(w * _tone(k * base, n, rate, rng.uniform(0, 6.28)) for k, w in enumerate(weights, 1))
    return tone + 0.4 * _band(rng, n, rate, 60, 900, 1)


def _drum(rng: np.random.Generator, n: int, rate: int) -> Array:
    base, length = rng.uniform(90, 160), int(0.35 * rate)

    def hit() -> Array:
        fall = base * (1 + 0.8 * _decay(length, rate, 0.03))
        return _tone(fall, length, rate) * _decay(length, rate, 0.1) + 0.2 * _band(
            rng, length, rate, 300, 4000
        ) * _decay(length, rate, 0.02)

    return _strikes(rng, n, rate, rng.uniform(2.5, 4.5), 0.1, hit)


def _clapping(rng: np.random.Generator, n: int, rate: int) -> Array:
    centre, length = rng.uniform(1200, 2000), int(0.08 * rate)

    def clap() -> Array:
        return _band(rng, length, rate, 0.6 * centre, 1.8 * centre, 1) * _decay(length, rate, 0.012)

    return _strikes(rng, n, rate, rng.uniform(4, 6.5), 0.12, clap)


def _phone(rng: np.random.Generator, n: int, rate: int) -> Array:
    low, ratio, speed = rng.uniform(700, 850), rng.uniform(1.2, 1.3), rng.uniform(18, 24)
    t = _times(n, rate)
    warble = _gate(speed / 2 * t)
    frequency = np.where(warble, low, low * ratio)
    ring = _gate(rng.uniform(0.9, 1.3) * t, 0.65)
    return _mix(_tone(k * frequency, n, rate) / k for k in (1, 2, 3, 4)) * ring


def _glass(rng: np.random.Generator, n: int, rate: int) -> Array:
    def shard() -> Array:
        length, frequency = int(0.12 * rate), rng.uniform(2500, 6800)
        return _mix(_tone(frequency * f, length, rate) for f in (1.0, 1.07)) * _decay(
            length, rate, rng.uniform(0.01, 0.04)
        )

    return _strikes(rng, n, rate, rng.uniform(14, 24), 0.8, shard)


def _knocking(rng: np.random.Generator, n: int, rate: int) -> Array:
    base, length = rng.uniform(250, 450), int(0.1 * rate)

    def knock() -> Array:
        wood = _mix(_tone(base * f, length, rate) / f for f in (1.0, 1.6, 2.7))
        return wood * _decay(length, rate, 0.018) + 0.3 * rng.standard_normal(length) * _decay(length, rate, 0.003)

    return _strikes(rng, n, rate, rng.uniform(5, 8), 0.08, knock)


CLASSES: dict[str, Synthesiser] = {
    "alarm": _alarm,
    "bell": _bell,
    "bird": _bird,
    "clapping": _clapping,
    "cricket": _cricket,
    "drum": _drum,
    "engine": _engine,
    "frog": _frog,
    "glass": _glass,
    "knocking": _knocking,
    "phone": _phone,
    "rain": _rain,
    "siren": _siren,
    "whistle": _whistle,
    "wind": _wind,
}
