"""The mel CNN of the UrbanSound8K course project "audio_is_all_you_need": three convolutions over a log-mel picture.

State-dict keys are the published ones (``encoder{1,2,3}.conv``, ``encoder{1,2,3}.bn``); the rest of the published model
is its classifier, ``UrbanSoundHead`` of ``heads.py``. The defaults of :class:`UrbanSoundCNNConfig` are the published
model on 4 s of mono sound at 22.05 kHz. Its files are ``best_model_this_fold.pt`` (the weights among others under
``model_state_dict``) and ``model_fold_{n}_best.safetensors``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audio_llm import config as recipes
from audio_llm.encoders import features
from audio_llm.encoders.heads import UrbanSoundHead
from audio_llm.encoders.published import configured, length, read_published, state_dict_of
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.encoder import AudioEncoder, Published
from audio_llm.model.folder import load_strictly


@dataclasses.dataclass
class UrbanSoundCNNConfig:
    """Size and front end; one entry of `widths` and `pools` for every stage."""

    sample_rate: int = 22050
    n_fft: int = 2048
    hop: int = 512
    n_mels: int = 128
    fmin: float = 0.0
    fmax: float = 11025.0
    window_seconds: float = 4.0  # UrbanSound8K's longest slice
    widths: tuple[int, ...] = (32, 64, 128)
    pools: tuple[tuple[int, int], ...] = ((2, 2), (2, 2), (2, 4))  # (mels, frames)
    convolutions: int = 1  # per stage; the published model has one
    dropout: float = 0.2  # after each stage, training only
    level: Literal["clip", "full_scale"] = "clip"  # dB below the clip's own maximum (published), or below full scale
    normalize: Literal["none", "bands"] = (
        "none"  # "bands" standardises every mel band by the training clips' statistics
    )

    @property
    def frames(self) -> int:
        """Spectrogram frames of one window."""
        return 1 + round(self.window_seconds * self.sample_rate) // self.hop

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the last feature map along time and frequency; what does not fill a cell is dropped."""
        frames, mels = self.frames, self.n_mels
        for pool in self.pools:
            mels, frames = mels // pool[0], frames // pool[1]
        return frames, mels

    def check(self) -> None:
        """:class:`ConfigError` for a configuration that cannot be built."""
        if not self.widths or len(self.widths) != len(self.pools):
            raise ConfigError(
                describe("pools", f"one (mels, frames) for each of {len(self.widths)} widths", f"{len(self.pools)}")
            )
        if self.convolutions < 1 or min(self.widths) < 1 or min(min(pool) for pool in self.pools) < 1:
            raise ConfigError(describe("widths, pools, convolutions", "positive numbers", "a smaller one"))
        if min(self.grid) < 1:
            raise ConfigError(describe("pools", f"cells in {self.frames} frames x {self.n_mels} mels", "none left"))
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            expected = f"0 <= fmin < fmax <= {self.sample_rate / 2:g} Hz"
            raise ConfigError(describe("fmin, fmax", expected, f"{self.fmin:g}, {self.fmax:g}"))
        if not 0 <= self.dropout < 1:
            raise ConfigError(describe("dropout", "a share in [0, 1)", f"{self.dropout:g}"))


