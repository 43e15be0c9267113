"""Worker processes for rendering: results in order, a bounded number in flight, no orphans."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from audio_llm.errors import AudioLLMError

CHUNK = 16  # items a worker makes before it hands them over
_worker: Any = None  # the object whose methods this process runs


def die_with_parent() -> None:
    """A worker of a killed parent waits for work for ever; leave as soon as the parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _start(kind: Any, args: tuple[Any, ...]) -> None:
    global _worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    die_with_parent()
    _worker = kind(*args)


def _call(method: str, job: Any) -> Any:
    return getattr(_worker, method)(job)


class Jobs:
    """Runs methods of a worker object, in this process (one worker) or in several."""

    def __init__(self, executor: Executor | None, worker: Any, workers: int) -> None:
        self.executor, self.worker, self.workers = executor, worker, workers

    def run(self, method: str, jobs: Sequence[Any]) -> Iterator[Any]:
        """Results of ``worker.method(job)`` in the order of `jobs`; at most three jobs per worker are in flight."""
        if self.executor is None:
            yield from (getattr(self.worker, method)(job) for job in jobs)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for job in jobs:
                waiting.append(self.executor.submit(_call, method, job))
                if len(waiting) >= 3 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def submit(self, method: str, job: Any) -> Future[Any]:
        """``worker.method(job)``, to be asked for later; made at once where there are no worker processes."""
        if self.executor is not None:
            return self.executor.submit(_call, method, job)
        done: Future[Any] = Future()
        try:
            done.set_result(getattr(self.worker, method)(job))
        except Exception as error:
            done.set_exception(error)
        return done

    def each(self, method: str, items: Sequence[Any], label: str, quiet: bool, *head: Any) -> Iterator[Any]:
        """What ``worker.method((*head, some of the items))`` lists, one after the other, under a progress bar."""
        some = [(*head, items[start : start + CHUNK]) for start in range(0, len(items), CHUNK)]
        for found in bar(self.run(method, some), len(some), label, quiet):
            yield from found


@contextlib.contextmanager
def open_pool(workers: int, kind: Any, args: tuple[Any, ...], *, apart: bool = False) -> Iterator[Jobs]:
    """A pool whose processes each hold one ``kind(*args)``; `kind` and `args` must be picklable.

    One worker is this process, or, `apart`, another one; none is this process.
    """
    if workers < (1 if apart else 2):
        yield Jobs(None, kind(*args), 1)
        return
    with plain_pool(workers, _start, (kind, args)) as executor:
        yield Jobs(executor, None, workers)


@contextlib.contextmanager
def plain_pool(workers: int, initializer: Any = None, args: tuple[Any, ...] = ()) -> Iterator[Executor]:
    """A process pool by spawn (forking a process that has threads may hang), cancelled on the way out."""
    executor = ProcessPoolExecutor(
        max(1, workers), multiprocessing.get_context("spawn"), initializer or die_with_parent, args
    )
    try:
        yield executor
    except BrokenProcessPool as error:
        raise AudioLLMError(
            "a worker process died (out of memory?). Finished shards are intact; run again, with --workers 1 "
            "if it repeats."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def bar(items: Iterable[Any], total: int, label: str, quiet: bool) -> Iterable[Any]:
    """A progress bar over `items`; silent when `quiet` or when the error stream is no terminal and short."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=label, disable=quiet, mininterval=1.0, leave=False)
