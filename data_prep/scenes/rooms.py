"""Rooms: their geometry by seed, their image sources by pyroomacoustics, their impulse responses through a head."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from audio_llm.errors import ConfigError, require
from data_prep.scenes.receivers import SPEED_OF_SOUND, Head, unit_vectors

Array = np.ndarray


def seeded(*parts: object) -> np.random.Generator:
    """A generator that depends on `parts` alone: the same on every machine and in every process."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@dataclass(frozen=True)
class RoomsConfig:
    """Rooms per split and what they are drawn from (metres, energy absorption, degrees)."""

    train: int = 24  # rooms of the split train
    validation: int = 4  # rooms of the split validation
    test: int = 8  # rooms of the split test
    length: tuple[float, float] = (5.0, 14.0)  # metres, [least, most]
    width: tuple[float, float] = (4.0, 12.0)  # metres, [least, most]
    height: tuple[float, float] = (2.6, 4.5)  # metres, [least, most]
    absorption: tuple[float, float] = (0.3, 0.7)  # share of the energy that a wall takes, [least, most]
    banded: bool = False  # absorption per octave band and air absorption; else one number per room
    max_order: int = 6  # reflections of the image source method; a diffuse tail carries on from there
    tail: bool = True  # late reverberation, diffuse
    seconds: float = 0.25  # length of an impulse response
    keep_delay: bool = False  # False: the direct sound comes at once, as in SpatialSoundQA; True: after distance / c
    listeners: int = 2  # positions (and headings) of the listener per room
    positions: int = 64  # source positions around each listener
    distance: tuple[float, float] = (0.7, 8.0)  # of sources from the listener: metres, [least, most]
    elevation: tuple[float, float] = (-35.0, 35.0)  # of sources: degrees, [least, most]

    def check(self) -> None:
        """Raise :class:`ConfigError` for a range that is upside down or out of physics."""
        for name in ("length", "width", "height", "absorption", "distance", "elevation"):
            values = getattr(self, name)
            if len(values) != 2 or values[0] > values[1]:
                raise ConfigError(f"rooms.{name}: expected [lowest, highest], found {list(values)}.")
        if not 0.02 <= self.absorption[0] <= self.absorption[1] <= 1.0:
            raise ConfigError(f"rooms.absorption: expected values from 0.02 to 1, found {list(self.absorption)}.")
        if self.distance[0] < 0.3:
            raise ConfigError(
                f"rooms.distance: expected at least 0.3 m (a head is in the way), found {self.distance[0]}."
            )
        if min(self.length[0], self.width[0], self.height[0]) < 2.0:
            raise ConfigError("rooms: a room needs at least 2 m in every direction.")


@dataclass(frozen=True)
class Listener:
    """A place and a heading in a room, and the sources around it: azimuth, elevation, distance, each (positions,)."""

    position: tuple[float, float, float]
    heading: float  # degrees from the room's x axis
    azimuth: Array
    elevation: Array
    distance: Array


@dataclass(frozen=True)
class Room:
    """A shoebox: `size` in metres, energy `absorption` (1,) or per octave band (7,)."""

    name: str
    size: tuple[float, float, float]
    absorption: Array
    listeners: tuple[Listener, ...]


WALL_MARGIN = 0.3  # metres between a source and the nearest wall


def draw_room(config: RoomsConfig, split: str, index: int, seed: int) -> Room:
    """Room `index` of `split`. Splits are drawn from different seeds, so no room is on both sides."""
    rng = seeded("room", seed, split, index)
    length, width, height = (float(rng.uniform(*edges)) for edges in (config.length, config.width, config.height))
    size = (length, width, height)
    absorption = np.array([rng.uniform(*config.absorption)])
    if config.banded:  # most surfaces absorb more at high frequencies: a tilt over the seven octave bands
        tilt = np.linspace(-1, 1, 7) * rng.uniform(0.0, 0.3)
        absorption = np.clip(absorption * (1 + tilt), 0.02, 0.99)
    listeners = tuple(_draw_listener(config, size, rng) for _ in range(config.listeners))
    return Room(f"{split}-{index:03d}", size, absorption, listeners)


def _draw_listener(config: RoomsConfig, size: tuple[float, ...], rng: np.random.Generator) -> Listener:
    centre = np.array([rng.uniform(0.15, 0.85) * size[0], rng.uniform(0.15, 0.85) * size[1], rng.uniform(1.2, 1.7)])
    heading = float(rng.uniform(-180, 180))
    sources = [_draw_source(config, size, centre, heading, rng) for _ in range(config.positions)]
    azimuth, elevation, distance = (np.array(column) for column in zip(*sources, strict=True))
    return Listener(tuple(centre.tolist()), heading, azimuth, elevation, distance)


