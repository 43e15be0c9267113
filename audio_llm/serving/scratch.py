"""Folders for weights that an engine reads once: in memory where that can be, and gone with the process."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from audio_llm.files import FolderInUse, only_writer

_PREFIX, _FRESH_SECONDS = "audio-llm-engine-", 60.0


@contextlib.contextmanager
def private_folder(size: int = 0) -> Iterator[Path]:
    """A folder of this process alone for `size` bytes, in memory where that can be and they have room.

    What processes that were killed left there goes first: their locks are open.
    """
    memory = Path("/dev/shm")
    fits = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > size
    root = memory if fits else Path(tempfile.gettempdir())
    sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    try:
        with only_writer(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete the engine folders of ours under `root` that no process holds any more."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, FolderInUse):
            facts = folder.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
                continue
            if time.time() - facts.st_mtime > _FRESH_SECONDS:  # else its process may be about to lock it
                with only_writer(folder):
                    shutil.rmtree(folder, ignore_errors=True)
