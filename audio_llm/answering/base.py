"""The contract of what answers questions: a request, an answer, an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from audio_llm import ranges
from audio_llm.audio import Waveform, decode
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import read_json
from audio_llm.language import prompts
from audio_llm.language.replies import normalise
from audio_llm.language.templates import rendered
from audio_llm.serving.beams import MAX_BEAMS
from audio_llm.shards.schema import MOST_CHOICES


class Item(prompts.Question, Protocol):
    """What a request asks about: a question with a name, and what is said after it."""

    @property
    def id(self) -> str: ...
    @property
    def instruction(self) -> str: ...


@dataclass(frozen=True)
class Request:
    """One question to answer: greedy at temperature 0, else one sample drawn with `seed`.

    `audios` are what the engine's ``prepare`` gave, in the order of the prompt; without any, the words alone are asked.
    `style` is one of ``prompts.STYLES``. `constrain`: nothing is said but one of the choices in that style ("answer"
    where there is none), which takes an engine that ``constrains``. `order` is one of ``prompts.ORDERS``. With several
    `beams` a reply is searched for, at temperature 0, which takes an engine that ``searches``.
    """

    item: Item
    audios: tuple[Any, ...] = ()
    style: str | None = None
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    constrain: bool = False
    order: str = "audio"
    beams: int = 1

    @property
    def opening(self) -> str:
        """The first words of the reply, which ask for the style; a constrained reply needs none."""
        return "" if self.constrain or self.style is None else prompts.OPENINGS[self.style]

    @property
    def grammar(self) -> str:
        """GBNF of the replies that a constrained request allows; "" for any other."""
        return prompts.reply_grammar(self.item.choices, self.style or "answer") if self.constrain else ""

    def messages(self) -> list[dict[str, Any]]:
        """The chat messages that ask the question, with a part for each audio."""
        said = self.item.instruction or None
        return prompts.conversation(self.item, audios=len(self.audios), instruction=said, order=self.order)

    def render(self, tokenizer: Any) -> str:
        """The prompt as the model reads it, the assistant's turn opened and begun."""
        return rendered(tokenizer, self.messages(), generate=True) + self.opening


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


@dataclass(frozen=True)
class Options:
    """Which model an engine opens, and how."""

    model: str  # a checkpoint folder; the model's name behind an address, "" for the first that is served
    adapter: str | None = None  # a PEFT adapter's folder; its name behind an address
    address: str = ""  # of the server, for an engine that asks one
    batch_size: int | None = None  # sequences decoded together, or requests in flight; None: the engine's own number
    max_audios: int = 4  # in one request
    seed: int = 0
    hearing: str = "refuse"  # what is heard of sound in another layout than the model's: audio_llm.audio.HEARINGS


class Engine:
    """One model, ready to answer. The class is an entry point of ``audio_llm.engines``."""

    name: str  # recorded with the answers
    rank = 0  # among the engines that recognise a model, the one with the highest rank is opened
    needs_audio = False  # it cannot be asked by the words alone
    constrains = False  # it can hold a reply to the choices
    searches = False  # it can search for a reply with several beams

    def __init__(self, options: Options) -> None:
        raise NotImplementedError

    @classmethod
    def open(cls, options: Options) -> Engine:
        """Load the model, or reach its server. Raises children of ``AudioLLMError`` where that cannot be done."""
        return cls(options)

    @classmethod
    def recognises(cls, where: str) -> bool:
        """Whether it answers from `where`, a model's folder or an address. Reads ``config.json`` at the most."""
        raise NotImplementedError

    def prepare(self, sound: Waveform | Path, name: str) -> Any:
        """The audio, or the file of it, as this model takes it. Raises :class:`AudioError`, which calls it `name`."""
        return sound

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer a request, in order; requests are drawn lazily and hold prepared audio.

        Sampling depends on a request's own seed and never on the batch it happened to be in, so that a run that was
        interrupted continues as if it had not been.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the model holds."""


def is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def decoded(sound: Waveform | Path, name: str) -> Waveform:
    """`sound`, read where it is a file; errors call it `name`."""
    return decode(sound, name=name) if isinstance(sound, Path) else sound


def folder_config(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` in `folder` says; nothing where there is none that can be read."""
    try:
        tree = read_json(Path(folder) / "config.json")
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def check_order(order: str) -> None:
    """Raise :class:`ConfigError` for an order of a request's parts that there is not."""
    if order not in prompts.ORDERS:
        known = ", ".join(prompts.ORDERS)
        raise ConfigError(f"order '{order}': expected one of {known}{nearest(order, prompts.ORDERS)}.")


def check_beams(beams: int, temperatures: Iterable[float], constrain: bool = False) -> None:
    """Raise :class:`ConfigError` for beams that there cannot be."""
    if not 1 <= beams <= MAX_BEAMS:
        raise ConfigError(describe("beams", f"1 to {MAX_BEAMS}", f"{beams}"))
    if beams > 1 and (any(temperatures) or constrain):
        found = "constrained replies" if constrain else "sampling at a temperature above 0"
        raise ConfigError(describe(f"beams: {beams}", "temperature 0 and free replies", found))


def check_sampling(max_tokens: int, temperature: float = 0.0, seed: int = 0) -> None:
    """Raise :class:`ConfigError` for what no engine samples by."""
    for name, value, allowed in (
        ("max_tokens", max_tokens, ranges.COUNT),
        ("temperature", temperature, ranges.TEMPERATURE),
        ("seed", seed, ranges.SEED),
    ):
        ranges.check(name, value, allowed)


def check_choices(choices: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for choices of which none, or none but one, could be meant."""
    plain = [normalise(choice) for choice in choices]
    if choices and (len(set(plain)) < max(2, len(plain)) or not all(plain) or len(plain) > MOST_CHOICES):
        expected = f"2 to {MOST_CHOICES} that differ, each with words"
        raise ConfigError(describe("choices", expected, ", ".join(f"'{choice}'" for choice in choices[:30])))


def check_style(style: str | None) -> None:
    """Raise :class:`ConfigError` for a style that there is not."""
    if style is not None and style not in prompts.STYLES:
        known = ", ".join(prompts.STYLES)
        raise ConfigError(f"style '{style}': expected one of {known}{nearest(style, prompts.STYLES)}.")
