"""Published checkpoints: every layout loads strictly, what does not fit is refused in one line, nothing in it runs."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audio_llm.cli import main
from audio_llm.encoders.conversion import recognise
from audio_llm.encoders.heads import SpatialHeads, TokenMeanHead, UrbanSoundHead
from audio_llm.encoders.published import read_published, rename, signs_in, state_dict_of
from audio_llm.errors import CheckpointError, ConfigError
from audio_llm.model.encoder import ENCODERS, AudioEncoder, build_encoder
from audio_llm.model.folder import load_encoder, open_encoder
from audio_llm.tasks.classification.task import load_classifier
from tests.encoders.test_pseld import NARROW, SMALL_HTSAT, published_cnn14, published_htsat, wrapped
from tests.encoders.test_spatial_ast import published_state as spatial_state
from tests.encoders.test_whisper_encoder import original_state, transformers_whisper

BEATS_CFG = {  # a small model in the words of published files, all that differs from the code's defaults among them
    "input_patch_size": 16, "embed_dim": 24, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_layers": 3,
    "encoder_attention_heads": 4, "deep_norm": True, "relative_position_embedding": True, "gru_rel_pos": True,
    "max_distance": 800, "finetuned_model": False, "unheard_of": 1,
}  # fmt: skip
BEATS = {"patch_width": 24, "hidden_size": 32, "mlp_size": 48, "depth": 3, "heads": 4}
SPATIAL = {"hidden_size": 48, "depth": 2, "heads": 2}  # the front end of the file has to be the published one
TABLE = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
SEEDED = torch.Generator().manual_seed(0)
Writer = Callable[[dict[str, Tensor], Path], None]


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Seeded values for every floating tensor but the stored front ends, so that no two tensors are alike."""
    fixed = ("spectrogram_extractor.", "logmel_extractor.", "pos_embed")
    return {
        key: torch.rand(value.shape, generator=SEEDED) + 0.5
        if value.is_floating_point() and not key.startswith(fixed)
        else value.clone()
        for key, value in state.items()
    }


def beats_state() -> dict[str, Tensor]:
    """As published: the table of relative positions once per layer."""
    state = noise(build_encoder({"name": "beats", **BEATS}).state_dict())
    return state | {TABLE.format(layer): state[TABLE.format(0)] for layer in (1, 2)}


def beats_original(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"cfg": BEATS_CFG, "model": state}, path)


def beats_namespace(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"args": argparse.Namespace(**BEATS_CFG), "state_dict": state}, path)


def beats_bare(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def beats_inside(state: dict[str, Tensor], path: Path) -> None:
    """A tower in a larger model, saved from a distributed run."""
    whole = {f"module.audio_enc.{key}": value for key, value in state.items()}
    torch.save({"model": whole | {"module.fusion.0.weight": torch.zeros(2)}}, path)


def beats_new_norm(state: dict[str, Tensor], path: Path) -> None:
    """The names of today's weight norm, one table, prefix of an old wrapper."""
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    stem = "encoder.pos_conv.0."
    renamed = {
        stem + names[key.removeprefix(stem)] if key.removeprefix(stem) in names else key: value
        for key, value in state.items()
        if key not in (TABLE.format(1), TABLE.format(2))
    }
    torch.save({"cfg": BEATS_CFG, "model": {f"backbone.{key}": value for key, value in renamed.items()}}, path)


def beats_tokenizer(state: dict[str, Tensor], path: Path) -> None:
    extras = {"quantize.embedding.weight": torch.zeros(4, 2), "quantize_layer.0.weight": torch.zeros(2, 2)}
    torch.save({"cfg": {**BEATS_CFG, "quant_n": 1024, "quant_dim": 256}, "model": state | extras}, path)


def beats_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.clone() for key, value in state.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(BEATS_CFG))


def spatial_original(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state, "optimizer": {}, "epoch": 9, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}, path)


def urbansound_original(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "val_loss": np.float64(0.5)}, path)


