"""What answers the questions: vLLM in this process, Transformers, or any OpenAI-compatible endpoint.

An engine takes requests lazily and yields one answer for each, in order. Sampling depends on a request's own seed and
never on the batch it happened to be in, so that a run that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from audio_llm.answering.base import OPENINGS, Answer, Engine, Request, is_address, render, user_turn
from audio_llm.answering.server import Endpoint, EngineError, RefusedRequest
from audio_llm.audio import Waveform, check, encode_level, resample
from audio_llm.errors import CheckpointError, ConfigError, describe, nearest
from audio_llm.language import prompts

ENGINES = ("auto", "vllm", "transformers")


def open_engine(
    kind: str,
    model: str,
    adapter: str | None = None,
    *,
    style: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Engine:
    """`kind`: ``vllm``, ``transformers``, an ``http://…`` address, or ``auto`` (vLLM where installed)."""
    if style is not None and style not in prompts.STYLES:
        known = ", ".join(prompts.STYLES)
        raise ConfigError(f"style '{style}': expected one of {known}{nearest(style, prompts.STYLES)}.")
    name = engine_name(kind, model)
    if is_address(name):
        return HttpEngine(kind, model, adapter, style=style, concurrency=batch_size or 16)
    if not (Path(model) / "config.json").is_file():
        raise CheckpointError(describe(f"model {model}", "a checkpoint folder with config.json", "none"))
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(describe(f"adapter {adapter}", "a PEFT adapter with adapter_config.json", "none"))
    if name == "echotwin":
        from audio_llm.tasks.echotwin.engine import EchoTwinEngine

        return EchoTwinEngine.open(model, batch_size or 16)
    from audio_llm.answering.native import NativeEngine, is_native

    if is_native(model):
        if kind == "vllm":
            cure = "Use --engine transformers, or start `vllm serve` with it and give its address."
            raise ConfigError(
                describe(f"engine vllm, model {model}", "a checkpoint of this package", "another's", cure)
            )
        return NativeEngine(model, adapter, style=style, batch_size=batch_size or 8)
    if name == "vllm":
        return VllmEngine(model, adapter, style=style, batch_size=batch_size or 64, seed=seed)
    return TransformersEngine(model, adapter, style=style, batch_size=batch_size or 16)


def engine_name(kind: str, model: str) -> str:
    """The `name` of the engine that :func:`open_engine` opens, before it is; an address as it is given. Raises
    :class:`ConfigError` for a kind that there is not."""
    if is_address(kind):
        return kind
    if kind not in ENGINES:
        close = nearest(kind, ENGINES)
        raise ConfigError(f"engine '{kind}': expected {', '.join(ENGINES)} or an address http://HOST:PORT/v1{close}.")
    from audio_llm.answering.native import is_native
    from audio_llm.tasks.echotwin.engine import is_echotwin_folder

    if is_echotwin_folder(model):
        return "echotwin"
    if is_native(model):
        return "transformers"
    if kind == "auto":
        return "vllm" if find_spec("vllm") else "transformers"
    return kind


def fit(waveform: Waveform, extractor: Any, name: str) -> Waveform:
    """`waveform` at the model's rate. Raises :class:`AudioError` where the model cannot take it."""
    check(waveform, layouts=extractor.layouts, name=name)
    ready = resample(waveform, extractor.sampling_rate)
    extractor.validate(ready.samples, name)
    return ready


