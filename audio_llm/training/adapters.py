"""LoRA that goes on learning: the adapter of one run is what the next one starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from audio_llm.errors import ConfigError, describe
from audio_llm.files import read_json
from audio_llm.model.export import LANGUAGE_MODEL
from audio_llm.model.validate import weight_files


def load_adapter(model: Any, folder: Path) -> None:
    """Put the LoRA weights in `folder`, as PEFT saves them, into the language model of `model`, whose adapters
    ``make_trainable`` has made.

    Raises :class:`ConfigError` where the recipe's LoRA is of another rank, scale or place: it would be another adapter.
    """
    from safetensors.torch import load_file

    known, ours = read_json(folder / "adapter_config.json"), model.peft_config["default"]
    pairs = {"lora.rank": ("r", ours.r), "lora.alpha": ("lora_alpha", ours.lora_alpha)}
    pairs["lora.rank_stabilized"] = ("use_rslora", ours.use_rslora)
    for key, (name, here) in pairs.items():
        if (there := known.get(name, False)) != here:
            raise ConfigError(describe(f"model.adapter {folder}", f"{key} {here}, as in the recipe", str(there)))
    tensors = load_file(folder / weight_files(folder, "adapter_model")[0])
    theirs = {f"{name.removesuffix('.weight')}.default.weight": tensor for name, tensor in tensors.items()}
    mine = {
        name: parameter for name, parameter in model.named_parameters() if ".lora_" in name and LANGUAGE_MODEL in name
    }
    if differing := sorted(mine.keys() ^ theirs.keys()):
        where = "the recipe's LoRA (lora.targets)" if differing[0] in mine else "the adapter"
        expected = "LoRA on the layers that the recipe names"
        raise ConfigError(describe(f"model.adapter {folder}", expected, f"{differing[0]} in {where} alone"))
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(theirs[name])
