"""Supervised fine-tuning: the Transformers ``Trainer`` on shards of questions with answers.

One optimizer step sees the same samples however the batch is laid out (processes × accumulation × batch size), and the
loss is the mean over the supervised tokens of the whole step, so that the layout does not change the learning curve.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from audio_llm import files
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import callbacks as callbacks_module
from audio_llm.training import policy
from audio_llm.training import run as run_module
from audio_llm.training.encoder_cache import EncoderCache, open_cache
from audio_llm.training.examples import IGNORED, Rejects, RunSampler, SFTCollator, SupervisedDataset, open_shards
from audio_llm.training.policy import EncoderTraining, LoRARecipe, ModelRecipe, Precision, ProjectorTraining
from audio_llm.training.run import planned_steps


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

    verb: ClassVar[str] = "sft"
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


# --------------------------------------------------------------------------------------------------------- the trainer


class SFTTrainer(callbacks_module.BudgetedSchedule, Trainer):
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
        **run_module.trainer_settings(recipe),
    )


def stream_position(recipe: SFTRecipe, shards: ShardDataset, samples_per_step: int) -> dict[str, Any]:
    """What decides which samples a step sees; a checkpoint carries it, and a resumed run must agree."""
    return {
        "data": run_module.data_hash(recipe.data.train),
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
    from audio_llm.model.build import load_processor

    run_module.prepare_torch()
    run_module.check_build_locks()
    arguments = training_arguments(recipe)
    run_module.check_launch(arguments.world_size, recipe.processes)
    main = arguments.process_index == 0
    start = policy.starting_folder(recipe.model, recipe.output)
    processor = load_processor(start)
    shards = open_shards(recipe.data.train, processor, recipe.data.max_reject_share)
    samples_per_step = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    arguments.max_steps = planned_steps(recipe, len(shards), samples_per_step)
    position = stream_position(recipe, shards, samples_per_step)
    done, checkpoint = run_module.claim(recipe, position)
    if done is not None:
        return done

    # FSDP shards weights of one dtype only, and without LoRA every weight is trained, that is float32.
    mixed = arguments.bf16 and recipe.lora is not None and not arguments.fsdp
    model = policy.trained_model(recipe, start, torch.bfloat16 if mixed else torch.float32)

    trainer = build_trainer(recipe, arguments, model, processor, shards, position)
    if main and checkpoint:
        print(f"resuming from {checkpoint}")
    started = time.monotonic()
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AudioLLMError as error:
        raise run_module.plain_error(error) from None
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
    result["exported"] = run_module.exported(recipe, trainer, processor)
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
    budget = callbacks_module.TimeBudget(recipe.seconds) if recipe.seconds is not None else None
    callbacks = [
        callbacks_module.MetricsFile(recipe.output / "metrics.jsonl", samples_per_step, len(shards)),
        callbacks_module.Checkpoints(recipe.output, recipe.keep_checkpoints, position),
        callbacks_module.StopOnNaN(),
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
    callbacks_module.quiet(trainer)
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
