"""BEATs (Chen et al. 2023, "BEATs: Audio Pre-Training with Acoustic Tokenizers").

State-dict keys are the published ones, and the defaults of :class:`BEATsConfig` are the published base model. The table
of relative positions, which published files list once per layer, is one parameter of the first layer here.

Published files are ``{"cfg", "model"}``, with ``label_dict`` where they were fine-tuned, and what others made of that:
:meth:`BEATs.load_published` reads the configuration from the file, over the published code's defaults, and measures a
bare state dict instead. The weights may stand under any prefix (a BEATs inside of a larger model), with old or new
names of the weight norm, and with a tokenizer's quantizer beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audio_llm import config as recipes
from audio_llm.encoders import features
from audio_llm.encoders.heads import TokenMeanHead
from audio_llm.encoders.published import configured, length, read_published, rename, state_dict_of
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.encoder import AudioEncoder, Published
from audio_llm.model.folder import load_strictly

SAMPLE_RATE = 16000
N_MELS = 128
_FRAME, _HOP = 400, 160  # samples, of the filter bank

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": lambda value: F.gelu(value, approximate="tanh"),
    "gelu_fast": lambda value: F.gelu(value, approximate="tanh"),  # the older name of gelu_accurate
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda value: value,
    "glu": lambda value: value,  # the gate is in the linear map before
}


@dataclasses.dataclass
class BEATsConfig:
    """Size and training. The defaults are the published base model (iter3+), which has one window of 10 s here."""

    window_seconds: float = 10.0
    patch_size: int = 16  # frames and mels
    patch_width: int = 512  # of a patch before it is projected to the transformer's width
    patch_bias: bool = False
    hidden_size: int = 768
    depth: int = 12
    heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    pre_norm: bool = False
    deep_norm: bool = True  # residuals scaled by (2·depth)^(1/4) (Wang et al. 2022)
    position_kernel: int = 128  # tokens, of the convolution that encodes positions
    position_groups: int = 16
    relative_bias: bool = True
    gated_bias: bool = True
    num_buckets: int = 320
    max_distance: int = 800  # tokens
    fbank_mean: float = 15.41663
    fbank_std: float = 6.55582  # the published code divides by twice this
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1
    layer_drop: float = 0.05
    gradient_decay: float = 1.0  # of the gradient at every layer's input, from the top down
    # What of a short clip may be attended to. "exact": the patches that lie whole in the clip: a clip in a padded batch
    # gives what the published model gives for the clip alone. "published": what its mask arithmetic makes of padding to
    # the window, where the eight patches of one instant may differ.
    padding: Literal["exact", "published"] = "exact"

    @property
    def grid(self) -> tuple[int, int]:
        """Whole patches along time and along frequency of a window."""
        frames = features.fbank_frames(round(self.window_seconds * SAMPLE_RATE), _FRAME, _HOP)
        return frames // self.patch_size, N_MELS // self.patch_size

    def check(self) -> None:
        """:class:`ConfigError` for a configuration that cannot be built."""
        sizes = ("patch_width", "hidden_size", "depth", "heads", "mlp_size", "position_kernel", "position_groups")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "1 or more", str(getattr(self, name))))
        if self.patch_size < 1 or N_MELS % self.patch_size:
            raise ConfigError(describe("patch_size", f"a divisor of {N_MELS} mels", str(self.patch_size)))
        if self.grid[0] < 1:
            shortest = (_FRAME + (self.patch_size - 1) * _HOP) / SAMPLE_RATE
            raise ConfigError(describe("window_seconds", f"at least {shortest:g} s", f"{self.window_seconds:g}"))
        if self.hidden_size % self.heads or self.hidden_size % self.position_groups:
            expected = f"a multiple of heads ({self.heads}) and position_groups ({self.position_groups})"
            raise ConfigError(describe("hidden_size", expected, str(self.hidden_size)))
        if self.deep_norm and self.pre_norm:
            raise ConfigError(describe("deep_norm, pre_norm", "at most one of them", "both"))
        if self.gated_bias and not self.relative_bias:
            raise ConfigError(describe("gated_bias", "relative_bias with it", "relative_bias: false"))
        if self.relative_bias and (self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4):
            expected = "buckets in multiples of 4, and a max_distance above a quarter of them"
            raise ConfigError(
                describe("num_buckets, max_distance", expected, f"{self.num_buckets}, {self.max_distance}")
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(describe("activation", f"one of {', '.join(ACTIVATIONS)}", f"'{self.activation}'"))


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of every distance key − query from ``1 − length`` to ``length − 1``: ``(2·length − 1,)`` int64.

    Half of the buckets for keys after the query; in each half, half of them for single distances and the other half
    logarithmic up to `max_distance` (Raffel et al. 2020).
    """
    distance = torch.arange(1 - length, length)
    half = num_buckets // 2
    exact = half // 2
    apart = distance.abs()
    # In float32 as published: the edges of the logarithmic buckets depend on it.
    scaled = torch.log(apart.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + scaled.long()).clamp(max=half - 1)
    return torch.where(apart < exact, apart, far) + torch.where(distance > 0, half, 0)


