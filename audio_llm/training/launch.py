"""Is a training run launched as it was meant? Processes that became fewer, or that a step cannot be dealt out to, and
builds that will never end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audio_llm.errors import ConfigError, PrerequisiteError, TrainingError, describe

STALE_MINUTES = 30  # a build takes half a minute, a few on a very busy machine


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


def training_processes() -> int:
    """How many processes train together, by what their launcher left in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_layout(recipe: Any, world_size: int) -> tuple[int, int]:
    """Of a recipe of GRPO (sequences per pass and process, passes per update). Raises :class:`ConfigError` where they
    do not divide."""
    sequences = recipe.prompts_per_step * recipe.group_size
    if recipe.group_size < 2:
        raise ConfigError(f"group_size: expected at least 2 replies to compare, found {recipe.group_size}.")
    if sequences % world_size:
        raise ConfigError(
            f"prompts_per_step × group_size: expected a multiple of {world_size} processes, found {sequences}."
        )
    local = sequences // world_size
    micro = recipe.micro_batch_size or local
    if local % micro:
        raise ConfigError(f"micro_batch_size: expected a divisor of {local} sequences per process, found {micro}.")
    return micro, local // micro


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


def leave_group() -> None:
    """End this process's part in the group of all processes, if it has one. Torch serves it by threads of its own, and
    an interpreter that ends before them may abort after the work is done, so that the launcher reports a failure."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
