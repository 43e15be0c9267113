"""The whole model in vLLM, in this process: requests in, completions out, in order and as they are ready.

Evaluation uses it, and whatever else wants many answers without a server. Prompts are token ids with one
placeholder id per audio; vLLM's processor expands it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging.config
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audio_llm.audio import Waveform
from audio_llm.errors import CheckpointError, describe
from audio_llm.files import read_json
from audio_llm.model.validate import check_adapter, check_checkpoint, check_finite, end_ids
from audio_llm.serving.beams import MAX_BEAMS, Search, keep
from audio_llm.serving.launcher import LORA_RANKS, cpu_build, hide_llvmlite_attributes, server_environment
from audio_llm.serving.plugin import present_cpu_build_as_vllm
from audio_llm.serving.scratch import private_folder


@dataclass(frozen=True)
class OfflineRequest:
    """One prompt (text as the chat template wrote it) with its audios. `temperature` 0 is greedy; or with several
    `beams`, a search (:mod:`audio_llm.serving.beams`)."""

    prompt: str
    audios: tuple[Waveform, ...] = ()
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int | None = None
    logprobs: bool = False  # of the sampled ids; not free on a small model
    grammar: str = ""  # GBNF; restricts the reply to what it allows
    beams: int = 1
    begun: tuple[int, ...] = ()  # ids of the reply that stand already
    top: int = 0  # log-probabilities of so many of the likeliest tokens, of a reply of one token
    refusal: str = ""  # why it must not be asked; it is not


@dataclass(frozen=True)
class OfflineCompletion:
    """`logprobs` are those of the sampled ids, where asked for. `error` tells why a request was refused; the rest is
    then empty."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    likeliest: tuple[tuple[int, float], ...] = ()  # of a request with `top`: ids and log-probabilities of its token
    error: str = ""


class OfflineEngine:
    """vLLM with a checkpoint folder and, optionally, a PEFT adapter on its language model.

    On a CPU the adapter is merged into a copy in memory: vLLM's LoRA kernels are several times slower there.

    Raises :class:`PrerequisiteError` without vLLM and :class:`CheckpointError` for a folder that vLLM cannot load.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        max_num_seqs: int = 64,
        max_audios: int = 4,
        seed: int = 0,
    ) -> None:
        on_cpu = cpu_build()
        check_checkpoint(model)
        check_finite(model)
        options = _adapter_options(adapter, model)
        _prepare_environment(on_cpu)
        self._closing = contextlib.ExitStack()
        atexit.register(self._closing.close)
        served = str(model)
        if on_cpu:
            options = {"enforce_eager": True, "block_size": 32}
            if adapter is not None:
                from audio_llm.model.export import write_merged

                print(f"adapter {adapter}: merged into a copy in memory, which a CPU answers faster", file=sys.stderr)
                folder = self._closing.enter_context(private_folder(_bytes_of(model)))
                served, adapter = str(write_merged(model, adapter, folder / "merged")), None
        from vllm import LLM

        hide_llvmlite_attributes()
        try:
            self._llm = LLM(
                served,
                dtype="float32" if on_cpu else "auto",
                max_model_len=-1,  # as long as the model's positions and the cache allow: minutes of sound are long
                max_num_seqs=max_num_seqs,
                limit_mm_per_prompt={"audio": max_audios},
                seed=seed,
                logprobs_mode="processed_logprobs",
                max_logprobs=max(20, keep(MAX_BEAMS, 4)),
                disable_log_stats=True,
                mm_processor_cache_gb=0,  # a request refused after it filled the cache would break the next one
                use_tqdm_on_load=False,
                **options,
            )
        except (ValueError, OSError, RuntimeError) as error:
            self._closing.close()
            raise CheckpointError(f"model {model}: vLLM cannot load it ({_first_line(error)}).") from error
        self._lora = _lora_request(adapter)
        self._ends = end_ids(model)
        self._tokenizer = self._llm.get_tokenizer()
        self._in_flight = 2 * max_num_seqs  # a full waiting queue keeps every decoding slot taken

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, chat template included."""
        return self._tokenizer

    def generate(self, requests: Iterable[OfflineRequest]) -> Iterator[OfflineCompletion]:
        """Completions in the order of `requests`, which are drawn lazily while earlier ones are still decoding.

        A request that vLLM refuses (too long, wrong channels, a placeholder too many) gives a completion with its
        `error`; the others go on.
        """
        for several, group in itertools.groupby(requests, lambda request: request.beams > 1):
            decode = self._search if several else self._sample
            yield from decode(group)

    def _search(self, requests: Iterable[OfflineRequest]) -> Iterator[OfflineCompletion]:
        """As many searches side by side as there are slots for their beams, all of them a token further at a time."""
        source = iter(requests)
        while batch := list(itertools.islice(source, self._in_flight)):
            searches = [Search(request.beams, self._ends, request.max_tokens) for request in batch]
            refused: dict[int, str] = {}
            lengths = [0] * len(batch)
            while open_ones := [n for n, search in enumerate(searches) if not search.done and n not in refused]:
                asked = [
                    (n, replace(batch[n], begun=beam.ids, max_tokens=1, beams=1, top=searches[n].keep))
                    for n in open_ones
                    for beam in searches[n].running
                ]
                found: dict[int, list[list[tuple[int, float]]]] = {n: [] for n in open_ones}
                for (n, _), done in zip(asked, self._sample(request for _, request in asked), strict=True):
                    if done.error:
                        refused[n] = done.error
                    found[n].append(list(done.likeliest))
                    lengths[n] = lengths[n] or done.prompt_tokens
                for n in open_ones:
                    if n not in refused:
                        searches[n].advance(found[n])
            for n, search in enumerate(searches):
                yield self._found(search, lengths[n]) if n not in refused else OfflineCompletion(error=refused[n])

    def _found(self, search: Search, length: int) -> OfflineCompletion:
        ids = search.best
        return OfflineCompletion(
            text=self._tokenizer.decode(list(ids), skip_special_tokens=True),
            token_ids=ids,
            finish_reason="stop" if ids and ids[-1] in self._ends else "length",
            prompt_tokens=length,
        )

    def _sample(self, requests: Iterable[OfflineRequest]) -> Iterator[OfflineCompletion]:
        source = enumerate(requests)
        running: dict[str, int] = {}
        done: dict[int, OfflineCompletion] = {}
        following, exhausted = 0, False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self._in_flight:
                    entry = next(source, None)
                    if entry is None:
                        exhausted = True
                        break
                    name, refusal = self._enqueue(entry[1])
                    if name is None:
                        done[entry[0]] = OfflineCompletion(error=refusal)
                    else:
                        running[name] = entry[0]
                for output in self._llm.llm_engine.step() if running else ():
                    if output.finished:
                        done[running.pop(output.request_id)] = _completion(output, self._tokenizer)
                while following in done:
                    yield done.pop(following)
                    following += 1
        finally:
            if running:  # the caller stopped early: leave no request behind in the engine
                self._llm.llm_engine.abort_request(list(running))

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        self._closing.close()

    def _enqueue(self, request: OfflineRequest) -> tuple[str | None, str]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        if request.refusal:
            return None, request.refusal
        ids = self._tokenizer.encode(request.prompt, add_special_tokens=False)
        prompt: dict[str, Any] = {"prompt_token_ids": [*ids, *request.begun]}
        if request.audios:
            prompt["multi_modal_data"] = {"audio": list(request.audios)}
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.seed,
            logprobs=request.top or (0 if request.logprobs else None),
            detokenize=False,  # vLLM's incremental decoder drops an unfinished character at the end; ours keeps it
            structured_outputs=StructuredOutputsParams(grammar=request.grammar) if request.grammar else None,
        )
        try:
            names = self._llm.enqueue(prompt, params, lora_request=self._lora, use_tqdm=False)  # type: ignore[arg-type]
        except ValueError as error:  # vLLM's validation errors are ValueErrors
            return None, _first_line(error)
        return names[0].partition("-")[0], ""  # outputs carry the name without vLLM's random suffix


