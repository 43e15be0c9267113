"""Answers recomputed from the ground truth alone, the published grammars, and questions that words do not answer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.errors import ConfigError
from audio_llm.shards.schema import Sample, Source
from data_prep import sounds, text_check
from data_prep.questions import planning, records
from data_prep.questions.common import QuestionsConfig
from data_prep.scenes import rooms
from data_prep.scenes.world import EventsConfig, Margins, World

ROOMS = rooms.RoomsConfig(positions=64, listeners=2)
CONFIG = QuestionsConfig(
    choice=dict.fromkeys(planning.CHOICE_KINDS, 1.0), spatialsoundqa=dict.fromkeys(planning.OPEN_KINDS, 1.0)
)
FORMATS = {"mmau": 0.4, "dcase_aqa": 0.2, "spatialsoundqa": 0.4}


def world_of(split: str) -> World:
    clips = sounds.builtin(None, 30, (0.5, 4.0), 0).clips
    found = [rooms.draw_room(ROOMS, split, index, 0) for index in range(12)]
    return World(clips, found, 6.0, EventsConfig(seconds=(0.8, 3.0)), Margins())


def samples_of(world: World, count: int, *seed: object, formats=FORMATS, config=CONFIG) -> list[Sample]:
    found = []
    for ask in planning.plan(config, world, formats, count, *seed):
        draft, choices = planning.draft_of(ask, world, config, *seed)
        found.append(planning.sample_of(ask, draft, choices, world, f"q-{ask.index}", Source("b", "s")))
    return found


@pytest.fixture(scope="module")
def train() -> list[Sample]:
    return samples_of(world_of("train"), 6000, "train")


@pytest.fixture(scope="module")
def test() -> list[Sample]:
    return samples_of(world_of("test"), 3000, "test")


def of_kind(samples: list[Sample], name: str) -> list[Sample]:
    found = [sample for sample in samples if sample.meta["question_type"] == name]
    assert len(found) >= 50
    return found


# ---------------------------------------------------------------- answers, recomputed without the simulator


def xyz(event) -> np.ndarray:
    a, e = math.radians(event.azimuth), math.radians(event.elevation)
    return event.distance * np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])


def named(sample: Sample, pattern: str):
    """The events whose classes stand in the question where `pattern` has groups."""
    match = re.search(pattern, sample.question)
    assert match, sample.question
    by_label = {event.label: event for event in sample.events}
    return [by_label[name] for name in match.groups()]


def labels(sample: Sample) -> set[str]:
    return {event.label for event in sample.events}


def words_of(event) -> list[str]:
    """SpatialSoundQA's three words from its own label formulas (x right, y up, z to the back)."""
    x, y, z = -xyz(event)[1], xyz(event)[2], -xyz(event)[0]
    azimuth, elevation = math.degrees(math.atan2(-z, x)) % 360, math.degrees(math.atan(y / math.hypot(x, z)))
    side = "left" if 90 < azimuth < 270 else "right"
    return [side, "front" if 0 < azimuth < 180 else "behind", "above" if elevation > 0 else "below"]


def half_metre_class(distance: float) -> str:
    return f"{round(2 * distance) / 2:g}m"


BESIDE = {"left": (1, 1), "right": (1, -1), "front": (0, 1), "behind": (0, -1), "above": (2, 1), "below": (2, -1)}
SAID = {
    "to the left of": "left",
    "to the right of": "right",
    "in front of": "front",
    "behind": "behind",
    "above": "above",
    "below": "below",
}
XY = r"(?:the sound of )?the (\w+)"


def lies(word: str, first, second) -> bool:
    axis, sign = BESIDE[word]
    return sign * (xyz(first) - xyz(second))[axis] > 0


