"""Front ends against librosa, NumPy and geometry."""

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.encoders import features


@pytest.mark.parametrize(
    ("rate", "n_fft", "mels", "fmin", "fmax"),
    [
        (32000, 1024, 128, 50, 14000),
        (16000, 512, 64, 50, 8000),
        (44100, 2048, 96, 0, 22050),
        (8000, 256, 20, 300, 900),
    ],
)
def test_mel_bank_is_librosas(rate, n_fft, mels, fmin, fmax):
    bank = features.mel_bank(rate, n_fft, mels, float(fmin), float(fmax))
    oracle = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=mels, fmin=fmin, fmax=fmax).T
    np.testing.assert_allclose(bank.numpy(), oracle, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 40000))
def test_mel_scale_is_librosas_and_turns_back(hz):
    value = torch.tensor([hz], dtype=torch.float64)
    assert float(features.hz_to_mel(value)) == pytest.approx(librosa.hz_to_mel(hz), abs=1e-9)
    assert float(features.mel_to_hz(features.hz_to_mel(value))) == pytest.approx(hz, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("n_fft", "hop", "samples"), [(1024, 320, 7000), (512, 320, 4096), (512, 160, 700)])
def test_stft_is_librosas(n_fft, hop, samples):
    waveform = np.random.default_rng(0).standard_normal((2, 3, samples)).astype(np.float32)
    ours = features.stft(torch.from_numpy(waveform), n_fft, hop)
    oracle = librosa.stft(waveform, n_fft=n_fft, hop_length=hop, pad_mode="reflect").swapaxes(-1, -2)
    assert ours.shape == (2, 3, 1 + samples // hop, n_fft // 2 + 1)
    np.testing.assert_allclose(ours.numpy(), oracle, atol=2e-4)


def test_silence_is_minus_100_decibels():
    assert torch.equal(features.decibels(torch.tensor([0.0, 1.0])), torch.tensor([-100.0, 0.0]))


def spectra(samples: np.ndarray, n_fft: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spectrum = features.stft(torch.from_numpy(samples.astype(np.float32))[None], n_fft, 320)
    return spectrum, spectrum.abs(), features.mel_bank(16000, n_fft, 64, 50.0, 8000.0)


def test_interaural_phase_is_the_difference_of_angles():
    noise = np.random.default_rng(1).standard_normal((2, 8000))
    spectrum, magnitude, bank = spectra(noise)
    angle = np.angle(spectrum.numpy().astype(np.complex128))
    difference = angle[:, 1] - angle[:, 0]
    oracle = np.stack([np.cos(difference), np.sin(difference)], axis=1) @ bank.double().numpy()
    np.testing.assert_allclose(features.interaural_phase(spectrum, magnitude, bank).numpy(), oracle, atol=1e-6)


@pytest.mark.parametrize("silent", [(0,), (1,), (0, 1)])
def test_phase_with_a_silent_ear_is_that_of_the_other(silent):
    noise = np.random.default_rng(2).standard_normal((2, 4000))
    noise[list(silent)] = 0
    spectrum, magnitude, bank = spectra(noise)
    # + 0: a transform may write the silence of a channel as -0, whose angle is π
    oracle = np.angle(spectrum[:, 1].numpy() + 0) - np.angle(spectrum[:, 0].numpy() + 0)
    oracle = np.stack([np.cos(oracle), np.sin(oracle)], axis=1) @ bank.numpy()
    planes = features.interaural_phase(spectrum, magnitude, bank)
    np.testing.assert_allclose(planes.numpy(), oracle, atol=1e-5)
    assert torch.isfinite(features.weighted_phase(spectrum, magnitude, bank)).all()


def test_weighted_phase_follows_a_delay_and_ignores_the_gain():
    frequency, delay = 500.0, 3e-4  # the left ear hears it first: the right ear lags, so its phase is behind
    time = np.arange(16000) / 16000
    tone = np.stack([np.sin(2 * np.pi * frequency * time), np.sin(2 * np.pi * frequency * (time - delay))])
    spectrum, magnitude, bank = spectra(0.1 * tone)
    planes = features.weighted_phase(spectrum, magnitude, bank)[0, :, 5:40]
    band = int(bank[round(frequency / 16000 * 512)].argmax())
    np.testing.assert_allclose(planes[0, :, band], np.cos(2 * np.pi * frequency * delay), atol=1e-3)
    np.testing.assert_allclose(planes[1, :, band], -np.sin(2 * np.pi * frequency * delay), atol=1e-3)
    quiet = features.weighted_phase(spectrum * 1e-2, magnitude * 1e-2, bank)[0, :, 5:40]
    np.testing.assert_allclose(quiet[..., band], planes[..., band], atol=1e-5)
    noise = np.random.default_rng(3).standard_normal((2, 8000))
    assert features.weighted_phase(*spectra(noise)).abs().max() <= 1.0 + 1e-5


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (90, 0), (-45, 30), (170, -60)])
def test_intensity_of_a_plane_wave_points_to_its_source(azimuth, elevation):
    a, e = np.radians([azimuth, elevation])
    direction = np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
    noise = np.random.default_rng(4).standard_normal(8000)
    foa = np.stack([np.ones(()), direction[1], direction[2], direction[0]])[:, None] * noise  # W Y Z X, SN3D
    spectrum, _, bank = spectra(foa)
    planes = features.intensity(spectrum, bank)[0, :, :, 3:]
    np.testing.assert_allclose(planes.mean(dim=(1, 2)).numpy(), direction, atol=1e-3)


