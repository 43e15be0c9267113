"""Supervised fine-tuning: the Transformers ``Trainer`` on shards of questions with answers.

One optimizer step sees the same samples however the batch is laid out (processes × accumulation × batch size), and the
loss is the mean over the supervised tokens of the whole step, so that the layout does not change the learning curve.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from audio_llm import audio, files, prompts
from audio_llm.errors import AudioLLMError, ConfigError, ShardError, TrainingError, describe
from audio_llm.mirroring import mirror_sample
from audio_llm.shards.reader import ShardDataset, epoch_order
from audio_llm.training import common
from audio_llm.training.common import EncoderTraining, LoRARecipe, ModelRecipe, Precision, ProjectorTraining
from audio_llm.training.encoder_cache import EncoderCache, open_cache

IGNORED = -100  # the label torch's cross entropy leaves out
SILENCE_STREAM, SWAP_STREAM = 1, 2  # keep these draws apart from the order of samples, which has the same seed
MAX_REPLACEMENTS = 64  # so many bad samples in a row are no accident: the data as a whole does not fit


@dataclass
class DataRecipe:
    """Shard folders, and how a sample becomes tokens. `max_length` counts tokens, audio placeholders included.

    `silent_share` of the samples are heard as silence: from them the model learns what the question alone allows, so
    that without sound it guesses among the choices instead of naming a sound that is not there. `swap_share` of those
    with sides to tell (stereo, binaural, FOA) are mirrored, in sound and in every word of question, choices, reasoning
    and answer.
    """

    train: list[Path]
    validation: list[Path] = field(default_factory=list)
    validation_samples: int | None = None
    style: Literal["answer", "think", "think_semantics"] = "think"
    max_length: int = 4096
    silent_share: float = 0.0
    swap_share: float = 0.0
    max_reject_share: float = 0.01
    workers: int = 0


@dataclass
class SFTRecipe:
    """A supervised fine-tuning run. Its length is the smallest of `steps`, `epochs` and `seconds` that are given.

    `encoder_cache` is a folder for what a frozen encoder makes of each clip: it then runs once per clip, not per epoch.
    """

    output: Path
    model: ModelRecipe
    data: DataRecipe
    lora: LoRARecipe | None = field(default_factory=LoRARecipe)
    encoder: EncoderTraining = "frozen"
    encoder_cache: Path | None = None
    projector: ProjectorTraining = "full"
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    log_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    keep_checkpoints: int = 2
    resume: str = "auto"
    record_order: bool = False
    export: list[Literal["merged", "adapter"]] = field(default_factory=lambda: ["merged", "adapter"])
    processes: int | None = None
    seed: int = 0


# ------------------------------------------------------------------------------------------------ samples to batches


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


# --------------------------------------------------------------------------------------------------------- the trainer


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


class SFTTrainer(common.BudgetedSchedule, Trainer):
    """``Trainer`` with our sample order, rejects, evaluation weighted by tokens, and a schedule by the clock."""

    control: Any  # what the callbacks ask for, as Trainer keeps it

    def __init__(
        self,
        *,
        sampler: RunSampler,
        rejects: Rejects,
        order: Path | None,
        cache: EncoderCache | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.sampler, self.rejects, self.order, self.cache = sampler, rejects, order, cache

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.sampler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids, rejects = inputs.pop("ids", []), inputs.pop("rejects", [])
        self.rejects.add(rejects)
        if self.order is not None and model.training:
            files.append_line(self.order, {"step": self.state.global_step + 1, "ids": ids})
        return super().compute_loss(model, self._listen(inputs), *args, **kwargs)

    def _listen(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with the encoder's tokens from the cache in place of samples, where there is a cache."""
        if self.cache is None or "input_audio" not in inputs:
            return inputs
        heard = self.cache(inputs.pop("input_audio"), inputs.pop("audio_lengths"))
        return inputs | {"audio_tokens": heard}

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token, every sample once (Trainer's is a mean over batches)."""
        loader, model = self.get_eval_dataloader(eval_dataset), self.model
        assert model is not None and self.accelerator is not None
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in loader:
            self.rejects.add(batch.pop("rejects"))
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")[:, 1:]
            inputs = self._listen({key: value for key, value in batch.items() if isinstance(value, Tensor)})
            with self.accelerator.autocast():
                logits = model(**inputs).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            rows = torch.stack([losses.sum(1), (labels != IGNORED).sum(1).float()], dim=1)
            sums += self.accelerator.gather_for_metrics(rows).double().sum(0).cpu()
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1]), f"{metric_key_prefix}_tokens": int(sums[1])}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


# ------------------------------------------------------------------------------------------------------------- the run


def planned_steps(recipe: SFTRecipe, dataset_size: int, samples_per_step: int) -> int:
    """Optimizer steps of the run: the smaller of `steps` and `epochs`; with `seconds` alone, more than ever fit."""
    limits = []
    if recipe.steps is not None:
        limits.append(recipe.steps)
    if recipe.epochs is not None:
        limits.append(math.ceil(recipe.epochs * dataset_size / samples_per_step))
    if not limits and recipe.seconds is None:
        raise ConfigError("recipe: expected steps, epochs or seconds; found none, so the run would have no end.")
    return min(limits) if limits else 10**6


def open_shards(folders: Sequence[Path], processor: Any, max_reject_share: float) -> ShardDataset:
    """Shards that fit the encoder: another layout or rate is an error before training, not in the middle of it."""
    extractor = processor.feature_extractor
    return ShardDataset(
        folders,
        layouts=extractor.layouts,
        sample_rate=extractor.sampling_rate,
        max_reject_share=max_reject_share,
    )