def urbansound_state() -> dict[str, Tensor]:
    encoder = build_encoder({"name": "urbansound_cnn"})
    return noise({**encoder.state_dict(), **UrbanSoundHead(encoder.hidden_size, encoder.grid, 10).state_dict()})


def urbansound_bare(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def urbansound_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.clone() for key, value in state.items()}, path)


# What files of a layout hold beside the weights: a writer puts it in, a loader leaves it out.
BESIDE = r"extractor|\.pe$|attn_mask|relative_position_index|^(fc1|fc_audioset|tscam_conv|head)\.|^decoder\.token"
PREFIX = {"pseldnets": "net._orig_mod.", "audioset": "sed_model.", "panns": ""}


def spectral(layout: str) -> tuple[Callable[[], dict[str, Tensor]], Writer, dict[str, Any]]:
    """Weights, writer and fields of a narrow PANNs, HTS-AT or PSELDNets file."""
    content, fields = wrapped(layout)
    place = "model" if layout == "panns" else "state_dict"
    plain = {key.removeprefix(PREFIX[layout]): value for key, value in content[place].items()}
    beside = {key: value for key, value in plain.items() if re.search(BESIDE, key)}

    def write(state: dict[str, Tensor], path: Path) -> None:
        held = {f"{PREFIX[layout]}{key}": value for key, value in {**beside, **state}.items()}
        torch.save({**content, place: held, "hyper_parameters": argparse.Namespace(lr=1e-3)}, path)

    return lambda: noise({key: value for key, value in plain.items() if key not in beside}), write, fields


def stereo_state(decoder: str = "bmamba") -> dict[str, Tensor]:
    state = published_cnn14(decoder)
    counts = {key: value.long() for key, value in state.items() if key.endswith("num_batches_tracked")}
    return noise({key: value for key, value in (state | counts).items() if not re.search(BESIDE, key)})


def stereo_original(state: dict[str, Tensor], path: Path) -> None:
    sines = {"decoder.decoder.layers.0.positional_encoding.pe": torch.zeros(1)}
    torch.save({"seld_model": state | sines, "opt": {}, "epoch": 7, "best_f_score": np.float64(0.3)}, path)


def seld_htsat(layout: str) -> tuple[Callable[[], dict[str, Tensor]], Writer, dict[str, Any]]:
    """Weights, writer and fields of a narrow stereo or PSELDNets network on HTS-AT."""
    size = {"classes": 13, "elements": 3} if layout == "stereo" else {"classes": 20, "elements": 3, "layout": "foa"}
    plain = published_htsat(**size)  # type: ignore[arg-type]
    beside = {key: value for key, value in plain.items() if key.endswith(("attn_mask", "relative_position_index"))}

    def write(state: dict[str, Tensor], path: Path) -> None:
        if layout == "stereo":
            torch.save({"seld_model": beside | state, "opt": {}, "epoch": 7, "best_f_score": np.float64(0.3)}, path)
        else:
            held = {f"net._orig_mod.{key}": value for key, value in (beside | state).items()}
            held["af_extractor.melW"] = torch.zeros(513, 64)
            torch.save({"state_dict": held, "epoch": 3, "hyper_parameters": argparse.Namespace(lr=1e-3)}, path)

    return lambda: noise({key: value for key, value in plain.items() if key not in beside}), write, dict(SMALL_HTSAT)


def whisper_state() -> dict[str, Tensor]:
    return noise({k: value for k, value in original_state(transformers_whisper()).items() if not re.search(BESIDE, k)})


def whisper_original(state: dict[str, Tensor], path: Path) -> None:
    dims = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 48, "n_audio_head": 4, "n_audio_layer": 2}
    text = {"decoder.token_embedding.weight": torch.zeros(60, 48)}
    torch.save({"dims": dims, "model_state_dict": state | text}, path)


