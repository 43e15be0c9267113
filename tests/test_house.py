"""The house rules of docs/architecture.md, kept by reading the source: who may import whom, and what stays out."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("audio_llm", "data_prep", "eval")

# The rows of the table in docs/architecture.md, first to last: a module imports its own row and earlier ones.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "config", "files", "records"),
    ("audio",),
    ("features",),
    ("encoders",),
    ("heads", "seld"),
    ("qformer",),
    ("prompts", "denials"),
    ("configuration", "processing", "modeling"),
    ("shards",),
    ("sounds", "dcase_aqa", "dcase_seld", "mirroring"),
    ("echotwin",),
    ("reverberation",),
    ("checkpoints",),
    ("training",),
    ("vllm",),
    ("asking",),
    ("predicting", "locating"),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
# `audio_llm` itself registers the model with Transformers when asked to; __main__ is the command line.
OPEN = {"__init__", "__main__"}


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control or about to be; every file of the rooms where there is no git."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        folders = [ROOT / name for name in (*ROOMS, "recipes", "scripts", "tests", "docs", "benchmarks")]
        return tuple(path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple(ROOT / name for name in names if (ROOT / name).is_file())


def sources(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions included; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def importers(package: str, folders: tuple[str, ...]) -> list[str]:
    return [
        where(path, line)
        for path in sources(*folders)
        for line, module in imports(path)
        if module == package or module.startswith(f"{package}.")
    ]


def test_rooms_import_one_way() -> None:
    allowed = {"audio_llm": {"audio_llm"}, "data_prep": {"audio_llm", "data_prep"}, "eval": {"audio_llm", "eval"}}
    upward = {"recipes", "scripts", "tests", "benchmarks"}
    wrong = [
        f"{where(path, line)} imports {module}"
        for room in ROOMS
        for path in sources(room)
        for line, module in imports(path)
        if module.split(".")[0] in (set(ROOMS) | upward) - allowed[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_rows_of_audio_llm_import_earlier_rows_only() -> None:
    wrong = []
    for path in sources("audio_llm"):
        row = path.relative_to(ROOT / "audio_llm").with_suffix("").parts[0]
        if row in OPEN:
            continue
        assert row in RANK, f"{path.relative_to(ROOT)} has no row in docs/architecture.md"
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "audio_llm" and len(parts) > 1 and parts[1] in RANK and RANK[parts[1]] > RANK[row]:
                wrong.append(f"{where(path, line)} ({row}) imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_row_is_in_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    absent = [name for name in RANK if not re.search(rf"\b{name}\b", text)]
    assert not absent


def test_only_the_vllm_room_imports_vllm() -> None:
    inside = str(Path("audio_llm") / "vllm")
    assert not [place for place in importers("vllm", ROOMS) if not place.startswith(inside)]


@pytest.mark.parametrize(
    ("package", "folders"),
    [
        ("torchaudio", (*ROOMS, "tests", "benchmarks")),  # its CPU wheels break beside a CPU torch
        ("librosa", ("audio_llm",)),  # the oracle of the tests, so never the thing tested
        ("pyroomacoustics", ("audio_llm", "eval")),  # scenes are data_prep's
    ],
)
def test_packages_that_stay_out(package: str, folders: tuple[str, ...]) -> None:
    assert importers(package, folders) == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    top_level = {
        alias
        for path in sources("audio_llm")
        if path.parent.name == "audio_llm" and path.stem in OPEN
        for node in tree(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert not {name.split(".")[0] for name in top_level} - {"__future__", "sys", "audio_llm", "typing"}


# Files through which waveforms of shape (channels, time) or (batch, channels, time) pass.
AUDIO_PATHS = ("audio_llm/processing.py", "audio_llm/shards", "audio_llm/vllm/media.py", "audio_llm/vllm/plugin.py",
               "audio_llm/audio.py")  # fmt: skip
MIXES_BY_NAME = {"downmix"}  # the functions of audio.py a caller has to name


def channel_averages(path: Path) -> Iterator[int]:
    """Lines of ``x.mean(0)``, ``np.mean(x, axis=0)`` and their negative-axis kin outside functions named for mixing."""
    inside = {
        id(node)
        for function in ast.walk(tree(path))
        if isinstance(function, ast.FunctionDef) and function.name in MIXES_BY_NAME
        for node in ast.walk(function)
    }
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call) or id(node) in inside:
            continue
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("mean", "average", "nanmean"):
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("axis", "dim"))]
        axes = [ast.unparse(value) for value in values]
        if {"0", "-2"} & set(axes):
            yield node.lineno


def test_nobody_averages_channels_in_passing() -> None:
    paths = [path for path in sources("audio_llm") if str(path.relative_to(ROOT)).startswith(AUDIO_PATHS)]
    wrong = [where(path, line) for path in paths for line in channel_averages(path)]
    assert not wrong, "\n".join(wrong)


def test_the_channel_lint_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "a = x.mean(0)\nb = np.mean(x, axis=-2)\nc = x.mean(-1)\ndef downmix(x):\n    return x.mean(axis=0)\n"
    )
    assert list(channel_averages(path)) == [1, 2]


def test_files_stay_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked()
        if path.suffix in (".py", ".sh")
    }
    assert not {name: count for name, count in lengths.items() if count >= 700}


# Written in pieces, so that this file does not match itself.
FORBIDDEN = {
    "an absolute path of somebody's machine": re.compile(r"(?<![\w.>~/-])/(?:work|root|opt|home)/[\w.]"),
    "a package registry's host": re.compile(
        r"\b(?:pypi|pythonhosted|anaconda|conda)\.(?:org|com)\b|download\.pytorch\b"
    ),
}


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_machine_or_registry_is_named(kind: str) -> None:
    wrong = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{where(path, n)}: {line.strip()[:80]}" for n, line in enumerate(lines, 1) if FORBIDDEN[kind].search(line)
        ]
    assert not wrong, "\n".join(wrong)


def test_recipes_hold_no_python_and_scripts_no_logic() -> None:
    assert not sources("recipes")
    assert not sources("scripts")


def test_relative_links_of_the_pages_lead_somewhere() -> None:
    """Pictures of results are made by runs and may be absent; pages and files may not."""
    broken = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" in target or target.startswith(("mailto:", "docs/images/")):
                continue
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken, "\n".join(broken)


# Which dataclass a recipe fills, by the beginning of its file's name: (module, class).
RECIPES = {
    "scenes": ("data_prep.scenes.simulate", "SceneConfig"),
    "clips": ("data_prep.seld", "SELDConfig"),
    "small": ("audio_llm.training.supervised", "EncoderRecipe"),
    "full": ("audio_llm.training.supervised", "EncoderRecipe"),
    "questions": ("data_prep.audio_questions", "AudioQuestionsConfig"),
    "options": ("audio_llm.training.echotwin", "EchoTwinRecipe"),
    "letters": ("audio_llm.training.echotwin", "EchoTwinRecipe"),
    "published": ("audio_llm.training.echotwin", "EchoTwinRecipe"),
    "audioset": ("data_prep.audioset_reverb", "ReverbConfig"),
    "encoder": ("audio_llm.training.supervised", "EncoderRecipe"),
    "language_model": ("audio_llm.training.language_model", "LanguageModelRecipe"),
    "sft": ("audio_llm.training.sft", "SFTRecipe"),
    "grpo": ("audio_llm.training.grpo", "GRPORecipe"),
    "esc": ("eval.folds", "FoldsRecipe"),
    "urbansound": ("eval.folds", "FoldsRecipe"),
    "expect": ("eval.expectations", None),
}


def recipe_files() -> list[Path]:
    return [path for path in sorted((ROOT / "recipes").glob("*/*.yaml")) if path.parent.name != "accelerate"]


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_loads(path: Path) -> None:
    import importlib

    from audio_llm import config

    kinds = [kind for kind in RECIPES if path.stem.startswith(kind)]
    assert kinds, f"{path.name}: name it after what it is for, one of {', '.join(RECIPES)}"
    module, name = RECIPES[max(kinds, key=len)]
    if name is None:
        assert importlib.import_module(module).read_expectations(path)
        return
    kind = getattr(importlib.import_module(module), name)
    recipe = config.load(kind, path)
    if hasattr(recipe, "check"):
        recipe.check()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_configuration_loads(path: Path) -> None:
    import json

    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    file = (getattr(loaded, "deepspeed_config", None) or {}).get("deepspeed_config_file")
    if file:
        assert json.loads((ROOT / file).read_text())["zero_optimization"]["stage"] in (2, 3)
