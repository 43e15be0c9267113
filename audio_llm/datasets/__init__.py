"""Data sets in the layouts that their publishers gave them, as samples with events beside our own shards.

A data set is a module with ``recognises(folder) -> bool`` and ``open_clips(folder, folds, without, use_test_fold) ->
ClipSource``, registered by an entry point of the group ``audio_llm.datasets``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from audio_llm.audio import Waveform
from audio_llm.errors import ConfigError, describe
from audio_llm.registry import Registry
from audio_llm.shards.remote import address
from audio_llm.shards.schema import Sample

DATASETS = Registry("datasets", "data set")


class ClipSource(Protocol):
    """Samples, each with its `events` and its `audio` (which says how long it is), and their sound, by number.

    A source may also have

    * ``labels``: its classes in the order of its own numbers (by default those of its events, sorted);
    * ``left_out``: what the folder has and the source has not, as ``{"item": …, "reason": …}``;
    * ``annotates_all``: every sound has its event, so that a sample without events is silent (by default it is unfit).
    """

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""

    def __len__(self) -> int: ...
    def load_sample(self, number: int, /) -> Sample: ...
    def load_waveform(self, number: int, /) -> Waveform: ...


def open_source(
    folders: Sequence[Path],
    folds: Sequence[str] | None = None,
    without: Sequence[str] = (),
    use_test_fold: bool = False,
) -> ClipSource:
    """Shard folders, or one folder of a registered data set: its clips in `folds`, less those in `without`.

    Raises :class:`ConfigError` for folders that do not go together, folds that are not there, and those that scores are
    reported on, unless `use_test_fold`.
    """
    names = [name for name in sorted(DATASETS) if any(DATASETS[name].recognises(folder) for folder in folders)]
    names.sort(key=lambda name: getattr(DATASETS[name], "any_sounds", False))  # it knows every folder with a sound
    if names and len(folders) > 1:
        raise ConfigError(describe("train", f"shard folders, or one folder of {names[0]}", f"{len(folders)} folders"))
    if names:
        return DATASETS[names[0]].open_clips(folders[0], folds, without, use_test_fold)
    if absent := [folder for folder in folders if not folder.is_dir() and not address(folder)]:
        raise ConfigError(describe(f"data {absent[0]}", "a folder of shards or sounds", "no such folder"))
    if folds is not None:
        found = ", ".join(str(folder) for folder in folders)
        raise ConfigError(describe("folds", "a data set that has folds", found, "Shards have none."))
    from audio_llm.shards.reader import ShardDataset  # imports torch

    return ShardDataset(list(folders))
