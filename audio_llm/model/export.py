"""From a trained model to checkpoint folders to serve: ``merged``, or ``base`` with a language-model ``adapter``.

During training PEFT holds the adapters of the language model (and of the encoder, if it has any) and the modules that
are trained in full. A served adapter may touch the language model only, so everything else is folded into the base.
The work is done on tensors, never on the live model: ``merge_adapter`` and ``unmerge_adapter`` on bfloat16 weights
leave a rounding error in the frozen ones at every call.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_folder, write_json
from audio_llm.model.validate import LORA_TARGETS

FORMS = ("merged", "adapter")
_ROOT = "base_model.model."  # what PEFT puts in front of every name
_LANGUAGE_MODEL = "model.language_model."


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Build modules whole under ZeRO-3; DeepSpeed partitions them when the engine is made.

    Transformers would otherwise build the model inside ``deepspeed.zero.Init``, where an encoder cannot compute its
    initial weights and position tables. Costs each process one whole copy in host memory while it loads.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    active = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            deepspeed.set_hf_deepspeed_config(active)


@dataclass
class Parts:
    """A PEFT state dictionary taken apart: plain names → tensors, and module → (A (rank, in …), B (out, rank …))."""

    base: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def split_state(state: Mapping[str, Tensor], adapter: str = "default") -> Parts:
    """Take a PEFT state dictionary apart; modules trained in full replace the originals.

    Raises :class:`CheckpointError` for adapter tensors other than LoRA's A and B.
    """
    parts, halves = Parts(), {"lora_A": {}, "lora_B": {}}  # type: tuple[Parts, dict[str, dict[str, Tensor]]]
    for name, tensor in state.items():
        plain = name.removeprefix(_ROOT)
        if ".original_module." in plain:
            continue
        module, found, rest = plain.partition(".lora_")
        if found:
            kind, _, which = rest.partition(".")
            if kind not in ("A", "B") or which != f"{adapter}.weight":
                raise CheckpointError(describe(name, f"lora_A or lora_B of adapter '{adapter}'", f"lora_{rest}"))
            halves[f"lora_{kind}"][module] = tensor
        else:
            plain = plain.replace(f".modules_to_save.{adapter}.", ".").replace(".base_layer.", ".")
            parts.base[plain] = tensor
    parts.lora = {module: (halves["lora_A"][module], halves["lora_B"][module]) for module in halves["lora_A"]}
    return parts


def merge(parts: Parts, scaling: float, prefix: str = "", exclude: str | None = None) -> dict[str, Tensor]:
    """Plain weights with the adapters of modules under `prefix` (and not under `exclude`) added: W + scaling · B A.

    The sum is taken in float32 and rounded once to the dtype of W.
    """
    merged = dict(parts.base)
    for module, (a, b) in parts.lora.items():
        if not module.startswith(prefix) or (exclude and module.startswith(exclude)):
            continue
        weight = merged[f"{module}.weight"]
        # Of a convolution, A is one to `rank` maps and B one of 1x1 on these: products of matrices as well.
        delta = (b.float().flatten(1) @ a.float().flatten(1)).view(weight.shape) * scaling
        merged[f"{module}.weight"] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    return merged


def save_weights(
    config: Any, generation_config: Any, state: Mapping[str, Tensor], processor: Any, folder: Path
) -> None:
    """Write a checkpoint folder from plain weights. The names are checked against the model, strictly."""
    from audio_llm.model.modeling import AudioLLMForConditionalGeneration

    with torch.device("meta"):
        model = AudioLLMForConditionalGeneration(config)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in state.items()}
    missing, unexpected = set(model.state_dict()) - set(weights), set(weights) - set(model.state_dict())
    if missing or unexpected:
        raise CheckpointError(describe("export", f"all of {sorted(missing)[:3]}", f"{sorted(unexpected)[:3]} instead"))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation_config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def export_weights(
    model: Any,
    state: Mapping[str, Tensor],
    processor: Any,
    output: str | Path,
    forms: Sequence[str] = FORMS,
) -> dict[str, Path]:
    """Write the `forms` asked for under `output` and return their folders; every folder appears whole or not at all.

    `state` is the full state dictionary of `model` (gathered, where a sharding engine holds it). ``merged``: one plain
    checkpoint. ``adapter``: ``base/`` with the trained encoder and projector, and ``adapter/`` as PEFT saves it.
    A model without LoRA has only the plain form.
    """
    unknown = set(forms) - set(FORMS)
    if unknown:
        raise CheckpointError(describe("export", " or ".join(FORMS), ", ".join(sorted(unknown))))
    output, folders = Path(output), {}
    peft_config = getattr(model, "peft_config", {}).get("default")
    plain = model.get_base_model() if peft_config else model
    parts = split_state(state)
    scaling = scale_of(peft_config) if peft_config else 0.0
    config, generation = plain.config, plain.generation_config
    if "merged" in forms or not peft_config:
        with atomic_folder(output / "merged") as folder:
            save_weights(config, generation, merge(parts, scaling), processor, folder)
        folders["merged"] = output / "merged"
    if "adapter" in forms and peft_config:
        with atomic_folder(output / "base") as folder:
            base = merge(parts, scaling, exclude=_LANGUAGE_MODEL)
            save_weights(config, generation, base, processor, folder)
        with atomic_folder(output / "adapter") as folder:
            save_adapter(peft_config, parts, folder, base=output / "base")
        folders |= {"base": output / "base", "adapter": output / "adapter"}
    return folders


def scale_of(peft_config: Any) -> float:
    """The factor of B A: alpha / rank, or alpha / √rank when rank-stabilised (Kalajdzievski 2023)."""
    rank = peft_config.r
    return peft_config.lora_alpha / (rank**0.5 if peft_config.use_rslora else rank)


def save_adapter(peft_config: Any, parts: Parts, folder: Path, base: Path) -> None:
    """Write the language model's part of the adapter in PEFT's own layout."""
    from safetensors.torch import save_file

    tensors = {}
    for module, halves in parts.lora.items():
        if module.startswith(_LANGUAGE_MODEL):
            for kind, tensor in zip("AB", halves, strict=True):
                tensors[f"{_ROOT}{module}.lora_{kind}.weight"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields |= {
        "base_model_name_or_path": str(base),
        "modules_to_save": None,
        "target_modules": LORA_TARGETS,
        "inference_mode": True,
    }
    write_json(path, fields)


def export_trained(trainer: Any, processor: Any, output: str | Path, forms: Sequence[str] = FORMS) -> dict[str, Path]:
    """Export what a Transformers or TRL trainer has trained; call it on all processes (sharded weights are gathered).

    The first process writes; the others return when it is done.
    """
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(trainer.model_wrapped)
    folders: dict[str, Path] = {}
    if accelerator.is_main_process and forms:
        model = accelerator.unwrap_model(trainer.model)
        state = {name.removeprefix("module."): tensor.detach().cpu() for name, tensor in state.items()}
        with unpartitioned():  # only this process builds a model here: a collective would wait for the others
            folders = export_weights(model, state, processor, output, forms)
    accelerator.wait_for_everyone()
    return folders
