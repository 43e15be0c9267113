"""Where a run's numbers are drawn, beside ``metrics.jsonl``: ``report_to: [tensorboard, wandb, trackio, mlflow]``.

The programs are Accelerate's trackers. All write into the run's folder or to where their own environment variables say
(``WANDB_PROJECT``, ``TRACKIO_PROJECT``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, …), and need no network:
Weights & Biases, which wants an account, writes for ``wandb sync`` where there is no key.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from audio_llm.errors import ConfigError, describe, require
from audio_llm.files import write_atomically

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
PROJECT = "audio-llm"
MARK = "curve_id"
CURVES = ("tensorboard", "wandb", "mlruns", MARK)  # what they leave in the run's folder


class Trackers:
    """Trackers of the run in `folder`, which goes on from `step`; `values` are its recipe's, by dotted key.

    For the main process alone. Raises :class:`ConfigError` for one that cannot start.
    """

    def __init__(self, names: Sequence[Tracker], folder: Path, values: Mapping[str, Any], step: int = 0):
        self._closing = contextlib.ExitStack()
        self.running: list[Any] = []
        shown = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in values.items()}
        for name in dict.fromkeys(names):
            require(name, f"'report_to: [{name}]' of the recipe", "train" if name == "tensorboard" else "trackers")
            try:
                tracker = _BUILD[name](folder, step)
                with _silent():
                    tracker.start()
                self._closing.callback(_finish, tracker)
                if name != "tensorboard":  # whose hyperparameters would be another run beside this one
                    tracker.store_init_configuration(shown)
            except Exception as error:  # each program has errors of its own
                self.close()
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(describe(f"report_to: {name}", "a tracker that starts", reason)) from error
            self.running.append(tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Draw what of `values` is a number at `step`."""
        numbers = {
            key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for tracker in self.running if numbers else ():
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """End all of them."""
        self._closing.close()


def _silent() -> contextlib.AbstractContextManager[Any]:
    """These programs greet and take leave on the standard output, which is the run's."""
    return contextlib.redirect_stdout(io.StringIO())


def _finish(tracker: Any) -> None:
    with _silent():
        tracker.finish()


def _name(folder: Path) -> str:
    """The last two parts of a run's folder, such as quickstart/sft."""
    return "/".join(folder.resolve().parts[-2:])


def _mark(folder: Path) -> str:
    """A name for the run in `folder`: a resumed one has it again, and one that was made anew another."""
    path = folder / MARK
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="ascii").strip()


def _tensorboard(folder: Path, step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Points beyond the checkpoint are shown once: those of a killed run are purged.
    return TensorBoardTracker("tensorboard", folder, purge_step=step + 1)


def _wandb(folder: Path, step: int) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    how = {"id": _mark(folder), "resume": "allow", "settings": wandb.Settings(silent=True)}
    return WandBTracker(project, dir=str(folder), name=_name(folder), mode=mode, **how)


def _trackio(folder: Path, step: int) -> Any:
    from accelerate.tracking import TrackioTracker

    name = f"{_name(folder)} {_mark(folder)[:6]}"
    return TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, resume="allow", embed=False)


def _mlflow(folder: Path, step: int) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database
        mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
    mark = _mark(folder)
    known = mlflow.search_runs(
        search_all_experiments=True, filter_string=f"tags.audio_llm = '{mark}'", output_format="list"
    )
    run = known[0].info.run_id if known else None
    return MLflowTracker(PROJECT, run_id=run, tags={"audio_llm": mark}, run_name=_name(folder))


_BUILD: dict[str, Callable[[Path, int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
