"""Is this folder a checkpoint, an encoder or an adapter that loads as it was trained? Asked before anything starts.

vLLM and PEFT accept some folders silently and compute something else: adapter weights outside the language model are
dropped, per-layer ranks are mis-scaled, a tie flag that differs between the two levels of the configuration leaves
the output head untrained; an adapter on another base than its own answers, and wrongly. These functions read only JSON
and safetensors headers, so they cost milliseconds; the digest of a base reads its weights once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import mmap
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from audio_llm import machine
from audio_llm.errors import CheckpointError, DataError, describe
from audio_llm.files import read_json, within, write_json

MODEL_TYPE = "audio_llm"
ARCHITECTURE = "AudioLLMForConditionalGeneration"
KEY_GROUPS = ("model.audio_encoder.", "model.projector.", "model.language_model.")
CONFIG, WEIGHTS = "config.json", "encoder.safetensors"  # of an encoder folder
ENCODER_VERSION = 1
# One of them holds a tokenizer's words: without any Transformers makes one that knows none, and says nothing.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
CHECKPOINT_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")
DIGEST_FILE = ".weights.json"  # remembers the digest of the weights beside it
BASE_DIGEST = "base_sha256"  # in the metadata of an adapter's weights: the digest of the base it was trained on
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What adapters are trained on. Served ones must touch the language model only, and an encoder may have layers of the
# same names, hence the full path.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"


def lora_targets(names: Collection[str] = LINEARS) -> str:
    """The regular expression of the language model's layers with these last `names`, as PEFT takes it."""
    if set(names) == set(LINEARS):
        return LORA_TARGETS
    chosen = "|".join(name for name in LINEARS if name in names)
    return rf"model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:{chosen})"


def named(layers: Sequence[str], names: Collection[str]) -> list[str]:
    """Those of an encoder's `layers` that have one of the last `names` which were chosen; all where it has none such,
    or where nothing was chosen."""
    chosen = () if set(names) == set(LINEARS) else names
    return [layer for layer in layers if layer.rpartition(".")[2] in chosen] or list(layers)


_ADAPTER_KEY = re.compile(
    r"base_model\.model\.model\.language_model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn|mlp)\.(?P<linear>\w+)\.lora_(?P<side>[AB])\.weight"
)


# What an encoder folder's config.json may say, beside what its writer adds; all but the encoder belong to some tasks.
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "encoder": ("a mapping", lambda value: isinstance(value, dict)),
    "labels": ("a list of names", lambda value: _all_are(value, str)),
    "task": ("a name", lambda value: isinstance(value, str)),
    "head": ("a mapping", lambda value: isinstance(value, dict)),
    "seld": ("a mapping", lambda value: isinstance(value, dict)),
    "thresholds": ("a list of finite numbers", lambda value: _all_are(value, (int, float), math.isfinite)),
}


@dataclass(frozen=True)
class AdapterInfo:
    """What a server has to know of an adapter."""

    folder: Path
    rank: int


