"""The contract of what answers questions: a request, an answer, an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from audio_llm.audio import Waveform
from audio_llm.language import prompts

OPENINGS = prompts.OPENINGS


NEED_AUDIO = ("echotwin",)  # names of engines that cannot be asked by the words alone


class Item(prompts.Question, Protocol):
    """What a request asks about: a question with a name, and what is said after it."""

    @property
    def id(self) -> str: ...
    @property
    def instruction(self) -> str: ...


@dataclass(frozen=True)
class Request:
    """One question to answer: greedy at temperature 0, else one sample drawn with `seed`."""

    item: Item
    waveform: Waveform | None  # None: asked by its words alone
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """`raw` includes the opening words that a style put into the model's mouth. `error`: refused, and why."""

    raw: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_hash: str = ""
    seconds: float = 0.0
    error: str = ""


class Engine(Protocol):
    """One model, ready to answer."""

    name: str
    needs_audio: bool  # True: it cannot be asked by the words alone

    def prepare(self, waveform: Waveform, name: str) -> Waveform:
        """The audio as the model takes it. Raises :class:`AudioError` for what it cannot hear."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer a request, in order; requests are drawn lazily and hold prepared audio."""
        ...

    def close(self) -> None: ...


def is_address(kind: str) -> bool:
    return kind.startswith(("http://", "https://"))


def user_turn(request: Request) -> list[dict[str, Any]]:
    """The chat messages that ask a question, with a part for its audio where it has one."""
    item = request.item
    return prompts.conversation(item, audios=int(request.waveform is not None), instruction=item.instruction or None)


def render(tokenizer: Any, request: Request, style: str | None) -> str:
    """The prompt as the model reads it, assistant's turn opened (and begun, where a style is asked for)."""
    messages = user_turn(request)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text) + OPENINGS.get(style or "", "")
