"""Samples as tokens, in the order of a run: how a waveform of a shard becomes a row of a batch.

``Examples(shards, processor)[i]`` reads sample `i` and has :func:`encode` make an :class:`Example` of it, or of the
next sample that can be used; :func:`collate` pads several to a batch. SFT learns the replies; GRPO takes the prompts
alone (``reply=False``) and samples replies to them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audio_llm import audio
from audio_llm.errors import AudioLLMError, ShardError, TrainingError, describe
from audio_llm.language import prompts, replies
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample
from audio_llm.training.encoder_cache import EncoderCache, Kept
from audio_llm.training.recipes import DataRecipe
from audio_llm.training.sounds import Sounds, hear

IGNORED = -100  # the label torch's cross entropy leaves out
# Keep these draws apart from the order of samples, which has the same seed.
SILENCE_STREAM, SWAP_STREAM, ORDER_STREAM = 1, 2, 3
MAX_REPLACEMENTS = 64  # so many bad samples in a row are no accident: the data as a whole does not fit


@dataclass(eq=False)
class Example:
    """One sample as tokens: a prompt, and the reply to it where one is learnt.

    Compared by identity: the rows of a GRPO group share one object, which is what makes them a group.
    """

    row: dict[str, Any]  # where the sample lies, and what rewards are told of it: TRL's columns of a row
    ids: Tensor  # (n,) int64, audio placeholders expanded
    labels: Tensor  # (n,) int64, the reply's ids; IGNORED over the prompt
    input_audio: Tensor | None = None  # (windows, channels, time) float32; None where `kept` has the tokens
    audio_lengths: Tensor | None = None  # (windows,) int64, valid samples
    rejects: list[tuple[str, str]] = field(default_factory=list)  # (sample, reason) of those that it replaces
    words: Tensor | None = None  # (t,) int64, ids of words for what is heard
    tokens: tuple[Tensor, Tensor] | None = None  # of a frozen encoder: (windows, n, hidden), mask (windows, n)
    kept: Kept | None = None  # what the encoder's cache has of it, where there is one

    @property
    def windows(self) -> int:
        return 0 if self.audio_lengths is None else len(self.audio_lengths)


def encode(
    processor: Any,
    item: Mapping[str, Any],
    style: str = "think",
    *,
    reply: bool = True,
    max_length: int | None = None,
    hearing: str = "refuse",
    order: str = "audio",
) -> Example:
    """One `item` of a :class:`ShardDataset` as the model is given it; with `reply`, the answer in `style` is learnt.
    Its parts stand in an `order` of :data:`audio_llm.language.prompts.ORDERS`.

    Raises :class:`ShardError` or :class:`AudioError` for a sample that cannot be used, and :class:`TrainingError` for
    what is wrong with all of them: a chat template that does not begin the conversation with the prompt, or sound that
    does not arrive at the model.
    """
    sample, name = item["sample"], f"sample '{item['sample'].id}'"
    if sample.question is None or sample.answer is None:
        raise ShardError(describe(name, "a question with an answer", "none to learn from"))
    if not reply and sample.choices and replies.resolve_option(sample.answer, sample.choices).index is None:
        raise ShardError(describe(name, "an answer among its choices", repr(sample.answer)))
    heard = hear(processor.feature_extractor, item, hearing)
    sounds = len(heard.samples)
    messages = prompts.conversation(sample, style=None, audios=sounds, order=order)
    prompt = processor.render(messages, generate=True)
    (text,) = processor.expand([prompt], heard.samples)
    ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    example = Example(
        row=_columns(item, messages, style),
        ids=ids,
        labels=torch.full_like(ids, IGNORED),
        input_audio=heard.input_audio,
        audio_lengths=heard.audio_lengths,
        kept=heard.kept,
    )
    placeholders = int((ids == processor.audio_token_id).sum())
    if sounds < len(sample.audio) or (sounds and not (placeholders and example.windows)):
        expected = f"{max(sounds, len(sample.audio))} sounds, with audio placeholders and windows"
        found = f"{sounds}, with {placeholders} placeholders and {example.windows} windows"
        cure = "Training on it would teach the model to guess without listening."
        raise TrainingError(describe(f"{name}, which has audio", expected, found, cure))
    if reply:
        whole = processor.render(prompts.conversation(sample, style=style, audios=sounds, order=order))
        if not whole.startswith(prompt):
            expected = "the prompt to be a prefix of the conversation"
            raise TrainingError(describe("chat template", expected, f"{prompt!r} against {whole!r}"))
        target = reply_ids(processor, prompt, whole)
        example.ids, example.labels = torch.cat([ids, target]), torch.cat([example.labels, target])
        said = processor.tokenizer(words_for(sample), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        example.words = torch.LongTensor(said)
    if max_length is not None and len(example.ids) > max_length:
        cure = "Raise data.max_length; nothing is cut."
        raise ShardError(describe(name, f"at most {max_length} tokens", f"{len(example.ids)}", cure))
    return example


def words_for(sample: Sample) -> str:
    """What is heard in a sample, in words: the sounds that it is known to hold, else the answer to its question."""
    return ", ".join(dict.fromkeys(event.label for event in sample.events)) or str(sample.answer)


def reply_ids(processor: Any, prompt: str, whole: str) -> Tensor:
    """(n,) ids of the assistant's turn behind `prompt` up to the token that ends it, without what follows that."""
    ids_of = functools.partial(processor.tokenizer, add_special_tokens=False)
    before, end = ids_of(prompt)["input_ids"], processor.turn_end

    def behind(text: str) -> list[int]:  # with the prompt, for words alone may get a blank
        ids = ids_of(text)["input_ids"]
        apart = ids[: len(before)] != before  # a token would reach over both
        return list(ids_of(text[len(prompt) :])["input_ids"] if apart else ids[len(before) :])

    ids = behind(whole)
    if end in ids:
        ids = ids[: len(ids) - ids[::-1].index(end)]
    else:  # a format without an end-of-turn token: the end of the text is the end of the turn
        ids = [*behind(whole.rstrip()), end]
    return torch.tensor(ids, dtype=torch.long)