@pytest.mark.parametrize(("rate", "n_fft", "mels"), [(16000, 400, 80), (16000, 512, 128), (32000, 1024, 70)])
def test_banded_bank_is_the_whole_bank(rate, n_fft, mels):
    """Also where triangles hold no bin at all, and for a number of bands that is no multiple of a group."""
    bank = features.mel_bank(rate, n_fft, mels, 20.0, rate / 2)
    spectrum = torch.randn(2, 3, 7, n_fft // 2 + 1, dtype=torch.complex64)
    power = spectrum.real.square() + spectrum.imag.square()
    expected = (power.double() @ bank.double()).float()
    torch.testing.assert_close(features.in_mels(power, bank), expected, rtol=1e-5, atol=1e-9)
    kept = spectrum.clone()
    torch.testing.assert_close(features.mel_power(spectrum, bank), expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(spectrum, kept)


@pytest.mark.parametrize("front_end", [lambda x: features.kaldi_fbank(x[:, 0]), lambda x: features.stft(x, 1024, 320)])
def test_blocks_of_frames_are_the_whole(front_end, monkeypatch):
    """Clips of a batch, cut to blocks of any size, and with gradients (where nothing is cut), give the same frames."""
    waveform = 0.1 * torch.randn(3, 2, 24000)
    whole = front_end(waveform.clone().requires_grad_())
    assert whole.requires_grad
    for block in (1, 20_000, 160_000, 4 * 10**7):
        monkeypatch.setattr(features, "_BLOCK", block)
        found = front_end(waveform)
        torch.testing.assert_close(found, whole.detach(), rtol=1e-4, atol=1e-4)


def test_the_benchmark_fails_where_a_front_end_is_too_slow(monkeypatch, capsys, tmp_path):
    """Measured for real, against what is wanted of it: anything, and more than there is."""
    from benchmarks import features as benchmark

    def wanting(times: float):
        end = benchmark.whisper_log_mel()
        end.wanted, end.others = times, {"librosa": end.others["librosa"]}
        return lambda: end

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process, other tests as well
    for times, code in ((0.001, 0), (1000.0, 1)):
        monkeypatch.setattr(benchmark, "FRONT_ENDS", (wanting(times),))
        assert benchmark.main(["--seconds", "0.1", "--out", str(tmp_path / "features.json")]) == code
        assert ("Whisper log-mel: wanted 1000 x the best, found" in capsys.readouterr().err) == bool(code)
        assert (tmp_path / "features.json").is_file()
