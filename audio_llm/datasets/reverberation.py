"""Dry clips heard through measured room responses: Spatial-AST's data (Zheng et al. 2024) from its published folders.

A folder of responses has ``<split>_reverberation.json`` (where listener and source stood) and
``<layout>/<scene>/<n>.npy`` (channels, time). What is heard through them: :mod:`audio_llm.shards.rendering`.

The data come from seeds that name what they are for: a sample depends on the recipe and its own index alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.datasets.folders import SUFFIXES, find_file
from audio_llm.datasets.sounds import find, official_folds, tidy
from audio_llm.errors import AudioError, ConfigError, describe
from audio_llm.files import read_json, within
from audio_llm.shards.rendering import read_response

Array = np.ndarray
DRY_MIX_ALPHA = 10.0  # of the Beta distribution of shares where two clips are heard from one place, published


# ------------------------------------------------------------------------------------------------ room responses


@dataclass(frozen=True)
class Response:
    """A room response and where its source stands as the listener sees it: degrees (0 ahead, 90 left), metres."""

    name: str  # scene/n.npy
    path: str
    azimuth: float
    elevation: float
    distance: float

    @property
    def scene(self) -> str:
        return self.name.partition("/")[0]

    @property
    def place(self) -> tuple[float, float, float]:
        return self.azimuth, self.elevation, self.distance


def read_responses(folder: str | Path, split: str, layout: str = "binaural") -> list[Response]:
    """The responses of a split (``train`` or ``eval`` as published), in the order of its file; none is opened.

    Raises :class:`AudioError` that names the entry for a position that cannot be read, a source inside the listener's
    head, a response listed twice or one without a file.
    """
    path = Path(folder) / f"{split}_reverberation.json"
    found: dict[str, Response] = {}
    for number, row in enumerate(_data(path)):
        where = f"{path}: data[{number}]"
        name = row.get("fname")
        parts = Path(name).parts if isinstance(name, str) else ()
        if len(parts) != 2 or ".." in parts or Path(*parts).is_absolute():
            raise AudioError(describe(where, "'fname': scene/number.npy", repr(name)))
        where = f"{where} ({name})"
        sensor, source = (_position(row.get(key), f"{where}: {key}") for key in ("sensor_position", "source_position"))
        file = Path(folder) / layout / str(name)
        if name in found:
            raise AudioError(describe(where, "each response once", "the same one again"))
        if not file.is_file():
            cure = f"Unpack the archive again, or choose another layout than '{layout}'."
            raise AudioError(describe(where, f"a file {file}", "none", cure))
        found[str(name)] = Response(str(name), str(file), *place_of(sensor, source, where))
    if not found:
        raise AudioError(describe(str(path), "responses under 'data'", "none"))
    return list(found.values())


def place_of(
    sensor: tuple[float, float, float], source: tuple[float, float, float], where: str = "source"
) -> tuple[float, float, float]:
    """Azimuth, elevation (degrees) and distance (metres) of `source`, for a listener at `sensor` who looks along −z.

    Positions have SoundSpaces' axes, +x right, +y up. A source straight above or below is at azimuth 0, elevation ±90.
    """
    right, up, back = (b - a for a, b in zip(sensor, source, strict=True))
    distance = math.hypot(right, up, back)
    if distance == 0:
        raise AudioError(describe(where, "a source away from the listener", "both at one point"))
    level = math.hypot(right, back)
    azimuth = math.degrees(math.atan2(0.0 - right, -back)) if level else 0.0  # not −0: behind is 180, not −180
    return azimuth, math.degrees(math.atan2(up, level)), distance


def load_response(response: Response, layout: str = "binaural") -> Array:
    """:func:`~audio_llm.shards.rendering.read_response` of the file."""
    return read_response(response.path, layout)


def _data(path: Path) -> list[dict[str, Any]]:
    """The mappings under ``data``, as all of the published metadata files have them."""
    try:
        tree = read_json(path)
    except FileNotFoundError as error:
        there = ", ".join(sorted(item.name for item in path.parent.glob("*.json"))) or "no JSON file"
        raise AudioError(describe(str(path), "a metadata file", f"{there} in the folder")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AudioError(describe(str(path), "readable JSON", str(error))) from error
    data = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise AudioError(describe(str(path), "{'data': [mappings]}", type(tree).__name__))
    return data


def _position(text: Any, where: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except (AttributeError, ValueError) as error:
        raise AudioError(describe(where, "a text 'x,y,z' in metres", repr(text))) from error
    if not all(map(math.isfinite, (x, y, z))):
        raise AudioError(describe(where, "finite metres", repr(text)))
    return x, y, z


# ------------------------------------------------------------------------------------------------ dry clips


@dataclass(frozen=True)
class DryClip:
    """A clip of one or several classes, not yet opened; `recording` is the unit of splitting."""

    name: str
    path: str
    labels: tuple[str, ...]
    recording: str


def read_classes(path: str | Path) -> dict[str, str]:
    """Class names by machine identifier (``/m/…``), lower case, in order of rows: the class number is the row.

    The published CSV does not quote names with commas, so a row is split at its first two commas only.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AudioError(describe(str(path), "a CSV of classes", f"none that can be read ({error})")) from error
    if not lines or lines[0].lower().split(",") != ["index", "mid", "display_name"]:
        raise AudioError(describe(str(path), "the header index,mid,display_name", repr(lines[0] if lines else "")))
    classes: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        row = line.split(",", 2)
        if len(row) != 3 or not row[2].strip(' "') or row[1] in classes:
            raise AudioError(describe(f"{path}: line {number}", "index,mid,display_name, each mid once", repr(line)))
        name = row[2].strip()
        if len(name) > 1 and name[0] == name[-1] == '"':
            name = name[1:-1].replace('""', '"')
        classes[row[1].strip()] = name.lower()
    return classes


