"""Is a text the description of a sound? Probabilities of up to three readers, and a policy that decides by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import content_hash
from audio_llm.language.prompts import prompt_hash
from audio_llm.model.loading import reading, whole_model
from data_prep.corpus import endpoint
from data_prep.corpus.endpoint import Asking, Model, Said, Unusable, together
from data_prep.corpus.stage import Item, Reject, Step
from data_prep.corpus.text_classifier import EXAMPLES, TextClassifier, read_examples

READERS = ("words", "folder", "model")
PROMPT = (
    "A caption for deaf viewers says: {text!r}. Could it be the description of a sound that is heard (a noise, music, "
    "a voice, an animal, a machine, an impact), and not words that are spoken or any other text? Answer yes or no."
)


@dataclass
class Classify(Step):
    """Gives ``cue_scores`` (the probability of each reader), and ``cue`` (the one that the policy decides by); an item
    below the threshold is a reject.

    `readers` are ``words`` (our own classifier, fitted on `examples`), ``folder`` (a sequence-classification folder)
    and ``model`` (a language model behind `url`: the probability of yes against no as its first token).
    """

    name: ClassVar[str] = "classify"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    gives: ClassVar[tuple[str, ...]] = ("cue", "cue_scores")
    retryable = ("no_yes_no", *endpoint.REASONS)
    reasons = ("no_sound", "no_text", *retryable)
    free: ClassVar[tuple[str, ...]] = ("examples", "folder", "url", "retries", "retry")

    readers: list[str] = field(default_factory=lambda: ["words"])
    policy: Literal["any", "all", "weighted"] = "all"  # whether one reader, each reader or their mean has to say so
    weights: dict[str, float] = field(default_factory=dict)  # of the readers in the mean; 1 where none is said
    threshold: float = 0.5  # the least probability of a sound
    examples: Path = EXAMPLES  # a CSV file with the columns text and sound (1 or 0), for the reader words
    folder: Path | None = None  # a sequence-classification checkpoint, for the reader folder
    positive: str = ""  # the folder's class that is a sound; by default its last one
    url: str = ""  # of the server, for the reader model
    model: str = ""  # its name there
    retries: int = 3  # of a request that meets a busy server
    retry: bool = False  # whether the model is asked again where its kept reply was of no use

    def check(self) -> None:
        for reader in (*self.readers, *self.weights):
            if reader not in READERS:
                found = f"'{reader}'{nearest(str(reader), READERS)}"
                raise ConfigError(describe("classify.readers", f"names among {', '.join(READERS)}", found))
        if not self.readers or len(set(self.readers)) < len(self.readers):
            raise ConfigError(describe("classify.readers", "each at most once, and at least one", f"{self.readers}"))
        if not 0 <= self.threshold <= 1:
            raise ConfigError(describe("classify.threshold", "a probability", f"{self.threshold:g}"))
        if self.policy == "weighted" and (
            min(self._weight(reader) for reader in self.readers) < 0 or not sum(map(self._weight, self.readers)) > 0
        ):
            raise ConfigError(describe("classify.weights", "shares from 0 on, not all 0", f"{self.weights}"))
        if "folder" in self.readers and self.folder is None:
            raise ConfigError(describe("classify.folder", "a checkpoint for the reader 'folder'", "none"))
        if "model" in self.readers:
            self._asking.check("classify")

    def digests(self) -> Mapping[str, str]:
        found = {"prompt": prompt_hash(PROMPT)} if "model" in self.readers else {}
        if "words" in self.readers:
            found["examples"] = content_hash(self.examples)
        if "folder" in self.readers and self.folder is not None:
            found["folder"] = content_hash(self.folder)
        return found

    @property
    def _asking(self) -> Asking:
        return Asking(self.url, self.model, 0.0, max_tokens=1, tries=1, retries=self.retries, again=self.retry)

    def _weight(self, reader: str) -> float:
        return self.weights.get(reader, 1.0)

    def open(self, folder: Path) -> None:
        self._readers: dict[str, Callable[[Item], float | Reject]] = {}
        if "words" in self.readers:
            words = TextClassifier.fitted(read_examples(self.examples))
            self._readers["words"] = lambda item: words.probability(item.fields["text"])
        if "folder" in self.readers and self.folder is not None:
            opened = _Folder(self.folder, self.positive)
            self._readers["folder"] = lambda item: opened.probability(item.fields["text"])
        self._model = Model(self._asking, folder, "classify") if "model" in self.readers else None
        if self._model is not None:
            self._readers["model"] = self._ask

    def close(self) -> None:
        if self._model is not None:
            self._model.close()

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return together(self._one, items) if self._model is not None else [self._one(item) for item in items]

    def _one(self, item: Item) -> Item | Reject:
        if not str(item.fields.get("text") or "").strip():
            return Reject(item.id, "no_text", "expected a text, found none")
        scores: dict[str, float] = {}
        for name in self.readers:
            found = self._readers[name](item)
            if isinstance(found, Reject):
                return found
            scores[name] = found
        chance = decided(scores, self.policy, self.weights)
        if chance < self.threshold:
            told = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            return Reject(item.id, "no_sound", f"{item.fields['text'][:80]!r}: {told}")
        return item.adding(cue=round(chance, 6), cue_scores=scores)

    def _ask(self, item: Item) -> float | Reject:
        """The probability of yes against no. Models write both in several ways; all of them count."""
        assert self._model is not None
        messages = [{"role": "user", "content": PROMPT.format(text=item.fields["text"])}]
        found = self._model.asked(messages, 0, item.id, _likely, logprobs=True, top_logprobs=20)
        return Reject(item.id, *found) if isinstance(found, Unusable) else found


def _likely(said: Said) -> float | Unusable:
    """The probability of yes against no as the first token."""
    if said.reason not in ("", "reply_cut"):  # one token is all that is asked for
        return Unusable(said.reason, said.detail)
    mass = {"yes": 0.0, "no": 0.0}
    for token, value in (said.first or {}).items():
        if (word := token.strip(" ▁Ġ\"'*.").lower()) in mass:
            mass[word] += math.exp(value)
    if not sum(mass.values()) > 0:
        detail = "expected log-probabilities with yes or no" if said.first else "expected logprobs in the reply"
        return Unusable("no_yes_no", f"{detail}, found {said.text!r:.40}")
    return round(mass["yes"] / sum(mass.values()), 6)


def decided(scores: Mapping[str, float], policy: str, weights: Mapping[str, float]) -> float:
    """The probability that a policy goes by: the largest (any), the least (all), or the weighted mean."""
    if policy == "weighted":
        shares = {name: weights.get(name, 1.0) for name in scores}
        return sum(shares[name] * score for name, score in scores.items()) / sum(shares.values())
    return max(scores.values()) if policy == "any" else min(scores.values())


class _Folder:
    """A sequence-classification checkpoint as Transformers saves it."""

    def __init__(self, folder: Path, positive: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        item, expected = f"classify.folder {folder}", "a sequence-classification checkpoint with its tokenizer"
        with reading(item, expected):
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind: Any = AutoModelForSequenceClassification
        self._model = whole_model(kind, folder, item, expected, local_files_only=True).eval()
        labels = {str(name): int(place) for place, name in self._model.config.id2label.items()}
        if positive and positive not in labels:
            found = f"'{positive}'{nearest(positive, labels)}"
            raise ConfigError(describe("classify.positive", f"one of {', '.join(labels)}", found))
        self._place = labels[positive] if positive else max(labels.values())

    def probability(self, text: str) -> float:
        import torch

        with torch.inference_mode():
            inputs = self._tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
            logits: Any = self._model(**inputs).logits[0].float()  # (classes,)
        chances = logits.sigmoid() if len(logits) == 1 else logits.softmax(dim=0)
        return round(float(chances[min(self._place, len(chances) - 1)]), 6)


STAGE = Classify
