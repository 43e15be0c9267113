"""The one place where a question becomes a prompt; :mod:`audio_llm.language.replies` reads what comes back.

SFT, GRPO, evaluation and serving all call this module, so that a model is asked in the words it was taught in.
A reply is ``<think>…</think>``, optionally ``<semantic_elements>…</semantic_elements>``, then ``<answer>…</answer>``
(the think - semantics - answer form of AudSemThinker, Wijngaard et al. 2025); in the style ``plain`` it is the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple, Protocol, overload

from audio_llm.errors import DataError, describe
from audio_llm.language.groups import in_order

AUDIO_TOKEN = "<|audio|>"
STYLES = ("answer", "think", "think_semantics", "plain")
TAGS = ("think", "semantic_elements", "answer")
# A style is asked for by writing the first words of the reply: the model goes on from there.
OPENINGS = {"answer": "<answer>", "think": "<think>", "think_semantics": "<think>", "plain": ""}

# What a question with choices can be answered with, and the sentence that asks for it.
ANSWERS_AS = {"option": "Answer with the words of one choice.", "letter": "Answer with the letter of one choice only."}


class Turns(NamedTuple):
    """How a family of language models marks who speaks: what opens a turn of `role`, and what closes it."""

    opening: str
    closing: str
    assistant: tuple[str, str] | None = None  # of the assistant's turns, where they differ
    system: bool = True  # False: the system's words have no turn, they stand at the head of the user's

    def of(self, role: str) -> tuple[str, str]:
        """What opens a turn of `role`, and what closes it."""
        if role == "assistant" and self.assistant:
            return self.assistant
        return self.opening.format(role=role), self.closing


# By the marker that a tokenizer already knows: ChatML (Qwen), Llama 3, Gemma, Mistral since Nemo, and before it (its
# own template sets a space). The last row needs no special token: it serves base models without a chat format.
TURN_MARKERS = {
    "<|im_start|>": Turns("<|im_start|>{role}\n", "<|im_end|>\n"),
    "<|start_header_id|>": Turns("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "<start_of_turn>": Turns(
        "<start_of_turn>{role}\n", "<end_of_turn>\n", ("<start_of_turn>model\n", "<end_of_turn>\n"), system=False
    ),
    "[INST]": Turns("[INST]", "[/INST]", ("", "</s>"), system=False),
    "[INST] ": Turns("[INST] ", "[/INST]", (" ", "</s>"), system=False),
    "": Turns("### {role}:\n", "\n\n"),
}


class Question(Protocol):
    """What the user's turn is made of."""

    @property  # properties, for nothing is written and an item may be frozen
    def question(self) -> str: ...
    @property
    def choices(self) -> Sequence[str]: ...


class Taught(Question, Protocol):
    """What the assistant's turn is made of as well; ``audio_llm.shards.schema.Sample`` is one."""

    @property
    def answer(self) -> str | None: ...
    @property
    def thinking(self) -> str | None: ...
    @property
    def semantic_elements(self) -> Mapping[str, Any] | None: ...


def chat_template(marker: str = "<|im_start|>", bos_token: str | None = None) -> str:
    """The Jinja chat template for a tokenizer that knows `marker` (a key of ``TURN_MARKERS``).

    A literal ``<|audio|>`` typed by a user is removed: it would be tokenized as the real placeholder and take over the
    position of the audio.
    """
    turns = TURN_MARKERS[marker]

    def quote(text: str) -> str:
        return "'{}'".format(text.replace("\n", "\\n"))

    clean = f"| replace('{AUDIO_TOKEN}', '')"
    words = (
        "{% if message['content'] is string %}{{ message['content'] " + clean + " }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] in ('audio', 'input_audio', 'audio_url') %}{{ '" + AUDIO_TOKEN + "' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] " + clean + " }}{% endif %}{% endfor %}{% endif %}"
    )
    start, end = turns.of("' + message['role'] + '")
    before, after = "{{ " + quote(start) + " }}", "{{ " + quote(end) + " }}"
    if turns.assistant:
        mine, others = (quote(text) for text in turns.assistant), (quote(text) for text in turns.of("user"))
        before, after = (
            "{{ " + one + " if message['role'] == 'assistant' else " + other + " }}"
            for one, other in zip(mine, others, strict=True)
        )
    if not turns.system:  # its words open the user's turn, and the user's own words go on in it
        before = "{% if not turn.open %}" + before + "{% endif %}{% set turn.open = message['role'] == 'system' %}"
        after = "{% if turn.open %}{{ '\\n\\n' }}{% else %}" + after + "{% endif %}"
    return (
        ("{{ " + quote(bos_token) + " }}" if bos_token else "")
        + ("" if turns.system else "{% set turn = namespace(open=false) %}")
        + "{% for message in messages %}"
        + before
        + words
        + after
        + "{% endfor %}{% if add_generation_prompt %}{{ "
        + quote(turns.of("assistant")[0])
        + " }}{% endif %}"
    )


