"""Projectors: the tokens of one window in, a fixed number of language-model embeddings out.

The Q-Former is that of BLIP-2 (Li et al., "BLIP-2", ICML 2023, §3.1) without its text branch, as in BAT (Zheng et al.,
"BAT: Learning to Reason about Spatial Sounds with Large Language Models", ICML 2024): learnt queries attend to each
other in every layer and to the audio tokens in every `cross_attention_frequency`-th layer, post-norm. Its layers are
Transformers'. Being plain linears and SDPA they also train under ZeRO-3, which gathers weights by module hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from audio_llm.config import build
from audio_llm.errors import ConfigError, describe, nearest


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


class QFormerProjector(nn.Module):
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
        """Variance-preserving weights. With the 0.02 that language models start from, what the queries hear would be
        some hundredths of what they are, and would hardly reach the language model."""
        nn.init.normal_(self.query)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (windows, n, encoder), mask (windows, n) bool, True = valid -> (windows, queries, output)."""
        queries = self.query.expand(tokens.shape[0], -1, -1)
        heard = self.qformer(queries, encoder_hidden_states=tokens, encoder_attention_mask=mask).last_hidden_state
        return self.norm(self.linear(heard))


PROJECTORS = {"qformer": QFormerProjector}


def projector_class(fields: Mapping[str, Any]) -> tuple[type[QFormerProjector], QFormerConfig]:
    """Class and configuration of ``{"name"?: one of PROJECTORS, ...fields of its configuration}``.

    Without a name it is a Q-Former. :class:`ConfigError` for an unknown name or key.
    """
    fields = dict(fields)
    name = str(fields.pop("name", "qformer"))
    if name not in PROJECTORS:
        found = f"'{name}'{nearest(name, PROJECTORS)}"
        raise ConfigError(describe("projector.name", f"one of {', '.join(PROJECTORS)}", found))
    return PROJECTORS[name], build(PROJECTORS[name].config_class, fields, where="projector")


def build_projector(fields: Mapping[str, Any], encoder_size: int, output_size: int) -> QFormerProjector:
    """The projector of `fields` from encoder tokens of `encoder_size` to embeddings of `output_size`."""
    kind, config = projector_class(fields)
    return kind(config, encoder_size, output_size)
