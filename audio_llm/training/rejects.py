"""Samples that a run cannot use: counted, listed, and too many of them an end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from audio_llm import files
from audio_llm.errors import TrainingError, describe


class Rejects:
    """Counts samples that could not be used, lists them in ``rejects.jsonl``, stops the run beyond a stated share."""

    def __init__(self, path: Path, dataset_size: int, max_share: float):
        self.path, self.limit = path, max_share * dataset_size
        self.seen = {record["sample"] for record in files.read_lines(path)}

    def add(self, rejects: Sequence[tuple[str, str]]) -> None:
        """Record new rejects. Raises :class:`TrainingError` beyond the bound."""
        for sample, reason in rejects:
            if sample in self.seen:
                continue
            self.seen.add(sample)
            files.append_line(self.path, {"sample": sample, "reason": reason})
            if len(self.seen) > self.limit:
                raise TrainingError(
                    describe(
                        "rejected samples",
                        f"at most {self.limit:g} (data.max_reject_share)",
                        f"{len(self.seen)}, the last: {reason}",
                        f"They are listed in {self.path}. Mend the shards, or raise data.max_reject_share.",
                    )
                )