def truth(sample: Sample) -> str:
    """What the events say about the question, by the question's text."""
    name, text, events = sample.meta["question_type"], sample.question, sample.events
    if name in ("identity", "CLASSIFICATION"):
        assert len(events) == 1
        return events[0].label
    if name == "presence":
        return "yes" if re.search(r"the (\w+)\?$", text)[1] in labels(sample) else "no"
    if name == "side":
        (event,) = named(sample, r"(?:is|Is) the (\w+)")
        return "left" if 0 < event.azimuth < 180 else "right"
    if name == "direction":
        (event,) = events
        return min(
            (abs((event.azimuth - centre + 180) % 360 - 180), word)
            for word, centre in {"front": 0, "left": 90, "behind": 180, "right": 270}.items()
        )[1]
    if name == "distance":
        return min((abs(math.log(events[0].distance / float(c.split()[0]))), c) for c in sample.choices)[1]
    if name == "order":
        ordered = sorted(events, key=lambda e: e.onset)
        assert all(a.offset < b.onset for a, b in pairwise(ordered))
        return ordered[0 if "first" in text else -1].label
    if name == "counting":
        return str(len(labels(sample)))
    if name == "overlap":
        first, second = events
        return "yes" if min(first.offset, second.offset) > max(first.onset, second.onset) else "no"
    if name == "duration":
        return max(events, key=lambda e: e.offset - e.onset).label
    if name == "nearer":
        return min(events, key=lambda e: e.distance).label
    if name == "relation":
        pattern = r"On which side of the (?P<b>\w+) is the (?P<a>\w+)|Is the (?P<c>\w+) left or right of the (?P<d>\w+)"
        match = re.search(pattern, text)
        first, second = (match["a"], match["b"]) if match["a"] else (match["c"], match["d"])
        by_label = {event.label: event for event in events}
        return "left" if lies("left", by_label[first], by_label[second]) else "right"
    return open_truth(sample, name, text)


def open_truth(sample: Sample, name: str, text: str) -> str:
    events = sample.events
    if name in ("DOA", "MIXUP_SINGLE_DOA"):
        (event,) = named(sample, r"source of the (\w+)")
        return f"{', '.join(words_of(event))}; {half_metre_class(event.distance)}"
    if name == "MIXUP_SINGLE_CLASSIFICATION":
        place = re.search(r"from the (\w+), (\w+), (\w+), about ([\d.]+) meters", text)
        fitting = [e.label for e in events if words_of(e) == list(place.groups()[:3])]
        assert half_metre_class(next(e for e in events if e.label == fitting[0]).distance) == f"{float(place[4]):g}m"
        return "; ".join(fitting)
    if name == "MIXUP_DIRECTION":
        first, second = named(sample, rf"Is {XY} .* {XY}\?")
        phrase = re.search(r"\w+ (to the left of|to the right of|in front of|behind|above|below) the", text)[1]
        return "Yes" if lies(SAID[phrase], first, second) else "No"
    if name == "MIXUP_DISTANCE_BOTH":
        first, second = named(sample, rf"Is {XY} (?:closer|farther) than {XY}\?")
        return "Yes" if (first.distance < second.distance) == ("closer" in text) else "No"
    if name == "MIXUP_NONBINARY_DISTANCE":
        return half_metre_class(float(np.linalg.norm(xyz(events[0]) - xyz(events[1]))))
    if name == "MIXUP_NONBINARY_SOURCE":
        first, second = events
        if "closer" in text or "farther" in text:
            near, far = sorted(events, key=lambda e: e.distance)
            return (near if "closer" in text else far).label
        word = SAID[re.search(r"is (.*) the other", text)[1]]
        return (first if lies(word, first, second) else second).label
    assert name == "MIXUP_NONBINARY_DIRECTION"
    second, first = named(sample, r"side of the (\w+) is the (\w+)\?")
    way = xyz(first) - xyz(second)
    axis = int(np.argmax(np.abs(way)))
    return next(word for word, (a, sign) in BESIDE.items() if a == axis and sign * way[axis] > 0)


@pytest.mark.parametrize("name", [*planning.CHOICE_KINDS, *planning.OPEN_KINDS])
def test_answers_follow_from_the_events(train, name):
    for sample in of_kind(train, name):
        assert truth(sample) == sample.answer, (sample.question, sample.events)


# ------------------------------------------------------------------------------------------------ grammar and records

LABEL = r"[a-z][a-z ,()'-]*"
DISTANCE = r"\d+(?:\.5)?m"
GRAMMAR = {
    "CLASSIFICATION": rf"{LABEL}(?:; {LABEL})*",
    "DOA": rf"(?:left|right), (?:front|behind), (?:above|below); {DISTANCE}",
    "MIXUP_SINGLE_CLASSIFICATION": rf"{LABEL}(?:; {LABEL})*",
    "MIXUP_SINGLE_DOA": rf"(?:left|right), (?:front|behind), (?:above|below); {DISTANCE}",
    "MIXUP_DIRECTION": r"Yes|No",
    "MIXUP_DISTANCE_BOTH": r"Yes|No",
    "MIXUP_NONBINARY_DISTANCE": DISTANCE,
    "MIXUP_NONBINARY_SOURCE": rf"{LABEL}(?:; {LABEL})*",
    "MIXUP_NONBINARY_DIRECTION": r"left|right|front|behind|above|below",
}


