"""The UrbanSound8K CNN against the public reference implementation's arrays, librosa, and the AudioEncoder contract."""

import pickle
import zlib
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from audio_llm.audio import Waveform, hear, resample
from audio_llm.encoders import features
from audio_llm.encoders.heads import LinearClassifier, UrbanSoundHead, build_classifier
from audio_llm.encoders.urbansound_cnn import CLASSES, UrbanSoundCNN
from audio_llm.errors import AudioError, CheckpointError, ConfigError
from audio_llm.model.encoder import build_encoder, encoder_config
from tests.paths import DATA, SHARED

FIXTURE = SHARED / "fixtures" / "urbansound_ref.npz"
EXCERPT = DATA / "urbansound_reference.npz"
TINY = {"name": "urbansound_cnn", "preset": "tiny"}
WINDOW = 88200


def reference_state() -> dict[str, torch.Tensor]:
    """The reference's keys with weights drawn per key from a generator seeded by the key's checksum."""
    state = {}
    for line in np.load(EXCERPT)["keys"]:
        key, _, text = str(line).partition(" ")
        shape = tuple(int(size) for size in text.strip("()").split(",") if size.strip())
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1)
            continue
        draw = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
        if key.endswith("running_var"):
            draw = 0.5 + np.abs(draw)
        elif key.endswith("running_mean"):
            draw = 0.1 * draw - (40 if "encoder1" in key else 0)
        elif len(shape) > 1:
            draw = draw / np.sqrt(np.prod(shape[1:]))
        else:
            draw = 0.1 * draw + (1 if key.endswith("weight") else 0)
        state[key] = torch.from_numpy(np.asarray(draw, dtype=np.float32))
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "model_fold_1_best.safetensors"
    save_file(reference_state(), path)
    loaded = UrbanSoundCNN.load_published(path)
    return loaded.encoder, loaded.heads["head"], loaded.facts["labels"]


def test_size_and_keys_are_the_published_ones(published):
    encoder, head, labels = published
    parts = [*encoder.named_parameters(), *head.named_parameters()]
    assert sum(parameter.numel() for _, parameter in parts) == 250_250
    assert {*encoder.state_dict(), *head.state_dict()} == set(reference_state())
    assert labels == list(CLASSES) and encoder.grid == (10, 16) and encoder.num_tokens == 160


def test_excerpt_of_the_reference(published):
    encoder, head, _ = published
    reference = np.load(EXCERPT)
    waveform = torch.from_numpy(reference["audio"])[None, None]
    lengths = torch.tensor([waveform.shape[2]])
    with torch.inference_mode():
        levels = encoder.levels(encoder.prepare(waveform, lengths))[0, 0].T.numpy()
        logits = head(*encoder(waveform, lengths)).numpy()
    assert levels.shape == (128, 173) and np.abs(levels[::4, :76] - reference["mel"]).max() < 1e-4
    assert (levels[:, 76:] == -80).all()  # the padding
    assert np.abs(logits - reference["logits"]).max() < 1e-3


@pytest.mark.shared("fixtures/urbansound_ref.npz")
@pytest.mark.parametrize("number", range(4))
def test_every_array_of_the_reference(published, number):
    encoder, head, _ = published
    reference = np.load(FIXTURE)
    pcm, rate = reference[f"{number}/pcm"], int(reference[f"{number}/sr"])
    layout = "mono" if pcm.shape[1] == 1 else "stereo"
    waveform = resample(Waveform(np.ascontiguousarray(pcm.T), rate, layout), 22050)
    samples = torch.from_numpy(hear(waveform, ("mono",), "mean").samples[:, :WINDOW])[None]
    lengths = torch.tensor([samples.shape[2]])
    with torch.inference_mode():
        prepared = encoder.prepare(samples, lengths)
        assert np.abs(prepared[0, 0].numpy() - reference[f"{number}/audio22k"]).max() < 1e-4
        assert np.abs(encoder.levels(prepared)[0, 0].T.numpy() - reference[f"{number}/mel"]).max() < 1e-4
        assert np.abs(head(*encoder(samples, lengths)).numpy() - reference[f"{number}/logits"]).max() < 1e-3


