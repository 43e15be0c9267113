"""Spatial-AST against arrays of the public reference implementation, and the AudioEncoder contract."""

import argparse
import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audio_llm.encoders.features import hann, mel_bank, stft
from audio_llm.encoders.heads import SpatialHeads
from audio_llm.encoders.spatial_ast import SpatialAST
from audio_llm.errors import AudioError, CheckpointError, ConfigError
from audio_llm.model.encoder import build_encoder, encoder_config
from tests.paths import DATA, SHARED

FIXTURES = SHARED / "fixtures"
EXCERPT = DATA / "spatial_ast_reference.npz"
SMALL = {"name": "spatial_ast", "preset": "tiny", "hidden_size": 32, "depth": 2, "heads": 2}


def seeded_fill(module: nn.Module) -> None:
    """Weights drawn per key from a generator seeded by the key's checksum, as the reference arrays were made."""
    import zlib

    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(tensor.shape)).astype(np.float32)
        if key.endswith("running_var"):
            draw = 100 + 20 * np.abs(draw) if key.startswith("bn.") else 0.5 + np.abs(draw)
        elif key.endswith("running_mean"):
            draw = -30 + 3 * draw if key.startswith("bn.") else 0.1 * draw
        elif key.endswith("weight") and tensor.ndim == 1:
            draw = 1 + 0.1 * draw
        else:
            draw = (0.2 if key == "conv_downsample.0.weight" else 0.02) * draw
        tensor.copy_(torch.from_numpy(np.asarray(draw, dtype=np.float32)))


@pytest.fixture(scope="module")
def published() -> SpatialAST:
    encoder = build_encoder({"name": "spatial_ast"})
    with torch.no_grad():
        seeded_fill(encoder)
    return encoder.eval()


@pytest.fixture(scope="module")
def reference():
    return np.load(FIXTURES / "bat_ref.npz")


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)


def test_excerpt_of_the_reference(published):
    """A piece of the reference's planes, and its first tokens for 10 s of silence."""
    excerpt = np.load(EXCERPT)
    with torch.inference_mode():
        planes = published.raw_planes(torch.from_numpy(excerpt["waveform"])[None])[0, :, :12]
        tokens, mask = published(torch.zeros(1, 2, 320000), torch.tensor([320000]))
    close(planes[:2], excerpt["logmel"], 5e-4)
    close(planes[2:], excerpt["phase"], 5e-5)
    close(tokens[0, :8], excerpt["tokens_silence"], 5e-5)
    assert tokens.shape == (1, 515, 768) and mask.all()


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_every_stage_of_the_reference(published, reference):
    waveform = torch.from_numpy(reference["wav"])
    with torch.inference_mode():
        raw = published.raw_planes(waveform)
        standardised = published._standardise(raw)
        planes = published.planes(waveform, torch.tensor([320000]))
        maps = published.conv_downsample(planes)
        tokens, _ = published(waveform, torch.tensor([320000]))
        patches = published.patch_embed(maps)
    close(raw[:, :2], reference["logmel"], 5e-4)
    close(raw[:, 2:], reference["ipd_mel"], 5e-5)
    close(standardised[:, :2], reference["logmel_bn"], 5e-5)
    close(planes[:, :, ::16], reference["interp"], 5e-5)
    close(maps, reference["conv"], 5e-5)
    close(patches, reference["patch"], 5e-5)
    close(tokens, reference["tokens"], 5e-5)


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_heads_of_the_reference(reference):
    heads = SpatialHeads(768).eval()
    with torch.no_grad():
        seeded_fill(heads)
        logits = heads(torch.from_numpy(reference["tokens"]))
    for found, name in zip(logits, ("head_cls", "head_dis", "head_azi", "head_ele"), strict=True):
        close(found, reference[name], 5e-5)


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_training_path_of_the_reference(published, reference):
    """Dry sound and impulse response come apart there: convolved in full, cut to the length of the sound."""
    dry, response = (torch.from_numpy(reference[name]) for name in ("wav", "train_rir"))
    size = dry.shape[-1] + response.shape[-1] - 1
    wet = torch.fft.irfft(torch.fft.rfft(dry[:, :1], size) * torch.fft.rfft(response, size), size)[..., :320000]
    heads = SpatialHeads(768).eval()
    with torch.no_grad():
        seeded_fill(heads)
        logits = heads(published(wet, torch.tensor([320000]))[0])
    for found, name in zip(logits, ("train_cls", "train_dis", "train_azi", "train_ele"), strict=True):
        close(found, reference[name], 5e-5)


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_short_clip_is_stretched_on_request_only(published, reference):
    half, length = torch.from_numpy(reference["wav"][:, :, :160000]), torch.tensor([160000])
    stretching = copy.copy(published)  # the same weights
    stretching.config = dataclasses.replace(published.config, short_clip="stretch")
    with torch.inference_mode():
        close(stretching(half, length)[0], reference["tokens_5s"], 5e-5)
        padded = published(half, length)[0]
        zeros = torch.zeros(1, 2, 160000)
        assert torch.equal(padded, published(torch.cat((half, zeros), 2), torch.tensor([320000]))[0])
    assert (padded - torch.from_numpy(reference["tokens_5s"])).abs().max() > 0.1


