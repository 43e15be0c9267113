"""What a run on this machine would have: memory of a GPU, free memory, disk and /dev/shm."""

from __future__ import annotations

from pathlib import Path

from audio_llm.inspection.doctor import free_bytes, free_memory
from audio_llm.inspection.fit import GIB, Room


def room_for(output: Path, gpu_gib: float | None = None) -> Room:
    """The room of a run that writes to `output`, on this machine's GPU, or on one of `gpu_gib`; else on its CPU."""
    import torch

    device = round(gpu_gib * GIB) if gpu_gib else None
    if device is None and torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).total_memory
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    return Room(device, free_memory(), free_bytes(existing), free_bytes(Path("/dev/shm")))
