"""Spatial-AST (Zheng et al. 2024, "BAT: Learning to Reason about Spatial Sounds with Large Language Models").

State-dict keys are the published ones (`pos_embed`, `cls_tokens`, `patch_embed.proj`, `blocks.{i}`, `conv_downsample`,
`bn`); the defaults of :class:`SpatialASTConfig` are the published model. The published file (``finetuned.pth``) is
``{"model", "optimizer", "epoch", "scaler", "args"}``; the STFT kernels and the mel matrix that it carries are constants
of the configuration here, compared and then left out.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audio_llm import config as recipes
from audio_llm.encoders import features
from audio_llm.encoders.heads import SpatialHeads
from audio_llm.encoders.published import (
    KERNELS,
    MEL_MATRIX,
    check_front_end,
    length,
    read_published,
    state_dict_of,
)
from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import AudioEncoder, Published
from audio_llm.model.folder import load_strictly

CLS_DISTANCE, CLS_DIRECTION, CLS_SOUND = 0, 1, 2  # order of the published cls tokens
NUM_CLS = 3
LAYER_NORM_EPS = 1e-6
STEM_STRIDE = 4  # of the convolutional patch embedding, along both axes

# The reference's inference encoder carries the sound head but none of the spatial ones.
_SPATIAL_HEADS = ("dis_norm.", "distance_head.", "doa_norm.", "azimuth_head.", "elevation_head.")

# layout -> (channels, level planes, all planes, accepted layouts). A two-channel file does not say how it was recorded
# and is read as stereo, so both two-channel layouts are accepted by either.
_LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "mono": (1, 1, 1, ("mono",)),
    "stereo": (2, 2, 4, ("stereo", "binaural")),
    "binaural": (2, 2, 4, ("binaural", "stereo")),
    "foa": (4, 4, 7, ("foa",)),
}


@dataclasses.dataclass
class SpatialASTConfig:
    """Size and front end. The defaults are the published ViT-Base on 10 s of binaural sound at 32 kHz."""

    sample_rate: int = 32000
    n_fft: int = 1024
    hop: int = 320
    n_mels: int = 128
    fmin: float = 50.0
    fmax: float = 14000.0
    window_seconds: float = 10.0
    target_frames: int = 1024  # fewer STFT frames are stretched to this many (1001 in the published model)
    patch_size: tuple[int, ...] = (16, 16)  # (frames, mels)
    hidden_size: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    drop_path: float = 0.1  # stochastic depth of the last block, linear from 0; training only
    layout: Literal["mono", "stereo", "binaural", "foa"] = "binaural"
    stem_channels: int = 1  # maps that a 3x3 convolution mixes the planes to; 1 is published, more learn faster
    normalize: Literal["level", "all"] = "level"  # what `bn` standardises: log-mel only (published), or every plane
    phase: Literal["plain", "weighted"] = "plain"  # interaural: every bin alike (published), or by energy
    patch_embed: Literal["linear", "convolutional"] = "linear"  # published; or two strided convolutions before it
    short_clip: Literal["pad", "stretch"] = "pad"  # "stretch" is what the published code does to short clips

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency."""
        return self.target_frames // self.patch_size[0], self.n_mels // self.patch_size[1]

    def check(self) -> None:
        """:class:`ConfigError` for a configuration that cannot be built."""
        if len(self.patch_size) != 2 or min(self.patch_size) < 1:
            raise ConfigError(describe("patch_size", "[frames, mels]", repr(list(self.patch_size))))
        if self.hidden_size % self.heads or self.hidden_size % 4:
            expected = f"a multiple of heads ({self.heads}) and of 4"
            raise ConfigError(describe("hidden_size", expected, str(self.hidden_size)))
        if self.target_frames % self.patch_size[0] or self.n_mels % self.patch_size[1]:
            expected = f"sides that divide {self.target_frames} frames and {self.n_mels} mels"
            raise ConfigError(describe("patch_size", expected, repr(list(self.patch_size))))
        if self.patch_embed == "convolutional" and any(side % STEM_STRIDE for side in self.patch_size):
            expected = f"sides that are multiples of {STEM_STRIDE} (patch_embed: convolutional)"
            raise ConfigError(describe("patch_size", expected, repr(list(self.patch_size))))
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            expected = f"0 <= fmin < fmax <= {self.sample_rate / 2:g} Hz"
            raise ConfigError(describe("fmin, fmax", expected, f"{self.fmin:g}, {self.fmax:g}"))
        frames = 1 + round(self.window_seconds * self.sample_rate) // self.hop
        if frames >= self.target_frames + self.patch_size[0]:  # the patch convolution drops less than one patch
            raise ConfigError(
                describe(
                    "target_frames",
                    f"at least the window's {frames} STFT frames less one patch",
                    str(self.target_frames),
                    "Raise target_frames or hop, or shorten window_seconds.",
                )
            )


