"""The commands that pages and recipes show: whole, without a misspelt option or key, about files that there are."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.test_house import load_recipe

VERBS = {entry.name: entry for entry in entry_points(group="audio_llm.verbs")}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# Nothing can be asked of a synopsis, or of a part of a command in running text.
PART = re.compile(r"…|\[--|\$|NAME|--server-command|eval --option|ask --constrain$")


def lines_of(page: Path) -> Iterator[str]:
    """The lines of code blocks, and what stands in backticks; of a recipe, the lines of the comment above its keys."""
    if page.suffix == ".yaml":
        comment = re.match(r"(?:#.*\n)*", page.read_text())
        text = re.sub(r"\\\n#\s*", " ", comment[0] if comment else "")
        # A comment says what the command is for; the command follows it, and another may stand behind a gap.
        yield from (part for line in text.splitlines() for part in re.split(r"^#\s*(?:usage: )?|\s{3,}then: ", line))
        return
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield from block.splitlines() if kind in ("", "bash", "sh") else ()
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line of shell, without variables that are set for it."""
    lexer = shlex.shlex(line, True, ";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for token in lexer:
            if not set(token) <= set(";&|"):
                words.append(token)
            elif words:
                yield words
                words = []
    except ValueError:  # running text with an apostrophe
        return
    if words:
        yield words


def documented() -> dict[str, list[str]]:
    """What follows `audio-llm` in every whole command, by the page that has it first."""
    found: dict[str, list[str]] = {}
    for page in [*PAGES, *RECIPES]:
        for line in lines_of(page):
            for words in commands(line) if not PART.search(line) else ():
                while words and (words[0] in ("do", "then", "time") or re.match(r"[A-Z_]+=", words[0])):
                    words = words[1:]
                if words[:2] == ["accelerate", "launch"] and "audio_llm" in words:
                    words = ["audio-llm", *words[words.index("audio_llm") + 1 :]]
                if words[:1] == ["audio-llm"] and len(words) > 2:
                    found.setdefault(f"{page.relative_to(ROOT)}: {shlex.join(words[1:])}", words[1:])
    texts: dict[str, list[str]] = {}
    for name, words in found.items():
        if words not in texts.values():
            texts[name] = words
    return texts


COMMANDS = documented()


@pytest.mark.parametrize("name", COMMANDS)
def test_documented_commands_are_whole(name: str) -> None:
    """Nothing that is required is left out, no option or key is misspelt, and the recipes are there."""
    verb_name, *words = COMMANDS[name]
    verb = VERBS[verb_name].load()
    parser = argparse.ArgumentParser(exit_on_error=False)
    verb.add_arguments(parser)
    parse = parser.parse_args if parser._subparsers else parser.parse_intermixed_args
    arguments = words[: words.index("--")] if "--" in words else words
    arguments = [word for word in arguments if word not in ("<", ">")]
    try:
        args = parse(verb.arguments(arguments) if hasattr(verb, "arguments") else arguments)
    except (SystemExit, argparse.ArgumentError) as error:
        pytest.fail(f"{name}: {error}")
    for word in words:
        assert not word.startswith("recipes/") or (ROOT / word).is_file(), word
    if hasattr(verb, "recipes") and args.overrides and args.recipe.startswith("recipes/"):
        load_recipe(ROOT / args.recipe, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_commands_name_are_there(page: Path) -> None:
    words = {word for line in lines_of(page) if not PART.search(line) for words in commands(line) for word in words}
    named = {word for word in words if re.match(r"(?:recipes|scripts|tests|benchmarks)/[\w/]+\.\w+$", word)}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


OTHERS = re.compile(r"(?:^|[=\[,])(data/[A-Z][\w.-]+|models/[\w.]+-[\w.-]+)")  # what we make has other names


def test_data_says_where_what_commands_name_comes_from() -> None:
    known = (ROOT / "docs" / "data.md").read_text()
    words = {word for page in PAGES for line in lines_of(page) for words in commands(line) for word in words}
    named = {name for word in words for name in OTHERS.findall(word)}
    assert {"data/ESC-10", "data/FSDD", "models/whisper-base"} <= named
    assert sorted(name for name in named if name not in known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_tests_choose_some(page: Path) -> None:
    """By `-k`, each word in the name of one of the files' tests; by `-m`, a mark that stands in each of them."""
    for line in lines_of(page):
        for words in commands(line) if re.search(r"\bpytest |test\.sh ", line) else ():
            told = [(ROOT / word).read_text() for word in words if re.match(r"tests/[\w/]+\.py$", word)]
            names = re.findall(r"def (test_\w+)", "\n".join(told))
            chosen = words[words.index("-k") + 1].split(" or ") if "-k" in words and told else []
            assert all(any(word in name for name in names) for word in chosen), line
            mark = words[words.index("-m") + 1] if "-m" in words else ""
            assert not mark or all(f"mark.{mark}" in text for text in told), line
