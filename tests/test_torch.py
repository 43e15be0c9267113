"""What we rely on torch for, on the machine at hand."""

from __future__ import annotations

import pytest
import torch

import audio_llm  # noqa: F401  (it chooses the instruction set of oneDNN)


@pytest.mark.parametrize(
    ("dimensions", "inside", "outside", "kernel", "stride", "groups"),
    [(2, 4, 32, 16, 16, 1), (2, 1, 32, 3, 1, 1), (2, 16, 32, 3, 2, 1), (1, 32, 32, 16, 1, 4), (1, 64, 64, 128, 1, 16)],
)
def test_convolutions_in_bfloat16_are_those_of_float32(dimensions, inside, outside, kernel, stride, groups) -> None:
    torch.manual_seed(0)
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[dimensions]
    layer = kind(inside, outside, kernel, stride=stride, groups=groups)
    sound = torch.randn(2, inside, *(160,) * dimensions)
    with torch.inference_mode():
        exact = layer(sound)
        rounded = layer.bfloat16()(sound.bfloat16()).float()
    assert (rounded - exact).norm() < 0.01 * exact.norm()  # 8 bits of mantissa: about 0.003
