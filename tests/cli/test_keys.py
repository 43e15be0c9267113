"""``audio-llm keys``: nothing that a recipe may say is without a word on it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from audio_llm.cli import main
from audio_llm.cli.keys import keys, meanings
from tests.paths import ROOT

RECIPES = {
    f"{point.name} {name}".strip(): recipe
    for point in entry_points(group="audio_llm.verbs")
    if hasattr(point.load(), "recipes")
    for name, recipe in point.load().recipes().items()
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_every_recipe_is_explained(name: str) -> None:
    found = list(keys(RECIPES[name]))
    assert ("." in name or len(found) > 6) and len({key.name for key in found}) == len(found)
    for key in found:
        assert len(key.meaning.split()) >= 2 or key.meaning in ("Hz",), f"{name}: {key.name} has no word on it"
        assert key.type and "typing" not in key.type and "<" not in key.type, key


def test_the_verbs_with_recipes_are_those_that_run_takes() -> None:
    assert {name.partition(" ")[0] for name in RECIPES} == {"prep", "train", "folds", "sft", "grpo"}


def test_a_meaning_stands_beside_above_or_in_the_docstring_and_children_keep_their_parents() -> None:
    @dataclasses.dataclass
    class Parent:
        """Something. `named` is told here; nothing else."""

        beside: int = 1  # so many
        # A line above it
        # and another.
        above: int = 2
        named: str = "x"
        silent: float = 0.0

    @dataclasses.dataclass
    class Child(Parent):
        beside: int = 3

    expected = {"beside": "so many", "above": "A line above it and another", "named": "`named` is told here"}
    assert meanings(Parent) == expected | {"silent": ""}
    assert meanings(Child) == expected | {"silent": "", "beside": "so many"}


def test_it_prints_one_verb_or_one_task(capsys) -> None:
    assert main(["keys", "sft"]) == 0
    text = capsys.readouterr().out
    assert "output = required  (path)" in text and "data.order_share = 0  (number)" in text
    assert "lora.rank = 16  (whole number)" in text and "train.encoder = frozen  (frozen | lora | full)" in text
    assert main(["keys", "train", "seld"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("train seld:") and "distance_weight = 1  (number)" in text and "echotwin" not in text
    assert main(["keys"]) == 0
    assert "audio-llm keys train [" in capsys.readouterr().out
    for words, told in ((["keys", "stf"], "did you mean 'sft'"), (["keys", "train", "sld"], "did you mean 'seld'")):
        assert main(words) == 2 and told in capsys.readouterr().err


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from audio_llm.cli import main\n"
        "codes = [main(['keys', verb]) for verb in ('sft', 'grpo', 'train', 'prep', 'folds')]\n"
        "print(codes, [n for n in ('torch', 'scipy', 'transformers', 'pyroomacoustics') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert found.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0] []", found.stderr
