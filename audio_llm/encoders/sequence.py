"""Sequence models after a convolutional trunk: ``(batch, time, hidden)`` both ways.

`conformer` (Gulati et al. 2020), `bimamba` (two Mamba-2 scans, one backward), `bimamba_ac` (scans along time and along
the width of the features, in both orders), `conbimamba` and `conbimamba_ac` (a Conformer whose attention is one of
those), and `gru`. As in stereo SELD with BiMamba (Mu et al. 2025), whose weights fit; see :class:`DecoderConfig` for
what they need.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.encoders.mamba import SSD, BiMamba2
from audio_llm.errors import ConfigError, describe

_AC_WIDTH = 64  # features of a time step as the asymmetric decoder sees them, and channels of its image
_AC_INNER = 32  # width of its scans, and of their heads


@dataclasses.dataclass
class DecoderConfig:
    """Which decoder, and its size. Published weights need ``ssd: clamped``, and the asymmetric ones the last two."""

    kind: Literal["none", "conformer", "bimamba", "bimamba_ac", "conbimamba", "conbimamba_ac", "gru"] = "none"
    layers: int = 2
    dropout: float = 0.05  # after attention or scan
    expansion: int = 2  # conformer kinds: feed-forward width over hidden size
    kernel: int = 7  # conformer kinds: steps the depthwise convolution sees; odd
    block_dropout: float = 0.05  # conformer kinds: in feed-forward and convolution
    heads: int = 8  # conformer: attention heads
    head_size: int = 64  # bimamba, conbimamba: width of a head of the scan
    ssd: SSD = "exact"  # "clamped": decays never below exp(-10), padding to 64 steps before the backward scan
    columns: Literal["transposed", "reinterpreted"] = "transposed"  # the other: channels and time mixed up
    time_rows: int | None = None  # 251: time is resampled to so many rows and back, which blurs windows beyond 5 s

    def check(self, hidden_size: int) -> None:
        """:class:`ConfigError` for a decoder that cannot be built at that width."""
        for name in ("layers", "expansion", "heads", "head_size"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(f"decoder.{name}", "at least 1", str(getattr(self, name))))
        if self.kind == "conformer" and (hidden_size % self.heads or hidden_size % 2):
            raise ConfigError(describe("decoder.heads", f"a divisor of the hidden size {hidden_size}", str(self.heads)))
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(describe("decoder.kernel", "an odd number of steps", str(self.kernel)))
        if self.kind in ("bimamba", "conbimamba") and 2 * hidden_size % self.head_size:
            expected = f"a divisor of twice the hidden size {hidden_size}"
            raise ConfigError(describe("decoder.head_size", expected, str(self.head_size)))
        if self.kind == "gru" and hidden_size % 2:
            raise ConfigError(describe("hidden size of a bidirectional gru", "an even number", str(hidden_size)))


def build_decoder(config: DecoderConfig, hidden_size: int) -> nn.Module:
    """The decoder of `config` at that width. Raises :class:`ConfigError`."""
    config.check(hidden_size)
    if config.kind == "none":
        return nn.Identity()
    if config.kind == "gru":
        return GRUDecoder(hidden_size, config)
    if config.kind == "bimamba":
        return BiMambaDecoder(hidden_size, config, config.layers)
    if config.kind == "bimamba_ac":
        return AsymmetricDecoder(hidden_size, config, config.layers)
    return ConformerDecoder(hidden_size, config)


class GRUDecoder(nn.Module):
    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__()
        dropout = config.dropout if config.layers > 1 else 0.0
        self.gru = nn.GRU(
            hidden_size, hidden_size // 2, config.layers, batch_first=True, bidirectional=True, dropout=dropout
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gru(tokens)[0]


# ------------------------------------------------------------------------------------------------------------ bimamba


class BiMambaLayer(BiMamba2):
    """Scans of both directions, dropout, residual, norm."""

    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__(hidden_size, head_size=config.head_size, bias=True, ssd=config.ssd)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer_norm(tokens + self.dropout(super().forward(tokens)))


class BiMambaDecoder(nn.Module):
    def __init__(self, hidden_size: int, config: DecoderConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BiMambaLayer(hidden_size, config) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)


# ---------------------------------------------------------------------------------------------------------- asymmetric


class ImageScan(BiMamba2):
    """Scans along one axis of an image: ``(sequences, steps, channels)`` → ``(sequences, steps, 64)``."""

    def __init__(self, channels: int, ssd: SSD) -> None:
        super().__init__(_AC_INNER, head_size=_AC_INNER, bias=False, ssd=ssd)
        self.fc_in = nn.Linear(channels, _AC_INNER, bias=False)
        self.fc_out = nn.Linear(_AC_INNER, _AC_WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc_out(super().forward(self.fc_in(tokens)))


def _pointwise(convolution: nn.Conv2d, image: Tensor) -> Tensor:
    """A 1x1 convolution of an image whose channels come last."""
    return F.linear(image, convolution.weight.flatten(1), convolution.bias)


class AsymmetricLayer(nn.Module):
    """An image ``(batch, time, width, channels)`` along width then time, and along time then width, side by side."""

    def __init__(self, channels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.columns = config.columns
        self.bi_mamba_w1 = ImageScan(channels, config.ssd)
        self.bi_mamba_h1 = ImageScan(_AC_WIDTH, config.ssd)
        self.bi_mamba_h2 = ImageScan(channels, config.ssd)
        self.bi_mamba_w2 = ImageScan(_AC_WIDTH, config.ssd)
        self.fc = nn.Conv2d(2 * _AC_WIDTH, _AC_WIDTH, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self._along_time(self.bi_mamba_h1, _along_width(self.bi_mamba_w1, image))
        second = _along_width(self.bi_mamba_w2, self._along_time(self.bi_mamba_h2, image))
        mixed = _pointwise(self.fc, torch.cat((first, second), dim=-1))
        return image + mixed if image.shape == mixed.shape else mixed

    def _along_time(self, scans: nn.Module, image: Tensor) -> Tensor:
        batch, time, width, channels = image.shape
        columns = image.transpose(1, 2)
        if self.columns == "transposed":
            sequences = columns.reshape(batch * width, time, channels)
        else:  # (time, channels) read as (channels, time) without moving a number, as the published weights learnt it
            sequences = columns.reshape(batch * width, channels, time).transpose(1, 2)
        return scans(sequences).unflatten(0, (batch, width)).transpose(1, 2)


def _along_width(scans: nn.Module, image: Tensor) -> Tensor:
    return scans(image.flatten(0, 1)).unflatten(0, image.shape[:2])


class AsymmetricDecoder(nn.Module):
    """Time steps squeezed to 64 features, stacked to an image, scanned along both axes, widened again, added."""

    def __init__(self, hidden_size: int, config: DecoderConfig, layers: int) -> None:
        super().__init__()
        self.hidden_size, self.time_rows = hidden_size, config.time_rows
        self.input_adapter = nn.Sequential(nn.Linear(hidden_size, _AC_WIDTH), nn.LayerNorm(_AC_WIDTH))
        self.dropout = nn.Dropout(config.dropout)
        channels = [1] + [_AC_WIDTH] * (layers - 1)
        self.mamba_layers = nn.ModuleList(AsymmetricLayer(count, config) for count in channels)
        self.output_adapter = nn.Sequential(nn.Conv2d(_AC_WIDTH, 1, 1))
        self.final_norm = nn.LayerNorm(hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.dropout(self.input_adapter(tokens))[..., None]
        for layer in self.mamba_layers:
            image = layer(image)
        projection: nn.Conv2d = self.output_adapter[0]  # type: ignore[assignment]
        narrow = _pointwise(projection, image).squeeze(-1)  # (batch, time, 64)
        return tokens + self.dropout(self.final_norm(self._widen(narrow)))

    def _widen(self, narrow: Tensor) -> Tensor:
        time = narrow.shape[1]
        if self.time_rows is None:
            return F.adaptive_avg_pool1d(narrow, self.hidden_size)
        pooled = F.adaptive_avg_pool2d(narrow, (self.time_rows, self.hidden_size))
        if pooled.shape[1] == time:
            return pooled
        return F.interpolate(pooled.transpose(1, 2), time, mode="linear").transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------- conformer


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.expand = nn.Linear(hidden_size, config.expansion * hidden_size)
        self.reduce = nn.Linear(config.expansion * hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.block_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.reduce(self.dropout(F.silu(self.expand(self.norm(tokens))))))


class ConvolutionModule(nn.Module):
    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.expand = nn.Conv1d(hidden_size, 2 * hidden_size, 1)
        self.depthwise = nn.Conv1d(
            hidden_size, hidden_size, config.kernel, padding=config.kernel // 2, groups=hidden_size, bias=False
        )
        self.batch_norm = nn.BatchNorm1d(hidden_size)
        self.project = nn.Conv1d(hidden_size, hidden_size, 1)
        self.dropout = nn.Dropout(config.block_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        gated = F.glu(self.expand(self.norm(tokens).transpose(1, 2)), dim=1)
        mixed = F.silu(self.batch_norm(self.depthwise(gated)))
        return self.dropout(self.project(mixed)).transpose(1, 2)


def sinusoids(time: int, hidden_size: int, device: torch.device) -> Tensor:
    """Absolute positions ``(time, hidden)``, sines and cosines interleaved (Vaswani et al. 2017, §3.5), float32."""
    omega = torch.exp(torch.arange(0, hidden_size, 2, device=device) * (-math.log(10000.0) / hidden_size))
    angle = torch.arange(time, device=device)[:, None] * omega
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class RelativeAttention(nn.Module):
    """Self-attention with a learnt score for positions (Transformer-XL, Dai et al. 2019), as the published one has it.

    The table is that of absolute positions and the shift wraps round, so that for steps to the right the position score
    comes from the next query's row; scores are divided by the root of the whole width, not of one head's.
    """

    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.heads, 1.0 / math.sqrt(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size) for _ in range(4)
        )
        self.pos_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.u_bias = nn.Parameter(torch.empty(config.heads, hidden_size // config.heads))
        self.v_bias = nn.Parameter(torch.empty(config.heads, hidden_size // config.heads))
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("proj.bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        time, hidden = tokens.shape[1:]
        tokens = self.norm(tokens)
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1))
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        table = sinusoids(time, hidden, tokens.device).to(tokens.dtype)
        position = self.pos_proj(table).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bthd,shd->bhts", query + self.v_bias, position)
        attended = F.scaled_dot_product_attention(
            (query + self.u_bias).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=_shift(scores) * self.scale,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=self.scale,
        )
        return self.dropout(self.out_proj(attended.transpose(1, 2).flatten(2)))


def _shift(scores: Tensor) -> Tensor:
    """Row t moved left by T − 1 − t: ``(batch, heads, T, T)`` both ways."""
    *lead, rows, columns = scores.shape
    padded = F.pad(scores, (1, 0)).reshape(*lead, columns + 1, rows)
    return padded[..., 1:, :].reshape(*lead, rows, columns)


class ConformerBlock(nn.Module):
    """Half a feed-forward, a mixer over time, a convolution, half a feed-forward, each added; then a norm."""

    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.feed_forward1 = FeedForward(hidden_size, config)
        self.mixer: nn.Module
        if config.kind == "conbimamba":
            self.mixer = BiMambaDecoder(hidden_size, config, 1)
        elif config.kind == "conbimamba_ac":
            self.mixer = AsymmetricDecoder(hidden_size, config, 1)
        else:
            self.mixer = RelativeAttention(hidden_size, config)
        self.convolution = ConvolutionModule(hidden_size, config)
        self.feed_forward2 = FeedForward(hidden_size, config)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + 0.5 * self.feed_forward1(tokens)
        tokens = tokens + self.mixer(tokens)
        tokens = tokens + self.convolution(tokens)
        return self.norm(tokens + 0.5 * self.feed_forward2(tokens))


class ConformerDecoder(nn.Module):
    def __init__(self, hidden_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConformerBlock(hidden_size, config) for _ in range(config.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens
