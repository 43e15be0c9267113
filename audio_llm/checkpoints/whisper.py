"""Published Whisper weights: a folder as Transformers saves it, or the original ``{"dims", "model_state_dict"}``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from audio_llm import config as recipes
from audio_llm.checkpoints.encoder import load_strictly
from audio_llm.checkpoints.published import (
    Published,
    configured,
    length,
    read_published,
    read_transformers,
    rename,
    state_dict_of,
)
from audio_llm.encoders.whisper import Whisper, WhisperConfig
from audio_llm.errors import CheckpointError, describe

# Our field -> its name in Transformers' config.json and in the original file's `dims` (empty: not there).
FIELDS: dict[str, tuple[str, str]] = {
    "n_mels": ("num_mel_bins", "n_mels"),
    "hidden_size": ("d_model", "n_audio_state"),
    "depth": ("encoder_layers", "n_audio_layer"),
    "heads": ("encoder_attention_heads", "n_audio_head"),
    "mlp_size": ("encoder_ffn_dim", ""),
    "activation": ("activation_function", ""),
    "dropout": ("dropout", ""),
    "attention_dropout": ("attention_dropout", ""),
    "activation_dropout": ("activation_dropout", ""),
}
POSITIONS = ("max_source_positions", "n_audio_ctx")
TRANSFORMERS_RENAMES: tuple[tuple[str, str | None], ...] = ((r"^(?:model\.)?encoder\.", "encoder."),)
ORIGINAL_RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"^decoder\.", None),
    (r"^encoder\.blocks\.", "encoder.layers."),
    (r"\.attn\.(query|key|value)\.", r".self_attn.\1."),
    (r"\.self_attn\.query\.", ".self_attn.q_proj."),
    (r"\.self_attn\.key\.", ".self_attn.k_proj."),
    (r"\.self_attn\.value\.", ".self_attn.v_proj."),
    (r"\.attn\.out\.", ".self_attn.out_proj."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"^encoder\.ln_post\.", "encoder.layer_norm."),
    (r"^encoder\.positional_embedding$", "encoder.embed_positions.weight"),
)
_POSITION_TABLE = "encoder.embed_positions.weight"
_TOKENS_PER_SECOND = 50


def load_published(path: str | Path, /, **fields: Any) -> Published:
    """The encoder; `fields` replace those of the configuration in the file. A shorter window keeps the first positions.

    Raises :class:`CheckpointError` naming every key that is missing, unexpected or of another shape.
    """
    path = Path(path)
    if path.is_dir():
        config, weights = read_transformers(path, ("model.encoder.", "encoder."))
        if config.get("model_type") != "whisper":
            raise CheckpointError(describe(f"model {path}", "model_type whisper", str(config.get("model_type"))))
        state, column = rename(weights, TRANSFORMERS_RENAMES, name=path), 0
    else:
        tree = read_published(path)
        state = rename(state_dict_of(tree, kind="whisper", name=path), ORIGINAL_RENAMES, name=path)
        config, column = tree.get("dims", {}), 1
        if not isinstance(config, Mapping) or "n_audio_ctx" not in config:
            expected = "a Transformers folder, or the original file with 'dims'"
            raise CheckpointError(describe(f"checkpoint {path}", expected, "no 'dims'"))
    encoder = Whisper(_config(config, column, state, path, fields))
    wanted = encoder.config.positions
    if _POSITION_TABLE in state and "window_seconds" in fields and state[_POSITION_TABLE].shape[0] > wanted:
        state[_POSITION_TABLE] = state[_POSITION_TABLE][:wanted]
    load_strictly(encoder, state, str(path))
    return Published(encoder.eval())


def _config(
    config: Mapping[str, Any], column: int, state: Mapping[str, Tensor], path: Path, fields: dict[str, Any]
) -> WhisperConfig:
    plain = {ours: config[names[column]] for ours, names in FIELDS.items() if names[column] in config}
    if "mlp_size" not in plain and "encoder.layers.0.fc1.weight" in state:
        plain["mlp_size"] = length(state["encoder.layers.0.fc1.weight"])
    positions = config.get(POSITIONS[column])
    if not isinstance(positions, int):
        raise CheckpointError(describe(f"checkpoint {path}: {POSITIONS[column]}", "a whole number", repr(positions)))
    plain["window_seconds"] = positions / _TOKENS_PER_SECOND
    with configured(path):
        built = recipes.build(WhisperConfig, {**plain, **fields}, where="Whisper configuration")
        built.check()
    return built