def training_arguments(recipe: SFTRecipe) -> TrainingArguments:
    """The recipe in Trainer's words, but for ``max_steps``. Building it sets up the process group and DeepSpeed."""
    return TrainingArguments(
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        eval_strategy="steps" if recipe.eval_steps and recipe.data.validation else "no",
        eval_steps=recipe.eval_steps,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_persistent_workers=recipe.data.workers > 0,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
        **common.trainer_settings(recipe),
    )


def stream_position(recipe: SFTRecipe, shards: ShardDataset, samples_per_step: int) -> dict[str, Any]:
    """What decides which samples a step sees; a checkpoint carries it, and a resumed run must agree."""
    return {
        "data": common.data_hash(recipe.data.train),
        "samples": len(shards),
        "samples_per_step": samples_per_step,
        "seed": recipe.seed,
        "style": recipe.data.style,
        "max_length": recipe.data.max_length,
    }


def run(recipe: SFTRecipe) -> dict[str, Any]:
    """Train, evaluate, export; returns what ``result.json`` holds. Resumes by itself (``resume: auto``).

    The run folder gets ``recipe.yaml``, ``trainable.json``, ``metrics.jsonl``, ``rejects.jsonl``, ``checkpoint-N/``,
    ``result.json`` and the exported ``merged/`` or ``base/`` + ``adapter/``.
    """
    from audio_llm.checkpoints.build import load_processor

    common.prepare_torch()
    common.check_build_locks()
    arguments = training_arguments(recipe)
    common.check_launch(arguments.world_size, recipe.processes)
    main = arguments.process_index == 0
    start = common.starting_folder(recipe.model, recipe.output)
    processor = load_processor(start)
    shards = open_shards(recipe.data.train, processor, recipe.data.max_reject_share)
    samples_per_step = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    arguments.max_steps = planned_steps(recipe, len(shards), samples_per_step)
    position = stream_position(recipe, shards, samples_per_step)
    done, checkpoint = common.claim(recipe, position)
    if done is not None:
        return done

    # FSDP shards weights of one dtype only, and without LoRA every weight is trained, that is float32.
    mixed = arguments.bf16 and recipe.lora is not None and not arguments.fsdp
    model = common.trained_model(recipe, start, torch.bfloat16 if mixed else torch.float32)

    trainer = build_trainer(recipe, arguments, model, processor, shards, position)
    if main and checkpoint:
        print(f"resuming from {checkpoint}")
    started = time.monotonic()
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AudioLLMError as error:
        raise common.plain_error(error) from None
    result: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "samples": trainer.state.global_step * samples_per_step,
        "epochs": trainer.state.global_step * samples_per_step / len(shards),
        "seconds": round(time.monotonic() - started, 2),
        "train_loss": outcome.training_loss,
        "rejects": len(trainer.rejects.seen),
        "processes": arguments.world_size,
        "position": position,
    }
    if trainer.cache is not None:
        result["encoder_cache"] = {"hits": trainer.cache.hits, "misses": trainer.cache.misses}
    if recipe.data.validation:
        last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), None)
        fresh = last if last and last["step"] == trainer.state.global_step else trainer.evaluate()
        result |= {key: fresh[key] for key in ("eval_loss", "eval_tokens")}
    result["exported"] = common.exported(recipe, trainer, processor)
    if main:
        files.write_json(recipe.output / "result.json", result)
    return result


def build_trainer(
    recipe: SFTRecipe,
    arguments: TrainingArguments,
    model: Any,
    processor: Any,
    shards: ShardDataset,
    position: Mapping[str, Any],
) -> SFTTrainer:
    """The trainer of a run with its data, callbacks and files."""
    for name in ("silent_share", "swap_share"):
        if not 0 <= (share := getattr(recipe.data, name)) < 1:
            raise ConfigError(describe(f"data.{name}", "a share from 0 to below 1", f"{share:g}"))
    collator = SFTCollator(processor, recipe.data.style, recipe.data.max_length)
    warn_if_endless(collator, model)
    train = SupervisedDataset(
        shards, collator, silent_share=recipe.data.silent_share, swap_share=recipe.data.swap_share, seed=recipe.seed
    )
    validation = None
    if recipe.data.validation:
        validation = SupervisedDataset(
            open_shards(recipe.data.validation, processor, recipe.data.max_reject_share),
            collator,
            limit=recipe.data.validation_samples,
        )
    samples_per_step = position["samples_per_step"]
    budget = common.TimeBudget(recipe.seconds) if recipe.seconds is not None else None
    callbacks = [
        common.MetricsFile(recipe.output / "metrics.jsonl", samples_per_step, len(shards)),
        common.Checkpoints(recipe.output, recipe.keep_checkpoints, position),
        common.StopOnNaN(),
        *([budget] if budget else []),
    ]
    order = recipe.output / f"order-{arguments.process_index}.jsonl" if recipe.record_order else None
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        callbacks=callbacks,
        sampler=RunSampler(shards, recipe.seed, arguments.max_steps * samples_per_step),
        rejects=Rejects(recipe.output / "rejects.jsonl", len(shards), recipe.data.max_reject_share),
        order=order,
        cache=open_cache(recipe.encoder_cache, model),
    )
    common.quiet(trainer)
    return trainer


def warn_if_endless(collator: SFTCollator, model: Any) -> None:
    """A model that learns to end its turn with a token that generation does not stop at talks on for ever."""
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, (list, tuple)) else {stops}
    end = int(collator._reply_ids(collator.processor.render([{"role": "assistant", "content": "x"}]))[-1])
    if end not in stops:
        warnings.warn(
            f"the turn ends with token {end}, but generation stops at {sorted(map(str, stops))}", stacklevel=2
        )
