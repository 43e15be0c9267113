"""The published BAT (Zheng et al. 2024, "BAT: Learning to Reason about Spatial Sounds with Large Language Models").

SLAM-LLM's ``model.pt`` is one flat mapping of what was trained: a Q-Former with a linear and a norm
(``encoder_projector.``) and LoRA on two linears of every layer of the language model (``llm.``), all float32. With
LLaMA-2-7b these are 175 and 128 tensors. Encoder and language model are files of their own. :func:`absorb` makes
``base/`` and ``adapter/`` of them, :func:`write` puts what was trained here back into such a file. Rank and alpha are
not in the file: they are 8 and 32, as published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_llm.encoders.conversion import open_published
from audio_llm.encoders.published import listed, read_published
from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_file, atomic_folder, read_json, write_json
from audio_llm.model.build import build_checkpoint, load_language_model
from audio_llm.model.export import write_adapter
from audio_llm.model.folder import load_encoder
from audio_llm.model.projector import QFormerProjector, projector_class
from audio_llm.model.validate import check_adapter, check_checkpoint, lora_targets

FILE = "model.pt"
RANK, ALPHA, DROPOUT = 8, 32, 0.05
TARGETS = ("q_proj", "v_proj")
PROJECTOR = {"dropout": 0.1}  # the published sizes are the defaults; dropout works in training alone
_PROJECTOR = "encoder_projector."
_LORA = re.compile(
    r"llm\.base_model\.model\.model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<linear>\w+)"
    r"\.lora_(?P<side>[AB])\.default\.weight"
)
_KEY = "llm.base_model.model.model.layers.{layer}.self_attn.{linear}.lora_{side}.default.weight"
_OURS = "base_model.model.model.language_model.layers.{layer}.self_attn.{linear}.lora_{side}.weight"
# What a file holds that is no model.pt, by a key of it.
_OTHERS = {
    "optimizer": "a whole state of training, with its optimizer",
    "optimizer_state_dict": "a whole state of training, with its optimizer",
    "param_groups": "an optimizer's state",
    "scaler": "a whole state of training",
    "epoch": "a whole state of training",
    "model": "weights under the key 'model'",
    "state_dict": "weights under the key 'state_dict'",
}


def shapes_of(layers: Mapping[tuple[int, str], tuple[int, int]], projector: Any) -> dict[str, tuple[int, ...]]:
    """The keys of a ``model.pt`` and their shapes: of the linears (out, in) of `layers`, by (layer, name), and of a
    `projector` that has the sizes."""
    shapes: dict[str, tuple[int, ...]] = {f"{_PROJECTOR}{key}": tuple(v.shape) for key, v in projector.items()}
    for (layer, linear), (rows, columns) in sorted(layers.items()):
        shapes[_KEY.format(layer=layer, linear=linear, side="A")] = (RANK, columns)
        shapes[_KEY.format(layer=layer, linear=linear, side="B")] = (rows, RANK)
    return shapes


def adapted_layers(decoder: Any, name: str) -> dict[tuple[int, str], tuple[int, int]]:
    """(out, in) of the linears of a language model that BAT adapts, by (layer, name).

    Raises :class:`CheckpointError`, which calls it `name`, for a family that has none of these names.
    """
    found = {}
    for key, module in decoder.named_modules():
        match = re.fullmatch(r"layers\.(\d+)\.self_attn\.(\w+)", key)
        if match and match[2] in TARGETS and isinstance(module, torch.nn.Linear):
            found[int(match[1]), match[2]] = (module.out_features, module.in_features)
    layers = len({layer for layer, _ in found})
    if not found or len(found) != layers * len(TARGETS) or layers != decoder.config.num_hidden_layers:
        expected = f"{' and '.join(TARGETS)} in the attention of every layer, as LLaMA has them"
        raise CheckpointError(describe(f"language model {name}", expected, f"a {decoder.config.model_type}"))
    return found


def read_model(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a ``model.pt``, or the same in safetensors: these keys and `shapes`, float32, finite, no others.

    Nothing in the file is run. Raises :class:`CheckpointError` that names what deviates.
    """
    tree = read_published(path)
    if "metadata" in tree and isinstance(tree.get("model"), Mapping):  # safetensors, as others keep these weights
        tree = tree["model"]
    if known := next((key for key in _OTHERS if key in tree), None):
        cure = "Give the model.pt, which holds projector and LoRA alone."
        raise CheckpointError(describe(f"checkpoint {path}", "BAT's model.pt", f"{_OTHERS[known]} ('{known}')", cure))
    if others := [str(key) for key, value in tree.items() if not isinstance(value, Tensor)]:
        found = f"something else under {listed(others)}"
        raise CheckpointError(describe(f"checkpoint {path}", "tensors by name, as in BAT's model.pt", found))
    problems = [f"missing {key} {shape}" for key, shape in shapes.items() if key not in tree]
    problems += [f"unexpected {key} {tuple(value.shape)}" for key, value in tree.items() if key not in shapes]
    problems += [f"{key}: {wrong}" for key in shapes if key in tree and (wrong := _wrong(tree[key], shapes[key]))]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"checkpoint {path}: {len(problems)} of {len(shapes)} entries are not BAT's with this language model: "
            f"{shown}.{_advice(tree, shapes)}"
        )
    return {key: tree[key] for key in shapes}


