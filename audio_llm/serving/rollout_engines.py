"""vLLM as the rollout engine: in this process, or as a server in its own process over HTTP.

Both run the plain language model on prompt embeddings (see ``audio_llm.training.rollouts``), so neither needs the audio
plugin. The policy reaches them as merged weights, or as an adapter that is swapped (a few MB instead of the whole
model, but vLLM's LoRA kernels are slow on CPU): ``auto`` swaps on a GPU and merges on a CPU.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import os
import secrets
import shlex
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from audio_llm.errors import ConfigError, TrainingError, describe, require
from audio_llm.files import atomic_file
from audio_llm.model.export import write_adapter, write_language_model
from audio_llm.serving.guard import TOKEN_FILE
from audio_llm.serving.launcher import LORA_RANKS, cpu_build, hide_llvmlite_attributes, server_environment
from audio_llm.serving.rollout_server import (
    COMPLETIONS,
    CONNECTIONS,
    Remote,
    Sender,
    Server,
    ServerGone,
    check_devices,
    chunks,
    rollout_server_environment,
    server_command,
)
from audio_llm.serving.scratch import private_folder
from audio_llm.training.engine_recipe import EngineRecipe, SyncMode
from audio_llm.training.rollouts import (
    FORBIDDEN_BIAS,
    LANGUAGE_MODEL,
    Completion,
    PolicyWeights,
    RolloutEngine,
    Sampling,
    random_state_kept,
)
from audio_llm.training.transformers_rollouts import TransformersRollouts

PORT = 8000  # of a server that a user starts


def build_engine(recipe: EngineRecipe, policy: PolicyWeights, tokenizer: Any, seed: int = 0) -> RolloutEngine:
    """The engine that `recipe` names. Build it after ``torch.distributed`` is up and before the trainer."""
    backend = recipe.backend
    if backend == "auto":
        backend = "vllm" if find_spec("vllm") is not None else "transformers"
    if backend == "transformers":
        return TransformersRollouts(recipe.batch_size)
    if backend == "vllm":
        return VLLMRollouts(policy, recipe, seed)
    return HTTPRollouts(policy, recipe, seed, tokenizer=tokenizer)


def resolve_sync(
    mode: SyncMode, policy: PolicyWeights, transfer: Literal["folder", "broadcast"] = "folder"
) -> Literal["merged", "adapter"]:
    """How the engine follows the policy. ``adapter`` needs a policy with LoRA on its language model, and is what
    ``auto`` swaps on a GPU, unless the weights are broadcast."""
    has_adapter = any(LANGUAGE_MODEL in name and ".lora_A." in name for name, _ in policy.model.named_parameters())
    if mode == "auto":
        swaps = torch.cuda.is_available() and has_adapter and transfer == "folder"
        return "adapter" if swaps else "merged"
    if mode == "adapter" and not has_adapter:
        cure = "Use sync: merged, or train: {language_model: lora}."
        raise ConfigError(describe("engine.sync: adapter", "a language model with an adapter", "none", cure))
    return mode


def _unties(mode: str) -> bool:
    """Whether the engine gets a tied head by itself. vLLM on a CPU packs the head's weights when it loads the model,
    and anew only where a head is among those of a later sync: a tied one would stay what it was at first."""
    return mode == "merged" and cpu_build()


def _rank() -> tuple[int, int]:
    """(rank, world size) as the launcher's environment tells."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _model_length(policy: PolicyWeights, recipe: EngineRecipe) -> int:
    positions = int(policy.base.config.get_text_config().max_position_embeddings)
    return min(positions, recipe.max_model_len or 4096)


def _lora_rank(policy: PolicyWeights) -> int:
    return _fitting_rank(policy.model.peft_config["default"].r)  # type: ignore[union-attr, index]


def _fitting_rank(rank: int) -> int:
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise ConfigError(f"lora.rank: expected at most {LORA_RANKS[-1]} for sync: adapter, found {rank}.")
    return fitting[0]


