"""What goes through the path from a stranger's table to shards: a reject with its reason, and a draft of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from audio_llm.errors import AudioLLMError, DataError
from audio_llm.shards.schema import Sample
from data_prep.manifest.sounds import Sound


class Reason(Enum):
    """Why a row is no sample. The list is closed; the values are the sentences that users read."""

    BROKEN_ROW = "the row is not of the form of its format"
    NOT_TEXT = "the file beside the sound is not UTF-8 text, or not JSON"
    NO_SIDECAR = "no file with words lies beside the sound"
    WRONG_TYPE = "a value is of another type than its column's"
    NO_ID = "the id is empty or no text"
    DUPLICATE_ID = "another row has this id"
    REPEATED = "another row of the same side asks the same, with the same choices, about the same sound"
    NO_SOUND_NAMED = "no sound is named"
    SEVERAL_SOUNDS = "more sounds are named than a sample may have"
    OUTSIDE_ROOT = "the path of the sound leads out of its folder"
    NO_SUCH_FILE = "the sound file is not there or cannot be opened"
    EMPTY_FILE = "the sound file is empty"
    NOT_AUDIO = "the sound file is of no format that is read"
    TORN = "the sound file ends before its sound does"
    CHANNELS = "the sound has another number of channels than can be heard"
    NOT_FINITE = "the sound has samples that are no finite numbers"
    LOUD = "the sound goes beyond full scale"
    SILENT = "nothing can be heard"
    SHORT = "the sound is shorter than allowed"
    LONG = "the sound is longer than allowed"
    BAD_TIME = "start or end is no number of seconds from 0 on"
    END_BEFORE_START = "the end is not after the start"
    BEYOND_THE_SOUND = "the stretch goes beyond the end of the sound"
    NO_QUESTION = "the question is empty"
    NO_ANSWER = "the answer is empty"
    EMPTY_CHOICE = "a choice is empty"
    ONE_CHOICE = "there is one choice alone"
    TOO_MANY_CHOICES = "there are more choices than letters"
    EQUAL_CHOICES = "two choices are equal"
    ANSWER_NO_CHOICE = "the answer is none of the choices"
    MARKS = "a text holds a mark that stands for sound, for a turn or for a part of a reply"
    TURNS = "the chat is not one question of a user with one reply"
    BAD_EVENT = "an event breaks the schema"
    NO_GROUP = "the column that sides are chosen by is empty"
    UNKNOWN_SPLIT = "the row is of a split that the recipe does not name"
    OTHER_SIDE = "the same sound is on another side as well"


# What :class:`audio_llm.errors.AudioError` says of a sound, in the words of this list.
CAUSES: Mapping[str, Reason] = {
    "missing": Reason.NO_SUCH_FILE,
    "none": Reason.NO_SOUND_NAMED,
    "outside": Reason.OUTSIDE_ROOT,
    "empty": Reason.EMPTY_FILE,
    "": Reason.NOT_AUDIO,
    "cut": Reason.TORN,
    "channels": Reason.CHANNELS,
    "not finite": Reason.NOT_FINITE,
    "loud": Reason.LOUD,
    "short": Reason.SHORT,
    "long": Reason.LONG,
}


class RowError(DataError):
    """Raised for one row; the rest of the table goes on."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type, tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Reject:
    """A row that is no sample: where it stands, why, and what was found there."""

    item: str
    reason: Reason
    detail: str = ""

    @classmethod
    def of(cls, item: str, error: AudioLLMError) -> Reject:
        """Of what a row raised; anything that has no reason of its own is a row of another form."""
        reason = error.reason if isinstance(error, RowError) else Reason.BROKEN_ROW
        return cls(item, reason, str(error))

    @property
    def told(self) -> str:
        """Where, why and what was found, for a sentence: a detail alone may leave the reason to be guessed."""
        detail = self.detail.rstrip(".")
        return f"{self.item}: {self.reason.value}" + (f" ({detail})" if detail not in ("", self.reason.value) else "")

    def as_dict(self) -> dict[str, str]:
        return {"item": self.item, "reason": self.reason.name.lower(), "detail": self.detail or self.reason.value}


@dataclass
class Draft:
    """A sample without its audio, the sounds it is about and the stretch of each in seconds; `groups` are what is never
    divided between sides, `split` what the row says of its side ("" for nothing)."""

    where: str
    sample: Sample
    sounds: tuple[Sound, ...]
    groups: tuple[str, ...]
    split: str = ""
    stretches: tuple[tuple[float, float | None], ...] = ()
    own: str = ""  # the row's own id, "" for none

    @property
    def name(self) -> str:
        """What messages call its sounds."""
        return " and ".join(sound.name for sound in self.sounds)
