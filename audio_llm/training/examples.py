"""Samples as token examples, in the order of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from audio_llm import audio, files
from audio_llm.errors import AudioLLMError, ShardError, TrainingError, describe
from audio_llm.language import prompts, replies
from audio_llm.language.mirroring import mirror_sample
from audio_llm.shards.reader import ShardDataset, epoch_order

IGNORED = -100  # the label torch's cross entropy leaves out
SILENCE_STREAM, SWAP_STREAM = 1, 2  # keep these draws apart from the order of samples, which has the same seed
MAX_REPLACEMENTS = 64  # so many bad samples in a row are no accident: the data as a whole does not fit


@dataclass
class Encoded:
    """One sample as tokens: `input_ids` and `labels` (n,), its windows (windows, channels, time) and their lengths."""

    id: str
    input_ids: Tensor
    labels: Tensor
    input_audio: Tensor | None
    audio_lengths: Tensor | None
    rejects: list[tuple[str, str]] = field(default_factory=list)


class SFTCollator:
    """Samples → a right-padded batch whose labels cover the assistant's turn only.

    ``encode`` does one sample (``audio-llm inspect`` shows its result), the call pads and joins. The items are what
    ``ShardDataset`` gives, or already :class:`Encoded`.
    """

    def __init__(self, processor: Any, style: str = "think", max_length: int | None = None):
        self.processor, self.style, self.max_length = processor, style, max_length
        tokenizer = processor.tokenizer
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.special = set(tokenizer.all_special_ids) | {tokenizer.eos_token_id}

    def encode(self, item: Mapping[str, Any]) -> Encoded:
        """Tokens of one sample. Raises :class:`AudioLLMError` for a sample that cannot be learnt from as it is."""
        sample, waveform = item["sample"], item.get("waveform")
        if sample.question is None or sample.answer is None:
            raise ShardError(describe(f"sample '{sample.id}'", "a question with an answer", "none to learn from"))
        extractor = self.processor.feature_extractor
        if waveform is not None:
            audio.check(waveform, layouts=extractor.layouts, sample_rate=extractor.sampling_rate, name=sample.id)
        audios = [] if waveform is None else [waveform.samples]
        ask, told = (
            prompts.conversation(sample, audios=len(audios)),
            prompts.conversation(sample, style=self.style, audios=len(audios)),
        )
        prompt, whole = self.processor.render(ask, generate=True), self.processor.render(told)
        if not whole.startswith(prompt):
            raise TrainingError(
                describe(
                    "chat template", "the prompt to be a prefix of the conversation", f"{prompt!r} against {whole!r}"
                )
            )
        features = self.processor(text=[prompt], audio=[audios] if audios else None)
        reply = self._reply_ids(whole[len(prompt) :])
        prompt_ids = features["input_ids"][0]
        encoded = Encoded(
            id=sample.id,
            input_ids=torch.cat([prompt_ids, reply]),
            labels=torch.cat([torch.full_like(prompt_ids, IGNORED), reply]),
            input_audio=features.get("input_audio"),
            audio_lengths=features.get("audio_lengths"),
        )
        self._check(encoded, hears=waveform is not None or sample.audio is not None)
        return encoded

    def _reply_ids(self, reply: str) -> Tensor:
        """Ids of the assistant's turn up to the token that ends it, without the template's line break after that."""
        ids = self.processor.tokenizer(reply, add_special_tokens=False)["input_ids"]
        ends = [position for position, token in enumerate(ids) if token in self.special]
        if ends:
            ids = ids[: ends[-1] + 1]
        else:  # a format without an end-of-turn token: the end of the text is the end of the turn
            ids = self.processor.tokenizer(reply.rstrip(), add_special_tokens=False)["input_ids"]
            ids.append(self.processor.tokenizer.eos_token_id)
        return torch.tensor(ids, dtype=torch.long)

    def _check(self, encoded: Encoded, hears: bool) -> None:
        placeholders = int((encoded.input_ids == self.processor.audio_token_id).sum())
        windows = 0 if encoded.input_audio is None else encoded.input_audio.shape[0]
        if hears and not (placeholders and windows):
            raise TrainingError(
                describe(
                    f"sample '{encoded.id}', which has audio",
                    "audio placeholders and windows in the batch",
                    f"{placeholders} placeholders and {windows} windows",
                    "Training on it would teach the model to guess without listening.",
                )
            )
        if self.max_length is not None and len(encoded.input_ids) > self.max_length:
            raise ShardError(
                describe(
                    f"sample '{encoded.id}'",
                    f"at most {self.max_length} tokens",
                    f"{len(encoded.input_ids)}",
                    "Raise data.max_length; nothing is cut.",
                )
            )

    def __call__(self, items: Sequence[Mapping[str, Any] | Encoded]) -> dict[str, Any]:
        """-> input_ids, attention_mask, labels (batch, n); input_audio (windows, channels, time), audio_lengths
        (windows,) in prompt order; `ids` of the samples and the `rejects` they replace."""
        rows = [item if isinstance(item, Encoded) else self.encode(item) for item in items]
        length = max(len(row.input_ids) for row in rows)

        def pad(tensors: list[Tensor], value: int) -> Tensor:
            return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=value) for t in tensors])

        batch: dict[str, Any] = {
            "input_ids": pad([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row.input_ids) for row in rows], 0),
            "labels": pad([row.labels for row in rows], IGNORED),
            "ids": [row.id for row in rows],
            "rejects": [reject for row in rows for reject in row.rejects],
        }
        windows = [window for row in rows if row.input_audio is not None for window in row.input_audio]
        if windows:
            time_steps = max(window.shape[-1] for window in windows)
            padded = [torch.nn.functional.pad(window, (0, time_steps - window.shape[-1])) for window in windows]
            batch["input_audio"] = torch.stack(padded)
            batch["audio_lengths"] = torch.cat([row.audio_lengths for row in rows if row.audio_lengths is not None])
        return batch


class SupervisedDataset(Dataset):
    """Encoded samples of a ``ShardDataset``. A sample that cannot be read is replaced by the next good one (so the
    order stays the same in every run and layout) and named in the `rejects` of its replacement. The sample's place and
    the seed decide whether it is heard as silence, and whether mirrored."""

    def __init__(
        self,
        shards: ShardDataset,
        collator: SFTCollator,
        limit: int | None = None,
        silent_share: float = 0.0,
        swap_share: float = 0.0,
        seed: int = 0,
    ):
        self.shards, self.collator = shards, collator
        self.size = len(shards) if limit is None else min(limit, len(shards))
        self.silent = np.random.default_rng([seed, SILENCE_STREAM]).random(len(shards)) < silent_share
        self.swapped = np.random.default_rng([seed, SWAP_STREAM]).random(len(shards)) < swap_share

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Encoded:
        rejects: list[tuple[str, str]] = []
        for offset in range(min(MAX_REPLACEMENTS, self.size)):
            position = (index + offset) % self.size
            try:
                item = self.shards[position]
                if self.silent[position] and "waveform" in item:
                    item = {**item, "waveform": audio.silence(item["waveform"])}
                if self.swapped[position] and "waveform" in item and item["waveform"].num_channels > 1:
                    mirrored = {"waveform": audio.swap_channels(item["waveform"])}
                    item = {**item, **mirrored, "sample": mirror_sample(item["sample"])}
                encoded = self.collator.encode(item)
            except TrainingError:
                raise
            except AudioLLMError as error:
                row = self.shards.row(position)
                rejects.append((f"{row.shard}: {row.key}", str(error)))
                continue
            encoded.rejects = rejects
            return encoded
        raise TrainingError(f"{len(rejects)} samples in a row cannot be used; the first: {rejects[0][1]}")


class RunSampler(Sampler[int]):
    """Indices of the whole run, epoch after epoch without a seam: a step never is cut short by the end of an epoch."""

    def __init__(self, shards: ShardDataset, seed: int, samples: int):
        self.shards, self.seed, self.samples = shards, seed, samples

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        left, epoch = self.samples, 0
        while left > 0:
            order = epoch_order(self.shards, self.seed, epoch)[:left]
            yield from order.tolist()
            left, epoch = left - len(order), epoch + 1


class Rejects:
    """Counts samples that could not be used, lists them in ``rejects.jsonl``, stops the run beyond a stated share."""

    def __init__(self, path: Path, dataset_size: int, max_share: float):
        self.path, self.limit = path, max_share * dataset_size
        self.seen = {record["sample"] for record in files.read_lines(path)}

    def add(self, rejects: Sequence[tuple[str, str]]) -> None:
        """Record new rejects. Raises :class:`TrainingError` beyond the bound."""
        for sample, reason in rejects:
            if sample in self.seen:
                continue
            self.seen.add(sample)
            files.append_line(self.path, {"sample": sample, "reason": reason})
            if len(self.seen) > self.limit:
                raise TrainingError(
                    describe(
                        "rejected samples",
                        f"at most {self.limit:g} (data.max_reject_share)",
                        f"{len(self.seen)}, the last: {reason}",
                        f"They are listed in {self.path}. Mend the shards, or raise data.max_reject_share.",
                    )
                )


def open_shards(folders: Sequence[Path], processor: Any, max_reject_share: float) -> ShardDataset:
    """Shards that fit the encoder: another layout or rate is an error before training, not in the middle of it."""
    extractor = processor.feature_extractor
    return ShardDataset(
        folders,
        layouts=extractor.layouts,
        sample_rate=extractor.sampling_rate,
        max_reject_share=max_reject_share,
    )


@dataclass(eq=False)
class Clip:
    """One prompt: its place in the data, columns for the rewards, token ids, windows, and what a frozen encoder made.

    Rows of a group share one clip object; identity (``is``) is what makes a group a group.
    """

    row: dict[str, Any]
    ids: list[int]
    input_audio: Tensor | None  # (windows, channels, time)
    audio_lengths: Tensor | None  # (windows,)
    tokens: tuple[Tensor, Tensor] | None = None  # (windows, n, hidden), (windows, n)

    @property
    def windows(self) -> int:
        return 0 if self.input_audio is None else len(self.input_audio)


class ClipSource:
    """Samples of a ``ShardDataset`` as prompts. `decoded` counts how many clips were read.

    A sample that cannot be used is replaced by the next good one and recorded in `rejects`.
    """

    def __init__(self, shards: ShardDataset, processor: Any, style: str, rejects: Rejects) -> None:
        self.shards, self.processor, self.style, self.rejects = shards, processor, style, rejects
        self.decoded = 0

    def load(self, index: int) -> Clip:
        """The clip at `index`, or the first usable one after it."""
        refused: list[tuple[str, str]] = []
        for offset in range(min(MAX_REPLACEMENTS, len(self.shards))):
            position = (index + offset) % len(self.shards)
            try:
                clip = self._encode(position)
            except TrainingError:
                raise
            except AudioLLMError as error:
                folder, row = self.shards.locate(position)
                refused.append((f"{folder}/{row.shard}: {row.key}", str(error)))
                continue
            self.rejects.add(refused)
            return clip
        raise TrainingError(f"{len(refused)} samples in a row cannot be used; the first: {refused[0][1]}")

    def _encode(self, index: int) -> Clip:
        item = self.shards[index]
        self.decoded += 1
        sample, waveform = item["sample"], item.get("waveform")
        if sample.question is None or sample.answer is None:
            raise ShardError(describe(f"sample '{sample.id}'", "a question with an answer to reward against", "none"))
        if sample.choices and replies.resolve_option(sample.answer, sample.choices).index is None:
            raise ShardError(describe(f"sample '{sample.id}'", "an answer among its choices", repr(sample.answer)))
        extractor = self.processor.feature_extractor
        if waveform is not None:
            audio.check(waveform, layouts=extractor.layouts, sample_rate=extractor.sampling_rate, name=sample.id)
        audios = [] if waveform is None else [waveform.samples]
        messages = prompts.conversation(sample, audios=len(audios))
        features = self.processor(
            text=[self.processor.render(messages, generate=True)], audio=[audios] if audios else None
        )
        clip = Clip(
            row=self._columns(index, sample, messages),
            ids=features["input_ids"][0].tolist(),
            input_audio=features.get("input_audio"),
            audio_lengths=features.get("audio_lengths"),
        )
        placeholders = clip.ids.count(self.processor.audio_token_id)
        if audios and not (placeholders and clip.windows):
            raise TrainingError(
                describe(
                    f"sample '{sample.id}', which has audio",
                    "audio placeholders and windows in its prompt",
                    f"{placeholders} placeholders and {clip.windows} windows",
                    "The policy would be rewarded for guessing.",
                )
            )
        return clip

    def _columns(self, index: int, sample: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """What a reward function is given, in TRL's terms: one dataset row."""
        return {
            "prompt": messages,
            "folder": str(self.shards.locate(index)[0]),
            "index": index,
            "sample_id": sample.id,
            "answer": sample.answer,
            "choices": list(sample.choices) or None,
            "events": [dataclasses.asdict(event) for event in sample.events],
            "question_type": sample.meta.get("question_type"),
            "style": self.style,
        }


def _join(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    """The windows of `clips`, padded to the longest: (windows, channels, time) and (windows,) valid samples."""
    samples = [clip.input_audio for clip in clips if clip.input_audio is not None]
    longest = max(part.shape[-1] for part in samples)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in samples]
    return torch.cat(padded), torch.cat([clip.audio_lengths for clip in clips if clip.audio_lengths is not None])
