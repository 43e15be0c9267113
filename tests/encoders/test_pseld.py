"""Networks and checkpoints of stereo SELD, PSELDNets, PANNs and HTS-AT, and the front end they share."""

import json

import numpy as np
import pytest
import soundfile
import torch

from audio_llm.cli import main
from audio_llm.encoders import features
from audio_llm.encoders.cnn14 import CNN14
from audio_llm.encoders.htsat import HTSAT
from audio_llm.encoders.seld_head import CLASSES, SELDHead, SELDNetwork
from audio_llm.encoders.sequence import DecoderConfig
from audio_llm.errors import AudioError, CheckpointError, ConfigError
from audio_llm.model.encoder import build_encoder, encoder_config
from audio_llm.model.folder import load_encoder, save_parts
from audio_llm.tasks.base import find_task
from eval.tasks.seld_metric import score_tables
from tests.encoders.pseld_tools import excerpt, published_state, whole
from tests.encoders.test_mamba import check_rounding, rounding
from tests.tasks.test_seld import SETTINGS, tables

SMALL = {"name": "cnn14", "preset": "tiny", "widths": (8, 8, 8, 16, 32), "decoder": {"kind": "none"}}
DECODERS = {"HTSAT": None, "CNN14_Conformer": "conformer", "CNN14_BiMamba": "bimamba", "CNN14_BiMambaAC": "bimamba_ac",
            "CNN14_ConBimamba": "conbimamba", "CNN14_ConBiMambaAC": "conbimamba_ac"}  # fmt: skip
# 180 to 340 million weights each, drawn anew: a minute together.
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in DECODERS if name not in ("HTSAT", "CNN14_BiMambaAC")]


# --------------------------------------------------------------------------------------------------------- front end


def stereo_planes(waveform: np.ndarray) -> np.ndarray:
    encoder = build_encoder({"name": "cnn14", "widths": (1,) * 6})
    return encoder.planes(torch.from_numpy(waveform)[None])[0].numpy()


def test_planes_of_the_excerpt():
    """Its samples are already divided by the peak of the clip they were cut from."""
    encoder = build_encoder({"name": "cnn14", "widths": (1,) * 6, "peak_normalize": False})
    planes = encoder.planes(torch.from_numpy(excerpt()["audio"])[None])[0, :, :23].numpy()
    np.testing.assert_allclose(planes, excerpt()["planes"], rtol=0, atol=5e-6)


@pytest.mark.shared("fixtures/pseld_ref.npz")
@pytest.mark.parametrize("clip", ["mix", "hardleft"])
def test_planes_of_the_reference(clip):
    audio = whole()[f"pfoa/{clip}/audio"]
    np.testing.assert_allclose(stereo_planes(audio), whole()[f"pfoa/{clip}/feat"], rtol=0, atol=5e-6)
    swapped = stereo_planes(audio[::-1].copy())
    np.testing.assert_allclose(swapped, whole()[f"pfoa/{clip}/feat_lrswap"], rtol=0, atol=5e-6)


def test_exchanging_the_channels_negates_one_plane():
    audio = np.random.default_rng(0).standard_normal((2, 24000)).astype(np.float32)
    planes, swapped = stereo_planes(audio), stereo_planes(audio[::-1].copy())
    np.testing.assert_array_equal(swapped[4], -planes[4])
    np.testing.assert_array_equal(np.delete(swapped, 4, 0), np.delete(planes, 4, 0))


@pytest.mark.parametrize(("rate", "n_fft", "mels"), [(24000, 1024, 64), (16000, 512, 40)])
def test_htk_bank_is_librosas(rate, n_fft, mels):
    import librosa

    bank = features.mel_bank(rate, n_fft, mels, 20.0, rate / 2, scale="htk")
    oracle = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=mels, fmin=20.0, fmax=rate / 2, htk=True).T
    np.testing.assert_allclose(bank.numpy(), oracle, atol=1e-7)


