"""The build backend (PEP 517): setuptools, but a wheel holds `eval` and `data_prep` under names that nobody else uses.

At the top of the repository the two folders have the names that people look for. Installed beside other packages, such
names would meet others'. So a wheel is built from a copy of the sources in which both are renamed, with every import,
entry point and dotted name that leads into them. An editable installation and the source archive stay as the repository
is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # hooks that are setuptools' own
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The folder in the repository, the package in a wheel.
INSTALLED = {"eval": "audio_llm_eval", "data_prep": "audio_llm_data_prep"}
FOLDERS = "|".join(INSTALLED)
IMPORT = re.compile(rf"^(\s*(?:from|import) )({FOLDERS})\b", re.MULTILINE)
DOTTED = re.compile(rf"(?<![\w./-])({FOLDERS})\.([A-Za-z_]\w*)")
TABLES = re.compile(rf"^({FOLDERS})(?= = \[)|(?<=\")({FOLDERS})(?=\*?\"[,\]])", re.MULTILINE)


def renamed(text: str, root: Path) -> str:
    """`text` of a file with the names of a wheel; a dotted name is one where `root` has such a module."""

    def dotted(found: re.Match[str]) -> str:
        module = root / found[1] / found[2]
        known = module.is_dir() or module.with_suffix(".py").is_file()
        return f"{INSTALLED[found[1]]}.{found[2]}" if known else found[0]

    return IMPORT.sub(lambda found: found[1] + INSTALLED[found[2]], DOTTED.sub(dotted, text))


@contextlib.contextmanager
def sources() -> Iterator[None]:
    """The working directory is a copy of the sources as a wheel has them."""
    root = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="audio-llm-wheel-") as folder:
        copy = Path(folder)
        for name in ("README.md", "LICENSE"):
            shutil.copy(root / name, copy)
        for room in ("audio_llm", *INSTALLED):
            to = copy / INSTALLED.get(room, room)
            shutil.copytree(root / room, to, ignore=shutil.ignore_patterns("__pycache__"))
            for path in to.rglob("*.py"):
                path.write_text(renamed(path.read_text(encoding="utf-8"), root), encoding="utf-8")
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
        project = TABLES.sub(lambda found: INSTALLED[found[0]], renamed(project, root))
        (copy / "pyproject.toml").write_text(project, encoding="utf-8")
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(root)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """The wheel's file name in `wheel_directory`."""
    to, metadata = os.path.abspath(wheel_directory), metadata_directory and os.path.abspath(metadata_directory)
    with sources():
        return build_meta.build_wheel(to, config_settings, metadata)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """The name of the folder of metadata in `metadata_directory`."""
    to = os.path.abspath(metadata_directory)
    with sources():
        return build_meta.prepare_metadata_for_build_wheel(to, config_settings)