def published_state(size: dict, classes: int = 355) -> dict[str, torch.Tensor]:
    """A state dict in the layout of the published file, with the stored front end."""
    bins, time = torch.arange(513).double(), torch.arange(1024).double()
    angle = 2 * torch.pi * torch.outer(bins, time) / 1024
    return {
        **build_encoder({"name": "spatial_ast", **size}).state_dict(),
        **SpatialHeads(size.get("hidden_size", 768), classes).state_dict(),
        "spectrogram_extractor.conv_real.weight": (angle.cos() * hann(1024)).float()[:, None],
        "spectrogram_extractor.conv_imag.weight": (-angle.sin() * hann(1024)).float()[:, None],
        "logmel_extractor.melW": mel_bank(32000, 1024, 128, 50.0, 14000.0),
    }


@pytest.mark.shared("fixtures/bat_ref_keys.json")
def test_keys_shapes_and_size_are_the_published_ones():
    tables = json.loads((FIXTURES / "bat_ref_keys.json").read_text())
    state = published_state({})
    found = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert found == tables["encoder_full"]
    counted = sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k)
    assert counted == tables["params"]["full"] == 87_473_466
    with torch.device("meta"):
        heads = SpatialHeads(768)
        learnt = [*build_encoder({"name": "spatial_ast"}).parameters(), *heads.parameters()]
    assert sum(parameter.numel() for parameter in learnt) == 85_963_194


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_trunk_alone_leaves_out_the_heads(published, reference):
    """What the reference's trunk lacked of the whole file, and did not know: all heads but the one called so."""
    assert not len(reference["encoder_missing"])
    constants = ("spectrogram_extractor.", "logmel_extractor.")
    whole = {key for key in published_state({}) if not key.startswith(constants)}
    heads = whole - set(published.state_dict())
    assert set(map(str, reference["encoder_unexpected"])) == heads - {"head.weight", "head.bias"}


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_transform_of_the_reference(reference):
    """Frames 40 to 55 of its convolution with windowed sines, which meet the first sound; to that one's rounding."""
    spectrum = stft(torch.from_numpy(reference["wav"]), 1024, 320)
    assert list(reference["stft_shape"]) == [2, 1, *spectrum.shape[2:]]  # its channels were a batch
    close(spectrum[0, :, 40:56].real, reference["stft_re"], 1e-4)
    close(spectrum[0, :, 40:56].imag, reference["stft_im"], 1e-4)


def test_published_checkpoint_loads_strictly(tmp_path):
    path = tmp_path / "finetuned.pth"
    size = {"hidden_size": 48, "depth": 4, "heads": 2}  # the published front end, a smaller transformer
    state = published_state(size)
    outer = {"optimizer": {}, "epoch": 99, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}
    torch.save({"model": state, **outer}, path)
    published = SpatialAST.load_published(path, **size)
    encoder, heads = published.encoder, published.heads["spatial"]
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])
    assert torch.equal(heads.azimuth_head.weight, state["azimuth_head.weight"])
    broken = {key: value for key, value in state.items() if key != "blocks.3.norm1.bias"} | {"extra": torch.ones(1)}
    torch.save({"model": broken}, path)
    with pytest.raises(CheckpointError, match=r"2 entries .* missing blocks\.3\.norm1\.bias .* unexpected extra"):
        SpatialAST.load_published(path, **size)
    state["logmel_extractor.melW"] = state["logmel_extractor.melW"] * 1.01
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="melW: expected the front end of 32000 Hz"):
        SpatialAST.load_published(path, **size)


def test_unsafe_pickle_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {}, "args": Path("/")}, path)
    with pytest.raises(CheckpointError, match="expected a PyTorch checkpoint of tensors"):
        SpatialAST.load_published(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        SpatialAST.load_published(path)


# ------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("layout", ["mono", "stereo", "binaural", "foa"])
def test_a_clip_alone_equals_the_clip_in_a_padded_batch(layout):
    torch.manual_seed(0)
    encoder = build_encoder({**SMALL, "layout": layout}).eval()
    lengths = torch.tensor([40960, 9000, 16])
    waveform = torch.randn(3, encoder.num_channels, 40960) * 0.1
    for row, length in enumerate(lengths):
        waveform[row, :, length:] = float("nan")  # nothing after the length may be heard
    with torch.inference_mode():
        together, mask = encoder(waveform, lengths)
        assert together.shape == (3, encoder.num_tokens, 32) and mask.shape == together.shape[:2]
        for row, length in enumerate(lengths.tolist()):
            alone, _ = encoder(waveform[row : row + 1, :, :length], lengths[row : row + 1])
            # Equal in exact arithmetic; a matrix product may sum in another order for another number of rows.
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-5)
            same = torch.nan_to_num(waveform[row : row + 1, :, :length]).expand(3, -1, -1)
            again, _ = encoder(same, lengths[row].expand(3))
            padded, _ = (
                encoder(nn.functional.pad(same, (0, 7)), lengths[row].expand(3)) if length < 40000 else (again, 0)
            )
            assert torch.equal(again, padded)


