"""Interventions: one cause is changed, everything else stays, and the answer is what the ground truth says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from audio_llm import config as recipes
from audio_llm.audio import swap_channels
from audio_llm.errors import ConfigError
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample, Source
from data_prep.questions import planning
from data_prep.questions.common import sector_of
from data_prep.questions.truth import RULES, Asked, answer_of
from data_prep.scenes import interventions, receivers, render, simulate
from data_prep.scenes.interventions import stage_of
from tests.data_prep.test_questions import CONFIG, FORMATS, ROOMS, truth, world_of
from tests.paths import ROOT


@pytest.fixture(scope="module")
def world():
    return world_of("train")


@pytest.fixture(scope="module")
def drafted(world):
    found = []
    for ask in planning.plan(CONFIG, world, FORMATS, 190, "pairs"):
        draft, choices = planning.draft_of(ask, world, CONFIG, "pairs")
        asked = Asked(ask.kind, ask.target, tuple(item.clip.label for item in draft.placed), tuple(choices))
        found.append((ask, draft, choices, asked))
    return found


@pytest.fixture(scope="module")
def pairs(world, drafted):
    """Before, after and the intervention: every kind on every question, as far as there is one."""
    found = []
    for number, (ask, draft, choices, asked) in enumerate(drafted):
        before = planning.sample_of(ask, draft, choices, world, f"q-{number}", Source("b", "s"))
        for kind in interventions.KINDS:
            made = interventions.intervene(kind, draft.placed, world, asked, CONFIG, ROOMS, "binaural", "s", number)
            if made:
                then = planning.after(ask, draft, list(made.after.placed), made.answer, made.after.world, CONFIG)
                after = planning.sample_of(ask, then, choices, made.after.world, f"q-{number}-{kind}", Source("b", "s"))
                found.append((draft, before, after, made))
    return found


def test_the_rules_give_the_answers_that_the_questions_were_drawn_with(world, drafted):
    """Over all types of questions: what is derived of the scene is what the scene was drawn for."""
    known = [(asked, draft) for _, draft, _, asked in drafted if asked.kind in RULES]
    assert {asked.kind for asked, _ in known} == set(RULES)
    wrong = [
        (asked, draft.answer, found)
        for asked, draft in known
        if (found := answer_of(asked, stage_of(draft.placed, world).scene, CONFIG)) != draft.answer
    ]
    assert not wrong


def test_answers_after_an_intervention_follow_from_its_events(pairs):
    """Against the tests' own reading of question and events (`truth` of test_questions), which knows no rule."""
    kinds = {made.kind for _, _, _, made in pairs}
    assert kinds == set(interventions.KINDS)
    for _, before, after, made in pairs:
        assert after.question == before.question and after.choices == before.choices
        assert truth(after) == after.answer, (made.kind, after)
        after.validate()


def test_answers_change_and_stay_and_a_room_never_matters(pairs):
    changed = {
        kind: [b.answer != a.answer for _, b, a, made in pairs if made.kind == kind] for kind in interventions.KINDS
    }
    assert not any(changed["room"])
    for kind in set(interventions.KINDS) - {"room"}:
        assert True in changed[kind] and False in changed[kind], kind
    moved = {(made.kind, b.meta["question_type"]) for _, b, a, made in pairs if b.answer != a.answer}
    assert moved <= {(kind, name) for kind, names in interventions.MATTERS.items() for name in names}


def difference(before: Sample, after: Sample) -> set[str]:
    """Which fields of events differ, events told apart by label and by onset."""
    ours = {event.label: event for event in before.events}
    theirs = {event.label: event for event in after.events}
    fields = {"label"} if set(ours) != set(theirs) else set()
    for label in set(ours) & set(theirs):
        pair = dataclasses.asdict(ours[label]), dataclasses.asdict(theirs[label])
        fields |= {name for name in pair[0] if pair[0][name] != pair[1][name]}
    return fields


MAY_CHANGE = {
    "remove": {"label"},
    "replace": {"label"},
    "azimuth": {"azimuth"},
    "elevation": {"elevation"},
    "distance": {"distance"},
    "mirror": {"azimuth"},
    "shift": {"onset", "offset"},
    "swap": {"onset", "offset"},
    "room": set(),
}


def test_nothing_but_the_cause_changes_in_the_ground_truth(pairs):
    for _, before, after, made in pairs:
        assert difference(before, after) == MAY_CHANGE[made.kind], made.kind
        if made.kind == "room":
            assert after.meta["room"] != before.meta["room"]
        else:
            assert after.meta["room"] == before.meta["room"]


def test_clauses_say_what_differs_and_what_does_not(pairs):
    causes = {"remove": {"label"}, "replace": {"label"}, "azimuth": {"side"}, "elevation": {"height"}}
    causes |= {"distance": {"distance"}, "mirror": {"side"}, "shift": {"onset", "order"}, "swap": {"onset", "order"}}
    for _, before, _, made in pairs:
        names = {clause["clause"] for clause in made.changes}
        assert names <= causes.get(made.kind, set()), made.kind
        assert made.kind == "room" or names or made.kind == "shift"
        if made.kind == "shift":
            assert "onset" in names
        labels = {event.label for event in before.events}
        assert {clause["labels"][0] for clause in (*made.changes, *made.keeps)} == labels
        for clause in (*made.changes, *made.keeps):
            if clause["clause"] == "side":
                assert (sector_of(clause["was"]) != sector_of(clause["is"])) == (clause in made.changes)


def test_the_same_seed_gives_the_same_intervention(world, drafted):
    _, draft, _, asked = next(one for one in drafted if one[0].kind == "identity")

    def make(seed):
        return interventions.intervene("shift", draft.placed, world, asked, CONFIG, ROOMS, "binaural", seed)

    assert make(1).meta("q") == make(1).meta("q")
    assert make(1).meta("q") != make(2).meta("q")