def sincos_positions(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions ``(1, 1 + time·freq, hidden)``: row 0 zeros, then time-major patches.

    The first half of the width encodes the frequency index, the second the time index, each as ``[sin(p·ω), cos(p·ω)]``
    with ``ω_k = 10000^(−k/(hidden/4))`` (MAE, He et al. 2022, as AudioMAE lays it out).
    """
    time, freq = grid
    omega = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

    def encode(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64)[:, None] * omega
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    by_freq = encode(freq)[None].expand(time, -1, -1)
    by_time = encode(time)[:, None].expand(-1, freq, -1)
    table = torch.cat((by_freq, by_time), dim=2).reshape(time * freq, hidden_size)
    return torch.cat((torch.zeros(1, hidden_size, dtype=torch.float64), table)).float()[None]


class Attention(nn.Module):
    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, hidden = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, count, hidden))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth per sample."""

    def __init__(self, config: SpatialASTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.hidden_size, config.heads)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
        self.drop_path = drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._drop(self.attn(self.norm1(tokens)))
        return tokens + self._drop(self.mlp(self.norm2(tokens)))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1.0 - self.drop_path
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)


class PatchEmbedding(nn.Module):
    """One linear map per patch; or, with ``convolutional``, of what two strided convolutions make of the patch.

    Early convolutions let a small transformer learn in minutes what it would need hours for (Xiao et al. 2021).
    """

    def __init__(self, config: SpatialASTConfig) -> None:
        super().__init__()
        channels, (frames, mels) = config.stem_channels, config.patch_size
        self.stem = nn.Sequential()
        if config.patch_embed == "convolutional":
            frames, mels = frames // STEM_STRIDE, mels // STEM_STRIDE
            for width in (config.hidden_size // 4, config.hidden_size // 2):
                self.stem.append(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False))
                self.stem.extend((nn.BatchNorm2d(width), nn.GELU()))
                channels = width
        self.proj = nn.Conv2d(channels, config.hidden_size, (frames, mels), stride=(frames, mels))

    def forward(self, maps: Tensor) -> Tensor:
        return self.proj(self.stem(maps)).flatten(2).transpose(1, 2)  # (batch, time·freq, hidden), time-major


