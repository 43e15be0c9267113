"""oneDNN's bfloat16 convolutions, put right on CPUs with AMX."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

# Under torch 2.13 (oneDNN 3.12), AMX gives wrong values, as large as the right ones, wherever a group has few input
# channels and a long row of the kernel: at 2, 4, 6, 8, 12, 16 and 24 channels of those tried, at none of 32 or more.
# Gradients and matrix products are right. So that models on such CPUs need not do without AMX, which multiplies several
# times faster, convolutions of few channels are computed in float32. They are a small part of any encoder.
_RIGHT_FROM = 32
_registered: list[Any] = []  # the library that holds the kernel: torch drops what is collected


def repair_convolutions() -> None:
    """Compute this process's bfloat16 CPU convolutions of few channels in float32, where the CPU has AMX. Idempotent.

    At the operator, not at the layers: PEFT adds convolutions of its own, and models call the function.
    """
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # there is no public way to ask
    if _registered or not (has_amx and has_amx()):
        return
    original = torch.library.get_kernel("aten::mkldnn_convolution", "CPU")

    def convolve(keys: Any, sound: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        if weight.dtype != torch.bfloat16 or weight.shape[1] >= _RIGHT_FROM:
            return original.call_boxed(keys, sound, weight, bias, *rest)
        wide = None if bias is None else bias.float()
        return original.call_boxed(keys, sound.float(), weight.float(), wide, *rest).to(torch.bfloat16)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden is the point
        library.impl("mkldnn_convolution", convolve, "CPU", with_keyset=True)
    _registered.append(library)
