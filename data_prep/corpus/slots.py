"""What is asked, decided by code: a skill, the answer, the other options and the evidence, from facts alone.

A language model may word a plan afterwards (:mod:`data_prep.corpus.wording`); what it may not do is choose. Small
models, asked to write whole questions, gave four equal options and always the first one as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audio_llm.datasets.mmau import word_set
from audio_llm.language.groups import ELEMENT_GROUPS
from data_prep.corpus.asked import Asked
from data_prep.corpus.facts import Fact, of
from data_prep.scenes.rooms import seeded

# Everyday sounds, to draw wrong options from where a recipe names no labels of its own.
LABELS = (
    "dog", "cat", "rooster", "cow", "frog", "crow", "insects", "sheep", "rain", "sea waves", "crackling fire",
    "wind", "thunderstorm", "water drops", "crying baby", "sneezing", "clapping", "footsteps", "laughing", "snoring",
    "door knock", "keyboard typing", "clock tick", "glass breaking", "vacuum cleaner", "church bells", "siren",
    "car horn", "engine", "train", "helicopter", "chainsaw", "airplane", "fireworks", "hand saw", "piano", "guitar",
    "drums", "violin", "whistle",
)  # fmt: skip
ANIMATE = frozenset(
    "dog cat rooster cow frog crow hen pig sheep insects crickets bird birds baby man woman child person people crowd "
    "speech voice speaker singer choir horse".split()
)
# What is done that sounds, of labels that name it themselves.
ACTIONS = frozenset(
    "barking meowing crowing croaking crying sneezing clapping coughing laughing snoring breathing brushing drinking "
    "knocking typing ticking breaking burning crackling sawing ringing singing speaking walking raining howling "
    "hammering applause applauding laughter".split()
)


@dataclass(frozen=True)
class Plan:
    """A question before it is worded. `slots` are the words that every wording has to keep."""

    form: str
    skill: str
    question: str
    answer: str
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]  # sentences that lead to the answer
    options: tuple[str, ...] = ()  # the wrong ones
    slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """What a recipe asks for: shares of forms and of skills, wrong options, and the labels these are drawn from."""

    forms: Mapping[str, float] = field(default_factory=lambda: {"choice": 1.0})
    skills: Mapping[str, float] = field(default_factory=dict)  # none: all alike
    options: int = 4
    labels: Sequence[str] = LABELS
    least: float = 0.5  # confidence that a fact needs


def label_words(label: str) -> str:
    """A class name as it is said: no underscores, and the first of several names ("Gunshot, gunfire")."""
    return " ".join(label.replace("_", " ").split(",")[0].split()).lower()


# ------------------------------------------------------------------------------------------------ skills

Draw = Callable[[Sequence[Fact], Wish, np.random.Generator], Plan | None]


def _pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _others(answer: str, count: int, among: Sequence[str], rng: np.random.Generator, never: Sequence[str]) -> list[str]:
    """Wrong options whose words are not among those of the answer, of what is there too, or of each other."""
    found: list[str] = []
    for place in rng.permutation(len(among)):
        option = label_words(among[int(place)])
        taken = [word_set(one) for one in (answer, *never, *found)]
        if word_set(option) and not any(word_set(option) <= one or one <= word_set(option) for one in taken):
            found.append(option)
        if len(found) == count:
            break
    return found


def _heard(facts: Sequence[Fact], least: float) -> list[Fact]:
    """What sounds, the surest first; each label once."""
    once: dict[str, Fact] = {}
    for fact in of(facts, "label", "event", least=least):
        once.setdefault(label_words(str(fact.value)), fact)
    return list(once.values())


def source(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
    """Which of several sounds is heard."""
    heard = _heard(facts, wish.least)
    if not heard:
        return None
    names = [label_words(str(fact.value)) for fact in heard]
    wrong = _others(names[0], wish.options - 1, wish.labels, rng, names[1:])
    if len(wrong) < wish.options - 1:
        return None
    question = _pick(rng, ("Which sound is heard?", "What is the source of the sound?", "What can be heard here?"))
    said = _pick(rng, ("The sound has the character of", "What I hear is typical of", "It is the sound of"))
    return Plan(
        "choice", "source", question, names[0], (heard[0].id,), (f"{said} {names[0]}.",), tuple(wrong), (names[0],)
    )


def presence(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
    """Whether something is heard: as often yes as no."""
    heard = _heard(facts, wish.least)
    if not heard:
        return None
    names = [label_words(str(fact.value)) for fact in heard]
    absent = _others(names[0], 1, wish.labels, rng, names[1:])
    there = bool(rng.random() < 0.5)
    if not absent:
        return None
    name = names[0] if there else absent[0]
    question = _pick(rng, (f"Is there the sound of {name}?", f"Can the sound of {name} be heard?"))
    reason = f"I hear {names[0]}" + (", which is what is asked for." if there else f", and nothing of {name}.")
    answer, other = ("yes", "no") if there else ("no", "yes")
    return Plan("choice", "presence", question, answer, (heard[0].id,), (reason,), (other,), (name,))


def order(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
    """Which of two events begins first."""
    events = [fact for fact in of(facts, "event", least=wish.least) if fact.start is not None]
    events = sorted(events, key=lambda fact: (fact.start or 0.0, fact.id))
    pairs = [
        (one, other)
        for n, one in enumerate(events)
        for other in events[n + 1 :]
        if (other.start or 0.0) - (one.start or 0.0) >= 0.5 and not _alike(one, other)
    ]
    # Both must sound once only: "first" would be true of either otherwise.
    names = [label_words(str(fact.value)) for fact in events]
    pairs = [pair for pair in pairs if all(names.count(label_words(str(one.value))) == 1 for one in pair)]
    if not pairs:
        return None
    first, second = _pick(rng, pairs)
    a, b = (label_words(str(fact.value)) for fact in (first, second))
    return Plan(
        *("choice", "order", "Which of these begins first?", a, (first.id, second.id)),
        (f"The sound of {a} begins before that of {b}.",),
        (b,),
        (a, b),
    )


def _alike(one: Fact, other: Fact) -> bool:
    a, b = (word_set(label_words(str(fact.value))) for fact in (one, other))
    return a <= b or b <= a


COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def count(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
    """How often a sound begins, where so few beginnings are told apart surely."""
    found = next(iter(of(facts, "onsets", least=wish.least)), None)
    if found is None or not isinstance(found.value, (int, float)) or not 1 <= found.value <= 8:
        return None
    number = int(found.value)
    near = [n for n in range(1, 10) if n != number and abs(n - number) <= max(2, wish.options - 1)]
    wrong = [COUNT_WORDS[near[int(place)]] for place in rng.permutation(len(near))[: wish.options - 1]]
    question = _pick(rng, ("How many separate sounds begin?", "How many times does a sound set in?"))
    answer = COUNT_WORDS[number]
    reason = f"I count the beginnings one by one and come to {answer}."
    return Plan("choice", "count", question, answer, (found.id,), (reason,), tuple(wrong), (answer,))


def _numeric(
    kind: str, skill: str, questions: Sequence[str], says: Callable[[float], str], factors: Sequence[float], why: str
) -> Draw:
    """A skill whose answer is an amount, between others so far from it that they are told apart by listening."""

    def draw(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
        found = next(iter(of(facts, kind, least=wish.least)), None)
        if found is None or not isinstance(found.value, (int, float)) or found.value <= 0:
            return None
        answer = says(float(found.value))
        drawn = [says(found.value * factors[int(place)]) for place in rng.permutation(len(factors))]
        wrong: list[str] = []
        for one in drawn:
            words = [word_set(text) for text in (answer, *wrong)]
            if not any(word_set(one) <= other or other <= word_set(one) for other in words):
                wrong.append(one)
        if len(wrong) < min(wish.options - 1, 2):
            return None
        wrong = wrong[: wish.options - 1]
        reason = why.format(answer=answer)
        return Plan("choice", skill, _pick(rng, questions), answer, (found.id,), (reason,), tuple(wrong), (answer,))

    return draw


def _seconds(value: float) -> str:
    if value < 0.75:
        return "half a second or less"
    return "about one second" if value < 1.5 else f"about {round(value):g} seconds"


duration = _numeric(
    *("duration", "duration", ("About how long is the recording?", "About how long does it last?"), _seconds),
    *((0.25, 0.5, 2.0, 4.0), "Listening from beginning to end, it lasts {answer}."),
)
tempo = _numeric(
    *("tempo", "tempo", ("About how fast is the beat?", "What is the approximate tempo?")),
    lambda bpm: f"about {round(bpm / 5) * 5:g} beats per minute",
    *((0.5, 0.75, 1.35, 1.8), "The beats follow each other at {answer}."),
)
pitch = _numeric(
    *("pitch", "pitch", ("About how high is the tone?", "What is the approximate pitch?")),
    lambda hertz: f"about {float(f'{hertz:.2g}'):g} hertz",
    *((0.25, 0.5, 2.0, 4.0), "The tone lies at {answer}, as far as I can tell."),
)


def open_source(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
    """What is heard, in free words."""
    heard = _heard(facts, wish.least)
    if not heard:
        return None
    names = [label_words(str(fact.value)) for fact in heard[:3]]
    question = _pick(rng, ("What makes the sound?", "What is heard in this recording?", "Which sounds are there?"))
    answer = f"The sound of {_list(names)}."
    reason = f"The character of what I hear is that of {_list(names)}."
    return Plan("open", "source", question, answer, tuple(fact.id for fact in heard[:3]), (reason,), (), tuple(names))


REQUESTS = (
    "Describe the audio.",
    "What can be heard? Describe it.",
    "Describe what you hear.",
    "Give a description of this recording.",
    "Describe the sounds in a sentence.",
)


def caption(facts: Sequence[Fact], wish: Wish, rng: np.random.Generator) -> Plan | None:
    """A description: the surest caption, else one made of what is heard and how it sounds."""
    told = next(iter(of(facts, "caption", least=wish.least)), None)
    heard = _heard(facts, wish.least)
    names = [label_words(str(fact.value)) for fact in heard[:3]]
    how, evidence = manner(facts)
    if told is not None:
        words = str(told.value).strip().rstrip(".")
        answer, evidence = words[:1].upper() + words[1:] + ".", (told.id,)
        slots: tuple[str, ...] = (words,)
        if words.lower() in names:  # the name of a class is no sentence
            answer = f"The sound of {words.lower()} is heard."
    elif names:
        answer = f"The sound of {_list(names)}{', ' + how if how else ''}."
        evidence, slots = (*(fact.id for fact in heard[:3]), *evidence), tuple(names)
    else:
        return None
    reason = f"First I ask what sounds: {_list(names) or slots[0]}." + (f" It is {how}." if how else "")
    return Plan("caption", "caption", _pick(rng, REQUESTS), answer, evidence, (reason,), (), slots)


SKILLS: dict[str, dict[str, Draw]] = {
    "choice": {
        "source": source,
        "presence": presence,
        "order": order,
        "count": count,
        "duration": duration,
        "tempo": tempo,
        "pitch": pitch,
    },
    "open": {"source": open_source},
    "caption": {"caption": caption},
}


def plan(facts: Sequence[Fact], wish: Wish, *seed: object) -> Plan | None:
    """What is asked about a recording: form and skill drawn by their shares, among those that facts allow; None
    where there are none."""
    rng = seeded("plan", *seed)
    forms = [form for form in SKILLS if wish.forms.get(form, 0) > 0]
    while forms:
        shares = np.array([wish.forms[form] for form in forms], dtype=np.float64)
        form = forms[int(rng.choice(len(forms), p=shares / shares.sum()))]
        skills = [name for name in SKILLS[form] if not wish.skills or wish.skills.get(name, 0) > 0]
        while skills:
            weights = np.array([wish.skills.get(name, 1.0) for name in skills], dtype=np.float64)
            name = skills.pop(int(rng.choice(len(skills), p=weights / weights.sum())))
            if (found := SKILLS[form][name](facts, wish, rng)) is not None:
                return found
        forms.remove(form)
    return None


# ------------------------------------------------------------------------------------------------ words around


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""


def manner(facts: Sequence[Fact]) -> tuple[str, tuple[str, ...]]:
    """How it sounds in a few words, and the facts that say so."""
    words, evidence = [], []
    for fact in facts:
        said = _MANNER[fact.kind](fact.value) if fact.kind in _MANNER and not isinstance(fact.value, str) else ""
        if said:
            words.append(said)
            evidence.append(fact.id)
    return _list(words), tuple(evidence)


_MANNER: dict[str, Callable[[float], str]] = {
    "loudness": lambda level: "loud" if level > -15 else "quiet" if level < -40 else "",
    "centroid": lambda hertz: "bright" if hertz > 4000 else "dull" if hertz < 800 else "",
    "onsets": lambda number: "repeated" if number >= 3 else "",
}


def elements(facts: Sequence[Fact], least: float = 0.5) -> dict[str, Any]:
    """The groups of semantic elements that facts fill, in the order of the paper; a group without facts is left out."""
    found: dict[str, list[str]] = {name: [] for name in ELEMENT_GROUPS}
    agents, things, actions, when, where, surfaces, signal, attributes, _ = ELEMENT_GROUPS
    for fact in of(facts, "label", "event", least=least):
        name = label_words(str(fact.value))
        words = set(re.findall(r"[a-z]+", name))
        found[agents if words & ANIMATE else things].append(name)
        found[actions] += sorted(words & ACTIONS)
    for fact in facts:
        if isinstance(fact.value, str) or fact.confidence < least:
            continue
        if fact.kind == "duration":
            found[when].append(f"lasts {_seconds(fact.value)}")
        elif fact.kind == "onsets":
            number = int(fact.value)
            found[when].append("one beginning" if number == 1 else f"{number} beginnings" if number else "continuous")
        elif fact.kind == "tempo":
            found[when].append(f"a beat of about {round(fact.value / 5) * 5:g} per minute")
        elif fact.kind == "pitch":
            found[signal].append(f"a tone of about {float(f'{fact.value:.2g}'):g} hertz")
        elif fact.kind == "centroid":
            found[signal].append(f"energy around {float(f'{fact.value:.2g}'):g} hertz")
        if fact.kind in ("loudness", "centroid") and (said := _MANNER[fact.kind](fact.value)):
            found[attributes].append(said)
    return {name: list(dict.fromkeys(words)) for name, words in found.items() if words}


def events(facts: Sequence[Fact], least: float = 0.5) -> list[dict[str, Any]]:
    """What sounds, as a sample's ``events`` have it: from `onset` to `offset` (s) where that is known. A projector is
    aligned with these words, and evidence is paid by them: "yes" and "no" do not say what is heard."""
    found = [{"label": label_words(str(f.value)), "onset": f.start, "offset": f.end} for f in _sounding(facts, least)]
    return [{name: value for name, value in one.items() if value is not None} for one in found]


def _sounding(facts: Sequence[Fact], least: float) -> list[Fact]:
    """Every event in its time, then labels of which there is no event, each once."""
    timed = [fact for fact in of(facts, "event", least=least) if fact.start is not None]
    named = {label_words(str(fact.value)) for fact in timed}
    others = [fact for fact in _heard(facts, least) if label_words(str(fact.value)) not in named]
    return sorted(timed, key=lambda fact: (fact.start or 0.0, fact.id)) + others


def asked(made: Plan, facts: Sequence[Fact], *seed: object) -> Asked:
    """The plan in words of our own: thinking from its reasons, options in an order drawn by the seed."""
    rng = seeded("words", *seed)
    begin = _pick(rng, ("I listen to the whole recording first.", "I listen closely.", "Let me listen carefully."))
    how, _ = manner(facts)
    middle = f" It is {how}." if how and made.skill in ("source", "presence") else ""
    end = _pick(rng, ("So the answer is {}.", "That makes the answer {}.", "Therefore I answer: {}."))
    last = "" if made.form == "caption" else " " + end.format(made.answer.rstrip("."))
    thinking = f"{begin}{middle} {' '.join(made.reasons)}{last}"
    choices = [made.answer, *made.options] if made.form == "choice" else []
    choices = [choices[int(place)] for place in rng.permutation(len(choices))]
    return Asked(
        *(made.form, made.question, made.answer, choices, thinking, elements(facts), made.skill, list(made.evidence))
    )