class SpatialAST(AudioEncoder):
    """Tokens of the last block, un-normalised: three cls (distance, direction, sound), then time-major patches.

    The mask is all true: every clip fills the window, by silence where it is shorter.
    """

    name = "spatial_ast"
    config_class = SpatialASTConfig
    signs = r"^cls_tokens$|^(azimuth|elevation)_head\.weight$"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "tiny": {
            "sample_rate": 16000,
            "n_fft": 512,
            "n_mels": 64,
            "fmax": 8000.0,
            "window_seconds": 2.56,
            "target_frames": 128,
            "patch_size": [8, 64],  # a token is 0.16 s of the whole spectrum
            "hidden_size": 128,
            "depth": 3,
            "heads": 4,
            "mlp_ratio": 3.0,
            "drop_path": 0.0,
            "stem_channels": 8,
            "normalize": "all",
            "phase": "weighted",
            "patch_embed": "convolutional",
        },
    }

    def __init__(self, config: SpatialASTConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.sample_rate, self.window_seconds = config.sample_rate, config.window_seconds
        self.hidden_size = config.hidden_size
        self.num_channels, self._levels, planes, self.layouts = _LAYOUTS[config.layout]
        self.grid: tuple[int, int] = config.grid
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(config.hidden_size, config.grid))
        self.cls_tokens = nn.Parameter(torch.empty(1, NUM_CLS, config.hidden_size))
        self.bn = nn.BatchNorm2d(planes if config.normalize == "all" else self._levels, affine=False)
        self.conv_downsample = nn.Sequential(  # published name; it mixes planes and does not downsample
            nn.Conv2d(planes, config.stem_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(config.stem_channels),
            nn.GELU(),
        )
        self.patch_embed = PatchEmbedding(config)
        rates = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every linear map, the patch projection included (as MAE starts), so that width sets the scale."""
        nn.init.normal_(self.cls_tokens, std=0.02)
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def num_tokens(self) -> int:
        return NUM_CLS + self.grid[0] * self.grid[1]

    def patches(self, tokens: Tensor) -> Tensor:
        return tokens[:, NUM_CLS:].unflatten(1, self.grid)

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(waveform.device.type, enabled=False):
            planes = self.planes(waveform, lengths)
        maps = self.conv_downsample(planes.to(self.cls_tokens.dtype))[:, :, : self.config.target_frames]
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        patches = self.patch_embed(maps)
        patches = patches + self.pos_embed[:, 1:].to(patches.dtype)
        cls = self.cls_tokens.to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = torch.cat((cls, patches), dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def planes(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """Standardised feature planes ``(batch, planes, target_frames or a little more, mels)``, float32."""
        if self.config.short_clip == "pad":
            return self._stretch(self._standardise(self.raw_planes(waveform)))
        shortest = self.config.n_fft // 2 + 1  # reflect padding needs that many samples
        clips = (waveform[row : row + 1, :, : max(shortest, length)] for row, length in enumerate(lengths.tolist()))
        return torch.cat([self._stretch(self._standardise(self.raw_planes(clip))) for clip in clips])

    def raw_planes(self, waveform: Tensor) -> Tensor:
        """Log-mel levels (dB) of every channel, then interaural phase (two channels) or intensity (FOA) planes."""
        config = self.config
        bank = features.mel_bank(
            config.sample_rate, config.n_fft, config.n_mels, config.fmin, config.fmax, waveform.device
        )
        return features.of_stft(lambda spectrum: self._planes_of(spectrum, bank), waveform, config.n_fft, config.hop)

    def _planes_of(self, spectrum: Tensor, bank: Tensor) -> Tensor:
        magnitude = features.magnitude(spectrum)
        levels = features.decibels(features.in_mels(magnitude, bank))
        if self.config.layout == "mono":
            return levels
        if self.config.layout == "foa":
            return torch.cat((levels, features.intensity(spectrum, bank)), dim=1)
        phase = features.interaural_phase if self.config.phase == "plain" else features.weighted_phase
        return torch.cat((levels, phase(spectrum, magnitude, bank)), dim=1)

    def _standardise(self, planes: Tensor) -> Tensor:
        count = self.bn.num_features
        if self.training:
            head = self.bn(planes[:, :count])
        else:  # written out so that a model cast to bfloat16 still standardises in float32
            mean, variance = self.bn.get_buffer("running_mean").float(), self.bn.get_buffer("running_var").float()
            head = (planes[:, :count] - mean.view(-1, 1, 1)) * torch.rsqrt(variance + self.bn.eps).view(-1, 1, 1)
        return torch.cat((head, planes[:, count:]), dim=1)

    def _stretch(self, planes: Tensor) -> Tensor:
        if planes.shape[2] >= self.config.target_frames:
            return planes
        size = (self.config.target_frames, self.config.n_mels)
        return F.interpolate(planes, size, mode="bicubic", align_corners=True)

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """See the base class; with the heads, where the file has the spatial ones.

        :class:`CheckpointError` too when the file's own STFT or mel matrix is not that of the configuration.
        """
        state = state_dict_of(read_published(path), kind=cls.name, name=path)
        config = recipes.build(SpatialASTConfig, fields, where=f"encoder {cls.name}")
        check_front_end(state, config, path)
        heads = {key: state.pop(key) for key in list(state) if key.startswith(("head.", "fc_norm.", *_SPATIAL_HEADS))}
        encoder = cls(config)
        weights = {key: value for key, value in state.items() if key not in (*KERNELS, MEL_MATRIX)}
        load_strictly(encoder, weights, str(path))
        if not any(key.startswith(_SPATIAL_HEADS) for key in heads):
            return Published(encoder.eval())
        count = length(heads["head.weight"]) if "head.weight" in heads else 1
        spatial = SpatialHeads(config.hidden_size, count)
        load_strictly(spatial, heads, str(path))
        facts = {"labels": [f"class {number}" for number in range(count)]}  # the file does not name them
        return Published(encoder.eval(), {"spatial": spatial.eval()}, facts)
