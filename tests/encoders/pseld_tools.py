"""Reference arrays of stereo SELD, and the weights they were made with."""

import functools
import json
import zlib
from typing import Any

import numpy as np
import torch

from tests.paths import DATA, SHARED

FIXTURE = SHARED / "fixtures" / "pseld_ref.npz"
EXCERPT = DATA / "pseld_reference.npz"


@functools.cache
def excerpt() -> dict[str, np.ndarray]:
    return dict(np.load(EXCERPT))


@functools.cache
def whole() -> Any:
    """All arrays of the reference, for tests marked as in need of them; the excerpt is checked everywhere."""
    return np.load(FIXTURE)


def seeded(key: str, shape: list[int]) -> torch.Tensor:
    """The tensor of a published key, drawn from a generator seeded by the key's checksum."""
    if key.endswith((".pe", "attn_mask", "relative_position_index", "num_batches_tracked")):
        return torch.zeros(() if not shape else (1,))  # derived or unused; sines alone would take gigabytes
    random, count = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF), int(np.prod(shape))
    if key.endswith("running_var"):
        values = random.uniform(0.5, 1.5, count)
    elif key.endswith("A_log"):
        values = random.uniform(-2, 1, count)
    elif len(shape) >= 2:
        values = random.standard_normal(count).astype(np.float32) / np.sqrt(max(1, count // shape[0]))
    elif key.endswith(("weight", ".D")):
        values = 1 + 0.1 * random.standard_normal(count)
    else:
        values = 0.1 * random.standard_normal(count)
    return torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(shape))


def published_state(keys: str) -> dict[str, torch.Tensor]:
    """A state dict with the keys and shapes of a JSON table."""
    return {key: seeded(key, shape) for key, shape in json.loads(keys).items()}