@pytest.mark.parametrize(("rate", "n_fft", "hop", "mels"), [(22050, 2048, 512, 128), (16000, 512, 256, 40)])
def test_mel_is_librosas(rate, n_fft, hop, mels):
    rng = np.random.default_rng(mels)
    time = np.arange(rate) / rate
    clips = np.stack([rng.standard_normal(rate) * 0.1, np.sin(880 * 2 * np.pi * time), np.exp(-9 * time) * 1e-3])
    clips = clips.astype(np.float32)
    bank = features.mel_bank(rate, n_fft, mels, 0.0, rate / 2)
    ours = features.relative_decibels(features.power_mel(torch.from_numpy(clips)[:, None], bank, n_fft, hop))
    for clip, found in zip(clips, ours[:, 0].numpy(), strict=True):
        power = librosa.feature.melspectrogram(y=clip, sr=rate, n_fft=n_fft, hop_length=hop, n_mels=mels)
        expected = librosa.power_to_db(power, ref=np.max)
        assert found.shape == expected.T.shape and np.abs(found - expected.T).max() < 2e-4


def test_silence_is_the_floor_and_not_the_maximum():
    encoder = build_encoder(TINY)
    clips = torch.zeros(2, 1, encoder.window_samples)
    clips[1] = 2e-2 * torch.randn(encoder.window_samples)
    levels = encoder.levels(clips)
    assert (levels[0] == -80).all() and levels[1].max() == 0
    fixed = build_encoder({**TINY, "level": "full_scale"})
    gap = fixed.levels(10 * clips)[1] - fixed.levels(clips)[1]
    assert gap.max() == pytest.approx(20, abs=0.01) and (fixed.levels(clips)[0] == -80).all()


def test_a_clip_alone_and_in_a_padded_batch_gives_the_same_tokens():
    encoder = build_encoder({**TINY, "normalize": "bands"}).eval()
    rng = torch.Generator().manual_seed(0)
    clips = 0.1 * torch.randn(3, 1, encoder.window_samples, generator=rng)
    lengths = torch.tensor([encoder.window_samples, 5000, 1])
    with torch.inference_mode():
        clips[1, :, 5000:] = float("nan")  # what lies after the length is never looked at
        tokens, mask = encoder(clips, lengths)
        alone, _ = encoder(clips[1:2, :, :5000], lengths[1:2])
    assert tokens.shape == (3, encoder.num_tokens, encoder.hidden_size) and mask.all() and tokens.isfinite().all()
    torch.testing.assert_close(tokens[1], alone[0], rtol=0, atol=1e-4)  # of levels in dB
    assert encoder.patches(tokens).shape == (3, *encoder.grid, encoder.hidden_size)


