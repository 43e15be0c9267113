"""What we rely on torch for, on the machine at hand."""

from __future__ import annotations

import os
import subprocess
import sys

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


# What scripts/pretrained.sh relies on when it asks for AMX, in a process of its own: oneDNN reads its limit once.
WHISPER = """
import torch

torch.manual_seed(0)
for inside, stride in ((80, 1), (512, 2)):
    layer, sound = torch.nn.Conv1d(inside, 512, 3, stride=stride, padding=1), torch.randn(2, inside, 500)
    with torch.inference_mode():
        exact = layer(sound)
        rounded = layer.bfloat16()(sound.bfloat16()).float()
    print(float((rounded - exact).norm() / exact.norm()))
"""


def test_convolutions_of_whisper_are_right_in_bfloat16_with_amx() -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}
    reply = subprocess.run([sys.executable, "-c", WHISPER], capture_output=True, text=True, env=environment, check=True)
    errors = [float(line) for line in reply.stdout.split()]
    assert len(errors) == 2 and max(errors) < 0.01