def _columns(item: Mapping[str, Any], messages: list[dict[str, Any]], style: str) -> dict[str, Any]:
    sample, place = item["sample"], item["coordinates"]
    return {
        "prompt": messages,
        "folder": str(Path(place["shard"]).parent),
        "index": place["index"],
        "sample_id": sample.id,
        "answer": sample.answer,
        "choices": list(sample.choices) or None,
        "events": [dataclasses.asdict(event) for event in sample.events],
        "question_type": sample.meta.get("question_type"),
        "counterfactual": sample.meta.get("counterfactual"),
        "style": style,
    }


def collate(examples: Sequence[Example], tokenizer: Any) -> dict[str, Any]:
    """A batch padded on the right: input_ids, attention_mask and labels (batch, n), the audio of :func:`join_audio`,
    what a cache has `kept` of it, the `words` for what is heard, `ids` of the samples, `rejects` they replace."""
    return {
        "input_ids": pad([example.ids for example in examples], tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(example.ids) for example in examples], 0),
        "labels": pad([example.labels for example in examples], IGNORED),
        "words": [example.ids[:0] if example.words is None else example.words for example in examples],
        "ids": [example.row["sample_id"] for example in examples],
        "rejects": [reject for example in examples for reject in example.rejects],
        "kept": [example.kept for example in examples if example.kept is not None],
        **join_audio(examples),
    }


def pad(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors (n,) -> (batch, longest), filled up with `value`."""
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)


def join_audio(examples: Sequence[Example]) -> dict[str, Tensor]:
    """`input_audio` (windows, channels, time), padded to the longest window, and `audio_lengths` (windows,), in the
    order of `examples`, of those that bring samples; nothing where none does."""
    windows = [example.input_audio for example in examples if example.input_audio is not None]
    if not windows:
        return {}
    longest = max(part.shape[-1] for part in windows)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in windows]
    lengths = [one.audio_lengths for one in examples if one.input_audio is not None and one.audio_lengths is not None]
    return {"input_audio": torch.cat(padded), "audio_lengths": torch.cat(lengths)}


class Examples(Dataset[Example]):
    """Samples of `shards` as examples. One that cannot be used is replaced by the next that can (so the order stays
    the same in every run and layout) and named in the `rejects` of its replacement. The sample's place and the seed
    decide whether it is heard as silence (`silent_share`), whether mirrored (`swap_share`), and whether its text comes
    before its audio or behind a system message (`order_share`, half of it each)."""

    def __init__(
        self,
        shards: ShardDataset,
        processor: Any,
        style: str = "think",
        *,
        reply: bool = True,
        max_length: int | None = None,
        limit: int | None = None,
        silent_share: float = 0.0,
        swap_share: float = 0.0,
        order_share: float = 0.0,
        seed: int = 0,
        hearing: str = "refuse",
        cache: EncoderCache | None = None,
    ):
        self.shards, self.size = shards, len(shards) if limit is None else min(limit, len(shards))
        how: dict[str, Any] = {"style": style, "reply": reply, "max_length": max_length, "hearing": hearing}
        self.encode: Callable[..., Example] = functools.partial(encode, processor, **how)
        self.silent = np.random.default_rng([seed, SILENCE_STREAM]).random(len(shards)) < silent_share
        self.swapped = np.random.default_rng([seed, SWAP_STREAM]).random(len(shards)) < swap_share
        self.sounds = Sounds(shards, processor.feature_extractor, hearing, cache.store if cache else None)
        draws = np.random.default_rng([seed, ORDER_STREAM]).random(len(shards))
        self.orders = np.select([draws < order_share / 2, draws < order_share], ["text", "system"], "audio")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        rejects: list[tuple[str, str]] = []
        for offset in range(min(MAX_REPLACEMENTS, self.size)):
            position = (index + offset) % self.size
            try:
                example = self.encode(self._read(position), order=str(self.orders[position]))
            except TrainingError:
                raise
            except AudioLLMError as error:
                folder, row = self.shards.locate(position)
                rejects.append((f"{folder}/{row.shard}: {row.key}", str(error)))
                continue
            example.rejects = rejects
            return example
        raise TrainingError(f"{len(rejects)} samples in a row cannot be used; the first: {rejects[0][1]}")

    def _read(self, position: int) -> dict[str, Any]:
        return self.sounds.read(position, bool(self.silent[position]), bool(self.swapped[position]))


def open_shards(folders: Sequence[Any], processor: Any, data: DataRecipe) -> ShardDataset:
    """Shards that fit the encoder: another layout or rate is an error before training, not in the middle of it."""
    extractor = processor.feature_extractor
    return ShardDataset(
        folders,
        layouts=audio.audible(extractor.layouts, data.hearing),
        sample_rate=extractor.sampling_rate,
        max_reject_share=data.max_reject_share,
        reject_key="data.max_reject_share",
    )