class VllmEngine:
    """The whole model through vLLM's plugin, in this process."""

    name = "vllm"
    needs_audio = False

    def __init__(self, model: str, adapter: str | None, *, style: str | None, batch_size: int, seed: int) -> None:
        from audio_llm.model.build import load_processor
        from audio_llm.serving.offline import OfflineEngine

        self._engine = OfflineEngine(model, adapter, max_num_seqs=batch_size, seed=seed)
        self._extractor = load_processor(model).feature_extractor
        self._style = style

    def prepare(self, waveform: Waveform, name: str) -> Waveform:
        return fit(waveform, self._extractor, name)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        from audio_llm.serving.offline import OfflineRequest

        waiting: deque[tuple[str, float]] = deque()

        def prepared() -> Iterator[OfflineRequest]:
            for request in requests:
                text = render(self._engine.tokenizer, request, self._style)
                waiting.append((text, time.monotonic()))
                yield OfflineRequest(
                    prompt=text,
                    audios=() if request.waveform is None else (request.waveform,),
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                )

        opening = OPENINGS.get(self._style or "", "")
        for done in self._engine.generate(prepared()):
            text, started = waiting.popleft()
            yield Answer(
                raw="" if done.error else opening + done.text,
                finish_reason=done.finish_reason,
                prompt_tokens=done.prompt_tokens,
                completion_tokens=len(done.token_ids),
                prompt_hash=prompts.prompt_hash(text),
                seconds=round(time.monotonic() - started, 4),
                error=done.error,
            )

    def close(self) -> None:
        self._engine.close()


class TransformersEngine:
    """Plain ``generate`` in padded batches: slower, and needs nothing but Transformers."""

    name = "transformers"
    needs_audio = False

    def __init__(self, model: str, adapter: str | None, *, style: str | None, batch_size: int) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._style, self._batch_size = style, batch_size
        loaded = self._load(model, dtype="auto" if self._device == "cuda" else torch.float32)
        if adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, adapter)
        self._model = loaded.to(self._device).eval()
        positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int = positions or sys.maxsize

    def _load(self, model: str, **options: Any) -> Any:
        """The model; what turns requests into its inputs is kept."""
        from audio_llm.model.build import load_model, load_processor

        self._processor = load_processor(model)
        self._tokenizer, self._audio_token_id = self._processor.tokenizer, self._processor.audio_token_id
        return load_model(model, **options)

    def prepare(self, waveform: Waveform, name: str) -> Waveform:
        return fit(waveform, self._processor.feature_extractor, name)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        source = iter(requests)
        while batch := list(itertools.islice(source, self._batch_size)):
            yield from self._answer(batch)

    def _render(self, request: Request) -> str:
        return render(self._tokenizer, request, self._style)

    def _encode(self, texts: list[str], batch: list[Request]) -> Any:
        """Left-padded ids and mask (batch, n), and the audio of those requests that have some, in order."""
        audio = [request.waveform.samples for request in batch if request.waveform is not None]
        inputs = self._processor(text=texts, audio=audio or None)
        inputs.pop("audio_windows", None)
        return inputs

    def _answer(self, batch: list[Request]) -> list[Answer]:
        import torch
        from transformers import LogitsProcessorList

        started = time.monotonic()
        texts = [self._render(request) for request in batch]
        inputs = self._encode(texts, batch).to(self._device)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        if max(lengths) >= self._positions:
            fitting = [request for request, length in zip(batch, lengths, strict=True) if length < self._positions]
            answers = iter(self._answer(fitting) if fitting else ())
            return [self._too_long(length) or next(answers) for length in lengths]
        sampler = GumbelSampler(
            [request.temperature for request in batch], [request.seed for request in batch], self._audio_token_id
        )
        tokenizer = self._tokenizer
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max(request.max_tokens for request in batch),
                logits_processor=LogitsProcessorList([sampler]),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = round((time.monotonic() - started) / len(batch), 4)
        ends = _end_ids(self._model.generation_config, tokenizer)
        return [
            self._read(ids.tolist(), ends, request.max_tokens, int(length), text, seconds)
            for ids, request, length, text in zip(new, batch, lengths, texts, strict=True)
        ]

    def _too_long(self, length: int) -> Answer | None:
        if length < self._positions:
            return None
        return Answer(
            error=describe("prompt", f"fewer tokens than the model's {self._positions} positions", f"{length}")
        )

    def _read(
        self, ids: list[int], ends: set[int], limit: int, prompt_tokens: int, text: str, seconds: float
    ) -> Answer:
        stop = next((place for place, token in enumerate(ids[:limit]) if token in ends), None)
        kept = ids[:limit] if stop is None else ids[:stop]
        return Answer(
            raw=OPENINGS.get(self._style or "", "") + self._tokenizer.decode(kept, skip_special_tokens=True),
            finish_reason="length" if stop is None else "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(kept) + (stop is not None),
            prompt_hash=prompts.prompt_hash(text),
            seconds=seconds,
        )

    def close(self) -> None:
        del self._model


