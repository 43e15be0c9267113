"""Callbacks of the Transformers Trainer: log, progress, checkpoints, budget."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from audio_llm.errors import TrainingError, describe
from audio_llm.files import append_line, read_lines, write_json, write_lines

COMPLETE = "complete.json"  # the last file of a checkpoint: without it, the checkpoint was cut off while being written


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log beyond `step`: a resumed run does these steps again."""
    if path.is_file():
        write_lines(path, [record for record in read_lines(path) if record.get("step", 0) <= step])


def quiet(trainer: Any) -> None:
    """Replace Trainer's printing by :class:`Progress`; the numbers go to ``metrics.jsonl``."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())


class MetricsFile(TrainerCallback):
    """``metrics.jsonl``: one line per logged step, full precision, with samples seen and seconds of training."""

    def __init__(self, path: Path, samples_per_step: int, dataset_size: int, others: Sequence[Path] = ()):
        self.path, self.samples_per_step, self.dataset_size = path, samples_per_step, dataset_size
        self.others = others  # logs by step that the trainer writes itself
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, *self.others):
                forget_after(path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        samples = state.global_step * self.samples_per_step
        record = {"step": state.global_step, "samples": samples, "epoch": samples / max(self.dataset_size, 1)}
        record |= {key: value for key, value in logs.items() if key != "epoch"}
        append_line(self.path, record | {"seconds": round(time.monotonic() - self.started, 3)})


class Progress(ProgressCallback):
    """One bar with the newest loss beside it; Trainer's own prints a line per logged step."""

    SHOWN = ("loss", "eval_loss", "learning_rate", "reward", "kl")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in self.SHOWN}
            if shown:
                self.training_bar.set_postfix(shown)


class Checkpoints(TrainerCallback):
    """Mark a checkpoint complete after its last file, then drop the oldest beyond `keep`.

    The trainer's own rotation runs before the new checkpoint is known to be whole, so it is switched off
    (``save_total_limit=None``). `position` goes into the marker: the coordinates of the data stream.
    """

    def __init__(self, folder: Path, keep: int, position: Mapping[str, Any]):
        self.folder, self.keep, self.position = folder, keep, dict(position)

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its own files (random states, ZeRO partitions)
        if not state.is_world_process_zero:
            return
        newest = self.folder / f"checkpoint-{state.global_step}"
        write_json(newest / COMPLETE, {"step": state.global_step, "pickles": pickles(newest), **self.position})
        for old in complete_checkpoints(self.folder)[: -self.keep or None]:
            (old / COMPLETE).unlink()  # first, so that a removal that is cut off does not look complete
            shutil.rmtree(old)


def pickles(checkpoint: Path) -> dict[str, list[int]]:
    """DeepSpeed's files of a checkpoint, whose loading runs what they say, and what only this disk knows of each: inode
    and time of change. Files that came from elsewhere have others."""
    found = sorted(checkpoint.glob("global_step*/*.pt"))
    return {str(path.relative_to(checkpoint)): [(facts := path.stat()).st_ino, facts.st_ctime_ns] for path in found}


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


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
        now = time.monotonic()
        elapsed = torch.tensor(self.elapsed + now - self._last, dtype=torch.float64, device=args.device)
        self._last = now
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(elapsed, src=0)
        self.elapsed = float(elapsed)
        if self.elapsed >= self.seconds:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        return control


class BudgetedSchedule:
    """A mix-in for Trainer: under a :class:`TimeBudget` the rate decays with steps or time, whichever is ahead."""

    args: Any
    optimizer: Any
    lr_scheduler: Any
    callback_handler: Any

    def _time_budget(self) -> TimeBudget | None:
        # looked up every time, because Trainer replaces its callbacks by new ones when it resumes
        return next((found for found in self.callback_handler.callbacks if isinstance(found, TimeBudget)), None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's without a budget, and for a constant rate."""
        if self._time_budget() is None or self.args.lr_scheduler_type == "constant_with_warmup":
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self._budget_rate(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _budget_rate(self, step: int, steps: int) -> float:
        budget = self._time_budget()
        warmup = min(1.0, (step + 1) / self.args.warmup_steps) if self.args.warmup_steps else 1.0
        progress = max(step / steps, budget.progress if budget else 0.0)
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if self.args.lr_scheduler_type == "cosine" else 1 - progress
        return warmup * decay


class StopOnNaN(TrainerCallback):
    """A loss that is not a number never comes back; the checkpoint before it is worth more than hours after it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and loss != loss:
            raise TrainingError(
                describe(
                    f"step {state.global_step}", "a finite loss", "NaN", "Lower learning_rate, or use precision=fp32."
                )
            )