def test_a_short_window_is_librosas():
    import librosa

    waveform = np.random.default_rng(0).standard_normal((1, 2, 6000)).astype(np.float32)
    ours = features.stft(torch.from_numpy(waveform), 1024, 480, 960)
    oracle = librosa.stft(waveform, n_fft=1024, hop_length=480, win_length=960, pad_mode="reflect").swapaxes(-1, -2)
    np.testing.assert_allclose(ours.numpy(), oracle, atol=2e-4)


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (90, 0), (-45, 30), (170, -60)])
def test_ambisonic_intensity_points_to_the_source(azimuth, elevation):
    a, e = np.radians([azimuth, elevation])
    direction = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])  # y, z, x
    noise = np.random.default_rng(4).standard_normal(24000)
    foa = (np.concatenate(([1.0], direction))[:, None] * noise).astype(np.float32)
    encoder = build_encoder({"name": "cnn14", "layout": "foa", "widths": (1,) * 6})
    planes = encoder.planes(torch.from_numpy(foa)[None])[0]
    bank = features.mel_bank(24000, 1024, 64, 20.0, 12000.0, scale="htk").sum(dim=0)
    assert planes.shape == (7, 51, 64)
    np.testing.assert_allclose((planes[4:] / bank).mean(dim=(1, 2)).numpy(), direction, atol=1e-3)


