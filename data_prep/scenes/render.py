"""Sound: a bank of room responses on disk, and scenes mixed from dry clips, responses and noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import LAYOUT_CHANNELS, Waveform
from audio_llm.errors import AudioError, ConfigError
from audio_llm.files import atomic_file, write_json
from data_prep import sounds
from data_prep.scenes import rooms
from data_prep.scenes.receivers import Head, unit_vectors
from data_prep.scenes.world import Placed, World

Array = np.ndarray


@dataclass(frozen=True)
class AudioConfig:
    """Format and levels of the scenes."""

    sample_rate: int = 16_000  # Hz
    seconds: float = 2.56  # of a scene
    layout: str = "binaural"  # mono, stereo, binaural or foa
    level_db: float = -32.0  # dBFS (RMS) of a dry event heard from 1 m without a room: leaves headroom at 0.7 m
    level_jitter_db: float = 0.0  # events differ by up to this; 0 keeps loudness a pure cue of distance
    snr_db: tuple[float, float] = (25.0, 40.0)  # mixed events (over their own time) against diffuse pink noise

    def check(self) -> None:
        """Raise :class:`ConfigError` for a format that cannot be."""
        if not 4_000 <= self.sample_rate <= 192_000:
            raise ConfigError(f"audio.sample_rate: expected 4000 to 192000 Hz, found {self.sample_rate}.")
        if not 0.5 <= self.seconds <= 600:
            raise ConfigError(f"audio.seconds: expected 0.5 to 600, found {self.seconds}.")
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            raise ConfigError(f"audio.snr_db: expected [lowest, highest], found {list(self.snr_db)}.")


# ------------------------------------------------------------------------------------------------ the bank


def render_room(folder: Path, room: rooms.Room, config: rooms.RoomsConfig, head: Head, rate: int) -> int:
    """Write the responses of one room as ``<room>/<n>.npy`` (channels, time) float32, then ``<room>.json``.

    The JSON is written last: a room with it is finished, and is not rendered again. Returns the number of responses.
    """
    place = folder / room.name
    done = place / f"{room.name}.json"
    count = sum(len(listener.azimuth) for listener in room.listeners)
    if done.is_file():
        return count
    place.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, listener in enumerate(room.listeners):
        for k, images in enumerate(rooms.image_sources(room, listener, config)):
            index = number * len(listener.azimuth) + k
            response = rooms.response_of(room, listener, images, k, config, head, rate)
            _save(place / f"{index}.npy", response)
            entries.append(_entry(room, listener, k, f"{room.name}/{index}.npy"))
    write_json(done, {"data": entries})
    return count


def _save(path: Path, array: Array) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)


def _entry(room: rooms.Room, listener: rooms.Listener, k: int, name: str) -> dict[str, Any]:
    """One row of SpatialSoundQA's reverberation metadata (axes of SoundSpaces: +x right, +y up, −z ahead).

    Positions are turned so that the listener looks along −z, because the published labels are read off
    source − sensor alone. Our own angles stand beside them.
    """
    azimuth, elevation, distance = (float(v[k]) for v in (listener.azimuth, listener.elevation, listener.distance))
    ahead, left, up = (distance * unit_vectors(azimuth, elevation)).tolist()
    sensor = (0.0, listener.position[2], 0.0)
    source = (sensor[0] - left, sensor[1] + up, sensor[2] - ahead)
    return {
        "fname": name,
        "agent_position": "0.0,0.0,0.0",
        "sensor_position": ",".join(f"{value:.5f}" for value in sensor),
        "source_position": ",".join(f"{value:.5f}" for value in source),
        "room": room.name,
        "room_size": [round(value, 3) for value in room.size],
        "absorption": [round(float(value), 4) for value in room.absorption],
        "azimuth": round(azimuth, 3),
        "elevation": round(elevation, 3),
        "distance": round(distance, 4),
    }


def write_bank_index(folder: Path, layout: str, split: str, names: Sequence[str]) -> None:
    """``<split>_reverberation.json`` beside the layout's folder: the rows of all rooms of a split."""
    entries = []
    for name in names:
        entries += json.loads((folder / layout / name / f"{name}.json").read_text(encoding="utf-8"))["data"]
    write_json(folder / f"{split}_reverberation.json", {"data": entries})