def _adapter_options(adapter: str | Path | None, model: str | Path) -> dict[str, Any]:
    """What vLLM must be built with to hold the adapter. Raises :class:`CheckpointError` where it cannot."""
    if adapter is None:
        return {}
    info = check_adapter(adapter, model)
    fitting = [rank for rank in LORA_RANKS if rank >= info.rank]
    if not fitting:
        raise CheckpointError(describe(f"adapter {adapter}", f"a rank of at most {LORA_RANKS[-1]}", str(info.rank)))
    return {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": 1}


def _bytes_of(model: str | Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))


def _lora_request(adapter: str | Path | None) -> Any:
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(Path(adapter).resolve()))


def _prepare_environment(on_cpu: bool) -> None:
    """What vLLM reads at import: as for the server, but in this process. Values that are set already stay."""
    for name, value in (server_environment(on_cpu) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
        os.environ.setdefault(name, value)
    present_cpu_build_as_vllm()
    # vLLM sets its loggers up after it was imported: of kernels for other machines that are not there it would tell.
    logging.config.dictConfig(read_json(Path(__file__).with_name("logging.json")))


def _completion(output: Any, tokenizer: Any) -> OfflineCompletion:
    choice = output.outputs[0]
    ids = tuple(int(token) for token in choice.token_ids)
    return OfflineCompletion(
        text=tokenizer.decode(list(ids), skip_special_tokens=True),
        token_ids=ids,
        logprobs=tuple(float(row[token].logprob) for row, token in zip(choice.logprobs or (), ids, strict=False)),
        finish_reason=str(choice.finish_reason or ""),
        prompt_tokens=len(output.prompt_token_ids or ()),
        likeliest=_likeliest(choice.logprobs[0]) if choice.logprobs else (),
    )


def _likeliest(row: Mapping[int, Any]) -> tuple[tuple[int, float], ...]:
    """(id, log-probability) of the tokens that vLLM tells of, the likeliest first."""
    return tuple(sorted(((int(token), float(told.logprob)) for token, told in row.items()), key=lambda one: -one[1]))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
