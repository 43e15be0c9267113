"""What we rely on torch for, on the machine at hand."""

from __future__ import annotations

import random

import pytest
import torch

import audio_llm.model.encoder  # noqa: F401  (it repairs the convolutions)

LAYERS = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}


@pytest.mark.parametrize(
    ("dimensions", "inside", "outside", "kernel", "stride", "groups"),
    [
        (2, 4, 32, 16, 16, 1),
        (2, 2, 8, (16, 64), (2, 1), 1),
        (2, 16, 64, 4, 4, 1),
        (2, 48, 16, (4, 16), 2, 4),
        (1, 24, 32, 8, 8, 1),
        (1, 6, 16, 64, 1, 1),
        (2, 1, 32, 3, 1, 1),
        (2, 32, 32, 16, 16, 1),
        (1, 32, 32, 16, 1, 4),
        (1, 64, 64, 128, 1, 16),
        (1, 80, 64, 3, 2, 1),
    ],
)
def test_convolutions_in_bfloat16_are_those_of_float32(dimensions, inside, outside, kernel, stride, groups) -> None:
    torch.manual_seed(0)
    layer = LAYERS[dimensions](inside, outside, kernel, stride=stride, groups=groups)
    sound = torch.randn(2, inside, *(160,) * dimensions)
    exact = layer(sound)
    slope = torch.autograd.grad(exact.square().sum(), layer.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(sound)
    mixed_slope = torch.autograd.grad(mixed.float().square().sum(), layer.weight)[0]
    with torch.inference_mode():
        rounded = layer.bfloat16()(sound.bfloat16())
    assert mixed.dtype == rounded.dtype == torch.bfloat16
    for found, expected in ((mixed, exact), (rounded, exact), (mixed_slope, slope)):  # 8 bits of mantissa: about 0.003
        assert (found.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
def test_any_convolution_in_bfloat16_is_that_of_float32() -> None:
    draw, tried = random.Random(0), 0
    while tried < 2000:
        dimensions, groups = draw.choice((1, 2)), draw.choice((1, 1, 2, 4))
        inside, outside = groups * draw.randint(1, 80), groups * draw.choice((4, 16, 24, 48))
        kernel = tuple(draw.choice((1, 2, 3, 4, 5, 7, 8, 10, 16, 32, 64)) for _ in range(dimensions))
        stride = tuple(draw.choice((1, 2, size)) for size in kernel)
        padding, dilation = tuple(draw.choice((0, size // 2)) for size in kernel), draw.choice((1, 1, 2))
        sound = torch.randn(2, inside, *(70, 130)[-dimensions:])
        if any(dilation * (size - 1) >= length for size, length in zip(kernel, sound.shape[2:], strict=True)):
            continue
        layer = LAYERS[dimensions](inside, outside, kernel, stride, padding, dilation, groups)
        with torch.inference_mode():
            exact, rounded = layer(sound), layer.bfloat16()(sound.bfloat16()).float()
        assert (rounded - exact).norm() < 0.02 * exact.norm(), layer
        tried += 1