def read_audioset(
    metadata: str | Path, classes: Mapping[str, str], root: str | Path
) -> tuple[list[DryClip], list[dict[str, str]]]:
    """Clips of an AudioSet-style JSON (``{"data": [{"id", "folder", "label": [mids]}]}``), and what was left out.

    Files are ``root/folder/id.wav``, or of another format. A clip without a file or with a label that has no class is
    left out with its reason; a row that cannot be read is an :class:`AudioError`.
    """
    clips, rejects, seen = [], [], set()
    for number, row in enumerate(_data(Path(metadata))):
        where = f"{metadata}: data[{number}]"
        name, folder, mids = row.get("id"), row.get("folder", ""), row.get("label")
        if not isinstance(name, str) or not name or not isinstance(folder, str):
            raise AudioError(describe(where, "texts 'id' and 'folder'", f"{name!r} and {folder!r}"))
        if not isinstance(mids, list) or not mids or not all(isinstance(mid, str) for mid in mids):
            raise AudioError(describe(f"{where} ({name})", "'label': a list of identifiers", repr(mids)))
        inside = within(root, f"{folder}/{name}" if folder else name)
        path = find_file(inside.parent, name if Path(name).suffix.lower() in SUFFIXES else f"{name}.wav")
        unknown = [mid for mid in mids if mid not in classes]
        if unknown or not path.is_file() or name in seen:
            reason = f"no class '{unknown[0]}'" if unknown else "listed twice" if name in seen else f"no file {path}"
            rejects.append({"item": name, "reason": reason})
            continue
        seen.add(name)
        clips.append(DryClip(name, str(path), tuple(dict.fromkeys(classes[mid] for mid in mids)), name))
    return clips, rejects


def read_sounds(folder: str | Path, folds: Sequence[str] | None = None) -> tuple[list[DryClip], str]:
    """Clips of a labelled sound folder (of its official `folds`, if given), and the corpus's name."""
    library = find(folder)
    clips = library.clips
    if folds is not None:
        official = official_folds(library)
        unknown = [fold for fold in folds if fold not in official]
        if unknown:
            raise ConfigError(describe(f"folds of {folder}", ", ".join(official), f"'{unknown[0]}'"))
        clips = [clip for fold in folds for clip in official[fold]]
    return [DryClip(clip.name, str(clip.path), (tidy(clip.label),), clip.recording) for clip in clips], library.dataset


def pair_partners(responses: Sequence[Response]) -> dict[str, list[Response]]:
    """Responses by scene, of scenes with at least two places: what the two sources of one scene are drawn from."""
    scenes: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        scenes[response.scene].append(response)
    return {name: found for name, found in scenes.items() if len({response.place for response in found}) > 1}
