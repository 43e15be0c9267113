"""Learning rates over a run: of each part of the model, over steps or seconds, from stage to stage.

A run without stages has Trainer's own schedules, or under a budget of seconds one by the clock. Stages are stretches of
steps of one run, with one optimizer: each part of the model has parameter groups of its own, whose rates begin anew
with every stage, and a part that a stage freezes takes no gradients in it. So there is nothing to hand over between
stages, and a checkpoint in the middle of one is a checkpoint like any other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from audio_llm.errors import ConfigError
from audio_llm.training.order import RunSampler
from audio_llm.training.policy import part_of
from audio_llm.training.recipes import PolicyRecipe

NO_END = 10**6  # steps of what the clock alone ends: more than ever fit


def planned_steps(recipe: PolicyRecipe, epoch_size: float, samples_per_step: int) -> int:
    """Optimizer steps of the run: the smaller of `steps` and `epochs`; with `seconds` alone, more than ever fit."""
    limits = []
    if recipe.steps is not None:
        limits.append(recipe.steps)
    if recipe.epochs is not None:
        limits.append(math.ceil(recipe.epochs * epoch_size / samples_per_step))
    if not limits and recipe.seconds is None:
        raise ConfigError("recipe: expected steps, epochs or seconds; found none, so the run would have no end.")
    return min(limits) if limits else NO_END


class JoinedOrders(Sampler[int]):
    """The order of a run whose stages have data of their own: one sampler after the other, over the joined data."""

    def __init__(self, orders: Sequence[RunSampler]):
        self.orders = list(orders)

    def __len__(self) -> int:
        return sum(len(order) for order in self.orders)

    def __iter__(self) -> Iterator[int]:
        before = 0
        for order in self.orders:
            for index in order:
                yield before + index
            before += len(order.shards)


class TimeBudget(TrainerCallback, ExportableState):
    """Stop after `seconds` of training, counted from the first step (after loading and compiling), over all resumes.

    All processes follow the clock of the first one, so that they stop at, and schedule by, the same step.
    """

    def __init__(self, seconds: float, elapsed: float = 0.0):
        self.seconds, self.elapsed, self._last = seconds, elapsed, time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds}, "attributes": {"elapsed": self.elapsed}}

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, 0 to 1."""
        return min(self.elapsed / self.seconds, 1.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(args.device)
        if self.elapsed >= self.seconds:
            stop(args, control)
        return control

    def tick(self, device: torch.device) -> None:
        """Count the time since the last call."""
        now = time.monotonic()
        elapsed = torch.tensor(self.elapsed + now - self._last, dtype=torch.float64, device=device)
        self._last = now
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(elapsed, src=0)
        self.elapsed = float(elapsed)


def stop(args: Any, control: Any) -> None:
    """End the run after this step, which is kept where the run keeps any."""
    control.should_training_stop = True
    control.should_save = args.save_strategy != "no"


class Stages(TimeBudget):
    """The stages of a run, one after the other: `stages` are plain groups of `steps`, `seconds` (None: not counted),
    `rates` (the learning rate of each part, 0: frozen), `schedule`, `warmup_steps` and `objective`. One that aligns is
    not validated, for it teaches no replies.

    `begun` holds the step at which each stage began, `elapsed` the seconds of the one at hand.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]]):
        super().__init__(math.inf)
        self.stages, self.begun = list(stages), [0]
        self._learning: dict[str, list[nn.Parameter]] = {}

    @classmethod
    def of(cls, recipes: Sequence[PolicyRecipe], planned: Sequence[int]) -> Stages:
        """Of the recipe and the steps of each stage."""
        return cls(
            [
                {"steps": steps if steps < NO_END else None, "seconds": recipe.seconds, "rates": recipe.rates()}
                | {"schedule": recipe.schedule, "warmup_steps": recipe.warmup_steps}
                | {"objective": getattr(recipe, "objective", "reply")}
                for recipe, steps in zip(recipes, planned, strict=True)
            ]
        )

    def state(self) -> dict[str, Any]:
        return {"args": {"stages": self.stages}, "attributes": {"begun": self.begun, "elapsed": self.elapsed}}

    @property
    def stage(self) -> Mapping[str, Any]:
        """The one at hand."""
        return self.stages[len(self.begun) - 1]

    @property
    def aligns(self) -> bool:
        """Whether the one at hand does."""
        return self.stage.get("objective") == "align"

    def aligned(self, steps: int) -> int:
        """How many of the first `steps` were spent on it."""
        spent = zip(self.stages, self.lengths(steps), strict=False)
        return sum(length for stage, length in spent if stage.get("objective") == "align")

    def number(self, step: int) -> int:
        """Which stage the `step` belongs to, both counted from 1."""
        return max(sum(begun < step for begun in self.begun), 1)

    def lengths(self, steps: int) -> list[int]:
        """Steps of each stage that has begun, after `steps` of the run."""
        return [end - begun for begun, end in zip(self.begun, [*self.begun[1:], steps], strict=True)]

    def rate(self, part: str, step: int) -> float:
        """The learning rate of `part` after `step` steps of the run."""
        stage, done = self.stage, max(step - self.begun[-1], 0)
        warmup = min(1.0, (done + 1) / stage["warmup_steps"]) if stage["warmup_steps"] else 1.0
        shares = [done / stage["steps"]] if stage["steps"] else []
        shares += [self.elapsed / stage["seconds"]] if stage["seconds"] else []
        return stage["rates"][part] * warmup * decay(stage["schedule"], min(max(shares), 1.0))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._learning.setdefault(part_of(name), []).append(parameter)
        self._freeze()

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.tick(args.device)
        control.should_evaluate = control.should_evaluate and not self.aligns
        stage, done = self.stage, state.global_step - self.begun[-1]
        if not (stage["steps"] and done >= stage["steps"] or stage["seconds"] and self.elapsed >= stage["seconds"]):
            return control
        if len(self.begun) == len(self.stages):
            stop(args, control)
            return control
        self.begun.append(state.global_step)
        self.elapsed = 0.0
        self._freeze()
        for group in optimizer.param_groups:  # the scheduler has set those of the stage before
            group["lr"] = self.rate(group["part"], state.global_step)
        return control

    def _freeze(self) -> None:
        from accelerate.state import AcceleratorState

        if AcceleratorState().deepspeed_plugin is not None:
            return  # it counts on the gradients it was set up with; a rate of zero holds the part as well
        for part, parameters in self._learning.items():
            for parameter in parameters:
                parameter.requires_grad_(self.stage["rates"][part] > 0)
                parameter.grad = None


def decay(schedule: str, progress: float) -> float:
    """The share of the rate that is left after `progress` (0 to 1) of the way."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


class ScheduledTrainer:
    """A mix-in for Trainer: parameter groups for each part of the model, where `rates` (by part) are given, and the
    schedules of :class:`Stages` and :class:`TimeBudget`. Under a budget the rate decays with steps or time, whichever
    is ahead."""

    args: Any
    model: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    callback_handler: Any

    def __init__(self, *args: Any, rates: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        self.rates, self._made_at = rates, dict[str, float]()
        super().__init__(*args, **kwargs)

    def stages(self) -> Stages | None:
        """The run's, where it is divided."""
        found: Stages | None = self._budget(Stages)
        return found

    @property
    def aligns(self) -> bool:
        """Whether the stage at hand does."""
        return (stages := self.stages()) is not None and stages.aligns

    def aligned(self, steps: int) -> int:
        """How many of the first `steps` of the run were spent on it."""
        return 0 if (stages := self.stages()) is None else stages.aligned(steps)

    def _budget(self, kind: type[TimeBudget] = TimeBudget) -> Any:
        # looked up every time, because Trainer replaces its callbacks by new ones when it resumes
        return next((found for found in self.callback_handler.callbacks if isinstance(found, kind)), None)

    def create_optimizer(self, model: Any = None) -> Any:
        """As Trainer's where all parts have one rate."""
        if self.rates is None or self.optimizer is not None:
            return super().create_optimizer(*(() if model is None else (model,)))  # type: ignore[misc]
        trained = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(trained))  # type: ignore[attr-defined]
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((part_of(name), name in decayed), []).append(parameter)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)  # type: ignore[attr-defined]
        self.optimizer = kind(
            [
                {"params": parameters, "part": part, "lr": self.rates[part]}
                | {"weight_decay": self.args.weight_decay if decays else 0.0}
                for (part, decays), parameters in groups.items()
            ],
            **settings,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's without a budget and stages, and for a constant rate."""
        stages, budget = self.stages(), self._budget()
        if budget is None or (stages is None and self.args.lr_scheduler_type == "constant_with_warmup"):
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            rates: Any = lambda step: self._budget_rate(step, num_training_steps)  # noqa: E731
            if stages is not None:
                rates = [self._stage_rate(group["part"], group["lr"]) for group in optimizer.param_groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _stage_rate(self, part: str, base: float) -> Any:
        return lambda step: self._budget(Stages).rate(part, step) / base

    def _budget_rate(self, step: int, steps: int) -> float:
        budget = self._budget()
        warmup = min(1.0, (step + 1) / self.args.warmup_steps) if self.args.warmup_steps else 1.0
        progress = max(step / steps, budget.progress if budget else 0.0)
        return warmup * decay(str(self.args.lr_scheduler_type.value), progress)

    def _get_learning_rate(self) -> float:
        """Of the step that was made; Trainer asks before its scheduler sets those of the next one."""
        if self.rates is None:
            return float(super()._get_learning_rate())  # type: ignore[misc]
        self._made_at = {group["part"]: float(group["lr"]) for group in self.optimizer.param_groups}
        return max(self._made_at.values())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the stage of the step and the rate of every part, where there are any."""
        if (stages := self.stages()) is not None:
            logs["stage"] = stages.number(self.state.global_step)
        if self.rates is not None and "learning_rate" in logs:
            logs |= {f"learning_rate/{part}": rate for part, rate in self._made_at.items()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