# ------------------------------------------------------------------------------------------------ scenes

FADE_SECONDS = 0.01
PEAK = 0.999


def dry_event(placed: Placed, rate: int) -> Array:
    """The dry event (time,) float64 at unit RMS, faded at both ends.

    Where the cut would fall into a pause of the recording (more than 6 dB below its mean), the loudest cut of the same
    length is taken, so that every event in the ground truth can be heard; the cut of a recording with `loud` frames was
    chosen by them (:func:`data_prep.scenes.world.cut`).
    """
    whole = sounds.load(placed.clip, rate).astype(np.float64)
    length = min(round(placed.seconds * rate), len(whole))
    energy = np.concatenate([[0.0], np.cumsum(np.square(whole))])
    power = (energy[length:] - energy[:-length]) / length  # of the cut at every start
    start = min(round(placed.skip * rate), len(whole) - length)
    if not placed.clip.loud and power[start] < 0.25 * energy[-1] / len(whole):
        start = int(np.argmax(power))
    if power[start] <= 1e-14:
        raise AudioError(f"{placed.clip.name}: the clip is silent")
    part = whole[start : start + length] / np.sqrt(power[start])
    ramp = min(round(FADE_SECONDS * rate), length // 2)
    fade = np.sin(np.linspace(0, np.pi / 2, ramp)) ** 2
    part[:ramp] *= fade
    part[length - ramp :] *= fade[::-1]
    return part


def pink_noise(head: Head, rng: np.random.Generator, samples: int) -> Array:
    """Diffuse noise of the head, (channels, samples) float64, mean power 1, power spectrum 1/f above 40 Hz at 16 kHz.

    The spectrum of white Gaussian noise is Gaussian too, so it is drawn directly.
    """
    from scipy import fft

    bins = samples // 2 + 1
    spectrum = head.diffuse(rng, bins) + 1j * head.diffuse(rng, bins)
    spectrum /= np.sqrt(np.maximum(np.arange(bins) / bins * 200, 1.0))
    noise = fft.irfft(spectrum.astype(np.complex64), samples, axis=1)
    return noise / np.sqrt(np.mean(np.square(noise)))


def render_scene(
    placed: Sequence[Placed], world: World, bank: Path, head: Head, config: AudioConfig, *seed: object
) -> tuple[Waveform, dict[str, Any]]:
    """Mix one scene. Returns it and what was done: SNR in dB, events' gains, and the gain against clipping (if any)."""
    waveform, done, _ = mix_scene(placed, world, bank, head, config, *seed)
    return waveform, done


@dataclass(frozen=True)
class Wet:
    """An event as the head hears it: `samples` (channels, time) float64 from sample `start` of the scene on, at `gain`
    dB; `samples` end with the scene."""

    start: int
    samples: Array
    gain: float


@dataclass(frozen=True)
class Stems:
    """A scene before its parts are added: its events, its noise (channels, time), and the SNR in dB."""

    events: list[Wet]
    noise: Array
    snr: float

    def mixed(self) -> Array:
        """The sum, (channels, time) float64."""
        total = np.zeros_like(self.noise)
        for wet in self.events:
            total[:, wet.start : wet.start + wet.samples.shape[1]] += wet.samples
        return total + self.noise


def response_at(bank: Path, world: World, source: int) -> Array:
    """The response (channels, time) float64 of one of the world's sources."""
    room, index = world.places[source]
    return np.load(bank / room / f"{index}.npy").astype(np.float64)


def wet_event(item: Placed, response: Array, config: AudioConfig, gain: float) -> Wet:
    """`item` through `response` (channels, time), `gain` dB over unit RMS."""
    from scipy.signal import oaconvolve

    rate, total = config.sample_rate, round(config.seconds * config.sample_rate)
    wet = oaconvolve(dry_event(item, rate)[None] * 10 ** (gain / 20), response, axes=1)
    start = round(item.onset * rate)
    return Wet(start, wet[:, : max(0, total - start)], gain)


def render_stems(
    placed: Sequence[Placed], responses: Sequence[Array], head: Head, config: AudioConfig, *seed: object
) -> Stems:
    """The parts of a scene, drawn by `seed`: gains of the events, one after the other, then the noise."""
    rng = rooms.seeded("render", *seed)
    rate, total = config.sample_rate, round(config.seconds * config.sample_rate)
    dry, active = np.zeros((LAYOUT_CHANNELS[config.layout], total)), np.zeros(total, dtype=bool)
    events = []
    for item, response in zip(placed, responses, strict=True):
        gain = config.level_db + float(rng.uniform(-1, 1)) * config.level_jitter_db
        wet = wet_event(item, response, config, gain)
        dry[:, wet.start : wet.start + wet.samples.shape[1]] += wet.samples
        active[wet.start : min(total, wet.start + round(item.seconds * rate))] = True
        events.append(wet)
    snr = float(rng.uniform(*config.snr_db))
    heard = active.any()  # without events: noise as beside one that is heard from 1 m
    signal_power = float(np.square(dry[:, active]).mean()) if heard else 10 ** (config.level_db / 10)
    noise = pink_noise(head, rng, total) * np.sqrt(signal_power * 10 ** (-snr / 10))
    return Stems(events, noise, snr)


def mix_scene(
    placed: Sequence[Placed],
    world: World,
    bank: Path,
    head: Head,
    config: AudioConfig,
    *seed: object,
    frame: float = 0.1,
) -> tuple[Waveform, dict[str, Any], Array]:
    """:func:`render_scene`, and in which frames of so many seconds each event is as loud as the noise or louder:
    (events, frames) bool. Its reverberation counts as the event."""
    responses = [response_at(bank, world, item.source) for item in placed]
    return mix_heard(placed, responses, head, config, *seed, frame=frame)


def mix_heard(
    placed: Sequence[Placed],
    responses: Sequence[Array],
    head: Head,
    config: AudioConfig,
    *seed: object,
    frame: float = 0.1,
) -> tuple[Waveform, dict[str, Any], Array]:
    """:func:`mix_scene` of events through these `responses`, (channels, time) each."""
    stems = render_stems(placed, responses, head, config, *seed)
    mixed, total, hop = stems.mixed(), stems.noise.shape[1], round(frame * config.sample_rate)
    powers = np.zeros((len(placed), -(-total // hop)))
    for number, wet in enumerate(stems.events):
        around = (wet.start, total - wet.start - wet.samples.shape[1])
        powers[number] = _frame_energy(np.pad(wet.samples, ((0, 0), around)), hop)
    meta: dict[str, Any] = {"snr_db": round(stems.snr, 1)}
    if config.level_jitter_db:
        meta["level_db"] = [round(wet.gain, 2) for wet in stems.events]
    peak = float(np.abs(mixed).max())
    if peak > PEAK:
        mixed *= PEAK / peak
        meta["clip_gain_db"] = round(20 * np.log10(PEAK / peak), 2)
    waveform = Waveform(mixed.astype(np.float32), config.sample_rate, config.layout)
    return waveform, meta, powers >= _frame_energy(stems.noise, hop)


def _frame_energy(samples: Array, hop: int) -> Array:
    """Energy of every frame of `hop` samples, over all channels."""
    return np.add.reduceat(np.square(samples).sum(axis=0), np.arange(0, samples.shape[1], hop))
