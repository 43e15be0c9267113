"""The contract of an audio encoder, and the registry by which a configuration becomes one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from audio_llm import config as recipes
from audio_llm.audio import LAYOUT_CHANNELS, TWO_CHANNELS, channels_cure, take_channels
from audio_llm.errors import AudioError, ConfigError, describe, nearest
from audio_llm.model.convolutions import repair_convolutions
from audio_llm.ranges import building
from audio_llm.registry import Registry

repair_convolutions()  # whoever has an encoder has imported this module

ENCODERS = Registry("encoders", "encoder", needs="config_class")

# What an encoder may be built to hear, and of which layouts. "each" hears two by the same weights, one after the other,
# and joins the tokens of an instant, left then right, to one of twice the width: which ear heard what stays in place.
HEARS = dict.fromkeys(("left", "right", "mean", "each"), TWO_CHANNELS) | {"omni": ("foa",), "duplicate": ("mono",)}


@dataclasses.dataclass
class Published:
    """What a published file holds, in evaluation mode: all that ``model.folder.save_parts`` writes to a folder."""

    encoder: AudioEncoder
    heads: dict[str, nn.Module] = dataclasses.field(default_factory=dict)  # by the prefix of their keys in a folder
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # entries of the folder's configuration


class AudioEncoder(nn.Module):
    """Waveform windows in, tokens out.

    A child sets `name` and `config_class`, the attributes below, and :meth:`encode`; :meth:`count_tokens` where it
    masks; where others publish checkpoints of it, also `signs`, `licence` and :meth:`load_published`. Features are
    computed inside, in float32 with autocast off. A clip alone and the same clip in a padded batch give the same
    tokens, because every clip is cut free of its padding by :meth:`prepare` before anything else sees it.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # A regular expression that finds keys which published files of this encoder have and those of no other: several
    # kinds of key, so that a file which lacks one is still told by the rest. Empty: not told from its keys.
    signs: ClassVar[str] = ""
    transformers_type: ClassVar[str] = ""  # `model_type` of the Transformers folders that :meth:`load_published` reads
    licence: ClassVar[str] = "see the source of the file"  # what is certain of the terms of published weights

    config: Any
    sample_rate: int  # Hz
    layouts: tuple[str, ...]  # accepted, the one it was designed for first
    num_channels: int
    hidden_size: int
    window_seconds: float
    hearing: str | None = None  # one of HEARS, where :meth:`hear` was called
    gradient_checkpointing: bool = False
    deterministic: bool = False  # stay in evaluation mode even while learning: fixed statistics, nothing dropped
    grid: tuple[int, int] | None = None  # patch tokens along time and frequency, where an encoder has such a grid
    augment: Callable[[Tensor], Tensor] | None = None  # on feature maps (batch, maps, frames, bins), in training only

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """The encoder of a published checkpoint, with the heads in it; `fields` replace those of its configuration.

        Raises :class:`CheckpointError` for a file that is no such checkpoint, naming every key that is missing,
        unexpected or of another shape; :class:`ConfigError` for an encoder without published checkpoints.
        """
        raise ConfigError(f"encoder '{cls.name}': it has no published checkpoints; train one.")

    @property
    def window_samples(self) -> int:
        return round(self.window_seconds * self.sample_rate)

    @property
    def num_tokens(self) -> int:
        """Tokens of a full window."""
        if self.grid is None:
            cure = "Its class states it: docs/extending/encoder.md."
            raise ConfigError(describe(f"encoder '{self.name}'", "num_tokens, the tokens of a window", "none", cure))
        return math.prod(self.grid)

    def count_tokens(self, samples: int) -> int:
        """Valid tokens of a clip of `samples` samples, 1 to a window: they come first in its row of the mask.

        All of the window's, by silence where a clip is shorter; a child that masks says otherwise.
        """
        return self.num_tokens

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Windows to tokens.

        `waveform` ``(batch, channels, time)`` float32 and `lengths` ``(batch,)`` in samples give tokens
        ``(batch, n, hidden)`` and a mask ``(batch, n)``, true for the :meth:`count_tokens` first tokens of each. Raises
        :class:`AudioError` for a wrong number of channels, or a clip that is empty or longer than the window.
        """
        waveform = self.prepare(waveform, lengths)
        if self.hearing is None:
            return self.encode(waveform, lengths)
        if self.hearing == "each":
            tokens, mask = self.encode(torch.cat(waveform.split(1, dim=1)), lengths.repeat(2))
            return torch.cat(tokens.chunk(2), dim=-1), mask[: len(lengths)]
        return self.encode(take_channels(waveform, self.hearing), lengths)

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, on ``(batch, channels, window_samples)`` that is zero after each clip's length."""
        raise NotImplementedError

    def hear(self, hearing: str) -> Self:
        """Take sound of another layout, of which `hearing` (one of :data:`HEARS`) says what reaches the encoder.

        Changes `layouts`, `num_channels` and, with ``"each"``, `hidden_size` (twice as wide); no weight. To be called
        before anything is built upon the encoder. :class:`ConfigError` where that is no choice of this encoder.
        """
        if hearing not in HEARS:
            raise ConfigError(describe(f"encoder {self.name}: hearing", f"one of {', '.join(HEARS)}", repr(hearing)))
        wanted = 2 if hearing == "duplicate" else 1
        if self.hearing is not None or self.num_channels != wanted:
            expected = "one choice" if self.hearing else f"an encoder of {wanted} channel(s), whose choice it is"
            found = f"one that hears {' or '.join(self.layouts)}"
            raise ConfigError(describe(f"encoder {self.name}: hearing {hearing}", expected, found, "Leave it out."))
        self.hearing, self.layouts = hearing, HEARS[hearing]
        self.num_channels = LAYOUT_CHANNELS[self.layouts[0]]
        if hearing == "each":
            self.hidden_size *= 2
        return self

    def patches(self, tokens: Tensor) -> Tensor:
        """The patch tokens on their `grid`: ``(batch, n, hidden)`` → ``(batch, time, frequency, hidden)``."""
        raise NotImplementedError

    def prepare(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """Check the batch; zero what lies after each length; pad or trim the padding to the window. Returns float32."""
        if waveform.ndim != 3 or waveform.shape[1] != self.num_channels:
            expected = f"(batch, {self.num_channels}, time), {' or '.join(self.layouts)} at {self.sample_rate} Hz"
            raise AudioError(
                describe(
                    f"input of encoder '{self.name}'",
                    expected,
                    f"shape {tuple(waveform.shape)}",
                    channels_cure(self.layouts, waveform.shape[1] if waveform.ndim == 3 else 0),
                )
            )
        if lengths.shape != waveform.shape[:1]:
            raise AudioError(
                describe("lengths", f"one for each of {waveform.shape[0]} clips", f"shape {tuple(lengths.shape)}")
            )
        limit, time = self.window_samples, waveform.shape[2]
        for row, length in enumerate(lengths.tolist()):
            if not 1 <= length <= min(limit, time):
                most = f"{time} (as long as the batch is)" if 0 < time < limit else f"{limit}"
                expected = f"1 to {most} samples (the window is {limit} samples, {self.window_seconds:g} s)"
                raise AudioError(
                    describe(
                        f"clip {row} for encoder '{self.name}'",
                        expected,
                        f"{length} samples, {length / self.sample_rate:.2f} s",
                        "Cut long audio into windows.",
                    )
                )
        waveform = nn.functional.pad(waveform.float(), (0, limit - time))
        inside = torch.arange(limit, device=waveform.device) < lengths.to(waveform.device)[:, None]
        return torch.where(inside[:, None], waveform, 0.0)  # not a product: NaN may stand after the length

    @property
    def layer_prefixes(self) -> list[str]:
        """Name prefixes of the layers from the input up, for layer-wise learning rates and partial unfreezing."""
        blocks = getattr(self, "blocks", None)
        return [f"blocks.{number}." for number in range(len(blocks))] if isinstance(blocks, nn.ModuleList) else []

    def train(self, mode: bool = True) -> AudioEncoder:
        """Training mode only where something can learn: a frozen encoder keeps its statistics and drops nothing."""
        learns = any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and learns and not self.deterministic)