class Stage(nn.Module):
    """Convolution, batch norm, ReLU (`convolutions` times), then maximum over (mels, frames) and dropout."""

    def __init__(self, inputs: int, width: int, pool: tuple[int, int], convolutions: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.more = nn.Sequential()
        for _ in range(convolutions - 1):
            self.more.extend((nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()))
        self.pool, self.dropout = tuple(pool), dropout

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.more(F.relu(self.bn(self.conv(maps))))
        return F.dropout(F.max_pool2d(maps, self.pool), self.dropout, self.training)


class UrbanSoundCNN(AudioEncoder):
    """One token per cell of the last feature map, time-major. The mask is all true: silence fills the window.

    A clip shorter than the window is padded with silence at its end, as the published model was trained.
    """

    name = "urbansound_cnn"
    config_class = UrbanSoundCNNConfig
    signs = r"^encoder\d\.conv\.weight$"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {},
        "tiny": {"sample_rate": 16000, "n_fft": 512, "hop": 256, "n_mels": 32, "fmax": 8000.0, "window_seconds": 1.0}
        | {"widths": [8, 16], "pools": [[2, 4], [4, 4]], "dropout": 0.0},
    }

    def __init__(self, config: UrbanSoundCNNConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.sample_rate, self.window_seconds = config.sample_rate, config.window_seconds
        self.layouts, self.num_channels = ("mono",), 1
        self.hidden_size = config.widths[-1]
        self.grid: tuple[int, int] = config.grid
        self.bands = nn.BatchNorm1d(config.n_mels, affine=False) if config.normalize == "bands" else None
        inputs = 1
        for number, (width, pool) in enumerate(zip(config.widths, config.pools, strict=True), 1):
            self.add_module(f"encoder{number}", Stage(inputs, width, pool, config.convolutions, config.dropout))
            inputs = width

    @property
    def layer_prefixes(self) -> list[str]:
        return [f"encoder{number}." for number in range(1, len(self.config.widths) + 1)]

    def patches(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, self.grid)

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(waveform.device.type, enabled=False):
            levels = self.levels(waveform)
        maps = levels.transpose(2, 3).to(next(self.parameters()).dtype)  # (batch, 1, mels, frames)
        for prefix in self.layer_prefixes:
            stage = self.get_submodule(prefix[:-1])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                maps = checkpoint(stage, maps, use_reentrant=False)
            else:
                maps = stage(maps)
        tokens = maps.permute(0, 3, 2, 1).flatten(1, 2)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def levels(self, waveform: Tensor) -> Tensor:
        """Log-mel picture ``(batch, 1, frames, mels)`` in dB (standardised with ``normalize: bands``), float32.

        In training `augment` sees it with its floor at zero, so that what it masks becomes silence.
        """
        config = self.config
        bank = features.mel_bank(
            config.sample_rate, config.n_fft, config.n_mels, config.fmin, config.fmax, waveform.device
        )
        power = features.power_mel(waveform, bank, config.n_fft, config.hop)
        scale = features.relative_decibels if config.level == "clip" else features.full_scale_decibels
        levels = scale(power)
        if self.training and self.augment is not None:
            levels = self.augment(levels + features.DYNAMIC_RANGE_DB) - features.DYNAMIC_RANGE_DB
        return levels if self.bands is None else self._standardise(self.bands, levels)

    @staticmethod
    def _standardise(bands: nn.BatchNorm1d, levels: Tensor) -> Tensor:
        if bands.training:
            return bands(levels.squeeze(1).transpose(1, 2)).transpose(1, 2)[:, None]
        # Written out so that a model cast to bfloat16 still standardises in float32.
        mean, variance = bands.get_buffer("running_mean").float(), bands.get_buffer("running_var").float()
        return (levels - mean) * torch.rsqrt(variance + bands.eps)

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """See the base class; with the classifier and the names of its classes.

        The widths of the convolutions and the number of classes are read off the file; a file with another number of
        classes than UrbanSound8K's ten does not say what they are called, so they are numbered.
        """
        state = state_dict_of(read_published(path), kind=cls.name, name=path)
        known = {"widths": _widths(state, str(path)), **fields}
        with configured(path):
            encoder = cls(recipes.build(UrbanSoundCNNConfig, known, where=f"encoder {cls.name}"))
        heads = {key: state.pop(key) for key in list(state) if key.startswith(_HEAD)}
        load_strictly(encoder, state, str(path))
        count = length(heads["fc2.weight"]) if "fc2.weight" in heads else len(CLASSES)
        head = UrbanSoundHead(encoder.hidden_size, encoder.grid, count)
        load_strictly(head, heads, str(path))
        labels = list(CLASSES) if count == len(CLASSES) else [f"class {number}" for number in range(count)]
        # Its own loader mixed several channels to one.
        facts = {"task": "classification", "labels": labels, "head": {"name": "urbansound"}, "hearing": "mean"}
        return Published(encoder.eval(), {"head": head.eval()}, facts)


# ------------------------------------------------------------------------------------------------------ published files

# Class i of the published models; the numbers are those of UrbanSound8K's metadata (classID).
CLASSES = (
    "air conditioner",
    "car horn",
    "children playing",
    "dog bark",
    "drilling",
    "engine idling",
    "gun shot",
    "jackhammer",
    "siren",
    "street music",
)
_HEAD = ("conv1d.", "fc1.", "fc2.")


def _widths(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    keys = [f"encoder{number}.conv.weight" for number in (1, 2, 3)]
    for key in keys:
        if key not in state or state[key].ndim != 4:
            found = f"{key} {tuple(state[key].shape)}" if key in state else f"no {key}"
            raise CheckpointError(describe(f"checkpoint {name}", "the UrbanSound CNN's convolutions", found))
    return tuple(length(state[key]) for key in keys)