@pytest.mark.parametrize("name", sorted(GRAMMAR))
def test_open_answers_have_the_published_grammar(train, name):
    expected_sources = 1 if name in ("CLASSIFICATION", "DOA") else 2
    for sample in of_kind(train, name):
        assert re.fullmatch(GRAMMAR[name], sample.answer), sample.answer
        assert len(sample.events) == expected_sources and not sample.choices


def test_all_nine_types_are_there():
    assert set(planning.OPEN_KINDS) == set(GRAMMAR)


def test_records_of_other_benchmarks(train):
    choice = next(s for s in train if s.meta["format"] == "dcase_aqa")
    record = records.dcase_record(choice)
    assert record["answer"] in record["choice"]
    assert [f"{chr(65 + i)}. {text}" for i, text in enumerate(choice.choices)] == record["choice"]
    mmau = records.mmau_record(next(s for s in train if s.meta["format"] == "mmau"))
    assert set(mmau) == {
        *("id", "audio_id", "question", "choices", "answer", "dataset", "task", "split", "category", "sub-category"),
        "difficulty",
    }
    assert mmau["answer"] in mmau["choices"] and mmau["difficulty"] in ("easy", "medium", "hard")
    single = next(s for s in train if s.meta["question_type"] == "DOA")
    single.meta["sources"] = [{"clip": "a", "response": "room/1.npy"}]
    record = records.spatialsoundqa_record(single, 7)
    assert (record["audio_id"], record["reverb_id"], record["audio_id2"]) == ("a", "room/1.npy", None)


def test_thinking_is_short_and_leads_to_the_answer(train):
    quick = ("identity", "presence", "side", "direction", "distance")
    for sample in train:
        if sample.meta["question_type"] in quick:
            assert len(sample.thinking.split()) <= 14
    for name in ("identity", "side", "distance"):
        assert all(sample.answer in sample.thinking for sample in of_kind(train, name))


# ------------------------------------------------------------------------------------------------ balance


@pytest.mark.parametrize("name", list(planning.CHOICE_KINDS))
def test_positions_and_answers_are_dealt_evenly(train, name):
    samples = of_kind(train, name)
    count = len(samples[0].choices)
    positions = Counter(sample.choices.index(sample.answer) for sample in samples)
    assert all(len(set(sample.choices)) == count for sample in samples)
    targets = len(planning.KINDS[name].targets(world_of("train"), CONFIG))
    # the rest of the last round may miss up to one of every (answer, position) pair
    assert max(positions.values()) - min(positions[p] for p in range(count)) <= targets
    if name in ("identity", "presence", "side", "direction", "distance", "counting", "overlap", "relation"):
        answers = Counter(sample.answer for sample in samples)
        per_answer = count * (targets // len(answers))
        assert max(answers.values()) - min(answers.values()) <= per_answer


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 10), min_size=1), st.integers(0, 500))
def test_shares_add_up_and_are_off_by_less_than_one(weights, count):
    shares = planning._shares(weights, count)
    assert sum(shares.values()) == count
    for name, weight in weights.items():
        assert abs(shares[name] - weight / sum(weights.values()) * count) < 1 + 1e-6


def test_same_seed_same_samples_and_order_does_not_matter():
    world = world_of("train")
    asks = planning.plan(CONFIG, world, FORMATS, 40, 1)
    forwards = {ask.index: planning.draft_of(ask, world, CONFIG, 1)[0].question for ask in asks}
    fresh = world_of("train")
    backwards = {ask.index: planning.draft_of(ask, fresh, CONFIG, 1)[0].question for ask in reversed(asks)}
    assert forwards == backwards


def test_margins_keep_doubtful_geometry_out(train):
    for sample in of_kind(train, "side"):
        (event,) = named(sample, r"(?:is|Is) the (\w+)")
        assert 25 <= abs(event.azimuth) <= 155
    for sample in of_kind(train, "nearer"):
        near, far = sorted(event.distance for event in sample.events)
        assert far / near > 1.39
    for sample in of_kind(train, "duration"):
        short, long = sorted(event.offset - event.onset for event in sample.events)
        assert long / short > 1.4


def test_impossible_questions_are_named():
    config = dataclasses.replace(CONFIG, metres=[50.0, 60.0])
    with pytest.raises(ConfigError, match="'distance'"):
        planning.plan(dataclasses.replace(config, choice={"distance": 1.0}), world_of("test"), {"mmau": 1.0}, 10, 0)
    with pytest.raises(ConfigError, match="did you mean 'identity'"):
        planning.check_config(dataclasses.replace(CONFIG, choice={"identiti": 1.0}))


