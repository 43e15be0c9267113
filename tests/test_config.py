"""Recipes: what a person may write, what is refused, and that a dumped recipe is the recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.config import ALIASES, build, dump, load, note, read, verb_of
from audio_llm.errors import ConfigError
from audio_llm.training.recipes import GRPORecipe
from audio_llm.yaml_text import read_yaml, yaml_of


@dataclass
class Optimizer:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int | None = None


@dataclass
class Recipe:
    output: Path
    steps: int = 10
    style: Literal["answer", "think"] = "answer"
    resume: bool = False
    seed: int | float = 0
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)
    anything: Any = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, found {self.steps}")


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_file_overrides_and_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, "output: runs/x\nsteps: 20\noptimizer: {warmup: 5}\n")
    found = load(Recipe, path, ["optimizer.learning_rate=1e-3", "names=[a, b]", "weights.bell=2", "layers=[1, 2]"])
    expected = Recipe(
        Path("runs/x"), 20, names=["a", "b"], weights={"bell": 2.0}, layers=(1, 2), optimizer=Optimizer(1e-3, warmup=5)
    )
    assert found == expected
    assert isinstance(found.weights["bell"], float)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_every_way_to_write_a_small_number(text: str) -> None:
    """YAML 1.1 takes 1e-3, without a dot, for text."""
    assert load(Optimizer, None, [f"learning_rate={text}"]).learning_rate == 0.001


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file and behind it, as a shell reads it in front of a slash; nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = read(recipe(tmp_path, "output: ~/runs\nnames: [~/a, 'b~/c', ~]\n"), ["encoder={path: ~/e, name: ~x}"])
    assert tree["output"] == f"{tmp_path}/runs" and tree["names"] == [f"{tmp_path}/a", "b~/c", None]
    assert tree["encoder"] == {"path": f"{tmp_path}/e", "name": "~x"}


def test_small_numbers_are_numbers_where_no_type_is_asked_for(tmp_path: Path) -> None:
    """As in YAML 1.2, and as Python reads them; what only begins like one is text."""
    numbers, words = ["3e-4", "-2E+1", "1.e3", ".5e0", "+1e05", "1.0e-3"], ["1e", "e3", "1e3x", "1e-", "-e1", "1e3.5"]
    text = f"[{', '.join(numbers + words)}]"
    expected = {"value": {"any": [*map(float, numbers), *words]}}
    assert read(None, [f"value={{any: {text}}}"]) == expected == read(recipe(tmp_path, f"value: {{any: {text}}}"))


@pytest.mark.parametrize(("word", "expected"), [("off", "off"), ("auto", "auto"), ("'off'", "off"), ("0.5", 0.5)])
def test_a_word_that_yaml_reads_as_a_truth_value_can_be_written(tmp_path: Path, word: str, expected: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output: x\nmodel: {{path: m}}\ndata: {{train: [d]}}\nparity_bound: {word}\n")
    assert load(GRPORecipe, path).parity_bound == expected
    assert load(GRPORecipe, path, [f"parity_bound={word}"]).parity_bound == expected


def test_an_override_fills_an_empty_group(tmp_path: Path) -> None:
    path = recipe(tmp_path, "output: x\noptimizer:\n")
    assert load(Recipe, path, ["optimizer.warmup=3"]).optimizer.warmup == 3


def test_empty_value_is_none() -> None:
    assert load(Recipe, None, ["output=x", "optimizer.warmup="]).optimizer.warmup is None


# (recipe text, overrides, words of the message)
REFUSED = [
    ("output: x\nstpes: 3", [], ["unknown key 'stpes'", "did you mean 'steps'", "Known keys"]),
    ("output: x\noptimizer: {learning_rat: 1}", [], ["optimizer", "did you mean 'learning_rate'"]),
    ("output: x", ["optimizer.warm_up=1"], ["unknown key 'warm_up'", "did you mean 'warmup'"]),
    ("output: x\non: 3", [], ["unknown key 'True'"]),
    ("steps: 3", [], ["missing key output"]),
    ("output: x\nsteps: many", [], ["steps", "expected int", "'many'"]),
    ("output: x\nsteps: true", [], ["steps", "expected int", "True"]),
    ("output: x\nsteps: 1.5", [], ["steps", "expected int", "1.5"]),
    ("output: x\nresume: 1", [], ["resume", "expected bool"]),
    ("output: x\nstyle: thinking", [], ["expected one of answer, think", "did you mean 'think'"]),
    ("output: x\nnames: bell", [], ["names", "expected a list", "'bell'"]),
    ("output: x\nnames: [bell, 3]", [], ["names[1]", "expected str", "3", "Put it in quotes"]),
    ("output: x\nnames: [bell, no]", [], ["names[1]", "expected str", "False. Put it in quotes"]),
    ("output: on", [], ["output: expected Path, found True. Put it in quotes"]),
    ("output: x\nsteps: 010", [], ["steps", "expected int", "'010'"]),
    ("output: x\nsteps: 1:30", [], ["steps", "expected int", "'1:30'"]),
    ("output: x\nweights: {no: 1}", [], ["weights: key", "expected str, found False. Put it in quotes"]),
    ("output: x\n<<: {steps: 1}\n<<: {steps: 2}", [], ["key '<<' given twice", "line 3"]),
    ("output: x\nanything: &a [*a]", [], ["a value that holds itself"]),
    ("output: x\nanything: &a {b: [{c: *a}]}", [], ["a value that holds itself"]),
    ("output: x\nweights: {bell: loud}", [], ["weights.bell", "expected float", "'loud'"]),
    ("output: x\noptimizer: {learning_rate: .nan}", [], ["learning_rate", "expected a number", "nan"]),
    ("output: x\noptimizer: adam", [], ["optimizer", "expected a group of keys", "'adam'"]),
    ("output: x\noptimizer: {betas: [0.9]}", [], ["betas", "expected 2 values, found 1"]),
    ("output: x\noptimizer: {warmup: soon}", [], ["warmup", "expected int"]),
    ("output: x\nsteps: -1", [], ["recipe.yaml", "expected at least 0", "-1"]),
    ("output: x\noutput: y", [], ["given twice", "line 2"]),
    ("- output", [], ["expected a mapping", "list"]),
    ("output: [x", [], ["not valid YAML", "line"]),
    ("output: x", ["steps"], ["expected key=value"]),
    ("output: x", ["=3"], ["expected key=value"]),
    ("output: x", ["steps.more=3"], ["steps", "expected int"]),
    ("output: x\nsteps: 3", ["steps.more=3"], ["'steps' is a value"]),
    ("output: x", ["names=[a"], ["names=[a", "not valid YAML"]),
    ("output: x", ["weights={bell: 1, bell: 2}"], ["weights={bell", "given twice"]),
    ("output: x", ["names=2026-13-40"], ["names", "expected a list", "'2026-13-40'"]),
    ("output: x", ["names=" + "[" * 5000], ["not valid YAML", "nested without end"]),
]


@pytest.mark.parametrize(("text", "overrides", "words"), REFUSED)
def test_refused_with_one_clear_line(tmp_path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Recipe, recipe(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_names_that_yaml_1_1_takes_for_numbers_and_dates_stay_names(tmp_path: Path) -> None:
    """As the core schema of YAML 1.2 has them; ids as 007 keep their zeros, whichever number they would be."""
    said = {"2024-01-31": str, "12:30": str, "1:30.5": str, "0o17": str, "1e3": float, "1.5e-3": float, ".5": float}
    said |= {
        "7": int,
        "-0": int,
        "0": int,
        "+3": int,
        "0x1F": int,
        "1_000": int,
        ".inf": float,
        "2001-12-14t21:59": str,
    }
    for text, kind in said.items():
        found = read_yaml(f"a: {text}")["a"]
        assert type(found) is kind and (kind is not str or found == text), text
        assert read_yaml(yaml_of({"a": found})) == {"a": found}
    assert read_yaml("[007, 08, 010]") == ["007", "08", "010"]
    dated = load(Recipe, recipe(tmp_path, "output: 2024-01-31\nnames: [2024-02-30, 007]\nweights: {2024: 1, 007: 2}"))
    assert dated.output == Path("2024-01-31") and dated.names == ["2024-02-30", "007"]
    assert dated.weights == {"2024": 1.0, "007": 2.0}


def test_what_is_merged_may_be_given_anew_wherever_its_anchor_stands() -> None:
    """As yaml.org/type/merge has it, by its example; the last one merges a mapping before that is made."""
    shared = "- &CENTER { x: 1, y: 2 }\n- &LEFT { x: 0, y: 2 }\n- &BIG { r: 10 }\n- &SMALL { r: 1 }\n"
    merged = "- { <<: *CENTER, r: 10 }\n- { <<: [ *CENTER, *BIG ] }\n- { <<: [ *BIG, *LEFT, *SMALL ], x: 1 }"
    assert read_yaml(shared + merged)[4:] == [{"x": 1, "y": 2, "r": 10}] * 3
    assert read_yaml("<<: [{rate: 1}, {rate: 2}]") == {"rate": 1}
    with pytest.raises(ValueError, match="expected a mapping to merge, found scalar, line 1"):
        read_yaml("<<: [{rate: 1}, 2]")
    with pytest.raises(ValueError, match="without end"):
        read_yaml("a: &a {<<: *a}")
    text = "a: {b: &b {<<: {x: 1}, x: 2}}\nc: {<<: *b}\nd: &d [1]\ne: [*d, *d]"
    assert read_yaml(text) == {"a": {"b": {"x": 2}}, "c": {"x": 2}, "d": [1], "e": [[1], [1]]}


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Recipe, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Recipe, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00output")
    with pytest.raises(ConfigError, match="not text"):
        load(Recipe, tmp_path / "binary.yaml")


finite = st.floats(allow_nan=False)
# Surrogates cannot be written to a file at all.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
recipes = st.builds(
    Recipe,
    output=st.from_regex(r"[a-z0-9.][a-z0-9./ -]{0,20}", fullmatch=True).map(Path),
    steps=st.integers(0, 10**12),
    style=st.sampled_from(["answer", "think"]),
    resume=st.booleans(),
    seed=st.integers(-5, 5) | finite,
    names=st.lists(words, max_size=3),
    weights=st.dictionaries(words, finite, max_size=3),
    layers=st.lists(st.integers(), max_size=3).map(tuple),
    optimizer=st.builds(Optimizer, finite, st.tuples(finite, finite), st.none() | st.integers()),
    anything=st.none() | st.booleans() | st.integers() | words | st.lists(st.integers() | words, max_size=3),
)


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "a\nb\x85", "\ufeffa", "1e3", "\t", "é"])
def test_a_text_is_read_as_it_was_written(text: str) -> None:
    assert read_yaml(yaml_of({"names": [text]})) == {"names": [text]}


@given(recipes)
def test_dump_and_load_are_inverse(tmp_path_factory: pytest.TempPathFactory, config: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipe") / "resolved.yaml"
    dump(config, path)
    assert load(Recipe, path) == config


@given(recipes)
def test_build_agrees_with_plain_construction(config: Recipe) -> None:
    tree = yaml.safe_load(
        yaml.safe_dump(
            {
                **dataclasses.asdict(config),
                "output": str(config.output),
                "layers": list(config.layers),
                "optimizer": {**dataclasses.asdict(config.optimizer), "betas": list(config.optimizer.betas)},
            }
        )
    )
    assert build(Recipe, tree) == config


@dataclass
class Parts:
    encoder: str = "frozen"
    projector: str = "full"


@dataclass
class Run:
    verb: ClassVar[str] = "sft"

    output: Path
    train: Parts = field(default_factory=Parts)
    save_steps: int | None = None


def test_keys_by_their_old_names_are_read_under_the_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    note.cache_clear()  # each is said once a process
    path = recipe(tmp_path, "output: runs/x\nencoder: lora\nsave_every: 3\n")
    found = load(Run, path, ["train.projector=frozen"])
    assert found == Run(Path("runs/x"), Parts("lora", "frozen"), 3)
    assert "'train.encoder' now where this one says 'encoder'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'encoder' is the old name of 'train.encoder'; found both"):
        load(Run, path, ["train.encoder=full"])
    with pytest.raises(ConfigError, match="'save_every' is the old name of 'save_steps'"):
        load(Run, path, ["save_steps=4"])


def test_an_old_name_that_is_a_key_of_its_own_stays(tmp_path: Path) -> None:
    path = recipe(tmp_path, "output: x\noptimizer: {warmup: 5}\n")
    assert "warmup" in ALIASES and load(Recipe, path).optimizer.warmup == 5


def test_a_recipe_names_its_verb(tmp_path: Path) -> None:
    path = recipe(tmp_path, "verb: sft\noutput: runs/x\n")
    assert load(Run, path) == Run(Path("runs/x"))
    dump(load(Run, path), tmp_path / "resolved.yaml")
    assert read(tmp_path / "resolved.yaml")["verb"] == "sft"
    assert load(Run, tmp_path / "resolved.yaml") == Run(Path("runs/x"))


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("verb: grpo", "grpo"),
        ("task: folds", "folds"),
        ("task: spatial", "train"),
        ("kind: seld", "prep"),
        ("subsets: {}", "prep"),
        ("rewards: {}", "grpo"),
        ("batch_size: 2", "sft"),
        ("eval_steps: 2", None),  # GRPO has it too
        ("checks: []", "report"),
        ("output: x", None),
    ],
)
def test_the_verb_of_a_recipe(tmp_path: Path, text: str, verb: str | None) -> None:
    path = recipe(tmp_path, text)
    assert verb_of(read(path)) == verb
    if verb not in (None, "sft"):
        with pytest.raises(ConfigError, match=f"Give the command: audio-llm {verb} "):
            load(Run, path)
