"""The full report in one command: what its numbers are, that the same predictions give the same bytes, and that two
runs with one seed are the same run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from audio_llm.cli import main
from audio_llm.tasks.echotwin import task as training
from eval import predictions
from eval.figures.runs import Run, load
from eval.figures.scores import permutations, score_rows
from eval.report import hearing, results
from eval.scorers import get_scorers
from tests.eval.test_eval_runs import Hearing, command, lines, make_mmau
from tests.servers import serving
from tests.tasks.test_echotwin import make_questions, recipe_of


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A full run of a listener that names what it hears, and the first option where it hears nothing."""
    folder = tmp_path_factory.mktemp("full")
    data, out = make_mmau(folder / "data", 40), folder / "run"
    with serving(Hearing) as address:
        assert main(command(data, out, address, "--full")) == 0
    yield out


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(style|title)>.*?</\1>", "", html)))


def test_one_flag_asks_under_every_control_and_writes_the_page(full: Path) -> None:
    rows = predictions.read(full)
    counts = Counter(row.control for row in rows)
    assert counts == {"": 40, "silence": 40, "other_audio": 40, "text_only": 40, "shuffled_options": 120}
    text = words((full / "report.html").read_text(encoding="utf-8"))
    for heading in ("under every scorer", "Does it listen?", "Places of the options", "Options in other orders"):
        assert heading in text
    for heading in ("By domain", "By difficulty", "Listen: run", "How these numbers were made"):
        assert heading in text
    manifest = predictions.read_manifest(full)
    for fact in ("commit", "command"):
        assert manifest[fact] and manifest[fact] in text
    assert manifest["data_sha256"][0] in text and "torch" in text


def test_explicit_controls_win_over_the_full_set(tmp_path: Path) -> None:
    data = make_mmau(tmp_path / "data", 4)
    with serving(Hearing) as address:
        more = ["--full", "--controls", "silence,shuffled_options", "--permutations", "1"]
        assert main(command(data, tmp_path / "run", address, *more)) == 0
    counts = Counter(row.control for row in predictions.read(tmp_path / "run"))
    assert counts == {"": 4, "silence": 4, "shuffled_options": 4}
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_model_that_must_hear_is_not_asked_without_sound(tmp_path: Path, capsys) -> None:
    data = make_questions(tmp_path / "data", 6)
    training.fit(recipe_of(data, tmp_path / "model", steps=1, save_steps=None))
    asked = ["eval", str(tmp_path / "model"), str(data), "--benchmark", "dcase_aqa", "--out", str(tmp_path / "run")]
    assert main([*asked, "--full", "--quiet"]) == 0
    assert "without the control text_only: echotwin cannot be asked without audio" in capsys.readouterr().out
    controls = {row.control for row in predictions.read(tmp_path / "run")}
    assert controls == {"", "silence", "other_audio", "shuffled_options"}
    assert main([*asked, "--full", "--quiet"]) == 0  # and is known as finished
    assert "answered already" in capsys.readouterr().out
    assert main([*asked, "--full", "--overwrite", "--controls", "all"]) == 2  # who asks for it is told
    assert "control 'text_only': echotwin cannot be asked without audio" in capsys.readouterr().err


