"""Supervised training of an audio encoder: the loop that all tasks share (:mod:`audio_llm.tasks.base`).

One loop on accelerate, for one process or several: :meth:`TaskTrainer.fit`. Every draw is a function of (seed, step,
rank), so a checkpoint needs weights, optimizer and step, and a run that was killed repeats what the uninterrupted one
would have done. The Transformers ``Trainer``, which fine-tuning uses, gives the same weights here at the same speed;
what is particular (batches that several clips make together, a moving average, means over every step, layers with
rates of their own) would have to be hooked into it one by one, and takes more lines there than the loop itself.

An output folder has ``recipe.yaml``, the encoder with its heads (the best so far, by validation), ``metrics.jsonl``,
which holds only what a run repeats to the digit, ``timing.jsonl``, ``tensorboard/``, while it runs ``checkpoint.pt``,
and once it is finished ``summary.json`` and ``rejects.jsonl``.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object, send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from audio_llm import config as recipes
from audio_llm.datasets import folders
from audio_llm.datasets.reverberation import read_classes
from audio_llm.datasets.sounds import tidy
from audio_llm.encoders.published import read_json
from audio_llm.errors import CheckpointError, ConfigError, TrainingError, describe
from audio_llm.files import append_line, atomic_file, only_writer, write_json, write_lines
from audio_llm.identity import Identity, empty, identity_of, settle, start_digest
from audio_llm.identity import write as write_identity
from audio_llm.model.encoder import AudioEncoder, build_encoder, freeze_below
from audio_llm.model.folder import CONFIG, WEIGHTS, load_encoder, load_strictly
from audio_llm.tasks.base import TASKS, TaskRecipe, load_recipe
from audio_llm.tasks.clips import Batch, BatchPlan, ClipStore, collate, spec_augment
from audio_llm.tasks.supervised import SupervisedTask
from audio_llm.training.callbacks import forget_after
from audio_llm.training.launch import check_launch
from audio_llm.training.policy import resolve_precision
from audio_llm.training.run import prepare_torch
from audio_llm.training.trackers import CURVES, Trackers

# Metrics hold what a run repeats to the digit; what the clock says stands beside them.
CHECKPOINT, METRICS, TIMING, SUMMARY = "checkpoint.pt", "metrics.jsonl", "timing.jsonl", "summary.json"


def layer_of(name: str, prefixes: list[str]) -> int:
    """Layer of a parameter of encoder and heads: 0 is the input's, 1 … n those of `prefixes`, n + 1 the heads'."""
    if not name.startswith("encoder.") or "cls_tokens" in name:
        return len(prefixes) + 1
    inner = name.removeprefix("encoder.")
    return next((number for number, prefix in enumerate(prefixes, 1) if inner.startswith(prefix)), 0)


def parameter_groups(model: SupervisedTask, recipe: TaskRecipe) -> list[dict[str, Any]]:
    """AdamW groups: vectors, positions and cls tokens are not decayed; deeper layers may learn faster."""
    prefixes = model.encoder.layer_prefixes
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or "cls_tokens" in name
            groups.setdefault((layer_of(name, prefixes), plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": recipe.layer_decay ** (len(prefixes) + 1 - layer),
            "weight_decay": 0.0 if plain else recipe.weight_decay,
        }
        for (layer, plain), parameters in sorted(groups.items())
    ]


def names_of(table: Path) -> dict[str, str]:
    """Class names by AudioSet's identifiers, and by these as sound folders give them: without "_" and "/"."""
    names = read_classes(table)
    for mid, name in list(names.items()):
        for written in (mid, mid.replace("/", "_")):
            names.setdefault(tidy(written), name)
    return names


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Average of weights and statistics; it follows faster at first, so that the start is soon forgotten."""

    def average(kept: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        if not kept.is_floating_point():
            return new
        count = int(count)
        return torch.lerp(new, kept, min(decay, (1 + count) / (10 + count)))

    return AveragedModel(model, avg_fn=average, use_buffers=True)


def rate_at(progress: float, recipe: TaskRecipe) -> float:
    """Learning rate at a share of the run: linear warm-up, then half a cosine down to ``minimum_rate``."""
    if progress < recipe.warmup_share:
        return recipe.learning_rate * max(progress / recipe.warmup_share, 1e-3)
    share = min((progress - recipe.warmup_share) / (1.0 - recipe.warmup_share), 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return recipe.learning_rate * (recipe.minimum_rate + (1.0 - recipe.minimum_rate) * cosine)


class TaskTrainer:
    """One run. `fit` trains and validates; the folder then holds the best encoder, its heads and the metrics."""

    def __init__(self, recipe: TaskRecipe) -> None:
        recipe.check()
        prepare_torch()
        self.recipe = recipe
        self.accelerator = Accelerator(
            mixed_precision="bf16" if resolve_precision(recipe.precision, cpu=True) == "bf16" else "no",
            cpu=not torch.cuda.is_available(),  # said aloud: without it, a launch on CPUs becomes single processes
        )
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ConfigError(
                describe("launch of encoder training", "plain data parallel", str(self.accelerator.distributed_type))
            )
        check_launch(self.accelerator.num_processes, recipe.processes)
        torch.manual_seed(recipe.seed)
        encoder = load_encoder(recipe.init) if recipe.init else build_encoder(recipe.encoder)
        encoder.gradient_checkpointing = recipe.gradient_checkpointing
        self.names = names_of(recipe.classes) if recipe.classes else {}
        self.store = self._store(recipe.train, encoder, recipe.train_folds, recipe.validation_folds)
        self.validation: ClipStore | None = None
        if recipe.validation or recipe.validation_folds:
            folders = [recipe.validation] if recipe.validation else recipe.train
            self.validation = self._store(folders, encoder, recipe.validation_folds)
        names = [self.names.get(name, name) for name in recipe.labels or self.store.class_names]
        if recipe.classes and not set(names) & set(self.names.values()):
            told = f"{len(set(self.names.values()))} others than {', '.join(names[:2])} …"
            raise ConfigError(describe(f"classes {recipe.classes}", f"names of the {len(names)} labels", told))
        self.labels = {name: index for index, name in enumerate(names)}
        self._check_events()
        encoder.augment = spec_augment(recipe.augment)
        self.plan = BatchPlan(
            self.store,
            recipe.augment,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.raw: SupervisedTask = TASKS.find(recipe.task).module(encoder, names, recipe)
        if recipe.channels_last:
            self.raw.to(memory_format=torch.channels_last)
        self.still = [] if recipe.unfreeze is None else freeze_below(encoder, recipe.unfreeze)
        optimizer = torch.optim.AdamW(parameter_groups(self.raw, recipe), lr=recipe.learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(self.raw, optimizer)
        self.average = moving_average(self.raw, recipe.ema) if recipe.ema else None
        self.step, self.best = 0, -math.inf
        self.started = time.monotonic()  # of the loop; in a resumed run so much earlier as it had run before
        self.sums: dict[str, float] = {}  # of the steps since the last line of the log
        self.identity, self.starts = self._identity()
        self.trackers: Trackers | None = None

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def seconds(self) -> float:
        """Wall clock of the loop, over all resumes."""
        return time.monotonic() - self.started

    @property
    def kept(self) -> SupervisedTask:
        """The weights that are validated and saved: the moving average, where there is one."""
        return cast(SupervisedTask, self.average.module) if self.average is not None else self.raw

    def _store(
        self,
        folders: list[Path],
        encoder: AudioEncoder,
        folds: list[int | str] | None,
        without: list[int | str] | None = None,
    ) -> ClipStore:
        recipe = self.recipe
        return ClipStore(
            folders,
            encoder,
            folds=None if folds is None else [str(fold) for fold in folds],
            without=[str(fold) for fold in without or ()],
            use_test_fold=recipe.use_test_fold,
            hearing=recipe.hearing,
            whole=recipe.clip_level,
            names=self.names,
            memory_gib=recipe.memory_gib,
            max_reject_share=recipe.max_reject_share,
        )

    def _check_events(self) -> None:
        """Raise :class:`TrainingError` where no event has what the task learns, or one an unknown label."""
        for store in filter(None, (self.store, self.validation)):
            if self.recipe.places and not store.placed:
                cure = "Labelled sounds have none: make clips of them with audio-llm prep recipes/seld/clips.yaml."
                expected = "events with an azimuth and a distance"
                raise TrainingError(describe(f"{store.name}, task {self.recipe.task}", expected, "none", cure))
            unknown = sorted(store.labels - set(self.labels))
            if unknown:
                cure = "Give the full list as 'labels' in the recipe."
                raise TrainingError(
                    describe(store.name, f"labels among {len(self.labels)} known", f"'{unknown[0]}'", cure)
                )

    def _identity(self) -> tuple[Identity, list[Path]]:
        """Everything that decides the weights, and the folder that training begins with."""
        digests: dict[str, Any] = {"labels": list(self.labels)}
        for key, store in (("train", self.store), ("validation", self.validation)):
            if store:
                digests[key] = store.dataset.fingerprint
        init, published = self.recipe.init, self.recipe.encoder.get("published")
        starts = [Path(init)] if init else [Path(published)] if published else []
        if starts:
            names = (CONFIG, WEIGHTS) if init else ("",)  # not the log of a run there, which may grow meanwhile
            digests |= {
                f"{'init' if init else 'encoder'} {name}".strip(): start_digest(starts[0] / name) for name in names
            }
        return identity_of(self.recipe, digests, ("train", "validation", "init", "classes")), starts

    # -------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> dict[str, Any]:
        """Train to the end of the budget, from the last checkpoint on; returns the scores of the kept weights."""
        recipe, closing = self.recipe, contextlib.ExitStack()
        with closing:
            if self.main:
                closing.enter_context(only_writer(recipe.output))
            finished = self._resume()
            return self._loop() if finished is None else finished

    def _loop(self) -> dict[str, Any]:
        """:meth:`fit` from where the run stands."""
        from tqdm import tqdm

        recipe = self.recipe
        bar = tqdm(total=recipe.steps, initial=self.step, desc=recipe.task, unit="step", disable=not self.main)
        for batch in self.plan.batches(self.step):
            if (progress := self._progress()) >= 1.0:
                break
            self._update(batch, progress)
            self.step += 1
            bar.update()
            if self.step % recipe.log_steps == 0:
                bar.set_postfix(loss=f"{self._log():.3f}")
            if recipe.eval_steps and self.step % recipe.eval_steps == 0:
                self._validate()
            if recipe.save_steps and self.step % recipe.save_steps == 0:
                self._save()
        bar.close()
        return self._finish()

    def _progress(self) -> float:
        """Share of the run that is done, by the nearer of its limits; all processes follow the clock of the first."""
        recipe = self.recipe
        steps = self.step / recipe.steps if recipe.steps is not None else 0.0
        if recipe.seconds is None:
            return steps
        return max(steps, broadcast_object_list([self.seconds])[0] / recipe.seconds)

    def _update(self, batch: Batch, progress: float) -> None:
        """One step of the optimizer; what it measured is added to the sums of the log."""
        seeds = np.random.SeedSequence([self.recipe.seed, self.step, self.accelerator.process_index, 2])
        torch.manual_seed(int(seeds.generate_state(1)[0]))  # stochastic depth and SpecAugment
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(progress, self.recipe) * group["scale"]
        self.model.train()
        for module in self.still:
            module.training = False
        waveform, lengths, targets = self._on_device(batch)
        loss, parts = self.model(waveform, lengths, *targets)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.raw)
        for what, value in (("loss", loss), ("gradient", norm)):  # either makes the weights NaN
            if not torch.isfinite(value):
                cure = "Lower learning_rate, or use precision=fp32."
                raise TrainingError(describe(f"step {self.step + 1}", f"a finite {what}", str(float(value)), cure))
        for name, value in {"loss": loss.detach(), "gradient_norm": norm, **parts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """Waveforms ``(batch, channels, time)``, lengths ``(batch,)`` and the task's targets."""
        return send_to_device((batch.waveform, batch.lengths, self.raw.targets(batch)), self.accelerator.device)

    def _log(self) -> float:
        """Write down the mean of every value since the last line, over all processes; returns that of the loss."""
        shares = torch.tensor(list(self.sums.values()), device=self.accelerator.device) / self.recipe.log_steps
        mean = dict(zip(self.sums, self.accelerator.reduce(shares, "mean").tolist(), strict=True))
        self.sums = {}
        rate = self.optimizer.param_groups[-1]["lr"]
        self._record({"samples": self.step * self.recipe.batch_size, "rate": rate} | mean)
        if self.main:
            append_line(self.recipe.output / TIMING, {"step": self.step, "seconds": round(self.seconds, 3)})
        return mean["loss"]

    def _record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its points in the recipe's trackers."""
        if self.main:
            append_line(self.recipe.output / METRICS, {"step": self.step} | values)
        if self.trackers is not None:
            groups = {name: "validation" if name.startswith("validation_") else "train" for name in values}
            drawn = {f"{groups[name]}/{name.removeprefix('validation_')}": value for name, value in values.items()}
            self.trackers.log(drawn, self.step)

    # ------------------------------------------------------------------------------------------------ validation

    def evaluate(self) -> dict[str, Any]:
        """Scores on the validation folder; every process takes its share of the clips."""
        if self.validation is None:
            return {}
        kept = self.kept.eval()
        for buffer in kept.buffers():
            broadcast(buffer)  # in place: batch statistics of the first process are those that are saved
        mine = range(self.accelerator.process_index, len(self.validation), self.accelerator.num_processes)
        parts: list[Any] = []
        for start in range(0, len(mine), self.recipe.eval_batch_size):
            clips = self.validation.readable(mine[start : start + self.recipe.eval_batch_size])
            if not clips:
                continue
            batch = collate(clips, self.validation.channels, self.validation.window)
            inputs = self._on_device(batch)
            with torch.inference_mode(), self.accelerator.autocast():
                parts.append(kept.observe(*inputs, batch))
        return kept.summarise(gather_object(parts))

    def _validate(self) -> dict[str, Any]:
        """Validate; keep the weights when they are the best so far (always, without a validation folder)."""
        scores = self.evaluate()
        if scores:
            self._record({f"validation_{name}": value for name, value in scores.items()})
        score = scores.get("score", math.inf)
        if score >= self.best:
            self.best = score
            if self.main:
                self.kept.save(self.recipe.output)
        return scores

    # -------------------------------------------------------------------------------------------- saving, resuming

    def _save(self) -> None:
        if not self.main:
            return
        state = {
            "model": self.raw.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.seconds,
            "best": self.best,
            "sums": self.sums,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        with atomic_file(self.recipe.output / CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> dict[str, Any] | None:
        """Make the output folder ready and restore the last checkpoint; the scores of a run that is complete."""
        output, elapsed = self.recipe.output, 0.0
        output.mkdir(parents=True, exist_ok=True)
        made = (CHECKPOINT, SUMMARY, WEIGHTS)
        old = self.recipe.resume != "never" and settle(output, self.identity, lambda path: load_recipe(path)[1], made)
        if old and (output / SUMMARY).is_file() and (output / WEIGHTS).is_file():
            summary = read_json(output / SUMMARY, "the summary of a finished run")
            if self.main:
                print(f"{output}: this run was finished before; resume=never makes it again")
            return summary["scores"]
        if old and (output / CHECKPOINT).is_file():
            elapsed = self._restore(output / CHECKPOINT)
        self.accelerator.wait_for_everyone()  # all have read the folder before the first process changes it
        if self.main:
            if self.step == 0:  # nothing to go on from: what another run left is not this one's
                empty(output, (CHECKPOINT, SUMMARY, METRICS, TIMING, WEIGHTS, *CURVES), self.starts)
            write_identity(output, self.identity)
            forget_after(output / METRICS, self.step)
            forget_after(output / TIMING, self.step)
            recipes.dump(self.recipe, output / "recipe.yaml")
            self.trackers = Trackers(self.recipe.report_to, output, identity_of(self.recipe).recipe, self.step)
        self.started = time.monotonic() - elapsed
        return None

    def _restore(self, path: Path) -> float:
        """Go on from a checkpoint; returns the seconds that the loop had run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            cure = "Set resume=never to start over."
            raise CheckpointError(describe(str(path), "a checkpoint", f"{type(error).__name__}", cure)) from error
        load_strictly(self.raw, state["model"], str(path))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            load_strictly(self.average, state["average"], str(path))
        self.step, self.best, self.sums = state["step"], state["best"], state["sums"]
        return state["elapsed"]

    def _finish(self) -> dict[str, Any]:
        scores = self._validate()
        kept = scores if scores.get("score", math.inf) >= self.best else {"score": self.best}
        if self.main:
            output = self.recipe.output
            summary = {
                "steps": self.step,
                "samples": self.step * self.recipe.batch_size,
                "seconds": round(self.seconds, 1),
                "parameters": sum(parameter.numel() for parameter in self.raw.parameters()),
                "scores": kept,
                "last_scores": scores,
            }
            write_json(output / SUMMARY, summary)
            (output / CHECKPOINT).unlink(missing_ok=True)
            write_lines(output / "rejects.jsonl", [*self.store.rejects, *self.store.left_out])
            if self.trackers is not None:
                self.trackers.close()
        self.accelerator.wait_for_everyone()
        return kept


def train(recipe: TaskRecipe) -> dict[str, Any]:
    """Train by a recipe and print the scores of the kept weights; returns them."""
    trainer = TaskTrainer(recipe)
    if trainer.main:
        clips, rejects = len(trainer.store), len(trainer.store.rejects)
        print(f"{clips} clips of {len(trainer.labels)} classes ({rejects} rejected), output {recipe.output}")
        for line in (folders.told(trainer.store.left_out), *trainer.store.unusable):
            if line:
                print(line)
    scores = trainer.fit()
    if trainer.main:
        for name, value in scores.items():
            print(f"  {name:<24} {value:.3f}")
    trainer.accelerator.end_training()
    return scores
