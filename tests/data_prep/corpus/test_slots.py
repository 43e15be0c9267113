"""Plans that code makes of facts: each is a good question by code itself, and rests on the facts that it names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from audio_llm.datasets.mmau import word_set
from audio_llm.language.groups import ELEMENT_GROUPS
from data_prep.corpus import facts, slots, wording
from data_prep.corpus.asked import Asked, Rules, fault
from data_prep.corpus.facts import Fact
from data_prep.corpus.slots import LABELS, Plan, Wish

RULES = Rules(thinking_words=(5, 120), elements="known", evidence=True)
WISH = Wish(forms={"choice": 3, "open": 1, "caption": 1})


def known(number: int) -> list[Fact]:
    """Facts of every kind, which differ by `number`."""
    made = [
        Fact("", "label", LABELS[number % len(LABELS)], source="class"),
        Fact("", "caption", f"a {LABELS[number % len(LABELS)]} is heard twice", source="row"),
        Fact("", "duration", 1.0 + number % 9, "s", "file"),
        Fact("", "onsets", number % 10, "", "librosa", 0.9),
        Fact("", "tempo", 60.0 + number % 90, "beats per minute", "librosa"),
        Fact("", "pitch", 100.0 + 7 * number, "Hz", "librosa"),
        Fact("", "centroid", 300.0 * (1 + number % 20), "Hz", "librosa"),
        Fact("", "loudness", -50.0 + number % 45, "dB", "level"),
        Fact("", "event", "dog", "", "tagger", 0.9, 0.0, 1.0),
        Fact("", "event", "rain", "", "tagger", 0.8, 2.0, 3.0),
        Fact("", "seen", "a red car", source="picture"),
    ]
    return facts.read(facts.added([], made))


def planned(number: int, wish: Wish = WISH) -> tuple[Plan, Asked, list[Fact]]:
    about = known(number)
    plan = slots.plan(about, wish, 0, number)
    assert plan is not None
    return plan, slots.asked(plan, about, 0, number), about


def test_every_plan_is_a_good_question_on_facts_that_are_there() -> None:
    skills, places, said = Counter[str](), Counter[int](), Counter[str]()
    for number in range(600):
        plan, asked, about = planned(number)
        assert fault(asked.plain(), RULES, about) == ("", ""), asked
        assert wording.kept(plan, asked) == ("", "")
        assert asked.answer in asked.choices or asked.form != "choice"
        assert set(asked.semantic_elements) <= set(ELEMENT_GROUPS) and asked.semantic_elements
        skills[f"{asked.form} {asked.skill}"] += 1
        if plan.skill == "presence":
            said[plan.answer] += 1
        elif len(asked.choices) == 4:
            places[asked.choices.index(asked.answer)] += 1
    assert set(skills) == {f"{form} {name}" for form, names in slots.SKILLS.items() for name in names}
    assert min(places.values()) > 0.6 * max(places.values()) and min(said.values()) > 0.5 * max(said.values())


def test_a_wrong_option_is_nothing_that_is_heard() -> None:
    for number in range(200):
        plan, _, about = planned(number, Wish(skills={"source": 1.0}))
        heard = [word_set(str(fact.value)) for fact in about if fact.kind in ("label", "event")]
        assert len(plan.options) == 3
        assert not any(word_set(option) <= one or one <= word_set(option) for option in plan.options for one in heard)


def test_what_is_unsure_or_seen_is_not_asked_about() -> None:
    unsure = [replace(fact, confidence=0.3) for fact in known(3)]
    assert slots.plan(unsure, WISH, 0) is None
    seen = [Fact("f0", "seen", "a red car")]
    assert slots.plan(seen, WISH, 0) is None and slots.plan([], WISH, 0) is None


def test_the_same_seed_gives_the_same_question() -> None:
    assert planned(7)[1] == planned(7)[1]
    assert len({slots.asked(planned(7)[0], known(7), 0, seed).thinking for seed in range(20)}) > 1


def test_order_is_asked_of_events_that_sound_once() -> None:
    wish = Wish(skills={"order": 1.0})
    events = [Fact("f0", "event", "dog", start=0.0, end=1.0), Fact("f1", "event", "rain", start=2.0, end=3.0)]
    plan = slots.plan(events, wish, 0)
    assert plan is not None and (plan.answer, plan.options, plan.evidence) == ("dog", ("rain",), ("f0", "f1"))
    again = [*events, Fact("f2", "event", "dog", start=5.0, end=6.0)]
    assert slots.plan(again, wish, 0) is None
    together = [replace(fact, start=0.1 * n) for n, fact in enumerate(events)]
    assert slots.plan(together, wish, 0) is None


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({}, False),
        ({"question": "Which of these can you make out?"}, False),
        ({"thinking": "It is short and rough."}, True),
        ({"thinking": "It is not a dog at all, I am sure."}, True),
        ({"question": "Is it a dog that is heard?"}, True),
        ({"question": "Is it a dog, a cat, a cow or a frog?"}, False),
    ],
)
def test_a_wording_keeps_the_answer_in_the_thinking_and_out_of_the_question(change: dict[str, str], lost: bool) -> None:
    plan = Plan("choice", "source", "Which sound is heard?", "dog", ("f0",), ("It barks.",), ("cat", "cow", "frog"))
    asked = Asked("choice", plan.question, "dog", ["cat", "dog", "cow", "frog"], "It barks, so it is a dog.")
    reply = {"question": asked.question, "thinking": asked.thinking} | change
    assert bool(wording.kept(plan, wording.rewritten(asked, reply))[0]) == lost


@pytest.mark.parametrize(
    ("label", "words"),
    [("sea_waves", "sea waves"), ("Gunshot, gunfire", "gunshot"), ("Dog", "dog"), ("crying_baby", "crying baby")],
)
def test_class_names_are_said_as_words(label: str, words: str) -> None:
    assert slots.label_words(label) == words


def test_events_say_what_sounds_and_when() -> None:
    about = known(LABELS.index("rain"))
    assert slots.events(about) == [
        {"label": "dog", "onset": 0.0, "offset": 1.0},
        {"label": "rain", "onset": 2.0, "offset": 3.0},  # in its time, not once more as the label that it is as well
    ]
    unsure = [Fact("f0", "label", "Gunshot, gunfire", confidence=0.4), Fact("f1", "label", "clock_tick"), about[0]]
    assert slots.events(unsure) == [{"label": "clock tick"}, {"label": "rain"}]  # the surest first
    assert slots.events(unsure, least=0.3)[-1] == {"label": "gunshot"}


def test_what_a_model_writes_ends_by_its_schema_before_its_tokens_do() -> None:
    """Of the standard number of words; at 3.5 characters a token, of which English has more than four."""
    plan, asked, about = planned(3)
    for form in ("choice", "open", "caption"):
        schema = wording.free(about, form, 4, (15, 120))[1]["properties"]
        longest = sum(schema[name]["maxLength"] for name in ("question", "thinking", "answer"))
        longest += 4 * schema["choices"]["items"]["maxLength"] if form == "choice" else 0
        groups = schema["semantic_elements"]["properties"]
        assert list(groups) == list(ELEMENT_GROUPS)
        longest += sum(one["items"]["maxLength"] * one["maxItems"] for one in groups.values())
        assert longest < 3.5 * 1536
    worded = wording.worded(plan, asked, (15, 120))[1]["properties"]
    assert sum(one["maxLength"] for one in worded.values()) < 3.5 * 768  # generate.max_tokens
