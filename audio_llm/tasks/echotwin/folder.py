"""EchoTwin-QA on disk: our folder, and the original's ``best.pt`` read with its towers' own configurations beside it.

A folder has ``config.json``, ``model.safetensors`` (both towers and the head, the original's keys) and ``text/``, the
text tower's configuration and tokenizer as Transformers saves them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from audio_llm.encoders.beats import BEATs
from audio_llm.encoders.published import read_json, read_published, rename, state_dict_of
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.files import atomic_file, write_json
from audio_llm.model.encoder import build_encoder, encoder_config
from audio_llm.model.folder import load_strictly, part_of
from audio_llm.model.loading import reading, whole_model
from audio_llm.tasks.echotwin.model import EchoTwin, EchoTwinConfig, config_of

CONFIG, WEIGHTS, TEXT = "config.json", "model.safetensors", "text"
VERSION = 1
ANCHOR = "fusion.2.weight"
# Files written before Transformers 4.31 hold the positions' numbers as a buffer.
RENAMES = ((r"\.embeddings\.position_ids$", None),)


def open_text(folder: str | Path, weights: bool = True) -> tuple[Any, Any]:
    """The text tower (evaluation mode) and tokenizer of a local Transformers folder; without `weights`, its shape.

    Raises :class:`CheckpointError` for a folder that Transformers cannot load. Nothing is ever downloaded.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(describe(f"text tower {folder}", "a Transformers folder", "no config.json in it"))
    item, expected = f"text tower {folder}", "a Transformers encoder"
    with reading(item, expected):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not weights:
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    if weights:
        model = whole_model(AutoModel, folder, item, expected, local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise CheckpointError(describe(f"text tower {folder}", "a tokenizer that pads", "no padding token"))
    return model.float().eval(), tokenizer


def save_echotwin(folder: str | Path, model: EchoTwin, tokenizer: Any) -> Path:
    """Write a folder; the weights come last, so that one which has them is whole."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / TEXT)
    model.text_enc.config.save_pretrained(folder / TEXT)  # type: ignore[union-attr, operator]
    config = {
        "version": VERSION,
        "echotwin": dataclasses.asdict(model.config),
        "encoder": encoder_config(model.audio_enc),
    }
    write_json(folder / CONFIG, config)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    return folder


def load_echotwin(folder: str | Path) -> tuple[EchoTwin, Any]:
    """Model (evaluation mode) and tokenizer of a folder. Strict: every key must fit."""
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        cure = "Train one: audio-llm train recipes/echotwin/options.yaml."
        raise CheckpointError(describe(f"EchoTwin folder {folder}", f"a file {WEIGHTS}", "none", cure))
    tree = read_json(folder / CONFIG, "the configuration of an EchoTwin model")
    parts = [tree.get("echotwin"), tree.get("encoder")]
    if tree.get("version") != VERSION or not all(isinstance(part, dict) for part in parts):
        found = json.dumps(tree)[:80]
        raise CheckpointError(describe(f"EchoTwin folder {folder}", f"a configuration of version {VERSION}", found))
    text_enc, tokenizer = open_text(folder / TEXT, weights=False)
    try:
        model = EchoTwin(config_of(tree["echotwin"]), build_encoder(tree["encoder"]), text_enc)
    except ConfigError as error:
        raise CheckpointError(f"EchoTwin folder {folder}: {error}") from error
    load_strictly(model, state_dict_of(read_published(folder / WEIGHTS), prefixes=()), f"{folder}/{WEIGHTS}")
    return model.eval(), tokenizer


def load_original(path: str | Path, beats: str | Path, text: str | Path) -> tuple[EchoTwin, Any]:
    """Model (evaluation mode) and tokenizer of an original ``best.pt`` or ``last.pt``, with its own conventions.

    The file has no configuration: `beats` is the BEATs checkpoint it was trained with and `text` the text tower's
    folder. The number of letters is read off the head. Raises :class:`CheckpointError` for every key that does not fit.
    """
    state = rename(state_dict_of(read_published(path), name=path), RENAMES, name=path)
    if ANCHOR not in state or state[ANCHOR].ndim != 2:
        found = ", ".join(sorted(state)[:4])
        raise CheckpointError(describe(f"checkpoint {path}", f"EchoTwin's head ({ANCHOR})", f"the keys {found}"))
    sizes = dataclasses.asdict(BEATs.load_published(beats).encoder.config)
    encoder = BEATs.load_published(path, **sizes).encoder
    text_enc, tokenizer = open_text(text, weights=False)
    load_strictly(text_enc, part_of(state, "text_enc"), f"{path} (text_enc)")
    config = EchoTwinConfig(head="letters", num_letters=len(state[ANCHOR]), columns=False, conventions="original")
    model = EchoTwin(config, encoder, text_enc)
    load_strictly(model.fusion, part_of(state, "fusion"), f"{path} (fusion)")
    return model.eval(), tokenizer
