"""Controls: what a model answers when the sound is taken away, mirrored or exchanged, or the options are permuted.

Each control turns an item into another item whose right answer is known, or says that it does not apply.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import numpy as np

from audio_llm.errors import ConfigError, nearest
from audio_llm.language.mirroring import SIDE_WORD, mirror_event, mirror_text
from eval.benchmarks.base import Item
from eval.predictions import Prediction

EACH = "silence_each"  # asked as silence_1, silence_2, …: of several sounds each one alone is silent
CONTROLS = ("silence", "swap", "other_audio", "shuffled_options", "text_only", EACH)
GUESSED = ("silence", "other_audio", "text_only")  # with these the question can only be guessed
_ONE_SILENT = re.compile(r"silence_[1-9]\d{0,3}")
# One named thing beside another, and nothing else asked. More words after the second could be what the question is
# about ("… to the left of the cat louder than the bell?"), so it has one.
_BESIDE = re.compile(
    r"is the [\w' -]+ (?:(?:to|on) the )?(?:left|right) of the (?:(?:sound|noise) of (?:the |an? )?)?[\w'-]+\s*\?",
    re.IGNORECASE,
)


def parse_controls(text: str) -> list[str]:
    """``"silence,swap"`` → names; ``all`` and ``none`` are understood. Raises :class:`ConfigError` with the nearest."""
    if text in ("", "none"):
        return []
    names = list(CONTROLS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CONTROLS:
            raise ConfigError(f"control '{name}': expected one of {', '.join(CONTROLS)}{nearest(name, CONTROLS)}.")
        if names.count(name) > 1:
            raise ConfigError(f"control '{name}': expected once, found {names.count(name)} times.")
    return names


def asked_as(control: str, audios: int) -> list[str]:
    """The controls that a question about `audios` sounds is asked under for `control`: itself but for ``EACH``, which
    is one for each of several sounds and none for one."""
    if control != EACH:
        return [control]
    return [f"silence_{number}" for number in range(1, audios + 1)] if audios > 1 else []


def silenced(control: str) -> int | None:
    """Which sound alone is silent under `control`, from 1 on; None for any other control."""
    return int(control.removeprefix("silence_")) if _ONE_SILENT.fullmatch(control) else None


def named(control: str) -> str:
    """What tables call `control`."""
    number = silenced(control)
    return control if number is None else f"sound {number} alone silent"


def is_control(name: str) -> bool:
    return name in CONTROLS or silenced(name) is not None


# ------------------------------------------------------------------------------------------------- what is asked


def changed(item: Item, control: str, seed: int, sample: int = 0) -> Item | None:
    """The question as it is asked under `control`, None where that does not apply. Most change its sound alone
    (:class:`Partners` says whose it hears under ``other_audio``)."""
    change = QUESTIONS.get(control)
    return change(item, seed, sample) if change else item


def swap(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The item as it is true once left and right are exchanged; None where its answer does not turn on the side.

    It applies to an answer that names a side (its mirror must be among the choices), and to "yes" where one source is
    said to be left, or right, of another. Any other "yes" may stay one in the mirrored scene ("Is there a sound on the
    left?" with one on either side), and so may a "no".
    """
    events = [mirror_event(event) for event in item.events]
    mirrored = mirror_text(item.gold)
    if mirrored is None:
        return None
    if mirrored != item.gold:
        if item.choices and mirrored not in item.choices:
            return None
        return dataclasses.replace(item, gold=mirrored, events=events)
    if item.gold.casefold() == "yes" and _compares_sides(item):
        no = next((choice for choice in item.choices if choice.casefold() == "no"), None if item.choices else "No")
        return dataclasses.replace(item, gold=no, events=events) if no else None
    return None


def _compares_sides(item: Item) -> bool:
    """Whether `item` asks if one source is to one side of another."""
    sides = {word.casefold() for word in SIDE_WORD.findall(item.question)}
    typed = item.question_type.upper() == "MIXUP_DIRECTION"  # SpatialSoundQA's type for nothing else
    return len(sides) == 1 and (typed or _BESIDE.fullmatch(item.question.strip()) is not None)