def fits_inside(room: Room, listener: Listener, azimuth: Array, elevation: Array, distance: Array) -> bool:
    """Whether all of these places around `listener` (degrees, metres; each (n,)) keep their margin to the walls."""
    offsets = unit_vectors(azimuth + listener.heading, elevation) * distance[:, None]
    places = np.array(listener.position) + offsets
    return bool(np.all((places > WALL_MARGIN) & (places < np.array(room.size) - WALL_MARGIN)))


def _draw_source(
    config: RoomsConfig, size: tuple[float, ...], centre: Array, heading: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Distance uniform in its logarithm, azimuth uniform, elevation within what floor and ceiling leave of its range.

    A distance is kept for 40 directions, so that far sources are not rare merely because few directions have room for
    them; then it is drawn anew, and at last pulled in.
    """
    low, high = np.log(config.distance)
    for attempt in range(5):
        distance = float(np.exp(rng.uniform(low, high if attempt < 4 else low)))
        heights = np.clip((np.array([WALL_MARGIN, size[2] - WALL_MARGIN]) - centre[2]) / distance, -1, 1)
        floor, ceiling = np.clip(np.degrees(np.arcsin(heights)), *config.elevation)
        azimuths, elevations = rng.uniform(-180, 180, 40), rng.uniform(floor, ceiling, 40)
        places = centre[:2] + distance * unit_vectors(azimuths + heading, elevations)[:, :2]
        inside = np.all((places > WALL_MARGIN) & (places < np.array(size[:2]) - WALL_MARGIN), axis=1)
        if inside.any():
            first = int(np.argmax(inside))
            return float(azimuths[first]), float(elevations[first]), distance
    raise ConfigError(f"rooms.distance: no place {config.distance[0]} m from a listener in a room of {size} m.")


# ------------------------------------------------------------------------------------------------ impulse responses


@dataclass(frozen=True)
class Images:
    """Image sources seen from the listener: `vectors` (n, 3) in metres, pressure `gains` (bands, n) without 1/r."""

    vectors: Array
    gains: Array


BAND_CENTRES = np.array([125.0, 250, 500, 1000, 2000, 4000, 8000])


def image_sources(room: Room, listener: Listener, config: RoomsConfig) -> list[Images]:
    """Image sources of every source position of `listener` (pyroomacoustics' image source model)."""
    require("pyroomacoustics", "room simulation", "demo")
    import pyroomacoustics

    banded = len(room.absorption) > 1
    material = (
        pyroomacoustics.Material(
            energy_absorption={"coeffs": room.absorption.tolist(), "center_freqs": BAND_CENTRES.tolist()}
        )
        if banded
        else pyroomacoustics.Material(float(room.absorption[0]))
    )
    box = pyroomacoustics.ShoeBox(
        list(room.size), fs=16_000, materials=material, max_order=config.max_order, air_absorption=banded
    )
    centre = np.array(listener.position)
    box.add_microphone(centre)
    offsets = unit_vectors(listener.azimuth + listener.heading, listener.elevation) * listener.distance[:, None]
    for place in centre + offsets:
        box.add_source(place)
    box.image_source_model()
    turn = np.radians(listener.heading)
    rotation = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]])
    found = []
    for source in box.sources:
        vectors = (source.images.T.astype(np.float64) - centre) @ rotation.T
        gains = np.asarray(source.damping, dtype=np.float64)
        if banded:
            gains = gains * np.exp(-0.5 * np.asarray(box.air_absorption)[:, None] * np.linalg.norm(vectors, axis=1))
        found.append(Images(vectors, gains))
    return found


@functools.lru_cache(maxsize=8)
def _band_weights(frequencies: tuple[float, ...]) -> Array:
    """Linear interpolation over log frequency from octave bands to bins: (bands, frequencies)."""
    position = np.interp(np.log2(np.maximum(frequencies, 1.0)), np.log2(BAND_CENTRES), np.arange(7))
    return np.maximum(0.0, 1.0 - np.abs(np.arange(7)[:, None] - position[None]))


@functools.lru_cache(maxsize=8)
def _kernel_shape(rate: int, seconds: float) -> tuple[int, Array, Array]:
    """(taps, low-pass (bins,), window (taps,)): a quarter of the taps lies before the arrival.

    The top tenth of the band is rolled off, so that a fractional delay rings for a few samples only.
    """
    taps = 1 << int(np.ceil(np.log2(rate * (seconds + 0.003))))
    frequencies = np.fft.rfftfreq(taps, 1 / rate)
    edge = np.clip((frequencies / (rate / 2) - 0.88) / 0.12, 0, 1)
    ramp = taps // 8
    fade = np.sin(np.linspace(0, np.pi / 2, ramp)) ** 2
    window = np.concatenate([fade, np.ones(taps - 2 * ramp), fade[::-1]])
    return taps, 0.5 * (1 + np.cos(np.pi * edge)), window