def build_encoder(config: dict[str, Any]) -> AudioEncoder:
    """Encoder from ``{"name": "spatial_ast", ...}``; the other keys are fields of its configuration dataclass.

    ``"preset": "tiny"`` starts from one of the class's presets, ``"published": path`` from a published checkpoint; the
    keys beside it override its configuration. ``"hearing"`` (``"channels"`` in folders of version 0.1) is what it hears
    of another layout: see :meth:`AudioEncoder.hear`.
    """
    fields = dict(config)
    old = fields.pop("channels", None)
    hearing = fields.pop("hearing", old)
    encoder = _build(fields)
    return encoder if hearing is None else encoder.hear(hearing)


def _build(fields: dict[str, Any]) -> AudioEncoder:
    name = fields.pop("name", None)
    if name is None:
        raise ConfigError(f"encoder: expected a 'name', one of {', '.join(sorted(ENCODERS))}.")
    kind: type[AudioEncoder] = ENCODERS.find(name)
    preset, published = fields.pop("preset", None), fields.pop("published", None)
    if published is not None:
        if preset is not None:
            raise ConfigError(f"encoder {name}: expected 'published' or 'preset', found both.")
        return kind.load_published(published, **fields).encoder
    if preset is not None:
        if preset not in kind.presets:
            known = ", ".join(sorted(kind.presets)) or "none"
            hint = nearest(str(preset), kind.presets)
            raise ConfigError(f"encoder {name}: no preset '{preset}'{hint}. Known: {known}.")
        fields = {**kind.presets[preset], **fields}
    with building(f"encoder {name}", fields):
        return kind(recipes.build(kind.config_class, fields, where=f"encoder {name}"))


def encoder_config(encoder: AudioEncoder) -> dict[str, Any]:
    """Inverse of :func:`build_encoder`: plain values, every field, fit for JSON."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(encoder.config).items()
    }
    heard = {} if encoder.hearing is None else {"hearing": encoder.hearing}
    return {"name": encoder.name, **heard, **plain}


def freeze_below(encoder: AudioEncoder, top: int) -> list[nn.Module]:
    """Freeze all but the `top` last layers of `encoder`; returns the modules that must stay in evaluation mode."""
    prefixes = encoder.layer_prefixes
    if top > len(prefixes) or (top > 0 and not prefixes):
        raise ConfigError(describe("unfreeze", f"0 to {len(prefixes)} layers of '{encoder.name}'", str(top)))
    learning = tuple(prefixes[len(prefixes) - top :])
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith(learning))
    return [module for name, module in encoder.named_modules() if name and not f"{name}.".startswith(learning)]
