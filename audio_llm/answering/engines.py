"""Engines of this process: vLLM, and plain Transformers; how the engine for a model is found."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from audio_llm.answering.base import Answer, Engine, Options, Request, decoded, folder_config, is_address
from audio_llm.audio import Waveform, audible, hear, resample
from audio_llm.errors import ConfigError, DataError, describe
from audio_llm.language import prompts
from audio_llm.model.native import checkpoint_of, native_kind
from audio_llm.model.validate import MODEL_TYPE, check_adapter, check_checkpoint
from audio_llm.registry import Registry

ENGINES = Registry("engines", "engine (besides auto and an address http://HOST:PORT/v1)", needs="recognises")


def find_engine(kind: str, model: str) -> type[Engine]:
    """The class of the engine that answers for `model`.

    `kind` is the address of a server, an engine's name, or ``auto``: whichever recognises the folder `model`. Raises
    :class:`ConfigError` for an engine that there is not, or that cannot answer from that folder.
    """
    if is_address(model) and kind in ("auto", "http"):
        cure = f"Give the model's name at that server, and --engine {model}."
        raise ConfigError(describe(f"model {model}", "a folder, or a served model's name", "an address", cure))
    engines: list[type[Engine]] = [ENGINES[name] for name in ENGINES]
    where, asked = model, engines
    if is_address(kind):
        where = kind
    elif kind != "auto":
        asked = [ENGINES.find(kind), *(engine for engine in engines if engine.name == kind)]
    if able := [engine for engine in asked if engine.recognises(where)]:
        return max(able, key=lambda engine: engine.rank)
    others = {engine.name for engine in engines if engine.recognises(where)}
    if not others:
        check_checkpoint(where)  # says what is wrong with it
    cure = f"Use --engine {' or '.join(sorted(others)) or 'auto'}, or the address of a server that has it."
    raise ConfigError(describe(f"engine {kind}, model {model}", "a model that it answers from", "another's", cure))


def soonest(model: str) -> str:
    """The engine that answers one question of `model` without being told: Transformers, which has begun before vLLM
    has, where it can, else whichever recognises the folder."""
    return TransformersEngine.name if TransformersEngine.recognises(model) else "auto"


def open_engine(
    kind: str,
    model: str,
    adapter: str | None = None,
    *,
    batch_size: int | None = None,
    max_audios: int = 4,
    seed: int = 0,
    hearing: str = "refuse",
) -> Engine:
    """:func:`find_engine`, opened."""
    address, engine = kind if is_address(kind) else "", find_engine(kind, model)
    if not address and native_kind(model) is not None:
        model = str(checkpoint_of(model))
    return engine.open(Options(model, adapter, address, batch_size, max_audios, seed, hearing))


def is_ours(where: str) -> bool:
    """Whether `where` is a checkpoint folder of this package, a native audio model's, which is made into one, or no
    folder at all: opening it says what is missing."""
    config = folder_config(where)
    if not config:
        return not is_address(where)
    return config.get("model_type") == MODEL_TYPE or native_kind(where) is not None


def fit(sound: Waveform | Path, extractor: Any, name: str, hearing: str) -> Waveform:
    """`sound` at the model's rate; two channels of a file are those that the model hears, for files do not say what
    theirs are. Raises :class:`AudioError` where the model cannot take it."""
    audible(extractor.layouts, hearing)
    waveform = decoded(sound, name)
    if isinstance(sound, Waveform) or waveform.num_channels != extractor.num_channels:
        waveform = hear(waveform, extractor.layouts, hearing, name=name)
    ready = resample(waveform, extractor.sampling_rate)
    extractor.validate(ready.samples, name)
    return ready


def written(request: Request, tokenizer: Any) -> tuple[str, str]:
    """The prompt of `request`, and why it must not be asked: "" where it may."""
    try:
        return request.render(tokenizer), ""
    except DataError as error:
        return "", str(error)


class VllmEngine(Engine):
    """The whole model through vLLM's plugin, in this process."""

    name = "vllm"
    rank = 1 if find_spec("vllm") else -1
    constrains = True
    searches = True

    @classmethod
    def recognises(cls, where: str) -> bool:
        return is_ours(where)

    def __init__(self, options: Options) -> None:
        from audio_llm.model.build import load_processor
        from audio_llm.serving.offline import OfflineEngine

        self._engine = OfflineEngine(
            options.model,
            options.adapter,
            max_num_seqs=options.batch_size or 64,
            max_audios=options.max_audios,
            seed=options.seed,
        )
        self._extractor = load_processor(options.model).feature_extractor
        self._hearing = options.hearing

    def prepare(self, sound: Waveform | Path, name: str) -> Waveform:
        return fit(sound, self._extractor, name, self._hearing)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        from audio_llm.serving.offline import OfflineRequest

        waiting: deque[tuple[str, str, float]] = deque()

        def prepared() -> Iterator[OfflineRequest]:
            for request in requests:
                text, refusal = written(request, self._engine.tokenizer)
                waiting.append((text, request.opening, time.monotonic()))
                yield OfflineRequest(
                    prompt=text,
                    refusal=refusal,
                    audios=request.audios,
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                    grammar=request.grammar,
                    beams=request.beams,
                )

        for done in self._engine.generate(prepared()):
            text, opening, started = waiting.popleft()
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


