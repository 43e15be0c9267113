"""Dry clips heard through room responses: how they are rendered, and sounds of a shard that are rendered when read.

Rendering is that of Spatial-AST's published data, sample for sample (Zheng et al. 2024; :func:`render`, :func:`mix`).
What it gets wrong is put right by default: two sources are heard from two places, whole responses are used, silent
clips are refused. :class:`Rendering` has a switch for each.

A :class:`Recipe` is what a shard holds in place of a sound (``KEY.scene``): which clips, through which responses, how.
Where these files lie is said once, in ``roots.json`` beside the shards.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from audio_llm import audio
from audio_llm.audio import Waveform, decode
from audio_llm.config import build
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, DataError, describe, nearest
from audio_llm.files import parse_json, read_json, within

Array = np.ndarray
SAMPLE_RATE = 32_000  # Hz, of the published responses; an .npy file does not say
LEVEL_DB = -14.0  # dBFS (RMS) of a dry clip before it is heard in a room, published
SECONDS = 10.0  # published
SUFFIX, ROOTS = "scene", "roots.json"
_BEGIN = b'{"render": '  # no sound file begins so


@dataclass(frozen=True)
class Rendering:
    """How a clip sounds in a room. The defaults give the published test data; what training gave them is by name."""

    sample_rate: int = SAMPLE_RATE  # Hz
    layout: str = "binaural"  # of the responses: binaural, mono or foa
    seconds: float = SECONDS  # of a sample; the rest of a clip is cut
    level_db: float = LEVEL_DB  # dBFS (RMS) of a dry clip
    gain_db: float = 0.0  # of the whole sample; headroom, where a peak above full scale would take the level down
    hearing: audio.Hearing = "left"  # of a dry clip with several channels
    places: Literal["separate", "shared"] = "separate"  # shared: both clips of a pair through one response, published
    response_seconds: float | None = None  # longest response, cut beyond; 2 in the published training
    silent: Literal["refuse", "keep"] = "refuse"  # clips without any sound, which were published as they are

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that cannot be rendered with."""
        if self.layout not in audio.LAYOUT_CHANNELS:
            found = f"'{self.layout}'{nearest(self.layout, audio.LAYOUT_CHANNELS)}"
            raise ConfigError(describe("rendering.layout", ", ".join(audio.LAYOUT_CHANNELS), found))
        for name in ("sample_rate", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(describe(f"rendering.{name}", "a positive number", repr(getattr(self, name))))
        if self.response_seconds is not None and self.response_seconds <= 0:
            raise ConfigError(describe("rendering.response_seconds", "a positive number", str(self.response_seconds)))

    @property
    def samples(self) -> int:
        return round(self.seconds * self.sample_rate)


def check_rate(key: str, rate: int, responses: Path) -> None:
    """Compare `rate`, the recipe's `key`, with that of the folder `responses`: files .npy do not say theirs, and at
    another they are heard as other rooms. Where they lie in a data set of ``audio-llm prep``, that one says it, and
    :class:`ConfigError` is raised for another; elsewhere a rate that is not the published one is told."""
    try:
        known = read_json(responses.parent / "dataset.json")["config"]["audio"]["sample_rate"]
    except (OSError, ValueError, KeyError, TypeError):
        if rate != SAMPLE_RATE:
            told = f"those of {responses} are taken to be of {rate} Hz, which their files do not say"
            print(f"note: {key}: room responses are published at {SAMPLE_RATE} Hz; {told}.", file=sys.stderr)
        return
    if isinstance(known, int) and known != rate:
        cure = f"Set {key} to {known}; what a model hears is said elsewhere."
        raise ConfigError(describe(key, f"{known} Hz, the rate of {responses}", f"{rate} Hz", cure))


def dry(waveform: audio.Waveform, rendering: Rendering, name: str = "clip") -> Array:
    """``(time,)`` float64 at the rendering's rate and level: the whole clip, before anything is cut.

    Resampling is polyphase (``scipy.signal.resample_poly``), because published samples were made so.
    """
    from scipy.signal import resample_poly

    samples = audio.hear(waveform, ("mono",), rendering.hearing, name=name).samples.astype(np.float64)
    if waveform.sample_rate != rendering.sample_rate:
        samples = resample_poly(samples, rendering.sample_rate, waveform.sample_rate, axis=1)
    rms = float(np.sqrt(np.mean(np.square(samples[0]))))
    if rms == 0 and rendering.silent == "refuse":
        raise AudioError(describe(name, "sound", "silence", "rendering.silent=keep renders it as it is."))
    return samples[0] * (10 ** (rendering.level_db / 20) / rms) if rms else samples[0]


def render(samples: Array, response: Array, rendering: Rendering) -> Array:
    """A dry clip ``(time,)`` through a response ``(channels, time)``: ``(channels, rendering.samples)`` float32.

    The full convolution in float64, then cut or followed by silence (Zheng et al. 2024, the published code's order).
    """
    from scipy.signal import fftconvolve

    if rendering.response_seconds is not None:
        response = response[:, : round(rendering.response_seconds * rendering.sample_rate)]
    wet = fftconvolve(samples[None], response, axes=None).astype(np.float32)[:, : rendering.samples]
    return np.pad(wet, ((0, 0), (0, rendering.samples - wet.shape[1])))


def mix(first: Array, second: Array) -> Array:
    """Two rendered sources as one scene: their mean, published."""
    return (first + second) / 2


def hear(clips: Sequence[Array], responses: Sequence[Array], rendering: Rendering) -> Array:
    """One or two dry clips ``(time,)``, each through its own response: ``(channels, rendering.samples)``."""
    wet = [render(samples, response, rendering) for samples, response in zip(clips, responses, strict=True)]
    return wet[0] if len(wet) == 1 else mix(*wet)


def read_response(path: str | Path, layout: str = "binaural") -> Array:
    """``(channels, time)`` float64, not normalised. Raises :class:`AudioError` naming the file if it cannot be used."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AudioError(describe(str(path), "an .npy file of numbers", str(error).splitlines()[0])) from error
    channels = audio.LAYOUT_CHANNELS[layout]
    if not isinstance(array, np.ndarray) or array.ndim != 2 or len(array) != channels or array.shape[1] == 0:
        found = f"shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        cure = "Say what the responses hold: `audio-llm prep RECIPE OUT rendering.layout=LAYOUT`."
        raise AudioError(describe(str(path), f"({channels}, time) for layout '{layout}'", found, cure))
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(describe(str(path), "floating-point samples", str(array.dtype)))
    if not np.isfinite(array).all() or not array.any():
        raise AudioError(describe(str(path), "a response", "silence" if np.isfinite(array).all() else "NaN or Inf"))
    return array.astype(np.float64)


def layout_of(path: str | Path) -> str:
    """The layout that a response has by its channels: mono, binaural or foa. Raises :class:`AudioError`."""
    try:
        channels = np.load(path, mmap_mode="r", allow_pickle=False).shape[0]
    except (OSError, ValueError, EOFError, IndexError, AttributeError) as error:
        raise AudioError(describe(str(path), "an .npy file (channels, time)", str(error).splitlines()[0])) from error
    layouts = {audio.LAYOUT_CHANNELS[name]: name for name in ("mono", "binaural", "foa")}
    if channels not in layouts:
        raise AudioError(describe(str(path), "1, 2 or 4 channels", f"{channels}"))
    return layouts[channels]


def render_files(clips: Sequence[Path], responses: Sequence[Path], rendering: Rendering) -> Waveform:
    """One or two dry clips, each through its response. Raises :class:`AudioError` naming the file that cannot be
    used."""
    heard = [dry(decode(path), rendering, str(path)) for path in clips]
    rooms = [read_response(path, rendering.layout) for path in responses]
    return Waveform(hear(heard, rooms, rendering), rendering.sample_rate, rendering.layout)


# ------------------------------------------------------------------------------------------------ rendered when read


@dataclass(frozen=True)
class Recipe:
    """A sound that is rendered when it is read: `clips` and `responses` by their names under the folders that
    ``roots.json`` calls so, and the `sizes` in bytes that they all had, clips first."""

    clips: tuple[str, ...]
    responses: tuple[str, ...]
    rendering: Rendering = field(default_factory=Rendering)
    sizes: tuple[int, ...] = ()

    @property
    def info(self) -> tuple[int, str, float]:
        """Rate in Hz, layout and seconds of what is heard."""
        return self.rendering.sample_rate, self.rendering.layout, self.rendering.samples / self.rendering.sample_rate

    def to_bytes(self) -> bytes:
        """One line of JSON; settings that are as published are left out."""
        usual = dataclasses.asdict(Rendering())
        how = {name: value for name, value in dataclasses.asdict(self.rendering).items() if value != usual[name]}
        tree = {"clips": self.clips, "responses": self.responses, "sizes": self.sizes, "rendering": how}
        return json.dumps({"render": tree}, ensure_ascii=False).encode()

    @classmethod
    def read(cls, data: bytes, name: str) -> Recipe:
        """Raises :class:`AudioError`, which calls it `name`, for something else."""
        try:
            tree = parse_json(data)["render"]
            recipe = build(cls, {key: value for key, value in tree.items() if key != "rendering"}, name)
            rendering = build(Rendering, tree.get("rendering", {}), f"{name}: rendering")
            rendering.check()
        except (ValueError, KeyError, TypeError, AttributeError, AudioLLMError) as error:
            raise AudioError(describe(name, "clips and responses to render", f"something else ({error})")) from error
        count = len(recipe.clips)
        if not 1 <= count <= 2 or len(recipe.responses) != count or len(recipe.sizes) not in (0, 2 * count):
            found = f"{count} clips, {len(recipe.responses)} responses, {len(recipe.sizes)} sizes"
            raise AudioError(describe(name, "one or two clips with a response each", found))
        return dataclasses.replace(recipe, rendering=rendering)

    def render(self, roots: Mapping[str, str], name: str) -> Waveform:
        """The scene of the files under `roots`. Raises :class:`AudioError` for files that are not there or others."""
        try:
            clips = [within(roots["clips"], clip) for clip in self.clips]
            responses = [within(roots["responses"], response) for response in self.responses]
        except DataError as error:
            raise AudioError(f"{name}: {error}") from error
        for path, size in zip([*clips, *responses], self.sizes or [None] * 4, strict=False):
            try:
                found = os.path.getsize(path)
            except OSError as error:
                cure = f"Say in {ROOTS} beside the shards where they lie."
                raise AudioError(describe(f"{name}: {path}", "a file", error.strerror or "none", cure)) from error
            if size not in (None, found):
                raise AudioError(describe(f"{name}: {path}", f"{size} bytes, as it had", f"{found}: another file"))
        return render_files(clips, responses, self.rendering)


def is_recipe(data: bytes) -> bool:
    """Whether an audio member of a shard is a recipe."""
    return data.startswith(_BEGIN)


def sound_of(data: bytes, shard: str, **how: Any) -> Waveform:
    """The sound of an audio member of `shard`: decoded as ``audio.decode`` does by `how`, or rendered."""
    if not is_recipe(data):
        return decode(data, **how)
    return Recipe.read(data, how["name"]).render(_roots(str(Path(shard).parent)), how["name"])


@lru_cache(maxsize=64)
def _roots(folder: str) -> dict[str, str]:
    """What ``roots.json`` of a shard folder says."""
    path = Path(folder) / ROOTS
    try:
        tree: Any = read_json(path)
    except (OSError, ValueError) as error:
        tree = str(error)
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name), str) for name in ("clips", "responses")):
        expected = "the folders of 'clips' and 'responses', which its sounds are rendered from"
        raise AudioError(describe(str(path), expected, str(tree)[:200]))
    return tree
