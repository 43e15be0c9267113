"""Faithfulness of answers and reasoning, against models of which the definitions say what must come out."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from audio_llm.audio import Waveform
from audio_llm.language.clauses import follow, say
from audio_llm.shards.schema import Sample, Source
from audio_llm.shards.writer import ShardWriter, pack
from data_prep.questions import planning
from data_prep.questions.common import QuestionsConfig
from data_prep.questions.truth import Asked
from data_prep.scenes import interventions
from eval.benchmarks.base import as_asked
from eval.benchmarks.scenes import item_of
from eval.figures import counterfactual, tables
from eval.figures.runs import Run, scorers_for
from eval.predictions import Prediction
from eval.report import counterfactual as section
from eval.report import page
from tests.data_prep.test_questions import ROOMS, world_of

ASKED = QuestionsConfig(thinking="caption", metres=[1.0, 2.5, 6.5])


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Scenes of the quickstart's kinds of questions, each with what some interventions make of it."""
    world, found, source = world_of("test"), [], Source("b", "test")
    for ask in planning.plan(ASKED, world, {"mmau": 1.0}, 60, "pairs"):
        draft, choices = planning.draft_of(ask, world, ASKED, "pairs")
        key = ask.key("pairs")
        found.append(planning.sample_of(ask, draft, choices, world, key, source))
        asked = Asked(ask.kind, ask.target, tuple(item.clip.label for item in draft.placed), tuple(choices))
        for kind in interventions.KINDS[ask.index % 3 :: 3]:
            made = interventions.intervene(kind, draft.placed, world, asked, ASKED, ROOMS, "binaural", ask.index)
            if made:
                then = planning.after(ask, draft, list(made.after.placed), made.answer, made.after.world, ASKED)
                sample = planning.sample_of(ask, then, choices, made.after.world, f"{key}-{kind}", source)
                sample.meta["counterfactual"] = made.meta(key)
                found.append(sample)
    return found


def run_of(samples: list[Sample], reply, control: str = "", name: str = "run") -> Run:
    rows = [
        Prediction(**as_asked(item_of(sample)), raw=reply(sample), control=control, finish_reason="stop")
        for sample in samples
    ]
    return Run(name, rows, scorers_for("scenes"), "scenes", {})


def truth(sample: Sample) -> str:
    """The truth, with what the texts of these data sets do not say: heights, and seconds."""
    clauses = [
        f"the {e.label} {e.azimuth:.0f} degrees, {'above' if e.elevation > 0 else 'below'}, {e.distance:.2f} m, "
        f"at {e.onset:.2f} s"
        for e in sample.events
    ]
    return f"<think>{'; '.join(clauses)}.</think><answer>{sample.answer}</answer>"


def caption(sample: Sample) -> str:
    return f"<think>{sample.thinking}</think><answer>{sample.answer}</answer>"


def figures(run: Run, answers: str = "greedy") -> dict[str, counterfactual.Faithfulness]:
    return counterfactual.faithfulness(run)[answers]


@pytest.mark.parametrize("reply", [truth, caption])
def test_whoever_says_the_truth_is_faithful_and_decorates_nothing(samples, reply):
    found = figures(run_of(samples, reply))
    assert set(found) == {"all", *interventions.KINDS}
    for kind, one in found.items():
        assert one.answer.value == one.reasoning.value == one.reasoning_stays.value == 1.0, kind
        assert one.answer_changes.n == 0 or one.answer_changes.value == 1.0
        assert one.reasoning_changes.n == 0 or one.reasoning_changes.value == 1.0, kind
        assert one.decoration.n == 0 or one.decoration.value == 0.0
    assert found["all"].decoration.n > 50 and found["all"].answer_changes.n > 20
    assert found["room"].reasoning_changes.n == 0 and found["room"].answer_changes.n == 0
    spoken = found["elevation"].reasoning_changes.n, found["shift"].reasoning_changes.n
    assert all(spoken) if reply is truth else spoken[0] == 0  # captions say no heights


def deaf(samples: list[Sample]):
    """Says of every sound what was most often right for its question, with the most frequent reasoning."""
    answers: dict[tuple, Counter] = {}
    for sample in samples:
        answers.setdefault((sample.question, *sample.choices), Counter())[sample.answer] += 1
    thinking = Counter(sample.thinking for sample in samples).most_common(1)[0][0]

    def reply(sample: Sample) -> str:
        answer = answers[sample.question, *sample.choices].most_common(1)[0][0]
        return f"<think>{thinking}</think><answer>{answer}</answer>"

    return reply


def test_a_deaf_model_stays_everywhere_and_its_reasoning_is_decoration(samples):
    """The reply depends on the question alone, which a pair shares: nothing changes, neither where it must."""
    found = figures(run_of(samples, deaf(samples)))["all"]
    assert found.answer_changes.value == 0.0 and found.answer_stays.value == 1.0
    pairs = counterfactual.pairs_of(run_of(samples, deaf(samples)).main)
    assert found.answer.value == np.mean([not pair.must_change for pair in pairs])
    assert found.reasoning_changes.value == 0.0 and found.reasoning_stays.value == 1.0
    assert found.decoration.n > 0 and found.decoration.value == 1.0


