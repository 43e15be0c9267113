"""Shards as tables of others: CSV, JSON lines or chat rows with sounds beside them, or Parquet with sounds in it.

Beside the table lies ``recipe.yaml``, by which ``audio-llm prep`` makes the same samples of it again.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import TWO_CHANNELS, encode
from audio_llm.errors import DataError, describe, require
from audio_llm.files import atomic_folder, write_atomically, write_lines
from audio_llm.language.prompts import question_text, target_text
from audio_llm.shards.index import LAYOUTS
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.rendering import is_recipe
from audio_llm.shards.schema import Sample
from audio_llm.yaml_text import yaml_of

AUDIO_MARK = "<audio>"  # what stands for a sound in the text of a chat row
_STARTS = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}
# Keys of meta that sides and scores go by; a manifest makes its own, and `keep` cannot name them.
OWN_META = ("question_type", "format", "recordings", "counterfactual", "sound")
_BATCH = 256  # rows of Parquet whose sounds are in memory at a time

Row = dict[str, Any]
Sounds = Iterator[list[bytes]]  # of each row


def write_tables(folders: Sequence[Path], out: Path, form: str) -> int:
    """Write the samples of shard folders into a new folder `out` in one of :data:`FORMS`; how many there are.

    Raises :class:`DataError` for a sample without a question or an answer, and for an id that occurs twice.
    """
    dataset = ShardDataset(folders)
    samples = [dataset.load_sample(number) for number in range(len(dataset))]
    names: set[str] = set()
    for sample in samples:
        if sample.question is None or sample.answer is None:
            raise DataError(describe(f"sample '{sample.id}'", "a question and an answer", "none"))
        if sample.id in names:
            raise DataError(describe(f"sample '{sample.id}'", "an id that occurs once", "a second one"))
        names.add(sample.id)
    licences = {(sample.source and sample.source.licence) or None for sample in samples}
    rows = [_row(sample, one_licence=len(licences) == 1) for sample in samples]
    kept = list(dict.fromkeys(name for row in rows for name in row if name not in _COLUMNS))
    with atomic_folder(out) as folder:
        floats = False

        def heard() -> Sounds:
            nonlocal floats
            for number in range(len(dataset)):
                members = _sounds(dataset, number)
                floats |= any(data.startswith(b"RIFF") for data in members)
                yield members

        sounds = heard()
        keys = FORMS[form](folder, rows, sounds)
        most = max((len(sample.audio) for sample in samples), default=1)
        corpora = {sample.source.dataset for sample in samples if sample.source}
        splits = {str(row["split"]): [str(row["split"])] for row in rows}
        layouts = {LAYOUTS[place] for index in dataset.indexes for place in np.unique(index.formats[1]) if place >= 0}
        if layouts >= set(TWO_CHANNELS):
            raise DataError(
                describe("shards", "two channels of one meaning", "stereo and binaural", "Write them apart.")
            )
        recipe = {
            "verb": "prep",
            "kind": "manifest",
            "corpus": corpora.pop() if len(corpora) == 1 else "corpora",
            **keys,
            **({"keep": kept} if kept else {}),
            **({"licence": licence} if (licence := licences.pop()) and not licences else {}),
            "path": str(out / keys["path"]),
            "splits": splits,
            "audio": {
                "max_seconds": 600.0,
                "min_seconds": 0.0,
                "min_peak": 0.0,
                "two_channels": "binaural" if "binaural" in layouts else "stereo",
            }
            | ({"max_sounds": most} if most > 1 else {})
            | ({"store": "float"} if floats else {}),  # to nothing but what they are
        }
        write_atomically(folder / "recipe.yaml", yaml_of(recipe))
    return len(rows)


def _sounds(dataset: ShardDataset, number: int) -> list[bytes]:
    """The sounds of a sample as they are stored, or as they are rendered, in 32 bits."""
    stored = dataset.load_audio_bytes(number)
    if not any(map(is_recipe, stored)):
        return stored
    return [encode(waveform, "wav", "FLOAT") for waveform in dataset.load_waveforms(number)]


# What every row has; the others are kept of a sample's meta.
_COLUMNS = (
    *("id", "question", "choices", "answer", "thinking", "semantic_elements"),
    *("events", "kind", "group", "split", "places"),
)


def _row(sample: Sample, *, one_licence: bool) -> Row:
    """The columns of a table, by the names that a manifest has for them, and what else there is in a sample's meta."""
    source, recordings = sample.source, sample.meta.get("recordings")
    several = isinstance(recordings, list) and len(recordings) > 1 and len(sample.audio) > 1
    row: Row = {
        "id": sample.id,
        "question": sample.question,
        "choices": sample.choices,
        "answer": sample.answer,
        "thinking": sample.thinking,
        "semantic_elements": sample.semantic_elements,
        "events": [_there(dataclasses.asdict(event)) for event in sample.events],
        "kind": sample.meta.get("question_type"),
        "group": recordings if several else (source and source.clip) or sample.id,
        "split": (source and source.split) or "train",
    }
    kept = {} if one_licence else {"licence": source and source.licence}
    kept |= {name: value for name, value in sample.meta.items() if name not in (*OWN_META, *row, "audio", "places")}
    return row | ({"places": sample.places} if sample.places else {}) | _there(kept)


def _there(tree: Mapping[str, Any]) -> Row:
    return {name: value for name, value in tree.items() if value not in (None, "", [], {})}


