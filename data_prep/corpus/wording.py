"""What a language model is asked to write: the wording of a plan, or a whole question; and how its words are checked.

The prompts are ours, and their hash is part of what a ledger knows of a question (:func:`digest`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from audio_llm.datasets.mmau import word_set
from audio_llm.language.groups import ELEMENT_GROUPS, GROUPS
from audio_llm.language.prompts import prompt_hash
from audio_llm.language.replies import holds, mentions, normalise
from data_prep.corpus.asked import Asked
from data_prep.corpus.facts import Fact
from data_prep.corpus.slots import Plan

SLOTS_LOST = "slots_lost"

SYSTEM = (
    "You write questions about sound recordings for people who can only listen. Speak of sounds alone, as someone who "
    "hears them. Never mention pictures, captions, tags, scores or how you know something. Reply in JSON."
)
_WORD = """A question about a recording has been decided. Word it naturally.
Question: {question}
{options}Answer: {answer}
What leads to the answer: {reasons}

Give "question": the same question in other words, which must not name the answer unless all options are named.
Give "thinking": {words} words of someone who listens and works towards the answer, ending with the answer as it stands.
{caption}"""
_CAPTION = 'Give "answer": the same description in other words, with every one of these kept: {slots}.\n'
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


def digest() -> str:
    """Changes with every word of the prompts, and with the limits."""
    return prompt_hash("\0".join((SYSTEM, _WORD, _CAPTION, _FREE, *_WHAT.values(), json.dumps([LONGEST, _PER_WORD]))))


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


def worded(plan: Plan, asked: Asked, words: tuple[int, int]) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The messages that ask for a wording of a plan, and the schema of the reply."""
    options = f"Options: {json.dumps(asked.choices, ensure_ascii=False)}\n" if asked.choices else ""
    caption = _CAPTION.format(slots=", ".join(plan.slots)) if plan.form == "caption" else ""
    text = _WORD.format(
        question=plan.question,
        options=options,
        answer=plan.answer,
        reasons=" ".join(plan.reasons),
        words=f"{words[0]} to {words[1]}",
        caption=caption,
    )
    texts = _texts(words)
    wanted = ("question", "thinking", "answer") if caption else ("question", "thinking")
    return _messages(text), _object(**{name: texts[name] for name in wanted})


def rewritten(asked: Asked, reply: dict[str, Any]) -> Asked:
    """The question in the words of the model; the options, and the answer of a question, stay as they were decided."""
    tree = asked.plain() | {"question": reply["question"].strip(), "thinking": reply["thinking"].strip()}
    if asked.form == "caption":
        tree["answer"] = reply["answer"].strip()
    return Asked(**tree)


def kept(plan: Plan, asked: Asked) -> tuple[str, str]:
    """(``slots_lost``, what is missing) where a wording lost what code had decided; ("", "") for a good one.

    The thinking must come to the answer; a caption must name what sounds; a question must not name the answer alone,
    and one about presence must name what it is about.
    """
    if asked.form == "caption":
        lost = [slot for slot in plan.slots if not word_set(slot) <= word_set(asked.answer)]
        return (SLOTS_LOST, f"the caption lost '{lost[0]}'") if lost else ("", "")
    answer = plan.slots if asked.form == "open" else (asked.answer,)
    said = [one for one in answer if one not in ("yes", "no")]
    if lost := [one for one in said if not mentions(asked.thinking, one)]:
        return SLOTS_LOST, f"the thinking never says '{lost[0]}'"
    if plan.skill == "presence" and (lost := [one for one in plan.slots if not holds(asked.question, one)]):
        return SLOTS_LOST, f"the question never says '{lost[0]}'"
    named = [one for one in asked.choices if holds(asked.question, one)]
    if asked.form == "choice" and named == [asked.answer]:
        return SLOTS_LOST, f"the question names the answer '{asked.answer}'"
    if normalise(asked.question) == normalise(asked.thinking):
        return SLOTS_LOST, "the thinking is the question again"
    return "", ""


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