def _write_unadapted(policy: PolicyWeights, folder: Path, tokenizer: Any = None, untie: bool = False) -> Path:
    """Write the policy's language model without its adapter."""
    unadapted = getattr(policy.model, "disable_adapter", contextlib.nullcontext)
    with unadapted(), policy.merged(untie) as tensors:
        return write_language_model(policy.base, folder, tensors, tokenizer, untie)


def _check_lengths(prompts: Sequence[Tensor], sampling: Sampling, limit: int) -> None:
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + sampling.max_tokens > limit:
        raise TrainingError(
            describe(
                "rollout engine",
                f"prompt and completion of at most {limit} tokens (engine.max_model_len)",
                f"a prompt of {longest} and completions of up to {sampling.max_tokens}",
                "Lower grpo.max_completion_length, or raise engine.max_model_len.",
            )
        )


# --- in process ----------------------------------------------------------------------------------------------------


PARTS = ("weights", "kv_cache")  # of an engine's memory, as vLLM's sleep mode calls them


def check_sleep(recipe: EngineRecipe) -> None:
    """:class:`ConfigError` for an engine that is to sleep and has no GPU whose memory that would free."""
    if recipe.sleep and cpu_build():
        cure = "On a CPU the engine has memory of its own: leave it out."
        raise ConfigError(describe("engine.sleep: true", "vLLM on a GPU", "its build for a CPU", cure))


class VLLMRollouts:
    """vLLM inside the trainer's process, one engine per rank.

    Sampling draws from the process's random generator, which the trainer saves with a checkpoint: a resumed run samples
    what an uninterrupted one would have. Build it after ``torch.distributed`` is up. With ``recipe.sleep`` it lies down
    after every :meth:`generate`, and what the next call needs is woken.
    """

    name = "vllm"
    live = False

    def __init__(self, policy: PolicyWeights, recipe: EngineRecipe | None = None, seed: int = 0) -> None:
        require("vllm", "the vLLM rollout engine", "vllm")
        self.recipe, self.seed = recipe or EngineRecipe(), seed
        check_sleep(self.recipe)
        self.mode = resolve_sync(self.recipe.sync, policy)
        self.max_model_len = _model_length(policy, self.recipe)
        self.version: int | None = None
        self._asleep: set[str] = set()  # of PARTS
        self._closing = contextlib.ExitStack()
        self._folder = self._closing.enter_context(private_folder())
        atexit.register(self.close)
        self._adapter: Any = None
        if self.mode == "adapter":
            _write_unadapted(policy, self._folder / "model")
        else:
            write_language_model(policy.base, self._folder / "model", None, untie=_unties(self.mode))
        with random_state_kept():  # vLLM seeds the global generators of its process
            self._llm: Any = self._build(policy)

    def _build(self, policy: PolicyWeights) -> Any:
        on_cpu = cpu_build()
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        for name, value in (server_environment(on_cpu) | defaults).items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        rank, world = _rank()
        arguments: dict[str, Any] = {"enforce_eager": True} if on_cpu else {}
        if not on_cpu:
            arguments |= {
                "gpu_memory_utilization": self.recipe.gpu_memory_utilization,
                "enable_sleep_mode": self.recipe.sleep,
            }
        if self.mode == "adapter":
            arguments |= {"enable_lora": True, "max_lora_rank": _lora_rank(policy), "max_loras": 1, "max_cpu_loras": 2}
        else:
            arguments["load_format"] = "dummy"  # the first sync brings the weights
        if self.recipe.max_num_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = self.recipe.max_num_batched_tokens
        if world > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        hide_llvmlite_attributes()
        return LLM(
            str(self._folder / "model"),
            dtype=str(policy.base.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            max_model_len=self.max_model_len,
            max_num_seqs=self.recipe.max_num_seqs,
            enable_prompt_embeds=True,
            enable_prefix_caching=self.recipe.prefix_caching,
            block_size=self.recipe.block_size,
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=self.seed + rank,
            **arguments,
        )

    def sync(self, policy: PolicyWeights, version: int) -> float:
        """See :class:`~audio_llm.training.rollouts.RolloutEngine`."""
        if version == self.version:
            return 0.0
        start = time.perf_counter()
        self._wake("weights")  # without the cache: the policy's merged tensors need room beside them
        if self.mode == "merged":
            with policy.merged(_unties(self.mode)) as tensors:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        else:
            self._swap_adapter(policy, version)
        if not self._llm.reset_prefix_cache():
            raise TrainingError("rollout engine: the prefix cache of the old policy could not be dropped.")
        self.version = version
        return time.perf_counter() - start

    def _wake(self, *parts: str) -> None:
        if asleep := [part for part in parts if part in self._asleep]:
            self._llm.wake_up(asleep)
            self._asleep.difference_update(asleep)

    def _swap_adapter(self, policy: PolicyWeights, version: int) -> None:
        """A new name, id and path per version: vLLM caches by all three."""
        from vllm.lora.request import LoRARequest

        folder = self._folder / f"adapter-{version}"
        with policy.adapter() as (config, tensors):
            write_adapter(folder, config, tensors)
        old, self._adapter = self._adapter, LoRARequest(f"policy-{version}", version + 1, str(folder))
        self._llm.llm_engine.add_lora(self._adapter)
        if old is not None:
            self._llm.llm_engine.remove_lora(old.lora_int_id)
            shutil.rmtree(old.lora_path, ignore_errors=True)

    def generate(
        self, prompt_embeddings: Sequence[Tensor], group_sizes: Sequence[int], sampling: Sampling
    ) -> list[list[Completion]]:
        """See :class:`~audio_llm.training.rollouts.RolloutEngine`."""
        from vllm import SamplingParams

        if not prompt_embeddings:  # a process none of whose groups is drawn again
            return []
        _check_lengths(prompt_embeddings, sampling, self.max_model_len)
        parameters = [
            SamplingParams(
                n=size,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_tokens,
                logprobs=0,
                stop_token_ids=list(sampling.stop_token_ids),
                logit_bias=dict.fromkeys(sampling.forbidden_token_ids, FORBIDDEN_BIAS) or None,
                detokenize=False,
            )
            for size in group_sizes
        ]
        prompts = [{"prompt_embeds": embeddings.detach().cpu()} for embeddings in prompt_embeddings]
        self._wake(*PARTS)
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=self._adapter)
        if self.recipe.sleep:
            self._llm.sleep(level=1)  # level 2 would lose the weights, which the next replies of this policy need
            self._asleep.update(PARTS)
        return [[_completion(choice) for choice in output.outputs] for output in outputs]

    def close(self) -> None:
        """See :class:`~audio_llm.training.rollouts.RolloutEngine`."""
        if getattr(self, "_llm", None) is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        self._closing.close()


