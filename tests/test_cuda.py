"""What a GPU computes is what the CPU computes: front ends, encoders, scans. Skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from audio_llm.encoders.mamba import chunked_scan, scan
from audio_llm.model.encoder import ENCODERS, build_encoder
from benchmarks.features import FRONT_ENDS, clips
from tests.encoders.test_mamba import inputs

DEVICE = "cuda"
DECODERS = ("conformer", "bimamba", "bimamba_ac", "conbimamba", "conbimamba_ac", "gru")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use")


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """Convolutions would otherwise run in TF32, with 10 bits; matrix products do not unless asked to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def same(found: Tensor, expected: Tensor, most: float, typical: float) -> None:
    assert found.device.type == DEVICE and found.dtype == expected.dtype == torch.float32
    error = (found.cpu() - expected).abs()
    assert error.max() <= most and error.median() <= typical


@pytest.mark.parametrize("make", FRONT_ENDS)
@torch.inference_mode()
def test_front_ends(make):
    """Decibels, and directions of single bins, of which a quiet one is mostly rounding."""
    end = make()
    waveform = torch.from_numpy(clips(end)[:2])
    same(end.ours(waveform.to(DEVICE)), end.ours(waveform), most=2e-2, typical=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_encoders(name):
    torch.manual_seed(0)
    check_encoder({"name": name, "preset": "tiny"})


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("ssd", ["exact", "clamped"])
@torch.inference_mode()
def test_decoders(kind, ssd):
    decoder = {"kind": kind, "layers": 1, "head_size": 32, "heads": 4, "ssd": ssd}
    check_encoder({"name": "cnn14", "preset": "tiny", "decoder": decoder})


def check_encoder(config: dict) -> None:
    """A whole clip and a short one whose padding is never heard."""
    torch.manual_seed(0)
    encoder = build_encoder(config).eval()
    samples = encoder.window_samples
    waveform, lengths = 0.1 * torch.randn(2, encoder.num_channels, samples), torch.tensor([samples, samples // 3])
    waveform[1, :, samples // 3 :] = float("nan")
    expected, mask = encoder(waveform, lengths)
    found, same_mask = encoder.to(DEVICE)(waveform.to(DEVICE), lengths.to(DEVICE))
    size = float(expected.abs().max())
    same(found, expected, most=2e-2 * size, typical=1e-4 * size)
    assert torch.equal(same_mask.cpu(), mask)


def test_the_fused_kernel_is_the_chunked_scan():
    """Outputs and gradients; its products are TF32's."""
    pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed")
    ours, fused = ([value.to(DEVICE).requires_grad_() for value in inputs(200, heads=4, width=32)] for _ in range(2))
    expected, found = chunked_scan(*ours), scan(*fused)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    expected.square().mean().backward()
    found.square().mean().backward()
    for mine, theirs in zip(ours, fused, strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=2e-2, atol=1e-2 * float(mine.grad.abs().max()))