def shuffled_options(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The item with its options in another order, drawn by the seed and the item's id: the `sample`-th of all orders
    but its own, each order once; None where there are not so many."""
    own = tuple(item.choices)
    seen: list[tuple[str, ...]] = []
    generator = np.random.default_rng(item_seed(seed, item.id, "shuffled_options"))
    orders = _orders(item.choices)
    while len(seen) < min(sample + 1, orders - 1):
        order = tuple(item.choices[index] for index in generator.permutation(len(own)))
        if order != own and order not in seen:
            seen.append(order)
    return dataclasses.replace(item, choices=list(seen[sample])) if sample < len(seen) else None


def _orders(choices: Sequence[str]) -> int:
    """Number of different orders of `choices`, equal ones exchanged counting once."""
    return math.factorial(len(choices)) // math.prod(math.factorial(count) for count in Counter(choices).values())


QUESTIONS: dict[str, Callable[[Item, int, int], Item | None]] = {"swap": swap, "shuffled_options": shuffled_options}


# -------------------------------------------------------------------------------------------------- what is heard


class Partners:
    """Whose sound an item hears under ``other_audio``: that of an item with another clip, and as many sounds.

    Items stand on rings, where the hashes of their ids put them; an item asks those that come behind the place of its
    own hash, which depends on the seed, on one of the rings. So the order is drawn by the seed and the ids alone, a
    further item changes what those hear that draw it, one whose sound cannot be heard changes nothing, and a draw costs
    as much among a million items as among ten. `unusable` holds ids.
    """

    RINGS = 16  # an item stands behind a wide gap on one of them, and narrow ones on others: all are drawn about alike

    def __init__(self, items: Sequence[Item], seed: int, unusable: Container[str] = ()) -> None:
        self._clips = np.unique(np.asarray([item.clip for item in items], dtype=str), return_inverse=True)[1]
        self._audios = np.asarray([item.audios for item in items])
        self._asking = _hashes(item.id for item in items) ^ _hashes([f"other_audio {seed}"])
        self._asked = _hashes(f"partner {item.id}" for item in items)
        self._usable = np.asarray([item.id not in unusable for item in items], dtype=bool)
        self._rings: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def drop(self, index: int) -> None:
        """Item `index` cannot be heard: nobody gets its sound."""
        self._usable[index] = False

    def of(self, index: int) -> Iterator[int]:
        """The items that item `index` may hear instead of itself, first choice first."""
        ring = int(self._asking[index]) % self.RINGS
        points, members = self._ring(ring, int(self._audios[index]))
        begin = int(np.searchsorted(points, _mixed(self._asking[index : index + 1])[0]))
        done, step = 0, 16
        while done < len(members):
            part = members.take(range(begin + done, begin + min(done + step, len(members))), mode="wrap")
            done, step = done + len(part), 4 * step
            for other in part[self._clips[part] != self._clips[index]].tolist():
                if self._usable[other]:
                    yield other

    def _ring(self, number: int, audios: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the items of as many `audios` stand on a ring, rising, and which they are."""
        if (number, audios) not in self._rings:
            members = np.flatnonzero(self._audios == audios)
            points = _mixed(self._asked[members] ^ _hashes([f"ring {number}"]))
            order = np.argsort(points, kind="stable")
            self._rings[number, audios] = points[order], members[order]
        return self._rings[number, audios]


def _hashes(texts: Iterable[str]) -> np.ndarray:
    """64 bits of SHA-256 per text, uint64."""
    parts = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8] for text in texts]
    return np.frombuffer(b"".join(parts), dtype="<u8")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 spread over all of it, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def unheard_by_count(rows: Iterable[Prediction]) -> str:
    """A warning where every prompt has as many tokens with its sound as under ``text_only``; "" where that is not so,
    or cannot be told. An endpoint may drop the audio of a request without a word."""
    counted = [row for row in rows if not row.error and row.sample == 0 and row.prompt_tokens > 0]
    heard = {(row.id, row.temperature): row.prompt_tokens for row in counted if not row.control}
    alone = {(row.id, row.temperature): row.prompt_tokens for row in counted if row.control == "text_only"}
    common = heard.keys() & alone.keys()
    if not common or any(heard[key] != alone[key] for key in common):
        return ""
    return (
        f"the model counts as many prompt tokens with the sound as without, in all {len(common)} questions: it may "
        "never have been given it."
    )


def item_seed(seed: int, *parts: object) -> int:
    """A 31-bit seed that depends on the run's seed and on the item alone, never on batches or on resuming."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