def _wrong(value: Tensor, shape: tuple[int, ...]) -> str:
    """What a tensor of a ``model.pt`` should have been; "" for one that is right."""
    if tuple(value.shape) != shape:
        return f"expected {shape}, found {tuple(value.shape)}"
    if value.dtype != torch.float32 or value.layout != torch.strided:
        return f"expected dense torch.float32, found {value.layout} {value.dtype}"
    return "" if bool(value.isfinite().all()) else "expected finite values, found NaN or infinity"


def _advice(tree: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What the deviations tell of the file as a whole, as a sentence; "" where they tell nothing."""
    if any("adaption_" in key for key in tree):
        return " It was trained with LLaMA-Adapter, before BAT had LoRA."
    if all(key.startswith("module.") for key in tree):
        return " All names begin with 'module.': it was saved from within DistributedDataParallel."
    layers = [
        len({match["layer"] for key in keys if (match := _LORA.fullmatch(key))}) for keys in (list(tree), list(shapes))
    ]
    if layers[0] != layers[1]:
        return f" It was trained with a language model of {layers[0]} layers; this one has {layers[1]}."
    width = tree.get(f"{_PROJECTOR}linear.bias")
    if width is not None and width.shape != shapes[f"{_PROJECTOR}linear.bias"]:
        found = shapes[f"{_PROJECTOR}linear.bias"][0]
        return f" It was trained with a language model of width {len(width)}; this one has {found}."
    return ""


def absorb(
    source: str | Path, destination: str | Path, encoder: str | Path, language_model: str | Path, **sizes: Any
) -> Path:
    """Write BAT as a folder with a checkpoint ``base/`` and a LoRA ``adapter/``.

    `source` is a ``model.pt``, `encoder` Spatial-AST's ``finetuned.pth`` or an encoder folder, `language_model` what
    :func:`~audio_llm.model.build.load_language_model` takes; `sizes` replace those of the published Q-Former. Raises
    :class:`CheckpointError` for files that do not fit each other.
    """
    destination = Path(destination)
    if not Path(source).is_file():
        raise CheckpointError(describe(f"checkpoint {source}", "BAT's model.pt", "no such file"))
    if not Path(encoder).exists():
        raise CheckpointError(describe(f"encoder {encoder}", "Spatial-AST's file or an encoder folder", "nothing"))
    words, tokenizer = load_language_model(language_model, "--language-model")
    heard = load_encoder(encoder) if Path(encoder).is_dir() else open_published(encoder, "spatial_ast").encoder
    kind, config = projector_class(PROJECTOR | sizes)
    with torch.device("meta"):
        projector = kind(config, heard.hidden_size, words.config.hidden_size).state_dict()
    state = read_model(source, shapes_of(adapted_layers(words.get_decoder(), str(language_model)), projector))
    with atomic_folder(destination) as folder:
        build_checkpoint(
            folder / "base",
            encoder=heard,
            language_model=words,
            tokenizer=tokenizer,
            projector=PROJECTOR | sizes,
            prompt="alpaca",
            weights={key.removeprefix(_PROJECTOR): value for key, value in state.items() if key.startswith(_PROJECTOR)},
        )
        tensors = {
            _OURS.format(**match.groupdict()): value.contiguous()
            for key, value in state.items()
            if (match := _LORA.fullmatch(key))
        }
        write_adapter(folder / "adapter", _lora(), tensors, lora_targets(TARGETS), base=folder / "base")
        path = folder / "adapter" / "adapter_config.json"  # the folder gets its name when it is whole
        write_json(path, read_json(path) | {"base_model_name_or_path": str(destination / "base")})
    return destination


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS)
    )


def write(run: str | Path, destination: str | Path) -> Path:
    """Write the ``base/`` and ``adapter/`` of a folder (a run of training, or of :func:`absorb`) as ``model.pt`` in a
    new folder. Raises :class:`CheckpointError` for a model of another form than BAT's."""
    from safetensors.torch import load_file

    base, adapter = Path(run) / "base", Path(run) / "adapter"
    if not adapter.is_dir():
        cure = "Train with export=[adapter], train={encoder: frozen, projector: full, language_model: lora}."
        raise CheckpointError(describe(f"model {run}", "folders base/ and adapter/", "no adapter/", cure))
    facts = check_checkpoint(base)
    check_adapter(adapter, base)
    lora = read_json(adapter / "adapter_config.json")
    scale = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False}
    for name, published in scale.items():
        if lora.get(name, False) != published:
            cure = "A model.pt does not say it, and whoever loads it takes the published one."
            raise CheckpointError(describe(f"adapter {adapter}", f"{name} {published}", str(lora.get(name)), cure))
    fields = facts.get("projector") or {}
    kind, _ = projector_class(fields)
    if kind is not QFormerProjector:
        raise CheckpointError(describe(f"checkpoint {base}", "a Q-Former", f"the projector {fields.get('name')}"))
    parts = _base_tensors(base, ("model.projector.", "model.language_model.layers."))
    layers = {}
    for key, value in parts.items():
        match = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.self_attn\.(\w+)\.weight", key)
        if match and match[2] in TARGETS:
            layers[int(match[1]), match[2]] = (value.shape[0], value.shape[1])
    projector = {
        key.removeprefix("model.projector."): value.float()
        for key, value in parts.items()
        if key.startswith("model.projector.")
    }
    low_rank = load_file(adapter / "adapter_model.safetensors")
    state: dict[str, Tensor] = {f"{_PROJECTOR}{key}": value for key, value in projector.items()}
    for layer, linear in sorted(layers):
        for side in "AB":
            place: dict[str, Any] = {"layer": layer, "linear": linear, "side": side}
            if (ours := _OURS.format(**place)) not in low_rank:
                expected = f"LoRA on {' and '.join(TARGETS)} of every layer"
                raise CheckpointError(describe(f"adapter {adapter}", expected, f"none at {ours}"))
            state[_KEY.format(**place)] = low_rank.pop(ours).float()
    if low_rank:
        cure = f"Train with lora.targets=[{', '.join(TARGETS)}]."
        raise CheckpointError(
            describe(f"adapter {adapter}", f"LoRA on {' and '.join(TARGETS)} alone", listed(low_rank), cure)
        )
    with atomic_folder(destination) as folder, atomic_file(folder / FILE) as temporary:
        torch.save(state, temporary)
    return Path(destination)


def _base_tensors(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    from safetensors import safe_open

    from audio_llm.model.validate import weight_files

    found: dict[str, Tensor] = {}
    for name in weight_files(folder, "model"):
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
    return found