def test_stereo_planes_are_those_of_its_ambisonics():
    stereo = np.random.default_rng(5).standard_normal((2, 24000)).astype(np.float32)
    zeros = np.zeros_like(stereo[0])
    foa = np.stack([stereo.mean(axis=0), (stereo[0] - stereo[1]) / 2, zeros, zeros])
    fields = {"name": "cnn14", "widths": (1,) * 6, "peak_normalize": False}
    as_stereo, as_foa = (
        build_encoder({**fields, "layout": layout}).planes(torch.from_numpy(audio)[None])
        for layout, audio in (("stereo", stereo), ("foa", foa))
    )
    torch.testing.assert_close(as_stereo, as_foa, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", DECODERS)
def test_parameter_counts(name):
    """The published ones; built without memory."""
    with torch.device("meta"):
        kind = DECODERS[name]
        encoder = build_encoder({"name": "cnn14", "preset": kind} if kind else {"name": "htsat"})
        network = SELDNetwork(encoder, SELDHead(encoder))
    counts = {
        "HTSAT": 28_083_725, "CNN14_Conformer": 210_078_389, "CNN14_BiMamba": 178_113_205,
        "CNN14_BiMambaAC": 76_083_414, "CNN14_ConBimamba": 338_247_349, "CNN14_ConBiMambaAC": 235_819_543,
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in network.parameters()) == counts[name]


@pytest.mark.parametrize(("name", "count"), [("htsat", 34_596_242), ("cnn14", 179_406_906)])
def test_parameter_counts_of_pseldnets(name, count):
    """170 classes, three tracks, a vector for each and no distance; four channels, 10 s."""
    with torch.device("meta"):
        encoder = build_encoder({"name": name, "preset": "pseldnets"})
        network = SELDNetwork(encoder, SELDHead(encoder, 170, elements=("x", "y", "z")))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.shared("fixtures/pseld_ref.npz")
@pytest.mark.parametrize("name", ["HTSAT", "CNN14_BiMambaAC", *LARGE])
@torch.inference_mode()
def test_networks_of_the_reference(name, tmp_path):
    """A checkpoint as the reference writes it, loaded strictly; from planes and from sound."""
    state = published_state(str(whole()[f"models/{name}/keys"]))
    torch.save({"seld_model": state, "epoch": 7, "best_f_score": np.float64(0.3)}, tmp_path / "best_model.pth")
    load = HTSAT.load_published if name == "HTSAT" else lambda path: CNN14.load_published(path, frames="covered")
    published = load(tmp_path / "best_model.pth")
    encoder, head = published.encoder, published.heads["seld"]
    clips = ("mix", "hardleft")
    planes, sound = (torch.from_numpy(np.stack([whole()[f"pfoa/{clip}/{part}"] for clip in clips]))
                     for part in ("feat", "audio"))  # fmt: skip

    def network(values: torch.Tensor) -> torch.Tensor:
        return head(encoder.patches(encoder.encode_planes(values))).flatten(2)

    output = network(planes)
    error = (output - torch.from_numpy(whole()[f"models/{name}/y"])).abs()
    moved = rounding(network, planes, output)
    check_rounding(error, moved)
    heard = SELDNetwork(encoder, head)(sound, torch.tensor([120000, 120000])).flatten(2)
    assert (heard - output).abs().max() <= max(5e-6, 3 * float(moved.max()))
    assert sum(p.numel() for p in [*encoder.parameters(), *head.parameters()]) == int(whole()[f"models/{name}/nparams"])
    assert published.facts["labels"] == list(CLASSES)


@pytest.mark.shared("fixtures/pseld_ref.npz")
@pytest.mark.parametrize("name", ["macro", "macro_inf", "macro_dist", "macro_on"])
def test_scores_by_class_of_the_official_baseline(name):
    criteria, average = SETTINGS[name]
    found = score_tables(tables("gt"), tables("pred"), criteria).scores(average).classwise
    np.testing.assert_allclose(found, whole()[f"metrics/baseline/{name}/classwise"], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- checkpoints


def conformer_shapes(width: int, layers: int = 2, heads: int = 4) -> dict[str, list[int]]:
    """Key and shape of every weight of a published Conformer: feed-forward x 2, kernel 7."""
    wide, square, norm = 2 * width, [width, width], {"weight": [width], "bias": [width]}
    mixer: dict[str, list[int]] = {"attention.pos_proj.weight": square}
    for name in ("query", "key", "value", "out"):
        mixer |= {f"attention.{name}_proj.weight": square, f"attention.{name}_proj.bias": [width]}
    for name in ("u_bias", "v_bias"):
        mixer[f"attention.{name}"] = [heads, width // heads]
    feed_forward = {"1.weight": [wide, width], "1.bias": [wide], "4.weight": [width, wide], "4.bias": [width]}
    convolution = {"2.conv.weight": [wide, width, 1], "2.conv.bias": [wide], "4.conv.weight": [width, 1, 7],
                   "7.conv.weight": [width, width, 1], "7.conv.bias": [width], "5.num_batches_tracked": []}  # fmt: skip
    for part in ("weight", "bias", "running_mean", "running_var"):
        convolution[f"5.{part}"] = [width]
    block: dict[str, list[int]] = {f"4.{key}": shape for key, shape in norm.items()}
    for place, parts in ((0, feed_forward), (2, convolution), (3, feed_forward)):
        for key, shape in (parts | {f"0.{key}": shape for key, shape in norm.items()}).items():
            block[f"{place}.module.sequential.{key}"] = shape
    for key, shape in (mixer | {f"layer_norm.{key}": shape for key, shape in norm.items()}).items():
        block[f"1.module.{key}"] = shape
    return {f"decoder.layers.{n}.sequential.{key}": shape for n in range(layers) for key, shape in block.items()}


def published_cnn14(kind: str) -> dict[str, torch.Tensor]:
    """A narrow stereo checkpoint in the published layout, from the excerpt's decoder keys."""
    trunk = build_encoder({"name": "cnn14", "widths": (4, 4, 4, 8, 8, 128)})
    keys = json.dumps(conformer_shapes(128)) if kind == "conformer" else str(excerpt()[f"{kind}/keys"])
    decoder = published_state(keys)
    return {
        **{key: value.clone() for key, value in trunk.state_dict().items()},
        **{f"decoder.{key}": value for key, value in decoder.items()},
        "fc.weight": 0.1 * torch.randn(117, 128),
        "fc.bias": torch.zeros(117),
    }


NARROW = {"widths": (4, 4, 4, 8, 8, 128)}


SMALL_HTSAT = {"embed_size": 16, "depths": (1, 2, 1, 1), "heads": (2, 2, 2, 2)}


def published_htsat(classes: int, elements: int, **fields) -> dict[str, torch.Tensor]:
    """A narrow SELD network on HTS-AT in the published layout, with the constants that files of it carry."""
    trunk = build_encoder({"name": "htsat", **SMALL_HTSAT, **fields}).state_dict()
    state = {key if key.startswith("scalar.") else f"encoder.{key}": value for key, value in trunk.items()}
    outputs = 3 * elements * classes
    state |= {"tscam_conv.weight": 0.1 * torch.randn(outputs, 128, 2, 3), "tscam_conv.bias": torch.zeros(outputs)}
    state["encoder.layers.1.blocks.1.attn_mask"] = torch.zeros(16, 64, 64)
    state["encoder.layers.1.blocks.1.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.long)
    return state


@pytest.mark.shared("fixtures/pseld_ref.npz")
def test_the_conformer_has_the_published_keys():
    shapes = {f"decoder.{key}": shape for key, shape in conformer_shapes(2048, heads=8).items()}
    keys = json.loads(str(whole()["models/CNN14_Conformer/keys"])).items()
    assert shapes == {k: shape for k, shape in keys if k.startswith("decoder.") and not k.endswith(".pe")}


@pytest.mark.parametrize("kind", ["bmamba", "bmamba_ac", "conbimamba", "conbimamba_ac", "conformer"])
def test_decoders_are_recognised(kind, tmp_path):
    torch.save({"seld_model": published_cnn14(kind), "opt": {}}, tmp_path / "best_model.pth")
    published = CNN14.load_published(tmp_path / "best_model.pth", **NARROW)
    decoder = published.encoder.config.decoder
    assert decoder.kind == kind.replace("bmamba", "bimamba") and decoder.layers == 2
    assert decoder.ssd == ("exact" if kind == "conformer" else "clamped")
    assert (decoder.columns == "reinterpreted") == kind.endswith("ac")
    assert published.heads["seld"].frames == 50
    folder = save_parts(tmp_path / "folder", published.encoder, published.heads, published.facts)
    again = load_encoder(folder)
    assert encoder_config(again) == encoder_config(published.encoder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), published.encoder.parameters(), strict=True))


def wrapped(layout: str) -> tuple[dict, dict]:
    """A file's content in one of the other layouts, narrow, and the fields that say so."""
    if layout == "pseldnets":
        fields = {"layout": "foa", "widths": (4, 4, 4, 8, 8, 16), "decoder": {"kind": "none"}}
        state = build_encoder({"name": "cnn14", **fields}).state_dict()
        state |= {"fc.weight": torch.randn(9 * 20, 16), "fc.bias": torch.zeros(9 * 20)}
        lightning = {f"net._orig_mod.{key}": value for key, value in state.items()}
        return {"state_dict": {**lightning, "af_extractor.window": torch.ones(1024)}, "epoch": 3}, {
            "widths": fields["widths"]
        }
    bins, time = torch.arange(513).double(), torch.arange(1024).double()
    angle = 2 * torch.pi * torch.outer(bins, time) / 1024
    front = {
        "spectrogram_extractor.stft.conv_real.weight": (angle.cos() * features.hann(1024)).float()[:, None],
        "spectrogram_extractor.stft.conv_imag.weight": (-angle.sin() * features.hann(1024)).float()[:, None],
        "logmel_extractor.melW": features.mel_bank(32000, 1024, 64, 50.0, 14000.0).clone(),
    }
    if layout == "panns":
        fields = {"widths": (4, 4, 4, 8, 8, 16)}
        state = build_encoder({"name": "cnn14", "preset": "panns", **fields}).state_dict()
        state = {key.replace("scalar.0.", "bn0.").removeprefix("convs."): value for key, value in state.items()}
        heads = {"fc1.weight": torch.randn(16, 16), "fc1.bias": torch.randn(16),
                 "fc_audioset.weight": torch.randn(527, 16), "fc_audioset.bias": torch.randn(527)}  # fmt: skip
        return {"iteration": 1, "model": {**front, **state, **heads}}, fields
    fields = {"embed_size": 16, "depths": (1, 2, 1, 1), "heads": (2, 2, 2, 2)}
    state = build_encoder({"name": "htsat", "preset": "audioset", **fields}).state_dict()
    state = {key.replace("scalar.0.", "bn0."): value for key, value in state.items()}
    state |= {"layers.1.blocks.1.attn_mask": torch.zeros(16, 64, 64), "tscam_conv.weight": torch.zeros(527, 128, 2, 3)}
    state |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.long)}
    state |= {"tscam_conv.bias": torch.zeros(527), "head.weight": torch.zeros(527, 527), "head.bias": torch.zeros(527)}
    return {"state_dict": {f"sed_model.{key}": value for key, value in {**front, **state}.items()}}, fields


