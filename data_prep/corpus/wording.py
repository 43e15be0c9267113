"""What a language model is asked to write: the wording of a plan, or a whole question; and how its words are checked.

The prompts are ours, and their hash is part of what a ledger knows of a question (:func:`digest`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from audio_llm.datasets.mmau import word_set
from audio_llm.language.groups import ELEMENT_GROUPS, GROUPS
from audio_llm.language.prompts import prompt_hash
from audio_llm.language.replies import holds, mentions, normalise
from data_prep.corpus.asked import Asked, Fault, Rules, faults
from data_prep.corpus.facts import Fact
from data_prep.corpus.slots import Plan

SLOTS_LOST = "slots_lost"
REASONS = {
    SLOTS_LOST: "a text lost what code had decided, or asks or says something else",
    "prompt_echo": "a text repeats what the model was told to do",
}

SYSTEM = (
    "You write questions about sound recordings for people who can only listen. Speak of sounds alone, as someone who "
    "hears them. Never mention pictures, captions, tags, scores or how you know something. Reply in JSON."
)
_WORD = """A question about a recording has been decided. Word it naturally.
Question: {question}
{options}Answer: {answer}
What leads to the answer: {reasons}

{wanted}"""
_GIVE = {
    "question": 'Give "question": the same question in other words, which must not name the answer unless all options '
    "are named.\n",
    "thinking": 'Give "thinking": {words} words of someone who listens and works towards the answer, ending with the '
    "answer as it stands.\n",
    "answer": 'Give "answer": the same description in other words, with every one of these kept: {slots}.\n',
}
# What a good reply looks like, for a question like this one: small models go by it. The thinking is true of any sound.
_EXAMPLES: dict[str, tuple[Plan, dict[str, str]]] = {
    "choice": (
        Plan(
            *("choice", "source", "What can be heard here?", "church bells", ()),
            *(("It is the sound of church bells.",), ("violin", "siren", "piano")),
        ),
        {
            "question": "Which of these sounds do you hear in the recording?",
            "thinking": "I listen from beginning to end and compare what I hear with what is offered. It is the sound "
            "of church bells, so I answer church bells.",
        },
    ),
    "yes": (
        Plan(
            *("choice", "presence", "Is there the sound of violin?", "yes", ()),
            *(("I hear violin, which is what is asked for.",), ("no",)),
        ),
        {
            "question": "Do you hear the sound of violin in this recording?",
            "thinking": "I pay attention to what sounds, from beginning to end. I hear violin, which is what is asked "
            "for. So the answer is yes.",
        },
    ),
    "no": (
        Plan(
            *("choice", "presence", "Is there the sound of piano?", "no", ()),
            *(("I hear violin, and nothing of piano.",), ("yes",)),
        ),
        {
            "question": "Do you hear the sound of piano in this recording?",
            "thinking": "I pay attention to what sounds, from beginning to end. I hear violin, and nothing of piano. "
            "So the answer is no.",
        },
    ),
    "open": (
        Plan(
            *("open", "source", "What makes the sound?", "The sound of church bells.", ()),
            ("The character of what I hear is that of church bells.",),
        ),
        {
            "question": "What do you hear in this recording?",
            "thinking": "I listen from beginning to end and ask where the sound comes from. Its character is that of "
            "church bells, so I say church bells.",
        },
    ),
    "caption": (
        Plan(
            *("caption", "caption", "Describe the audio.", "Church bells ring.", ()),
            *(("First I ask what sounds: church bells.",), (), ("church bells ring",)),
        ),
        {
            "question": "What can be heard? Describe it in a sentence.",
            "thinking": "First I ask what sounds, and it is church bells. Then I put what I hear into one sentence.",
            "answer": "The church bells ring out.",
        },
    ),
}
_FREE = """What is known of a recording:
{facts}

