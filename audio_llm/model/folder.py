"""A trained encoder on disk: ``encoder.safetensors`` (encoder and heads) and ``config.json`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audio_llm.config import renamed
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.files import atomic_file, write_json
from audio_llm.model.encoder import AudioEncoder, build_encoder, encoder_config
from audio_llm.model.validate import CONFIG, ENCODER_VERSION, WEIGHTS, check_encoder


def save_parts(
    folder: str | Path, encoder: AudioEncoder, heads: Mapping[str, nn.Module], facts: Mapping[str, Any]
) -> Path:
    """Write both files atomically; the weights come last, so that a folder which has them is whole.

    `heads` are modules by the prefix of their keys, `facts` are entries of ``config.json`` (``labels``, ``task``, ...).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"encoder": encoder, **heads}
    state = {
        f"{part}.{key}": value.detach().cpu().contiguous()
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    config = {"version": ENCODER_VERSION, "encoder": encoder_config(encoder), **facts}
    write_json(folder / CONFIG, config)
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    return folder


def open_encoder(config: Mapping[str, Any]) -> AudioEncoder:
    """The encoder that a recipe names, in evaluation mode: ``{"path": folder}``, or what `build_encoder` takes.

    Beside either, ``hearing`` says what it hears of another layout (:meth:`AudioEncoder.hear`).
    """
    if "path" not in config:
        return build_encoder(dict(config)).eval()
    config = renamed(config, {"hearing"}, "encoder")
    others = sorted(set(config) - {"path", "hearing"})
    if others:
        expected = "'path' (and 'hearing'), or 'name' with 'published'"
        raise ConfigError(describe("encoder", expected, f"'path' and '{others[0]}'"))
    encoder, hearing = load_encoder(config["path"]), config.get("hearing")
    return encoder if hearing is None else encoder.hear(hearing)


def load_encoder(folder: str | Path) -> AudioEncoder:
    """The encoder of a folder written by :func:`save_parts`, in evaluation mode. Strict: every key must fit."""
    config, state = read_parts(folder)
    try:
        encoder = build_encoder(config["encoder"])
    except ConfigError as error:
        raise CheckpointError(f"encoder folder {folder}: {error}") from error
    load_strictly(encoder, part_of(state, "encoder"), f"{folder}/{WEIGHTS}")
    return encoder.eval()


def part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries under ``part.``, without that prefix."""
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load every key or raise :class:`CheckpointError` with the missing, unexpected, misshapen and spoilt ones."""
    wanted = module.state_dict()
    problems = [f"missing {key} {tuple(wanted[key].shape)}" for key in wanted if key not in state]
    problems += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in wanted]
    problems += [
        f"{key}: expected {reason}" for key in wanted if key in state and (reason := _unfit(wanted[key], state[key]))
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"checkpoint {name}: {len(problems)} entries do not fit {type(module).__name__}: {shown}."
        )
    module.load_state_dict(dict(state))


def _unfit(wanted: Tensor, value: Tensor) -> str | None:
    """What was expected and found of a tensor that cannot take the place of `wanted`; None for one that can."""
    if wanted.shape != value.shape:
        return f"{tuple(wanted.shape)}, found {tuple(value.shape)}"
    if wanted.is_floating_point():  # integers of a quantised file would be copied as if they were the weights
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            return f"dense floating-point values, found {value.dtype}, {value.layout} on {value.device}"
        if not value.isfinite().all():
            return "finite values, found NaN or infinity"
    return None


def read_parts(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and all tensors of an encoder folder. Raises :class:`CheckpointError` for what cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = check_encoder(folder)
    try:
        return config, load_file(Path(folder) / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"encoder folder {folder}: cannot be read ({type(error).__name__}: {error}).") from error