@pytest.mark.parametrize("layout", ["pseldnets", "panns", "audioset"])
def test_other_layouts_load_strictly(layout, tmp_path):
    content, fields = wrapped(layout)
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    load = HTSAT.load_published if layout == "audioset" else CNN14.load_published
    published = load(path, **fields)
    encoder = published.encoder
    assert encoder.layouts[0] == ("foa" if layout == "pseldnets" else "mono")
    samples = encoder.window_samples
    with torch.inference_mode():
        tokens, _ = encoder(torch.randn(1, encoder.num_channels, samples), torch.tensor([samples]))
    assert torch.isfinite(tokens).all()
    if layout == "pseldnets":
        assert published.heads["seld"].elements == ("x", "y", "z") and published.heads["seld"].num_classes == 20
    elif layout == "panns":  # as PANNs' own Cnn14 makes tags of its last maps, averaged over frequency
        weights = content["model"]
        pooled = tokens.max(dim=1).values + tokens.mean(dim=1)
        hidden = torch.relu(pooled @ weights["fc1.weight"].T + weights["fc1.bias"])
        expected = hidden @ weights["fc_audioset.weight"].T + weights["fc_audioset.bias"]
        with torch.inference_mode():
            tagged = published.heads["head"](tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        torch.testing.assert_close(tagged, expected)
        assert published.facts["task"] == "tagging" and published.facts["labels"][526] == "class 526"
    else:
        assert not published.heads


def test_weights_saved_again_are_not_taken_for_those_of_the_other_network(tmp_path):
    """Stereo SELD and PSELDNets have the same keys, and what is a distance in one is a height in the other."""
    stereo, theirs = published_htsat(13, 3), published_htsat(170, 3, layout="foa")
    lightning = {f"net._orig_mod.{key}": value for key, value in published_htsat(13, 3, layout="foa").items()}
    files = {
        "published": {"seld_model": stereo, "opt": {}},
        "renamed": {"model": stereo},
        "bare": stereo,
        "wrapped": {"state_dict": stereo},
        "sphere": {"state_dict": lightning},  # PSELDNets trained on as many classes
        "sphere renamed": {"model": theirs},
        "sphere bare": theirs,
        "sphere unwrapped": {"state_dict": theirs},
        "ten classes": published_htsat(10, 3),
        "trunk": {"model": {key: value for key, value in stereo.items() if "tscam" not in key}},
    }
    found = {}
    for name, content in files.items():
        torch.save(content, tmp_path / "file.pth")
        try:
            published = HTSAT.load_published(tmp_path / "file.pth", **SMALL_HTSAT)
        except CheckpointError as error:
            assert "their keys are the same" in str(error).lower() and "seld_model" in str(error)
            found[name] = "refused"
        else:
            found[name] = f"{published.encoder.layouts[0]} {published.heads['seld'].elements[2]}"
    like = {"stereo": "stereo distance", "sphere": "foa z"}
    expected = {name: like[name.partition(" ")[0]] for name in files if name.startswith("sphere")}
    expected |= dict.fromkeys(("published", "renamed", "bare"), like["stereo"])
    assert found == expected | dict.fromkeys(("wrapped", "ten classes", "trunk"), "refused")


def test_a_tagging_network_tags(tmp_path, capsys):
    """PANNs' file is one of classes, not of events; as a folder it tags a sound, with names from AudioSet's table."""
    content, fields = wrapped("panns")
    torch.save(content, tmp_path / "Cnn14.pth")
    assert find_task(tmp_path / "Cnn14.pth").name == "classification"
    torch.save(
        {"model": {key: value for key, value in content["model"].items() if "fc" not in key}}, tmp_path / "trunk"
    )
    assert find_task(tmp_path / "trunk").name == "seld"
    widths = f"widths={list(fields['widths'])}"
    assert main(["convert", str(tmp_path / "Cnn14.pth"), str(tmp_path / "panns"), "--set", widths]) == 0
    rows = "".join(f'{number},/m/{number},"Sound {number}"\n' for number in range(527))
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n" + rows)
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(32000), 32000)
    command = ["predict", str(tmp_path / "panns"), str(tmp_path / "a.wav"), "--format", "json"]
    capsys.readouterr()
    assert main(command) == 0
    plain = json.loads(capsys.readouterr().out)["probabilities"]
    assert main([*command, "--labels", str(tmp_path / "classes.csv")]) == 0
    named = json.loads(capsys.readouterr().out)["probabilities"]
    assert list(plain.values()) == list(named.values()) and len(plain) == 527 and sum(plain.values()) > 1.5
    assert list(plain)[3] == "class 3" and list(named)[3] == "sound 3"