def test_both_channels_count():
    torch.manual_seed(0)
    encoder = build_encoder(SMALL).eval()
    waveform = torch.randn(1, 2, 30000) * 0.1
    with torch.inference_mode():
        length = torch.tensor([30000])
        tokens, swapped = encoder(waveform, length)[0], encoder(waveform.flip(1), length)[0]
    assert (tokens - swapped).abs().max() > 0.01


def test_wrong_input_is_an_error_that_names_both_sides():
    encoder = build_encoder(SMALL)
    with pytest.raises(AudioError, match=r"expected \(batch, 2, time\), .*binaural.* found shape \(1, 4, 100\)"):
        encoder(torch.zeros(1, 4, 100), torch.tensor([100]))
    with pytest.raises(AudioError, match="clip 1 .*window is 40960 samples, 2.56 s.* found 41000 samples, 2.56 s"):
        encoder(torch.zeros(2, 2, 41000), torch.tensor([40960, 41000]))
    with pytest.raises(AudioError, match="found 0 samples"):
        encoder(torch.zeros(1, 2, 100), torch.tensor([0]))


def test_configuration_round_trip():
    encoder = build_encoder({**SMALL, "layout": "foa", "patch_size": [16, 8], "patch_embed": "convolutional"})
    config = json.loads(json.dumps(encoder_config(encoder)))
    again = build_encoder(config)
    assert encoder_config(again) == config and again.grid == (8, 8)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "spatial_asd"}, "did you mean 'spatial_ast'"),
        ({"hiden_size": 8}, "unknown key 'hiden_size' .did you mean 'hidden_size'"),
        ({"preset": "tinny"}, "did you mean 'tiny'"),
        ({"heads": 3}, "hidden_size: expected a multiple of heads"),
        ({"patch_size": [7, 16]}, "sides that divide 128 frames and 64 mels"),
        ({"fmax": 9000.0}, "fmin, fmax: expected 0 <= fmin < fmax <= 8000 Hz"),
        ({"window_seconds": 10.0}, "target_frames: expected at least"),
        ({"layout": "quad"}, "expected one of mono, stereo, binaural, foa"),
        ({"patch_size": [2, 16], "patch_embed": "convolutional"}, "multiples of 4"),
    ],
)
def test_bad_configuration_is_explained(change, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder({**SMALL, **change})


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder({**SMALL, "patch_embed": "convolutional"}).train()
        encoder.gradient_checkpointing = checkpointing
        encoder(torch.randn(2, 2, 20000) * 0.1, torch.tensor([20000, 9000]))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_frozen_encoder_does_not_move_in_training_mode():
    encoder = build_encoder({**SMALL, "drop_path": 0.5}).requires_grad_(False).train()
    before = encoder.bn.running_mean.clone()
    waveform, length = torch.randn(2, 2, 20000), torch.tensor([20000, 20000])
    assert torch.equal(encoder(waveform, length)[0], encoder(waveform, length)[0])
    assert torch.equal(encoder.bn.running_mean, before) and not encoder.training
    assert encoder.requires_grad_(True).train().training


def test_features_stay_float32_under_autocast_and_in_bfloat16():
    torch.manual_seed(0)
    encoder = build_encoder(SMALL).eval()
    waveform, length = torch.randn(1, 2, 20000) * 1e-3, torch.tensor([20000])
    seen: list[torch.Tensor] = []
    encoder.conv_downsample.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        plain = encoder(waveform, length)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = encoder(waveform, length)[0]
        halved = encoder.to(torch.bfloat16)(waveform, length)[0]
    assert seen[1].dtype == torch.float32 and torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0].bfloat16(), seen[2]) and halved.dtype == torch.bfloat16
    for rough in (mixed, halved):
        assert (rough.float() - plain).norm() < 0.05 * plain.norm()


@pytest.mark.shared("fixtures/fill_weights.py")
def test_own_filling_is_that_of_the_fixtures():
    sys.path.insert(0, str(FIXTURES))
    try:
        from fill_weights import fill
    finally:
        sys.path.pop(0)
    ours, theirs = build_encoder(SMALL), build_encoder(SMALL)
    with torch.no_grad():
        seeded_fill(ours)
    fill(theirs, "bat")
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
