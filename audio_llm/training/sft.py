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
from torch.utils.data import ConcatDataset, Dataset, Sampler
from transformers import Trainer, TrainingArguments

from audio_llm import files
from audio_llm.language.prompts import ORDERS
from audio_llm.training import contribution
from audio_llm.training.contribution import ListeningCheck
from audio_llm.training.encoder_cache import EncoderCache
from audio_llm.training.examples import IGNORED, Examples, collate, open_shards, pad
from audio_llm.training.order import RunSampler
from audio_llm.training.passes import PassesByLength
from audio_llm.training.recipes import SFTRecipe
from audio_llm.training.rejects import Rejects
from audio_llm.training.run import PolicyRun, trainer_settings
from audio_llm.training.schedule import ScheduledTrainer
from audio_llm.training.settings import arguments


def run(recipe: SFTRecipe) -> dict[str, Any]:
    """Train, evaluate, export; returns what ``result.json`` holds. Resumes by itself (``resume: auto``)."""
    settings = training_arguments(recipe)
    samples_per_step = recipe.batch_size * recipe.gradient_accumulation * settings.world_size
    position = {"samples_per_step": samples_per_step, "style": recipe.data.style, "max_length": recipe.data.max_length}
    with PolicyRun(recipe, settings, samples_per_step, position) as run:
        if run.finished is not None:
            return run.finished
        trainer = build_trainer(run, recipe, run.load_model())
        result = run.train(trainer)
        result["samples"] = result["steps"] * samples_per_step
        result["epochs"] = result["samples"] / run.epoch_size
        if (stages := trainer.stages()) is not None:
            result["stages"] = stages.lengths(result["steps"])
        return run.finish(trainer, result | run.validate(trainer, result["steps"]))


def training_arguments(recipe: SFTRecipe) -> TrainingArguments:
    """The recipe in Trainer's words, but for ``max_steps``. Building it sets up the process group and DeepSpeed."""
    ours = trainer_settings(recipe) | {
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "eval_strategy": "steps" if recipe.eval_steps and recipe.data.validation else "no",
        "eval_steps": recipe.eval_steps,
        "dataloader_num_workers": recipe.data.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_persistent_workers": recipe.data.workers > 0,
        # a stage that freezes what another trains leaves it without gradients
        "ddp_find_unused_parameters": any(stage.train != recipe.trained() for stage in recipe.stage_recipes()),
        "label_names": ["labels"],
    }
    return arguments(TrainingArguments, "trainer", ours, recipe.trainer)


def build_trainer(run: PolicyRun, recipe: SFTRecipe, model: Any) -> SFTTrainer:
    """The trainer of `run` with its data."""
    data = recipe.data
    warn_if_endless(run.processor, model)
    taught = set(ORDERS if any(stage.order_share for stage, _ in run.data) else ORDERS[:1]) | set(
        model.config.orders or ()
    )
    model.config.orders = [order for order in ORDERS if order in taught]
    validation = None
    if data.validation:
        shards, limit = open_shards(data.validation, run.processor, data), data.validation_samples
        how: dict[str, Any] = {"max_length": data.max_length, "hearing": data.hearing}
        validation = Examples(shards, run.processor, data.style, limit=limit, **how)
    train = [
        Examples(
            shards,
            run.processor,
            stage.style,
            max_length=data.max_length,
            silent_share=stage.silent_share,
            swap_share=stage.swap_share,
            order_share=stage.order_share,
            seed=recipe.seed,
            hearing=data.hearing,
            cache=run.cache,
        )
        for stage, shards in run.data
    ]
    check = ListeningCheck(recipe.on_no_contribution, recipe.contribution_steps)
    trainer = SFTTrainer(
        train_dataset=ConcatDataset(train),
        eval_dataset=validation,
        data_collator=functools.partial(collate, tokenizer=run.processor.tokenizer),
        order_log=recipe.output / f"order-{run.arguments.process_index}.jsonl" if recipe.record_order else None,
        short_replies=data.style in ("answer", "plain"),
        **run.trainer_arguments(model, checks=[check]),
    )
    check.before = trainer.aligned
    return trainer


def warn_if_endless(processor: Any, model: Any) -> None:
    """A model that learns to end its turn with a token that generation does not stop at talks on for ever."""
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, (list, tuple)) else {stops}
    end = processor.turn_end
    if end not in stops:
        warnings.warn(
            f"the turn ends with token {end}, but generation stops at {sorted(map(str, stops))}", stacklevel=2
        )


class SFTTrainer(PassesByLength, ScheduledTrainer, Trainer):
    """``Trainer`` with our sample order, passes, rejects, evaluation weighted by tokens, and our schedules."""

    control: Any  # what the callbacks ask for, as Trainer keeps it

    def __init__(
        self,
        *,
        order: RunSampler,
        rejects: Rejects,
        order_log: Path | None,
        short_replies: bool = False,
        cache: EncoderCache | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.order, self.rejects, self.order_log, self.cache = order, rejects, order_log, cache
        self.short_replies = short_replies

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.order

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids, rejects = inputs.pop("ids", []), inputs.pop("rejects", [])
        self.rejects.add(rejects)
        if self.order_log is not None and model.training:
            files.append_line(self.order_log, {"step": self.state.global_step + 1, "ids": ids})
        words = inputs.pop("words", [])
        if model.training and self.aligns:  # a mean over samples, not over tokens
            inputs = self._listen({key: value for key, value in inputs.items() if key != "labels"})
            inputs["heard"] = pad(words, IGNORED)
            loss = super().compute_loss(model, inputs, *args, **kwargs | {"num_items_in_batch": None})
            return loss / self.current_gradient_accumulation_steps
        return super().compute_loss(model, self._listen(inputs), *args, **kwargs)

    def _listen(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with the encoder's tokens from the cache in place of samples, where there is a cache."""
        kept = inputs.pop("kept", [])
        if self.cache is None or not (kept or "input_audio" in inputs):
            return inputs
        heard = self.cache(inputs.pop("input_audio", None), inputs.pop("audio_lengths", None), kept)
        return inputs | {"audio_tokens": heard}

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token, every sample once (Trainer's is a mean over batches), and what the sound
        contributes to it."""
        loader, model = self.get_eval_dataloader(eval_dataset), self.model
        assert model is not None and self.accelerator is not None
        model.eval()
        rows = []  # (batch, 7): scores with the sound, scores with silence, whether there is sound
        for batch in loader:
            self.rejects.add(batch.pop("rejects"))
            del batch["words"]
            batch = self._prepare_inputs(batch)
            labels = batch["labels"][:, 1:]
            inputs = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
            silent = inputs | {k: torch.zeros_like(v) for k, v in inputs.items() if k == "input_audio"}
            sound = (inputs["input_ids"] == model.config.audio_token_id).any(1, keepdim=True)
            scores = [self._score(model, self._listen(version), labels) for version in (inputs, silent)]
            rows.append(self.accelerator.gather_for_metrics(torch.cat([*scores, sound.float()], dim=1)).double().cpu())
        metrics = contribution.summarise(torch.cat(rows), self.short_replies, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return contribution.score(model(**inputs).logits, labels)
