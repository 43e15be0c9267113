"""A vLLM server that samples for GRPO: its command, its process, and what its clients say to it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from audio_llm.errors import ConfigError, PrerequisiteError, TrainingError, describe
from audio_llm.serving.guard import TOKEN
from audio_llm.serving.health import broken_off, is_here, proxies_for
from audio_llm.serving.launcher import cpu_build, server_environment
from audio_llm.training.engine_recipe import EngineRecipe

CONNECTIONS = 32  # requests in flight to each server
LONGEST_ANSWER = 3600  # seconds that one request may take
HEALTH_INTERVAL = 5.0  # seconds of waiting after which a server is asked whether it lives
COMPLETIONS = "/v1/completions"
CHUNK_BYTES = 2**28  # of weights that are announced together
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

    def get(self, path: str) -> Any:
        """What the server answers at once, as JSON."""
        item = f"engine {self.url}{path}"
        try:
            response = self._session.get(self.url + path, timeout=LONGEST_SILENCE)
            response.raise_for_status()
            return response.json()
        except (OSError, ValueError) as error:
            raise ServerGone(describe(item, "an answer", f"{error}")) from error

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


class Sender:
    """The trainer's end towards one server, which was started for it (``engine.transfer: broadcast``). `device` is that
    of the weights."""

    def __init__(self, remote: Remote, device: torch.device) -> None:
        from audio_llm.serving.weight_transfer import open_group

        self.remote, self.device = remote, device
        world_size = 1 + int(remote.get("/get_world_size")["world_size"])
        host = _address_towards(remote.url)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        information = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": world_size}
        asked = {"init_info": information | {"packed": False}}
        try:
            self._group = self._together(
                lambda: remote.post("/init_weight_transfer_engine", asked), lambda: open_group(information, device)
            )
        except ServerGone as error:
            expected = "a server started for engine.transfer: broadcast, as --server-command prints it"
            raise ServerGone(describe(f"engine {remote.url}", expected, f"{error}")) from error

    def start(self) -> None:
        """Ready the server for new weights."""
        self.remote.post("/start_weight_update")

    def send(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Send some of the weights, under their names in a checkpoint."""
        from audio_llm.serving.weight_transfer import send

        update = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
        }
        self._together(
            lambda: self.remote.post("/update_weights", {"update_info": update}),
            lambda: send(self._group, [tensor for _, tensor in tensors]),
        )

    def finish(self) -> None:
        """Have the server sample from what it was sent."""
        self.remote.post("/finish_weight_update")

    def _together(self, ask: Callable[[], Any], work: Callable[[], Any]) -> Any:
        """What `work` returns, which needs what `ask` has the server do. Where one fails the other is left to itself:
        it may wait for ever."""
        asked, done = self._in_thread(ask), self._in_thread(work)
        futures.wait((asked, done), return_when=futures.FIRST_EXCEPTION)
        for future in (asked, done):
            if future.done() and isinstance(error := future.exception(), ServerGone):
                raise error
        if done.done() and (failed := done.exception()) is not None:
            item = f"engine {self.remote.url}"
            raise ServerGone(describe(item, "a server that takes weights", f"{failed}")) from failed
        asked.result()
        return done.result()

    def _in_thread(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name=f"weights {self.remote.url}").start()
        return future


def chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in lists of about ``CHUNK_BYTES``, each list whole before it is given."""
    found: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        found.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= CHUNK_BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found


def _address_towards(url: str) -> str:
    """The address of this machine under which the server at `url` reaches it."""
    if is_here(url):
        return "127.0.0.1"
    parts = urlsplit(url)
    try:
        family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ServerGone(describe(f"engine {url}", "a machine within reach", f"{error}")) from error


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
    if recipe.transfer == "broadcast":
        command += ["--weight-transfer-config", json.dumps({"backend": "gloo" if cpu_build() else "nccl"})]
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
