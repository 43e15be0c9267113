"""Models and tokenizers as Transformers reads them from a folder, or one sentence about what is wrong with the folder.

``from_pretrained`` fills weights that a folder lacks with random numbers and prints a table; layers beyond those that
the configuration counts are left out; a damaged file ends in whatever the library that reads it runs into.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audio_llm.errors import AudioLLMError, CheckpointError, describe
from audio_llm.model.validate import check_index

# What a model may lack: a pooler that nothing reads, and buffers that follow from the configuration.
_UNNEEDED = re.compile(r"(?:^|\.)(?:pooler\.|position_ids$)|inv_freq$")
# Where Transformers looks for weights, in its order.
_PLACES = [f"{name}{ending}" for name in ("model.safetensors", "pytorch_model.bin") for ending in ("", ".index.json")]
_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.\d+\.")


@contextlib.contextmanager
def reading(item: str, expected: str, cure: str | None = None) -> Iterator[None]:
    """Whatever a library runs into with damaged or foreign files becomes a :class:`CheckpointError` that calls them
    `item`. The machine's own errors (no space, no memory, no permission) stay what they are."""
    try:
        yield
    except (AudioLLMError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError):  # its text is the bare key
            reason = f"no {reason} in one of its files"
        raise CheckpointError(describe(item, expected, reason, cure)) from error


def whole_model(
    kind: Any,
    folder: str | Path,
    item: str,
    expected: str,
    cure: str | None = None,
    *,
    strict: bool = False,
    **how: Any,
) -> Any:
    """The model in `folder`, by ``kind.from_pretrained`` with the arguments `how`.

    Raises :class:`CheckpointError`, which calls it `item`, for a folder that cannot be read, that lacks weights, has
    them in other shapes than its configuration says, or has more layers; `strict`: also for more weights of any name,
    and for some that are no finite numbers.
    """
    place = next((path for name in _PLACES if (path := Path(folder) / name).is_file()), None)
    if place is not None and place.suffix == ".json":
        check_index(place)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_no_table)
    try:
        with reading(item, expected, cure):
            model, found = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    finally:
        logger.removeFilter(_no_table)
    wrong = [f"no weights {key}" for key in sorted(found["missing_keys"]) if not _UNNEEDED.search(key)]
    wrong += [
        f"{key} of {tuple(there)}, where config.json says {tuple(said)}"
        for key, there, said in sorted(found["mismatched_keys"])
    ]
    beyond = sorted(key for key in found["unexpected_keys"] if not _UNNEEDED.search(key))
    wrong += [f"{key}, of which config.json knows nothing" for key in beyond if strict or _LAYER.search(key)]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        cure = cure or "Copy the folder again: its config.json and its weights are not of one model."
        raise CheckpointError(describe(item, "weights that fit config.json", "; ".join(wrong[:3]) + more, cure))
    for name, values in model.named_parameters() if strict else ():
        if not values.is_meta and not values.isfinite().all():
            raise CheckpointError(
                describe(item, "finite weights", f"NaN or infinity in {name}", "Its training diverged.")
            )
    return model


def _no_table(record: logging.LogRecord) -> bool:
    """Transformers' table of the same, in many lines."""
    return "LOAD REPORT" not in record.getMessage()
