"""Projectors: the tokens of one window in, embeddings of the language model out.

A Q-Former gives a fixed number for a window, the others one for a token, or for a group of neighbours. So many it gives
is so many placeholders in a prompt (:meth:`AudioLLMConfig.window_tokens`).

The Q-Former is that of BLIP-2 (Li et al., "BLIP-2", ICML 2023, §3.1) without its text branch, as in BAT (Zheng et al.,
"BAT: Learning to Reason about Spatial Sounds with Large Language Models", ICML 2024): learnt queries attend to each
other in every layer and to the audio tokens in every `cross_attention_frequency`-th layer, post-norm. Its layers are
Transformers'. Being plain linears and SDPA they also train under ZeRO-3, which gathers weights by module hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from audio_llm.config import build
from audio_llm.errors import ConfigError, describe
from audio_llm.ranges import building
from audio_llm.registry import find


@dataclass
class QFormerConfig:
    """Sizes of the Q-Former. The defaults are BAT's: 64 queries, 8 layers of BERT-base width."""

    num_query_tokens: int = 64
    hidden_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"projector: hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads."
            )

    def count(self, samples: int, tokens: Callable[[int], int]) -> int:
        """As many for every window."""
        return self.num_query_tokens


@dataclass
class LinearConfig:
    """`group` neighbouring tokens become one embedding. With a group of 1 and without `norm` it is one plain linear."""

    group: int = 1
    bias: bool = True
    norm: bool = True  # a layer norm behind it, by which a fresh projector is as loud as text

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ConfigError(describe("projector.group", "1 or more tokens", str(self.group)))

    def count(self, samples: int, tokens: Callable[[int], int]) -> int:
        """One for every group of the window's valid tokens, the last of which may be cut short."""
        return -(-tokens(samples) // self.group)


@dataclass
class MLPConfig(LinearConfig):
    """A hidden layer of `hidden_size` (the language model's own size without one) and GELU before the linear."""

    hidden_size: int | None = None


class Projector(nn.Module):
    """What every projector has: :meth:`forward`, fresh weights, and a last `linear` with a `norm` behind it or none.

    A window alone and the same window in a padded batch give the same embeddings: masked tokens change nothing.
    """

    config_class: ClassVar[Any]
    linear: nn.Linear
    norm: nn.Module  # LayerNorm or Identity

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (windows, n, encoder), mask (windows, n) bool, True = valid, the valid ones first -> embeddings
        (windows, m, output) and which of them are valid (windows, m): the first ``config.count`` of each row."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Variance-preserving weights. With the 0.02 that language models start from, what is heard would hardly
        reach the language model."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def set_loudness(self, rms: float) -> None:
        """Give a fresh projector's embeddings this root mean square; without a norm, for tokens of unit variance."""
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.weight.fill_(rms)
        else:
            self.linear.weight.mul_(rms)


class QFormerProjector(Projector):
    """Audio tokens of a window -> `num_query_tokens` embeddings of the language model."""

    config_class = QFormerConfig

    def __init__(self, config: QFormerConfig, encoder_size: int, output_size: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Parameter(torch.randn(1, config.num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=0.0,
                encoder_hidden_size=encoder_size,
                attn_implementation="sdpa",
            )
        )
        self.linear = nn.Linear(config.hidden_size, output_size)
        self.norm = nn.LayerNorm(output_size, eps=1e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the base class: what the queries hear would else be some hundredths of what they are."""
        nn.init.normal_(self.query)
        super().reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.query.expand(tokens.shape[0], -1, -1)
        heard = self.qformer(queries, encoder_hidden_states=tokens, encoder_attention_mask=mask).last_hidden_state
        return self.norm(self.linear(heard)), torch.ones(heard.shape[:2], dtype=torch.bool, device=heard.device)


class LinearProjector(Projector):
    """Every `group` of tokens, side by side, through one linear."""

    config_class = LinearConfig

    def __init__(self, config: LinearConfig, encoder_size: int, output_size: int) -> None:
        super().__init__()
        self.config = config
        width = self.before(config.group * encoder_size, output_size)
        self.linear = nn.Linear(width, output_size, bias=config.bias)
        self.norm = nn.LayerNorm(output_size, eps=1e-5) if config.norm else nn.Identity()
        self.reset_parameters()

    def before(self, width: int, output_size: int) -> int:
        """Build what comes before the last linear and gets groups of this `width`; returns that linear's own."""
        self.hidden: nn.Module = nn.Identity()
        return width

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rest = -tokens.shape[1] % self.config.group
        tokens = nn.functional.pad(tokens.masked_fill(~mask[..., None], 0.0), (0, 0, 0, rest))
        groups = tokens.unflatten(1, (-1, self.config.group)).flatten(2)  # (windows, m, group · encoder)
        valid = nn.functional.pad(mask, (0, rest)).unflatten(1, (-1, self.config.group)).any(dim=2)
        return self.norm(self.linear(self.hidden(groups))), valid


class MLPProjector(LinearProjector):
    """As :class:`LinearProjector`, with a hidden layer."""

    config_class = MLPConfig

    def before(self, width: int, output_size: int) -> int:
        config: MLPConfig = self.config  # type: ignore[assignment]
        size = config.hidden_size or output_size
        self.hidden = nn.Sequential(nn.Linear(width, size, bias=config.bias), nn.GELU())
        return size


PROJECTORS: dict[str, type[Projector]] = {"qformer": QFormerProjector, "linear": LinearProjector, "mlp": MLPProjector}


def projector_class(fields: Mapping[str, Any]) -> tuple[type[Projector], Any]:
    """Class and configuration of ``{"name"?: NAME, ...fields of its configuration}``.

    The name is one of PROJECTORS or ``package.module:Class``; without one it is a Q-Former. :class:`ConfigError` for an
    unknown name or key.
    """
    fields = dict(fields)
    kind: type[Projector] = find("projector.name", fields.pop("name", "qformer"), PROJECTORS, needs="config_class")
    return kind, build(kind.config_class, fields, where="projector")


def build_projector(fields: Mapping[str, Any], encoder_size: int, output_size: int) -> Projector:
    """The projector of `fields` from encoder tokens of `encoder_size` to embeddings of `output_size`."""
    with building("projector", fields):
        kind, config = projector_class(fields)
        return kind(config, encoder_size, output_size)