def test_a_mono_scene_is_not_moved_where_nobody_hears_it(world, drafted):
    _, draft, _, asked = drafted[0]
    for kind in ("azimuth", "mirror", "elevation"):
        assert interventions.intervene(kind, draft.placed, world, asked, CONFIG, ROOMS, "mono", 0) is None


# ------------------------------------------------------------------------------------------------ sound

SMALL = [
    "subsets={pairs: {split: test, count: 8, counterfactuals: {per_sample: 9}}}",
    "questions.choice={presence: 1, side: 1}",
    "questions.second_event=1",
    "sounds.recordings=8",
    "rooms={test: 2, validation: 1, train: 1, listeners: 1, positions: 16, max_order: 2, seconds: 0.1}",
    "text.count=0",
]


@pytest.fixture(scope="module")
def recipe():
    return recipes.load(simulate.SceneConfig, ROOT / "recipes/quickstart/scenes.yaml", SMALL)


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "data"
    simulate.prepare(recipe, out, workers=1, quiet=True)
    return out


@pytest.fixture(scope="module")
def stage(recipe):
    """The world of the shards, and the asks of their scenes by key."""
    library = simulate.find_sounds(recipe)
    groups, _ = simulate.sounds.split(library, recipe.split, recipe.recordings_seed, recipe.folds)
    world = simulate.build_world(recipe, "test", groups["test"])
    part = recipe.parts["pairs"]
    asks = planning.plan(recipe.questions, world, part.formats, part.count, recipe.seed, "pairs")
    return world, {ask.key("pairs"): ask for ask in asks}


def stems_of(recipe, stage, out: Path, key: str):
    """The draft that a sample was rendered from, and its parts."""
    world, asks = stage
    draft, _ = planning.draft_of(asks[key], world, recipe.questions, recipe.seed, "pairs")
    responses = [render.response_at(out / "responses" / "binaural", world, item.source) for item in draft.placed]
    seed = 0, "pairs", asks[key].index
    return draft, render.render_stems(draft.placed, responses, receivers.build("binaural"), recipe.audio, *seed)


def test_pairs_in_shards_differ_by_their_cause_alone(recipe, stage, made):
    """Of every kind the waveform is, within 16 bits of FLAC, the sum of what stayed and of what is there instead."""
    data = ShardDataset(made / "pairs")
    samples = {sample.id: (sample, row) for row in range(len(data)) for sample in [data.load_sample(row)]}
    told = {key: entry for key, (entry, _) in samples.items() if "counterfactual" in entry.meta}
    assert {entry.meta["counterfactual"]["kind"] for entry in told.values()} == set(interventions.KINDS)
    seen = set()
    for key, after in told.items():
        about = after.meta["counterfactual"]
        if about["kind"] in seen or "clip_gain_db" in after.meta:
            continue
        seen.add(about["kind"])
        before, row = samples[about["of"]]
        assert key == f"{before.id}-{about['kind']}"
        first, second = data.load_waveforms(row)[0], data.load_waveforms(samples[key][1])[0]
        draft, stems = stems_of(recipe, stage, made, before.id)
        np.testing.assert_allclose(first.samples, stems.mixed(), atol=1e-4)
        labels = [item.clip.label for item in draft.placed]
        staying = {event.label for event in before.events} & {event.label for event in after.events}
        if about["kind"] == "mirror":
            np.testing.assert_array_equal(second.samples, swap_channels(first).samples)
        if about["kind"] == "remove":
            left = [wet for label, wet in zip(labels, stems.events, strict=True) if label in staying]
            rest = dataclasses.replace(stems, events=left).mixed()
            np.testing.assert_allclose(second.samples, rest, atol=1e-4)
        if about["kind"] in ("azimuth", "elevation", "distance", "replace", "shift"):
            (changed,) = {tuple(clause["labels"]) for clause in about["changes"] if "beside" not in clause}
            number = labels.index(changed[0])
            others = [wet for place, wet in enumerate(stems.events) if place != number]
            rest = dataclasses.replace(stems, events=others).mixed()
            moved = second.samples - rest
            onset = round(next(e.onset for e in after.events if e.label == changed[1]) * recipe.audio.sample_rate)
            assert np.abs(moved[:, :onset]).max(initial=0) < 1e-4  # nothing but the event itself is new
            assert np.abs(moved).max() > 1e-2 and np.abs(second.samples - first.samples).max() > 1e-3
    assert seen == set(interventions.KINDS)


def test_a_move_to_where_it_was_is_the_same_response(recipe, stage, made):
    """The response of a moved event is that of the bank where it does not move: geometry, late noise and all."""
    data = ShardDataset(made / "pairs")
    draft, _ = stems_of(recipe, stage, made, data.load_sample(0).id)
    world, head = stage[0], receivers.build("binaural")
    before = stage_of(draft.placed, world)
    for place, item in enumerate(draft.placed):
        number = world.places[item.source][1]
        found = interventions.response_of(before, place, head, recipe.rooms, recipe.audio, number)
        known = render.response_at(made / "responses" / recipe.audio.layout, world, item.source)
        np.testing.assert_allclose(found, known, atol=1e-6)


def test_pairs_name_their_scene_and_a_second_run_does_nothing(recipe, made):
    summary = simulate.prepare(recipe, made, workers=1, quiet=True)
    assert not summary.fresh
    assert summary.manifest["subsets"]["pairs"]["samples"] == len(ShardDataset(made / "pairs"))


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="mirrored.*mirror"):
        interventions.CounterfactualConfig(kinds=["mirrored"]).check("subsets.a.counterfactuals")
