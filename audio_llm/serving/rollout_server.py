"""A vLLM server that samples for GRPO: its command, its process, and what its clients say to it."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from audio_llm.errors import ConfigError, PrerequisiteError, TrainingError, describe
from audio_llm.serving.guard import TOKEN
from audio_llm.serving.health import broken_off, is_here, proxies_for
from audio_llm.serving.launcher import cpu_build, server_environment
from audio_llm.training.engine_recipe import EngineRecipe

CONNECTIONS = 32  # requests in flight to each server
LONGEST_ANSWER = 3600  # seconds that one request may take
HEALTH_INTERVAL = 5.0  # seconds of waiting after which a server is asked whether it lives
COMPLETIONS = "/v1/completions"
LONGEST_SILENCE = 45.0  # seconds without a word from a server, after which it is given up


class ServerGone(TrainingError):
    """A rollout server that does not answer, or cannot go on."""


class Remote:
    """A rollout server as its clients see it; ``model`` is what it calls the weights that it was started with."""

    def __init__(self, url: str, token: str) -> None:
        import requests

        self.url = url.rstrip("/")
        self._requests, self._session = requests, requests.Session()
        self._session.trust_env = not is_here(self.url)
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))
        try:
            self.model = str(self._session.get(f"{self.url}/v1/models", timeout=30).json()["data"][0]["id"])
        except (OSError, ValueError, LookupError) as error:
            raise PrerequisiteError(
                describe(
                    f"engine.url {self.url}", "a vLLM server", f"no answer ({error})", "See docs/grpo.md to start one."
                )
            ) from error

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        item = f"engine {self.url}{path}"
        waiting: Future[Any] = Future()

        def ask() -> None:
            try:
                waiting.set_result(self._session.post(self.url + path, json=body, timeout=LONGEST_ANSWER))
            except BaseException as error:
                waiting.set_exception(error)

        # A thread that is given up with its server, and holds up no exit.
        threading.Thread(target=ask, daemon=True, name=item).start()
        try:
            response = self._await(waiting, item)
        except OSError as error:
            raise ServerGone(describe(item, "an answer", f"none ({error})")) from error
        if response.status_code != 200:
            kind = ServerGone if response.status_code >= 500 else TrainingError
            raise kind(describe(item, "status 200", f"{response.status_code} {response.text[:300]}"))
        if path == COMPLETIONS and (reason := broken_off(response.json())):  # learnt from, it would be a short reply
            raise ServerGone(describe(item, "whole replies", f"one broken off ({reason})"))
        return response

    def _await(self, waiting: Future[Any], item: str) -> Any:
        """The answer, however long it takes while the server says at ``/health`` that it lives."""
        heard = time.monotonic()
        while not futures.wait([waiting], timeout=HEALTH_INTERVAL).done:
            if self._lives():
                heard = time.monotonic()
            elif (silent := time.monotonic() - heard) > LONGEST_SILENCE:
                raise ServerGone(describe(item, "an answer", f"nothing for {silent:.0f} s, at /health neither"))
        return waiting.result()

    def _lives(self) -> bool:
        try:
            # Not by the session, whose connections may all be taken.
            return bool(
                self._requests.get(
                    f"{self.url}/health",
                    headers=self._session.headers,
                    timeout=HEALTH_INTERVAL,
                    proxies=proxies_for(self.url),
                ).ok
            )
        except OSError:
            return False

    def close(self) -> None:
        self._session.close()


def check_devices(recipe: EngineRecipe) -> None:
    """:class:`ConfigError` where a server that starts here has fewer GPUs than it is to spread its model over."""
    wanted, there = recipe.tensor_parallel_size, torch.cuda.device_count()
    if wanted > max(1, there):
        cure = "Lower it, or start the server where they are (--server-command) and name it by engine.url."
        raise ConfigError(describe("engine.tensor_parallel_size", f"{wanted} visible GPUs", f"{there}", cure))


def server_command(
    model: Path, dtype: str, recipe: EngineRecipe, max_model_len: int, lora_rank: int | None, seed: int, port: int
) -> list[str]:
    """Arguments of a rollout server for the language model in folder `model`."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning", "--seed", str(seed)]
    command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(recipe.max_num_seqs)]
    command += ["--block-size", str(recipe.block_size), "--generation-config", "vllm"]
    command += ["--middleware", ROLLOUT_GUARD, "--allowed-origins", "[]"]
    command += ["--enable-prompt-embeds", "--logprobs-mode", "processed_logprobs"]
    command += ["--enable-prefix-caching" if recipe.prefix_caching else "--no-enable-prefix-caching"]
    if recipe.max_num_batched_tokens is not None:
        command += ["--max-num-batched-tokens", str(recipe.max_num_batched_tokens)]
    if recipe.tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(recipe.tensor_parallel_size)]
    if lora_rank is not None:
        command += ["--enable-lora", "--max-lora-rank", str(lora_rank), "--max-loras", "1", "--max-cpu-loras", "2"]
    if cpu_build():
        return [*command, "--enforce-eager"]
    return [*command, "--gpu-memory-utilization", str(recipe.gpu_memory_utilization)]


# A server started from a training process must not take itself for one of the ranks.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def rollout_server_environment() -> dict[str, str]:
    """Environment of a rollout server: as for serving, and open to new weights (so it must listen locally only)."""
    environment = {
        name: value for name, value in server_environment(cpu_build()).items() if name not in _RANK_VARIABLES
    }
    return environment | {
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc and /reset_prefix_cache
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


ROLLOUT_GUARD = "audio_llm.serving.guard.RolloutGuard"
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


class Server:
    """A rollout server of our own: started here, killed with all its children by :meth:`stop` or at our exit."""

    def __init__(
        self,
        model: Path,
        dtype: str,
        recipe: EngineRecipe,
        max_model_len: int,
        lora_rank: int | None = None,
        seed: int = 0,
        patience_seconds: float = 600.0,
        token: str = "",
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.token = token or secrets.token_hex(16)
        self._stopped = False
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the server)
        self._process = subprocess.Popen(
            server_command(model, dtype, recipe, max_model_len, lora_rank, seed, port),
            env=rollout_server_environment() | {TOKEN: self.token},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine and workers form one group that can be killed together
        )
        atexit.register(self.stop)
        self._wait(patience_seconds)

    def _wait(self, patience_seconds: float) -> None:
        import requests

        deadline = time.monotonic() + patience_seconds
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, self._process.pid, _LOOK) is not None:
                break
            with contextlib.suppress(OSError):
                head = {"Authorization": f"Bearer {self.token}"}
                if (
                    requests.get(
                        f"{self.url}/health", headers=head, timeout=5, proxies=proxies_for(self.url)
                    ).status_code
                    == 200
                ):
                    return
            time.sleep(0.5)
        self._log.seek(0)
        tail = " | ".join(line for line in self._log.read().splitlines() if "rror" in line)[-500:]
        self.stop()
        raise PrerequisiteError(
            describe("rollout server", f"ready within {patience_seconds:.0f} s", tail or "no sign of life")
        )

    def stop(self) -> None:
        """End the server and its children; a second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        self._process.terminate()
        deadline = time.monotonic() + 10
        # Not wait(): until the leader is reaped, its id cannot become another process's group.
        while time.monotonic() < deadline and os.waitid(os.P_PID, self._process.pid, _LOOK) is None:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
