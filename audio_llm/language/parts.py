"""A reply taken apart: its thinking, its answer, and the words of the answer without wrapping (boxes, JSON, LaTeX)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

# What models call the parts of a reply, in any case, between <…>, […], ◁…▷ or <|begin_of_…|>.
THINKING = (
    "think", "thinking", "thought", "thoughts", "reasoning", "reason", "reflection", "analysis", "scratchpad", "cot",
    "rationale",
)  # fmt: skip
ELEMENTS = "semantic_elements"
ANSWERS = ("answer", "final_answer", "final", "output", "response", "conclusion", "solution")
_TAG = re.compile(
    r"[<\[\u25c1]\s*(?P<close>/?)\s*\|?(?P<edge>begin_of_|end_of_)?"
    rf"(?P<name>{'|'.join((*THINKING, ELEMENTS, *ANSWERS))})\|?\s*[>\]\u25b7]",
    re.IGNORECASE,
)
_TURN_END = re.compile(r"(?:<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|</s>|<\|end_of_text\|>|<end_of_turn>)\s*$")
_TURN_START = re.compile(r"^\s*(?:<s>)?\s*(?:\[INST\].*?\[/INST\])?(?:<\|im_start\|>assistant\n)?", re.DOTALL)
_KEYS = ("answer", "final_answer", "final answer", "choice", "option", "prediction", "selected", "label")
_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|textrm|emph)\s*\{([^{}]*)\}")
_ROW = re.compile(r"^\s*\|(.*)\|[ \t]*$", re.MULTILINE)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")


@dataclass
class Parts:
    """`thinking` and `elements` are the bodies of those blocks; `answers` those of answer tags, `rest` what is outside
    all of them. `open` where the thinking never ended: then nothing after it is an answer."""

    thinking: list[str] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    rest: str = ""
    open: bool = False
    cut: bool = False  # the last answer has no end tag


def strip_turn_markers(text: str) -> str:
    """Remove end-of-turn markers that a decoder left at the end of a reply."""
    return _TURN_END.sub("", text.strip()).strip()


def take_apart(text: str) -> Parts:
    """One pass over the tags of `text`. A tag inside a block of another name is that block's words: an answer tag in
    the thinking is no answer. Thinking that ends without a beginning began with the reply."""
    text = strip_turn_markers(_TURN_START.sub("", text, count=1))
    parts = Parts()
    outside: list[str] = []
    name, begun, last = "", 0, 0  # the open block, where its body begins; end of the last tag used
    answered_at = (-1, -1)  # an answer block inside thinking that may turn out to have no end
    for tag in _TAG.finditer(text):
        kind, closes = tag["name"].lower(), bool(tag["close"]) or (tag["edge"] or "").lower() == "end_of_"
        if name:
            if closes and kind == name:
                _store(parts, name, text[begun : tag.start()])
                name, last = "", tag.end()
            elif name in ANSWERS and closes and kind not in ANSWERS:  # "<answer>So it is …</think>": thinking
                _store(parts, kind, text[begun : tag.start()])
                parts.answers.clear()
                outside.clear()
                name, last = "", tag.end()
            elif name not in ANSWERS and kind in ANSWERS:
                answered_at = (answered_at[0], tag.start()) if closes else (tag.end(), -1)
            continue
        if closes and kind in (*THINKING, ELEMENTS):
            _store(parts, kind, text[: tag.start()] if not last else text[last : tag.start()])
            parts.answers.clear()
            outside.clear()
        else:
            outside.append(text[last : tag.start()])
        last = tag.end()
        if not closes:
            name, begun = kind, tag.end()
    if name in ANSWERS:
        parts.answers.append(text[begun:].strip())
        parts.cut = True
    elif name:
        # The end tag of the thinking was forgotten: a whole answer block that ends the reply is the answer even so.
        inside, end = answered_at
        forgotten = 0 <= inside <= end and re.fullmatch(r"<\s*/\s*\w+\s*>\s*", text[end:]) is not None
        parts.open = not forgotten
        parts.answers += [text[inside:end].strip()] if forgotten else []
    else:
        outside.append(text[last:])
    parts.rest = "" if parts.open else "".join(outside).strip()
    return parts


def _store(parts: Parts, name: str, body: str) -> None:
    where = parts.answers if name in ANSWERS else parts.elements if name == ELEMENTS else parts.thinking
    where.append(body.strip())


def unwrap(answer: str) -> list[str]:
    """The words of an answer: what its boxes hold, the value of a JSON object's answer, else all of it. Several boxes
    are several answers."""
    boxes = _boxes(answer)
    if not boxes:
        told = _json_answer(answer)
        if told is not None:
            return [told]
    asked = re.search(r"^\s*Q(?:uestion)?\s*:.*^\s*A(?:nswer)?\s*:(?P<rest>.*)$", answer, re.DOTALL | re.MULTILINE)
    return [_without_commands(_without_marks(body)) for body in boxes or [asked["rest"] if asked else answer]]


def _without_marks(text: str) -> str:
    """Markdown as words: boxes that are ticked or not, rows of a table, nothing of what is struck out."""
    text = re.sub(r"~~[^~\n]+~~", " ", text)
    text = re.sub(
        r"^(\s*(?:[-*+]\s+)?)\[([ xX])\]\s", lambda box: box[1] + ("✗ ", "✓ ")[box[2] != " "], text, flags=re.M
    )
    text = text.replace("☐", "✗")
    return _ROW.sub(lambda row: ", ".join(cell.strip() for cell in row[1].split("|") if cell.strip(" :-")), text)


def _without_commands(text: str) -> str:
    while (shorter := _COMMAND.sub(r"\1", text)) != text:
        text = shorter
    return (
        re.sub(r"\\[\[\]()]|\$+|```\w*", " ", re.sub(r"\\[,;:! ]|~", " ", text)).strip()
        if "\\" in text or "$" in text or "```" in text
        else text.strip()
    )


def _boxes(text: str) -> list[str]:
    """The bodies of ``\\boxed{…}``, braces inside balanced; a box inside a box is its words."""
    found, place = [], 0
    while match := _BOX.search(text, place):
        depth, place = 1, match.end()
        while place < len(text) and depth:
            depth += (text[place] == "{") - (text[place] == "}")
            place += 1
        found.append(text[match.end() : place - (depth == 0)])
    return found


def _json_answer(text: str) -> str | None:
    """The answer of a JSON object in `text`; "" where it has none to give, None where there is no such object."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start or end - start > 20_000:
        return None
    body = text[start : end + 1]
    for form in (body, body.replace("'", '"')):
        try:
            tree = json.loads(form)
        except (ValueError, RecursionError):
            continue
        values = {str(key).lower(): value for key, value in tree.items()} if isinstance(tree, dict) else {}
        for key in _KEYS:
            if key in values:
                value = values[key]
                return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    return None


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The assistant's text of a TRL completion: a plain string, or a list of messages whose last one is the reply."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
