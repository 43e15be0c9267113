"""One question about one sound, heard as it is, in silence, or mirrored; and whether the answers followed the sound."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from audio_llm.answering.ask import Words
from audio_llm.answering.base import Engine, Request
from audio_llm.audio import Waveform, decode, encode_level, silence, swap_channels
from audio_llm.errors import AudioLLMError, describe
from audio_llm.language.mirroring import mirror_text
from audio_llm.language.replies import Reply, normalise, read_reply

# What the model hears, and what makes it of the sound; the file goes as it is where nothing does.
SOUNDS: dict[str, Callable[[Waveform], Waveform] | None] = {
    "as it is": None,
    "in silence": silence,
    "mirrored": swap_channels,
}


@dataclass(frozen=True)
class Trial:
    """A question, what was heard with it (a key of :data:`SOUNDS`), and the reply, or the `error` in its place."""

    question: str
    choices: tuple[str, ...]
    sound: str
    reply: Reply | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def said(self) -> str:
        """The answer in words: those of the choice that it names, where there are choices; "" where it says none."""
        if self.reply is None:
            return ""
        if self.choices:
            return "" if self.reply.choice is None else self.choices[self.reply.choice]
        return self.reply.said


class Asker:
    """An engine, asked by many visitors: one after the other in this process, side by side behind an address.

    `style` and `max_tokens` are those of :class:`Request`.
    """

    def __init__(self, engine: Engine, *, style: str | None = None, max_tokens: int = 512, remote: bool) -> None:
        self._engine, self._style, self._max_tokens = engine, style, max_tokens
        self._turn = contextlib.nullcontext() if remote else threading.Lock()

    def ask(
        self, file: Path | None, question: str, choices: Sequence[str] = (), sound: str = "as it is", name: str = ""
    ) -> Trial:
        """The model's trial; whatever is wrong with the request is its `error`, in one sentence that calls the sound
        `name`. A sound that is changed goes as a WAV file, so that it is prepared as the file itself would be."""
        question, choices, name = question.strip(), tuple(choices), name or (file.name if file else "sound")
        try:
            if file is None:
                raise AudioLLMError(describe("sound", "an uploaded or a recorded one", "none"))
            if not question:
                raise AudioLLMError(describe("question", "words", "none"))
            change = SOUNDS[sound]
            with tempfile.TemporaryDirectory() as folder:
                if change is not None:
                    changed = change(decode(file, name=name))
                    file = Path(folder) / "changed.wav"
                    file.write_bytes(encode_level(changed))
                with self._turn:
                    audio = self._engine.prepare(file, name)
                    request = Request(Words(question, choices), (audio,), self._style, max_tokens=self._max_tokens)
                    (answer,) = self._engine.generate([request])
        except AudioLLMError as error:
            return Trial(question, choices, sound, error=str(error))
        except OSError as error:  # an upload is taken away after an hour; a disk may be full
            told = describe(f"sound {name}", "a file that can be read", str(error.strerror), "Give it again.")
            return Trial(question, choices, sound, error=told)
        if answer.error:
            return Trial(question, choices, sound, error=answer.error)
        return Trial(question, choices, sound, read_reply(answer.raw, choices), answer.seconds)


class Verdict(NamedTuple):
    """A sentence, and whether it speaks for a model that listens; None where it speaks neither for nor against."""

    words: str
    listens: bool | None = None


def verdict(heard: Trial, other: Trial) -> Verdict:
    """What the answer to the sound as it is, beside that to silence or to the mirrored sound, says about listening.

    One sentence; one pair proves little, and the sentences claim no more than the pair shows.
    """
    first, second = heard.said, other.said
    if not first or not second:
        return Verdict("One of the two says no answer: nothing can be compared.")
    same = normalise(first) == normalise(second)
    if other.sound == "in silence":
        if same:
            return Verdict("The same answer without any sound: this one may be a guess.", False)
        return Verdict("Another answer without the sound: the words alone do not lead the model to this one.", True)
    expected = mirror_text(first)
    if expected is None:
        return Verdict("The answer cannot be turned: its words do not tell whether they mean a side.")
    if normalise(expected) != normalise(first):
        if normalise(expected) == normalise(second):
            return Verdict("The answer changed sides with the sound, as it does where a model listens.", True)
        if same:
            return Verdict("The sound changed sides and the answer stayed: it does not follow the sound.", False)
        return Verdict("The sound changed sides; the answer changed, but not to the other side.", False)
    if mirror_text(heard.question) != heard.question:
        return Verdict("The question names a side, so that either answer can be right of the mirrored sound.")
    if same:
        return Verdict("The answer names no side and stayed, as it should.")
    return Verdict("The answer names no side, and changed all the same: it is not a steady one.", False)
