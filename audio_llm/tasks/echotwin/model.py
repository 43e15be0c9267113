"""EchoTwin-QA: an audio tower and a text tower answer multiple-choice questions; the baseline of DCASE 2025 task 5.

Two heads. ``letters`` is the published one: the mean audio vector beside the first token of "question A. … B. …", one
logit per letter; its keys (``audio_enc``, ``text_enc``, ``fusion``) are the published ones. ``options``, the default,
reads the question with one option at a time, lets its tokens attend to the audio tokens, and gives that option a score.
It sees no letter, no position and no other option, so permuting the options permutes the scores and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import AudioEncoder
from audio_llm.tasks.echotwin.recipe import LETTERS, EchoTwinConfig

FUSION_SIZE = 512  # published width of the letter head
_FLOOR = 1e-6  # what the published code puts in place of silence
_SHORTEST, _LONGEST = 0.1, 600.0  # seconds; the time embedding tells apart what lies between
MAX_WINDOWS = 10**4  # a recording is heard whole; the decoder bounds its length


# ------------------------------------------------------------------------------------------------------------- inputs


def lettered(choices: Sequence[str]) -> list[str]:
    """``["rain", "wind"]`` → ``["A. rain", "B. wind"]``, the form of DCASE's files and submissions."""
    return [f"{LETTERS[index]}. {choice}" for index, choice in enumerate(choices)]


def read_text(tokenizer: Any, question: str, choices: Sequence[str], config: EchoTwinConfig) -> list[dict[str, Any]]:
    """What the text tower reads: one row per option, or a single one with all of them for the letter head.

    Raises :class:`ConfigError` when the options alone are longer than ``max_text``.
    """
    words = {"split_special_tokens": True}  # "[SEP]" that somebody typed is no end of the question
    if config.conventions == "original":
        text = f"{question} {' '.join(lettered(choices))}"
        return [dict(tokenizer(text, truncation=True, max_length=config.max_text, **words))]
    texts = [" ".join(lettered(choices))] if config.head == "letters" else list(choices)
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    rows = []
    for text in texts:
        length = len(tokenizer(text, add_special_tokens=False, **words)["input_ids"]) + specials
        if length >= config.max_text:
            cure = "Raise max_text; options are never cut."
            raise ConfigError(describe(f"options '{text[:40]}…'", f"under {config.max_text} tokens", str(length), cure))
        rows.append(dict(tokenizer(question, text, truncation="only_first", max_length=config.max_text, **words)))
    return rows


def audio_windows(waveform: Waveform, encoder: AudioEncoder, config: EchoTwinConfig) -> list[np.ndarray]:
    """The windows that `encoder` hears of a recording, each (channels, time) float32 at its rate.

    Several channels become one where the encoder takes mono: their mean, as published.
    """
    waveform = audio.hear(waveform, encoder.layouts, "mean" if "mono" in encoder.layouts else "refuse")
    if config.conventions == "original":
        return [_published_window(waveform, encoder)]
    waveform = audio.resample(waveform, encoder.sample_rate)
    return audio.windows(waveform.samples, encoder.window_samples, MAX_WINDOWS)


def _published_window(waveform: Waveform, encoder: AudioEncoder) -> np.ndarray:
    """Peak-normalised with every |x| ≥ 1e-6 (zeros stay), the first window, filled up with 1e-6."""
    samples = waveform.samples
    peak = float(np.abs(samples).max(initial=0.0))
    if peak < 1e-9:
        samples = np.full_like(samples, _FLOOR)
    else:
        samples = samples / np.float32(peak)
        samples = np.sign(samples) * np.maximum(np.abs(samples), np.float32(_FLOOR))
    samples = audio.resample(dataclasses.replace(waveform, samples=samples), encoder.sample_rate).samples
    samples = samples[:, : encoder.window_samples]
    fill = encoder.window_samples - samples.shape[1]
    return np.pad(samples, ((0, 0), (0, fill)), constant_values=_FLOOR).astype(np.float32)