def _completion(choice: Any) -> Completion:
    ids = [int(token) for token in choice.token_ids]
    return Completion(ids, [float(row[token].logprob) for row, token in zip(choice.logprobs, ids, strict=True)])


# --- over HTTP -----------------------------------------------------------------------------------------------------


class HTTPRollouts:
    """vLLM servers in processes of their own, shared by all ranks: stock OpenAI servers, prompt embeddings in requests.

    The first rank writes the weights to a folder that the servers can read (a shared disk when they run on other
    machines) and tells them to load them, or broadcasts them; the others wait. Every request carries its own seed,
    drawn from the trainer's random generator, so that a resumed run samples what an uninterrupted one would have,
    whichever server answers. A server that dies is left out, its prompts go to the others; the run ends where none is
    left.
    """

    name = "vllm_http"
    live = False

    def __init__(
        self,
        policy: PolicyWeights,
        recipe: EngineRecipe | None = None,
        seed: int = 0,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.recipe = recipe or EngineRecipe()
        self.mode = resolve_sync(self.recipe.sync, policy, self.recipe.transfer)
        self.max_model_len = _model_length(policy, self.recipe)
        self.version: int | None = None
        self._closing = contextlib.ExitStack()
        self._folder = self.recipe.shared_folder or self._closing.enter_context(private_folder())
        self._server: Server | None = None
        self._lock = threading.Lock()
        self._gone: ServerGone | None = None  # the last that was left out
        atexit.register(self.close)
        urls = self.recipe.urls
        if not urls:
            self._server = self._start(policy, tokenizer, seed)
            urls = [self._server.url]
        self._pool = ThreadPoolExecutor(CONNECTIONS * len(urls))
        self._remotes: list[Remote] = []
        for url in urls:
            self._remotes.append(Remote(url, self._token()))
        self._senders: dict[Remote, Sender] = {}  # where weights are broadcast
        self._run = _same_everywhere(secrets.token_hex(4))  # another run's adapters may still be there

    @property
    def urls(self) -> list[str]:
        """Of the servers that answer."""
        return [remote.url for remote in self._remotes]

    def _adapter(self, version: int | None) -> str:
        return f"policy-{self._run}-{version}"

    def _start(self, policy: PolicyWeights, tokenizer: Any, seed: int) -> Server:
        if _rank()[1] > 1:
            raise ConfigError("engine.url: several training processes share one server; start it first (docs/grpo.md).")
        check_devices(self.recipe)
        model = _write_unadapted(policy, self._folder / "model", tokenizer, _unties(self.mode))
        rank = _lora_rank(policy) if self.mode == "adapter" else None
        dtype = str(policy.base.dtype).removeprefix("torch.")
        return Server(model, dtype, self.recipe, self.max_model_len, rank, seed)

    def _token(self) -> str:
        """What the servers ask for: our own one's, or that of ``engine.token``; "" without."""
        if self._server is not None:
            return self._server.token
        path = self.recipe.token
        try:
            return path.read_text(encoding="ascii").strip() if path else ""
        except (OSError, ValueError) as error:
            raise ConfigError(describe(f"engine.token {path}", "the server's file of its token", str(error))) from error

    def _leave_out(self, remote: Remote, error: ServerGone) -> None:
        """Go on without `remote`; raises `error` where it was the last."""
        with self._lock:
            if remote in self._remotes:
                self._gone = error
                self._remotes = [other for other in self._remotes if other is not remote]
                if self._remotes:
                    warnings.warn(f"{error} Goes on with {len(self._remotes)} of the servers.", stacklevel=2)
            if not self._remotes:
                raise error

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        """To all servers at once."""
        self._each(lambda remote: remote.post(path, body))

    def _each(self, call: Callable[[Remote], Any]) -> None:
        """For all servers at once; those that fail are left out."""

        def attempt(remote: Remote) -> None:
            try:
                call(remote)
            except ServerGone as error:
                self._leave_out(remote, error)

        list(self._pool.map(attempt, self._remotes))

    def sync(self, policy: PolicyWeights, version: int) -> float:
        """See :class:`~audio_llm.training.rollouts.RolloutEngine`."""
        if version == self.version:
            return 0.0
        start = time.perf_counter()
        first = _rank()[0] == 0
        if self.mode == "merged":
            # Every rank takes part in gathering; the first one writes.
            with policy.merged(_unties(self.mode)) as tensors:
                if first:
                    (self._broadcast if self.recipe.transfer == "broadcast" else self._reload)(policy, tensors)
        else:
            with policy.adapter() as (config, tensors):
                if first:
                    self._load_adapter(config, tensors, version)
        if first:
            self._post("/reset_prefix_cache")
        in_step = _same_everywhere(self.urls)  # the others wait, and ask none that has missed the weights
        self._remotes = [remote for remote in self._remotes if remote.url in in_step]
        self.version = version
        return time.perf_counter() - start

    def _reload(self, policy: PolicyWeights, tensors: Iterable[tuple[str, Tensor]]) -> None:
        from safetensors.torch import save_file

        folder = self._folder / "merged"
        if not folder.is_dir():
            write_language_model(policy.base, folder, None, untie=_unties(self.mode))
        with atomic_file(folder / "model.safetensors") as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors}, temporary, {"format": "pt"})
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def _broadcast(self, policy: PolicyWeights, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Into the memory of all servers, a part at a time: the merged model is never whole beside the policy."""

        def start(remote: Remote) -> None:
            if remote not in self._senders:
                self._senders[remote] = Sender(remote, policy.base.device)
            self._senders[remote].start()

        self._each(start)
        for part in chunks(tensors):
            self._each(lambda remote: self._senders[remote].send(part))  # noqa: B023  (over before the next part)
        self._each(lambda remote: self._senders[remote].finish())

    def _load_adapter(self, config: Any, tensors: dict[str, Tensor], version: int) -> None:
        folder = self._folder / self._adapter(version)
        write_adapter(folder, config, tensors)
        self._post("/v1/load_lora_adapter", {"lora_name": self._adapter(version), "lora_path": str(folder)})
        self._unload()

    def _unload(self) -> None:
        """Take the adapter of the last version from the servers."""
        if self.version is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": self._adapter(self.version)})
            shutil.rmtree(self._folder / self._adapter(self.version), ignore_errors=True)

    def generate(
        self, prompt_embeddings: Sequence[Tensor], group_sizes: Sequence[int], sampling: Sampling
    ) -> list[list[Completion]]:
        """See :class:`~audio_llm.training.rollouts.RolloutEngine`."""
        _check_lengths(prompt_embeddings, sampling, self.max_model_len)
        count = len(prompt_embeddings)
        seeds = torch.randint(2**31 - 1, (count,)).tolist()
        rows = (prompt_embeddings, group_sizes, [sampling] * count, seeds, range(count))
        return list(self._pool.map(self._complete, *rows))

    def _complete(self, embeddings: Tensor, size: int, sampling: Sampling, seed: int, number: int) -> list[Completion]:
        buffer = io.BytesIO()
        torch.save(embeddings.detach().cpu().clone(), buffer)
        body = {
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
            "n": size,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_tokens,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logit_bias": {str(token): FORBIDDEN_BIAS for token in sampling.forbidden_token_ids} or None,
        }
        answer = self._ask(COMPLETIONS, body, number)
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return [Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def _ask(self, path: str, body: dict[str, Any], number: int) -> Any:
        """The answer of the server whose turn it is, or of the next that is left."""
        while remotes := self._remotes:
            remote = remotes[number % len(remotes)]
            model = self._adapter(self.version) if self.mode == "adapter" else remote.model
            try:
                return remote.post(path, body | {"model": model})
            except ServerGone as error:
                self._leave_out(remote, error)
        assert self._gone is not None
        raise self._gone

    def close(self) -> None:
        """See :class:`~audio_llm.training.rollouts.RolloutEngine`."""
        if getattr(self, "_remotes", None):
            if self._server is None and self.mode == "adapter" and _rank()[0] == 0:  # servers stay, for other runs
                with contextlib.suppress(TrainingError):
                    self._unload()
                self.version = None
            for remote in self._remotes:
                remote.close()
        if getattr(self, "_pool", None) is not None:
            self._pool.shutdown(wait=False)
        if self._server is not None:
            self._server.stop()
        self._closing.close()


def _same_everywhere(value: Any) -> Any:
    """The first process's."""
    values = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def prepare_server(model: Path, output: Path, recipe: EngineRecipe, lora: Any, seed: int) -> str:
    """Write the language model of checkpoint folder `model` and return the shell command that serves it for rollouts.

    `lora` is the recipe's (None without): a server that swaps adapters must be built for their rank. The server asks
    for the token that lies beside `output`: give its file to the trainer as ``engine.token``.
    """
    from audio_llm.model.build import load_model, load_processor

    policy = PolicyWeights(load_model(model))
    swaps = recipe.sync == "adapter" or (
        recipe.sync == "auto" and recipe.transfer == "folder" and torch.cuda.is_available()
    )
    _write_unadapted(policy, output, load_processor(model).tokenizer, _unties("adapter" if swaps else "merged"))
    rank = _fitting_rank(lora.rank) if lora is not None and swaps else None
    dtype = str(policy.base.dtype).removeprefix("torch.")
    command = server_command(output, dtype, recipe, _model_length(policy, recipe), rank, seed, PORT)
    token = output.resolve().with_name(f"{output.name}.token")
    token.unlink(missing_ok=True)
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(16))
    environment = rollout_server_environment() | {TOKEN_FILE: str(token)}
    stated = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return shlex.join(["env", *(f"{name}={value}" for name, value in stated.items()), *command])
