"""Small stages of our own for the tests of ``kind: corpus``; worker processes import them by name."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.corpus.stage import Item, Reject, Step


@dataclass
class Note(Step):
    """Notes each call in a file; does what the text of an item says."""

    name: ClassVar[str] = "note"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    gives: ClassVar[tuple[str, ...]] = ("noted",)
    reasons: ClassVar[tuple[str, ...]] = ("unwanted",)
    free: ClassVar[tuple[str, ...]] = ("log", "seconds")

    log: str  # a file with a line for each item of each call
    word: str = "noted"  # the value that items get
    seconds: float = 0.0  # how long an item takes

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        found: list[Item | Reject] = []
        for item in items:
            with open(self.log, "ab", buffering=0) as file:
                file.write(f"{item.id}\n".encode())
            text = item.fields["text"]
            time.sleep(self.seconds)
            if text == "raise":
                raise KeyError("nothing there")
            if text == "full":
                raise OSError(errno.ENOSPC, "No space left on device", "clips/a.flac")
            if text == "hang":
                time.sleep(1000)
            if text == "die":
                os.kill(os.getpid(), 9)
            if text == "nan":
                found.append(item.adding(noted=float("nan")))
            elif text == "unwanted":
                found.append(Reject(item.id, "unwanted", "so it says"))
            else:
                found.append(item.adding(noted=f"{self.word} {text}"))
        return found


@dataclass
class Order(Step):
    """Numbers all items by their text: a stage that has to see all of them."""

    name: ClassVar[str] = "order"
    whole: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("noted",)
    gives: ClassVar[tuple[str, ...]] = ("place",)
    reasons: ClassVar[tuple[str, ...]] = ("last",)
    free: ClassVar[tuple[str, ...]] = ("log",)

    log: str  # a file with a line for each item of each call

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        with open(self.log, "a") as file:
            file.writelines(f"{item.id}\n" for item in items)
        order = sorted(item.fields["noted"] for item in items)
        places = {item.id: order.index(item.fields["noted"]) for item in items}
        last = len(items) - 1
        self._first = order[0]
        return [
            Reject(item.id, "last") if places[item.id] == last else item.adding(place=places[item.id]) for item in items
        ]

    def facts(self) -> Mapping[str, Any]:
        return {"first": self._first}


@dataclass
class Broken(Step):
    """Breaks the contract in the way that its key says."""

    name: ClassVar[str] = "broken"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    reasons: ClassVar[tuple[str, ...]] = ("known",)
    how: str = "fewer"  # what it does

    def open(self, folder: Path) -> None:
        if self.how == "open":
            raise OSError("no model here")

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        if self.how == "fewer":
            return []
        if self.how == "other":
            return [Item("other", {}) for _ in items]
        if self.how == "detail":
            return [Reject(item.id, "known", {"not": "words"}) for item in items]  # type: ignore[arg-type]
        return [Reject(item.id, "no such reason") for item in items]


@dataclass
class Strange(Step):
    """Sees all items, and says of itself what JSON cannot."""

    name: ClassVar[str] = "strange"
    whole: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("text",)
    gives: ClassVar[tuple[str, ...]] = ("told",)
    how: str = "facts"  # where

    def digests(self) -> Mapping[str, str]:
        return {"model": float("nan")} if self.how == "digests" else {}  # type: ignore[dict-item]

    def open(self, folder: Path) -> None:
        if self.how == "open":
            raise ValueError("no model here")

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return [item.adding(told={1} if self.how == "field" else 1) for item in items]

    def facts(self) -> Mapping[str, Any]:
        return {"mean": float("nan")} if self.how == "facts" else {}


@dataclass
class Ask(Step):
    """Carries questions, about what the text of an item says: one of choices and one open."""

    name: ClassVar[str] = "ask"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    gives: ClassVar[tuple[str, ...]] = ("questions",)

    thinking: str = "It rings."  # of each question

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        found: list[Item | Reject] = []
        for item in items:
            text = item.fields["text"]
            choice = {"question": "What is it?", "choices": [text, "other"], "answer": text, "type": "class"}
            choice["written_by"] = {"question": "templates", "thinking": "a model"}
            opened = {"question": "Describe it.", "answer": f"a {text}", "type": "caption"}
            elements = {"agents": ["a bell"], "when": ["at once"]}
            for question in (choice, opened):
                question |= {"thinking": self.thinking, "semantic_elements": elements}
            wrong = {"question": "What?", "choices": ["a", "b"], "answer": "c"}
            questions = [] if text == "nothing" else [wrong] if text == "wrong" else [choice, opened]
            found.append(item.adding(questions=questions))
        return found


@dataclass
class Bare(Step):
    """Says nothing of what it needs."""

    name: ClassVar[str] = "bare"

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return list(items)


@dataclass
class Stranger:
    """Is no :class:`Step`."""

    name: ClassVar[str] = "stranger"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return list(items)


@dataclass
class Forgetful(Broken):
    """Can be asked again for a reason that it does not have."""

    retryable: ClassVar[tuple[str, ...]] = ("asleep",)