def time_embedding(seconds: Tensor, size: int) -> Tensor:
    """Sines and cosines of `seconds` (...) at `size`/2 periods from 0.1 s to 600 s, geometrically: (..., size)."""
    steps = torch.linspace(0, 1, size // 2, device=seconds.device)
    frequency = 2 * math.pi / (_SHORTEST * (_LONGEST / _SHORTEST) ** steps)
    angle = seconds[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


# -------------------------------------------------------------------------------------------------------------- heads


class Block(nn.Module):
    """Text tokens attend to their own row, then to the audio, then pass an MLP; norms before the branches."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.text_attention = nn.MultiheadAttention(size, heads, dropout, batch_first=True)
        self.audio_attention = nn.MultiheadAttention(size, heads, dropout, batch_first=True)
        # Whether a sound is the one a word names is a product of the two; from sums it is learnt late, if at all.
        self.agreement = nn.Linear(size, size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, text_padding: Tensor, heard: Tensor, heard_padding: Tensor) -> Tensor:
        """`text` (batch, rows, length, size) and `heard` (batch, n, size) → text; paddings are true where nothing is.

        The audio is attended to by all rows of an item as one sequence: each query minds the keys alone.
        """
        batch, rows, length, size = text.shape
        inner = self.norms[0](text).flatten(0, 1)
        inner = self.text_attention(inner, inner, inner, text_padding.flatten(0, 1), need_weights=False)[0]
        text = text + self.dropout(inner.unflatten(0, (batch, rows)))
        inner = self.norms[1](text).flatten(1, 2)
        found = self.audio_attention(inner, heard, heard, heard_padding, need_weights=False)[0]
        found = found + self.agreement(inner * found)
        text = text + self.dropout(found.unflatten(1, (rows, length)))
        return text + self.dropout(self.mlp(self.norms[2](text)))


class OptionHead(nn.Module):
    """A score for each row of text, given the audio tokens and when they sound."""

    def __init__(self, audio_size: int, text_size: int, config: EchoTwinConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.audio_proj = nn.Sequential(nn.LayerNorm(audio_size), nn.Linear(audio_size, size))
        self.text_proj = nn.Sequential(nn.LayerNorm(text_size), nn.Linear(text_size, size))
        self.nothing = nn.Parameter(torch.zeros(1, 1, size))  # a token beside the audio: attending to none of it
        self.blocks = nn.ModuleList(Block(size, config.heads, config.dropout) for _ in range(config.layers))
        self.norm, self.score = nn.LayerNorm(size), nn.Linear(size, 1)

    def forward(self, text: Tensor, text_mask: Tensor, heard: Tensor, heard_mask: Tensor, seconds: Tensor) -> Tensor:
        """`text` (batch, rows, length, text), `heard` (batch, n, audio), `seconds` (batch, n) → (batch, rows)."""
        tokens = self.audio_proj(heard)
        tokens = tokens + time_embedding(seconds, tokens.shape[-1]).to(tokens.dtype)
        tokens = torch.cat((self.nothing.expand(len(tokens), -1, -1), tokens), dim=1)
        padding = F.pad(~heard_mask, (1, 0), value=False)
        text = self.text_proj(text)
        for block in self.blocks:
            text = block(text, ~text_mask, tokens, padding)
        kept = text_mask[..., None].to(text.dtype)
        mean = (self.norm(text) * kept).sum(dim=2) / kept.sum(dim=2)
        return self.score(mean)[..., 0]


class EchoTwin(nn.Module):
    """Both towers and a head.

    `forward` gives ``{"logits": (batch, options)}``, −∞ where an item has no such option, and ``"loss"`` with `labels`.
    """

    def __init__(self, config: EchoTwinConfig, audio_enc: AudioEncoder, text_enc: nn.Module) -> None:
        super().__init__()
        config.check()
        self.config, self.audio_enc, self.text_enc = config, audio_enc, text_enc
        text_size = int(text_enc.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if config.head == "letters":
            self.fusion = nn.Sequential(
                nn.Linear(audio_enc.hidden_size + text_size, FUSION_SIZE),
                nn.ReLU(),
                nn.Linear(FUSION_SIZE, config.num_letters),
            )
        else:
            self.options = OptionHead(audio_enc.hidden_size, text_size, config)
        self.label_smoothing = 0.0  # set by training

    @property
    def audio_encoder(self) -> AudioEncoder:
        return self.audio_enc

    def encode_audio(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (windows, channels, time) → tokens (windows, n, hidden) and mask, in order of time.

        With ``columns`` an encoder's patches of one instant are one token, their mean; an encoder without a grid of
        patches keeps its tokens.
        """
        tokens, mask = self.audio_enc(waveform, lengths)
        if self.audio_enc.grid is None:
            return tokens, mask
        tokens, mask = self.audio_enc.patches(tokens), self.audio_enc.patches(mask[..., None])
        if not self.config.columns:
            return tokens.flatten(1, 2), mask.flatten(1, 2)[..., 0]
        kept = mask.to(tokens.dtype)
        return (tokens * kept).sum(dim=2) / kept.sum(dim=2).clamp(min=1), mask.any(dim=2)[..., 0]

    def token_seconds(self, count: int, window: int = 0) -> Tensor:
        """Centres in seconds of the `count` tokens of a recording's window number `window`: (count,)."""
        length, grid = self.audio_enc.window_seconds, self.audio_enc.grid
        instants = grid[0] if grid is not None and count % grid[0] == 0 else count
        centres = (torch.arange(instants) + 0.5) * (length / instants)
        return centres.repeat_interleave(count // instants) + window * length

    def hear(self, waveform: Tensor, lengths: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (all, channels, time) with their `lengths`, of which the items of a batch have `windows` (batch,).

        Tokens (batch, n, hidden), mask and seconds (batch, n), padded to the longest item.
        """
        tokens, mask = self.encode_audio(waveform, lengths)
        counts = windows.tolist()
        longest = max(counts)
        seconds = torch.cat([self.token_seconds(tokens.shape[1], number) for number in range(longest)])
        joined = [pad_sequence([part.flatten(0, 1) for part in all_.split(counts)], True) for all_ in (tokens, mask)]
        return joined[0], joined[1], seconds.to(tokens.device).expand(len(counts), -1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        option_mask: Tensor,
        audio_tokens: Tensor | None = None,
        audio_mask: Tensor | None = None,
        audio_seconds: Tensor | None = None,
        waveform: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_windows: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (batch, rows, length), `option_mask` (batch, options), `labels` (batch,).

        The audio is what a frozen tower made of it (`audio_tokens` (batch, n, hidden), `audio_mask` and
        `audio_seconds` (batch, n)), or for a tower that learns what :meth:`hear` takes.
        """
        if waveform is not None and audio_lengths is not None and audio_windows is not None:
            audio_tokens, audio_mask, audio_seconds = self.hear(waveform, audio_lengths, audio_windows)
        if self.config.listen and audio_tokens is None:
            raise ValueError("the model listens, but there is no audio in the batch")
        text = self._read(input_ids, attention_mask, token_type_ids)
        if audio_tokens is None or not self.config.listen:  # no token at all: what is asked is the text
            audio_tokens = text.new_zeros(len(text), 0, self.audio_enc.hidden_size)
            audio_mask = audio_seconds = None
        if audio_mask is None or audio_seconds is None:
            audio_mask = torch.ones(audio_tokens.shape[:2], dtype=torch.bool, device=text.device)
            audio_seconds = audio_mask.float()
        if self.config.head == "letters":
            kept = audio_mask[..., None].to(audio_tokens.dtype)
            mean = (audio_tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
            logits = self.fusion(torch.cat((mean, text[:, 0, 0]), dim=-1))[:, : option_mask.shape[1]]
        else:
            logits = self.options(text, attention_mask.bool(), audio_tokens, audio_mask, audio_seconds)
        logits = logits.float().masked_fill(~option_mask, -torch.inf)
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = choice_loss(logits, option_mask, labels, self.label_smoothing if self.training else 0.0)
        return output

    def _read(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Last hidden states of the text tower, (batch, rows, length, text)."""
        inputs = {"input_ids": input_ids.flatten(0, 1), "attention_mask": attention_mask.flatten(0, 1)}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids.flatten(0, 1)
        return self.text_enc(**inputs).last_hidden_state.unflatten(0, input_ids.shape[:2])


def choice_loss(logits: Tensor, option_mask: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy over the options that an item has; what is smoothed goes to those alone."""
    share = smoothing * option_mask / option_mask.sum(dim=1, keepdim=True)
    share = share + (1.0 - smoothing) * F.one_hot(labels, logits.shape[1])
    return -(share * F.log_softmax(logits, dim=1).masked_fill(~option_mask, 0.0)).sum(dim=1).mean()


def freeze_text_pooler(text_enc: nn.Module) -> None:
    """BERT's pooler is in published files and read by nobody; without a gradient it must not wait for one."""
    pooler = getattr(text_enc, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


def config_of(fields: Mapping[str, Any]) -> EchoTwinConfig:
    """The configuration of plain `fields`; :class:`ConfigError` names what does not fit."""
    from audio_llm import config as recipes

    return recipes.build(EchoTwinConfig, dict(fields), where="EchoTwin")