class TransformersEngine(Engine):
    """Plain ``generate`` in padded batches: slower, and needs nothing but Transformers."""

    name = "transformers"
    searches = True
    _usual_batch = 16

    @classmethod
    def recognises(cls, where: str) -> bool:
        return is_ours(where)

    def __init__(self, options: Options) -> None:
        self._check(options)
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._batch_size, self._hearing = options.batch_size or self._usual_batch, options.hearing
        loaded = self._load(options, dtype="auto" if self._device == "cuda" else torch.float32)
        if options.adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, options.adapter)
        self._model = loaded.to(self._device).eval()
        positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int = positions or sys.maxsize

    def _check(self, options: Options) -> None:
        """Raise :class:`CheckpointError` for a model or an adapter that is not there, before anything is imported."""
        check_checkpoint(options.model)
        if options.adapter is not None:
            check_adapter(options.adapter, options.model)

    def _load(self, options: Options, **more: Any) -> Any:
        """The model; what turns requests into its inputs is kept."""
        from audio_llm.model.build import load_model, load_processor

        self._processor = load_processor(options.model)
        self._tokenizer, self._never_said = self._processor.tokenizer, self._processor.config.forbidden_token_ids
        return load_model(options.model, **more)

    def prepare(self, sound: Waveform | Path, name: str) -> Waveform:
        return fit(sound, self._processor.feature_extractor, name, self._hearing)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        source = iter(requests)
        while batch := list(itertools.islice(source, self._batch_size)):
            for _, group in itertools.groupby(batch, lambda request: request.beams):
                yield from self._answer(list(group))

    def _encode(self, texts: list[str], batch: list[Request]) -> Any:
        """Left-padded ids and mask (batch, n), and the audio of those requests that have some, in order."""
        audio = [waveform.samples for request in batch for waveform in request.audios]
        inputs = self._processor(text=texts, audio=audio or None)
        inputs.pop("audio_windows", None)
        return inputs

    def _answer(self, batch: list[Request]) -> list[Answer]:
        import torch
        from transformers import LogitsProcessorList

        if any(request.constrain for request in batch):
            raise ConfigError(describe("constrained replies", "an engine that gives them (vllm)", self.name))
        started = time.monotonic()
        texts, refusals = map(list, zip(*(written(request, self._tokenizer) for request in batch), strict=True))
        if any(refusals):
            fitting = [request for request, refusal in zip(batch, refusals, strict=True) if not refusal]
            answers = iter(self._answer(fitting) if fitting else ())
            return [Answer(error=refusal) if refusal else next(answers) for refusal in refusals]
        inputs = self._encode(texts, batch).to(self._device)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        if max(lengths) >= self._positions:
            fitting = [request for request, length in zip(batch, lengths, strict=True) if length < self._positions]
            answers = iter(self._answer(fitting) if fitting else ())
            return [self._too_long(length) or next(answers) for length in lengths]
        sampler = GumbelSampler(
            [request.temperature for request in batch], [request.seed for request in batch], self._never_said
        )
        tokenizer = self._tokenizer
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                num_beams=batch[0].beams,
                max_new_tokens=max(request.max_tokens for request in batch),
                logits_processor=LogitsProcessorList([sampler]),
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = round((time.monotonic() - started) / len(batch), 4)
        ends = _end_ids(self._model.generation_config, tokenizer)
        return [
            self._read(ids.tolist(), ends, request, int(length), text, seconds)
            for ids, request, length, text in zip(new, batch, lengths, texts, strict=True)
        ]

    def _too_long(self, length: int) -> Answer | None:
        if length < self._positions:
            return None
        return Answer(
            error=describe("prompt", f"fewer tokens than the model's {self._positions} positions", f"{length}")
        )

    def _read(
        self, ids: list[int], ends: set[int], request: Request, prompt_tokens: int, text: str, seconds: float
    ) -> Answer:
        ids = ids[: request.max_tokens]
        stop = next((place for place, token in enumerate(ids) if token in ends), None)
        kept = ids[:stop]
        return Answer(
            raw=request.opening + self._tokenizer.decode(kept, skip_special_tokens=True),
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
    Rows at temperature 0 stay greedy. What marks audio (`never_said`) can not be chosen.
    """

    def __init__(self, temperatures: list[float], seeds: list[int], never_said: list[int]) -> None:
        import torch

        self._temperatures, self._never_said = temperatures, never_said
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores (batch, vocabulary) → the same shape, noise added."""
        import torch

        scores = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature > 0:
                noise = -torch.empty(scores.shape[1]).exponential_(generator=generator).log()
                scores[row] = scores[row] / temperature + noise.to(scores.device)
        scores[:, self._never_said] = -torch.inf  # last: infinity over a temperature or plus noise may be no number
        # Beams are compared by their sums: shares of what can be said, as vLLM counts them.
        return scores.log_softmax(dim=-1) if len(scores) > len(self._temperatures) else scores


def _end_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    ends = generation_config.eos_token_id if generation_config.eos_token_id is not None else tokenizer.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}
