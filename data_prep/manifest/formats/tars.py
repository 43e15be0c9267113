"""WebDataset tars of others: sounds with ``json``, ``txt`` or ``cls`` members; and the published shards of AudSem."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from audio_llm.datasets.records import Record, as_text
from audio_llm.errors import AudioLLMError, DataError, ShardError
from audio_llm.files import parse_json
from audio_llm.language.groups import read_elements, unified
from audio_llm.language.replies import strip_letters
from audio_llm.shards.index import AUDIO_SUFFIXES, Scan, further_members, scan_members, shard_paths
from data_prep.manifest.formats.base import Format, Place, check_once
from data_prep.manifest.rows import Reason, Reject, RowError
from data_prep.manifest.sounds import Part

WORDS = ("json", "txt", "cls", "text", "caption")
MAX_WORDS = 2**24  # bytes of a member of words


def _tars(place: Place) -> Iterator[Record | Reject]:
    """A row a key: the fields of its ``json``, its other words under their endings, its sound as ``audio``."""
    try:
        paths = [place.path] if place.path.is_file() else shard_paths(place.path)
    except ShardError as error:
        raise DataError(str(error)) from error
    for path in paths:
        yield from _rows(path, place.path.is_dir() and len(paths) > 1)


def _rows(path: Path, several: bool) -> Iterator[Record | Reject]:
    scan, members = Scan(), dict[str, dict[str, tuple[int, int]]]()
    with open(path, "rb") as stream:
        cut = scan_members(stream, members, scan, path.name)
        for reject in scan.rejects:
            yield Reject(f"{path.name}: {reject.key}", Reason.BROKEN_ROW, reject.reason)
        for key, parts in members.items():
            where = f"{path.name}: {key}"
            try:
                values = _words(stream, parts)
            except AudioLLMError as error:
                yield Reject.of(where, error)
                continue
            ending = next((ending for ending in AUDIO_SUFFIXES if ending in parts), None)
            if ending is not None:
                further = further_members(parts)
                if further is None:
                    expected, found = "one sound, and audio1, audio2, … once each", ", ".join(sorted(parts))
                    yield Reject(where, Reason.BROKEN_ROW, f"expected {expected}, found {found}.")
                    continue
                sounds = [Part(path, *parts[ending], f"{path.name}: {key}.{ending}")]
                sounds += [Part(path, *part, f"{path.name}: {key}.audio{n}") for n, part in enumerate(further, 1)]
                values["audio"] = sounds if further else sounds[0]
            # Keys may be numbers that begin anew in every tar.
            yield Record({"id": f"{path.stem}_{key}" if several else key} | values, where)
    if cut:
        yield Reject(path.name, Reason.TORN, f"expected a whole tar, found one {cut}.")


def _words(stream: Any, parts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for ending in WORDS:
        if ending not in parts:
            continue
        offset, size = parts[ending]
        if size > MAX_WORDS:
            raise RowError(Reason.NOT_TEXT, f"{ending}: expected at most {MAX_WORDS} bytes, found {size}.")
        stream.seek(offset)
        try:
            text = as_text(stream.read(size), ending)
            tree = parse_json(text, once=True) if ending == "json" else {ending: text.strip()}
        except DataError as error:
            raise RowError(Reason.NOT_TEXT, str(error)) from error
        except ValueError as error:
            raise RowError(Reason.NOT_TEXT, f"{ending}: {error}.") from error
        if not isinstance(tree, dict):
            raise RowError(Reason.BROKEN_ROW, f"json: expected an object, found {type(tree).__name__}.")
        check_once(values, tree, f"json and {ending}")
        values |= tree
    return values


# ------------------------------------------------------------------------------------------------ AudSem

# The options stand in the question, a line each, under a line of their own.
_OPTIONS = re.compile(
    r"^(?P<question>.*?)\n(?:Choices:|[^\n]*choose[^\n]*)\n(?P<options>(?:[A-Z]\. [^\n]*(?:\n|$))+)", re.S
)


def _audsem(place: Place) -> Iterator[Record | Reject]:
    """The published shards: a caption is the answer of captioning ones, options are taken out of the question."""
    for row in _tars(place):
        if isinstance(row, Reject):
            yield row
            continue
        values = dict(row.values)
        if "answer" not in values and "caption" in values:
            values["answer"] = values["caption"]
        if isinstance(values.get("semantic_elements"), str):
            values["semantic_elements"] = unified(read_elements(values["semantic_elements"]))
        if match := _OPTIONS.match(str(values.get("question", ""))):
            options = [line.strip() for line in match["options"].splitlines() if line.strip()]
            values |= {"question": match["question"].strip(), "choices": list(strip_letters(options))}
        values["group"] = _video(str(values.get("file_name") or values["id"]))
        yield Record(values, row.where)


def _video(name: str) -> str:
    """The video that a clip is cut from: ``tar/ID (start-end)``."""
    return re.sub(r"\s*\([^()]*\).*$", "", name.rpartition("/")[2]) or name


FORMAT = (Format("webdataset", _tars), Format("audsem", _audsem, {"group": "group"}, answer_as="key"))
