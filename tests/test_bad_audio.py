"""Bad audio through every registered encoder: a result or one sentence, by the paths a user takes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_llm.audio import LAYOUT_CHANNELS, LAYOUT_OF_COUNT, Waveform
from audio_llm.cli import main
from audio_llm.encoders.heads import build_classifier
from audio_llm.errors import AudioError
from audio_llm.model.encoder import ENCODERS, AudioEncoder, build_encoder
from audio_llm.model.folder import save_parts
from audio_llm.model.processing import AudioLLMFeatureExtractor
from audio_llm.tasks.classification import predict as predict_module

NAMES = sorted(ENCODERS)
LABELS = ["car horn", "dog", "rain"]
_BUILT: dict[str, AudioEncoder] = {}

every_encoder = pytest.mark.parametrize("name", NAMES)


def encoder_of(name: str) -> AudioEncoder:
    """The tiny encoder, built once; in evaluation mode."""
    if name not in _BUILT:
        torch.manual_seed(0)
        _BUILT[name] = build_encoder({"name": name, "preset": "tiny"}).eval()
    return _BUILT[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name → classifier folder, as training writes it."""
    written: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in written:
            encoder = encoder_of(name)
            head = build_classifier({}, encoder, len(LABELS))
            facts = {"task": "classification", "labels": LABELS, "head": {}, "channels": "refuse"}
            written[name] = save_parts(tmp_path_factory.mktemp(name), encoder, {"head": head}, facts)
        return written[name]

    return model