def check_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint folder, or raise :class:`CheckpointError` with the first defect."""
    folder = Path(folder)
    config = _read_json(folder, "config.json", "a checkpoint folder")
    refuse_adapter_in(folder)
    check_template(folder)
    if config.get("model_type") != MODEL_TYPE:
        cure = "'audio-llm convert' makes a checkpoint of ours from published weights."
        raise CheckpointError(
            describe(f"checkpoint {folder}", f"model_type {MODEL_TYPE}", str(config.get("model_type")), cure)
        )
    if config.get("architectures") != [ARCHITECTURE]:
        raise CheckpointError(
            describe(f"checkpoint {folder}", f"architectures [{ARCHITECTURE}]", str(config.get("architectures")))
        )
    cure = "Save the processor beside the model: processor.save_pretrained(folder)."
    expect_files(f"checkpoint {folder}", folder, CHECKPOINT_FILES, cure)
    if not any(path.is_file() for name in VOCABULARIES for path in folder.glob(name)):
        raise CheckpointError(describe(f"checkpoint {folder}", "the tokenizer's words (tokenizer.json)", "none", cure))
    _check_strays(folder)
    _check_sizes(folder, config)
    _check_lists(folder, config)
    _check_ends(folder, config)
    _check_audio_token(folder, config)
    _check_ties_and_keys(folder, config)
    return config


def _check_strays(folder: Path) -> None:
    """No other weights lie beside those of the model: vLLM reads every file of safetensors, whatever its name."""
    known = weight_files(folder, "model")
    strays = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in known)
    if strays:
        cure = "Move it away: vLLM would read it as part of the model."
        raise CheckpointError(describe(f"checkpoint {folder}", f"weights in {', '.join(known)} alone", strays[0], cure))


_IN_LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.")


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """The vocabulary, width and layers that the configuration says are those of the weights, and the tokenizer has no
    id beyond them: an engine would index beside its table, or leave layers out."""
    item, text = f"checkpoint {folder}", config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(describe(f"{item}: text_config in config.json", "a mapping", repr(text)[:60]))
    cure = "Copy the folder again: its files are not of one model."
    shapes = tensor_shapes(folder, "model")
    said = [text.get("vocab_size"), text.get("hidden_size")]
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if key in shapes and None not in said and shapes[key] != said:
            raise CheckpointError(describe(item, f"{key} of {said}, as config.json says", f"{shapes[key]}", cure))
    layers = {int(match[1]) for match in map(_IN_LAYER.match, shapes) if match}
    count = text.get("num_hidden_layers")
    if layers and isinstance(count, int) and layers != set(range(count)):
        expected = f"{count} layers of the language model, as config.json says"
        raise CheckpointError(describe(item, expected, f"{len(layers)}", cure))
    if isinstance(said[0], int) and (highest := _highest_id(folder)) >= said[0]:
        expected = f"a tokenizer with ids below {said[0]}, the rows of its table"
        raise CheckpointError(describe(item, expected, f"one with the id {highest}", cure))


def _check_lists(folder: Path, config: dict[str, Any]) -> None:
    for name, kind, called in (("audio_marks", int, "ids"), ("orders", str, "names")):
        if config.get(name) is not None and not _all_are(config[name], kind):
            item = f"checkpoint {folder}: {name} in config.json"
            raise CheckpointError(describe(item, f"a list of {called}", repr(config[name])[:60]))


def _check_ends(folder: Path, config: dict[str, Any]) -> None:
    """The tokens that end a reply are tokens: with others no reply would end before its limit."""
    if not (folder / "generation_config.json").is_file():
        return
    found = _read_json(folder, "generation_config.json", "a model's folder").get("eos_token_id")
    size = config["text_config"].get("vocab_size")
    for token in found if isinstance(found, list) else [found]:
        fits = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < (size or token + 1)
        if token is not None and not fits:
            item = f"checkpoint {folder}: eos_token_id in generation_config.json"
            raise CheckpointError(describe(item, f"ids inside the vocabulary of {size}", repr(token)[:60]))


def end_ids(folder: str | Path) -> tuple[int, ...]:
    """The ids that end a reply of the checkpoint in `folder`."""
    files = [name for name in ("generation_config.json", CONFIG) if (Path(folder) / name).is_file()]
    said = (_read_json(Path(folder), name, "a model's folder").get("eos_token_id") for name in files)
    found = next((one for one in said if one is not None), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _highest_id(folder: Path) -> int:
    """Of a fast tokenizer; -1 for any other, and for one that its own library will refuse."""
    tree = _fast_tokenizer(folder)
    model = tree.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = list(words.values()) if isinstance(words, dict) else [len(words) - 1] if isinstance(words, list) else []
    ids += [entry.get("id") for entry in _added(folder)]
    return max((one for one in ids if isinstance(one, int)), default=-1)


def _fast_tokenizer(folder: Path) -> dict[str, Any]:
    """``tokenizer.json``; empty where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    facts = path.stat()
    return _parsed(folder, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=1)
def _parsed(folder: Path, changed: int, size: int) -> dict[str, Any]:
    """Large ones take a second to read, and several checks ask."""
    return _read_json(folder, "tokenizer.json", "a fast tokenizer")


