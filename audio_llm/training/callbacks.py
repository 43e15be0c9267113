"""Callbacks of the Transformers Trainer: log, progress, checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from audio_llm.errors import ConfigError, TrainingError, describe
from audio_llm.files import append_line, read_lines, read_own, write_json, write_lines
from audio_llm.training.schedule import NO_END, TimeBudget
from audio_llm.training.trackers import Trackers

BEST = "best.json"  # of a run folder: the step of the best validation, whose checkpoint is spared
CALMER = "Lower learning_rate, or use precision=fp32."
COMPLETE = "complete.json"  # the last file of a checkpoint: without it, the checkpoint was cut off while being written


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log beyond `step`: a resumed run does these steps again."""
    if path.is_file():
        write_lines(path, [record for record in read_lines(path) if record.get("step", 0) <= step])


def quiet(trainer: Any) -> None:
    """Replace Trainer's printing by :class:`Progress`; the numbers go to ``metrics.jsonl``."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress(trainer.callback_handler))


def clock(checkpoint: Path | None) -> Callable[[], float]:
    """Seconds of training from now on, to which those before `checkpoint`, from which the run goes on, are added."""
    before = saved_whole(checkpoint).get("seconds", 0.0) if checkpoint else 0.0  # version 0.2 did not keep them
    started = time.monotonic() - before
    return lambda: round(time.monotonic() - started, 3)


class MetricsFile(TrainerCallback):
    """``metrics.jsonl``: one line per logged step, full precision, with samples seen and seconds of training."""

    def __init__(
        self,
        path: Path,
        samples_per_step: int,
        epoch_size: float,
        others: Sequence[Path] = (),
        checkpoint: Path | None = None,
    ):
        self.path, self.samples_per_step, self.epoch_size = path, samples_per_step, epoch_size
        self.others = others  # logs by step that the trainer writes itself
        self.checkpoint = checkpoint  # where the run goes on
        self.seconds = clock(checkpoint)

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = clock(self.checkpoint)
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, *self.others):
                forget_after(path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # of the whole run
            return
        samples = state.global_step * self.samples_per_step
        record = {"step": state.global_step, "samples": samples, "epoch": samples / max(self.epoch_size, 1)}
        record |= {key: value for key, value in logs.items() if key != "epoch"}
        append_line(self.path, record | {"seconds": self.seconds()})


class Tracked(TrainerCallback):
    """Hands what a Trainer logs to the trackers that `open` makes for a run that goes on from a step."""

    def __init__(self, open: Callable[[int], Trackers]):
        self.open = open
        self.trackers: Trackers | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trackers = self.open(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.trackers is not None:
            self.trackers.log({key: value for key, value in (logs or {}).items() if key != "epoch"}, state.global_step)


class Progress(ProgressCallback):
    """One bar with the newest numbers beside it; Trainer's own prints a line per logged step. Where the clock ends the
    run, the bar is of its seconds: nobody knows how many steps these are."""

    SHOWN = {
        **{name: name for name in ("stage", "loss", "eval_loss")},
        "eval_audio_contribution": "audio",
        "eval_accuracy": "accuracy",
        "eval_accuracy_silence": "in silence",
        **{name: name for name in ("learning_rate", "reward", "kl")},
    }

    def __init__(self, handler: Any) -> None:
        super().__init__()
        self.newest: dict[str, str] = {}
        self.handler = handler

    @property
    def budget(self) -> TimeBudget | None:
        """The run's clock, where it has one: another after a resume, for Trainer replaces its callbacks."""
        found = (one for one in self.handler.callbacks if isinstance(one, TimeBudget) and math.isfinite(one.seconds))
        return next(found, None)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.max_steps < NO_END or not state.is_world_process_zero:
            return super().on_train_begin(args, state, control, **kwargs)
        budget, self.current_step = self.budget, 0
        of_seconds = (
            {"total": round(budget.seconds), "bar_format": "{l_bar}{bar}| {n:.0f}/{total} s{postfix}"} if budget else {}
        )
        self.training_bar = tqdm(dynamic_ncols=True, **of_seconds)  # without an end: the last of several stages

    def on_step_end(self, args, state, control, **kwargs):
        budget = self.budget if state.max_steps >= NO_END else None
        if self.training_bar is None or budget is None:
            return super().on_step_end(args, state, control, **kwargs)
        self.newest["step"] = str(state.global_step)
        self.training_bar.set_postfix(self.newest, refresh=False)
        self.training_bar.update(min(budget.elapsed, budget.seconds) - self.training_bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.newest |= {self.SHOWN[key]: f"{value:.4g}" for key, value in (logs or {}).items() if key in self.SHOWN}
            if self.newest:
                self.training_bar.set_postfix(self.newest)


class Checkpoints(TrainerCallback):
    """Mark a checkpoint complete after its last file, then drop the oldest beyond `keep`, but for the one that
    ``best.json`` names.

    The trainer's own rotation runs before the new checkpoint is known to be whole, so it is switched off
    (``save_total_limit=None``). `position` goes into the marker: the coordinates of the data stream; so does the time
    that `log` has counted.
    """

    def __init__(self, folder: Path, keep: int, position: Mapping[str, Any], log: MetricsFile):
        self.folder, self.keep, self.position, self.log = folder, keep, dict(position), log

    def on_save(self, args, state, control, model=None, **kwargs):
        check_weights(model, state.global_step)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its own files (random states, ZeRO partitions)
        if not state.is_world_process_zero:
            return
        newest = self.folder / f"checkpoint-{state.global_step}"
        facts = {"pickles": pickles(newest), "files": written(newest), "seconds": self.log.seconds()}
        write_json(newest / COMPLETE, {"step": state.global_step, **facts, **self.position})
        best = self.folder / BEST
        spared = f"checkpoint-{read_own(best, 'Delete it.').get('step')}" if best.is_file() else ""
        for old in complete_checkpoints(self.folder)[: -self.keep or None]:
            if old.name == spared:
                continue
            (old / COMPLETE).unlink()  # first, so that a removal that is cut off does not look complete
            shutil.rmtree(old)


def pickles(checkpoint: Path) -> dict[str, list[int]]:
    """DeepSpeed's files of a checkpoint, whose loading runs what they say, and what only this disk knows of each: inode
    and time of change. Files that came from elsewhere have others."""
    found = sorted(checkpoint.glob("global_step*/*.pt"))
    return {str(path.relative_to(checkpoint)): [(facts := path.stat()).st_ino, facts.st_ctime_ns] for path in found}


def written(checkpoint: Path) -> dict[str, int]:
    """The files of a checkpoint and their bytes."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in found}


def saved_whole(checkpoint: Path) -> dict[str, Any]:
    """What the last file of a checkpoint says. Raises :class:`ConfigError` where another one is gone or of another
    size than it was saved with: Transformers would go on with a fresh optimiser, and say nothing."""
    cure = f"Delete {checkpoint} to go on from the one before, or set resume=never to start over."
    saved = read_own(checkpoint / COMPLETE, cure)
    there = written(checkpoint)
    for name, size in (saved.get("files") or {}).items():  # checkpoints of version 0.2 do not list them
        if there.get(name) != size:
            found = f"one of {there[name]}" if name in there else "none"
            raise ConfigError(describe(f"resume from {checkpoint}", f"its {name} of {size} bytes", found, cure))
    return saved


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first; not the copies that somebody made of them."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file() and path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class StopOnNaN(TrainerCallback):
    """A loss that is not a number never comes back; the checkpoint before it is worth more than hours after it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                describe(f"step {state.global_step}", "a finite loss", "NaN" if loss != loss else "infinity", CALMER)
            )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        check_weights(model, state.global_step)


def check_weights(model: Any, step: int) -> None:
    """Raise :class:`TrainingError` where what `model` has learnt is not finite: a gradient that was no number shows in
    the loss of the next step, which a log may never tell of, and no checkpoint and no export is worth having then."""
    for name, weight in model.named_parameters():
        here = weight.to_local() if hasattr(weight, "to_local") else weight  # FSDP: this process's part
        if weight.requires_grad and here.is_floating_point() and not here.isfinite().all():
            raise TrainingError(describe(f"step {step}: {name}", "finite weights", "NaN or infinity", CALMER))