@pytest.mark.parametrize("layout", ["panns", "audioset"])
def test_one_plane_is_spread_over_seven(layout, tmp_path):
    """A sum over equal planes then gives what the one plane gave."""
    content, fields = wrapped(layout)
    torch.save(content, tmp_path / "model.pth")
    load = HTSAT.load_published if layout == "audioset" else CNN14.load_published
    mono, stereo = (load(tmp_path / "model.pth", layout=kind, **fields).encoder for kind in ("mono", "stereo"))
    plane = torch.randn(1, 1, mono.config.frames, 64)
    with torch.inference_mode():
        torch.testing.assert_close(
            stereo.encode_planes(plane.expand(-1, 7, -1, -1)), mono.encode_planes(plane), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["conformer", "bimamba", "bimamba_ac", "conbimamba", "conbimamba_ac", "gru", "none"])
@pytest.mark.parametrize("layout", ["pseldnets", "panns", "stereo"])
def test_a_published_trunk_takes_a_decoder_of_ours(layout, kind, tmp_path):
    """As the paper trained its stereo networks: the CNN is the file's, the decoder starts anew, the head is gone."""
    path = tmp_path / "CNN14.ckpt"
    if layout == "panns":
        content, fields = wrapped("panns")
    else:
        content, fields = published_cnn14("bmamba" if kind == "conformer" else "conformer"), dict(NARROW)
        if layout == "pseldnets":
            content |= {"fc.weight": torch.zeros(9 * 20, 128), "fc.bias": torch.zeros(9 * 20)}
            content = {"state_dict": {f"net._orig_mod.{key}": value for key, value in content.items()}}
    torch.save(content, path)
    size = {"layers": 1, "head_size": 16, "heads": 4}
    fields |= {"layout": "stereo", "window_seconds": 5, "decoder": {"kind": kind, **size}}
    if layout == "panns" and kind == "none":
        published = CNN14.load_published(path, **fields)
        assert "left_out" not in published.facts
    else:
        first = "head" if layout == "panns" else "decoder"
        with pytest.warns(UserWarning, match=rf"entries of its decoder .* left out: {first}\..*\({kind}\) starts"):
            published = CNN14.load_published(path, **fields)
        parts = {key.split(".")[0] for key in published.facts["left_out"]}
        assert parts == ({"head"} if layout == "panns" else {"decoder", "head"})
    encoder = published.encoder
    assert set(published.heads) == ({"head"} if (layout, kind) == ("panns", "none") else set())
    assert encoder.config.decoder.kind == kind and encoder.config.decoder.ssd == "exact"
    own = CNN14.load_published(
        path, layout="stereo", window_seconds=5, **{k: v for k, v in fields.items() if k == "widths"}
    )
    trunk = {key: value for key, value in own.encoder.state_dict().items() if not key.startswith("decoder.")}
    found = encoder.state_dict()
    assert set(trunk) == {key for key in found if not key.startswith("decoder.")}
    assert all(torch.equal(value, found[key]) for key, value in trunk.items())
    samples = encoder.window_samples
    tokens, _ = encoder.train()(0.1 * torch.randn(2, 2, samples), torch.tensor([samples, samples]))
    assert torch.isfinite(tokens).all() and samples == 5 * encoder.sample_rate
    SELDHead(encoder)(encoder.patches(tokens)).sum().backward()
    again = load_encoder(save_parts(tmp_path / "folder", encoder, {}, published.facts))
    assert encoder_config(again) == encoder_config(encoder)


