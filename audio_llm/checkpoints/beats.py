"""Published BEATs files: ``{"cfg", "model"}``, with ``label_dict`` where fine-tuned, and what others made of that.

The configuration is read from the file, over the published code's defaults; a bare state dict is measured instead. The
weights may stand under any prefix (a BEATs inside of a larger model), with old or new names of the weight norm, with a
tokenizer's quantizer beside them, and with one copy of the table of relative positions or one per layer.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_llm import config as recipes
from audio_llm.checkpoints.encoder import load_strictly
from audio_llm.checkpoints.published import Published, configured, length, read_published, rename, state_dict_of
from audio_llm.encoders.beats import BEATs, BEATsConfig
from audio_llm.errors import CheckpointError, describe
from audio_llm.heads import TokenMeanHead

# Our field -> (its name in published configurations, its default in the published code).
FIELDS: dict[str, tuple[str, Any]] = {
    "patch_size": ("input_patch_size", -1),
    "patch_width": ("embed_dim", 512),
    "patch_bias": ("conv_bias", False),
    "hidden_size": ("encoder_embed_dim", 768),
    "depth": ("encoder_layers", 12),
    "heads": ("encoder_attention_heads", 12),
    "mlp_size": ("encoder_ffn_embed_dim", 3072),
    "activation": ("activation_fn", "gelu"),
    "pre_norm": ("layer_norm_first", False),
    "deep_norm": ("deep_norm", False),
    "position_kernel": ("conv_pos", 128),
    "position_groups": ("conv_pos_groups", 16),
    "relative_bias": ("relative_position_embedding", False),
    "gated_bias": ("gru_rel_pos", False),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "input_dropout": ("dropout_input", 0.0),
    "layer_drop": ("encoder_layerdrop", 0.0),
    "gradient_decay": ("layer_wise_gradient_decay_ratio", 1.0),
}
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"^quantize(_layer)?\.", None),  # of a tokenizer: it makes labels for pretraining, no tokens
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
ANCHOR = "patch_embedding.weight"
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_TABLE = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight")


def load_published(path: str | Path, /, **fields: Any) -> Published:
    """Encoder, and the classifier where the file was fine-tuned; `fields` replace those of its configuration.

    Raises :class:`CheckpointError` naming every key that is missing, unexpected or of another shape.
    """
    tree = read_published(path)
    state = rename(state_dict_of(tree, kind="beats", anchor=ANCHOR, name=path), RENAMES, name=path)
    state = _one_table(state, str(path))
    predictor = {key: value for key, value in state.items() if key.startswith("predictor.")}
    for key in predictor:
        del state[key]
    config = _config(tree, state, str(path), fields)
    encoder = BEATs(config)
    load_strictly(encoder, state, str(path))
    if not predictor:
        return Published(encoder.eval())
    weight = predictor.get("predictor.weight")
    head = TokenMeanHead(config.hidden_size, 1 if weight is None else length(weight))
    load_strictly(head, predictor, str(path))
    labels = _labels(tree.get("label_dict"), head.predictor.out_features)
    facts = {"task": "tagging", "labels": labels, "head": {"name": "token_mean"}}
    return Published(encoder.eval(), {"head": head.eval()}, facts)


def _config(tree: Mapping[str, Any], state: Mapping[str, Tensor], name: str, fields: dict[str, Any]) -> BEATsConfig:
    """The file's own configuration where it has one, else one measured from its tensors."""
    found: Any = next((tree[key] for key in ("cfg", "args") if tree.get(key) is not None), {})
    found = vars(found) if isinstance(found, argparse.Namespace) else found
    known = {published for published, _ in FIELDS.values()}
    if isinstance(found, Mapping) and known & set(found):
        plain = {ours: found.get(published, default) for ours, (published, default) in FIELDS.items()}
    else:
        plain = _measured(state)
    with configured(name):
        config = recipes.build(BEATsConfig, {**plain, **fields}, where="BEATs configuration")
        config.check()
    return config


def _measured(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes read off the shapes; the rest (buckets' reach, norms, dropout) is the published base model's."""
    if state[ANCHOR].ndim != 4:
        return {}
    layers = [int(match[1]) for key in state if (match := _LAYER.match(key))]
    width, side = state[ANCHOR].shape[0], state[ANCHOR].shape[-1]
    fields: dict[str, Any] = {
        "patch_size": side,
        "patch_width": width,
        "patch_bias": "patch_embedding.bias" in state,
        "hidden_size": width,
        "depth": 1 + max(layers, default=-1),
        "relative_bias": False,
        "gated_bias": "encoder.layers.0.self_attn.grep_a" in state,
    }
    sizes = (  # field, key, axis of the tensor that tells it
        ("hidden_size", "encoder.layer_norm.weight", 0),
        ("mlp_size", "encoder.layers.0.fc1.weight", 0),
        ("position_kernel", "encoder.pos_conv.0.weight_v", 2),
        ("num_buckets", "encoder.layers.0.self_attn.relative_attention_bias.weight", 0),
        ("heads", "encoder.layers.0.self_attn.relative_attention_bias.weight", 1),
    )
    for field, key, axis in sizes:
        if key in state and state[key].ndim > axis:
            fields[field] = state[key].shape[axis]
            fields["relative_bias"] |= field == "num_buckets"
    if "encoder.layers.0.fc1.linear.weight" in state:
        fields |= {"activation": "glu", "mlp_size": state["encoder.layers.0.fc1.linear.weight"].shape[0] // 2}
    kernel = state.get("encoder.pos_conv.0.weight_v")
    if kernel is not None and kernel.ndim == 3 and 0 < kernel.shape[1] <= fields["hidden_size"]:
        fields["position_groups"] = fields["hidden_size"] // kernel.shape[1]
    return fields


def _one_table(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The first layer's table of relative positions for all: either it stands alone, or every layer has a copy."""
    tables = {key: int(match[1]) for key in state if (match := _TABLE.fullmatch(key))}
    layers = {int(match[1]) for key in state if (match := _LAYER.match(key))}
    if len(tables) > 1 and (lacking := sorted(layers - set(tables.values()))):
        expected = "a table of relative positions in the first layer or in every one"
        raise CheckpointError(describe(f"checkpoint {name}", expected, f"none in layer {lacking[0]}"))
    first = next((state[key] for key, layer in tables.items() if layer == 0), None)
    for key, layer in tables.items():
        if layer and first is not None and not torch.equal(state[key], first):
            raise CheckpointError(
                describe(f"checkpoint {name}: {key}", "a copy of the first layer's table", "another table")
            )
    return {key: value for key, value in state.items() if not tables.get(key)}


def _labels(table: Any, count: int) -> list[str]:
    """Names by class: AudioSet's identifiers from the file's ``label_dict``, else numbers."""
    table = table if isinstance(table, Mapping) else {}
    return [str(table.get(number, f"class {number}")) for number in range(count)]
