"""Random numbers of requests with a seed of their own, in vLLM's engine on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np


def rewind_generators_of_cut_prompts() -> None:
    """Let a CPU compute a prompt in pieces for a request that has a seed of its own.

    Behind each piece vLLM draws a token, drops it and turns the request's generator back by an offset, which a
    generator of a CPU does not have: the engine would end, with all its requests. Here it is begun anew from its seed,
    which is where it stood, for nothing else is drawn before a prompt is complete. A request that had to make room and
    is computed again draws the numbers of its seed once more.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner._bookkeeping_sync
    if getattr(stock, "_rewinds", False):
        return

    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        cut = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        kept = {row: generators.pop(row) for row in cut if row in generators}  # stock code turns back what it finds
        for generator in kept.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return stock(self, *args, **kwargs)
        finally:
            generators.update(kept)

    bookkeeping._rewinds = True  # type: ignore[attr-defined]
    CPUModelRunner._bookkeeping_sync = bookkeeping  # type: ignore[method-assign]