def test_switches_and_sizes_beside_a_published_decoder(tmp_path):
    """A switch changes how the file's decoder runs; a size that is not the file's makes a new one of its kind."""
    path = tmp_path / "best_model.pth"
    torch.save({"seld_model": published_cnn14("bmamba")}, path)
    own = CNN14.load_published(path, **NARROW)
    for given in ({"ssd": "exact"}, {"kind": "bimamba", "ssd": "exact", "layers": 2}):
        exact = CNN14.load_published(path, **NARROW, decoder=given)
        assert exact.encoder.config.decoder.ssd == "exact" and "seld" in exact.heads
        assert all(torch.equal(a, b) for a, b in zip(exact.encoder.parameters(), own.encoder.parameters(), strict=True))
    with pytest.warns(UserWarning, match="left out"):
        deeper = CNN14.load_published(path, **NARROW, decoder={"layers": 3}).encoder.config.decoder
    assert (deeper.kind, deeper.layers, deeper.ssd) == ("bimamba", 3, "exact")
    assert deeper.head_size == own.encoder.config.decoder.head_size
    broken = published_cnn14("bmamba")
    del broken["convs.conv_block2.conv1.weight"]
    torch.save({"seld_model": broken}, path)
    with pytest.raises(CheckpointError, match=r"1 entries .* missing convs\.conv_block2\.conv1\.weight"):
        CNN14.load_published(path, **NARROW, decoder={"kind": "gru"})
    with pytest.raises(CheckpointError, match="decoder: expected a group of keys"):
        build_encoder({"name": "cnn14", "published": path, **NARROW, "decoder": "gru"})


