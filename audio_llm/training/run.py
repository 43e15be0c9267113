"""What SFT and GRPO share: what is trained, how a run is launched, logged, stopped, saved and resumed.

Both use the Transformers ``Trainer`` (TRL's trainers are subclasses of it), so everything here is either a setting of
the model before the trainer sees it, or a trainer callback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from audio_llm import config
from audio_llm.errors import AudioLLMError, ConfigError, PrerequisiteError, TrainingError, describe
from audio_llm.model.export import export_trained
from audio_llm.training.callbacks import COMPLETE, complete_checkpoints
from audio_llm.training.policy import resolve_precision

STALE_MINUTES = 30  # a build takes half a minute, a few on a very busy machine


# --------------------------------------------------------------------------------------------------------- the recipe


# ---------------------------------------------------------------------------------------------------------- the model


def exported(recipe: Any, trainer: Any, processor: Any) -> dict[str, str]:
    """Export in the recipe's forms, by all processes together; the folders as ``result.json`` lists them."""
    folders = export_trained(trainer, processor, recipe.output, recipe.export)
    return {form: str(folder) for form, folder in folders.items()}


# --------------------------------------------------------------------------------------------------------- the launch


def prepare_torch() -> None:
    """Settings every training process needs, before the trainer is built (idempotent)."""
    # When several CPU processes train, Trainer reloads states with map_location="cpu:0"; torch knows only "cpu".
    if not getattr(torch.serialization, "_audio_llm_cpu_index", False):
        torch.serialization.register_package(5, lambda _: None, _restore_numbered_cpu)
        torch.serialization._audio_llm_cpu_index = True  # type: ignore[attr-defined]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
    # DeepSpeed calls collectives by their old names: a warning per step and process, which nobody here can act on.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit():
        torch.set_num_threads(int(threads))


def trainer_settings(recipe: Any) -> dict[str, Any]:
    """What SFT and GRPO recipes have in common, in Trainer's words; ``max_steps`` is set when the data is known."""
    return dict(
        output_dir=str(recipe.output),
        max_steps=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=resolve_precision(recipe.precision) == "bf16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 1,
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
    )


def data_hash(folders: Sequence[Path]) -> str:
    """First 16 hex digits of the SHA-256 of the folders' ``sizes.json``, which hold the checksums of their shards."""
    sizes = hashlib.sha256()
    for folder in folders:
        sizes.update((folder / "sizes.json").read_bytes())
    return sizes.hexdigest()[:16]


def _restore_numbered_cpu(storage: Any, location: Any) -> Any:
    return storage if str(location).startswith("cpu:") else None


def launched_processes(environment: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """How many processes the launcher was asked for, as far as its environment tells, and which variable tells it.

    ``accelerate launch`` without ``--multi_gpu`` starts a single process whatever ``--num_processes`` says; what it
    leaves behind then is a rendezvous address without a world size, which means "more than one": reported as 2.
    """
    env = os.environ if environment is None else environment
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if env.get(name, "").isdigit():
            return int(env[name]), name
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        return 2, "MASTER_ADDR without WORLD_SIZE, left by accelerate launch with num_processes > 1"
    return None, ""


def check_launch(world_size: int, expected: int | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`TrainingError` when a launch for several processes became fewer, silently.

    `expected` is what the recipe (``processes``) or the command line (``--expect-processes``) states.
    """
    cure = (
        "Start several processes with 'accelerate launch --config_file recipes/accelerate/cpu_2.yaml -m audio_llm …', "
        "'accelerate launch --multi_gpu --num_processes N' (without --cpu, also on a machine without GPU) or torchrun."
    )
    if expected is not None and expected != world_size:
        raise TrainingError(describe("launch", f"{expected} processes (as stated)", f"{world_size}", cure))
    asked, source = launched_processes(environment)
    if asked is not None and asked > 1 and world_size == 1:
        raise TrainingError(describe("launch", f"several processes ({source})", "1", cure))


def check_build_locks(environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`PrerequisiteError` for the lock of a DeepSpeed build that was killed: torch would wait for ever."""
    env = os.environ if environment is None else environment
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    root = Path(env.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in root.glob("**/deepspeed_*/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > STALE_MINUTES:
            found = f"the lock of one begun {minutes:.0f} minutes ago"
            raise PrerequisiteError(describe("DeepSpeed", "a finished build", found, f"Remove it: rm {lock}"))


def plain_error(error: AudioLLMError) -> AudioLLMError:
    """The message alone of an error that a loader worker raised: torch hands it over with the worker's traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return error
    return type(error)(text.splitlines()[-1].partition(": ")[2])


# ------------------------------------------------------------------------------------------------- logging and saving


def claim(recipe: Any, position: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Path | None]:
    """The result where this very run is finished; else the checkpoint to go on from, and the run folder made ready."""
    from accelerate import PartialState

    if recipe.resume != "never" and (done := finished(recipe.output, recipe, position)):
        return done, None
    checkpoint = find_resume(recipe.output, recipe.resume, position)
    PartialState().wait_for_everyone()  # all have read the run folder before the first process changes it
    if PartialState().is_main_process:
        recipe.output.mkdir(parents=True, exist_ok=True)
        (recipe.output / "result.json").unlink(missing_ok=True)
        config.dump(recipe, recipe.output / "recipe.yaml")
    return None, checkpoint


def finished(folder: Path, recipe: Any, position: Mapping[str, Any]) -> dict[str, Any] | None:
    """``result.json`` of a run of the same recipe on the same data that came to its end, with all that it exported."""
    result, resolved = folder / "result.json", folder / "recipe.yaml"
    if not (result.is_file() and resolved.is_file()):
        return None
    found = json.loads(result.read_text())
    then = config.stored(type(recipe), resolved)
    same = (
        then is not None
        and dataclasses.replace(then, resume=recipe.resume) == recipe
        and found.get("position") == dict(position)
    )
    return found if same and all(Path(path).is_dir() for path in found.get("exported", {}).values()) else None


def find_resume(folder: Path, resume: str, position: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from: ``auto`` takes the last complete one, ``never`` none, a path that one.

    Raises :class:`ConfigError` when its data stream (data, seed, batch, style) is not the one that `position` tells.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = complete_checkpoints(folder)
        if not found:
            return None
        checkpoint = found[-1]
    else:
        checkpoint = Path(resume)
        if not (checkpoint / COMPLETE).is_file():
            raise ConfigError(
                describe(f"resume {checkpoint}", "a complete checkpoint", "none", "Use auto, never or a path.")
            )
    saved = json.loads((checkpoint / COMPLETE).read_text())
    for key, value in position.items():
        if saved.get(key) != value:
            raise ConfigError(
                describe(
                    f"resume from {checkpoint}",
                    f"the same {key} as when it was saved ({saved.get(key)!r})",
                    repr(value),
                    "Set resume=never to start over, or choose another output folder.",
                )
            )
    return checkpoint


def planned_steps(recipe: Any, dataset_size: int, samples_per_step: int) -> int:
    """Optimizer steps of the run: the smaller of `steps` and `epochs`; with `seconds` alone, more than ever fit."""
    limits = []
    if recipe.steps is not None:
        limits.append(recipe.steps)
    if recipe.epochs is not None:
        limits.append(math.ceil(recipe.epochs * dataset_size / samples_per_step))
    if not limits and recipe.seconds is None:
        raise ConfigError("recipe: expected steps, epochs or seconds; found none, so the run would have no end.")
    return min(limits) if limits else 10**6
