"""Published checkpoint files: read without running code, unwrapped, renamed by tables that are data.

Whatever the layout, ``load_published`` of an encoder is three calls: :func:`read_published` for the tree in the file,
:func:`state_dict_of` for the weights in it, and :func:`rename` with the table of that layout;
``model.folder.load_strictly`` does the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from audio_llm import files
from audio_llm.encoders import features
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.files import content_hash
from audio_llm.model.encoder import ENCODERS

# The allow-list: all that a pickle may name beside torch's own (tensors, dtypes, OrderedDict). argparse.Namespace holds
# the options of Spatial-AST and of some BEATs files, NumPy scalars the scores in stereo SELD and Lightning files (the
# second name is where NumPy 1 had the constructor). None of them runs code that the file chooses.
SAFE_GLOBALS: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    numpy.dtype,
    numpy._core.multiarray.scalar,  # type: ignore[attr-defined]
    (numpy._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    *(type(numpy.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]
# Where files keep their weights, the most specific name first, and what wrappers put before every key.
UNDER = ("seld_model", "model_state_dict", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "net.")

# What some files carry of their front end: constants of our configuration, compared and then left out.
KERNELS = ("spectrogram_extractor.conv_real.weight", "spectrogram_extractor.conv_imag.weight")
MEL_MATRIX = "logmel_extractor.melW"
_FRONT_END_TOLERANCE = 1e-5  # float32 rounding of window times cosine

_REFUSED = re.compile(r"GLOBAL (\w+(?:\.\w+)+)")  # as torch's unpickler words it: "... GLOBAL posix.system whose ..."


class PublishedFile(os.PathLike[str]):
    """The path of a published file or Transformers folder, read and hashed once however many ask.

    It goes wherever such a path goes: recognising a file and loading it then share what was read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    @cached_property
    def tree(self) -> dict[str, Any]:
        """See :func:`read_published`."""
        return _read(self.path)

    @cached_property
    def sha256(self) -> str | dict[str, str]:
        """Of the file; of the files of a folder that hold weights, by their names."""
        if not self.path.is_dir():
            return content_hash(self.path)
        files = (file for file in sorted(self.path.iterdir()) if file.suffix in (".safetensors", ".bin"))
        return {file.name: content_hash(file) for file in files}


