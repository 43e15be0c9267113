"""What a run on this machine would have: memory of a GPU, free memory, disk and /dev/shm; and whether it can begin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from audio_llm import machine
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.inspection import fit
from audio_llm.inspection.doctor import free_bytes
from audio_llm.inspection.fit import GIB, Launch, Room
from audio_llm.training.recipes import PolicyRecipe

MARGIN = 1.1  # a sum that is a tenth too large refuses nothing


def room_for(output: Path, gpu_gib: float | None = None) -> Room:
    """The room of a run that writes to `output`, on this machine's GPU, or on one of `gpu_gib`; else on its CPU."""
    import torch

    device = round(gpu_gib * GIB) if gpu_gib else None
    if device is None and torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).total_memory
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    return Room(device, machine.free_memory(), free_bytes(existing), free_bytes(Path("/dev/shm")))


def launch_here(environment: Mapping[str, str]) -> Launch:
    """How this process was launched, as Accelerate leaves it in its `environment`. Raises :class:`ConfigError`."""
    count = int(environment.get("WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_FSDP", "false") == "true":
        return Launch(count, "fsdp", environment.get("FSDP_OFFLOAD_PARAMS", "false") == "true")
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return Launch(count, "ddp" if count > 1 else "one")
    prefix = "ACCELERATE_DEEPSPEED_"
    file = environment.get(f"{prefix}CONFIG_FILE", "none")
    if file != "none":
        return fit.zero_launch(count, fit.read_zero(file, "launch"))
    words = {name.removeprefix(prefix).lower(): value for name, value in environment.items() if name.startswith(prefix)}
    return fit.zero_launch(count, words)


def check_memory(recipe: PolicyRecipe) -> None:
    """:class:`ConfigError` for a run of SFT or GRPO that this machine cannot hold, whatever its rows are, before
    anything is loaded. What cannot be told is left to the run."""
    if (recipe.output / "result.json").is_file():  # it has run
        return
    room = room_for(recipe.output)
    limit = room.device
    if limit is None:
        limit = room.memory and room.memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        need = fit.least_need(recipe, launch_here(os.environ), room.device)
    except (AudioLLMError, ImportError, OSError, ValueError):  # of a model that the run itself will name
        return
    if limit is None or need.total <= MARGIN * limit:
        return
    parts = ", ".join(f"{item} {size / GIB:.1f}" for item, size in need.rows.items() if size)
    free = "that are free" if machine.memory_limit() is None else "that its container's limit leaves"
    place = "of its GPU" if room.device is not None else free
    raise ConfigError(
        describe(
            f"memory of {recipe.output}",
            f"a process that needs no more than the {limit / GIB:.1f} GiB {place}",
            f"one of at least {need.total / GIB:.1f} beside its activations ({parts})",
            f"To mend it, {fit.cure_of(need, limit)}; audio-llm doctor --recipe tells the whole sum, and "
            "--ignore-memory goes on all the same.",
        )
    )
