"""The audio-dependency filter of several runs against a count by hand, its table, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.cli import main
from eval.figures.dependency import Part, Rules, audio_dependency, table
from eval.figures.runs import Run, scorers_for
from eval.predictions import Prediction, PredictionWriter

CHOICES = ["dog", "rain", "horn", "bell"]
PASSES = ("", "silence", "text_only")
NAMES = ("a", "b", "c", "d")
Right = dict[str, tuple[bool, ...]]  # by question: right with the sound, in silence, with the text only


def rows(right: Right) -> Iterator[Prediction]:
    for item, values in right.items():
        for control, value in zip(PASSES, values, strict=True):
            reply = "dog" if value else "rain"
            yield Prediction(
                item, "adqa", "dcase_aqa", "What is it?", CHOICES, "dog", reply, control=control, clip=item[:2]
            )


def runs(models: dict[str, Right]) -> list[Run]:
    return [Run(name, [*rows(right)], scorers_for("", "option-resolution")) for name, right in models.items()]


@st.composite
def answered(draw: st.DrawFn) -> tuple[dict[str, Right], Rules]:
    names = NAMES[: draw(st.integers(2, 4))]
    items = [f"q{number // 3}_{number}" for number in range(draw(st.integers(1, 12)))]
    bits = st.tuples(st.booleans(), st.booleans(), st.booleans())
    models = {name: {item: draw(bits) for item in items} for name in names}
    limits = st.integers(1, len(names))
    return models, Rules(draw(limits), draw(limits))


@settings(max_examples=60, deadline=None)
@given(answered())
def test_filter_split_and_accuracies_are_those_counted_by_hand(case: tuple[dict[str, Right], Rules]) -> None:
    models, rules = case
    found = audio_dependency(runs(models), rules=rules)
    items = [*next(iter(models.values()))]

    def kept(item: str, judges: list[str]) -> bool:
        return all(sum(models[name][item][place] for name in judges) < rules.right_without for place in (1, 2))

    for question in found.questions:
        assert question.audio_dependent == kept(question.id, [*models])
        wrong = sum(not right[question.id][1] for right in models.values())
        assert question.contribution == ("strong" if wrong >= rules.wrong_in_silence else "weak")
        assert question.right_text_only == tuple(name for name in models if models[name][question.id][2])
    assert [one.id for one in found.questions] == items and found.left_out == 0
    for model in found.models:
        parts = {part.name: part for part in model.parts}
        others = [name for name in models if name != model.name]
        expected = {
            "all": items,
            "audio-dependent": [item for item in items if kept(item, [*models])],
            "the rest": [item for item in items if not kept(item, [*models])],
            "audio-dependent for the other models": [
                item for item in items if rules.right_without <= len(others) and kept(item, others)
            ],
        }
        for name, ids in expected.items():
            _as_counted(parts.get(name), [models[model.name][item] for item in ids])
        right = [item for item in items if models[model.name][item][0]]
        share = sum(kept(item, [*models]) for item in right) / len(right) if right else math.nan
        assert model.right_and_dependent.value == pytest.approx(share, nan_ok=True)


def _as_counted(part: Part | None, values: list[tuple[bool, ...]]) -> None:
    if not values:
        assert part is None
        return
    assert part is not None
    loud, silent, text = (sum(each) / len(values) for each in zip(*values, strict=True))
    assert part.with_sound.accuracy.value == pytest.approx(loud) and part.with_sound.chance == 0.25
    assert part.silence.accuracy.value == pytest.approx(silent)
    assert part.text_only.accuracy.value == pytest.approx(text)
    assert part.sound_adds.difference.value == pytest.approx(loud - silent)
    assert part.with_sound.accuracy.low <= loud <= part.with_sound.accuracy.high


def test_several_replies_errors_and_clusters() -> None:
    """Half of the replies right is right; a question that one model could not be asked is in no figure."""
    models = {"a": {"q0": (True, False, False), "q1": (True, False, False)}}
    first = [*rows(models["a"])]
    second = [*rows({"q0": (True, True, False), "q1": (True, False, False)})]
    second += [Prediction(**_fields(second[1]) | {"sample": 1, "raw": "rain"})]  # silence, once right and once wrong
    third = [*rows(models["a"])]
    third[3].error, third[3].raw = "no such file", ""
    made = [
        Run(name, each, scorers_for("", "option-resolution"))
        for name, each in zip(NAMES, (first, second), strict=False)
    ]
    found = audio_dependency(made)
    assert [one.right_in_silence for one in found.questions] == [("b",), ()]
    assert [one.audio_dependent for one in found.questions] == [False, True]
    found = audio_dependency([*made, Run("c", third, scorers_for("", "option-resolution"))])
    assert [one.id for one in found.questions] == ["q0"] and found.left_out == 1
    assert found.models[0].parts[0].with_sound.accuracy.n == 1


def _fields(row: Prediction) -> dict[str, object]:
    return {name: getattr(row, name) for name in Prediction.__dataclass_fields__}


def test_a_model_that_is_never_right_has_no_share() -> None:
    never, some = {f"q{n}": (False,) * 3 for n in range(4)}, {f"q{n}": (n > 1, False, False) for n in range(4)}
    found = audio_dependency(runs({"never": never, "some": some}))
    told = table(found)
    assert told.count("none is right") == 1 and "of its right answers 100.0 [" in told and "nan" not in told


def test_a_model_that_does_not_listen_has_nothing_there_by_its_own_filter_and_chance_by_the_others() -> None:
    """The reason for the line by the other models: one's own answers choose the questions."""
    deaf = {f"q{n}": (n % 4 == 0,) * 3 for n in range(400)}
    other = {f"q{n}": (True, n // 4 % 4 == 0, False) for n in range(400)}
    found = audio_dependency(runs({"deaf": deaf, "other": other}))
    parts = {part.name: part.with_sound.accuracy.value for part in found.models[0].parts}
    assert parts["audio-dependent"] == 0.0 and parts["audio-dependent for the other models"] == 0.25
    assert found.models[0].parts[0].sound_adds.difference.value == 0.0


# ------------------------------------------------------------------------------------------------- as a command


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    right = {
        "sft": {f"q{n}": (n % 4 > 0, n % 3 == 0, n % 5 == 0) for n in range(30)},
        "grpo": {f"q{n}": (n % 6 > 0, n % 4 == 0, n % 5 == 0) for n in range(30)},
        "more": {f"q{n}": (True, n % 7 == 0, n % 2 == 0) for n in range(30)},
    }
    for name, values in right.items():
        with PredictionWriter(tmp_path / name / "predictions.jsonl") as writer:
            writer.write(rows(values))
        (tmp_path / name / "run.json").write_text(
            json.dumps({"finished": True, "rows": 90, "command": "audio-llm eval M D"})
        )
    return [tmp_path / name for name in right]


def test_the_table_and_its_json(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures" / "dependency.json"
    assert main(["compare", *map(str, folders), "--audio-dependent", "--json", str(out)]) == 0
    told = capsys.readouterr().out
    by_hand = sum(all(n % k for k in (2, 3, 4, 5, 7)) for n in range(30))
    assert f"audio-dependent {by_hand}: fewer than 1 of the models right in silence" in told
    assert told.count("chance 25.0") == 3 * 6 and "strong where at least 2 models are wrong in silence" in told
    tree = json.loads(out.read_text())
    assert tree["scorer"].startswith("option-resolution") and tree["rules"] == {
        "right_without": 1,
        "wrong_in_silence": 2,
    }
    assert sum(one["audio_dependent"] for one in tree["questions"]) == by_hand
    assert tree["questions"][0]["right_in_silence"] == ["sft", "grpo", "more"]
    assert [model["name"] for model in tree["models"]] == ["sft", "grpo", "more"]
    assert main(["compare", *map(str, folders), "--audio-dependent", "--right-without", "3"]) == 0
    assert "fewer than 3 with the text only" in capsys.readouterr().out
    assert main(["compare", *map(str, folders[:2]), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["names"] == ["sft", "grpo"]


def _lines(folder: Path) -> list[str]:
    return (folder / "predictions.jsonl").read_text().splitlines(keepends=True)


def _write(folder: Path, lines: list[str], **manifest: object) -> None:
    (folder / "predictions.jsonl").write_text("".join(lines))
    tree = {"finished": True, "rows": len(lines), "command": "audio-llm eval M D"}
    (folder / "run.json").write_text(json.dumps(tree | manifest))


BROKEN = {
    "unfinished": (lambda f: _write(f, _lines(f), finished=False), "run grpo: expected a run that has finished"),
    "cut at a line": (
        lambda f: _write(f, _lines(f)[:-1], rows=90),
        "run grpo: expected the 90 answers of its run.json",
    ),
    "torn": (lambda f: _write(f, [*_lines(f)[:-1], _lines(f)[-1][:40]]), "line 90: expected one JSON object a line"),
    "no controls": (lambda f: _write(f, _lines(f)[::3]), "run grpo: expected the controls silence and text_only"),
    "one control less": (
        lambda f: _write(f, [line for line in _lines(f) if "text_only" not in line]),
        "found greedy, silence without text_only",
    ),
    "a control of fewer": (
        lambda f: _write(f, _lines(f)[:-1]),
        "run grpo, text_only: expected the questions of run sft",
    ),
    "other questions": (
        lambda f: _write(f, [line.replace('"q29"', '"q30"') for line in _lines(f)]),
        "run grpo, greedy: expected the questions of run sft, greedy, found 'q29' in one of them",
    ),
    "other words": (
        lambda f: _write(f, [line.replace("What is it?", "What was it?") for line in _lines(f)]),
        "item 'q0' in run sft and in run grpo, greedy, question",
    ),
    "another key": (
        lambda f: _write(f, [line.replace('"gold": "dog"', '"gold": "bell"') for line in _lines(f)]),
        "item 'q0' in run sft and in run grpo, greedy, answer",
    ),
    "no answers": (
        lambda f: _write(f, [line.replace('"error": ""', '"error": "no such file"') for line in _lines(f)]),
        "can score for every run, with and without their sound, found none of 30",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_runs_that_do_not_belong_together_are_refused_by_name(
    kind: str, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BROKEN[kind]
    spoil(folders[1])
    out = tmp_path / "out.json"
    assert main(["compare", *map(str, folders), "--audio-dependent", "--json", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_arguments_that_cannot_be_met(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    paths = [*map(str, folders)]
    for arguments, message in (
        ([paths[0], "--audio-dependent"], "expected the runs of two models or more, found 1"),
        ([*paths, paths[0], "--audio-dependent"], "expected each once"),
        ([*paths, "--audio-dependent", "--right-without", "0"], "--right-without: expected 1 to 3"),
        ([*paths, "--audio-dependent", "--wrong-in-silence", "4"], "--wrong-in-silence: expected 1 to 3"),
        ([*paths, "--audio-dependent", "--by", "format"], "--by: not with --audio-dependent"),
        ([*paths, "--audio-dependent", "--answers", "sampled"], "expected answers 'sampled'"),
        ([*paths, "--audio-dependent", "--answers", "silence"], "--answers: expected answers to the sound"),
        ([*paths[1:], f"={paths[0]}", "--audio-dependent"], "run: expected NAME=FOLDER, or a folder, found '="),
        (paths, "expected two runs, found 3"),
        ([*paths[:2], "--right-without", "1"], "--right-without: only with --audio-dependent"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err, message
