"""The contract of an engine, and the one loop by which all of them hand out items and bear what goes wrong.

An engine only maps: it has workers, each of which holds a stage and answers a call with one ledger line an item. A call
that raises, takes too long or kills its worker costs no other item anything: each of its items is tried once more,
alone, and is a reject then. Answers come in any order; the ledger and the source's order make one result of them.
"""

from __future__ import annotations

import errno
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from audio_llm.errors import AudioLLMError, ConfigError, describe
from data_prep.corpus.ledger import line_of
from data_prep.corpus.stage import DIED, RAISED, TIMEOUT, Item, Reject, RunStopped, Stage

AHEAD = 2  # calls that a worker has at a time: one that runs, and one so that it need not wait
_DETAIL = 500  # characters of what a call raised
# What the disk says of every item alike: it is no fault of one, and the run goes on later.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Running:
    """How an engine runs a stage. Every entry of `stages` may have these keys beside its stage's own."""

    workers: int | None = None  # processes of this stage, in place of the engine's number
    batch: int = 1  # items of one call
    timeout: float = 600.0  # seconds that one call may take; then its items are tried alone, once
    cpus: float = 1.0  # processor cores of a worker, which the engine 'ray' keeps free for it
    gpus: float = 0.0  # graphics processors of a worker, or a share of one, for the engine 'ray'

    def check(self, where: str) -> None:
        for name, least in (("workers", 1), ("batch", 1), ("cpus", 0), ("gpus", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(describe(f"{where}.{name}", f"{least} or more", f"{value}"))
        if self.timeout <= 0:
            raise ConfigError(describe(f"{where}.timeout", "seconds above 0", f"{self.timeout:g}"))


class Job(NamedTuple):
    """An item, and the key of its line in the ledger of the stage."""

    key: str
    item: Item


class Done(NamedTuple):
    """A line for the ledger."""

    key: str
    line: bytes


class Pool(Protocol):
    """Workers for the time of a run."""

    def map(self, label: str, stage: Stage, running: Running, jobs: Iterable[Job]) -> Iterator[Done]:
        """One line a job, in any order. Raises what the stage raises when it is opened."""

    def close(self) -> None:
        """End the workers."""


class Engine(Protocol):
    """A dataclass of its recipe's keys."""

    name: ClassVar[str]

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that do not go together, :class:`PrerequisiteError` for a package that
        is not there."""

    def pool(self, folder: Path, workers: int | None) -> Pool:
        """Workers for the corpus in `folder`; `workers`: how many the command line asks for."""


# ------------------------------------------------------------------------------------------------ in a worker


class Holder:
    """A stage, opened, in a worker."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        stage.open(folder)

    def call(self, jobs: Sequence[Job]) -> list[bytes]:
        """The lines of one call. Raises what the stage raises, and TypeError for results that break the contract."""
        stage, gives = self.stage, self.stage.gives
        results = stage.run([job.item for job in jobs])
        if len(results) != len(jobs):
            raise TypeError(f"'{stage.name}' gave {len(results)} results of {len(jobs)} items")
        for job, result in zip(jobs, results, strict=True):
            if not isinstance(result, (Item, Reject)) or result.id != job.item.id:
                raise TypeError(f"'{stage.name}' gave {result!r:.80} as the result of item '{job.item.id}'")
            if isinstance(result, Reject) and result.reason not in stage.reasons:
                raise TypeError(f"'{stage.name}' rejects for '{result.reason}', which is none of its reasons")
            if isinstance(result, Reject) and not isinstance(result.detail, str):
                raise TypeError(f"'{stage.name}' gave the detail {result.detail!r:.80}, which is no text")
        return [line_of(job.key, result, gives) for job, result in zip(jobs, results, strict=True)]


def told(error: BaseException) -> str:
    """An error of a stage in one line, with the place in its code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return str(error) if isinstance(error, AudioLLMError) else f"{type(error).__name__}: {error}{place}"


# ------------------------------------------------------------------------------------------------ in the driver


class Answer(NamedTuple):
    """What a worker says. `kind`: "ready" (it has opened the stage), "lines" (of its first call), "raised" (its first
    call did: `value` in words), "stopped" (no call can be done: `value` is the error), "failed" (it could not open the
    stage: `value` is the error), "died"; "late" is said of one that says nothing."""

    kind: str
    value: Any = None


def raised(error: Exception) -> Answer:
    """What a worker says of a call that raised `error`."""
    if isinstance(error, RunStopped):
        return Answer("stopped", error)
    if isinstance(error, OSError) and error.errno in _DISK:
        cure = "Make room, and run the same command again: it goes on where it was."
        where = error.filename or "the corpus folder"
        return Answer("stopped", AudioLLMError(describe(str(where), "a disk to write on", str(error.strerror), cure)))
    return Answer("raised", told(error))


class Worker(Protocol):
    def send(self, jobs: Sequence[Job]) -> None:
        """Hand over a call; calls are answered in their order. Where the worker is dead, the next wait says so."""

    def kill(self) -> None:
        """End it at once, whatever it does."""


class Crew(Protocol):
    """What an engine brings: how workers are started and heard."""

    def start(self, stage: Stage, running: Running) -> Any:
        """A :class:`Worker` that opens `stage`, and then says "ready" or "failed"."""

    def release(self, worker: Any) -> None:
        """A worker that has nothing more to do."""

    def wait(self, workers: Sequence[Any], seconds: float) -> list[tuple[Any, Answer]]:
        """What some of them say, at most one answer each; nothing after `seconds`."""


@dataclass
class _Call:
    jobs: list[Job]
    again: bool = False  # a second try, alone


@dataclass
class _Hand:
    """A worker and its calls, the first of which it works on since `since`."""

    worker: Worker
    calls: deque[_Call] = field(default_factory=deque)
    since: float = 0.0
    ready: bool = False


def spread(label: str, crew: Crew, stage: Stage, running: Running, workers: int, jobs: Iterable[Job]) -> Iterator[Done]:
    """Lines of all `jobs`, made by at most so many `workers`. Where it is left early, they are killed."""
    dispatch = _Dispatch(label, crew, stage, running, workers, _calls(jobs, running.batch))
    try:
        while dispatch.hand_out():
            for hand, answer in dispatch.listen():
                yield from dispatch.take(hand, answer)
        dispatch.release()
    finally:
        for hand in dispatch.hands:
            hand.worker.kill()


def _calls(jobs: Iterable[Job], size: int) -> Iterator[_Call]:
    some: list[Job] = []
    for job in jobs:
        some.append(job)
        if len(some) == size:
            yield _Call(some)
            some = []
    if some:
        yield _Call(some)


class _Dispatch:
    """Who works on what, and what waits."""

    def __init__(
        self, label: str, crew: Crew, stage: Stage, running: Running, workers: int, calls: Iterator[_Call]
    ) -> None:
        self.label, self.crew, self.stage, self.running, self.workers = label, crew, stage, running, workers
        self.calls = calls
        self.waiting: deque[_Call] = deque()
        self.hands: list[_Hand] = []

    def hand_out(self) -> bool:
        """Give calls to those that are free, and start workers for what waits; False when all is done."""
        self.waiting.extend(islice(self.calls, max(0, self.workers - len(self.waiting))))
        for hand in sorted(self.hands, key=lambda hand: len(hand.calls)):
            while hand.ready and len(hand.calls) < AHEAD and self.waiting:
                if not hand.calls:
                    hand.since = time.monotonic()
                hand.calls.append(self.waiting.popleft())
                hand.worker.send(hand.calls[-1].jobs)
                self.waiting.extend(islice(self.calls, 1))
        starting = sum(not hand.ready for hand in self.hands)
        for _ in range(min(self.workers - len(self.hands), len(self.waiting) - starting)):
            self.hands.append(_Hand(self.crew.start(self.stage, self.running)))
        return bool(self.waiting) or any(hand.calls for hand in self.hands)

    def listen(self) -> list[tuple[_Hand, Answer]]:
        """What workers say; of those that are overdue and say nothing, that they are."""
        since = [hand.since for hand in self.hands if hand.calls]
        patience = min(since) + self.running.timeout - time.monotonic() if since else 60.0
        by_worker = {id(hand.worker): hand for hand in self.hands}
        told = self.crew.wait([hand.worker for hand in self.hands], max(0.0, min(patience, 60.0)))
        found = [(by_worker[id(worker)], answer) for worker, answer in told]
        heard = {id(hand) for hand, _ in found}
        now = time.monotonic()
        for hand in self.hands:
            if hand.calls and id(hand) not in heard and now - hand.since > self.running.timeout:
                # It may have answered while the driver was busy.
                found += [(hand, answer) for _, answer in self.crew.wait([hand.worker], 0)] or [(hand, Answer("late"))]
        return found

    def take(self, hand: _Hand, answer: Answer) -> Iterator[Done]:
        """The lines that an answer brings."""
        if answer.kind == "ready":
            hand.ready = True
        elif not hand.ready:
            raise self._unopened(answer)
        elif answer.kind == "stopped":
            raise answer.value
        elif answer.kind in ("lines", "raised"):
            call = hand.calls.popleft()
            hand.since = time.monotonic()
            if answer.kind == "lines":
                yield from (Done(job.key, line) for job, line in zip(call.jobs, answer.value, strict=True))
            else:
                yield from self._failed(call, RAISED, answer.value)
        else:
            hand.worker.kill()
            self.hands.remove(hand)
            detail = f"no result after {self.running.timeout:g} s (timeout)"
            detail = detail if answer.kind == "late" else "its worker process ended while it was worked on"
            # The first call is to blame; the others were not begun.
            failed = list(hand.calls)
            self.waiting.extendleft(failed[:0:-1])
            for call in failed[:1]:
                yield from self._failed(call, TIMEOUT if answer.kind == "late" else DIED, detail)

    def release(self) -> None:
        """Let go of the workers, which have nothing to do any more."""
        while ready := [hand for hand in self.hands if hand.ready]:
            self.hands.remove(ready[0])
            self.crew.release(ready[0].worker)

    def _failed(self, call: _Call, reason: str, detail: str) -> Iterator[Done]:
        if not call.again:
            self.waiting.extend(_Call([job], again=True) for job in call.jobs)
            return
        (job,) = call.jobs
        yield Done(job.key, line_of(job.key, Reject(job.item.id, reason, detail[:_DETAIL]), ()))

    def _unopened(self, answer: Answer) -> AudioLLMError:
        if isinstance(answer.value, AudioLLMError):
            return answer.value
        found = answer.value if answer.kind == "failed" else "its worker process ended (out of memory?)"
        cure = "Nothing that was finished is lost: mend it, and run the same command again."
        return AudioLLMError(describe(f"stage '{self.label}'", "a stage that opens", f"{found}", cure))
