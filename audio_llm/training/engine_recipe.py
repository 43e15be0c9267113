"""The ``engine`` group of a recipe of GRPO: what samples the replies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from audio_llm.errors import ConfigError, describe

SyncMode = Literal["auto", "merged", "adapter"]


@dataclass
class EngineRecipe:
    """Which engine samples, and how. ``auto`` is vLLM in this process where it is installed, else Transformers.

    `sync` is how vLLM follows the policy: merged weights, or an adapter that is swapped (``auto``: adapter on a GPU).
    `url` names one or several running servers for ``vllm_http``; without it one is started. `shared_folder` is where
    weights are handed to them, `token` the file of what they ask for on every path. `max_model_len` bounds prompt and
    completion (None: the model's positions, at most 4096). `block_size` is that of the key-value cache: with vLLM's 128
    on CPU short prompts would never share a prefix. With `sleep` an engine in this process holds a GPU's memory only
    while it samples: its weights wait in host memory, and its cache is dropped."""

    backend: Literal["auto", "vllm", "vllm_http", "transformers"] = "auto"  # vllm_http: another process's
    sync: SyncMode = "auto"
    url: str | list[str] | None = None
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
        if size > 1 and self.backend != "vllm_http":
            cure = (
                "An engine in the trainer's process has that process's device; its ranks ask for replies of their own."
            )
            expected = "engine.backend: vllm_http, whose server has its own processes"
            raise ConfigError(describe(f"engine.tensor_parallel_size: {size}", expected, self.backend, cure))
        if self.sleep and self.backend not in ("auto", "vllm"):
            cure = "A server has GPUs of its own, and Transformers samples from the policy itself: leave it out."
            raise ConfigError(describe("engine.sleep: true", "engine.backend: vllm", self.backend, cure))
        if tokens is not None and self.backend == "transformers":
            expected = "an engine of vLLM, which alone counts them"
            raise ConfigError(describe("engine.max_num_batched_tokens", expected, self.backend))
        if tokens is not None and tokens < self.max_num_seqs:
            expected = f"at least engine.max_num_seqs ({self.max_num_seqs}): one token of every sequence"
            raise ConfigError(describe("engine.max_num_batched_tokens", expected, f"{tokens}"))