class GumbelSampler:
    """Logits processor by which the greedy choice *is* a sample: argmax(logits / T + Gumbel noise), noise per row.

    Every row draws from its own generator, so a sample does not depend on the batch (Gumbel-max trick, Gumbel 1954).
    Rows at temperature 0 stay greedy. The audio placeholder can never be chosen.
    """

    def __init__(self, temperatures: list[float], seeds: list[int], audio_token_id: int) -> None:
        import torch

        self._temperatures, self._audio_token_id = temperatures, audio_token_id
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores (batch, vocabulary) → the same shape, noise added."""
        import torch

        scores = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature > 0:
                noise = -torch.empty(scores.shape[1]).exponential_(generator=generator).log()
                scores[row] = scores[row] / temperature + noise.to(scores.device)
        scores[:, self._audio_token_id] = -torch.inf  # last: infinity over a temperature or plus noise may be no number
        return scores


class HttpEngine:
    """An OpenAI-compatible endpoint (``audio-llm serve``, vLLM, …): audio goes as base64 WAV with all its channels."""

    needs_audio = False

    def __init__(self, url: str, model: str, adapter: str | None, *, style: str | None, concurrency: int) -> None:
        self._endpoint = Endpoint(url)
        self.name = self._endpoint.base
        served = self._endpoint.models()
        kind, wanted = ("model", model) if adapter is None else ("adapter", adapter)
        # A server has its own name for a checkpoint folder; a name that it does not know would be another model's.
        folder = adapter is None and Path(model).is_dir()
        if served and wanted not in served and not folder:
            alike = [name for name in served if Path(name).name == Path(wanted).name]  # with its owner or without
            if len(alike) != 1:
                found, cure = f"'{wanted}'{nearest(wanted, served)}", f"Give the server's own name as {kind.upper()}."
                raise EngineError(describe(f"{self.name}: {kind}", f"one of {', '.join(served)}", found, cure))
            wanted = alike[0]
        self._model = served[0] if served and folder and wanted not in served else wanted
        self._style, self._concurrency = style, concurrency

    def prepare(self, waveform: Waveform, name: str) -> Waveform:
        return waveform

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        pending: deque[Future[Answer]] = deque()
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for request in requests:
                    pending.append(pool.submit(self._ask, request))
                    if len(pending) >= 2 * self._concurrency:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _ask(self, request: Request) -> Answer:
        messages = user_turn(request)
        opening = OPENINGS.get(self._style or "", "")
        digest = prompts.prompt_hash(json.dumps(messages, ensure_ascii=False) + opening)
        if request.waveform is not None:
            wave = base64.b64encode(encode_level(request.waveform)).decode()
            sound = {"type": "input_audio", "input_audio": {"data": wave, "format": "wav"}}
            for message in messages:
                message["content"] = [sound if part["type"] == "audio" else part for part in message["content"]]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        if opening:
            messages.append({"role": "assistant", "content": opening})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        started = time.monotonic()
        try:
            reply = self._endpoint.complete(body)
        except RefusedRequest as error:
            return Answer(error=str(error), prompt_hash=digest)
        choice, usage = reply["choices"][0], reply["usage"]
        return Answer(
            raw=opening + choice["message"]["content"],
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            prompt_hash=digest,
            seconds=round(time.monotonic() - started, 4),
        )

    def close(self) -> None:
        pass


def _end_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    ends = generation_config.eos_token_id if generation_config.eos_token_id is not None else tokenizer.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}
