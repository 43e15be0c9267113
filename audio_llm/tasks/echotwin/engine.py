"""EchoTwin-QA as an engine that answers questions."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from audio_llm import audio
from audio_llm.answering.base import Answer, Engine, Options, Request, decoded, folder_config
from audio_llm.audio import Waveform
from audio_llm.errors import AudioError, ConfigError, describe

if TYPE_CHECKING:
    from audio_llm.tasks.echotwin.data import Asked
    from audio_llm.tasks.echotwin.model import EchoTwin


class EchoTwinEngine(Engine):
    """Answers with the text of the best-scored choice. There is nothing to sample: the temperature is not read."""

    name = "echotwin"
    needs_audio = True
    constrains = True  # it says nothing but a choice

    def __init__(self, model: EchoTwin, tokenizer: Any, batch_size: int = 16, hearing: str = "refuse") -> None:
        import torch

        from audio_llm.tasks.echotwin.data import Listener

        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.batch_size, self.hearing = tokenizer, batch_size, hearing
        self.listener = Listener(self.model)

    @classmethod
    def recognises(cls, where: str) -> bool:
        """Whether `where` is a folder that training with ``task: echotwin`` wrote."""
        return "echotwin" in folder_config(where)

    @classmethod
    def open(cls, options: Options) -> EchoTwinEngine:
        from audio_llm.tasks.echotwin.folder import load_echotwin

        if options.adapter is not None:
            raise ConfigError(describe(f"adapter {options.adapter}", "none, for EchoTwin takes none", "one"))
        return cls(*load_echotwin(options.model), options.batch_size or 16, options.hearing)

    def prepare(self, sound: Waveform | Path, name: str) -> Waveform:
        """The audio in the layout of the model's tower; of several channels one hears their mean, as published."""
        layouts = self.model.audio_enc.layouts
        published = "mean" if "mono" in layouts and self.hearing == "refuse" else self.hearing
        return audio.hear(decoded(sound, name), layouts, published, name=name)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        from audio_llm.tasks.echotwin.data import Asked, best_choice

        stream = iter(requests)
        while batch := list(itertools.islice(stream, self.batch_size)):
            started = time.monotonic()
            heard = self.listener.hear([self._windows(request) for request in batch])
            items = [
                Asked(request.item.question, tuple(request.item.choices), None, tokens)
                for request, tokens in zip(batch, heard, strict=True)
            ]
            scores = self.score(items)
            seconds = (time.monotonic() - started) / len(batch)
            for item, row in zip(items, scores, strict=True):
                if isinstance(row, str):
                    yield Answer(error=row)
                    continue
                asked = hashlib.sha256(json.dumps([item.question, item.choices]).encode()).hexdigest()[:16]
                best = item.choices[best_choice(row, item.choices)]
                yield Answer(raw=best, finish_reason="stop", prompt_hash=asked, seconds=seconds)

    def _windows(self, request: Request) -> list[np.ndarray]:
        if len(request.audios) != 1:
            raise AudioError(describe(f"item '{request.item.id}'", "one audio for EchoTwin", str(len(request.audios))))
        return self.listener.windows(request.audios[0])

    def score(self, items: Sequence[Asked]) -> list[list[float] | str]:
        """Log-probabilities of every item's choices, or why the model cannot tell them apart; one batch."""
        from audio_llm.tasks.echotwin.data import Collator, option_scores, reason_against

        reasons = [reason_against(item, self.tokenizer, self.model.config) for item in items]
        able = [item for item, reason in zip(items, reasons, strict=True) if not reason]
        collator = Collator(self.model, self.tokenizer, max((len(item.choices) for item in able), default=0))
        scores = iter(option_scores(self.model, collator, able) if able else [])
        return [reason or next(scores) for reason in reasons]