def test_the_same_predictions_give_the_same_page_and_scores(full: Path, tmp_path: Path, capsys) -> None:
    page, scores = (full / "report.html").read_bytes(), (full / "scores.json").read_bytes()
    rows = (full / "scores.jsonl").read_bytes()
    assert main(["rescore", str(full)]) == 0
    assert main(["report", str(full), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == page
    assert ((full / "scores.json").read_bytes(), (full / "scores.jsonl").read_bytes()) == (scores, rows)


def test_what_the_sound_adds_is_counted_by_hand(full: Path) -> None:
    run = load(full)
    rows = predictions.read(full)
    right = {(row.id, row.control): row.gold in row.raw for row in rows if row.control in ("", "silence")}
    ids = {row.id for row in rows}
    won = sum(right[name, ""] and not right[name, "silence"] for name in ids)
    lost = sum(right[name, "silence"] and not right[name, ""] for name in ids)
    text = words(hearing.controls([run]))
    assert f"+{100 * (won - lost) / len(ids):.1f}" in text and f"{won} : {lost}, p" in text


def test_places_are_counted_by_hand(full: Path) -> None:
    """In silence this listener says the first option always; with sound it has no habit."""
    run = load(full)
    rows = [row for row in predictions.read(full) if row.control in ("", "shuffled_options")]
    gold = Counter(row.choices.index(row.gold) for row in rows)
    drawn = hearing.positions(run)
    for place, letter in enumerate("ABCD"):
        for name in ("answered", "right option"):
            assert f"{name}: {100 * gold[place] / len(rows):.1f} %" in drawn, letter
    silent = [dataclasses.replace(row, control="") for row in run.passes["silence"]]
    drawn = hearing.positions(Run("silent", silent, run.scorers))
    assert "answered: 100.0 % [91.2, 100.0], 40 questions" in drawn


def test_bars_by_difficulty_stand_in_its_order(full: Path) -> None:
    drawn = results.by_kind([load(full)])
    part = drawn[drawn.index("By difficulty") :]
    assert re.findall(r">(easy|medium|hard)<", part) == ["easy", "medium", "hard"]


def test_every_order_is_a_mean_over_the_same_questions() -> None:
    """A question with two options has one other order; it must not make the later orders those of harder questions."""
    rows = [row(f"easy{n}", 0, right=True) for n in range(9)]
    rows += [row("hard", sample, right=sample == 0) for sample in range(3)]
    found = permutations(score_rows(rows, *get_scorers(["option-resolution"])))
    assert found is not None and found.k == 3
    assert (found.worst.value, found.worst.n, found.all_k.value) == (0.9, 10, 0.9)


def row(name: str, sample: int, right: bool) -> predictions.Prediction:
    raw = "yes" if right else "no"
    return predictions.Prediction(
        name, "q", "f", "?", ["yes", "no"], "yes", raw=raw, control="shuffled_options", sample=sample
    )


def test_directions_of_one_word_and_of_several_have_their_own_maps() -> None:
    places = [("left, front, above; 2m", "left, behind; 1m"), ("right, front, below; 2m", "right, front, below; 2m")]
    rows = [
        predictions.Prediction(f"p{n}", "DOA", "spatialsoundqa", "Where?", [], gold, raw=f"<answer>{said}</answer>")
        for n, (gold, said) in enumerate(places)
    ] + [predictions.Prediction("s", "side", "mmau", "Which side?", ["left", "right"], "left", raw="right")]
    drawn = hearing.directions(Run("places", rows, get_scorers(["option-resolution"])))
    assert re.findall(r"<figcaption>([^<]*) <small>(\d+) q", drawn) == [
        ("side", "1"),
        ("left/right", "2"),
        ("front/behind", "2"),
        ("above/below", "2"),
    ]
    tips = re.findall(r"true (\w+), answered (\w+): ([1-9])", drawn)
    assert ("front", "behind", "1") in tips and ("above", "none", "1") in tips and ("left", "right", "1") in tips


def test_two_runs_with_the_same_seed_are_the_same_run(checkpoint, shards, tmp_path: Path) -> None:
    """A real model, sampling included; only the wall time of a reply may differ."""
    for name in ("first", "second"):
        arguments = ["eval", str(checkpoint()), str(shards(count=8)), "--out", str(tmp_path / name), "--quiet"]
        arguments += ["--engine", "transformers", "--temperature", "0,1", "--max-tokens", "12", "--full"]
        assert main(arguments) == 0
    assert lines(tmp_path / "first") == lines(tmp_path / "second")
    sampled = [entry["raw"] for entry in lines(tmp_path / "first") if entry["temperature"] == 1]
    assert len(set(sampled)) > 1
    first, second = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("first", "second"))
    first["summary"].pop("name"), second["summary"].pop("name")
    assert first == second