# name of the case -> encoder, its weights, who writes them, fields to give, a key to break
CASES: dict[str, tuple[str, Callable[[], dict[str, Tensor]], Writer, dict[str, Any], str]] = {
    **{
        writer.__name__.replace("_", "-"): ("beats", beats_state, writer, {}, "encoder.layers.1.fc1.bias")
        for writer in (
            beats_original, beats_namespace, beats_bare, beats_inside, beats_new_norm, beats_tokenizer,
            beats_safetensors,
        )
    },
    "spatial_ast": (
        "spatial_ast", lambda: noise(spatial_state(SPATIAL)), spatial_original, SPATIAL, "blocks.1.mlp.fc2.weight",
    ),
    **{
        writer.__name__.replace("_", "-"): ("urbansound_cnn", urbansound_state, writer, {}, "encoder2.bn.weight")
        for writer in (urbansound_original, urbansound_bare, urbansound_safetensors)
    },
    "stereo": ("cnn14", stereo_state, stereo_original, NARROW, "convs.conv_block2.conv1.weight"),
    **{
        f"stereo-{kind}": (
            "cnn14", functools.partial(stereo_state, kind), stereo_original, NARROW, "convs.conv_block2.conv1.weight",
        )
        for kind in ("conformer", "bmamba_ac", "conbimamba")
    },
    "stereo-htsat": ("htsat", *seld_htsat("stereo"), "encoder.layers.1.blocks.1.mlp.fc2.weight"),
    "pseldnets-htsat": ("htsat", *seld_htsat("pseldnets"), "encoder.layers.1.blocks.1.mlp.fc2.weight"),
    "pseldnets": ("cnn14", *spectral("pseldnets"), "convs.conv_block2.conv1.weight"),
    "panns": ("cnn14", *spectral("panns"), "conv_block2.conv1.weight"),
    "htsat": ("htsat", *spectral("audioset"), "layers.1.blocks.1.mlp.fc2.weight"),
    "whisper": ("whisper", whisper_state, whisper_original, {}, "encoder.blocks.1.mlp.0.bias"),
}  # fmt: skip
# Keys that sizes are read off.
MEASURED = r"^encoder\d\.conv\.weight|^fc2?\.weight|\.0\.mlp\.0\.weight|\.0\.fc1\.weight|^head\.weight" + (
    r"|u_bias|^tscam_conv\.weight|s\.0\.mamba2_for\.(A_log|norm\.weight)|s\.0\.0\.module\.sequential\.1\.weight|s\.0\.2\..*\.4\.conv\.weight"
)
# Names of the keys to break where ours differ.
OURS = {
    "conv_block2.conv1.weight": "convs.conv_block2.conv1.weight",
    "encoder.layers.1.blocks.1.mlp.fc2.weight": "layers.1.blocks.1.mlp.fc2.weight",
    "encoder.blocks.1.mlp.0.bias": "encoder.layers.1.fc1.bias",
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(encoder name, weights, writer, fields, key to break, path of the whole file)."""
    name, make, write, fields, key = CASES[request.param]
    state = make()
    path = tmp_path_factory.mktemp("published") / ("file.safetensors" if "safetensors" in request.param else "file.pt")
    write(state, path)
    return name, state, write, fields, key, path


# The same weights in another container: what is asked of weights is asked of them once, of every file by hand.
REPEATS = (
    *("beats-namespace", "beats-bare", "beats-inside", "beats-tokenizer", "beats-safetensors"),
    *("urbansound-bare", "urbansound-safetensors"),
)
of_every_network = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name in REPEATS else ()) for name in CASES], indirect=True
)


def conversion(path: Path, out: Path, fields: dict[str, Any], name: str | None = None) -> int:
    """The exit code of `audio-llm convert`."""
    settings = [f"{key}={json.dumps(value)}" for key, value in fields.items()]
    command = ["convert", str(path), str(out), *(["--set", *settings] if settings else [])]
    return main([*command, *(["--name", name] if name else [])])


def refusal(path: Path, capsys: pytest.CaptureFixture, fields: dict[str, Any], name: str | None = None) -> str:
    """The one line with which `audio-llm convert` refuses a file; nothing is left behind."""
    out = path.with_name("out")
    assert conversion(path, out, fields, name) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.strip().splitlines()) == 1 and not out.exists()
    assert printed.err.startswith(f"audio-llm convert: error: checkpoint {path}: ")
    return printed.err


def test_layout_loads_strictly(case, tmp_path):
    """By the command line, as in a recipe: every weight is the file's, and only heads are left."""
    name, state, _, fields, _, path = case
    encoder = build_encoder({"name": name, "published": path, **fields})
    assert recognise(path) == name and not encoder.training
    assert signs_in(state_dict_of(read_published(path))) == [name]  # of no other
    loaded, used = encoder.state_dict(), set()
    for key, value in loaded.items():
        alike = {other for other, found in state.items() if torch.equal(found, value)}
        assert key in alike if key in state else alike, key
        used |= {key} & alike or alike
    heads = (
        "head.",
        "fc_norm.",
        "dis",
        "doa",
        "azimuth",
        "elevation",
        "conv1d.",
        "fc",
        "tscam_conv",
        "spectrogram",
        "logmel",
    )
    assert used and all(key.startswith(heads) or "relative_attention_bias" in key for key in set(state) - used)
    assert conversion(path, tmp_path / "out", fields) == 0
    converted = load_encoder(tmp_path / "out").state_dict()
    assert set(converted) == set(loaded) and all(torch.equal(value, loaded[key]) for key, value in converted.items())


def test_layout_with_a_defect_is_refused_in_one_line(case, tmp_path, capsys):
    name, state, write, fields, key, whole = case
    path = tmp_path / whole.name

    def told(broken: dict[str, Tensor]) -> str:
        write(broken, path)
        return refusal(path, capsys, fields, name)

    others, ours = {other: value for other, value in state.items() if other != key}, OURS.get(key, key)
    message = told(others | {f"{key}_old": state[key]})
    assert f"missing {ours} " in message and f"unexpected {ours}_old" in message
    assert f"missing {ours} " in (message := told(others)) and "1 entries" in message
    assert f"{ours}: expected" in told(others | {key: torch.zeros(*state[key].shape, 2)})
    assert f"{ours}: expected finite values" in told(others | {key: state[key] / 0})
    assert f"{ours}: expected dense floating-point values, found torch.int8" in told(others | {key: state[key].char()})
    for share in (0.001, 0.3, 0.67, 0.999):
        path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        assert "Copy or download it again." in refusal(path, capsys, fields, name)


@of_every_network
def test_no_key_is_dispensable(case, tmp_path):
    """But for constants of a front end, which are compared where they are there, and tables that are all or one."""
    name, state, write, fields, _, whole = case
    path = tmp_path / whole.name
    for key in sorted(state)[:: max(1, len(state) // 20)]:
        if "extractor" not in key and "relative_attention_bias" not in key:
            write({other: value for other, value in state.items() if other != key}, path)
            with pytest.raises(CheckpointError):
                build_encoder({"name": name, "published": path, **fields})


def test_a_head_that_lacks_a_part_is_no_missing_head(tmp_path):
    state = noise(spatial_state(SPATIAL))
    for key in ("head.weight", "azimuth_head.weight"):
        spatial_original({other: value for other, value in state.items() if other != key}, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match=f"missing {key}"):
            build_encoder({"name": "spatial_ast", "published": tmp_path / "file.pt", **SPATIAL})


@of_every_network
def test_weights_of_another_encoder_are_called_by_its_name(case, tmp_path, capsys):
    name, state, write, fields, key, whole = case
    for other in sorted(set(ENCODERS) - {name}):
        assert f"expected weights of '{other}', found those of '{name}'" in refusal(whole, capsys, {}, other)


def test_what_lacks_its_first_key_is_still_known(tmp_path, capsys):
    """A name is told by several keys: a file without one of them is not taken for a file of another encoder."""
    first = {"patch_embedding.weight": beats_state(), "cls_tokens": noise(spatial_state(SPATIAL)),
             "encoder1.conv.weight": urbansound_state()}  # fmt: skip
    for key, state in first.items():
        torch.save({"model": {other: value for other, value in state.items() if other != key}}, tmp_path / "file.pt")
        assert key in refusal(tmp_path / "file.pt", capsys, {})


@of_every_network
def test_any_reshaped_entry_is_refused(case, tmp_path):
    """Sizes are read off shapes: whatever these are, the answer is a refusal and no other error."""
    name, state, write, fields, _, whole = case
    path = tmp_path / whole.name
    measured = [key for key in state if re.search(MEASURED, key)]
    for key in {*sorted(state)[:: max(1, len(state) // 6)], *measured}:
        for shape in ((), (0,), (3,), (0,) * state[key].ndim, (1, 1, 1, 1, 1)):
            if tuple(state[key].shape) != shape:
                write(state | {key: torch.zeros(shape)}, path)
                with pytest.raises(CheckpointError, match="file"):
                    build_encoder({"name": name, "published": path, **fields})


class Harm:
    """A pickle that would make a folder where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_pickle_that_runs_code_is_not_run(name, tmp_path, capsys):
    trace, path = tmp_path / "trace", tmp_path / "file.pt"
    torch.save({"model": {"a": torch.ones(2)}, "cfg": Harm(trace)}, path)
    assert "mkdir, which could run code" in refusal(path, capsys, {}, name)
    path.write_bytes(pickle.dumps({"model": Harm(trace)}))
    assert "found a pickle that torch.save did not write" in refusal(path, capsys, {}, name)
    path.write_bytes(pickle.dumps(Harm(trace), protocol=2))
    assert "mkdir, which could run code" in refusal(path, capsys, {}, name)
    assert not trace.exists()
    with open(path, "rb") as stream:
        pickle.load(stream)
    assert trace.exists()  # it would have


def archive(*names: str) -> bytes:
    """A zip archive of small files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, "text")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes"),
        (b"<!doctype html><title>Not found</title>", r"b'<!doctype'"),
        (b"PK\x03\x04" + bytes(200), "damaged or cut"),
        (b"\x80\x02garbage", "damaged or cut"),
        ((2**40).to_bytes(8, "little") + b'{"a": 1}', "found SafetensorError"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "a file of another kind"),
        (archive("a.txt"), "a zip archive that torch.save did not write"),
        (archive("model/data.pkl", "model/constants.pkl"), "a TorchScript archive, which holds code"),
    ],
)
def test_what_is_no_checkpoint_gets_one_sentence(content, found, tmp_path, capsys):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    assert found in refusal(path, capsys, {})


def test_files_that_cannot_be_read_or_hold_no_weights(tmp_path, capsys):
    assert "found none of that name" in refusal(tmp_path / "absent.pt", capsys, {})
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert "found a single Tensor" in refusal(tmp_path / "tensor.pt", capsys, {})
    torch.save({"a": 1, "b": "text"}, tmp_path / "numbers.pt")
    assert "named tensors, bare or under 'seld_model'" in refusal(tmp_path / "numbers.pt", capsys, {})
    torch.save({"model": {"a": torch.ones(1), "b": 3}}, tmp_path / "mixed.pt")
    assert "found 'b' among them" in refusal(tmp_path / "mixed.pt", capsys, {})
    torch.save({1: torch.ones(1)}, tmp_path / "numbered.pt")
    assert "found the keys 1" in refusal(tmp_path / "numbered.pt", capsys, {})
    assert "expected a file, found a folder" in refusal(tmp_path, capsys, {}, "beats")
    (tmp_path / "two\nlines.pt").touch()
    assert main(["convert", str(tmp_path / "two\nlines.pt"), str(tmp_path / "out")]) == 2
    assert r"two\nlines.pt: expected" in capsys.readouterr().err
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "unknown.pt")
    assert "weights of one of audio_flamingo_3, beats" in refusal(tmp_path / "unknown.pt", capsys, {})


# ------------------------------------------------------------------------------------------------------ pieces of it


def test_state_dict_is_unwrapped_and_stripped():
    one = torch.ones(1)
    lightning = {"epoch": 1, "state_dict": {"net._orig_mod.a.net.weight": one, "module.net.b": one}}
    assert set(state_dict_of(lightning)) == {"a.net.weight", "b"}
    assert set(state_dict_of({"model": {"x.y": one}}, prefixes=("x.",))) == {"y"}
    assert set(state_dict_of({"a": one, "epoch": 3})) == {"a"}  # bare, with something beside
    towers = {"text.w": one, "enc.w": one, "enc.deep.w": one}
    assert set(state_dict_of(towers, anchor="deep.w")) == {"w", "deep.w"}
    with pytest.raises(CheckpointError, match=r"one entry for a, found a second one, module\.a"):
        state_dict_of({"a": one, "module.a": one})
    with pytest.raises(CheckpointError, match="one key that ends in w, found 3: under text., enc., enc.deep."):
        state_dict_of(towers, anchor="w")


def test_renaming_tables():
    one, two = torch.ones(1), torch.zeros(2)
    state = {"block.1.attn.w": one, "block.2.attn.w": two, "pe": one}
    table = ((r"^pe$", None), (r"^block\.(\d+)\.", r"layers.\1."), (r"\.attn\.", ".self_attn."))
    assert rename(state, table) == {"layers.1.self_attn.w": one, "layers.2.self_attn.w": two}
    with pytest.raises(CheckpointError, match=r"checkpoint f\.pt: expected one entry for same"):
        rename(state, ((r".*w$", "same"),), name="f.pt")


def test_numpy_scalars_are_data(tmp_path):
    scores = {"best": np.float64(0.3), "rows": np.int64(4), "old": np.float32(1)}
    torch.save({"seld_model": {"a": torch.ones(1)}, **scores}, tmp_path / "best_model.pth")
    tree = read_published(tmp_path / "best_model.pth")
    assert {key: tree[key] for key in scores} == scores and set(state_dict_of(tree)) == {"a"}


def test_beats_tables_have_to_be_copies(tmp_path):
    state = beats_state()
    beats_original({key: value for key, value in state.items() if key != TABLE.format(2)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="in the first layer or in every one, found none in layer 2"):
        build_encoder({"name": "beats", "published": tmp_path / "file.pt"})
    state[TABLE.format(2)] = state[TABLE.format(2)] + 1
    beats_original(state, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"layers\.2.*expected a copy of the first layer's table"):
        build_encoder({"name": "beats", "published": tmp_path / "file.pt"})


def test_beats_configuration_is_the_files_over_the_codes_defaults(tmp_path):
    plain = {"input_patch_size": 16, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_layers": 3,
             "encoder_attention_heads": 4, "embed_dim": 24}  # fmt: skip
    fields = {**BEATS, "deep_norm": False, "relative_bias": False, "gated_bias": False}
    state = noise(build_encoder({"name": "beats", **fields}).state_dict())
    torch.save({"cfg": plain, "model": state}, tmp_path / "file.pt")
    config = build_encoder({"name": "beats", "published": tmp_path / "file.pt"}).config
    assert not config.deep_norm and config.max_distance == 1280 and config.input_dropout == 0.0
    beats_bare(beats_state(), tmp_path / "bare.pt")
    config = build_encoder({"name": "beats", "published": tmp_path / "bare.pt"}).config
    assert config.deep_norm and config.gated_bias and config.max_distance == 800 and config.heads == 4
    torch.save({"cfg": {**plain, "encoder_attention_heads": 5}, "model": state}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="hidden_size: expected a multiple of heads"):
        build_encoder({"name": "beats", "published": tmp_path / "file.pt"})


# ----------------------------------------------------------------------------------------------- folders and recipes


def test_every_encoder_has_published_checkpoints_and_a_licence_note():
    for kind in ENCODERS.values():
        assert kind.signs and kind.licence and kind.load_published.__func__ is not AudioEncoder.load_published.__func__


def test_a_file_is_read_and_hashed_once(tmp_path, monkeypatch):
    beats_original(beats_state(), tmp_path / "file.pt")
    read, hashed = [], []
    load, digest = torch.load, hashlib.file_digest
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(path) or load(path, **options))
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: hashed.append(given) or digest(*given))
    assert conversion(tmp_path / "file.pt", tmp_path / "out", {}) == 0
    assert len(read) == len(hashed) == 1


def test_weights_with_the_signs_of_several_encoders_have_to_be_named(tmp_path, capsys):
    beats_bare(beats_state() | urbansound_state(), tmp_path / "file.pt")
    message = refusal(tmp_path / "file.pt", capsys, {})
    assert "found signs of beats and urbansound_cnn. Name the encoder." in message


def test_a_converted_fine_tuned_file_is_a_classifier(tmp_path, capsys):
    head = TokenMeanHead(32, 5)
    file = tmp_path / "finetuned.pt"
    labels = {number: f"/m/{number}" for number in range(5)}
    torch.save({"cfg": BEATS_CFG, "model": beats_state() | head.state_dict(), "label_dict": labels}, file)
    out = tmp_path / "beats"
    assert main(["convert", str(file), str(out), "--licence", "ours", "--set", "window_seconds=1.5"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    encoder, loaded, config = load_classifier(out)
    assert config["source"] == {
        "file": "finetuned.pt",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "licence": "ours",
    }
    assert config["labels"] == list(labels.values()) and encoder.window_seconds == 1.5
    assert torch.equal(loaded.predictor.weight, head.predictor.weight)
    assert main(["convert", str(file), str(out)]) == 2 and "--force" in capsys.readouterr().err
    assert main(["convert", str(out), str(tmp_path / "again")]) == 2
    assert "found an encoder folder" in capsys.readouterr().err
    for field in ("name", "source", "path", "licence"):
        assert main(["convert", str(file), str(tmp_path / "again"), "--set", f"{field}=x"]) == 2
        assert f"unknown key '{field}'" in capsys.readouterr().err
    state = open_encoder({"path": out}).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    with pytest.raises(ConfigError, match=r"'path' \(and 'hearing'\)"):
        open_encoder({"path": out, "name": "beats"})


def test_a_converted_spatial_file_keeps_its_heads(tmp_path):
    state = noise(spatial_state(SPATIAL, classes=7))
    spatial_original(state, tmp_path / "finetuned.pth")
    settings = [f"{key}={value}" for key, value in SPATIAL.items()]
    out = tmp_path / "spatial"
    assert main(["convert", str(tmp_path / "finetuned.pth"), str(out), "--set", *settings]) == 0
    encoder = load_encoder(out)
    assert torch.equal(encoder.state_dict()["cls_tokens"], state["cls_tokens"])
    tree = read_published(out / "encoder.safetensors")["model"]
    assert all(torch.equal(tree[f"spatial.{key}"], state[key]) for key in SpatialHeads(48, 7).state_dict())


def test_a_model_starts_from_a_published_encoder(checkpoint, tmp_path):
    """As an SFT recipe names it; what the assembled model hears is what the encoder alone hears."""
    from audio_llm.model.build import load_model
    from audio_llm.training.policy import assemble
    from audio_llm.training.recipes import ModelRecipe

    assert main(["convert", "lm", str(checkpoint()), str(tmp_path / "lm")]) == 0
    beats_original(beats_state(), tmp_path / "file.pt")
    named = {"name": "beats", "published": str(tmp_path / "file.pt"), "window_seconds": 1.0}
    recipe = ModelRecipe(encoder=named, language_model={"path": str(tmp_path / "lm")})
    model = load_model(assemble(recipe, tmp_path / "start"))
    encoder = build_encoder({"name": "beats", "published": tmp_path / "file.pt", "window_seconds": 1.0})
    waveform, lengths = torch.randn(2, 1, 16000) * 0.1, torch.tensor([16000, 7000])
    with torch.inference_mode():
        found, mask = model.model.encode_audio(waveform, lengths)
        expected, _ = encoder.eval()(waveform, lengths)
    torch.testing.assert_close(found, expected)
    assert mask.sum(1).tolist() == [48, 16]
    for wrong in ({"name": "beats", "preset": "tiny"}, {}, None):
        with pytest.raises(ConfigError, match=r"encoder\.published"):
            assemble(ModelRecipe(encoder=wrong, language_model={"path": "lm"}), tmp_path / "other")