class SelfAttention(nn.Module):
    """Attention whose logits get a bias by distance, scaled per head and query by a gate of the query (WavLM, §3.2)."""

    def __init__(self, config: BEATsConfig, has_table: bool) -> None:
        super().__init__()
        width, self.heads, self.dropout = config.hidden_size, config.heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        if has_table:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.heads)
        self.gated = config.gated_bias
        if config.gated_bias:
            self.grep_linear = nn.Linear(width // config.heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, config.heads, 1, 1))

    def forward(self, tokens: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
        """`tokens` (batch, n, hidden), `bias` (heads, n, n) by distance, `padding` (batch, n) true where padded."""
        query, key, value = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if bias is not None:
            bias = bias.to(query.dtype)[None]
            if self.gated:
                bias = self.gate(query).to(query.dtype) * bias
        if padding is not None:
            blocked = torch.zeros_like(padding, dtype=query.dtype).masked_fill(padding, -torch.inf)[:, None, None]
            bias = blocked if bias is None else bias + blocked
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def gate(self, query: Tensor) -> Tensor:
        """``(batch, heads, n, 1)`` of the unscaled `query` ``(batch, heads, n, head)``: 2 + u·(r·a − 1)."""
        update, reset = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1, keepdim=True).sigmoid().unbind(-2)
        return update * (reset * self.grep_a - 1.0) + 2.0


class GatedLinear(nn.Module):
    """Linear map of which one half is gated by the Swish of the other."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.linear(tokens).chunk(2, dim=-1)
        return value * F.silu(gate)


class Layer(nn.Module):
    """Transformer layer, the norms after the residual sums (published) or before the branches."""

    def __init__(self, config: BEATsConfig, has_table: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(config, has_table)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1 = (GatedLinear if config.activation == "glu" else nn.Linear)(width, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, width)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout, self.inner_dropout, self.pre_norm = config.dropout, config.activation_dropout, config.pre_norm
        self.scale = (2 * config.depth) ** 0.25 if config.deep_norm else 1.0

    def forward(self, tokens: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
        if self.pre_norm:
            tokens = tokens + self._drop(self.self_attn(self.self_attn_layer_norm(tokens), bias, padding))
            return tokens + self._drop(self._mlp(self.final_layer_norm(tokens)))
        attended = self._drop(self.self_attn(tokens, bias, padding))
        tokens = self.self_attn_layer_norm(tokens * self.scale + attended)
        return self.final_layer_norm(tokens * self.scale + self._drop(self._mlp(tokens)))

    def _mlp(self, tokens: Tensor) -> Tensor:
        inner = self.fc1(tokens)
        inner = self.activation(inner.float()).to(inner.dtype)
        return self.fc2(F.dropout(inner, self.inner_dropout, self.training))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training)


class PositionalConvolution(nn.Module):
    """Grouped convolution along the tokens; its weight is ``g·v/‖v‖``, the norm taken for every tap of the kernel."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        width, self.kernel, self.groups = config.hidden_size, config.position_kernel, config.position_groups
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_g = nn.Parameter(torch.ones(1, 1, self.kernel))
        self.weight_v = nn.Parameter(torch.empty(width, width // self.groups, self.kernel))

    def reset_parameters(self) -> None:
        """N(0, sqrt(4 / (kernel·width))), where the gain starts as the norm."""
        nn.init.normal_(self.weight_v, std=math.sqrt(4 / (self.kernel * self.weight_v.shape[0])))
        with torch.no_grad():
            self.weight_g.copy_(self._norm())

    def _norm(self) -> Tensor:
        return self.weight_v.float().square().sum(dim=(0, 1), keepdim=True).sqrt().to(self.weight_v.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, n, hidden)`` → the same."""
        weight = self.weight_v * (self.weight_g / self._norm())
        moved = F.conv1d(tokens.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(moved[..., : tokens.shape[1]]).transpose(1, 2)  # an even kernel gives one step more


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


class TransformerEncoder(nn.Module):
    """Positions, then the layers."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv = nn.Sequential(PositionalConvolution(config))
        self.layers = nn.ModuleList(
            Layer(config, has_table=config.relative_bias and number == 0) for number in range(config.depth)
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens: Tensor, padding: Tensor | None, checkpointing: bool) -> Tensor:
        """`tokens` ``(batch, n, hidden)``; `padding` ``(batch, n)`` true where a token is padding, None for nowhere."""
        config = self.config
        if padding is not None:
            tokens = tokens.masked_fill(padding[..., None], 0.0)
        tokens = tokens + self.pos_conv(tokens)
        if not config.pre_norm:
            tokens = self.layer_norm(tokens)
        tokens = F.dropout(tokens, config.dropout, self.training)
        bias = self.distance_bias(tokens.shape[1]) if config.relative_bias else None
        for layer in self.layers:
            if config.gradient_decay != 1.0:
                tokens = ScaleGradient.apply(tokens, config.gradient_decay)
            if checkpointing and torch.is_grad_enabled():
                further = checkpoint(layer, tokens, bias, padding, use_reentrant=False)
            else:
                further = layer(tokens, bias, padding)
            if self.training and config.layer_drop > 0:
                # Computed even where it is dropped: a distributed run waits for the gradient of every parameter.
                further = torch.where(torch.rand((), device=tokens.device) < config.layer_drop, tokens, further)
            tokens = further
        return self.layer_norm(tokens) if config.pre_norm else tokens

    def distance_bias(self, length: int) -> Tensor:
        """``(heads, length, length)``: the table's value for each distance key − query, the same for all layers."""
        table = self.get_parameter("layers.0.self_attn.relative_attention_bias.weight")
        buckets = relative_buckets(length, self.config.num_buckets, self.config.max_distance).to(table.device)
        by_distance = table[buckets].t().contiguous()  # (heads, 2·length − 1)
        return by_distance.unfold(1, length, 1).flip(1)  # row i reads the distances −i … length − 1 − i


class BEATs(AudioEncoder):
    """Tokens of the last layer, time-major: eight patches along frequency for every 160 ms.

    A clip shorter than the window has fewer tokens; the rest are zero and masked. What does not fill a patch at the end
    of a clip (less than 160 ms) is not heard, as in the published model; a clip shorter than one patch is filled up.
    """

    name = "beats"
    config_class = BEATsConfig
    signs = r"(^|\.)patch_embedding\.weight$|\.grep_(a|linear\.weight)$"
    licence = "MIT (github.com/microsoft/unilm)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "tiny": {
            "window_seconds": 2.56,
            "patch_width": 64,
            "hidden_size": 96,
            "depth": 3,
            "heads": 4,
            "mlp_size": 192,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "input_dropout": 0.0,
            "layer_drop": 0.0,
        },
    }

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.sample_rate, self.window_seconds = SAMPLE_RATE, config.window_seconds
        self.layouts, self.num_channels = ("mono",), 1
        self.hidden_size = config.hidden_size
        self.grid: tuple[int, int] = config.grid
        side = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.patch_width, side, stride=side, bias=config.patch_bias)
        self.layer_norm = nn.LayerNorm(config.patch_width)
        if config.patch_width != config.hidden_size:
            self.post_extract_proj = nn.Linear(config.patch_width, config.hidden_size)
        self.encoder = TransformerEncoder(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps N(0, 0.02), and DeepNorm's Xavier inside of the layers (only from scratch does it matter)."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.encoder.pos_conv[0].reset_parameters()  # type: ignore[operator]
        if not config.deep_norm:
            return
        gain = (8 * config.depth) ** -0.25
        for layer in self.encoder.layers:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear) and not name.endswith("grep_linear"):
                    nn.init.xavier_normal_(module.weight, 1.0 if name.endswith(("q_proj", "k_proj")) else gain)

    @property
    def layer_prefixes(self) -> list[str]:
        return [f"encoder.layers.{number}." for number in range(self.config.depth)]

    def count_tokens(self, samples: int) -> int:
        return int((~self._padding(torch.tensor([samples]))).sum())

    def patches(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, self.grid)

    def fbank(self, waveform: Tensor) -> Tensor:
        """Standardised filter bank of a waveform ``(batch, time)``: ``(batch, frames, 128)`` float32."""
        return (features.kaldi_fbank(waveform, N_MELS) - self.config.fbank_mean) / (2 * self.config.fbank_std)

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        padding = self._padding(lengths).to(waveform.device)
        count = padding.shape[1] // self.grid[1]  # instants to compute: no more than the longest clip has
        samples = _FRAME + _HOP * (count * self.config.patch_size - 1)
        maps = self.fbank(waveform[:, 0, :samples])[:, None].to(self.patch_embedding.weight.dtype)
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        tokens = self.patch_embedding(maps).permute(0, 2, 3, 1).flatten(1, 2)  # (batch, time·freq, width)
        tokens = self.layer_norm(tokens)
        if self.config.patch_width != self.config.hidden_size:
            tokens = self.post_extract_proj(tokens)
        tokens = F.dropout(tokens, self.config.input_dropout, self.training)
        tokens = self.encoder(tokens, padding if padding.any() else None, self.gradient_checkpointing)
        rest = self.num_tokens - tokens.shape[1]
        mask = F.pad(~padding, (0, rest))
        if self.config.padding == "exact":
            tokens = F.pad(tokens.masked_fill(padding[..., None], 0.0), (0, 0, 0, rest))
        return tokens, mask

    def _padding(self, lengths: Tensor) -> Tensor:
        """``(batch, tokens)``, true where a token hears nothing of its clip; as many tokens as are to be computed."""
        time, freq = self.grid
        if self.config.padding == "published":
            padded = torch.arange(self.window_samples) >= lengths.cpu()[:, None]
            frames = _shrink(padded, features.fbank_frames(self.window_samples, _FRAME, _HOP))
            return _shrink(frames, time * freq)
        side = self.config.patch_size
        counts = torch.tensor([max(1, features.fbank_frames(n, _FRAME, _HOP) // side) for n in lengths.tolist()])
        return (torch.arange(int(counts.max())) >= counts[:, None]).repeat_interleave(freq, dim=1)

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """See the base class; with the classifier, over AudioSet's classes, where the file was fine-tuned."""
        tree = read_published(path)
        state = rename(state_dict_of(tree, kind=cls.name, anchor=ANCHOR, name=path), RENAMES, name=path)
        state = _one_table(state, str(path))
        predictor = {key: state.pop(key) for key in list(state) if key.startswith("predictor.")}
        config = _config(tree, state, str(path), fields)
        encoder = cls(config)
        load_strictly(encoder, state, str(path))
        if not predictor:
            return Published(encoder.eval())
        weight = predictor.get("predictor.weight")
        head = TokenMeanHead(config.hidden_size, 1 if weight is None else length(weight))
        load_strictly(head, predictor, str(path))
        labels = _labels(tree.get("label_dict"), head.predictor.out_features)
        facts = {"task": "tagging", "labels": labels, "head": {"name": "token_mean"}}
        return Published(encoder.eval(), {"head": head.eval()}, facts)


def _shrink(padded: Tensor, count: int) -> Tensor:
    """The published reduction of a mask to `count` entries: equal runs, the rest left out; padded where all are."""
    run = padded.shape[1] // count
    return padded[:, : run * count].unflatten(1, (count, run)).all(dim=2)


# ------------------------------------------------------------------------------------------------------ published files

# Our field -> (its name in published configurations, its default in the published code).
FIELDS: dict[str, tuple[str, Any]] = {
    "patch_size": ("input_patch_size", -1),
    "patch_width": ("embed_dim", 512),
    "patch_bias": ("conv_bias", False),
    "hidden_size": ("encoder_embed_dim", 768),
    "depth": ("encoder_layers", 12),
    "heads": ("encoder_attention_heads", 12),
    "mlp_size": ("encoder_ffn_embed_dim", 3072),
    "activation": ("activation_fn", "gelu"),
    "pre_norm": ("layer_norm_first", False),
    "deep_norm": ("deep_norm", False),
    "position_kernel": ("conv_pos", 128),
    "position_groups": ("conv_pos_groups", 16),
    "relative_bias": ("relative_position_embedding", False),
    "gated_bias": ("gru_rel_pos", False),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "input_dropout": ("dropout_input", 0.0),
    "layer_drop": ("encoder_layerdrop", 0.0),
    "gradient_decay": ("layer_wise_gradient_decay_ratio", 1.0),
}
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"^quantize(_layer)?\.", None),  # of a tokenizer: it makes labels for pretraining, no tokens
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
ANCHOR = "patch_embedding.weight"
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_TABLE = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight")


def _config(tree: Mapping[str, Any], state: Mapping[str, Tensor], name: str, fields: dict[str, Any]) -> BEATsConfig:
    """The file's own configuration where it has one, else one measured from its tensors."""
    found: Any = next((tree[key] for key in ("cfg", "args") if tree.get(key) is not None), {})
    found = vars(found) if isinstance(found, argparse.Namespace) else found
    known = {published for published, _ in FIELDS.values()}
    if isinstance(found, Mapping) and known & set(found):
        plain = {ours: found.get(published, default) for ours, (published, default) in FIELDS.items()}
    else:
        plain = _measured(state)
    with configured(name):
        config = recipes.build(BEATsConfig, {**plain, **fields}, where="BEATs configuration")
        config.check()
    return config


def _measured(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes read off the shapes; the rest (buckets' reach, norms, dropout) is the published base model's."""
    if state[ANCHOR].ndim != 4:
        return {}
    layers = [int(match[1]) for key in state if (match := _LAYER.match(key))]
    width, side = state[ANCHOR].shape[0], state[ANCHOR].shape[-1]
    fields: dict[str, Any] = {
        "patch_size": side,
        "patch_width": width,
        "patch_bias": "patch_embedding.bias" in state,
        "hidden_size": width,
        "depth": 1 + max(layers, default=-1),
        "relative_bias": False,
        "gated_bias": "encoder.layers.0.self_attn.grep_a" in state,
    }
    sizes = (  # field, key, axis of the tensor that tells it
        ("hidden_size", "encoder.layer_norm.weight", 0),
        ("mlp_size", "encoder.layers.0.fc1.weight", 0),
        ("position_kernel", "encoder.pos_conv.0.weight_v", 2),
        ("num_buckets", "encoder.layers.0.self_attn.relative_attention_bias.weight", 0),
        ("heads", "encoder.layers.0.self_attn.relative_attention_bias.weight", 1),
    )
    for field, key, axis in sizes:
        if key in state and state[key].ndim > axis:
            fields[field] = state[key].shape[axis]
            fields["relative_bias"] |= field == "num_buckets"
    if "encoder.layers.0.fc1.linear.weight" in state:
        fields |= {"activation": "glu", "mlp_size": state["encoder.layers.0.fc1.linear.weight"].shape[0] // 2}
    kernel = state.get("encoder.pos_conv.0.weight_v")
    if kernel is not None and kernel.ndim == 3 and 0 < kernel.shape[1] <= fields["hidden_size"]:
        fields["position_groups"] = fields["hidden_size"] // kernel.shape[1]
    return fields


def _one_table(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The first layer's table of relative positions for all: either it stands alone, or every layer has a copy."""
    tables = {key: int(match[1]) for key in state if (match := _TABLE.fullmatch(key))}
    layers = {int(match[1]) for key in state if (match := _LAYER.match(key))}
    if len(tables) > 1 and (lacking := sorted(layers - set(tables.values()))):
        expected = "a table of relative positions in the first layer or in every one"
        raise CheckpointError(describe(f"checkpoint {name}", expected, f"none in layer {lacking[0]}"))
    first = next((state[key] for key, layer in tables.items() if layer == 0), None)
    for key, layer in tables.items():
        if layer and first is not None and not torch.equal(state[key], first):
            raise CheckpointError(
                describe(f"checkpoint {name}: {key}", "a copy of the first layer's table", "another table")
            )
    return {key: value for key, value in state.items() if not tables.get(key)}


def _labels(table: Any, count: int) -> list[str]:
    """Names by class: AudioSet's identifiers from the file's ``label_dict``, else numbers."""
    table = table if isinstance(table, Mapping) else {}
    return [str(table.get(number, table.get(str(number), f"class {number}"))) for number in range(count)]
