"""The ``engine`` group of a recipe of GRPO: what samples the replies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from audio_llm.errors import ConfigError, describe

SyncMode = Literal["auto", "merged", "adapter"]
# Keys that only some engines look at, and that somebody would miss: where samples come from, and what they may take.
_SERVER, _HERE = ("vllm_http",), ("vllm", "auto")
_LOOK_AT = {
    **dict.fromkeys(("url", "transfer", "shared_folder", "token", "tensor_parallel_size"), _SERVER),
    "sleep": _HERE,
    "max_num_batched_tokens": (*_HERE, *_SERVER),
    "batch_size": ("transformers", "auto"),
}


@dataclass
class EngineRecipe:
    """Which engine samples, and how. ``auto`` is vLLM in this process where it is installed, else Transformers.

    `sync` is how vLLM follows the policy: merged weights, or an adapter that is swapped (``auto``: adapter on a GPU).
    `url` names one or several running servers for ``vllm_http``; without it one is started. Merged weights reach them
    through `shared_folder`, or by `transfer` from memory to memory. `token` is the file of what they ask for on every
    path. `max_model_len` bounds prompt and completion (None: the model's positions, at most 4096). `block_size` is that
    of the key-value cache: with vLLM's 128 on CPU short prompts would never share a prefix. With `sleep` an engine in
    this process holds a GPU's memory only while it samples: its weights wait in host memory, its cache is dropped."""

    backend: Literal["auto", "vllm", "vllm_http", "transformers"] = "auto"  # vllm_http: another process's
    sync: SyncMode = "auto"
    url: str | list[str] | None = None
    transfer: Literal["folder", "broadcast"] = "folder"
    shared_folder: Path | None = None
    token: Path | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256  # sequences that vLLM decodes at once
    max_num_batched_tokens: int | None = None  # tokens of a step of vLLM, prompts included; null: vLLM's own
    tensor_parallel_size: int = 1  # GPUs that a server (vllm_http) spreads one model over
    gpu_memory_utilization: float = 0.3  # share of a GPU's memory for vLLM
    sleep: bool = False  # vLLM in this process gives its share back while the policy learns
    prefix_caching: bool = True  # vLLM computes a prompt's beginning once
    block_size: int = 32
    batch_size: int | None = None  # Transformers only: sequences decoded together

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else self.url or []

    def check(self) -> None:
        """:class:`ConfigError` for values that no engine takes, or that this one would not look at."""
        size, tokens = self.tensor_parallel_size, self.max_num_batched_tokens
        if size < 1:
            raise ConfigError(describe("engine.tensor_parallel_size", "a number of GPUs", f"{size}"))
        plain = type(self)()
        for key, engines in _LOOK_AT.items():
            if self.backend not in engines and (value := getattr(self, key)) != getattr(plain, key):
                expected = f"engine.backend: {' or '.join(engines)}, for no other engine looks at it"
                cure = "Set engine.backend, or leave the key out."
                raise ConfigError(describe(f"engine.{key}: {value}", expected, self.backend, cure))
        if self.transfer == "broadcast" and (self.sync == "adapter" or self.shared_folder is not None):
            expected = "folder beside sync: adapter or a shared_folder (it sends merged weights)"
            raise ConfigError(describe("engine.transfer", expected, "broadcast"))
        if tokens is not None and tokens < self.max_num_seqs:
            expected = f"at least engine.max_num_seqs ({self.max_num_seqs}): one token of every sequence"
            raise ConfigError(describe("engine.max_num_batched_tokens", expected, f"{tokens}"))
