"""The command line: quick, complete, and clear when used wrongly."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tqdm import tqdm

from audio_llm.cli import GROUPS, _hush, main
from audio_llm.errors import ConfigError
from tests.paths import ROOT

SHOWN = [name for group in GROUPS.values() for name in group]
VERBS = {entry.name: entry for entry in entry_points(group="audio_llm.verbs")}
HEAVY = ("torch", "transformers", "vllm", "numpy", "scipy", "soundfile", "librosa", "peft", "trl", "yaml", "matplotlib")


def audio_llm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "audio_llm", *arguments], capture_output=True, text=True, timeout=60)


def test_the_help_names_every_verb() -> None:
    reply = audio_llm("--help")
    assert reply.returncode == 0
    lines = {line.split()[0]: line for line in reply.stdout.splitlines() if line.startswith("  ")}
    assert set(SHOWN) <= set(lines)
    assert all(len(line.split()) > 2 for line in lines.values())


@pytest.mark.parametrize("arguments", [["--help"], ["keys"]], ids=str)
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], buffered: str) -> None:
    """As ``audio-llm --help | head -n 0``: nothing is said, and no work is called a failure of ours."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        command = [sys.executable, "-m", "audio_llm", *arguments]
        environment = os.environ | {"PYTHONUNBUFFERED": buffered}
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_link_to_itself_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Python's paths call it a RuntimeError, which every other one of is a defect."""
    (tmp_path / "run").symlink_to(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 2
    assert "run': Too many levels of symbolic links." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "--recipe", "recipe.yaml", "--gpu-memory"],
        ["inspect", "shards", "--max-reject-share"],
        ["serve", "model", "--max-body-mb"],
        ["eval", "model", "shards", "--max-errors"],
        ["predict", "model", "a.wav", "--hop"],
        ["echotwin", "train", "--lr_text"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("value", ["nan", "-inf", "1e999"])
def test_numbers_are_finite(arguments: list[str], value: str, capsys: pytest.CaptureFixture) -> None:
    """No share is above a limit of NaN: all samples might be unusable."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments[:-1], f"{arguments[-1]}={value}"])
    assert stopped.value.code == 2
    assert f"argument {arguments[-1]}: expected a finite number, found '{value}'" in capsys.readouterr().err


def test_no_verb_is_an_error_that_shows_the_help() -> None:
    reply = audio_llm()
    assert reply.returncode == 2
    assert "usage: audio-llm VERB" in reply.stdout


def test_a_wrong_verb_names_the_nearest() -> None:
    reply = audio_llm("inspekt")
    assert reply.returncode == 2
    assert "did you mean 'inspect'" in reply.stderr
    assert "Traceback" not in reply.stderr


def test_an_error_does_not_stand_behind_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A bar is closed when it is collected, which is after the message."""
    kept = []

    def run(args: argparse.Namespace) -> int:
        kept.append(tqdm(total=3, desc="steps"))
        raise ConfigError("all is lost.")

    monkeypatch.setattr(VERBS["keys"].load(), "run", run)
    assert main(["keys"]) == 2 and kept
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "audio-llm keys: error: all is lost." and "steps" in lines[-2]


def test_what_nobody_can_act_on_is_left_out_and_the_rest_is_heard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _hush("train")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    log.warning("something is wrong")
    assert [record.getMessage() for record in caplog.records] == ["something is wrong"]


def test_the_version_is_the_packages_own() -> None:
    from audio_llm import __version__

    assert audio_llm("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([verb, "--help"] for verb in SHOWN)],
    ids=lambda a: a[0],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from audio_llm.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    reply = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert reply.returncode == 0, reply.stderr
    assert reply.stdout.splitlines()[-1].split() == ["HEAVY"]


def test_help_is_quick() -> None:
    """Under 0.3 s of a processor beyond a bare interpreter; medians of alternating runs, so that others' work counts
    neither as waiting nor, as far as it slows a processor down, as ours."""
    bare, ours = [], []
    for _ in range(5):
        for times, command in ((bare, ["-c", "pass"]), (ours, ["-m", "audio_llm", "--help"])):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    extra = statistics.median(ours) - statistics.median(bare)
    load = max(1.0, statistics.median(bare) / 0.03)  # a bare interpreter takes about 0.03 s of an idle machine
    assert extra < 0.3 * load


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for child in set(action.choices.values()) for inner in actions(child)]
    return found


@pytest.mark.parametrize("name", SHOWN)
def test_every_verb_explains_itself(name: str) -> None:
    verb = VERBS[name].load()
    assert isinstance(verb.HELP, str) and 10 < len(verb.HELP) < 90 and "\n" not in verb.HELP
    assert verb.HELP[0].islower() and not verb.HELP.endswith(".")
    parser = argparse.ArgumentParser(prog=name)
    verb.add_arguments(parser)
    unexplained = [
        action.dest
        for action in actions(parser)
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not unexplained
    assert callable(verb.run)


def test_every_entry_point_is_in_the_order() -> None:
    assert set(VERBS) == set(SHOWN)


@pytest.mark.parametrize(
    ("verb", "recipe", "right"),
    [
        ("train", "quickstart/sft.yaml", "sft"),
        ("sft", "quickstart/encoder.yaml", "train"),
        ("train", "classification/esc10.yaml", "folds"),
        ("grpo", "quickstart/sft.yaml", "sft"),
        ("folds", "quickstart/scenes.yaml", "prep"),
    ],
)
def test_a_recipe_of_another_verb_is_answered_with_the_command_that_works(verb, recipe, right, capsys) -> None:
    path = ROOT / "recipes" / recipe
    assert main([verb, str(path)]) == 2
    assert f"Give the command: audio-llm {right} {path}" in capsys.readouterr().err


def test_run_hands_a_recipe_to_its_verb(capsys) -> None:
    assert main(["run", str(ROOT / "recipes" / "quickstart" / "sft.yaml"), "stepz=1"]) == 2
    assert "audio-llm sft: error" in (said := capsys.readouterr().err) and "unknown key 'stepz'" in said


def test_dashes_before_a_key_are_explained(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sft", "recipe.yaml", "--steps", "2"])
    assert "keys of the recipe are written without dashes: steps=VALUE" in capsys.readouterr().err
