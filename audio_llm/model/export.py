"""From a trained model to checkpoint folders to serve: ``merged``, or ``base`` with a language-model ``adapter``.

During training PEFT holds the adapters of the language model (and of the encoder, if it has any) and the modules that
are trained in full. A served adapter may touch the language model only, so everything else is folded into the base.
The work is done on tensors, never on the live model: ``merge_adapter`` and ``unmerge_adapter`` on bfloat16 weights
leave a rounding error in the frozen ones at every call.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_folder, write_json
from audio_llm.model.quantization import is_quantised, plain_state, plain_weight
from audio_llm.model.validate import BASE_DIGEST, check_adapter, lora_targets, weights_digest

FORMS = ("merged", "adapter")
LANGUAGE_MODEL = "model.language_model."
_ROOT = "base_model.model."  # what PEFT puts in front of every name


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


def split_state(state: Mapping[str, Tensor]) -> Parts:
    """Take a PEFT state dictionary apart; modules trained in full replace the originals.

    Raises :class:`CheckpointError` for adapter tensors other than LoRA's A and B.
    """
    parts = Parts()
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in state.items():
        plain = name.removeprefix(_ROOT)
        if ".original_module." in plain:
            continue
        module, found, rest = plain.partition(".lora_")
        if found:
            kind, _, which = rest.partition(".")
            if kind not in ("A", "B") or which != "default.weight":
                raise CheckpointError(describe(name, "lora_A or lora_B of adapter 'default'", f"lora_{rest}"))
            halves[kind][module] = tensor
        else:
            plain = plain.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            parts.base[plain] = tensor
    parts.lora = {module: (a, halves["B"][module]) for module, a in halves["A"].items()}
    return parts


def fold(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling · B A, summed in float32 and rounded once to the dtype of W; A (rank, in …), B (out, rank …)."""
    # Of a convolution, A is one to `rank` maps and B one of 1x1 on these: products of matrices as well.
    delta = (b.float().flatten(1) @ a.float().flatten(1)).view(weight.shape) * scaling
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)


def merge(parts: Parts, scaling: float, exclude: str | None = None) -> dict[str, Tensor]:
    """Plain weights with the adapters of all modules but those under `exclude` folded in."""
    merged = dict(parts.base)
    for module, (a, b) in parts.lora.items():
        if not (exclude and module.startswith(exclude)):
            merged[f"{module}.weight"] = fold(merged[f"{module}.weight"], a, b, scaling)
    return merged