# ------------------------------------------------------------------------------------------------ words alone


def test_no_type_is_answerable_from_text(train, test):
    rows = text_check.check(train, test)
    assert {row.question_type for row in rows} == {*planning.CHOICE_KINDS, *planning.OPEN_KINDS}
    assert not [row for row in rows if row.biased], text_check.table(rows)


def biased_by(samples: list[Sample], change) -> list[Sample]:
    return [change(dataclasses.replace(s)) if s.meta["question_type"] == "identity" else s for s in samples]


def answer_first(sample: Sample) -> Sample:
    sample.choices = [sample.answer, *[choice for choice in sample.choices if choice != sample.answer]]
    return sample


def only_animals(sample: Sample) -> Sample:
    """Gold answers from a third of the classes: what a careless sampler of answers does."""
    if sample.answer not in ("bird", "cricket", "frog", "rain", "wind"):
        sample.answer = next(
            (c for c in sample.choices if c in ("bird", "cricket", "frog", "rain", "wind")), sample.answer
        )
    return sample


@pytest.mark.parametrize(
    "change,predictors", [(answer_first, {"position"}), (only_animals, {"majority", "naive Bayes"})]
)
def test_the_check_catches_a_biased_set(train, test, change, predictors):
    rows = text_check.check(biased_by(train, change), biased_by(test, change))
    caught = {row.predictor for row in rows if row.biased and row.question_type == "identity"}
    assert predictors <= caught
    assert not [row for row in rows if row.biased and row.question_type != "identity"]


def test_the_check_catches_an_open_prior(train, test):
    def mostly_yes(samples):
        kept, seen = [], Counter()
        for sample in samples:
            seen[sample.answer] += 1
            if sample.answer != "No" or seen["No"] % 3 == 0:
                kept.append(sample)
        return [sample for sample in kept if sample.meta["question_type"] == "MIXUP_DIRECTION"]

    rows = text_check.check(mostly_yes(train), mostly_yes(test))
    assert {row.predictor for row in rows if row.biased} >= {"majority"}


@pytest.mark.parametrize("first", ["open", "choice"])
def test_chance_of_a_type_that_is_asked_both_ways_is_that_of_each_way(first: str) -> None:
    """Ten answers, four of them offered to every other question."""

    def side(seed: int) -> list[Sample]:
        rng, made = np.random.default_rng(seed), []
        for number in range(400):
            answer, others = str(number % 10), [str(digit) for digit in range(10) if digit != number % 10]
            offered = (
                rng.permutation([answer, *rng.choice(others, 3, replace=False)]).tolist() if number % 20 < 10 else []
            )
            sample = Sample(id=str(number), task="clip", question="Which?", answer=answer, choices=offered)
            sample.meta["question_type"] = "digits"
            made.append(sample)
        return made if first == "choice" else made[::-1]

    rows = text_check.check(side(0), side(1))
    assert {(row.question_type, row.chance) for row in rows} == {("digits, choices", 0.25), ("digits, open", 0.1)}
    assert not [row for row in rows if row.biased], text_check.table(rows)


def test_captions_name_every_event_and_stand_in_for_the_thinking_where_asked() -> None:
    world = world_of("train")
    config = dataclasses.replace(CONFIG, thinking="caption")
    samples = samples_of(world, 200, "captions", formats={"mmau": 0.5, "caption": 0.5}, config=config)
    for sample in samples:
        caption = sample.meta["caption"]
        clauses = caption.rstrip(".").split("; ")
        events = sorted(sample.events, key=lambda event: event.onset)
        assert len(clauses) == len(events)
        for clause, event in zip(clauses, events, strict=True):
            assert clause.startswith(f"the {event.label} ")
            stated = float(clause.rsplit(", ", 1)[1].removesuffix(" m"))
            assert stated == min(config.metres, key=lambda value: abs(math.log(value / event.distance)))
        if sample.meta["question_type"] == "caption":
            assert (sample.answer, sample.thinking) == (caption, None)
        elif sample.meta["question_type"] in planning.CAPTIONED:
            conclusion = sample.thinking.removeprefix(caption).strip()
            if sample.meta["question_type"] != "presence":
                assert not conclusion
            elif sample.answer == "no":
                assert conclusion.endswith("not there.")
            else:
                label = conclusion.removeprefix("So the ").split(" ")[0]
                assert conclusion == "So " + next(c for c in clauses if f" {label} " in c).split(",")[0] + "."
