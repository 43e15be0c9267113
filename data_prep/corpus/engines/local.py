"""Worker processes on this machine, which stay for all stages of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

from audio_llm import machine
from audio_llm.errors import AudioLLMError, ConfigError, describe
from data_prep.corpus.engines.base import Answer, Done, Holder, Job, Running, raised, spread, told
from data_prep.corpus.stage import Stage
from data_prep.scenes.pool import die_with_parent, forking

_END = object()  # of what is sent to a worker


def _work(pipe: Connection, folder: Path) -> None:
    """What a worker process does: it opens a stage that it is sent, and answers calls, until the driver hangs up."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores, so a thread each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the driver's to handle
    die_with_parent()
    holder: Holder | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = pipe.recv()
            if not isinstance(message, list):  # another stage, or none for now
                if holder is not None:
                    holder.stage.close()
                holder = None
            if isinstance(message, list):
                assert holder is not None
                try:
                    answer = Answer("lines", holder.call(message))
                except Exception as error:
                    answer = raised(error)
                pipe.send(answer)
            elif message is not None:
                try:
                    holder = Holder(message, folder)
                    answer = Answer("ready")
                except Exception as error:
                    answer = Answer("failed", error if isinstance(error, AudioLLMError) else told(error))
                pipe.send(answer)


class _Process:
    """A worker. What is sent goes through a thread, so that a driver that sends much still hears what is answered."""

    def __init__(self, context: Any, folder: Path) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, folder))
        self.process.start()
        other.close()  # else its end would not be seen here
        self._letters: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._post, daemon=True)
        self._thread.start()

    def _post(self) -> None:
        with contextlib.suppress(OSError):  # of a dead one the next wait tells
            while (letter := self._letters.get()) is not _END:
                self.pipe.send(letter)

    def send(self, message: Any) -> None:
        self._letters.put(message)

    def heard(self) -> Answer:
        """What it says, when there is something to read or it is dead."""
        try:
            if self.pipe.poll():
                answer: Answer = self.pipe.recv()
                return answer
        except (EOFError, OSError):
            pass
        self.kill()
        return Answer("died")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._letters.put(_END)
        self._thread.join()
        self.pipe.close()


class LocalPool:
    """Processes that stay for all stages, forked from one that has what each of them imports."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self._context = forking(__name__, "data_prep.corpus.sounds")
        self._idle: list[_Process] = []

    def start(self, stage: Stage, running: Running) -> _Process:
        process = self._idle.pop() if self._idle else _Process(self._context, self.folder)
        process.send(stage)
        return process

    def release(self, worker: _Process) -> None:
        worker.send(None)
        self._idle.append(worker)

    def wait(self, workers: Sequence[_Process], seconds: float) -> list[tuple[_Process, Answer]]:
        signs: dict[Any, _Process] = {}
        for worker in workers:
            signs |= {worker.pipe: worker, worker.process.sentinel: worker}
        heard = {id(signs[sign]): signs[sign] for sign in wait(list(signs), seconds)}
        return [(worker, worker.heard()) for worker in heard.values()]

    def map(self, label: str, stage: Stage, running: Running, jobs: Iterable[Job]) -> Iterator[Done]:
        yield from spread(label, self, stage, running, running.workers or self.workers, jobs)

    def close(self) -> None:
        for process in self._idle:
            process.kill()


@dataclass
class Local:
    """The engine 'local': so many processes on this machine."""

    name: ClassVar[str] = "local"
    workers: int | None = None  # processes; without a number, one for each core

    def check(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(describe("engine.workers", "1 or more", f"{self.workers}"))

    def pool(self, folder: Path, workers: int | None) -> LocalPool:
        return LocalPool(folder, workers or self.workers or machine.cpus())


ENGINE = Local
