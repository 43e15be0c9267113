"""The front end of encoders for sound events where it differs from the published one."""

import math

import numpy as np
import pytest
import torch

from audio_llm.model.encoder import AudioEncoder, build_encoder

SMALL = {"name": "cnn14", "preset": "tiny", "peak_normalize": False, "intensity": "band"}


def encoder(**fields: object) -> AudioEncoder:
    torch.manual_seed(0)
    return build_encoder({**SMALL, **fields}).eval()


def plane_wave(azimuth: float, elevation: float, layout: str) -> torch.Tensor:
    """Noise from one direction, by the definition of each layout (SN3D; stereo: coincident cardioids)."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(40000).astype(np.float32)) * 0.05
    a, e = math.radians(azimuth), math.radians(elevation)
    y, z, x = math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)
    gains = {"foa": (1.0, y, z, x), "stereo": (1 + y, 1 - y)}[layout]
    return torch.stack([gain * noise for gain in gains])[None]


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (30, 0), (90, 0), (-60, 20), (150, -10)])
def test_band_intensity_is_the_direction_cosine(azimuth, elevation):
    a, e = math.radians(azimuth), math.radians(elevation)
    expected = [math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)]
    stereo = encoder().planes(plane_wave(azimuth, elevation, "stereo"))
    assert stereo.shape[1] == 3
    torch.testing.assert_close(stereo[:, 2], torch.full_like(stereo[:, 2], expected[0]), atol=1e-4, rtol=0)
    foa = encoder(layout="foa").planes(plane_wave(azimuth, elevation, "foa"))
    for plane, cosine in zip(foa[0, 4:], expected, strict=True):
        torch.testing.assert_close(plane, torch.full_like(plane, cosine), atol=1e-4, rtol=0)


def test_levels_do_not_depend_on_how_intensity_is_told():
    wave = plane_wave(40, 0, "stereo")
    torch.testing.assert_close(encoder().planes(wave)[:, :2], encoder(intensity="unit").planes(wave)[:, :2])
    decibels = encoder(levels="decibels").planes(wave)
    torch.testing.assert_close(decibels[:, :2], 10 * encoder().planes(wave)[:, :2])
    torch.testing.assert_close(decibels[:, 2:], encoder().planes(wave)[:, 2:])


def test_exchanged_channels_negate_the_intensity_alone():
    wave = plane_wave(40, 0, "stereo") + 0.01 * torch.randn(1, 2, 40000, generator=torch.Generator().manual_seed(1))
    planes, mirrored = encoder().planes(wave), encoder().planes(wave.flip(1))
    torch.testing.assert_close(mirrored[:, :2], planes[:, :2])
    torch.testing.assert_close(mirrored[:, 2], -planes[:, 2])


def test_silence_has_no_direction():
    planes = encoder().planes(torch.zeros(1, 2, 40000))
    assert torch.equal(planes[:, 2], torch.zeros_like(planes[:, 2])) and planes.isfinite().all()
