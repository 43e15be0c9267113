"""What the sounds of a benchmark are, beyond what its rows say: the same as another benchmark's, or unlike the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from audio_llm.audio import read_header
from audio_llm.datasets.dcase_aqa import content_names
from audio_llm.datasets.folders import files_below
from audio_llm.datasets.records import Cell
from audio_llm.errors import AudioError, describe
from eval.benchmarks.base import BenchmarkError

ALSO_IN = "also_in"  # the key of an item's `meta` that has the names of other folders with its sound


def also_in(sounds: Sequence[Path | Cell | None], folders: Sequence[Path]) -> list[list[str]]:
    """For each sound the files below `folders` that have the same bytes, as ``FOLDER/NAME``, sorted. The same recording
    in another format, or cut, is not found. Raises :class:`BenchmarkError` for a folder without files."""
    files: dict[Path, str] = {}
    for folder in folders:
        found = files_below(folder)
        if not found:
            raise BenchmarkError(describe(f"option also={folder}", "a folder of another benchmark's audio", "no files"))
        files |= {file: f"{folder.name}/{file.relative_to(folder)}" for file in found if file.is_file()}
    names = content_names([*files, *(sound for sound in sounds if sound is not None)])
    places: dict[str, list[str]] = defaultdict(list)
    for file, told in files.items():
        places[names[file]].append(told)
    own = {sound: names[sound] for sound in sounds if sound is not None}
    return [sorted(places.get(own[sound], [])) if sound is not None else [] for sound in sounds]


def unlike_most(sounds: Sequence[Path | Cell | None]) -> Counter[str]:
    """How many of the files have another number of channels or sample rate than most, by what they have. Files that
    cannot be read, which their row tells, and sounds inside Parquet, which are not read for it, are left out."""
    found = Counter[tuple[int, int]]()
    for sound in sounds:
        if isinstance(sound, Path):
            try:
                header = read_header(sound)
            except AudioError:
                continue
            found[header.channels, header.samplerate] += 1
    most = found.most_common(1)[0][0] if found else None
    return Counter(
        {
            f"sound unlike most, of {channels} channel{'s' * (channels != 1)} at {rate} Hz": count
            for (channels, rate), count in found.items()
            if (channels, rate) != most
        }
    )
