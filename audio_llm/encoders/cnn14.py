"""CNN14 (Kong et al. 2020, "PANNs") as a trunk for sound events, with a sequence model on top.

The state-dict keys of the trunk are those of PSELDNets (`scalar`, `convs.conv_block1` to `6`). Presets named after a
decoder are the networks of stereo SELD with BiMamba, in their right form; `encoders.pseld`, which reads the published
files, chooses the form that their weights need.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audio_llm.encoders import pseld
from audio_llm.encoders.sequence import DecoderConfig, build_decoder
from audio_llm.encoders.spectral import PANNS_FRONT_END, PSELDNETS_FRONT_END, SpectralConfig, SpectralEncoder
from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import Published


@dataclasses.dataclass
class CNN14Config(SpectralConfig):
    """The defaults are the published trunk of stereo SELD: 160 ms a token, without a decoder."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # channels of each block
    time_pools: tuple[int, ...] = (2, 2, 2, 1, 1, 1)  # average pooling after each block, along frames ...
    frequency_pools: tuple[int, ...] = (2, 2, 2, 2, 2, 2)  # ... and along mel bands; what is left is averaged
    dropout: float = 0.0  # after each block
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)

    def check(self) -> None:
        super().check()
        for name in ("time_pools", "frequency_pools"):
            if len(getattr(self, name)) != len(self.widths):
                expected = f"{len(self.widths)} numbers, one for each of widths"
                raise ConfigError(describe(name, expected, repr(list(getattr(self, name)))))
        if self.columns < 1 or self.n_mels < math.prod(self.frequency_pools):
            size = f"{self.frames} frames and {self.n_mels} mels"
            raise ConfigError(describe("pooling", f"at least one cell left of {size}", "none", "Pool less."))

    @property
    def columns(self) -> int:
        """Steps in time that are left of a window's frames after pooling."""
        frames = self.frames
        for pool in self.time_pools:
            frames //= pool
        return frames


def _decoder(kind: str, **settings: Any) -> dict[str, Any]:
    return {"decoder": {"kind": kind, **settings}}


class ConvBlock(nn.Module):
    """Twice: 3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        for convolution in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(convolution.weight)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps))))))


class CNN14(SpectralEncoder):
    """One token per `column_frames` STFT frames, frequency averaged away; the mask is all true.

    Every clip fills the window, by silence where it is shorter.
    """

    name = "cnn14"
    signs = r"(^|\.)conv_block\d\.conv\d\.weight$"
    licence = "PANNs: CC BY 4.0 (their Zenodo record); weights of another origin: see the source of the file"
    config_class = CNN14Config
    config: CNN14Config
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "conformer": _decoder("conformer"),
        "bimamba": _decoder("bimamba"),
        "bimamba_ac": _decoder("bimamba_ac"),
        "conbimamba": _decoder("conbimamba", expansion=4, kernel=31, block_dropout=0.1, head_size=32),
        "conbimamba_ac": _decoder("conbimamba_ac", expansion=4, kernel=31, block_dropout=0.1),
        "gru": _decoder("gru"),
        "pseldnets": {  # four channels, 10 s; its conformer has one block
            **PSELDNETS_FRONT_END,
            **_decoder("conformer", layers=1, expansion=4, kernel=31, block_dropout=0.1),
        },
        "panns": {  # mono, 32 kHz, 320 ms a token
            **PANNS_FRONT_END,
            "time_pools": (2, 2, 2, 2, 2, 1),
            "frequency_pools": (2, 2, 2, 2, 2, 1),
            "dropout": 0.2,
        },
        "tiny": {
            "sample_rate": 16000,
            "n_fft": 512,
            "win_length": None,
            "hop": 320,
            "fmax": 8000.0,
            "window_seconds": 2.5,
            "widths": (16, 32, 64, 96, 128),
            "time_pools": (2, 2, 1, 1, 1),
            "frequency_pools": (2, 2, 2, 2, 2),
            **_decoder("bimamba", layers=1, head_size=32),
        },
    }

    def __init__(self, config: CNN14Config) -> None:
        super().__init__(config)
        self.config = config
        self.hidden_size = config.widths[-1]
        self.column_frames = math.prod(config.time_pools)
        self.grid = (config.columns, 1)
        inputs = (self.num_planes, *config.widths[:-1])
        self.convs = nn.ModuleDict(
            {f"conv_block{n}": ConvBlock(*sizes) for n, sizes in enumerate(zip(inputs, config.widths, strict=True), 1)}
        )
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = build_decoder(config.decoder, self.hidden_size)

    @property
    def layer_prefixes(self) -> list[str]:
        return [f"convs.{name}." for name in self.convs] + ["decoder."]

    def encode_planes(self, planes: Tensor) -> Tensor:
        maps = self.standardize(planes)
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        maps = maps.to(next(self.convs.parameters()).dtype)
        pools = zip(self.config.time_pools, self.config.frequency_pools, strict=True)
        for block, pool in zip(self.convs.values(), pools, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                maps = checkpoint(block, maps, use_reentrant=False)
            else:
                maps = block(maps)
            maps = self.dropout(F.avg_pool2d(maps, pool))
        return self.decoder(maps.mean(dim=3).transpose(1, 2))

    @classmethod
    def load_published(
        cls, path: str | os.PathLike[str], /, frames: Literal["all", "covered"] = "all", **fields: Any
    ) -> Published:
        """See the base class; with the head of events, whose `frames` are ``"covered"`` for the published 49.

        A `layout` of more channels than a file of PANNs has spreads its first convolution over all planes. A `decoder`
        whose weights are not those in the file (another kind or size) starts anew: the file's decoder, and the head
        that was trained on it, are left out, which is said in a warning and in ``facts["left_out"]``.
        """
        return pseld.load(cls, path, fields, frames)
