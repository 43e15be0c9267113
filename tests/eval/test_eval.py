"""Evaluation: statistics against scipy, answer reading case by case, controls, and whole runs on every engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.cli import main
from audio_llm.errors import ConfigError
from audio_llm.language.mirroring import mirror_text
from eval import controls, predictions
from eval.benchmarks.base import Item
from eval.figures import estimates, scores
from eval.figures.runs import Run
from eval.predictions import Prediction, PredictionsError, PredictionWriter
from eval.scorers.choice import OptionResolution
from tests.servers import Listener, serving

# ----------------------------------------------------------------------------------------------------- scoring

HEADLINE = OptionResolution()


def scored(rows: list[Prediction]) -> list[scores.Scored]:
    return scores.score_rows(rows, HEADLINE)


DOGS = ["A cat meowing", "A dog barking", "A dog growling", "Rain"]


def row(raw: str, choices: list[str] = DOGS, gold: str = "A dog barking", kind: str = "identity", **more) -> Prediction:
    fields = dict(id="a", question_type=kind, format="mmau", question="?", choices=choices, gold=gold, raw=raw) | more
    return Prediction(**fields)


@pytest.mark.parametrize(
    ("raw", "value", "parsed"),
    [
        # The table on which public scorers disagree, with what each row deserves.
        ("A dog barking", 1, True),
        ("B", 1, True),
        ("B. A dog barking", 1, True),
        ("The sound is a dog barking.", 1, True),
        ("It is a dog barking, not a cat meowing.", 1, True),
        ("<think>Could be rain, but no.</think><answer>A dog barking</answer>", 1, True),
        ("", 0, False),
        ("<think>First, I listen to the spectral", 0, False),
        ("A dog growling", 0, True),
        ("<answer>(B) Rain</answer>", 0, False),
        ("<answer>(B) A dog barking</answer>", 1, True),
        ("<answer>(D) Rain</answer>", 0, True),
    ],
)
def test_choice_scores(raw: str, value: int, parsed: bool) -> None:
    found = HEADLINE.score(row(raw))
    assert found is not None
    assert (found.value, found.parsed) == (value, parsed)
    assert found.explanation


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "value", "parts"),
    [
        ("CLASSIFICATION", "car; vehicle", "Vehicle; car", 1, {}),
        ("CLASSIFICATION", "accelerating, revving, vroom; car", "car; accelerating, revving, vroom", 1, {}),
        ("CLASSIFICATION", "car; vehicle", "car", 0, {}),
        ("CLASSIFICATION", "car", "car; vehicle", 0, {}),
        ("DOA", "left, front, below; 1m", "left, front, below; 1.5m", 1, {"distance": 1}),
        (
            "DOA",
            "left, front, below; 1m",
            "left, front, above; 1m",
            0,
            {"above/below": 0, "left/right": 1, "distance": 1},
        ),
        ("DOA", "left, front, below; 1m", "left, front, below; 2m", 1, {"distance": 0}),
        ("DOA", "left, front, below; 1m", "left, right, front, below; 1m", 0, {"left/right": 0}),
        ("MIXUP_SINGLE_DOA", "right, behind, above; 3.5m", "Right, Behind, Above; 4 m", 1, {"distance": 1}),
        ("MIXUP_DIRECTION", "Yes", "yes, it is", 1, {}),
        ("MIXUP_DIRECTION", "No", "Yes", 0, {}),
        ("MIXUP_DISTANCE_BOTH", "Yes", "yes and no", 0, {}),
        ("MIXUP_NONBINARY_DISTANCE", "2m", "2.5m", 1, {}),
        ("MIXUP_NONBINARY_DISTANCE", "2m", "2.6 m", 0, {}),
        ("MIXUP_NONBINARY_DISTANCE", "2m", "between 1m and 3m", 0, {}),
        ("MIXUP_NONBINARY_DIRECTION", "behind", "behind", 1, {}),
        ("MIXUP_NONBINARY_DIRECTION", "behind", "front", 0, {}),
        ("MIXUP_NONBINARY_SOURCE", "dog bark", "dog bark", 1, {}),
    ],
)
def test_open_scores(kind: str, gold: str, answer: str, value: int, parts: dict[str, int]) -> None:
    found = HEADLINE.score(row(f"<answer>{answer}</answer>", [], gold, kind))
    assert found is not None
    assert found.value == value
    assert {name: found.parts[name] for name in parts} == parts


@pytest.mark.parametrize("kind", ["yes_no", "distance", "direction", "place", "labels"])
def test_open_answers_that_say_nothing_are_counted_as_unread(kind: str) -> None:
    golds = {"yes_no": "Yes", "distance": "2m", "direction": "left", "place": "left, front, above; 1m", "labels": "dog"}
    rows = [row(raw, [], golds[kind], "free") for raw in ("", "<think>left yes 2m", "<answer></answer>")]
    cell = scores.summarise(scored([dataclasses.replace(entry, id=str(i)) for i, entry in enumerate(rows)]))
    assert (cell.accuracy.value, cell.parse_failures) == (0, 3)


def test_chance_is_that_of_the_choices_or_of_the_best_constant_answer() -> None:
    rows = [row("x", DOGS, id="a"), row("x", ["yes", "no"], "yes", id="b")]
    assert list(scores.chance_levels(scored(rows)).values()) == [0.25, 0.5]
    golds = ["left, front, above; 1m", "left, front, above; 4m", "right, front, above; 1m", "left, behind, below; 2m"]
    places = [row("x", [], gold, "DOA", id=str(index)) for index, gold in enumerate(golds)]
    assert set(scores.chance_levels(scored(places)).values()) == {0.5}  # "left, front, above" with any distance
    metres = [row("x", [], f"{gold}m", "MIXUP_NONBINARY_DISTANCE", id=str(gold)) for gold in (1, 1.5, 2, 5)]
    assert set(scores.chance_levels(scored(metres)).values()) == {0.75}  # 1.5 m is within half a metre of three of them


def test_chance_counts_an_option_as_often_as_it_stands_there() -> None:
    cell = scores.summarise(scored([row("b", ["a", "b", "b", "b"], "b")]))
    assert cell.chance == 0.75
    assert scores.summarise(scored([row("b", ["a", "b", "b", "b"], "a")])).chance == 0.25


def test_groups_are_named_by_what_the_benchmark_says_be_it_zero_no_or_a_field_of_ours() -> None:
    meta = [{"fold": n % 2, "noisy": n > 1, "seed": "low", "sample": "s", "clip": "c", "empty": ""} for n in range(4)]
    rows = scored([row("B", id=str(n), meta=entry, clip=f"clip{n}") for n, entry in enumerate(meta)])
    names = {name: sorted(scores.by(rows, name)) for name in ("fold", "noisy", "seed", "sample", "clip", "empty")}
    assert names["fold"] == ["0", "1"] and names["noisy"] == ["False", "True"] and names["clip"] == ["c"]
    assert names["seed"] == ["low"] and names["sample"] == ["s"] and names["empty"] == ["not stated"]
    assert list(scores.by(rows, "question_type")) == ["identity"] and list(scores.by(rows, "reply")) == ["not stated"]
    plain = scored([row("B", id=str(n), clip=f"clip{n}", meta={"recordings": ["r"]}) for n in range(2)])
    assert len(scores.by(plain, "clip")) == 2 and plain[0].row.cluster == plain[1].row.cluster == "r"


def test_unread_replies_are_a_share_of_replies() -> None:
    """Three of four samples of each of ten questions cannot be read: 75 %, not 300 % of the questions."""
    rows = [row("B" if s == 3 else "??", id=str(i), temperature=1.0, sample=s) for i in range(10) for s in range(4)]
    cell = scores.summarise(scored(rows))
    assert (cell.parse_failures, cell.replies, cell.unread.value) == (30, 40, 0.75)


def test_controls_are_compared_with_the_pass_of_their_own_temperature() -> None:
    """A deaf model, sure of itself greedily and at chance when sampled: the sound adds nothing in any order."""
    rng = np.random.default_rng(0)

    def asked(control: str, temperature: float) -> list[Prediction]:
        sure = temperature < 0.5
        return [
            row(
                "b" if sure or rng.random() < 0.5 else "a",
                ["a", "b"],
                "b",
                id=f"{n}",
                temperature=temperature,
                control=control,
            )
            for n in range(200)
        ]

    for temperatures in ([0.0, 1.0], [1.0, 0.0], [0.3, 1.0], [1.0, 0.3], [0.7]):
        rows = [entry for temperature in temperatures for entry in asked("", temperature)]
        controlled = ("silence", "text_only", "shuffled_options")
        rows += [entry for control in controlled for entry in asked(control, temperatures[0])]
        run = Run("deaf", rows, [HEADLINE])
        for found in run.summary.contributions.values():
            assert found.difference.low <= 0 <= found.difference.high and found.difference.n == 200
        temperature = run.passes[run.summary.beside["silence"]][0].temperature
        assert temperature == temperatures[0] and set(run.summary.beside) == set(controlled)


def test_errors_change_the_counts_and_nothing_else() -> None:
    rows = [row("B" if i % 3 else "A", id=str(i)) for i in range(30)]
    before = scores.summarise(scored(rows))
    after = scores.summarise(scored([*rows, row("", id="broken", error="corrupt")]))
    assert after.accuracy == before.accuracy
    assert (before.errors, after.errors, after.accuracy.n) == (0, 1, 30)


def test_several_samples_of_a_question_count_as_one_question() -> None:
    rows = [row("B" if s < i % 5 else "A", id=str(i), temperature=1.0, sample=s) for i in range(40) for s in range(4)]
    cell = scores.summarise(scored(rows))
    assert cell.accuracy.n == 40
    assert cell.accuracy.value == pytest.approx(np.mean([min(i % 5, 4) / 4 for i in range(40)]))


def test_questions_about_one_clip_widen_the_interval_of_the_accuracy() -> None:
    right = [clip < 6 for clip in range(10) for _ in range(4)]
    apart = [row("B" if yes else "A", id=f"{n}") for n, yes in enumerate(right)]
    shared = [dataclasses.replace(entry, clip=f"{n // 4}") for n, entry in enumerate(apart)]
    alone, found = scores.summarise(scored(apart)).accuracy, scores.summarise(scored(shared)).accuracy
    assert alone == estimates.wilson(24, 40)
    assert (found.value, found.n) == (alone.value, 40) and found.high - found.low > 1.6 * (alone.high - alone.low)
    one_each = [dataclasses.replace(entry, clip=f"{n}") for n, entry in enumerate(apart)]
    assert scores.summarise(scored(one_each)).accuracy == alone


def test_flips_tell_followers_from_the_stubborn() -> None:
    def side(item: str, said: str, gold: str, control: str = "") -> Prediction:
        return row(f"<answer>{said}</answer>", ["left", "right"], gold, "side", id=item, control=control)

    greedy = [side("a", "left", "left"), side("b", "left", "left"), side("c", "right", "left")]
    swapped = [
        side("a", "right", "right", "swap"),
        side("b", "left", "right", "swap"),
        side("c", "right", "right", "swap"),
    ]
    found = scores.flips(scored(greedy), scored(swapped))
    assert (found.flipped, found.stuck, found.share.n) == (1, 1, 2)


# ------------------------------------------------------------------------------------------------------ predictions


@given(st.lists(st.text(max_size=40), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_reply_survives_the_file(tmp_path_factory: pytest.TempPathFactory, replies: list[str]) -> None:
    path = tmp_path_factory.mktemp("predictions") / "predictions.jsonl"
    rows = [row(reply, id=str(index)) for index, reply in enumerate([*replies, "\u2028 \x85 \ud800 end"])]
    with PredictionWriter(path) as writer:
        writer.write(rows)
    assert predictions.read(path) == rows


def test_a_torn_last_line_is_cut_and_a_torn_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    with PredictionWriter(path) as writer:
        writer.write([row("B", id="a"), row("C", id="b")])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 3])
    assert [entry.id for entry in predictions.mend(path)] == ["a", "b"]
    assert path.read_bytes() == whole
    path.write_bytes(whole[:30] + b"\n" + whole)
    with pytest.raises(PredictionsError, match=r"predictions\.jsonl line 1: expected one JSON object"):
        predictions.read(path)
    path.write_bytes(whole.replace(b'"b"', b'"\xff"'))
    with pytest.raises(PredictionsError, match=r"line 2: expected UTF-8 text, found other bytes\. Delete that"):
        predictions.mend(path)
    path.write_bytes(whole + whole)
    with pytest.raises(PredictionsError, match="line 3: expected every item once a pass, found 'a' twice"):
        predictions.read(path)
    path.write_text(json.dumps(json.loads(row("B", id="a").to_json()) | {"events": [{"label": "dog", "azimuth": "x"}]}))
    with pytest.raises(PredictionsError, match="line 1: 'events': expected a value of type"):
        predictions.read(path)


# --------------------------------------------------------------------------------------------------------- controls


def item(question: str, choices: list[str], gold: str, **more) -> Item:
    fields = dict(id="i", question_type="side", format="mmau", clip="c") | more
    return Item(question=question, choices=choices, gold=gold, **fields)


@pytest.mark.parametrize(
    ("question", "choices", "gold", "mirrored"),
    [
        ("On which side is the dog?", ["left", "right"], "left", "right"),
        ("Where is it?", [], "left, front, above; 2m", "right, front, above; 2m"),
        ("Where is it?", ["front", "left", "behind", "right"], "front", None),
        ("Where is it?", ["On the left", "Ahead"], "On the left", None),  # the mirror is not on offer
        ("Is the dog to the left of the cat?", [], "Yes", "No"),
        ("Is the dog to the left of the cat?", [], "No", None),
        ("Is the sound of a dog on the right of the sound of a cat?", ["Yes", "No"], "Yes", "No"),
        ("Is the dog heard on the left further away than the cat?", [], "Yes", None),  # distance has no mirror
        ("Is the dog to the left of the cat louder than the bell?", [], "Yes", None),
        ("Is there a sound on the left?", [], "Yes", None),  # there may be one on either side
        ("Is a dog to the left of the cat?", [], "Yes", None),
        ("Is the dog left or right of the cat?", ["yes", "no"], "yes", None),
        ("Which sound?", ["copyright song", "rain"], "copyright song", None),
    ],
)
def test_swap_knows_the_mirrored_truth(question: str, choices: list[str], gold: str, mirrored: str | None) -> None:
    events = [{"label": "dog", "azimuth": 70.0}]
    found = controls.swap(item(question, choices, gold, events=events), 0)
    assert (found.gold if found else None) == mirrored
    if found:
        assert found.events == [{"label": "dog", "azimuth": -70.0}]
        assert mirror_text(mirror_text(gold)) == gold


def test_a_comparison_of_spatial_sound_qa_is_mirrored_by_its_type() -> None:
    question = "Is the car horn left of the church bell ringing?"
    for kind, mirrored in (("MIXUP_DIRECTION", "No"), ("MIXUP_DISTANCE_BOTH", None)):
        found = controls.swap(item(question, [], "Yes", question_type=kind), 0)
        assert (found.gold if found else None) == mirrored


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=6, unique=True), st.integers(0, 99))
def test_shuffled_options_keep_the_options_and_move_them(choices: list[str], seed: int) -> None:
    found = controls.shuffled_options(item("?", choices, choices[0]), seed)
    assert found is not None
    assert sorted(found.choices) == sorted(choices)
    assert found.choices != choices
    assert found.gold == choices[0]
    assert found == controls.shuffled_options(item("?", choices, choices[0]), seed)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), st.integers(0, 5), st.data())
@settings(deadline=None)
def test_other_audio_is_another_clip_and_that_of_an_unusable_item_nobodys(
    clips: list[str], seed: int, data: st.DataObject
) -> None:
    items = [item("?", [], "x", id=f"{place}", clip=clip) for place, clip in enumerate(clips)]
    partners = controls.Partners(items, seed)
    first = [next(partners.of(place), None) for place in range(len(items))]
    for place, clip in enumerate(clips):
        heard = list(partners.of(place))
        assert sorted(heard) == [other for other, foreign in enumerate(clips) if foreign != clip]
    # One more item, first in the list: whoever draws another keeps it, and without its sound nothing changes.
    more = [item("?", [], "x", id="new", clip=data.draw(st.sampled_from("abcg"))), *items]
    later = controls.Partners(more, seed)
    for place, old in enumerate(first):
        assert next(later.of(place + 1), None) in (0, None if old is None else old + 1)
    known = controls.Partners(more, seed, {"new"})
    later.drop(0)
    for partners in (known, later):
        found = [next(partners.of(place + 1), None) for place in range(len(items))]
        assert found == [None if old is None else old + 1 for old in first]


def test_other_audio_is_drawn_from_all_others() -> None:
    items = [item("?", [], "x", id=f"{place}", clip=f"{place}") for place in range(400)]
    partners = controls.Partners(items, 0)
    times = np.bincount([next(partners.of(place)) for place in range(400)], minlength=400)
    assert 0.3 < (times == 0).mean() < 0.45 and times.max() < 8  # as of 400 free draws: 1/e of them never
    again = controls.Partners(items, 1)
    assert np.mean([next(partners.of(place)) != next(again.of(place)) for place in range(400)]) > 0.9


def test_unknown_control_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'silence'"):
        controls.parse_controls("silense")
    assert controls.parse_controls("all") == list(controls.CONTROLS)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_controls_find_out_a_model_that_listens(shards, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    with serving(Listener, broken_until=2) as address:
        assert (
            main(
                ["eval", "listener", str(shards(count=60)), "--out", str(out), "--engine", address, "--controls", "all"]
            )
            == 0
        )
    summary = json.loads((out / "scores.json").read_text())["summary"]
    assert summary["greedy"]["accuracy"]["value"] == 1.0
    assert summary["controls"]["shuffled_options"]["accuracy"]["value"] == 1.0
    assert summary["controls"]["swap"]["accuracy"]["value"] == 1.0
    followed = {"value": 1.0, "low": pytest.approx(0.94, abs=0.01), "high": 1.0, "n": 60, "clusters": 60}
    assert summary["flips"]["share"] == followed
    rows = predictions.read(out)
    left = np.mean([entry.gold == "left" for entry in rows if entry.control == ""])
    assert summary["controls"]["silence"]["accuracy"]["value"] == pytest.approx(left)  # silence: always "left"
    assert 0.2 < summary["controls"]["other_audio"]["accuracy"]["value"] < 0.8
    assert summary["greedy"]["chance"] == 0.5
    assert all(entry.prompt_tokens == 20 and entry.finish_reason == "stop" and entry.prompt_hash for entry in rows)
    manifest = predictions.read_manifest(out)
    sizes = (shards(count=60) / "sizes.json").read_bytes()
    assert manifest["data_sha256"] == [hashlib.sha256(sizes).hexdigest()]
    assert "swap: right answers that follow" in capsys.readouterr().out


class Obedient(Listener):
    """Gives the letter of the choice where the last line of the question asks for one."""

    def heard(self, text: str, samples: np.ndarray | None) -> str:
        side, lines = super().heard(text, samples), text.splitlines()
        return next(line[1] for line in lines if line[4:] == side) if "letter" in lines[-1] else side


@pytest.mark.parametrize(("flags", "last"), [
    (["--answer-as", "letter"], "Answer with the letter of one choice only."),
    (["--answer-as", "letter", "--instruction", "Only the letter, please."], "Only the letter, please."),
    (["--instruction", "Think first."], "Think first."),
])  # fmt: skip
def test_what_is_asked_for_reaches_the_model_and_is_stored(shards, tmp_path: Path, flags, last) -> None:
    data, out = str(shards(count=12)), tmp_path / "run"
    with serving(Obedient) as address:
        command = ["eval", "listener", data, "--out", str(out), "--engine", address, "--controls", "shuffled_options"]
        assert main([*command, *flags]) == 0
        assert main([*command, "--answer-as", "option"]) == 2  # other words, other answers: not the same run
    rows = predictions.read(out)
    assert {row.instruction for row in rows} == {last} and {row.answer_as for row in rows} == {
        "letter" if "--answer-as" in flags else ""
    }
    assert all(row.choices[row.reply().choice] == row.gold for row in rows)
    assert all(("letter" in last) == (len(row.reply().answer) == 1) for row in rows)


def test_a_finished_run_is_not_asked_again_and_another_one_not_mixed_in(shards, tmp_path: Path, capsys) -> None:
    arguments = ["eval", "listener", str(shards(count=60)), "--out", str(tmp_path / "run"), "--limit", "10"]
    with serving(Listener) as address:
        assert main([*arguments, "--engine", address]) == 0
    before = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    assert main([*arguments, "--engine", address]) == 0  # the endpoint is gone, and not needed
    assert "answered already" in capsys.readouterr().out
    assert main([*arguments, "--seed", "1", "--engine", address]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == before


def test_refused_requests_and_corrupt_audio_are_rows_with_errors(shards, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards(count=60), folder)
    from audio_llm.shards.reader import ShardDataset

    where, place = ShardDataset(folder).locate(7)
    with open(where / place.shard, "r+b") as file:  # the tar stays whole, one FLAC in it does not
        file.seek(place.audio_offset)
        file.write(b"\0" * 64)
    names = {}
    for name, data in (("whole", shards(count=60)), ("broken", folder)):
        with serving(Listener) as address:
            out = tmp_path / name
            assert (
                main(["eval", "listener", str(data), "--out", str(out), "--engine", address, "--controls", "none"]) == 0
            )
        names[name] = {entry.id: entry for entry in predictions.read(out)}
    errors = [entry for entry in names["broken"].values() if entry.error]
    assert [entry.id for entry in errors] == [place.key]
    assert "decodable audio" in errors[0].error
    for key, entry in names["broken"].items():
        if key != place.key:
            assert (entry.raw, entry.prompt_hash, entry.seed) == (
                names["whole"][key].raw,
                names["whole"][key].prompt_hash,
                names["whole"][key].seed,
            )
    assert scores.summarise(scored(list(names["broken"].values()))).accuracy.n == 59


def test_an_endpoint_that_refuses_everything_stops_the_run_and_keeps_its_answers(
    shards, tmp_path: Path, capsys
) -> None:
    class Tired(Listener):
        def chat(self, body: dict) -> None:
            if self.calls > 30:
                self.reply(400, {"error": "no more"})
            else:
                super().chat(body)

    out = tmp_path / "run"
    command = ["eval", "listener", str(shards(count=60)), "--out", str(out), "--batch-size", "2"]
    with serving(Tired) as address:
        assert main([*command, "--engine", address]) == 2
    assert "no more" in capsys.readouterr().err
    answered = [entry for entry in predictions.read(out) if not entry.error]
    assert len(answered) >= 28


def test_bad_arguments_are_one_line(shards, tmp_path: Path, capsys) -> None:
    base = ["eval", str(tmp_path / "nothing"), str(shards()), "--out", str(tmp_path / "run")]
    for more, message in [
        (["--temperature", "warm"], "expected numbers such as 0,1"),
        (["--temperature", "nan"], "expected different numbers of at least 0"),
        (["--temperature", "1,inf"], "expected different numbers of at least 0"),
        (["--controls", "silense"], "did you mean 'silence'"),
        (["--controls", "silence,swap,silence"], "control 'silence': expected once, found 2 times"),
        (["--seed", "-1"], "--seed: expected at least 0, found -1"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
        (["--samples", "0"], "expected at least 1"),
        (["--style", "loud"], "expected one of answer, think, think_semantics"),
        (["--style", "thnk"], "did you mean 'think'"),
        (
            ["--engine", "vlm"],
            "an address http://HOST:PORT/v1): expected one of echotwin, http, transformers, vllm",
        ),
        ([], "checkpoint folder with config.json"),
        (["--engine", "transformers"], "checkpoint folder with config.json"),
    ]:
        assert main([*base, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists(), "a run that cannot begin leaves nothing"


def test_a_question_longer_than_the_model_is_that_rows_alone(checkpoint, shards, tmp_path: Path) -> None:
    from audio_llm.answering.base import Request
    from audio_llm.answering.engines import open_engine
    from eval.benchmarks import open_benchmark

    model = str(checkpoint(channels=2))
    found = open_benchmark("scenes", shards(count=24))
    items = found.items[:3]
    items[1] = dataclasses.replace(items[1], question="rain " * 5000)
    engine = open_engine("transformers", model, batch_size=3)
    waves = [engine.prepare(found.waveform(row), "clip") for row in range(3)]
    # Sampling at a temperature beyond float32 scales every score to 0 or to nothing: the placeholder is never drawn.
    requests = [Request(item, (wave,), None, 1e300, 4, 7) for item, wave in zip(items, waves, strict=True)]
    answers = list(engine.generate(requests))
    assert [bool(answer.error) for answer in answers] == [False, True, False]
    assert "expected fewer tokens than the model's 1024 positions" in answers[1].error
    alone = list(engine.generate([requests[0], requests[2]]))
    assert [answer.raw for answer in alone] == [answers[0].raw, answers[2].raw]


def _answers(out: Path) -> list[tuple]:
    return [(*entry.key, entry.raw, entry.gold, entry.prompt_hash, entry.seed) for entry in predictions.read(out)]


def test_a_killed_run_goes_on_as_if_it_had_not_been(checkpoint, shards, tmp_path: Path) -> None:
    common = [
        str(checkpoint()),
        str(shards()),
        "--engine",
        "transformers",
        "--temperature",
        "0,1",
        "--controls",
        "swap",
    ]
    common += ["--max-tokens", "8", "--seed", "3"]
    assert main(["eval", *common, "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "audio_llm", "eval", *common, "--out", str(killed), "--batch-size", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    path, deadline = killed / "predictions.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(predictions.mend(path))
    assert 0 < kept < len(_answers(tmp_path / "whole"))
    with path.open("a") as file:
        file.write('{"id": "torn')
    assert main(["eval", *common, "--out", str(killed)]) == 0
    assert _answers(killed) == _answers(tmp_path / "whole")
