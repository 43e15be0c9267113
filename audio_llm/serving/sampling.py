"""What marks audio is no word: no request may sample it, whatever its parameters."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class NeverSayAudio(LogitsProcessor):
    """Sets the logits of the placeholder and of the other audio marks to −∞ in every row.

    A sampled placeholder would be read back as audio that nobody sent. The checkpoint's ``suppress_tokens`` say the
    same to Transformers; vLLM does not read them. Reported raw log-probabilities stay those of the model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        config: Any = vllm_config.model_config.hf_config
        self.token_ids = torch.tensor(config.forbidden_token_ids, device=device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing depends on the requests in the batch."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (requests, vocabulary) → the same tensor, written in place."""
        logits[:, self.token_ids] = -torch.inf
        return logits