def _added(folder: Path) -> list[dict[str, Any]]:
    """The tokens that a fast tokenizer finds before it splits words."""
    added = _fast_tokenizer(folder).get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        item = f"checkpoint {folder}: tokenizer.json"
        raise CheckpointError(describe(item, "added_tokens as a list of mappings", "something else"))
    return added


def expect_files(item: str, folder: Path, names: Sequence[str], cure: str | None = None) -> None:
    """Raise :class:`CheckpointError`, which calls the folder `item`, unless it has files of these `names`."""
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(describe(item, f"a file {name}", "none", cure))


def check_encoder(folder: str | Path) -> dict[str, Any]:
    """The configuration of an encoder folder; :class:`CheckpointError` for a folder that is none."""
    folder, item = Path(folder), f"encoder folder {folder}"
    cure = "Train one with 'audio-llm train recipes/quickstart/encoder.yaml' or convert a published checkpoint."
    expect_files(item, folder, (CONFIG, WEIGHTS), cure)
    config = read_facts(folder)
    if config.get("version") != ENCODER_VERSION:
        raise CheckpointError(describe(item, f"version {ENCODER_VERSION}", repr(config.get("version"))))
    for key, (expected, holds) in _ENTRIES.items():
        if (key in config or key == "encoder") and not holds(config.get(key)):
            found = repr(config[key])[:60] if key in config else "none"
            raise CheckpointError(describe(f"{item}: {key} in {CONFIG}", expected, found))
    return config


def check_language_model(path: str | Path, item: str = "model.language_model.path") -> Path | None:
    """:class:`CheckpointError`, which calls it `item`, unless `path` is a language model's folder or GGUF file, or may
    be its name. Returns the GGUF file, where it is one or a folder of one.

    A name counts where the model is in the local cache, or where the network may be asked (``HF_HUB_OFFLINE`` unset).
    """
    from huggingface_hub import constants, try_to_load_from_cache

    folder, expected = Path(path), "a folder with a language model, a GGUF file, or the name of a model in the cache"
    named = 1 <= len(folder.parts) <= 2 and not folder.is_absolute() and not str(path).startswith((".", "~"))
    if folder.exists():
        files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
        if (folder / "config.json").is_file():
            return None
        if len(files) > 1:
            cure = "Name one of the files."
            raise CheckpointError(describe(f"{item}: {path}", "one GGUF file", f"{len(files)}", cure))
        if not files or files[0].suffix != ".gguf":
            found = "which is another file" if folder.is_file() else "which has no config.json"
            raise CheckpointError(describe(item, expected, f"{path}, {found}"))
        if find_spec("gguf") is None:
            cure = "Install it: pip install gguf."
            raise CheckpointError(describe(f"{item}: {files[0]}", "the package gguf, which reads it", "none", cure))
        return files[0]
    elif not named or (len(folder.parts) == 2 and folder.parent.is_dir()):
        raise CheckpointError(describe(item, expected, f"{path}, where nothing is"))
    elif constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(str(path), "config.json"), str):
        found = f"'{path}', which is not in the cache (HF_HUB_OFFLINE=1: nothing is fetched)"
        raise CheckpointError(describe(item, expected, found, download_cure(path)))
    return None


