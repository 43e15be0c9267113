"""A frozen language model in 4 or 8 bits, on which adapters learn (Dettmers et al. 2023, "QLoRA"), by bitsandbytes.

Its linears alone are quantised; encoder, projector, embeddings and head keep their precision. What is exported, and
what engines get, are the weights that the adapters were trained on: the quantised values in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["4bit", "8bit"]
# Modules of the model that stay as they are.
KEPT = ["model.audio_encoder", "model.projector", "model.language_model.embed_tokens", "lm_head"]


def loading(kind: Quantization, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What ``from_pretrained`` is told beside `dtype`, in which the quantised weights are computed with.

    4 bits are NF4 in blocks of 64, whose scales are quantised again.
    """
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    how = four if kind == "4bit" else {"load_in_8bit": True}
    return {
        "quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=KEPT),
        "device_map": {"": device},
    }


def unmark(model: Any) -> None:
    """Take the marks of quantisation from `model`, once it has adapters: its configuration is that of what is exported,
    and TRL would round to bfloat16 all that is trained of a marked model."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "is_loaded_in_4bit"),
        (model, "is_loaded_in_8bit"),
    ):
        vars(holder).pop(name, None)


def bytes_saved(model: nn.Module, kind: Quantization) -> int:
    """By how much smaller the linears of the language model in `model` (not quantised, perhaps without data) become."""
    saved = 0.0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or ".language_model." not in name or ".lora_" in name:
            continue
        count, rows = module.weight.numel(), module.weight.shape[0]
        # NF4: half a byte, a byte for 64 of them, a float for 256 of these; int8: a float for each row.
        held = count * (0.5 + 1 / 64 + 4 / (64 * 256)) if kind == "4bit" else count + 4 * rows
        saved += count * module.weight.element_size() - held
    return round(saved)


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` itself holds a weight of bitsandbytes."""
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def numbers_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for: two to a byte in 4 bits; under ZeRO-3 it is an empty stub."""
    state = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel() if state is None else state.shape.numel()))


@torch.no_grad()
def plain_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised `module`, (out, in), as its values are."""
    from peft.utils.integrations import dequantize_bnb_weight

    weight: Any = module._parameters["weight"]
    return dequantize_bnb_weight(weight, getattr(module, "state", None)).to(dtype)


def plain_state(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dictionary of `model` with plain weights in place of quantised ones and their scales."""
    found = dict(state)
    for name, module in model.named_modules():
        if is_quantised(module):
            for key in [key for key in found if key.startswith((f"{name}.weight", f"{name}.SCB"))]:
                del found[key]
            found[f"{name}.weight"] = plain_weight(module, dtype)
    return found
