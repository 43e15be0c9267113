"""HTS-AT (Chen et al. 2022): a Swin transformer (Liu et al. 2021) on a spectrogram folded into a square.

The square is made of runs of frames laid one above the other along frequency, so that a window of 1024 frames and 64
mel bands becomes 256 x 256. State-dict keys are those of HTS-AT and PSELDNets without their outer ``encoder.``; the
attention masks and index tables that published files carry are constants of the configuration here. `encoders.pseld`
reads these files.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audio_llm.encoders import pseld
from audio_llm.encoders.spectral import PANNS_FRONT_END, PSELDNETS_FRONT_END, SpectralConfig, SpectralEncoder
from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import Published

_FORBIDDEN = -100.0  # added to the score of patches that are neighbours only because the shift wraps round


@dataclasses.dataclass
class HTSATConfig(SpectralConfig):
    """The defaults are the published network on 5 s of stereo: 0.64 s a step of the token grid."""

    image_size: int = 256
    patch_size: int = 4
    embed_size: int = 96  # width of the first stage; doubled at each of the next
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    attention_window: int = 8  # patches a side
    mlp_ratio: float = 4.0
    drop_path: float = 0.1  # stochastic depth of the last block, linear from 0; training only

    @property
    def runs(self) -> int:
        """Runs of frames laid above each other in the square."""
        return self.image_size // self.n_mels

    @property
    def side(self) -> int:
        """Tokens along each side of the square after the last stage."""
        return self.image_size // self.patch_size >> (len(self.depths) - 1)

    def check(self) -> None:
        super().check()
        if len(self.heads) != len(self.depths):
            raise ConfigError(describe("heads", f"{len(self.depths)} numbers, one per stage", repr(list(self.heads))))
        if self.image_size % self.n_mels:
            raise ConfigError(describe("image_size", f"a multiple of n_mels ({self.n_mels})", str(self.image_size)))
        smallest = self.patch_size << (len(self.depths) - 1)
        if self.image_size % smallest or self.side % self.runs or self.side % self.attention_window:
            expected = (
                f"a multiple of {smallest} whose last stage is a multiple of {self.runs} rows and of the "
                f"attention window ({self.attention_window})"
            )
            raise ConfigError(describe("image_size", expected, f"{self.image_size} ({self.side} tokens a side)"))
        if self.frames > self.image_size * self.runs:
            expected = f"at most {self.image_size * self.runs} STFT frames"
            cure = "Raise hop or image_size, or shorten window_seconds."
            raise ConfigError(describe("window_seconds", expected, str(self.frames), cure))
        for stage, count in enumerate(self.heads):
            if (self.embed_size << stage) % count:
                raise ConfigError(describe(f"heads[{stage}]", f"a divisor of {self.embed_size << stage}", str(count)))


# --------------------------------------------------------------------------------------------------- windowed attention


def cut_windows(image: Tensor, size: int) -> Tensor:
    """``(batch, rows, columns, width)`` → ``(batch · windows, size², width)``, windows row by row."""
    tiles = image.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join_windows(windows: Tensor, size: int, side: int) -> Tensor:
    """Inverse of :func:`cut_windows` for square images."""
    tiles = windows.unflatten(1, (size, size)).unflatten(0, (-1, side // size, side // size))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@functools.cache
def relative_index(size: int) -> Tensor:
    """Row of the bias table for (query, key) in a window: ``(size², size²)``; shared, not to be written to."""
    with torch.device("cpu"), torch.inference_mode(False):
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        place = torch.stack((row.flatten(), column.flatten()))
        difference = place[:, :, None] - place[:, None] + size - 1
        return difference[0] * (2 * size - 1) + difference[1]


@functools.cache
def shift_mask(side: int, size: int) -> Tensor:
    """Scores to add in each window of an image that was rolled by half a window: ``(windows, size², size²)``."""
    with torch.device("cpu"), torch.inference_mode(False):
        part = torch.zeros(side, dtype=torch.long)
        part[-size:] = 1
        part[-(size // 2) :] = 2
        region = cut_windows((3 * part[:, None] + part)[None, :, :, None], size)[..., 0]
        return torch.where(region[:, :, None] == region[:, None], 0.0, _FORBIDDEN)


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * size - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """`windows` ``(batch · n, size², width)``; `mask` ``(n, size², size²)`` is added to the scores."""
        query, key, value = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        index = relative_index(self.size).to(windows.device)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)[None]  # (1, heads, size², size²)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(windows.shape[0] // mask.shape[0], 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwinBlock(nn.Module):
    """Attention within windows, every second block with the windows shifted by half; then the MLP. Pre-norm."""

    def __init__(self, config: HTSATConfig, stage: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        width, self.side = config.embed_size << stage, config.image_size // config.patch_size >> stage
        self.size = config.attention_window
        self.shift = self.size // 2 if shifted and self.side > self.size else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, config.heads[stage], self.size)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.drop_path = drop_path

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, side, side, width)`` both ways."""
        image = image + self._drop(self._attend(self.norm1(image)))
        return image + self._drop(self.mlp(self.norm2(image)))

    def _attend(self, image: Tensor) -> Tensor:
        mask = None
        if self.shift:
            image = image.roll((-self.shift, -self.shift), dims=(1, 2))
            mask = shift_mask(self.side, self.size).to(image.device)
        image = join_windows(self.attn(cut_windows(image, self.size), mask), self.size, self.side)
        return image.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else image

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1.0 - self.drop_path
        kept = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        corners = [image[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class Stage(nn.Module):
    def __init__(self, config: HTSATConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(config, stage, shifted=index % 2 == 1, drop_path=rate) for index, rate in enumerate(drop_paths)
        )
        last = stage == len(config.depths) - 1
        self.downsample: nn.Module = nn.Identity() if last else PatchMerging(config.embed_size << stage)

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            image = block(image)
        return self.downsample(image)


class PatchEmbedding(nn.Module):
    def __init__(self, planes: int, config: HTSATConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(planes, config.embed_size, config.patch_size, stride=config.patch_size)
        self.norm = nn.LayerNorm(config.embed_size)

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, planes, size, size)`` → ``(batch, side, side, width)``."""
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


# ------------------------------------------------------------------------------------------------------------- encoder


class HTSAT(SpectralEncoder):
    """Tokens of the last stage, normed, time-major: ``(columns, rows)`` of the `grid`; the mask is all true.

    A window shorter than the square leaves the last columns to silence; they are tokens like the others.
    """

    name = "htsat"
    signs = r"\.relative_position_bias_table$"
    config_class = HTSATConfig
    config: HTSATConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "pseldnets": PSELDNETS_FRONT_END,  # four channels, 10 s in 1001 of the 1024 frames
        "audioset": PANNS_FRONT_END,  # HTS-AT itself: mono, 32 kHz
        "tiny": {
            "sample_rate": 16000,
            "n_fft": 512,
            "win_length": None,
            "hop": 320,
            "fmax": 8000.0,
            "n_mels": 32,
            "window_seconds": 2.5,
            "image_size": 64,
            "embed_size": 32,
            "depths": (2, 2),
            "heads": (2, 4),
            "drop_path": 0.0,
        },
    }

    def __init__(self, config: HTSATConfig) -> None:
        super().__init__(config)
        self.config = config
        self.hidden_size = config.embed_size << (len(config.depths) - 1)
        self.grid: tuple[int, int] = (config.side * config.runs, config.side // config.runs)
        self.column_frames = config.image_size * config.runs // self.grid[0]
        self.patch_embed = PatchEmbedding(self.num_planes, config)
        rates = torch.linspace(0, config.drop_path, sum(config.depths), dtype=torch.float64, device="cpu").tolist()
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            first = sum(config.depths[:stage])
            self.layers.append(Stage(config, stage, rates[first : first + depth]))
        self.norm = nn.LayerNorm(self.hidden_size)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def layer_prefixes(self) -> list[str]:
        return [
            f"layers.{stage}.blocks.{index}."
            for stage, depth in enumerate(self.config.depths)
            for index in range(depth)
        ]

    def encode_planes(self, planes: Tensor) -> Tensor:
        maps = self.standardize(planes)
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        image = self.patch_embed(self.fold(maps).to(self.patch_embed.proj.weight.dtype))
        for stage in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image = checkpoint(stage, image, use_reentrant=False)
            else:
                image = stage(image)
        image = self.norm(image)  # rows are (run, frequency), columns the time within a run
        columns = image.unflatten(1, (self.config.runs, -1)).permute(0, 1, 3, 2, 4)
        return columns.flatten(1, 3)

    def fold(self, planes: Tensor) -> Tensor:
        """``(batch, planes, frames, mels)`` → ``(batch, planes, size, size)``: runs of frames above each other."""
        size, runs = self.config.image_size, self.config.runs
        padded = F.pad(planes, (0, 0, 0, size * runs - planes.shape[2]))
        return padded.unflatten(2, (runs, size)).transpose(3, 4).flatten(2, 3)

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """See the base class; with the head of events, where the file has one."""
        return pseld.load(cls, path, fields)