def read_published(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree in a ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file, on the CPU; told apart by content.

    A bare state dict comes back as it is. Of a safetensors file the tensors come under ``model``, its own metadata
    under ``metadata``, and a JSON configuration beside it (``NAME.json``, else ``config.json``) under ``cfg``.
    Nothing in the file is run: a pickle that names anything outside of :data:`SAFE_GLOBALS`, a file that is damaged
    and one that is no checkpoint at all raise :class:`CheckpointError`.
    """
    return path.tree if isinstance(path, PublishedFile) else _read(Path(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            head = stream.read(9)
    except IsADirectoryError as error:
        raise CheckpointError(describe(f"checkpoint {path}", "a file", "a folder")) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror or error}).") from error
    # A safetensors file is the length of its header in 8 bytes, then JSON; no pickle or zip has "{" there.
    tree = _read_safetensors(path) if head[8:] == b"{" else _read_pickle(path, head)
    if not isinstance(tree, dict):
        expected = "a checkpoint of named tensors"
        raise CheckpointError(describe(f"checkpoint {path}", expected, f"a single {type(tree).__name__}"))
    return tree


def state_dict_of(
    tree: Mapping[str, Any],
    *,
    under: Iterable[str] = UNDER,
    prefixes: Iterable[str] = PREFIXES,
    kind: str | None = None,
    anchor: str | None = None,
    name: str | os.PathLike[str] = "file",
) -> dict[str, Tensor]:
    """The weights in a tree from :func:`read_published`: the first of `under` that it has, else the tree itself.

    `prefixes` are taken off every key, in any order and number. `kind` is the encoder that they are for: weights that
    look like another one's are refused by its name. With `anchor`, a key that every model of the kind has,
    the weights are those which stand under the same prefix as it (a model inside of a larger one).
    :class:`CheckpointError` names `name` when there are no weights, or two for one key.
    """
    wrapped = next((tree[key] for key in under if isinstance(tree.get(key), Mapping)), tree)
    state = {key: value for key, value in wrapped.items() if isinstance(value, Tensor) and isinstance(key, str)}
    strange = [str(key) for key in wrapped if key not in state]
    if not state or (strange and wrapped is not tree):
        found = f"'{strange[0]}' among them" if state else f"the keys {listed(map(str, tree))}"
        homes = ", ".join(f"'{key}'" for key in under)
        raise CheckpointError(describe(f"checkpoint {name}", f"named tensors, bare or under {homes}", found))
    wrappers = "|".join(re.escape(prefix) for prefix in prefixes)
    state = rename(state, ((f"^(?:{wrappers})+", ""),), name=name) if wrappers else state
    if kind is not None and not _signed(kind, state) and ENCODERS.find(kind).signs and (others := signs_in(state)):
        other = others[0]
        cure = f"Name the encoder '{other}', or give another file."
        raise CheckpointError(describe(f"checkpoint {name}", f"weights of '{kind}'", f"those of '{other}'", cure))
    if anchor is None:
        return state
    places = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]
    if len(places) != 1:
        found = f"the keys {listed(state)}" if not places else f"{len(places)}: under {listed(places)}"
        raise CheckpointError(describe(f"checkpoint {name}", f"one key that ends in {anchor}", found))
    return {key.removeprefix(places[0]): value for key, value in state.items() if key.startswith(places[0])}


def signs_in(keys: Iterable[str]) -> list[str]:
    """The names of the registered encoders whose `signs` are among the `keys` of some weights."""
    keys = list(keys)
    return [name for name in sorted(ENCODERS) if _signed(name, keys)]


def _signed(name: str, keys: Iterable[str]) -> bool:
    signs = ENCODERS.find(name).signs
    return bool(signs) and any(re.search(signs, key) for key in keys)


def rename(
    state: Mapping[str, Tensor], table: Iterable[tuple[str, str | None]], *, name: str | os.PathLike[str] = "file"
) -> dict[str, Tensor]:
    """`state` with every (regular expression, replacement) of `table` applied to its keys, in order.

    None as a replacement leaves the entries out whose key is matched. :class:`CheckpointError` when two entries end up
    under one key.
    """
    rules = [(re.compile(pattern), replacement) for pattern, replacement in table]
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        new = _renamed(key, rules)
        if new is None:
            continue
        if new in renamed:
            raise CheckpointError(describe(f"checkpoint {name}", f"one entry for {new}", f"a second one, {key}"))
        renamed[new] = value
    return renamed


def length(value: Tensor, axis: int = 0) -> int:
    """Of a tensor along an axis, for sizes read off a file; 1 where there is nothing, which strict loading refuses."""
    return max(1, value.shape[axis]) if -value.ndim <= axis < value.ndim else 1


@contextlib.contextmanager
def configured(name: str | os.PathLike[str]) -> Iterator[None]:
    """A configuration that cannot be built, of sizes read off the file `name`, is a :class:`CheckpointError`."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {name}: {error}") from error


def read_transformers(
    folder: str | os.PathLike[str], prefixes: tuple[str, ...] = ("",)
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a folder as Transformers saves models; only the keys that start with `prefixes`.

    Safetensors or ``.bin``, whole or in shards. :class:`CheckpointError` where a file is missing or damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "a Transformers model's configuration")
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{weights}.index.json"
        if index.is_file():
            table = read_json(index, "an index of shards").get("weight_map")
            if not isinstance(table, dict):
                raise CheckpointError(describe(str(index), "a 'weight_map'", "none"))
            files = sorted({file for key, file in table.items() if key.startswith(prefixes)})
        elif (folder / weights).is_file():
            files = [weights]
        else:
            continue
        state: dict[str, Tensor] = {}
        for file in files:
            part = state_dict_of(read_published(folder / file), prefixes=(), name=folder / file)
            state |= {key: value for key, value in part.items() if key.startswith(prefixes)}
        return config, state
    raise CheckpointError(describe(f"model {folder}", "model.safetensors or pytorch_model.bin", "neither"))


class FrontEnd(Protocol):
    """The fields of an encoder's configuration that its STFT and mel matrix follow from."""

    sample_rate: int
    n_fft: int
    n_mels: int
    fmin: float
    fmax: float


