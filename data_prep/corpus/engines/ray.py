"""Workers on one machine or on a cluster, by Ray: an actor holds a stage, and asks for cores and shares of GPUs.

The driver hands out items and writes the ledgers, as with the engine 'local'; Ray's own retries are off, for which item
is to blame is known here alone. Stages read and write files below the corpus folder, so on a cluster it has to lie on a
disk that all machines see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from audio_llm.errors import AudioLLMError, ConfigError, describe, require
from data_prep.corpus.engines.base import Answer, Done, Holder, Job, Running, raised, spread, told
from data_prep.corpus.stage import Stage


class _Actor:
    """What an actor holds. Errors are answers, so that they keep their kind."""

    def open(self, stage: Stage, folder: Path) -> Answer:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        try:
            self.holder = Holder(stage, folder)
        except Exception as error:
            return Answer("failed", error if isinstance(error, AudioLLMError) else told(error))
        return Answer("ready")

    def call(self, jobs: list[Job]) -> Answer:
        try:
            return Answer("lines", self.holder.call(jobs))
        except Exception as error:
            return raised(error)


class _Handle:
    """An actor, and the references of its answers in their order."""

    def __init__(self, ray: Any, actor: Any, first: Any) -> None:
        self.ray, self.actor, self.answers = ray, actor, deque([first])

    def send(self, jobs: Sequence[Job]) -> None:
        self.answers.append(self.actor.call.remote(list(jobs)))

    def kill(self) -> None:
        self.ray.kill(self.actor)


class RayPool:
    """Actors for a stage at a time: when it is done they are ended, and what they asked for is free."""

    def __init__(self, folder: Path, address: str | None, workers: int | None) -> None:
        import ray

        self.ray: Any = ray
        self.folder, self.workers = folder.absolute(), workers
        self.ours = not ray.is_initialized()
        if self.ours:
            paths = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))
            try:
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": {"PYTHONPATH": paths}},
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                cure = "Start one by: ray start --head"
                raise ConfigError(describe(f"engine.address {address}", "a Ray cluster", told(error), cure)) from error

    def start(self, stage: Stage, running: Running) -> _Handle:
        kind = self.ray.remote(_Actor)
        actor = kind.options(num_cpus=running.cpus, num_gpus=running.gpus, max_restarts=0, max_task_retries=0).remote()
        return _Handle(self.ray, actor, actor.open.remote(stage, self.folder))

    def release(self, worker: _Handle) -> None:
        worker.kill()

    def wait(self, workers: Sequence[_Handle], seconds: float) -> list[tuple[_Handle, Answer]]:
        waiting = {worker.answers[0]: worker for worker in workers if worker.answers}
        if not waiting:
            return []
        self.ray.wait(list(waiting), num_returns=1, timeout=seconds)
        ready, _ = self.ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [(waiting[answer], self._heard(waiting[answer])) for answer in ready]

    def _heard(self, worker: _Handle) -> Answer:
        try:
            answer: Answer = self.ray.get(worker.answers.popleft())
            return answer
        except self.ray.exceptions.RayError:
            return Answer("died")

    def map(self, label: str, stage: Stage, running: Running, jobs: Iterable[Job]) -> Iterator[Done]:
        there = self.ray.cluster_resources()
        for name, asked in (("CPU", running.cpus), ("GPU", running.gpus)):
            if asked > there.get(name, 0):
                expected = f"at most {there.get(name, 0):g} {name} for a worker, as there are"
                raise ConfigError(describe(f"stages.{label}", expected, f"{asked:g}"))
        most = min(
            [there["CPU"] // running.cpus if running.cpus else there["CPU"]]
            + ([there["GPU"] // running.gpus] if running.gpus else [])
        )
        workers = running.workers or self.workers or max(1, int(most))
        yield from spread(label, self, stage, running, workers, jobs)

    def close(self) -> None:
        if self.ours:
            with contextlib.suppress(Exception):  # the run is done, or its error is on its way
                self.ray.shutdown()


@dataclass
class Ray:
    """The engine 'ray': actors that keep cores and GPUs free for themselves, here or on a cluster."""

    name: ClassVar[str] = "ray"
    address: str | None = None  # of a cluster; "auto" finds the one that runs here; without it, one is started here
    workers: int | None = None  # actors of a stage; without a number, as many as fit

    def check(self) -> None:
        require("ray", "engine 'ray'", "ray")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(describe("engine.workers", "1 or more", f"{self.workers}"))

    def pool(self, folder: Path, workers: int | None) -> RayPool:
        return RayPool(folder, self.address, workers or self.workers)


ENGINE = Ray
