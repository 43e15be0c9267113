"""Supervised fine-tuning: the Transformers ``Trainer`` on shards of questions with answers.

One optimizer step sees the same samples however the batch is laid out (processes × accumulation × batch size), and the
loss is the mean over the supervised tokens of the whole step, so that the layout does not change the learning curve.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from audio_llm import files
from audio_llm.language.prompts import ORDERS
from audio_llm.training.callbacks import BudgetedSchedule
from audio_llm.training.encoder_cache import EncoderCache
from audio_llm.training.examples import IGNORED, Examples, Rejects, RunSampler, collate, open_shards, reply_ids
from audio_llm.training.recipes import SFTRecipe
from audio_llm.training.run import PolicyRun, trainer_settings


def run(recipe: SFTRecipe) -> dict[str, Any]:
    """Train, evaluate, export; returns what ``result.json`` holds. Resumes by itself (``resume: auto``)."""
    arguments = training_arguments(recipe)
    samples_per_step = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    position = {"samples_per_step": samples_per_step, "style": recipe.data.style, "max_length": recipe.data.max_length}
    with PolicyRun(recipe, arguments, samples_per_step, position) as run:
        if run.finished is not None:
            return run.finished
        trainer = build_trainer(run, recipe, run.load_model())
        result = run.train(trainer)
        result["samples"] = result["steps"] * samples_per_step
        result["epochs"] = result["samples"] / len(run.shards)
        if recipe.data.validation:
            last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), None)
            fresh = last if last and last["step"] == result["steps"] else trainer.evaluate()
            result |= {key: fresh[key] for key in ("eval_loss", "eval_tokens")}
        return run.finish(trainer, result)


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
        **trainer_settings(recipe),
    )


def build_trainer(run: PolicyRun, recipe: SFTRecipe, model: Any) -> SFTTrainer:
    """The trainer of `run` with its data."""
    data = recipe.data
    warn_if_endless(run.processor, model)
    taught = set(ORDERS[:1] if data.order_share == 0 else ORDERS) | set(model.config.orders or ())
    model.config.orders = [order for order in ORDERS if order in taught]
    validation = None
    if data.validation:
        shards, limit = open_shards(data.validation, run.processor, data), data.validation_samples
        how: dict[str, Any] = {"max_length": data.max_length, "hearing": data.hearing}
        validation = Examples(shards, run.processor, data.style, limit=limit, **how)
    return SFTTrainer(
        train_dataset=Examples(
            run.shards,
            run.processor,
            data.style,
            max_length=data.max_length,
            silent_share=data.silent_share,
            swap_share=data.swap_share,
            order_share=data.order_share,
            seed=recipe.seed,
            hearing=data.hearing,
        ),
        eval_dataset=validation,
        data_collator=functools.partial(collate, tokenizer=run.processor.tokenizer),
        order_log=recipe.output / f"order-{run.arguments.process_index}.jsonl" if recipe.record_order else None,
        **run.trainer_arguments(model),
    )


def warn_if_endless(processor: Any, model: Any) -> None:
    """A model that learns to end its turn with a token that generation does not stop at talks on for ever."""
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, (list, tuple)) else {stops}
    end = int(reply_ids(processor.tokenizer, processor.render([{"role": "assistant", "content": "x"}]))[-1])
    if end not in stops:
        warnings.warn(
            f"the turn ends with token {end}, but generation stops at {sorted(map(str, stops))}", stacklevel=2
        )


class SFTTrainer(BudgetedSchedule, Trainer):
    """``Trainer`` with our sample order, rejects, evaluation weighted by tokens, and a schedule by the clock."""

    control: Any  # what the callbacks ask for, as Trainer keeps it

    def __init__(
        self,
        *,
        order: RunSampler,
        rejects: Rejects,
        order_log: Path | None,
        cache: EncoderCache | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.order, self.rejects, self.order_log, self.cache = order, rejects, order_log, cache

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.order

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids, rejects = inputs.pop("ids", []), inputs.pop("rejects", [])
        self.rejects.add(rejects)
        if self.order_log is not None and model.training:
            files.append_line(self.order_log, {"step": self.state.global_step + 1, "ids": ids})
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