def download_cure(name: str | Path) -> str:
    """What to do about a model that is not on this machine."""
    return f"Download it with HF_HUB_OFFLINE=0 hf download {name}, or name a folder."


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` of a model's folder says; empty where there is none.

    Raises :class:`CheckpointError` for one that is no mapping.
    """
    folder = Path(folder)
    return _read_json(folder, CONFIG, "a model's folder") if (folder / CONFIG).is_file() else {}


def _all_are(value: Any, kind: Any, holds: Callable[[Any], bool] = lambda item: True) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and holds(item) for item in value)


def check_template(folder: str | Path) -> None:
    """Raise :class:`CheckpointError` for a chat template that counts within counting, or makes texts or numbers grow by
    themselves: every question would hang on it. (Transformers' sandbox bounds one count to 100,000.)"""
    from jinja2 import Environment, TemplateError

    path = Path(folder) / "chat_template.jinja"
    if not path.is_file():
        return
    try:
        if path.stat().st_size > 2**20:
            raise CheckpointError(describe(str(path), "at most 1 MiB", f"{path.stat().st_size} bytes"))
        text = _GENERATION.sub("", path.read_text(encoding="utf-8"))
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (TemplateError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(describe(str(path), "a Jinja template", str(error)[:200])) from error
    if endless := _endless(tree, 0):
        raise CheckpointError(describe(str(path), "a template that ends", endless))


_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


def _endless(node: Any, counting: int) -> str:
    """What makes a part of a template take for ever, inside of `counting` loops over numbers; "" for nothing."""
    from jinja2 import nodes

    if isinstance(node, nodes.Pow):
        return "a power"
    if isinstance(node, nodes.Mul):
        constants = [side.value for side in (node.left, node.right) if isinstance(side, nodes.Const)]
        if any(isinstance(value, str) or value > 1000 for value in constants):
            return "a text or a number many times"
    if isinstance(node, nodes.For):
        over = nodes.Output([node.iter])  # so that the loop's own expression is found as well
        called = (call.node for call in over.find_all(nodes.Call))
        counting += any(isinstance(name, nodes.Name) and name.name == "range" for name in called)
        if counting > 1:
            return "a count within a count"
    return next(filter(None, (_endless(child, counting) for child in node.iter_child_nodes())), "")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a whole model, beside which an adapter would be loaded with it, unasked."""
    return any((Path(folder) / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def refuse_adapter_in(folder: str | Path) -> None:
    """Raise :class:`CheckpointError` for a model's folder that holds an adapter: Transformers would load the model that
    the adapter names in the place of this one, and the adapter on top of it."""
    if (Path(folder) / "adapter_config.json").exists():
        expected, found = "a model alone", "adapter_config.json, which names another model"
        raise CheckpointError(describe(f"checkpoint {folder}", expected, found, "Move the adapter's files away."))


def check_adapter(folder: str | Path, base: str | Path | None = None, max_rank: int | None = None) -> AdapterInfo:
    """Check a PEFT adapter folder, and that `base`, where it is given, is the checkpoint that it was trained on.

    An adapter that does not say what it was trained on (an older one, or another program's) is taken with a note.
    """
    text = check_checkpoint(base).get("text_config") or {} if base is not None else {}
    folder = Path(folder)
    config = _read_json(folder, "adapter_config.json", "a PEFT adapter folder")
    item = f"adapter {folder}"
    cure = f"Train it with target_modules=r'{LORA_TARGETS}'."
    if config.get("peft_type") != "LORA":
        raise CheckpointError(describe(item, "peft_type LORA", str(config.get("peft_type"))))
    for name, why in _UNSUPPORTED.items():
        if config.get(name) not in _EMPTY:
            raise CheckpointError(describe(item, f"no {name}", str(config[name]), why))
    for name, value in config.items():
        if name not in _KEYS and value not in _EMPTY and (name, value) not in _DEFAULTS:
            raise CheckpointError(describe(item, f"no {name[:80]}", repr(value)[:80], "It could load other code."))
    targets = config.get("target_modules")
    named: Any = re.findall(r"\w+_proj", targets) if isinstance(targets, str) else targets
    known = isinstance(named, list) and bool(named) and set(named) <= set(LINEARS)
    if targets != LORA_TARGETS and not (known and targets in (named, lora_targets(named))):
        expected = f"target_modules as a list of {', '.join(LINEARS)}"
        raise CheckpointError(describe(item, expected, repr(targets)[:80], cure))
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(describe(item, "a rank r of 1 or more", str(rank)))
    if max_rank is not None and rank > max_rank:
        raise CheckpointError(
            describe(item, f"a rank of at most {max_rank}", str(rank), "Start the server with --max-lora-rank.")
        )
    shapes = tensor_shapes(folder, "adapter_model")
    for key, shape in shapes.items():
        match = _ADAPTER_KEY.fullmatch(key)
        if match is None or match["linear"] not in LINEARS:
            raise CheckpointError(describe(item, "weights of language-model linears only", key, cure))
        _check_adapter_tensor(item, match, shape, rank, text)
    check_finite(folder, "adapter_model")
    if base is not None:
        _check_base(item, folder, str(config.get("base_model_name_or_path") or "its base"), base)
    return AdapterInfo(folder, rank)


def _check_base(item: str, folder: Path, name: str, base: str | Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / weight_files(folder, "adapter_model")[0], framework="numpy") as file:
        expected = (file.metadata() or {}).get(BASE_DIGEST)
    if expected is None:
        print(f"{item}: does not say what it was trained on; {base} is taken for its base", file=sys.stderr, flush=True)
        return
    found = weights_digest(base)
    if found != expected:
        cure = "Give the base that was exported beside it, or an adapter that was trained on this one."
        raise CheckpointError(
            describe(
                item, f"{name} (SHA-256 {expected[:16]}…), on which it was trained", f"{base} ({found[:16]}…)", cure
            )
        )


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's weights: names, dtypes, shapes and bytes, however they are spread over files.

    The copy of tied embeddings that some versions save is left out. The digest is remembered in the folder, where that
    can be written, for as long as the files are what they were (size, and the time of the last change, which copying
    sets anew).
    """
    folder = Path(folder)
    tensor_shapes(folder, "model")  # says what is damaged
    files = {
        name: [(folder / name).stat().st_size, (folder / name).stat().st_ctime_ns]
        for name in weight_files(folder, "model")
    }
    if (folder / DIGEST_FILE).is_file():
        with contextlib.suppress(CheckpointError):
            known = _read_json(folder, DIGEST_FILE, "a checkpoint")
            if known.get("files") == files and isinstance(known.get("sha256"), str):
                return str(known["sha256"])
    tied = read_facts(folder).get("tie_word_embeddings")
    tensors: dict[str, str] = {}
    for name in files:
        for key, about, values in _tensors(folder / name):
            tensors[key] = json.dumps([key, about["dtype"], about["shape"], hashlib.sha256(values).hexdigest()])
    if tied:
        tensors.pop("lm_head.weight", None)
    digest = hashlib.sha256("\n".join(tensors[key] for key in sorted(tensors)).encode()).hexdigest()
    with contextlib.suppress(OSError):  # a folder that only others may write
        write_json(folder / DIGEST_FILE, {"files": files, "sha256": digest})
    return digest


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any], memoryview]]:
    """Name, dtype and shape, and bytes of all tensors in a safetensors file; the bytes are gone with the next one."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        header: dict[str, Any] = json.loads(content[8:start])
        header.pop("__metadata__", None)
        with memoryview(content) as view:
            for key, about in header.items():
                begin, end = about["data_offsets"]
                with view[start + begin : start + end] as values:
                    yield key, about, values


# Of a dtype: the integer of its size, and the bits of its exponent, which are all set in NaN and infinity.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_PIECE = 2**22  # bytes looked at at once: they stay in the processor's cache


def check_finite(folder: str | Path, stem: str = "model") -> None:
    """Raise :class:`CheckpointError` where weights are NaN or infinite: vLLM loads them and answers, with anything.

    Reads all weights once, by as many threads as there are processors, before vLLM reads them from the same memory.
    """
    folder = Path(folder)
    tensor_shapes(folder, stem)  # says what is damaged
    with ThreadPoolExecutor(min(8, machine.cpus())) as pool:
        for name in weight_files(folder, stem):
            for key, about, values in _tensors(folder / name):
                pieces = [values[start : start + _PIECE] for start in range(0, len(values), _PIECE)]
                kinds = [about["dtype"]] * len(pieces)
                spoilt = any(list(pool.map(_spoilt, kinds, pieces)))
                for piece in pieces:
                    piece.release()
                if spoilt:
                    kind = "checkpoint" if stem == "model" else "adapter"
                    found = f"NaN or infinity in {key}"
                    raise CheckpointError(
                        describe(f"{kind} {folder}", "finite weights", found, "Its training diverged.")
                    )


def _spoilt(dtype: str, values: memoryview) -> bool:
    import numpy as np

    if dtype not in _EXPONENTS:  # integers, and the small floats of quantised weights
        return False
    kind, exponent = _EXPONENTS[dtype]
    return bool((np.frombuffer(values, kind) & exponent).max(initial=0) == exponent)


_EMPTY: tuple[Any, ...] = (None, False, "none", [], {})
# What an adapter's configuration may say; all else must be as it is by default, for some of it names code to import.
_KEYS = {
    *("peft_type", "peft_version", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "inference_mode"),
    *("base_model_name_or_path", "revision", "use_rslora", "init_lora_weights"),
}
_DEFAULTS = (("megatron_core", "megatron.core"), ("qalora_group_size", 16))
_UNSUPPORTED = {
    "modules_to_save": "A trained projector or encoder belongs into the base checkpoint; save it there.",
    "rank_pattern": "Ranks per layer are scaled wrongly when served; use one rank.",
    "alpha_pattern": "Scales per layer are ignored when served; use one lora_alpha.",
    "use_dora": "DoRA adapters cannot be served; merge the adapter into the checkpoint.",
    "bias": "Trained biases cannot be served; train with bias='none'.",
}


def _check_adapter_tensor(item: str, match: re.Match[str], shape: list[int], rank: int, text: dict[str, Any]) -> None:
    key = match.string
    if shape[0 if match["side"] == "A" else 1] != rank:
        raise CheckpointError(describe(item, f"rank {rank} everywhere", f"{key} of shape {shape}"))
    layers, hidden = text.get("num_hidden_layers"), text.get("hidden_size")
    cure = "The adapter was trained on another base model."
    if layers is not None and int(match["layer"]) >= layers:
        raise CheckpointError(describe(item, f"layers below {layers}", key, cure))
    reads_hidden = match["linear"] not in ("o_proj", "down_proj")
    if hidden is not None and match["side"] == "A" and reads_hidden and shape[1] != hidden:
        raise CheckpointError(describe(item, f"inputs of width {hidden}", f"{key} of shape {shape}", cure))


def _check_audio_token(folder: Path, config: dict[str, Any]) -> None:
    item, token_id, marks = f"checkpoint {folder}", config.get("audio_token_id"), config.get("audio_marks") or []
    size = (config.get("text_config") or {}).get("vocab_size")
    for name, value in [("audio_token_id", token_id), *(("audio_marks", mark) for mark in marks)]:
        if not isinstance(value, int) or (size is not None and not 0 <= value < size):
            raise CheckpointError(describe(item, f"{name} inside the vocabulary of {size}", str(value)))
    written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    words = audio_marks(folder, config)
    if words and words[0] not in written:  # the template would leave the audio out, or put another in its place
        expected = f"a chat template that writes {words[0]}, the token {token_id} (audio_token_id)"
        raise CheckpointError(describe(item, expected, "one that does not"))


def audio_marks(folder: str | Path, config: dict[str, Any]) -> list[str]:
    """The words of a checkpoint that mark audio, its placeholder first; none where the tokenizer is no fast one.

    Raises :class:`CheckpointError` where the tokenizer has no special token of such an id.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        return []
    added = _added(Path(folder))
    known = {entry.get("id"): str(entry.get("content")) for entry in added if entry.get("special")}
    ids = [config["audio_token_id"], *(config.get("audio_marks") or [])]
    for token in ids:
        if token not in known:
            expected = f"a special token of the id {token}, which marks audio"
            raise CheckpointError(describe(f"checkpoint {folder}: tokenizer.json", expected, "none"))
    return [known[token] for token in ids]


def special_words(folder: str | Path) -> list[str]:
    """The special tokens of a checkpoint's tokenizer, from its files alone; each is one token wherever it stands."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        added = _added(folder)
    elif (folder / "tokenizer_config.json").is_file():
        known = _read_json(folder, "tokenizer_config.json", "a tokenizer").get("added_tokens_decoder") or {}
        added = list(known.values())
    else:
        added = []
    return [str(entry["content"]) for entry in added if entry.get("special") and entry.get("content")]


def _check_ties_and_keys(folder: Path, config: dict[str, Any]) -> None:
    item = f"checkpoint {folder}"
    top, text = config.get("tie_word_embeddings"), (config.get("text_config") or {}).get("tie_word_embeddings")
    if top is not None and text is not None and top != text:
        found = f"{top} and {text} in text_config"
        raise CheckpointError(describe(item, "one value of tie_word_embeddings at both levels", found))
    keys = set(tensor_shapes(folder, "model"))
    strange = sorted(key for key in keys if not key.startswith((*KEY_GROUPS, "lm_head.")))
    if strange:
        raise CheckpointError(describe(item, f"keys under {', '.join(KEY_GROUPS)}lm_head.", strange[0]))
    for group in KEY_GROUPS:
        if not any(key.startswith(group) for key in keys):
            raise CheckpointError(describe(item, f"weights under {group}", "none"))
    if text is False and "lm_head.weight" not in keys:
        raise CheckpointError(describe(item, "lm_head.weight (the embeddings are not tied)", "none"))


def _read_json(folder: Path, name: str, kind: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = read_json(path)
    except OSError as error:
        raise CheckpointError(describe(str(folder), f"{kind} with {name}", error.strerror or str(error))) from error
    except ValueError as error:
        raise CheckpointError(describe(str(path), "valid JSON", str(error))) from error
    if not isinstance(content, dict):
        raise CheckpointError(describe(str(path), "a JSON object", type(content).__name__))
    return content


def weight_files(folder: Path, stem: str) -> list[str]:
    """The names of ``stem.safetensors`` or, where there is an index, of its shards. Raises :class:`CheckpointError` for
    both: Transformers reads the one, and vLLM the others."""
    places = _weight_map(folder, stem)
    return [f"{stem}.safetensors"] if places is None else sorted(set(places.values()))


def check_index(path: Path) -> dict[str, Any]:
    """The index of a model's shards. Raises :class:`CheckpointError` where it lacks a part that Transformers reads."""
    index = _read_json(path.parent, path.name, "a sharded checkpoint")
    for key, cure in (("weight_map", "Copy it again."), ("metadata", 'Write "metadata": {} into it; it may be empty.')):
        if not isinstance(index.get(key), dict):
            found = "none" if key not in index else repr(index[key])[:60]
            raise CheckpointError(describe(str(path), f"a mapping '{key}'", found, cure))
    return index


def _weight_map(folder: Path, stem: str) -> dict[str, str] | None:
    """The file of each tensor by the index of a sharded checkpoint; None where there is no index."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return None
    weights = check_index(index)["weight_map"]
    if not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(describe(str(index), "a weight_map of names", "something else"))
    names = set(weights.values())
    try:
        for name in sorted(names):
            within(folder, name)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    whole = f"{stem}.safetensors"
    if whole not in names and (folder / whole).is_file():
        cure = "Delete what is of another save: engines do not read the same of them."
        raise CheckpointError(describe(str(folder), f"{whole}, or the files of {index.name}", "both", cure))
    return weights


def tensor_shapes(folder: Path, stem: str) -> dict[str, list[int]]:
    """Names and shapes in ``stem.safetensors`` or its shards, from the headers alone. Raises :class:`CheckpointError`
    for shards that hold other tensors than the index says: of a tensor in two of them, engines take either."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    places = _weight_map(folder, stem)
    for name in weight_files(folder, stem):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(describe(str(folder), f"weights in {name}", "no such file"))
        try:
            with safe_open(path, framework="numpy") as file:
                found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            cure = "The file is damaged or was cut while it was written; save or copy it again."
            raise CheckpointError(describe(str(path), "a safetensors file", str(error), cure)) from error
        if places is not None and found.keys() != (said := {key for key, file in places.items() if file == name}):
            odd = min(found.keys() ^ said)
            told = f"{odd} as well, which is of {places.get(odd, 'none')}" if odd in found else f"no {odd}"
            cure = "Copy the folder again: its files are not of one save."
            raise CheckpointError(describe(str(path), "the tensors that the index names for it", told, cure))
        shapes |= found
    return shapes
