"""A sample as supervised fine-tuning shows it to the model, with the loss mask made visible."""

from __future__ import annotations

import re
from typing import Any

from audio_llm.inspection.shards import Pieces
from audio_llm.model.build import load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.training.examples import IGNORED, encode


def rendered(dataset: ShardDataset, position: int, checkpoint: str, style: str) -> Pieces:
    """The conversation of one sample exactly as supervised fine-tuning sees it, cut where the loss mask changes.

    A run of audio placeholders is written as ``<|audio|>×n`` and a space.
    """
    processor = load_processor(checkpoint)
    example = encode(processor, dataset[position], style)
    return mask_pieces(example.ids.tolist(), example.labels.tolist(), processor)


def mask_pieces(input_ids: list[int], labels: list[int], processor: Any) -> Pieces:
    """Decode runs of equal supervision; a label of IGNORED carries no loss."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(input_ids, labels, strict=True):
        if not runs or runs[-1][1] != (label != IGNORED):
            runs.append(([], label != IGNORED))
        runs[-1][0].append(token)
    audio_token = processor.tokenizer.convert_ids_to_tokens(processor.audio_token_id)
    pattern = re.compile(f"(?:{re.escape(audio_token)})+")

    def shorten(text: str) -> str:
        return pattern.sub(lambda run: f"{audio_token}×{len(run[0]) // len(audio_token)} ", text)

    return [(shorten(processor.tokenizer.decode(tokens)), supervised) for tokens, supervised in runs]