def test_wrong_input_and_configurations_are_errors():
    encoder = build_encoder(TINY)
    with pytest.raises(AudioError, match=r"\(batch, 1, time\), mono at 16000 Hz, found shape \(1, 2, 100\)"):
        encoder(torch.zeros(1, 2, 100), torch.tensor([100]))
    with pytest.raises(AudioError, match="the window is 16000 samples"):
        encoder(torch.zeros(1, 1, 17000), torch.tensor([17000]))
    for change, message in (
        ({"widths": [8]}, "one .* for each of 1 widths"),
        ({"pools": [[2, 4], [99, 4]]}, "none left"),
        ({"fmax": 9000.0}, "fmin < fmax <= 8000"),
        ({"dropout": 1.0}, "a share in"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_encoder({**TINY, **change})


def test_configuration_round_trip_and_gradient_checkpointing():
    torch.manual_seed(0)
    encoder = build_encoder({**TINY, "convolutions": 2})
    again = build_encoder(encoder_config(encoder))
    again.load_state_dict(encoder.state_dict())
    clip = 0.1 * torch.randn(2, 1, 16000)
    gradients = []
    for model, switch in ((encoder, False), (again, True)):
        model.gradient_checkpointing = switch
        model(clip, torch.tensor([16000, 9000]))[0].square().sum().backward()
        gradients.append(model.encoder1.conv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_classifiers_are_chosen_by_name():
    own, other = build_encoder(TINY), build_encoder({"name": "spatial_ast", "preset": "tiny"})
    assert isinstance(build_classifier({}, own, 3), UrbanSoundHead)
    assert isinstance(build_classifier({}, other, 3), LinearClassifier)
    assert isinstance(build_classifier({"name": "linear", "dropout": 0.1}, own, 3), LinearClassifier)
    for config in ({"name": "quadratic"}, {"width": 3}):
        with pytest.raises(ConfigError, match="expected a name of linear, urbansound"):
            build_classifier(config, own, 3)
    head = LinearClassifier(4, 2)
    tokens = torch.randn(1, 6, 4)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    torch.testing.assert_close(head(tokens, mask), head(tokens[:, :4], mask[:, :4]))


# ------------------------------------------------------------------------------------------------ published files


def test_layouts_of_published_files(tmp_path, published):
    state = reference_state()
    save_file(state, tmp_path / "model_fold_3_best.safetensors")
    torch.save(state, tmp_path / "bare.pt")
    wrapped = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    torch.save({**wrapped, "val_loss": 0.7}, tmp_path / "best_model_this_fold.pt")
    for path in sorted(tmp_path.iterdir()):
        loaded = UrbanSoundCNN.load_published(path)
        for key, value in {**loaded.encoder.state_dict(), **loaded.heads["head"].state_dict()}.items():
            assert torch.equal(value, state[key]), (path.name, key)
    fewer = {**state, "fc2.weight": state["fc2.weight"][:4], "fc2.bias": state["fc2.bias"][:4]}
    torch.save(fewer, tmp_path / "four.pt")
    assert UrbanSoundCNN.load_published(tmp_path / "four.pt").facts["labels"] == [
        f"class {number}" for number in range(4)
    ]
    assert isinstance(UrbanSoundCNN.load_published(tmp_path / "bare.pt").encoder, UrbanSoundCNN)


class Malicious:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('run').touch()",))


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    from audio_llm.cli import main

    monkeypatch.chdir(tmp_path)
    state = reference_state()
    renamed = {("encoder2.conv.w" if key == "encoder2.conv.weight" else key): v for key, v in state.items()}
    cases = {
        "renamed.pt": (renamed, "encoder2.conv.weight"),
        "missing.pt": ({key: value for key, value in state.items() if key != "fc1.bias"}, "missing fc1.bias"),
        "reshaped.pt": ({**state, "fc1.weight": state["fc1.weight"][:, :512]}, "fc1.weight: expected (128, 1024)"),
        "extra.pt": ({**state, "fc3.weight": state["fc2.weight"]}, "unexpected fc3.weight"),
    }
    for name, (tree, _) in cases.items():
        torch.save(tree, name)
    whole = Path("renamed.pt").read_bytes()
    Path("truncated.pt").write_bytes(whole[: len(whole) // 2])
    Path("malicious.pt").write_bytes(pickle.dumps({"model_state_dict": Malicious()}))
    Path("text.pt").write_text("not a checkpoint")
    cases |= {name: ({}, "") for name in ("truncated.pt", "malicious.pt", "text.pt", "absent.pt")}
    for name, (_, message) in cases.items():
        assert main(["predict", name, "any.wav"]) == 2, name
        error = capsys.readouterr().err
        assert name in error and message in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert not Path("run").exists()
    with pytest.raises(CheckpointError):
        UrbanSoundCNN.load_published("truncated.pt")