def _files(folder: Path, rows: Sequence[Row], sounds: Sounds) -> Iterator[list[str]]:
    """Write the sounds of each row as they are stored; their paths below `folder`."""
    (folder / "audio").mkdir()
    for row, members in zip(rows, sounds, strict=True):
        names = [f"audio/{name}" for name in _names(row, members)]
        for name, data in zip(names, members, strict=True):
            (folder / name).write_bytes(data)
        yield names


def _names(row: Row, members: Sequence[bytes]) -> Iterator[str]:
    for number, data in enumerate(members):
        yield f"{row['id']}{f'.audio{number}' if number else ''}.{_STARTS.get(data[:4], 'mp3')}"


def _one(values: Sequence[Any]) -> Any:
    """A list of several, or the only one."""
    return list(values) if len(values) > 1 else values[0]


def _numbered(name: str, values: Iterable[Any]) -> tuple[list[str], list[list[Any]]]:
    """A column for each of the most values that a row has under `name`: their names, and the cells of every row."""
    listed = [value if isinstance(value, list) else [value] for value in values]
    widest = max(map(len, listed), default=1)
    names = [name if number == 0 else f"{name}_{number + 1}" for number in range(widest)]
    return names, [[*row, *[None] * (widest - len(row))] for row in listed]


def _csv(folder: Path, rows: Sequence[Row], sounds: Sounds) -> Row:
    """A column for each choice, sound and group; other lists and mappings are JSON."""
    widest = max((len(row["choices"]) for row in rows), default=0)
    choices = [f"choice_{number + 1}" for number in range(widest)]
    audio, files = _numbered("audio", _files(folder, rows, sounds))
    group, groups = _numbered("group", (row["group"] for row in rows))
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("choices", "group")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*audio, *names, *group, *choices])
    for row, heard, grouped in zip(rows, files, groups, strict=True):
        values = [row.get(name) for name in names]
        cells = [v if v in (None, [], {}) or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        offered = [*row["choices"], *[""] * (widest - len(row["choices"]))]
        line = [*heard, *cells, *grouped, *offered]
        table.writerow(["" if cell in (None, [], {}) else cell for cell in line])
    write_atomically(folder / "rows.csv", text.getvalue())
    columns: Row = {"group": _one(group), "split": "split"} | ({"choices": choices} if len(choices) > 1 else {})
    columns |= {"audio": audio} if len(audio) > 1 else {}
    return {"format": "csv", "path": "rows.csv", "columns": columns}


def _jsonl(folder: Path, rows: Sequence[Row], sounds: Sounds) -> Row:
    files = _files(folder, rows, sounds)
    write_lines(
        folder / "rows.jsonl", ({"audio": _one(names)} | _there(row) for row, names in zip(rows, files, strict=True))
    )
    return {"format": "jsonl", "path": "rows.jsonl", "columns": {"group": "group", "split": "split"}}


def _chat(folder: Path, rows: Sequence[Row], sounds: Sounds) -> Row:
    """ms-swift's rows: ``messages``, ``audios``; the other columns stay beside them."""
    lines = []
    for row, files in zip(rows, _files(folder, rows, sounds), strict=True):
        names = ("id", "kind", "question", "choices", "answer", "thinking", "semantic_elements")
        taught: Any = Sample(*(row[name] for name in names))  # every one has a question and an answer
        messages = [
            {"role": "user", "content": _marked(row, len(files))},
            {"role": "assistant", "content": target_text(taught, "think_semantics")},
        ]
        told = ("question", "answer", "thinking", "semantic_elements", "places")
        others = {name: value for name, value in row.items() if name not in told}
        lines.append({"messages": messages, "audios": files} | _there(others))
    write_lines(folder / "rows.jsonl", lines)
    return {"format": "chat", "path": "rows.jsonl", "columns": {"group": "group", "split": "split"}}


def _marked(row: Row, sounds: int) -> str:
    """What the user says, a mark where each sound stands."""
    text, done, parts = question_text(row["question"], row["choices"]), 0, []
    for place in row.get("places") or [0] * sounds:
        parts += [text[done:place], AUDIO_MARK]
        done = place
    return "".join([*parts, text[done:]])


def _parquet(folder: Path, rows: Sequence[Row], sounds: Sounds) -> Row:
    """The sounds in a column as Hugging Face ``datasets`` reads them: ``{bytes, path}``."""
    require("pyarrow", "Writing Parquet", "train")
    import pyarrow as arrow
    from pyarrow import parquet

    text = arrow.string()
    listed = {"choices": arrow.list_(text)}
    schema = arrow.schema(
        [("audio", arrow.struct([("bytes", arrow.binary()), ("path", text)]))]
        + [(name, listed.get(name, text)) for name in dict.fromkeys(name for row in rows for name in row)]
    )
    with parquet.ParquetWriter(folder / "rows.parquet", schema) as writer:
        for start in range(0, len(rows), _BATCH):
            batch = []
            for row in rows[start : start + _BATCH]:
                data, *others = next(sounds)
                if others:
                    found = f"{1 + len(others)}"
                    raise DataError(describe(f"sample '{row['id']}'", "one sound", found, "Write csv, jsonl or chat."))
                cell = {"bytes": data, "path": f"{row['id']}.{_STARTS.get(data[:4], 'mp3')}"}
                cells = {
                    name: value if isinstance(value, str) or name in listed else json.dumps(value, ensure_ascii=False)
                    for name, value in row.items()
                    if value not in (None, "", [], {})
                }
                batch.append({"audio": cell} | cells)
            writer.write_table(arrow.Table.from_pylist(batch, schema))
    return {"format": "parquet", "path": "rows.parquet", "columns": {"group": "group", "split": "split"}}


FORMS: dict[str, Callable[[Path, Sequence[Row], Sounds], Row]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "chat": _chat,
}
