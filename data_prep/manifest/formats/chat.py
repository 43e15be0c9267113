"""Chat rows, as ms-swift (``messages`` with ``<audio>`` marks, ``audios``) and TRL (parts of a message, or ``prompt``
and ``completion``) have them: one question of a user with one reply, whose tags are taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from audio_llm.datasets.records import Record
from audio_llm.errors import AudioLLMError
from audio_llm.language.groups import read_elements
from audio_llm.language.parts import take_apart
from audio_llm.language.prompts import question_text
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.formats.tables import records
from data_prep.manifest.rows import Reason, Reject, RowError

MARK = "<audio>"  # stands for a sound in ms-swift's texts
CALLS = ("tool_calls", "function_call")  # what a message may say beside its words
LEARNT = ("loss", "weight")  # false or 0 in a reply of others: nothing is learnt from it


def _chat(place: Place) -> Iterator[Record | Reject]:
    for row in records(place):
        if isinstance(row, Reject):
            yield row
            continue
        try:
            yield Record({**row.values, **_said(row.values)}, row.where)
        except AudioLLMError as error:
            yield Reject.of(row.where, error)


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Question, answer, thinking, sounds and the system's words of a row. Raises :class:`RowError`."""
    turns = _turns(values)
    system = [text for role, text, _ in turns if role == "system"]
    rest = [turn for turn in turns if turn[0] != "system"]
    if [role for role, _, _ in rest] != ["user", "assistant"] or len(system) > 1:
        found = ", ".join(role for role, _, _ in turns) or "none"
        raise RowError(Reason.TURNS, f"expected turns of user and assistant, found {found}.")
    (_, question, parts), (_, reply, _) = rest
    named = values.get("audios", values.get("audio")) or []
    named = list(named) if isinstance(named, (list, tuple)) else [named]
    sounds = [*named, *filter(None, parts)]
    if len(sounds) > 1 and parts and named and any(parts):
        expected = "the sounds in the parts of the message alone, or in a column alone"
        raise RowError(Reason.MARKS, f"expected {expected}, found both: their order is not told.")
    asked, places = _unmarked(question)
    inside = len(places) - len(parts)  # marks in the text itself; those of parts came with them
    if not sounds:
        raise RowError(Reason.NO_SOUND_NAMED)
    if inside not in (0, len(sounds)) or (len(sounds) > 1 and len(places) not in (0, len(sounds))):
        raise RowError(Reason.MARKS, f"expected {len(sounds)} × {MARK} for as many sounds, found {len(places)}.")
    if isinstance(choices := values.get("choices"), list) and all(isinstance(choice, str) for choice in choices):
        asked = asked.removesuffix(question_text("", choices)) if choices else asked  # the lines that offer them
    said = {"question": asked, "audio": sounds, **replied(reply)}
    if len(sounds) > 1 and any(places):
        said["places"] = [min(place, len(asked)) for place in places]
    return said | ({"system": system[0]} if system else {})


def _turns(values: Mapping[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """(role, text, sounds) of each message; a part of audio is a mark in the text, and a sound, None where that is left
    to the column `audios`."""
    messages = values.get("messages")
    if messages is None and isinstance(values.get("prompt"), list):
        messages = [*values["prompt"], *(values.get("completion") or [])]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RowError(Reason.TURNS, "expected 'messages', or 'prompt' and 'completion', as lists of messages.")
    turns = []
    for message in messages:
        if more := [name for name in CALLS if message.get(name)]:
            raise RowError(Reason.TURNS, f"expected a message of words, found '{more[0]}' beside them.")
        off = [name for name in LEARNT if message.get(name) in (False, 0)]
        if off and message.get("role") == "assistant":
            raise RowError(Reason.TURNS, f"expected a reply that is learnt, found '{off[0]}: {message[off[0]]}'.")
        content, sounds = message.get("content"), []
        if isinstance(content, list):
            texts: list[str] = []
            marks = ""  # of the sounds since the last text
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text":
                    texts += [marks + part["text"]] if isinstance(part.get("text"), str) else []
                    marks = "" if isinstance(part.get("text"), str) else marks
                elif kind == "audio":
                    sounds.append(part.get("audio") or part.get("path"))
                    marks += MARK
                else:
                    raise RowError(Reason.TURNS, f"expected parts of text and audio, found {part!r:.60}.")
            content = "\n".join(texts) + marks
        if not isinstance(content, str):
            raise RowError(Reason.TURNS, f"expected a message of words, found {content!r:.60}.")
        turns.append((str(message.get("role")), content, sounds))
    return turns


def _unmarked(text: str) -> tuple[str, list[int]]:
    """`text` without its marks and without spaces around it, and before which character of that each mark stood."""
    parts = text.split(MARK)
    plain = "".join(parts)
    lead = len(plain) - len(plain.lstrip())
    words, ends = plain.strip(), accumulate(map(len, parts[:-1]))
    return words, [min(max(end - lead, 0), len(words)) for end in ends]


def replied(reply: str) -> dict[str, Any]:
    """Answer, thinking and semantic elements of a reply; all of it is the answer where it has no tags."""
    parts = take_apart(reply)
    if not (parts.answers or parts.thinking or parts.elements):
        return {"answer": reply}
    if len(parts.answers) != 1 or parts.cut or parts.open or parts.rest:
        found = (
            f"{len(parts.answers)} answers" if len(parts.answers) != 1 else "words outside of its tags, or open tags"
        )
        raise RowError(Reason.MARKS, f"expected one answer in whole tags, found {found}.")
    said: dict[str, Any] = {"answer": parts.answers[0]}
    if parts.thinking:
        said["thinking"] = "\n".join(parts.thinking)
    if parts.elements:
        said["semantic_elements"] = read_elements(parts.elements[0])
    return said


FORMAT = Format("chat", _chat)
