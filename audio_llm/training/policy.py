"""What is trained: the starting model, its adapters, which parts learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from audio_llm.errors import ConfigError, describe
from audio_llm.model.export import unpartitioned
from audio_llm.model.native import started
from audio_llm.model.quantization import loading, numbers_of, unmark
from audio_llm.model.validate import lora_targets, named
from audio_llm.training.recipes import LoRARecipe, ModelRecipe, Precision, TrainedParts

ENCODER, PROJECTOR, LANGUAGE_MODEL = "model.audio_encoder", "model.projector", "model.language_model"


def resolve_precision(precision: Precision, cpu: bool = False) -> Literal["fp32", "bf16"]:
    """``auto`` is bf16 where the GPU computes it natively, or with `cpu` a CPU alone does, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # there is no public way to ask
    return "bf16" if cpu and supported and supported() else "fp32"


def starting_folder(recipe: ModelRecipe, output: Path) -> Path:
    """The checkpoint folder a recipe starts from; parts, or a native model, are put together once in ``output/start``.

    Raises :class:`ConfigError` when the recipe names neither a checkpoint nor all parts.
    """
    return started(recipe.path, output / "start") if recipe.path else assemble(recipe, output / "start")


def load_model(folder: Path, recipe: ModelRecipe, dtype: torch.dtype = torch.float32) -> Any:
    """The model in `folder`, with the attention and the quantisation that the recipe asks for."""
    from accelerate import PartialState

    from audio_llm.model import build

    how = loading(recipe.quantization, dtype, PartialState().device) if recipe.quantization else {}
    with unpartitioned():
        return build.load_model(folder, dtype=dtype, attn_implementation=recipe.attention, **how)


def assemble(recipe: ModelRecipe, folder: Path) -> Path:
    """Build the starting checkpoint from the parts; the first process builds, the others wait for it."""
    from accelerate import PartialState

    from audio_llm.model.build import build_checkpoint, load_language_model
    from audio_llm.model.folder import open_encoder

    recipe.check()
    assert recipe.encoder is not None and recipe.language_model is not None
    with PartialState().main_process_first():
        if not (folder / "config.json").is_file():
            encoder = open_encoder(recipe.encoder)
            language_model, tokenizer = load_language_model(recipe.language_model["path"])
            build_checkpoint(
                folder,
                encoder=encoder,
                language_model=language_model,
                tokenizer=tokenizer,
                projector=recipe.projector,
                prompt=recipe.prompt,
            )
    return folder


def encoder_targets(model: nn.Module) -> list[str]:
    """Full names of the encoder's layers that LoRA wraps: its linears or, where it has none, its 2-d convolutions.

    ``nn.MultiheadAttention`` reads its output projection's weight without calling it, so that one cannot be wrapped.
    """
    inside_attention = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    layers = {name: module for name, module in model.named_modules() if name.startswith(f"{ENCODER}.")}
    linears = [
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear) and not name.startswith(inside_attention or ("\0",))
    ]
    return linears or [name for name, module in layers.items() if isinstance(module, nn.Conv2d) and _is_plain(module)]


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether B A, of a convolution like it and one of 1x1, is a kernel that can be added to its own."""
    return convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.padding_mode == "zeros"


def lora_config(model: nn.Module, train: TrainedParts, lora: LoRARecipe) -> Any:
    """The PEFT configuration of a run: adapters where `train` says so, and what is trained in full beside them."""
    from peft import LoraConfig

    targets = [lora_targets(lora.targets)] if train.language_model == "lora" else []
    if train.encoder == "lora":
        names = named(encoder_targets(model), lora.targets)
        if not names:
            cure = "Use frozen or full."
            raise ConfigError(describe("train.encoder: lora", "a layer that LoRA can wrap", "none", cure))
        targets += [re.escape(name) for name in names]
    whole = [PROJECTOR] if train.projector == "full" else []
    if train.encoder == "full":
        whole.append(ENCODER)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules="|".join(targets),
        modules_to_save=whole or None,
    )


def make_trainable(model: Any, train: TrainedParts | None = None, lora: LoRARecipe | None = None) -> Any:
    """Set what is trained and return the model, wrapped by PEFT where a part has adapters (`lora` says which).

    Trained parameters are float32, whatever the frozen ones are: an update of 1e-5 is lost in bfloat16's 8 bits.
    Raises :class:`ConfigError` for parts that cannot be trained together.
    """
    train = train or TrainedParts()
    train.check()
    if train.language_model == "frozen":
        model.requires_grad_(False)
    # The model itself keeps an encoder without trained parameters in evaluation mode and outside of the graph.
    model.get_submodule(ENCODER).requires_grad_(train.encoder != "frozen")
    model.get_submodule(PROJECTOR).requires_grad_(train.projector == "full")
    if "lora" in (train.encoder, train.language_model):
        from peft import get_peft_model

        plain, model = model, get_peft_model(model, lora_config(model, train, lora or LoRARecipe()))
        unmark(plain)
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # DeepSpeed keeps its own float32 copies
            parameter.data = parameter.data.float()
    return model


def part_of(name: str) -> str:
    """The part of a recipe's ``train`` that a parameter belongs to; the head is the language model's."""
    parts = {ENCODER: "encoder", PROJECTOR: "projector"}
    return next((part for prefix, part in parts.items() if prefix in name), "language_model")


def trainable_map(model: nn.Module) -> dict[str, Any]:
    """Parameters of each part: how many, how many are trained, and the names of the trained ones."""
    parts: dict[str, dict[str, int]] = {}
    names = []
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT's untouched copy of a module that is trained in full
            continue
        count = numbers_of(parameter)
        part = next(
            (p for p in (ENCODER, PROJECTOR, LANGUAGE_MODEL) if p in name), "lm_head" if "lm_head" in name else "other"
        )
        entry = parts.setdefault(part.removeprefix("model."), {"parameters": 0, "trained": 0})
        entry["parameters"] += count
        if parameter.requires_grad:
            entry["trained"] += count
            names.append(name)
    total = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "trained")}
    return {"parts": parts, "total": total, "trained_names": names}


def print_trainable(summary: Mapping[str, Any]) -> None:
    """One line per part, then the total."""
    for part, counts in [*summary["parts"].items(), ("total", summary["total"])]:
        share = counts["trained"] / max(counts["parameters"], 1)
        print(f"  {part:<16} {counts['parameters']:>14,} parameters, {counts['trained']:>13,} trained ({share:.1%})")
