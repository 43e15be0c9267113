"""Worker processes: forked from one that has imported what they need; results in order, a bounded number in flight, no
orphans."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
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


def forking(*modules: str) -> Any:
    """The context of worker processes, which are forked from a server of this process; where there is none yet, one
    begins, and imports `modules` while this process goes on. They are imported once, not once a worker.

    The server has no threads, as forking one that has may hang: each worker computes with one. It finds modules where
    this process does, whatever lies in the current folder. Where it cannot be (a long ``TMPDIR``, no sockets), workers
    are processes of their own from the start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    given = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": paths}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        forkserver.ensure_running()
        atexit.unregister(stop)
        atexit.register(stop, os.getpid())
    except OSError:
        return multiprocessing.get_context("spawn")
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def stop(owner: int | None = None) -> None:
    """End the server of this process, after its workers: at the latest where this one ends, so that nothing of it is
    left, and that the time of all of them counts as this one's. `owner`: the process that began it."""
    if owner in (None, os.getpid()):
        with contextlib.suppress(AttributeError, OSError):
            forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _start(kind: Any, args: tuple[Any, ...]) -> None:
    global _worker
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
    """A pool whose processes each hold one ``kind(*args)``; `kind` and `args` must be picklable. `kind` may say in
    ``imports`` which modules its methods import when they are first called.

    One worker is this process, or, `apart`, another one; none is this process.
    """
    if workers < (1 if apart else 2):
        yield Jobs(None, kind(*args), 1)
        return
    with plain_pool(workers, _start, (kind, args), kind.__module__, *getattr(kind, "imports", ())) as executor:
        yield Jobs(executor, None, workers)


@contextlib.contextmanager
def plain_pool(workers: int, initializer: Any = None, args: tuple[Any, ...] = (), *modules: str) -> Iterator[Executor]:
    """A process pool that is cancelled on the way out; `modules` as of :func:`forking`."""
    executor = ProcessPoolExecutor(max(1, workers), forking(*modules), initializer or die_with_parent, args)
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