def question_text(question: str, choices: Sequence[str] = (), instruction: str | None = None) -> str:
    """The user's words: the question, one lettered line per choice, and the instruction."""
    lines = [question, *(["Choices:", *lettered(choices)] if choices else []), *([instruction] if instruction else [])]
    return "\n".join(lines)


def lettered(choices: Sequence[str]) -> list[str]:
    """``(A) …``, ``(B) …``: how a choice is offered, and how it is answered. Raises :class:`DataError` beyond Z."""
    if len(choices) > len(ascii_uppercase):
        raise DataError(
            describe("question", f"at most {len(ascii_uppercase)} choices, a letter each", str(len(choices)))
        )
    return [f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]


# How a request can be put together, by what comes first; the first is ours everywhere, the others come from clients.
ORDERS = ("audio", "text", "system")
SYSTEM = "You are a helpful assistant."


@overload
def conversation(
    item: Question, *, audios: int = 1, instruction: str | None = None, order: str = "audio"
) -> list[dict[str, Any]]: ...
@overload
def conversation(item: Taught, *, style: str | None, audios: int = 1, order: str = "audio") -> list[dict[str, Any]]: ...
def conversation(
    item: Any, *, style: str | None = None, audios: int = 1, instruction: str | None = None, order: str = "audio"
) -> list[dict[str, Any]]:
    """Chat messages for `item`: the user's turn and, with a `style`, the assistant's turn.

    The user's audio parts stand before the text, by the `order` "text" behind it; "system" has a system message first.
    An item with ``places`` says before which character of its question each audio stands, in any order.
    """
    text = question_text(item.question, item.choices or (), instruction)
    places = getattr(item, "places", None) or [len(text) if order == "text" else 0] * audios
    if audios and len(places) != audios:
        raise DataError(describe(f"question {item.question!r}", f"{len(places)} audios, by its places", f"{audios}"))
    parts: list[dict[str, Any]] = []
    done = 0
    for place in [*places[:audios], len(text)]:
        parts += [{"type": "text", "text": text[done:place]}] if done < place else []
        parts += [{"type": "audio"}]
        done = place
    parts.pop()  # behind the last words there is none
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}] if order == "system" else []
    messages.append({"role": "user", "content": parts})
    if style is not None:
        messages.append({"role": "assistant", "content": target_text(item, style)})
    return messages


def target_text(item: Taught, style: str) -> str:
    """The assistant's turn in one of ``STYLES``; parts that the item lacks are left out.

    The answer is the option's text without its letter: it is what MMAU's rule and the open formats match, and a model
    that answers in words does not care where the option stood.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r}: expected one of {', '.join(STYLES)}")
    if item.answer is None:
        raise ValueError(f"question {item.question!r} has no answer to learn from")
    if style == "plain":
        return item.answer
    parts = []
    if style != "answer" and item.thinking:
        parts.append(f"<think>{item.thinking}</think>")
    if style == "think_semantics" and item.semantic_elements:
        elements = "; ".join(f"{key}: {_flat(value)}" for key, value in in_order(item.semantic_elements))
        parts.append(f"<semantic_elements>{elements}</semantic_elements>")
    parts.append(f"<answer>{item.answer}</answer>")
    return "\n".join(parts)


def reply_grammar(choices: Sequence[str], style: str) -> str:
    """GBNF grammar of the replies in `style` that answer with one of `choices`; the words in between stay free."""
    options = " | ".join(_literal(option) for option in lettered(choices))
    if style == "plain":
        return f"root ::= {options}"
    parts = [f"{_literal('<answer>')} ({options}) {_literal('</answer>')}"]
    for tag in reversed(TAGS[: STYLES.index(style)]):
        parts.insert(0, f"{_literal(f'<{tag}>')} [^<]+ {_literal(f'</{tag}>' + chr(10))}")
    return "root ::= " + " ".join(parts)


def _literal(text: str) -> str:
    """`text` as a GBNF string, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _flat(value: Any) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, (list, tuple)) else str(value)


def prompt_hash(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a rendered prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