def noise(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    """``(channels, samples)`` float32."""
    return 0.1 * np.random.default_rng(seed).standard_normal((channels, samples), dtype=np.float32)


def write(path: Path, samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples.T, rate, subtype=subtype)
    return path


def predict(capsys, model: Path, *files: Path | str) -> tuple[int, list[dict], list[str]]:
    """Exit code, records and messages of the command."""
    capsys.readouterr()
    code = main(["predict", str(model), *map(str, files), "--format", "json"])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, [json.loads(line) for line in output.out.splitlines()], output.err.splitlines()


def check_record(record: dict, seconds: float) -> None:
    values = list(record["probabilities"].values())
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert record["windows"][0]["start"] == 0 and record["windows"][-1]["end"] == pytest.approx(seconds, abs=2e-3)


@every_encoder
def test_predict_hears_whatever_is_sound(name, models, tmp_path, capsys):
    """Silence, other rates, a millisecond at a high rate, full scale, a constant: each is heard to its end."""
    encoder = encoder_of(name)
    channels, rate = encoder.num_channels, encoder.sample_rate
    square = np.where(np.arange(rate) % 100 < 50, 1.0, -1.0) * np.ones((channels, 1))
    clips = {
        "silent": (np.zeros((channels, rate)), rate),
        "constant": (np.full((channels, rate), 0.5), rate),
        "square": (square, rate),
        "8khz": (noise(channels, 9000), 8000),
        "192khz": (noise(channels, 192000), 192000),
        "shortest": (noise(channels, 16), 192000),
        "just_over_a_window": (noise(channels, encoder.window_samples + 1), rate),
    }
    files = [write(tmp_path / f"{key}.wav", samples, found) for key, (samples, found) in clips.items()]
    code, records, messages = predict(capsys, models(name), *files)
    assert (code, messages) == (0, [])
    assert [Path(record["file"]).stem for record in records] == list(clips)
    for record, (samples, found) in zip(records, clips.values(), strict=True):
        check_record(record, samples.shape[1] / found)


@every_encoder
def test_predict_refuses_in_one_sentence_what_is_not(name, models, tmp_path, capsys):
    encoder = encoder_of(name)
    channels, rate = encoder.num_channels, encoder.sample_rate
    good = noise(channels, rate)
    nan, infinite = good.copy(), good.copy()
    nan[-1, 100], infinite[0, -1] = np.nan, np.inf
    expected = {
        write(tmp_path / "none.wav", noise(channels, 0), rate): "no samples",
        write(tmp_path / "one.wav", noise(channels, 1), rate): "1 sample",
        write(tmp_path / "nan.wav", nan, rate): "1 of",
        write(tmp_path / "infinite.wav", infinite, rate): "finite",
        write(tmp_path / "three.wav", noise(3, rate), rate): "3 channels",
        write(tmp_path / "six.flac", noise(6, rate), rate, "PCM_16"): "6 channels",
    }
    for container in ("wav", "flac"):
        whole = io.BytesIO()
        soundfile.write(whole, good.T, rate, format=container.upper(), subtype="PCM_16")
        path = tmp_path / f"truncated.{container}"
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        expected[path] = ""
    expected[tmp_path / "absent.wav"] = "no such file"
    (tmp_path / "empty.wav").touch()
    expected[tmp_path / "empty.wav"] = "0 bytes"
    sound = write(tmp_path / "good.wav", good, rate)
    code, records, messages = predict(capsys, models(name), *expected, sound)
    assert code == 2 and [record["file"] for record in records] == [str(sound)]  # the good one is not lost
    assert len(messages) == len(expected), messages
    for message, (path, words) in zip(messages, expected.items(), strict=True):
        assert path.name in message and words in message and "expected" in message


@every_encoder
def test_channels_are_never_mixed_or_invented(name, models, tmp_path, capsys):
    """Only the encoder's own number of channels is heard; every other is refused with both sides named."""
    encoder = encoder_of(name)
    for count, layout in LAYOUT_OF_COUNT.items():
        path = write(tmp_path / f"{layout}.wav", noise(count, encoder.sample_rate), encoder.sample_rate)
        code, records, messages = predict(capsys, models(name), path)
        if count == encoder.num_channels:
            assert (code, len(records), messages) == (0, 1, [])
        else:
            assert (code, records, len(messages)) == (2, [], 1)
            assert " or ".join(encoder.layouts) in messages[0] and f"found {layout}" in messages[0]
    for count in {1, 2, 3, 4} - {encoder.num_channels}:
        with pytest.raises(AudioError, match=rf"expected \(batch, {encoder.num_channels}, time\).*found shape"):
            encoder(torch.zeros(1, count, 2000), torch.tensor([2000]))


@every_encoder
def test_every_channel_is_heard(name):
    """Changing one channel alone changes the tokens."""
    encoder = encoder_of(name)
    clip = torch.from_numpy(noise(encoder.num_channels, encoder.window_samples))[None]
    lengths = torch.tensor([encoder.window_samples])
    with torch.inference_mode():
        tokens = encoder(clip, lengths)[0]
        for channel in range(encoder.num_channels):
            other = clip.clone()
            other[:, channel] = torch.from_numpy(noise(1, encoder.window_samples, seed=1))
            assert (encoder(other, lengths)[0] - tokens).abs().max() > 1e-4


@every_encoder
def test_ten_minutes_are_heard_to_the_end(name, models, tmp_path, capsys):
    encoder = encoder_of(name)
    path = write(tmp_path / "long.wav", noise(encoder.num_channels, 600 * 8000), 8000, "PCM_16")
    code, records, messages = predict(capsys, models(name), path)
    assert (code, messages) == (0, [])
    check_record(records[0], 600)
    assert len(records[0]["windows"]) == math.ceil(600 / encoder.window_seconds)


@every_encoder
def test_arrays_that_are_no_sound_are_refused_by_the_classifier(name, models):
    """The same for callers in Python, who bring no file."""
    encoder, classifier = encoder_of(name), predict_module.load(models(name))
    layout = encoder.layouts[0]
    bad = noise(encoder.num_channels, 4000)
    bad[0, 7] = np.nan
    for samples in (bad, bad[:, :0]):
        with pytest.raises(AudioError, match="the array: expected"):
            classifier.predict(Waveform(samples, encoder.sample_rate, layout), name="the array")
    others = [other for other in LAYOUT_CHANNELS if other not in encoder.layouts]
    for other in others:
        with pytest.raises(AudioError, match=f"found {other}"):
            classifier.predict(Waveform(noise(LAYOUT_CHANNELS[other], 4000), encoder.sample_rate, other))


@every_encoder
def test_the_models_processor_refuses_the_same(name):
    """What goes before the encoder in the model: a window's tokens, or an error; silence has finite tokens."""
    encoder = encoder_of(name)
    channels, rate = encoder.num_channels, encoder.sample_rate
    settings = {"num_channels": channels, "layouts": encoder.layouts, "window_seconds": encoder.window_seconds}
    extractor = AudioLLMFeatureExtractor(sampling_rate=rate, max_windows=2, **settings)
    nan = noise(channels, rate)
    nan[0, 0] = np.nan
    bad = {
        "at least 16 samples, found 0": noise(channels, 0),
        "at least 16 samples, found 1": noise(channels, 1),
        "NaN or infinity": nan,
        r"found shape \(3, ": noise(3, rate),
        f"found shape \\({channels + 1}, ": noise(channels + 1, rate),
        "2 windows": noise(channels, 2 * encoder.window_samples + 1),
        "found 600.00 s": np.zeros((channels, 600 * rate), np.float32),
    }
    for message, samples in bad.items():
        with pytest.raises(AudioError, match=message):
            extractor([samples], sampling_rate=rate)
    if channels == 1:
        with pytest.raises(AudioError, match=r"`--hearing left` or `--hearing mean`"):
            extractor([noise(2, rate)], sampling_rate=rate)
    with pytest.raises(AudioError, match=f"expected {rate} Hz, found 8000 Hz"):
        extractor([noise(channels, 8000)], sampling_rate=8000)
    audio = [np.zeros((channels, rate), np.float32), noise(channels, encoder.window_samples + 100), noise(channels, 16)]
    inputs = extractor(audio, sampling_rate=rate)
    assert inputs["audio_windows"].tolist() == [math.ceil(a.shape[1] / encoder.window_samples) for a in audio]
    with torch.inference_mode():
        tokens, mask = encoder(inputs["input_audio"], inputs["audio_lengths"])
    assert tokens.isfinite().all() and mask.any(dim=1).all()


@every_encoder
@pytest.mark.parametrize("training", [False, True])
def test_silence_has_finite_tokens_and_gradients(name, training):
    encoder = encoder_of(name)
    silence = torch.zeros(3, encoder.num_channels, encoder.window_samples)
    lengths = torch.tensor([encoder.window_samples, encoder.window_samples // 2, 1])
    if not training:
        with torch.inference_mode():
            tokens, mask = encoder(silence, lengths)
        assert tokens.isfinite().all() and mask.any(dim=1).all()
        return
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "preset": "tiny"}).train()
    tokens, _ = encoder(silence, lengths)
    tokens.square().mean().backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert tokens.isfinite().all() and gradients and all(gradient.isfinite().all() for gradient in gradients)


class FirstInput:
    """What the first layer of a network is given: the features."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.found: Tensor | None = None
        self.handles = [
            module.register_forward_pre_hook(self._keep)
            for module in encoder.modules()
            if not list(module.children()) and any(True for _ in module.parameters(recurse=False))
        ]

    def _keep(self, module: nn.Module, arguments: tuple) -> None:
        if self.found is None and arguments:
            self.found = arguments[0].detach().clone()

    def __enter__(self) -> FirstInput:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def first_input(encoder: AudioEncoder, clip: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    """The first layer's input and the tokens."""
    lengths = torch.full((len(clip),), clip.shape[2])
    with FirstInput(encoder) as first, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens, _ = encoder(clip, lengths)
    assert first.found is not None
    return first.found, tokens


@every_encoder
def test_features_are_float32_whatever_the_network_is(name):
    """Autocast leaves every bit of them; a network cast to bfloat16 gets them rounded at the end and not before."""
    encoder = encoder_of(name)
    clip = torch.from_numpy(noise(2 * encoder.num_channels, encoder.window_samples))
    clip = clip.view(2, encoder.num_channels, -1)
    plain, tokens = first_input(encoder, clip, autocast=False)
    cast, rough = first_input(encoder, clip, autocast=True)
    assert plain.dtype == cast.dtype == torch.float32 and torch.equal(plain, cast)
    assert not torch.equal(tokens, rough.float())  # autocast was on, or this test would show nothing
    half = build_encoder({"name": name, "preset": "tiny"}).eval().bfloat16()
    rounded, tokens = first_input(half, clip, autocast=False)
    assert torch.equal(rounded, plain.bfloat16()) and tokens.dtype == torch.bfloat16 and tokens.isfinite().all()


@every_encoder
def test_a_clip_alone_and_in_a_padded_batch_are_one(name):
    encoder = encoder_of(name)
    limit = encoder.window_samples

    @settings(max_examples=8, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, limit), min_size=2, max_size=4),
        excess=st.integers(0, limit),
        filler=st.sampled_from([0.0, 1.0, math.nan]),
        seed=st.integers(0, 2**16),
    )
    def check(lengths: list[int], excess: int, filler: float, seed: int) -> None:
        batch = torch.full((len(lengths), encoder.num_channels, max(lengths) + excess), filler)
        for row, length in enumerate(lengths):
            gain = 10.0 ** (row - 2)  # what is taken of the batch instead of the clip would show
            batch[row, :, :length] = gain * torch.from_numpy(noise(encoder.num_channels, length, seed + row))
        with torch.inference_mode():
            tokens, mask = encoder(batch, torch.tensor(lengths))
            for row, length in enumerate(lengths):
                alone, heard = encoder(batch[row : row + 1, :, :length], torch.tensor([length]))
                count = encoder.count_tokens(length)
                assert int(heard.sum()) == int(mask[row].sum()) == int(mask[row, :count].sum()) == count > 0
                torch.testing.assert_close(tokens[row][mask[row]], alone[0][heard[0]], atol=2e-4, rtol=2e-4)

    check()