def pre_delay(head: Head, rate: int) -> int:
    """Samples between the start of a response and the arrival of the direct sound at the centre of the head."""
    return _kernel_shape(rate, head.seconds)[0] // 4


def impulse_response(images: Images, head: Head, rate: int, seconds: float, *, keep_delay: bool = False) -> Array:
    """Impulse response ``(channels, time)`` float64; a source at 1 m in the free field has unit gain at the centre.

    Every image source arrives at its own fractional delay from its own direction, filtered by the head and (banded
    rooms) by the walls. With `keep_delay` False the direct arrival is moved to ``pre_delay`` samples.
    """
    taps, lowpass, window = _kernel_shape(rate, head.seconds)
    length = round(seconds * rate)
    distance = np.linalg.norm(images.vectors, axis=1)
    shift = 0.0 if keep_delay else float(distance.min())
    delay = (distance - shift) * rate / SPEED_OF_SOUND
    use = np.flatnonzero(delay < length - 1)
    frequencies = np.fft.rfftfreq(taps, 1 / rate)
    whole = np.floor(delay[use]).astype(int)
    phase = (
        np.exp(-2j * np.pi * (delay[use] - whole + taps // 4)[:, None] * np.arange(len(frequencies)) / taps) * lowpass
    )
    gains = images.gains[:, use] / np.maximum(distance[use], 0.1)
    spectral = gains.T if len(gains) == 1 else gains.T @ _band_weights(tuple(frequencies.tolist()))
    spectrum = head.transfer(images.vectors[use] / distance[use, None], frequencies) * (phase * spectral)[:, None]
    kernels = np.fft.irfft(spectrum, taps) * window  # (n, channels, taps)
    places = (whole[:, None] + np.arange(taps)).ravel()
    channels = [np.bincount(places, kernels[:, c].ravel(), length + taps)[:length] for c in range(kernels.shape[1])]
    return np.stack(channels)


def add_tail(
    response: Array, room: Room, config: RoomsConfig, head: Head, rate: int, rng: np.random.Generator, distance: float
) -> Array:
    """Carry on where the image sources end: diffuse noise that fills up to the energy of the statistical field.

    The field of a unit source decays from its emission as 4πc/V · exp(−13.8 t / T60), T60 by Eyring (Kuttruff, Room
    Acoustics, §5); the source is `distance` metres away, so the direct sound comes later than that. What the image
    sources already have is taken off, so nothing is counted twice. Channels hear the field as loud as they hear diffuse
    noise (a figure of eight a third of it); ears get independent noise.
    """
    volume = float(np.prod(room.size))
    a, b, c = room.size
    absorption = min(float(np.mean(room.absorption)), 0.99)
    decay_time = 0.161 * volume / (-2 * (a * b + b * c + a * c) * np.log(1 - absorption))
    length, travel = response.shape[1], distance / SPEED_OF_SOUND
    time = (np.arange(length) - pre_delay(head, rate)) / rate + (0.0 if config.keep_delay else travel)  # from emission
    late = time >= max(travel, config.max_order * min(room.size) / SPEED_OF_SOUND * 0.5)
    if not late.any():
        return response
    field = 4 * np.pi * SPEED_OF_SOUND / volume / rate * np.exp(-13.8 * time / decay_time)
    noise = head.diffuse(rng, length)
    width = max(1, round(0.01 * rate))
    present = np.square(response).mean(axis=0) / np.square(noise).mean()
    missing = np.sqrt(np.clip(field - np.convolve(present, np.ones(width) / width, "same"), 0, None))
    return response + noise * (missing * late)


def response_of(
    room: Room,
    listener: Listener,
    images: Images,
    index: int,
    config: RoomsConfig,
    head: Head,
    rate: int,
    draw: int | None = None,
) -> Array:
    """The finished response (channels, time) float32 of source `index`; `draw` names the draw of its late noise, by
    default its own."""
    response = impulse_response(images, head, rate, config.seconds, keep_delay=config.keep_delay)
    if config.tail:
        rng = seeded("tail", room.name, listener.position, index if draw is None else draw)
        response = add_tail(response, room, config, head, rate, rng, float(listener.distance[index]))
    return response.astype(np.float32)