def damaged(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "convs.conv_block2.conv1.weight"
    if how == "renamed":
        state["convs.conv_block2.conv9.weight"] = state.pop(key)
    elif how == "missing":
        del state["decoder.decoder.layers.0.mamba2_for.A_log"]
    elif how == "reshaped":
        state[key] = state[key][:2]
    elif how == "no head":
        state["fc.weight"] = state["fc.weight"][:100]
    return state


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("renamed", r"conv9"),
        ("missing", r"A_log"),
        ("reshaped", r"conv_block2\.conv1\.weight: expected \(4, 4, 3, 3\), found \(2, 4, 3, 3\)"),
        ("no head", r"projection\.weight"),
    ],
)
def test_a_file_that_does_not_fit_says_where(how, part, tmp_path):
    torch.save({"seld_model": damaged(published_cnn14("bmamba"), how)}, tmp_path / "best_model.pth")
    with pytest.raises(CheckpointError, match=part) as caught:
        CNN14.load_published(tmp_path / "best_model.pth", **NARROW)
    assert "\n" not in str(caught.value)


def test_the_wrong_encoder_and_another_front_end_are_named(tmp_path):
    content, fields = wrapped("panns")
    torch.save(content, tmp_path / "panns.pth")
    with pytest.raises(CheckpointError, match="weights of 'htsat', found those of 'cnn14'"):
        HTSAT.load_published(tmp_path / "panns.pth")
    with pytest.raises(CheckpointError, match="front end"):
        CNN14.load_published(tmp_path / "panns.pth", fmax=16000.0, **fields)
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"scalar\.0"):
        CNN14.load_published(tmp_path / "other.pth")