Write {what}.
Give "thinking": {words} words of someone who listens and works towards the answer.
Give "semantic_elements": for each group a few words of what is heard, or nothing: {groups}.
Speak of what is heard alone."""
_WHAT = {
    "choice": 'a question with {options} options: "question", "choices" (options that differ, of like length, exactly '
    'one of which is right, without letters before them) and "answer" (the right option, word for word)',
    "open": 'a question that is not answered by yes or no: "question", and "answer" in less than 50 words',
    "caption": '"question", which asks for a description of the audio, and "answer", the description in less than 50 '
    "words",
}
# Characters of what a model writes. A small one goes round in circles: a reply ends here, not where its tokens do.
LONGEST = {"question": 400, "choices": 200, "answer": 500, "semantic_elements": 80}
_PER_WORD = 10  # characters of thinking for each word that is asked for
_RUN = 5  # words of what a model was told, one after the other, by which it is told apart from the language
# Asked of whether something is there: an auxiliary verb begins the sentence, or a part of it.
_WHETHER = re.compile(
    r"(?:^|[.,:;!?] *)(?:(?:and|but|so|please) )?"
    r"(?:is|are|was|were|can|could|do|does|did|has|have|would|will)\b[^.?!]*\?",
    re.IGNORECASE,
)
_WHICH = re.compile(r"\b(?:which|what|whose|who|how|where|when)\b", re.IGNORECASE)
_DENIES = re.compile(r"\b(?:no|not|none|nothing|never|neither|without|cannot|\w+n't)\b", re.IGNORECASE)


def digest() -> str:
    """Changes with every word of the prompts, and with the limits."""
    examples = [(repr(plan), reply) for plan, reply in _EXAMPLES.values()]
    limits = json.dumps([LONGEST, _PER_WORD, _RUN, examples])
    return prompt_hash("\0".join((SYSTEM, _WORD, *_GIVE.values(), _FREE, *_WHAT.values(), limits)))


def _texts(words: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """A text of each field, as a schema has it; `words`: of thinking."""
    longest = LONGEST | {"thinking": _PER_WORD * max(1, words[1])}
    return {name: {"type": "string", "minLength": 1, "maxLength": most} for name, most in longest.items()}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


class Wording:
    """A plan that a model words, text by text: what is good of a reply stays, and the rest is asked for again.

    `asked` is the question as it stands: what was not worded yet, or never well, is in our own words. `left` are the
    fields still to be worded, `words` how many of thinking are asked for. A text is good where it keeps what code
    decided, and where `rules`, those of the ``verify`` that follows, find nothing wrong with it.
    """

    def __init__(
        self, plan: Plan, asked: Asked, facts: Sequence[Fact], rules: Rules | None, words: tuple[int, int]
    ) -> None:
        self.plan, self.asked, self.facts, self.rules, self.words = plan, asked, facts, rules, words
        self.fields = tuple(name for name in _GIVE if name != "answer" or plan.form == "caption")
        self.left = self.fields

    @property
    def hopeless(self) -> bool:
        """Whether something is wrong that no wording mends."""
        return any(found.field not in self.fields for found in self._faults(self.asked))

    @property
    def worded(self) -> tuple[str, ...]:
        """The fields that are in the model's words."""
        return tuple(name for name in self.fields if name not in self.left)

    def request(self) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The messages that ask for what is left, and the schema of the reply."""
        plan = self.plan
        like, reply = _EXAMPLES[plan.answer if plan.skill == "presence" else plan.form]
        system, asks = _messages(self._told(plan, self.asked.choices))
        (_, shown), texts = _messages(self._told(like, sorted((like.answer, *like.options)))), _texts(self.words)
        said = {"role": "assistant", "content": json.dumps({name: reply[name] for name in self.left})}
        return [system, shown, said, asks], _object(**{name: texts[name] for name in self.left})

    def _told(self, plan: Plan, choices: Sequence[str]) -> str:
        """What a model is told of a plan, and to do."""
        return _WORD.format(
            question=plan.question,
            options=f"Options: {json.dumps(choices, ensure_ascii=False)}\n" if plan.form == "choice" else "",
            answer=plan.answer,
            reasons=" ".join(plan.reasons),
            wanted=self._wanted(plan, self.left),
        )

    def _wanted(self, plan: Plan, names: Sequence[str]) -> str:
        told = "".join(_GIVE[name] for name in names)
        return told.format(words=f"{self.words[0]} to {self.words[1]}", slots=", ".join(plan.slots))

    def take(self, reply: Mapping[str, str]) -> tuple[str, str]:
        """Keep what is good of a reply to :meth:`request`; the first reason why not all of it is, and what was found,
        ("", "") where nothing is left."""
        said = {name: reply[name].strip() for name in self.left}
        tried = _saying(self.asked, said)
        found = [*self._echoes(said), *lost(self.plan, tried), *self._faults(tried)]
        bad = {one.field for one in found}
        self.left = tuple(name for name in self.fields if name in bad)
        self.asked = _saying(self.asked, {name: text for name, text in said.items() if name not in bad})
        return next(((one.reason, one.detail) for one in found if one.field in self.left), ("", ""))

    def _echoes(self, said: Mapping[str, str]) -> Iterator[Fault]:
        """Texts with several words on end of what the model was told to do."""
        told = _runs(self._wanted(dataclasses.replace(self.plan, slots=()), self.fields))
        for name, text in said.items():
            if found := _runs(text) & told:
                yield Fault("prompt_echo", f"{name}: '{' '.join(min(found))}'", name)

    def _faults(self, asked: Asked) -> Iterator[Fault]:
        return iter(()) if self.rules is None else faults(asked, self.rules, self.facts)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1)}


def _saying(asked: Asked, texts: Mapping[str, Any]) -> Asked:
    return dataclasses.replace(asked, **texts)


def lost(plan: Plan, asked: Asked) -> Iterator[Fault]:
    """Where a wording lost what code had decided.

    The thinking must come to the answer; a caption must name what sounds; a question must not name the answer alone.
    One about presence must ask whether that is there which it is about, and no other is answered by yes or no.
    """
    if plan.form == "caption":
        missing = [slot for slot in plan.slots if not word_set(slot) <= word_set(asked.answer)]
        yield from (Fault(SLOTS_LOST, f"the caption lost '{slot}'", "answer") for slot in missing)
        return
    answer = plan.slots if plan.form == "open" else (plan.answer,)
    said = [one for one in answer if one not in ("yes", "no")]
    for one in said:
        if not mentions(asked.thinking, one):
            yield Fault(SLOTS_LOST, f"the thinking never says '{one}'", "thinking")
    for slot in plan.slots if plan.skill == "presence" else ():
        if not holds(asked.question, slot):
            yield Fault(SLOTS_LOST, f"the question never says '{slot}'", "question")
        if not _WHETHER.search(asked.question):
            yield Fault(SLOTS_LOST, f"the question does not ask whether: '{asked.question[:80]}'", "question")
        there = mentions(asked.thinking, slot) if plan.answer == "yes" else holds(asked.thinking, slot)
        if not there or (plan.answer == "no" and not _DENIES.search(asked.thinking)):
            yield Fault(SLOTS_LOST, f"the thinking never says that {slot} is there or not: {plan.answer}", "thinking")
    named = [one for one in asked.choices if holds(asked.question, one)]
    if plan.form == "choice" and named == [plan.answer]:
        yield Fault(SLOTS_LOST, f"the question names the answer '{plan.answer}'", "question")
    whether = _WHETHER.search(asked.question) and not _WHICH.search(asked.question)
    if plan.skill != "presence" and len(named) < 2 and whether:
        yield Fault(SLOTS_LOST, f"the question asks for yes or no: '{asked.question[:80]}'", "question")
    if normalise(asked.question) == normalise(asked.thinking):
        yield Fault(SLOTS_LOST, "the thinking is the question again", "thinking")


def free(
    facts: Sequence[Fact], form: str, options: int, words: tuple[int, int]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The messages that ask for a whole question of a form about a recording, and the schema of the reply."""
    known = "\n".join(f"- {fact.kind}: {fact.words}{_when(fact)}" for fact in facts)
    groups = "; ".join(f"{group.name} ({group.asks})" for group in GROUPS)
    text = _FREE.format(
        facts=known, what=_WHAT[form].format(options=options), words=f"{words[0]} to {words[1]}", groups=groups
    )
    texts = _texts(words)
    listed = {"type": "array", "items": texts["semantic_elements"] | {"minLength": 0}, "maxItems": 3}
    parts: dict[str, Any] = {"question": texts["question"], "thinking": texts["thinking"]}
    if form == "choice":
        parts["choices"] = {"type": "array", "items": texts["choices"], "minItems": options, "maxItems": options}
    parts |= {"answer": texts["answer"], "semantic_elements": _object(**dict.fromkeys(ELEMENT_GROUPS, listed))}
    return _messages(text), _object(**parts)


def freely(reply: dict[str, Any], form: str, evidence: Sequence[str]) -> Asked | str:
    """The question that a model wrote, or what is wrong with its fields."""
    elements = {
        name: words
        for name, listed in reply["semantic_elements"].items()
        if (words := [w for w in listed if w.strip()])
    }
    return Asked.read(
        reply | {"form": form, "semantic_elements": elements, "skill": "free", "evidence": list(evidence)}
    )


def _when(fact: Fact) -> str:
    if fact.start is None:
        return ""
    return f", from {fact.start:.1f} s" + (f" to {fact.end:.1f} s" if fact.end is not None else "")


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
