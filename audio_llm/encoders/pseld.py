"""Published checkpoints of CNN14 and HTS-AT: stereo SELD, PSELDNets, PANNs and HTS-AT itself. Strict, one way.

| layout | where the weights are | what else is in the file |
|---|---|---|
| stereo SELD, ``best_model.pth`` | ``seld_model`` | optimizer, epoch, best scores as NumPy scalars |
| PSELDNets, Lightning ``.ckpt`` | ``state_dict``, keys ``net._orig_mod.*`` | the front end, ``af_extractor.*`` |
| PANNs CNN14 | ``model`` | STFT kernels and mel matrix; a classifier of AudioSet's 527 classes, which is read |
| HTS-AT | ``state_dict``, keys ``sed_model.*`` | the same; its classifier is left out |

The size of a decoder is measured on its weights. What else published weights need (clamped scans, the reinterpreted
columns, 251 rows) is set here; the classes' own defaults are for training anew.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from audio_llm import config as recipes
from audio_llm.encoders.heads import PANNsHead
from audio_llm.encoders.published import (
    PREFIXES,
    check_front_end,
    configured,
    length,
    listed,
    read_published,
    rename,
    state_dict_of,
)
from audio_llm.encoders.seld_head import CLASSES, ELEMENTS, TRACKS, SELDHead
from audio_llm.encoders.spectral import SpectralEncoder
from audio_llm.errors import CheckpointError, describe
from audio_llm.model.encoder import Published
from audio_llm.model.folder import load_strictly, part_of

Layout = Literal["stereo", "pseldnets", "panns", "audioset"]  # the last two are the names of the encoders' presets

_BLOCK = r"^(decoder\.layers\.\d+)\."
# Published name -> ours, in order.
DECODER_KEYS: tuple[tuple[str, str | None], ...] = (
    (r"^decoder\.decoder\.", "decoder."),
    (r"^decoder\..*\.positional_encoding\.pe$", None),  # 1.6 GB of sines
    (_BLOCK + r"sequential\.", r"\1."),
    (_BLOCK + r"(\d)\.module\.", r"\1.\2."),
    (_BLOCK + r"0\.", r"\1.feed_forward1."),
    (_BLOCK + r"1\.", r"\1.mixer."),
    (_BLOCK + r"2\.", r"\1.convolution."),
    (_BLOCK + r"3\.", r"\1.feed_forward2."),
    (_BLOCK + r"4\.", r"\1.norm."),
    (r"\.(feed_forward[12]|convolution)\.sequential\.0\.", r".\1.norm."),
    (r"\.(feed_forward[12])\.sequential\.1\.", r".\1.expand."),
    (r"\.(feed_forward[12])\.sequential\.4\.", r".\1.reduce."),
    (r"\.convolution\.sequential\.2\.conv\.", ".convolution.expand."),
    (r"\.convolution\.sequential\.4\.conv\.", ".convolution.depthwise."),
    (r"\.convolution\.sequential\.5\.", ".convolution.batch_norm."),
    (r"\.convolution\.sequential\.7\.conv\.", ".convolution.project."),
    (r"\.mixer\.attention\.", ".mixer."),
    (r"\.mixer\.layer_norm\.", ".mixer.norm."),
)
SELD_KEYS: tuple[tuple[str, str | None], ...] = (
    (r"^af_extractor\.", None),  # STFT kernels and mel matrix: constants of our configuration
    (r"\.attn_mask$", None),
    (r"\.relative_position_index$", None),
    (r"^encoder\.", ""),
    (r"^(fc|tscam_conv)\.", "head.projection."),
    *DECODER_KEYS,
)
# HTS-AT's own classifiers are left out; what is left out is named to the letter.
_FRONT_END = r"^(spectrogram_extractor\.stft\.conv_(real|imag)\.weight|logmel_extractor\.melW)$"
PANNS_KEYS: tuple[tuple[str, str | None], ...] = (
    (_FRONT_END, None),
    (r"^(fc1|fc_audioset)\.(weight|bias)$", r"head.\1.\2"),
    (r"^bn0\.", "scalar.0."),
    (r"^conv_block", "convs.conv_block"),
)
AUDIOSET_KEYS: tuple[tuple[str, str | None], ...] = (
    (_FRONT_END, None),
    (r"^(tscam_conv|head)\.(weight|bias)$", None),
    (r"\.attn_mask$", None),
    (r"\.relative_position_index$", None),
    (r"^bn0\.", "scalar.0."),
)
TABLES: dict[Layout, tuple[tuple[str, str | None], ...]] = {
    "stereo": SELD_KEYS,
    "pseldnets": SELD_KEYS,
    "panns": PANNS_KEYS,
    "audioset": AUDIOSET_KEYS,
}
_AC = {"columns": "reinterpreted", "time_rows": 251}  # what the asymmetric decoder was trained with
_SWITCHES = ("ssd", "columns", "time_rows", "block_dropout")  # of a decoder: they change none of its weights
TAGGER = {"task": "tagging", "head": {"name": "panns"}}
PSELDNETS_CLASSES = 170  # of AudioSet's, that the published ones know
_FIRST = {"cnn14": "convs.conv_block1.conv1.weight", "htsat": "patch_embed.proj.weight"}


def load(
    kind: type[SpectralEncoder],
    path: str | os.PathLike[str],
    fields: dict[str, Any],
    frames: Literal["all", "covered"] = "all",
) -> Published:
    """``load_published`` of `kind`, CNN14 or HTS-AT; `frames` is the head's."""
    tree, name = read_published(path), kind.name
    raw = state_dict_of(tree, prefixes=(*PREFIXES, "sed_model."), kind=name, name=path)
    layout = _layout(tree, raw, name, str(path))
    renamed = rename(raw, TABLES[layout], name=path)
    head_state = part_of(renamed, "head")
    state = {key: value for key, value in renamed.items() if not key.startswith("head.")}
    preset = {} if layout == "stereo" else kind.presets[layout]
    measured: dict[str, Any] = {"kind": "none"}
    anew = False
    if name == "cnn14":
        measured, given = _measured_decoder(state, str(path)), fields.get("decoder", {})
        if isinstance(given, Mapping):  # anything else is refused with the other fields
            given, anew = _decoder_of(measured, given)
        fields = {**fields, "decoder": given}
    with configured(path):
        encoder = kind(recipes.build(kind.config_class, {**preset, **fields}, where=f"encoder {name}"))
    if layout in ("panns", "audioset"):  # the file's STFT kernels and mel matrix
        stft = "spectrogram_extractor."
        check_front_end({key.replace(f"{stft}stft.", stft): value for key, value in raw.items()}, encoder.config, path)
        state = _spread(state, _FIRST[name], encoder.num_planes)
    left_out: list[str] = []
    if anew:
        left_out = [key for key in state if key.startswith("decoder.")] + [f"head.{key}" for key in head_state]
        own = {key: value for key, value in encoder.state_dict().items() if key.startswith("decoder.")}
        state = {key: value for key, value in state.items() if key not in left_out} | own
    load_strictly(encoder, state, str(path))
    if left_out:
        chosen = encoder.config.decoder.kind  # type: ignore[attr-defined]
        warnings.warn(
            f"checkpoint {path}: {len(left_out)} entries of its decoder ({measured['kind']}) and head are left out: "
            f"{listed(left_out)}; the decoder asked for ({chosen}) starts untrained.",
            stacklevel=2,
        )
        return Published(encoder.eval(), facts={"left_out": left_out})
    if not head_state:
        return Published(encoder.eval())
    if layout == "panns":
        tagger = PANNsHead(encoder.hidden_size, length(head_state.get("fc_audioset.bias", torch.zeros(1))))
        load_strictly(tagger, head_state, str(path))
        named = [f"class {number}" for number in range(tagger.fc_audioset.out_features)]
        return Published(encoder.eval(), {"head": tagger.eval()}, {**TAGGER, "labels": named})
    elements = ("x", "y", "z") if layout == "pseldnets" else ELEMENTS
    outputs = next((length(value) for key, value in head_state.items() if key.endswith("weight")), 0)
    classes = max(1, outputs // (TRACKS * len(elements)))
    head = SELDHead(encoder, classes, elements=elements, frames=frames)
    load_strictly(head, head_state, str(path))
    labels = list(CLASSES) if classes == len(CLASSES) else [f"class {number}" for number in range(classes)]
    return Published(encoder.eval(), {"seld": head.eval()}, {"labels": labels, "seld": head.facts})


def _layout(tree: Mapping[str, Any], state: Mapping[str, Tensor], name: str, path: str) -> Layout:
    if any(key.startswith("bn0.") for key in state):
        return "audioset" if name == "htsat" else "panns"
    if any(key.startswith("scalar.") for key in state):
        return _layout_of_events(tree, state, path)
    expected = "keys of stereo SELD or PSELDNets (scalar.0), or of PANNs or HTS-AT (bn0)"
    found = ", ".join(list(state)[:3])
    raise CheckpointError(describe(f"checkpoint {path}", expected, f"{len(state)} others ({found}, …)"))


def _layout_of_events(tree: Mapping[str, Any], state: Mapping[str, Tensor], path: str) -> Layout:
    """Of two networks with the same keys: the third number of a track is a distance in one and z in the other."""
    if "seld_model" in tree:
        return "stereo"
    lightning = tree.get("state_dict")
    lightning = lightning if isinstance(lightning, Mapping) else {}
    if any(str(key).startswith("net.") for key in lightning) or any(key.startswith("af_extractor.") for key in state):
        return "pseldnets"
    head = next((value for key, value in state.items() if key in ("fc.bias", "tscam_conv.bias")), None)
    outputs = 0 if head is None else length(head)
    if outputs == TRACKS * 3 * PSELDNETS_CLASSES:
        return "pseldnets"
    if outputs == TRACKS * len(ELEMENTS) * len(CLASSES) and not lightning:
        return "stereo"
    expected = (
        "stereo SELD (weights under 'seld_model') or PSELDNets (under 'state_dict', names that begin with 'net.')"
    )
    found = f"neither, and {outputs} outputs" if outputs else "neither, and no head"
    cure = "Their keys are the same: save the weights again as they were published."
    raise CheckpointError(describe(f"checkpoint {path}", expected, found, cure))


def _measured_decoder(state: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Fields of the decoder's configuration that these weights, already under our names, were trained with."""
    keys = [key for key in state if key.startswith("decoder.")]
    if not keys:
        return {"kind": "none"}
    if any(key.startswith("decoder.gru.") for key in keys):
        return {"kind": "gru", "layers": 1 + max(int(key[-1]) for key in keys if re.search(r"hh_l\d$", key))}
    listed = [int(match[1]) for key in keys if (match := re.match(r"decoder\.(?:mamba_)?layers\.(\d+)\.", key))]
    fields: dict[str, Any] = {"layers": 1 + max(listed, default=0), "ssd": "clamped"}
    mixer = "decoder."
    if any(key.startswith("decoder.layers.0.mixer.") for key in keys):
        mixer = "decoder.layers.0.mixer."
        expand, depthwise = (
            _needed(state, f"decoder.layers.0.{key}.weight", path)
            for key in ("feed_forward1.expand", "convolution.depthwise")
        )
        fields |= {"expansion": max(1, length(expand) // length(expand, -1)), "kernel": length(depthwise, -1)}
        fields["block_dropout"] = 0.05 if f"{mixer}u_bias" in state else 0.1
    kind = "conbimamba" if mixer != "decoder." else "bimamba"
    if f"{mixer}u_bias" in state:
        return {**fields, "kind": "conformer", "heads": length(state[f"{mixer}u_bias"]), "ssd": "exact"}
    if f"{mixer}input_adapter.0.weight" in state:
        return {**fields, **_AC, "kind": f"{kind}_ac"}
    inner, decays = (_needed(state, f"{mixer}layers.0.mamba2_for.{key}", path) for key in ("norm.weight", "A_log"))
    return {**fields, "kind": kind, "head_size": max(1, inner.numel() // max(1, decays.numel()))}


def _decoder_of(measured: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The decoder that `given` fields make of the one measured on a file, and whether it has other weights."""
    if given.get("kind", measured["kind"]) != measured["kind"]:
        return dict(given), True
    anew = any(given.get(field, value) != value for field, value in measured.items() if field not in _SWITCHES)
    kept = {field: value for field, value in measured.items() if not anew or field not in _SWITCHES}
    return {**kept, **given}, anew


def _needed(state: Mapping[str, Tensor], key: str, path: str) -> Tensor:
    if key not in state:
        raise CheckpointError(describe(f"checkpoint {path}", f"a known decoder, with {key}", "none"))
    return state[key]


def _spread(state: dict[str, Tensor], first: str, planes: int) -> dict[str, Tensor]:
    """Weights of one plane for `planes`: the first convolution shared out equally, the norm copied."""
    if planes == 1 or first not in state:
        return state
    norm = {key: value for key, value in state.items() if key.startswith("scalar.0.")}
    copies = {key.replace("scalar.0.", f"scalar.{n}."): value for n in range(planes) for key, value in norm.items()}
    return {**state, **copies, first: state[first].repeat(1, planes, 1, 1) / planes}