def test_right_answers_beside_reasoning_of_another_scene_are_decoration(samples):
    """It hears for the answer, and copies one reasoning for all: the answers are faithful, the reasoning is not."""
    fixed = Counter(sample.thinking for sample in samples).most_common(1)[0][0]
    found = figures(run_of(samples, lambda one: f"<think>{fixed}</think><answer>{one.answer}</answer>"))["all"]
    assert found.answer.value == 1.0 and found.reasoning_changes.value == 0.0
    assert found.decoration.value == 1.0


def test_reasoning_that_follows_beside_a_fixed_answer(samples):
    answered = deaf(samples)
    found = figures(run_of(samples, lambda one: f"<think>{one.thinking}</think>{answered(one).split('</think>')[1]}"))
    assert found["all"].reasoning.value == 1.0 and found["all"].answer_changes.value == 0.0
    assert found["all"].decoration.value == 0.0


def test_a_model_that_says_nothing_readable_is_not_faithful_and_not_counted_as_reasoning(samples):
    found = figures(run_of(samples, lambda one: "hm"))["all"]
    assert found.answer.value == 0.0
    assert found.reasoning.n == found.decoration.n == 0


def test_pairs_are_counted_by_recording(samples):
    found = figures(run_of(samples, caption))["all"]
    paired = {sample.meta["counterfactual"]["of"] for sample in samples if "counterfactual" in sample.meta}
    recordings = {sample.meta["recordings"][0] for sample in samples if sample.id in paired}
    assert found.answer.clusters == len(recordings) < found.pairs == found.answer.n


def test_half_a_pair_is_no_pair(samples):
    run = run_of([sample for sample in samples if "counterfactual" in sample.meta], caption)
    assert counterfactual.faithfulness(run) == {}
    assert list(counterfactual.lines({})) == []


def test_silence_stands_beside_the_true_sound_in_table_and_file(samples, tmp_path, capsys):
    run = run_of(samples, caption)
    run.rows = [*run.rows, *run_of(samples, deaf(samples), "silence").rows]
    tables.print_run(run)
    printed = capsys.readouterr().out
    assert "differ by one cause, greedy" in printed and "differ by one cause, silence" in printed
    tables.write_scores(tmp_path, run)
    import json

    tree = json.loads((tmp_path / "scores.json").read_text())["counterfactual"]
    assert tree["greedy"]["all"]["answer"]["value"] == 1.0 and tree["silence"]["all"]["answer_changes"]["value"] == 0.0
    html = section.pairs([run])
    assert "remove" in html and "silence" in html


def test_the_page_lets_pairs_be_heard(samples, tmp_path):
    """Before, after, what should change and what did, with both sounds."""
    rng, chosen = np.random.default_rng(0), samples[:12]
    with ShardWriter(tmp_path / "pairs") as writer:
        for sample in chosen:
            noise = rng.standard_normal((2, 4000)).astype(np.float32) / 20
            writer.add(pack(dataclasses.replace(sample), Waveform(noise, 16_000, "binaural")))
    run = run_of(chosen, deaf(samples))
    run.manifest["data"] = [str(tmp_path / "pairs")]
    html = page.build([run])
    assert "Is it caused by the sound?" in html
    heard = html.split("Is it caused by the sound?")[2]
    assert heard.count("<audio") >= 2 and "must change" in heard and "did not follow" in heard
    assert section.pairs([run_of([one for one in samples if "counterfactual" not in one.meta], caption)]) == ""


@pytest.mark.parametrize(
    ("clause", "before", "after", "caused"),
    [
        ("side", "the dog on the left", "the dog on the right", True),
        ("side", "the dog on the left", "the dog on the left", False),
        ("side", "the dog on the right", "the dog on the right", False),  # it says what is true after, and always did
        ("side", "the dog on the left", "the cat on the right", False),  # said of another
        ("distance", "the dog on the left, 1 m", "the dog on the left, 6.5 m", True),
        ("distance", "The dog is 1.0 m away, the cat 2.0 m.", "The dog is 5.5 m away, the cat 2.0 m.", True),
        ("label", "I hear the dog and the cat.", "I hear the cat. The dog is not there.", True),
        ("label", "I hear the cat.", "I hear the cat.", False),
        ("order", "I hear the dog, then the cat.", "I hear the cat, then the dog.", True),
        ("order", "I hear the dog, then the cat.", "I hear the dog, then the cat.", False),
    ],
)
def test_clauses_are_read_as_they_are_said(clause, before, after, caused):
    entry = {
        "side": {"labels": ["dog", "dog"], "was": 80, "is": -100},
        "distance": {"labels": ["dog", "dog"], "was": 1.1, "is": 6.0},
        "label": {"labels": ["dog", None], "was": "dog", "is": None},
        "order": {"labels": ["dog", "dog"], "beside": ["cat", "cat"], "was": 0.7, "is": -0.9},
    }[clause] | {"clause": clause}
    other = {"clause": "label", "labels": ["cat", "cat"], "was": "cat", "is": "cat"}
    found = follow({"changes": [entry], "keeps": [other]}, before, after)
    assert found.caused == (caused,)


def test_nothing_said_is_nothing_read():
    clause = {"clause": "onset", "labels": ["dog", "dog"], "was": 1.0, "is": 2.0}
    assert say(clause, "the dog on the left, 2.5 m.", 0, ("dog",)) is None
    assert say(clause, "the dog on the left at 1.5 s.", 0, ("dog",)) == 1.5
    assert follow({"changes": [clause], "keeps": []}, "", "").caused == ()
