"""The projector: a Q-Former that turns the tokens of one window into a fixed number of language-model embeddings.

The layers and their names are BLIP-2's (Li et al., "BLIP-2", ICML 2023, §3.1) without its text branch, as in BAT
(Zheng et al., "BAT: Learning to Reason about Spatial Sounds with Large Language Models", ICML 2024): learnt queries
attend to each other in every layer and to the audio tokens in every `cross_attention_frequency`-th layer, post-norm.
Attention is written from plain linears and SDPA: ZeRO-3 gathers weights by module hooks, which
``nn.MultiheadAttention`` bypasses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.errors import ConfigError


@dataclass
class QFormerConfig:
    """Sizes of the projector. The defaults are BAT's: 64 queries, 8 layers of BERT-base width."""

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


class Attention(nn.Module):
    """Multi-head attention; keys and values come from `encoder_size` wide tokens when given."""

    def __init__(self, hidden_size: int, heads: int, encoder_size: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(encoder_size or hidden_size, hidden_size)
        self.value = nn.Linear(encoder_size or hidden_size, hidden_size)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """hidden (batch, queries, hidden), context (batch, n, encoder), mask (batch, n) bool or None -> like hidden."""
        batch, queries, width = hidden.shape

        def split(x: Tensor) -> Tensor:  # (batch, heads, n, head size)
            return x.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            split(self.query(hidden)),
            split(self.key(context)),
            split(self.value(context)),
            attn_mask=None if mask is None else mask[:, None, None, :],
        )
        return out.transpose(1, 2).reshape(batch, queries, width)


class ResidualOutput(nn.Module):
    """Linear, dropout, residual, layer norm (BERT's output block)."""

    def __init__(self, size_in: int, size_out: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(size_in, size_out)
        self.LayerNorm = nn.LayerNorm(size_out, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class AttentionBlock(nn.Module):
    """Attention with its output block; key names ``attention.*`` and ``output.*``."""

    def __init__(self, config: QFormerConfig, encoder_size: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config.hidden_size, config.num_attention_heads, encoder_size)
        self.output = ResidualOutput(config.hidden_size, config.hidden_size, config.dropout)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.attention(hidden, context, mask), hidden)


class Intermediate(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden))


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, encoder_size: int, cross_attention: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(config)
        self.crossattention = AttentionBlock(config, encoder_size) if cross_attention else None
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualOutput(config.intermediate_size, config.hidden_size, config.dropout)

    def forward(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.attention(hidden, hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, tokens, mask)
        return self.output_query(self.intermediate_query(hidden), hidden)


class QFormerEncoder(nn.Module):
    def __init__(self, config: QFormerConfig, encoder_size: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            QFormerLayer(config, encoder_size, cross_attention=index % config.cross_attention_frequency == 0)
            for index in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    def __init__(self, config: QFormerConfig, encoder_size: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = QFormerEncoder(config, encoder_size)

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.dropout(self.layernorm(query))
        for layer in self.encoder.layer:
            hidden = layer(hidden, tokens, mask)
        return hidden


class QFormerProjector(nn.Module):
    """Audio tokens of a window -> `num_query_tokens` embeddings of the language model."""

    def __init__(self, config: QFormerConfig, encoder_size: int, output_size: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Parameter(torch.randn(1, config.num_query_tokens, config.hidden_size))
        self.qformer = QFormer(config, encoder_size)
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
        hidden = self.qformer(self.query.expand(tokens.shape[0], -1, -1), tokens, mask)
        return self.norm(self.linear(hidden))