def check_front_end(state: Mapping[str, Tensor], config: FrontEnd, name: str | os.PathLike[str]) -> None:
    """:class:`CheckpointError` when STFT kernels or mel matrix in the file `name` are not those of `config`."""
    bins = config.n_fft // 2 + 1
    angle = 2 * math.pi * torch.outer(torch.arange(bins), torch.arange(config.n_fft)).double() / config.n_fft
    window = features.hann(config.n_fft)
    bank = features.mel_bank(config.sample_rate, config.n_fft, config.n_mels, config.fmin, config.fmax)
    expected = {
        KERNELS[0]: (angle.cos() * window).float()[:, None],  # (bins, 1, n_fft)
        KERNELS[1]: (-angle.sin() * window).float()[:, None],
        MEL_MATRIX: bank,  # (bins, mels)
    }
    for key, value in expected.items():
        if key not in state:
            continue
        found = state[key]
        if found.shape != value.shape or not torch.allclose(found, value, rtol=0, atol=_FRONT_END_TOLERANCE):
            difference = f"up to {float((found - value).abs().max()):.2g}" if found.shape == value.shape else "shape"
            setting = f"{config.sample_rate} Hz, n_fft {config.n_fft}, {config.n_mels} mels"
            cure = "Give the configuration the file was trained with."
            raise CheckpointError(
                describe(f"checkpoint {name}: {key}", f"the front end of {setting}", f"another ({difference})", cure)
            )


def read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = files.read_json(path)
    except OSError as error:
        raise CheckpointError(describe(str(path), kind, error.strerror or str(error))) from error
    except ValueError as error:
        raise CheckpointError(describe(str(path), kind, f"no valid JSON ({_first_line(error)})")) from error
    if not isinstance(content, dict):
        raise CheckpointError(describe(str(path), kind, f"a JSON {type(content).__name__}"))
    return content


def _renamed(key: str, rules: Iterable[tuple[re.Pattern[str], str | None]]) -> str | None:
    for pattern, replacement in rules:
        if replacement is None and pattern.search(key):
            return None
        if replacement is not None:
            key = pattern.sub(replacement, key)
    return key


def listed(keys: Iterable[str], limit: int = 4) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "(none)"


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tree: dict[str, Any] = {"model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
            tree["metadata"] = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        expected, cure = "a whole safetensors file", "Copy or download it again."
        raise CheckpointError(describe(f"checkpoint {path}", expected, _first_line(error), cure)) from error
    beside = next((p for p in (path.with_suffix(".json"), path.with_name("config.json")) if p.is_file()), None)
    if beside:
        tree["cfg"] = read_json(beside, "the configuration of the weights beside it")
    return tree


def _read_pickle(path: Path, head: bytes) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and archives; what comes of them is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many kinds for a damaged or an unsafe file, OSError among them
        reason = error.__context__ or error  # torch wraps it in paragraphs that advise unsafe loading
        refused = _REFUSED.search(str(reason))
        cure: str | None = "Copy or download it again."
        if refused:
            found = f"a pickle that calls {refused[1]}, which could run code"
            cure = "It was not loaded. Ask its author for the weights alone."
        elif foreign := _foreign_archive(path):
            found, cure = foreign, "Ask its author for the weights alone."
        elif head.startswith((b"PK\x03\x04", b"\x80\x02")):
            found = f"a damaged or cut file ({_first_line(reason)})"
        elif head.startswith(b"\x80"):
            found, cure = "a pickle that torch.save did not write", "Ask its author for the weights alone."
        else:
            found = f"a file of another kind ({path.stat().st_size} bytes that start with {head!r})"
        raise CheckpointError(describe(f"checkpoint {path}", "a PyTorch checkpoint of tensors", found, cure)) from error


def _foreign_archive(path: Path) -> str | None:
    """What a whole zip archive is that torch.save did not write; None for its own, damaged ones and other files."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        inside = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in inside:
        return "a TorchScript archive, which holds code"
    return None if "data.pkl" in inside else "a zip archive that torch.save did not write"


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    sentence = line.split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {sentence[:120]}" if sentence else type(error).__name__