@pytest.mark.parametrize("layout", ["panns", "audioset"])
def test_what_is_left_out_is_named_to_the_letter(layout, tmp_path):
    """Of an entry under another name nothing is known, also where its right name would be left out."""
    content, fields = wrapped(layout)
    weights = content["model" if layout == "panns" else "state_dict"]
    for part in ("logmel_extractor.melW", "fc_audioset.bias" if layout == "panns" else "tscam_conv.bias"):
        key = next(name for name in weights if name.endswith(part))
        weights[f"{key}_old"] = weights.pop(key)
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=f"unexpected {part}_old"):
            (CNN14.load_published if layout == "panns" else HTSAT.load_published)(tmp_path / "model.pth", **fields)
        weights[key] = weights.pop(f"{key}_old")


# ---------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("layout", ["mono", "stereo", "foa"])
def test_a_clip_does_not_depend_on_its_batch(layout):
    torch.manual_seed(0)
    encoder = build_encoder({**SMALL, "layout": layout, "decoder": {"kind": "bimamba", "head_size": 16}}).eval()
    clip = torch.randn(1, encoder.num_channels, 30000)
    padded = torch.nn.functional.pad(clip, (0, 9000), value=float("nan"))
    with torch.inference_mode():
        alone, mask = encoder(clip, torch.tensor([30000]))
        together, _ = encoder(torch.cat((padded, torch.randn_like(padded))), torch.tensor([30000, 39000]))
    assert alone.shape == (1, encoder.grid[0], 32) and mask.all()
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_features_stay_float32_in_a_bfloat16_model():
    encoder = build_encoder(SMALL).eval()
    audio, length = torch.randn(1, 2, 40000), torch.tensor([40000])
    with torch.inference_mode():
        expected, _ = encoder(audio, length)
        planes = encoder.standardize(encoder.planes(audio))
        low = encoder.to(torch.bfloat16)
        tokens, _ = low(audio, length)
        assert low.standardize(low.planes(audio)).dtype == torch.float32
        assert (low.standardize(low.planes(audio)) - planes).abs().max() < 0.05
    assert (
        tokens.dtype == torch.bfloat16 and (tokens.float() - expected).abs().max() < 0.1 * expected.abs().max() + 0.05
    )


def test_statistics_of_the_planes_are_learnt_per_band():
    encoder = build_encoder(SMALL).train()
    audio = torch.randn(4, 2, 40000)
    planes = encoder.planes(audio)
    normed = encoder.standardize(planes)
    np.testing.assert_allclose(normed.mean(dim=(0, 2)).detach().numpy(), 0, atol=1e-3)
    np.testing.assert_allclose(encoder.scalar[0].running_mean, 0.1 * planes[:, 0].mean(dim=(0, 1)), atol=1e-4)


@pytest.mark.parametrize("kind", ["conformer", "bimamba", "bimamba_ac", "conbimamba", "conbimamba_ac", "gru"])
def test_configuration_survives_json(kind):
    encoder = build_encoder({**SMALL, "decoder": {"kind": kind, "layers": 1, "head_size": 16}})
    again = build_encoder(json.loads(json.dumps(encoder_config(encoder))))
    assert again.config == encoder.config and isinstance(again.config.decoder, DecoderConfig)
    again.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(
    ("fields", "error", "part"),
    [
        ({"time_pools": (2, 2)}, ConfigError, "time_pools"),
        ({"window_seconds": 0.05}, ConfigError, "pooling"),
        ({"win_length": 2000}, ConfigError, "win_length"),
        ({"decoder": {"kind": "bimambo"}}, ConfigError, "bimamb"),
        ({"decoder": {"kind": "bimamba", "head_size": 0}}, ConfigError, "decoder.head_size: expected at least 1"),
        ({"decoder": {"kind": "conformer", "heads": 0}}, ConfigError, "decoder.heads: expected at least 1"),
    ],
)
def test_a_size_that_cannot_be_built_says_why(fields, error, part):
    with pytest.raises(error, match=part):
        build_encoder({**SMALL, **fields})


def test_wrong_channels_are_refused():
    encoder = build_encoder(SMALL).eval()
    with pytest.raises(AudioError, match="stereo or binaural"):
        encoder(torch.zeros(1, 4, 1000), torch.tensor([1000]))
    silence, length = torch.zeros(1, 2, 1), torch.tensor([1])
    assert torch.isfinite(encoder(silence, length)[0]).all()