def language_model_weights(model: Any, untie: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the plain causal language model inside `model`, with the active LoRA layers folded in; with
    `untie` also the head of one whose head is its embeddings.

    The live weights are only read. A folded tensor is a new one, made when the iterator reaches it, so that one matrix
    at a time is held twice.
    """
    from peft.tuners.lora import LoraLayer

    adapted: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    quantised = {f"{name}.weight": module for name, module in model.named_modules() if is_quantised(module)}
    for name, parameter in model.named_parameters():
        weight, layer = parameter.detach(), adapted.get(name.removesuffix(".base_layer.weight"))
        if ".lora_" in name or not (name.startswith(LANGUAGE_MODEL) or (name == "lm_head.weight" and not tied)):
            continue
        if name in quantised:
            weight = plain_weight(quantised[name], model.dtype)
        if layer is not None and not layer.disable_adapters:
            for adapter in (adapter for adapter in layer.active_adapters if adapter in layer.lora_A):
                a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
                weight = fold(weight, a, b, layer.scaling[adapter])
        yield _on_its_own(name.replace(".base_layer.", ".")), weight
    if tied and untie:
        yield "lm_head.weight", model.get_output_embeddings().weight.detach().clone()  # files share no memory


def _on_its_own(name: str) -> str:
    """The name that something of the language model has where the language model stands alone."""
    return name.replace(LANGUAGE_MODEL, "model.", 1)


def write_language_model(
    model: Any,
    destination: str | Path,
    tensors: Iterable[tuple[str, Tensor]] | None,
    tokenizer: Any = None,
    untie: bool = False,
) -> Path:
    """Write the language model of `model` alone, as a folder of its own architecture: vLLM runs it on embeddings.

    `tensors` are those of :func:`language_model_weights`, with the same `untie`; None leaves the weights out. With a
    `tokenizer` the folder is one for everybody, with the generation's special tokens.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = model.config.get_text_config()
    plain = type(text).from_dict(text.to_dict())
    plain.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    plain.dtype = str(model.dtype).removeprefix("torch.")
    plain.tie_word_embeddings = bool(plain.tie_word_embeddings) and not untie
    with atomic_folder(destination) as folder:
        plain.save_pretrained(folder)
        if tokenizer is not None:
            generation = GenerationConfig.from_model_config(plain)
            generation.eos_token_id = model.generation_config.eos_token_id
            generation.pad_token_id = model.generation_config.pad_token_id
            generation.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        if tensors is not None:
            state = {name: tensor.cpu().contiguous() for name, tensor in tensors}
            save_file(state, folder / "model.safetensors", {"format": "pt"})
    return Path(destination)


def save_weights(
    config: Any, generation_config: Any, state: Mapping[str, Tensor], processor: Any, folder: Path
) -> None:
    """Write a checkpoint folder from plain weights, each in its own dtype: what was trained is float32 beside frozen
    bfloat16. The names are checked against the model, strictly."""
    from audio_llm.model.modeling import AudioLLMForConditionalGeneration

    with torch.device("meta"):
        model = AudioLLMForConditionalGeneration(config)
    weights = dict(state)
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


def write_merged(base: str | Path, adapter: str | Path, destination: str | Path) -> Path:
    """Write the checkpoint `base` with an `adapter` folder of PEFT's folded in. Raises :class:`CheckpointError`."""
    check_adapter(adapter, base)
    from peft import PeftModel

    from audio_llm.model.build import load_model, load_processor

    plain = load_model(base, dtype="auto")
    model: Any = PeftModel.from_pretrained(plain, str(adapter))
    weights = merge(split_state(model.state_dict()), scale_of(model.peft_config["default"]))
    with atomic_folder(destination) as folder:
        save_weights(plain.config, plain.generation_config, weights, load_processor(base), folder)
    return Path(destination)


def export_weights(
    model: Any,
    state: Mapping[str, Tensor],
    processor: Any,
    output: str | Path,
    forms: Sequence[str] = FORMS,
) -> dict[str, Path]:
    """Write the `forms` asked for under `output` and return their folders; every folder appears whole or not at all.

    `state` is the full state dictionary of `model` (gathered, where a sharding engine holds it). ``merged``: one plain
    checkpoint. ``adapter``: ``base/`` with the trained encoder and projector, and ``adapter/`` as PEFT saves it, with
    the digest of that base.
    A model whose language model has no adapter has only the plain form.
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
    adapted = any(module.startswith(LANGUAGE_MODEL) for module in parts.lora)
    if "merged" in forms or not adapted:
        with atomic_folder(output / "merged") as folder:
            save_weights(config, generation, merge(parts, scaling), processor, folder)
        folders["merged"] = output / "merged"
    if "adapter" in forms and adapted:
        with atomic_folder(output / "base") as folder:
            base = merge(parts, scaling, exclude=LANGUAGE_MODEL)
            save_weights(config, generation, base, processor, folder)
        with atomic_folder(output / "adapter") as folder:
            tensors = adapter_tensors(parts)
            write_adapter(folder, peft_config, tensors, lora_targets(_last_names(tensors)), base=output / "base")
        folders |= {"base": output / "base", "adapter": output / "adapter"}
    return folders


def scale_of(peft_config: Any) -> float:
    """The factor of B A: alpha / rank, or alpha / √rank when rank-stabilised (Kalajdzievski 2023)."""
    rank = peft_config.r
    return peft_config.lora_alpha / (rank**0.5 if peft_config.use_rslora else rank)


def adapter_tensors(parts: Parts, alone: bool = False) -> dict[str, Tensor]:
    """The language model's LoRA by PEFT's names; `alone`: by those for a language model without encoder."""
    return {
        f"{_ROOT}{_on_its_own(module) if alone else module}.lora_{kind}.weight": half.detach().cpu().contiguous()
        for module, halves in parts.lora.items()
        if module.startswith(LANGUAGE_MODEL)
        for kind, half in zip("AB", halves, strict=True)
    }


def _last_names(tensors: Iterable[str]) -> set[str]:
    """Of the layers to which the adapter's `tensors` belong."""
    return {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}


def write_adapter(
    folder: Path, peft_config: Any, tensors: dict[str, Tensor], targets: str | None = None, base: Path | None = None
) -> None:
    """Write an adapter folder as PEFT and vLLM read it; by default `targets` are the layers' last names.

    The digest of the `base` checkpoint, where it is given, is kept in the weights' metadata, which no other program
    minds: served on another base the adapter would answer, and wrongly.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({BASE_DIGEST: weights_digest(base)} if base else {})
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    peft_config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    fields = {
        "base_model_name_or_path": str(base or ""),
        "modules_to_save": None,
        "target_modules": targets or sorted(_last_names(tensors)),
        "inference_mode": True,
    }
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | fields)


def export_trained(trainer: Any, processor: Any, output: str | Path, forms: Sequence[str] = FORMS) -> dict[str, Path]:
    """Export what a Transformers or TRL trainer has trained; call it on all processes (sharded weights are gathered).

    The first process writes; the others return when it is done.
    """
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(trainer.model_wrapped)
    folders: dict[str, Path] = {}
    if accelerator.is_main_process and forms:
        model = accelerator.unwrap_model(trainer.model)
        state = plain_state(model, state, model.dtype)
        state = {name.removeprefix("module."): tensor.detach().cpu() for name, tensor in state.items()}
        with unpartitioned():  # only this process builds a model here: a collective would wait for the others
            folders = export_weights(model, state, processor, output, forms)
    accelerator.wait_for_everyone()
    return folders
