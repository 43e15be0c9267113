"""Plans that code makes of facts: each is a good question by code itself, and rests on the facts that it names."""

from __future__ import annotations

import json
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
        assert not list(wording.lost(plan, asked))
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
        ({"question": "Can you tell what sounds there?"}, False),
        ({"question": "Is there a sound on the left?"}, True),
    ],
)
def test_a_wording_keeps_the_answer_in_the_thinking_and_out_of_the_question(change: dict[str, str], lost: bool) -> None:
    plan = Plan("choice", "source", "Which sound is heard?", "dog", ("f0",), ("It barks.",), ("cat", "cow", "frog"))
    asked = Asked("choice", plan.question, "dog", ["cat", "dog", "cow", "frog"], "It barks, so it is a dog.")
    assert bool(list(wording.lost(plan, replace(asked, **change)))) == lost


@pytest.mark.parametrize(
    ("answer", "change", "lost"),
    [
        ("yes", {}, False),
        ("yes", {"question": "Can you hear a dog in it?"}, False),
        ("yes", {"question": "Listen well, do you hear a dog?"}, False),
        ("yes", {"question": "How does a dog sound?"}, True),
        ("yes", {"question": "Is anything to be heard?"}, True),
        ("yes", {"thinking": "The answer is yes."}, True),
        ("yes", {"thinking": "I do not hear a dog, so yes."}, True),
        ("no", {"thinking": "I hear rain, and no dog."}, False),
        ("no", {"thinking": "A dog? It isn't there."}, False),
        ("no", {"thinking": "I hear rain, so I say so."}, True),
        ("no", {"thinking": "I hear rain, and a dog."}, True),
    ],
)
def test_a_wording_about_presence_asks_whether_and_says_so(answer: str, change: dict[str, str], lost: bool) -> None:
    reason = "I hear a dog." if answer == "yes" else "I hear rain, and nothing of a dog."
    plan = Plan("choice", "presence", "Is there a dog?", answer, ("f0",), (reason,), ("dog",), ("dog",))
    asked = Asked("choice", plan.question, answer, ["yes", "no"], reason)
    assert bool(list(wording.lost(plan, replace(asked, **change)))) == lost


def test_what_is_good_of_a_reply_stays_and_the_rest_is_asked_for_again() -> None:
    """`verify` finds nothing wrong with what is left standing; each text is one of the replies', or our own."""
    short, seen = "So it is a dog.", "I see a dog in the picture, and it barks loudly at the gate."
    good, echo = "It barks twice, hoarsely, so it is a dog.", "15 to 120 words of someone who listens and works: a dog."
    plan = Plan("choice", "source", "Which sound is heard?", "dog", ("f0",), ("It barks.",), ("cat", "cow", "frog"))
    own = Asked(
        "choice", plan.question, "dog", ["cat", "dog", "cow", "frog"], "I listen. It is a dog.", evidence=["f0"]
    )
    about, rules = [Fact("f0", "label", "dog")], Rules(thinking_words=(8, 80), elements="known", evidence=True)
    made = wording.Wording(plan, own, about, rules, (15, 120))
    for said, reason, left in (
        ({"question": "What is it that barks, {answer}?", "thinking": short}, "marks", ("question", "thinking")),
        ({"question": "What do you make out?", "thinking": seen}, "visual", ("thinking",)),
        ({"thinking": echo}, "prompt_echo", ("thinking",)),
        ({"thinking": "It barks twice, and then once more, and ends."}, wording.SLOTS_LOST, ("thinking",)),
        ({"thinking": good}, "", ()),
    ):
        messages, schema = made.request()
        assert list(schema["properties"]) == list(said) and ('"question"' in messages[-1]["content"]) == (len(said) > 1)
        assert set(json.loads(messages[-2]["content"])) == set(said)  # the example has the form that is asked for
        assert (made.take(said)[0], made.left) == (reason, left)
    assert (made.asked.question, made.asked.thinking) == ("What do you make out?", good)
    assert replace(made.asked, question=own.question, thinking=own.thinking) == own and made.worded == made.fields
    assert fault(made.asked.plain(), rules, about) == ("", "")


@pytest.mark.parametrize("number", range(12))
def test_what_a_model_is_shown_is_a_good_reply_to_a_question_of_the_same_kind(number: int) -> None:
    plan, asked, about = planned(number)
    system, shown, said, ask = wording.Wording(plan, asked, about, RULES, (15, 120)).request()[0]
    assert [one["role"] for one in (system, shown, said, ask)] == ["system", "user", "assistant", "user"]
    kind = plan.answer if plan.skill == "presence" else plan.form
    like, _ = wording._EXAMPLES[kind]
    own = Asked(like.form, like.question, like.answer, sorted((like.answer, *like.options)) if like.options else [])
    made = wording.Wording(like, own, [], Rules(thinking_words=(15, 120)), (15, 120))
    assert made.request()[0][-1] == shown and made.take(json.loads(said["content"])) == ("", "")


def test_what_verify_drops_however_it_is_worded_is_not_asked_for() -> None:
    plan, asked, about = planned(3)
    for rules, hopeless in ((RULES, False), (replace(RULES, elements="nine"), True), (None, False)):
        assert wording.Wording(plan, asked, about, rules, (15, 120)).hopeless == hopeless


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
    worded = wording.Wording(plan, asked, about, None, (15, 120)).request()[1]["properties"]
    assert sum(one["maxLength"] for one in worded.values()) < 3.5 * 768  # generate.max_tokens
