"""The house rules of docs/architecture.md, kept by reading the source: who may import whom, and what stays out."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

ROOMS = ("audio_llm", "data_prep", "eval")

# Above the wall, first to last: a file imports its own row and earlier ones. Nothing above names anything below.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "config", "yaml_text", "files", "identity", "registry", "ranges", "machine"),
    ("pcm", "containers"),
    ("audio", "integers"),
    ("shards",),
    ("language",),
    ("model",),
    ("training",),
    ("serving",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
BELOW = ("encoders", "datasets", "tasks", "answering", "inspection", "cli")
TASKS = ("classification", "echotwin", "language_model", "seld", "spatial")
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


NAMES = re.compile(r"\b(?:audio_llm|data_prep|eval)(?:\.\w+)+")


@cache
def modules() -> dict[str, Path]:
    """Every module of the rooms by its dotted name."""
    found = {}
    for path in sources(*ROOMS):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def home(dotted: str) -> str | None:
    """The module that a dotted name (of a module, or of something in one) belongs to."""
    parts = dotted.split(".")
    while parts and ".".join(parts) not in modules():
        parts.pop()
    return ".".join(parts) or None


def docstrings(path: Path) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = (node.body[0] for node in ast.walk(tree(path)) if isinstance(node, owners) and node.body)
    return {id(node.value) for node in first if isinstance(node, ast.Expr)}


@cache
def names(module: str) -> dict[str, int]:
    """The other modules that a module names, by import or in a string that is no docstring, and the line of each."""
    path = modules()[module]
    texts = docstrings(path)
    named = list(imports(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            named += [(node.lineno, name) for name in NAMES.findall(node.value.replace(":", "."))]
    found = {target: line for line, name in reversed(named) if (target := home(name))}
    for itself in (module, *ROOMS):  # a package is named by whoever imports a module of it
        found.pop(itself, None)
    return found


def row_of(module: str) -> str | None:
    """The row above or below the wall that a module of audio_llm belongs to; None for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "audio_llm" and len(parts) > 1 and parts[1] not in OPEN else None


def test_nothing_above_the_wall_names_anything_below() -> None:
    wrong = []
    for module, path in modules().items():
        row = row_of(module)
        if row is None:
            continue
        assert row in RANK or row in BELOW, f"{module} has no place in docs/architecture.md"
        if row not in RANK:
            continue
        for target, line in names(module).items():
            other = row_of(target)
            if target.split(".")[0] != "audio_llm" or (other and RANK.get(other, len(ROWS)) > RANK[row]):
                wrong.append(f"{where(path, line)} ({row}) names {target}")
    assert not wrong, "\n".join(wrong)


def task_of(module: str) -> str | None:
    """The task that a module of ``audio_llm.tasks``, ``eval.tasks`` or ``data_prep.tasks`` belongs to."""
    parts = module.split(".")
    ours = parts[1:2] == ["tasks"] and len(parts) > 2
    return next((name for name in TASKS if ours and re.match(rf"{name}(_|$)", parts[2])), None)


def test_tasks_do_not_know_each_other() -> None:
    wrong = [
        f"{where(path, line)} names {target}"
        for module, path in modules().items()
        if (task := task_of(module))
        for target, line in names(module).items()
        if task_of(target) not in (None, task)
    ]
    assert not wrong, "\n".join(wrong)


def circles() -> list[list[str]]:
    """Groups of modules each of which leads to all others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in names(module):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in modules():
        if module not in index:
            visit(module)
    return found


def test_no_circle_of_files() -> None:
    assert not circles()


def test_every_row_is_in_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert not [name for name in (*RANK, *BELOW) if not re.search(rf"\b{name}\b", text)]


def test_only_the_vllm_room_imports_vllm() -> None:
    inside = str(Path("audio_llm") / "serving")
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
    assert not {name.split(".")[0] for name in top_level} - {"__future__", "os", "sys", "audio_llm", "typing"}


# Files through which waveforms of shape (channels, time) or (batch, channels, time) pass.
AUDIO_PATHS = (
    "audio_llm/model/processing.py",
    "audio_llm/shards",
    "audio_llm/serving/media.py",
    "audio_llm/serving/plugin.py",
    "audio_llm/audio.py",
    "audio_llm/containers",
)
MIXES_BY_NAME = {"take_channels"}  # the functions of audio.py a caller has to name


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
        "a = x.mean(0)\nb = np.mean(x, axis=-2)\nc = x.mean(-1)\ndef take_channels(x):\n    return x.mean(axis=0)\n"
    )
    assert list(channel_averages(path)) == [1, 2]


def reading_path() -> list[Path]:
    """The files that README names under "Reading path"; a name without a folder lies where the one before it does."""
    text = (ROOT / "README.md").read_text().split("**Reading path**")[1].split("[docs/architecture.md]")[0]
    folder, found = ROOT / "audio_llm", []
    for name in re.findall(r"`([\w/]+\.py)`", text):
        path = ROOT / "audio_llm" / name if "/" in name or (ROOT / "audio_llm" / name).is_file() else folder / name
        folder = path.parent
        found.append(path)
    return found


def test_the_reading_path_is_an_evening() -> None:
    path = reading_path()
    assert len(path) == len(set(path)) >= 20
    assert sum(len(file.read_text().splitlines()) for file in path) < 6000


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
    assert [path.name for path in sources("scripts")] == ["build_backend.py"]  # which pip calls


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


def anchors(page: Path) -> set[str]:
    """What a link may name behind ``#``: the headings of a page as they are written in an address."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    shown = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ +(.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in shown}


def test_links_lead_to_headings_that_there_are() -> None:
    broken = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            other = page.parent / target if target else page
            if "://" not in target and other.suffix == ".md" and anchor not in anchors(other):
                broken.append(f"{page.relative_to(ROOT)} -> {target}#{anchor}")
    assert not broken, "\n".join(broken)


def recipe_files() -> list[Path]:
    return [path for path in sorted((ROOT / "recipes").glob("*/*.yaml")) if path.parent.name != "accelerate"]


def load_recipe(path: Path, overrides: list[str] | None = None) -> None:
    """Load the recipe in `path` as its verb does, and check its values."""
    from importlib.metadata import entry_points

    from audio_llm import config
    from audio_llm.tasks import base
    from eval.figures.expectations import read_expectations

    tree = config.read(path, overrides)
    verb = config.verb_of(tree)
    if verb == "report":
        assert read_expectations(path)
    elif verb == "train":
        base.load_recipe(path, overrides)
    else:
        (point,) = (point for point in entry_points(group="audio_llm.verbs") if point.name == verb)
        kind = tree.get("kind", "scenes") if verb == "prep" else ""
        recipe = config.load(point.load().recipes()[kind], path, overrides)
        if hasattr(recipe, "check"):
            recipe.check()


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_loads(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_configuration_loads(path: Path) -> None:
    import json

    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    file = (getattr(loaded, "deepspeed_config", None) or {}).get("deepspeed_config_file")
    if file:
        assert json.loads((ROOT / file).read_text())["zero_optimization"]["stage"] in (2, 3)
