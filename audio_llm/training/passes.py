"""How the samples of a step of SFT are dealt out to its passes: by length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from audio_llm.training.examples import Example


def dealt_by_length(batches: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The examples of `batches` in as many batches of the same sizes, the longest in the first: a machine that is too
    small for a step says so at its beginning."""
    rest = iter(sorted((example for batch in batches for example in batch), key=lambda one: -len(one.ids)))
    return [list(islice(rest, len(batch))) for batch in batches]


class PassesByLength:
    """A mix-in for SFT's trainer. The samples of a step stay the same and its loss is a mean over all of their tokens,
    so what is learnt does not change. Each process deals out its own samples; a step of one pass is left as it is."""

    args: Any
    data_collator: Any

    def get_train_dataloader(self) -> Any:
        if self.args.gradient_accumulation_steps == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        collate, self.data_collator = self.data_collator, list  # rows are padded once their pass is known
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collate

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        if self.args.gradient_accumulation_steps > 1:
            passes = dealt_by_length(list(islice(epoch_iterator, num_batches)))
            epoch_iterator = iter([self.data_collator(examples) for examples in passes])
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
