"""What the numbers of recipes may be, by their keys: one spelling means one thing in every recipe that has it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from audio_llm.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True)
class Range:
    """From `least` to `most`, which belong to it unless they are `open`."""

    text: str  # of messages: what is expected
    least: float
    most: float = math.inf
    open: tuple[float, ...] = (math.inf,)

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value not in self.open


COUNT = Range("a number of 1 or more", 1)
COUNT_OR_NONE = Range("a number of 0 or more", 0)
AMOUNT = Range("a finite number above 0", 0, open=(0, math.inf))
AMOUNT_OR_NONE = Range("a finite number from 0 on", 0)
SHARE = Range("a share from 0 to 1", 0, 1)
PART = Range("a share from 0 to below 1", 0, 1, (1,))  # something has to be left
SHARE_ABOVE = Range("a share above 0, at most 1", 0, 1, (0,))

PORT = Range("1 to 65535", 1, 65535)
SEED = Range("0 to 9223372036854775807", 0, 2**63 - 1)  # of a request, what vLLM takes
TEMPERATURE = Range("0 to 2", 0, 2)  # what vLLM takes

_KEYS = {
    COUNT: """steps batch_size eval_batch_size gradient_accumulation log_steps keep_checkpoints processes rank
        max_length validation_samples contribution_steps prompts_per_step micro_batch_size max_completion_length
        max_model_len max_num_seqs block_size vocabulary hidden_size intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads max_position_embeddings samples_per_shard""",
    COUNT_OR_NONE: """warmup_steps save_steps eval_steps completions_per_step workers unfreeze frequency_mask time_mask
        masks""",
    AMOUNT: "epochs seconds learning_rate text_rate encoder_cache_gib alpha",
    AMOUNT_OR_NONE: """weight_decay max_grad_norm audio_rate memory_gib gain_db shift_seconds roll_seconds mixup
        parity_bound""",
    SHARE: "max_reject_share minimum_rate overlay",
    PART: "dropout ema speed warmup_share label_smoothing",
    SHARE_ABOVE: "gpu_memory_utilization layer_decay",
    Range("2 or more: replies are compared with each other", 2): "group_size",
    Range("0 to 4294967295", 0, 2**32 - 1): "seed",  # what NumPy's generators take
}
RANGES = {key: allowed for allowed, keys in _KEYS.items() for key in keys.split()}


def check(name: str, value: float, allowed: Range) -> None:
    """Raise :class:`ConfigError` for a `value` of `name` out of its range."""
    if value not in allowed:
        raise ConfigError(describe(name, allowed.text, f"{value}"))


def check_numbers(recipe: Any, group: str = "") -> None:
    """Raise :class:`ConfigError` for a number of a recipe, or of a group of keys in it, that is out of its range."""
    for field in dataclasses.fields(recipe):
        value, name = getattr(recipe, field.name), f"{group}{field.name}"
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and field.name in RANGES:
            check(name, value, RANGES[field.name])


LAYERS = Range("0 to 1000 layers", 0, 1000)
SIZE = Range("a number up to 16777216", -(2**24), 2**24)
_DEEP = frozenset({"depth", "depths", "layers", "num_hidden_layers", "convolutions"})
_ABOVE_NONE = frozenset(
    """sample_rate n_fft win_length hop n_mels window_seconds patch_size heads hidden_size mlp_size image_size
    num_attention_heads target_frames chunk_frames""".split()
)


@contextlib.contextmanager
def building(item: str, fields: Mapping[str, Any]) -> Iterator[None]:
    """While a network of `fields` is built: :class:`ConfigError` for numbers by which there is none, or none that is
    ever finished. Files of others say them as well as recipes do."""
    for key, value in fields.items():
        allowed = (LAYERS if key in _DEEP else SIZE, *((AMOUNT,) if key in _ABOVE_NONE else ()))
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                for one in allowed:
                    check(f"{item}: {key}", number, one)
    try:
        yield
    except (ArithmeticError, RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(describe(item, "numbers that a network can be built by", reason)) from error
