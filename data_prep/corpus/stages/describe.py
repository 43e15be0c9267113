"""What is known of each recording, as facts: from its row, from our taggers, from measurement, from audio models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from audio_llm.audio import MAX_SECONDS, Hearing, Waveform, audible
from audio_llm.errors import AudioError, ConfigError, describe
from audio_llm.files import content_hash
from audio_llm.language.prompts import prompt_hash
from data_prep.corpus import acoustics, endpoint
from data_prep.corpus import facts as known
from data_prep.corpus.compiled import librosa
from data_prep.corpus.endpoint import Asking, Model, Said, Unusable
from data_prep.corpus.facts import Fact
from data_prep.corpus.slots import label_words
from data_prep.corpus.sounds import hear
from data_prep.corpus.stage import Item, Reject, Step

PROMPT = "Describe in one sentence what is heard in this recording: what sounds, how, and where it might be."


@dataclass
class Describe(Step):
    """Gives ``facts`` (:class:`data_prep.corpus.facts.Fact`), each with its source, how sure it is, and when it holds.
    The whole sound of an item is heard: put the stage ``cut`` before where items are stretches."""

    name: ClassVar[str] = "describe"
    version: ClassVar[int] = 4
    gives: ClassVar[tuple[str, ...]] = ("facts",)
    retryable = ("unreadable", *endpoint.REASONS)
    reasons = ("silent", *retryable)
    free: ClassVar[tuple[str, ...]] = ("taggers", "locators", "url", "retries", "retry")

    labels: list[str] = field(default_factory=list)  # fields of the item that name a class of sound
    captions: list[str] = field(default_factory=lambda: ["text"])  # fields of the item that describe the sound
    seen: list[str] = field(default_factory=list)  # fields that tell what pictures show; nothing is asked about it
    acoustic: bool = True  # whether length, level, onsets, tempo, pitch and spectrum are measured
    taggers: list[Path] = field(default_factory=list)  # folders of classes, or published files, as 'predict' takes them
    locators: list[Path] = field(default_factory=list)  # folders of events in time, or published files
    gap_seconds: float = 0.3  # events of one class with less than this between them are one event
    top: int = 3  # classes of a tagger that become facts
    least: float = 0.1  # probability that a tagger's class needs
    hearing: Hearing = "mean"  # what taggers hear of sound in another layout
    # What locators hear of it: they have two channels or four, and this is the same in both.
    locator_hearing: Hearing = "duplicate"
    url: str = ""  # of a server with an audio model that writes a caption; none is asked where it is empty
    model: str = ""  # its name there
    max_tokens: int = 96  # tokens of its caption
    retries: int = 3  # of a request that meets a busy server
    confidence: float = 0.8  # of a caption that a model wrote
    max_seconds: float = MAX_SECONDS  # a longer sound is a reject
    seed: int = 0  # of the caption
    retry: bool = False  # whether the audio model is asked with another seed where its kept caption was of no use

    @property
    def needs(self) -> tuple[str, ...]:
        return ("audio", "mark", *dict.fromkeys((*self.labels, *self.captions, *self.seen)))

    def check(self) -> None:
        if self.top < 1 or not 0 <= self.least <= 1 or not 0 <= self.confidence <= 1:
            found = f"top {self.top}, least {self.least:g}, confidence {self.confidence:g}"
            raise ConfigError(describe("describe", "top from 1 on, shares from 0 to 1", found))
        if not self.gap_seconds >= 0:
            raise ConfigError(describe("describe.gap_seconds", "seconds from 0 on", f"{self.gap_seconds:g}"))
        if self.url:
            self._asking.check("describe")

    def digests(self) -> Mapping[str, str]:
        models = {str(number): content_hash(path) for number, path in enumerate((*self.taggers, *self.locators))}
        return models | ({"prompt": prompt_hash(PROMPT)} if self.url else {})

    @property
    def _asking(self) -> Asking:
        where = (self.url, self.model, 0.0, self.max_tokens)
        return Asking(*where, tries=1, retries=self.retries, again=self.retry)

    def open(self, folder: Path) -> None:
        self._folder = folder
        if self.acoustic:
            librosa()  # compiled here, for a result has a limit of time
        self._taggers = [(path.name, _tagger(path, self.hearing)) for path in self.taggers]
        self._locators = [(path.name, _locator(path, self.locator_hearing)) for path in self.locators]
        self._model = Model(self._asking, folder, "describe") if self.url else None

    def close(self) -> None:
        if self._model is not None:
            self._model.close()

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Item | Reject:
        try:
            waveform = hear(item.fields, self._folder, self.max_seconds)
        except AudioError as error:
            return Reject(item.id, "unreadable", str(error))
        found = list(self._told(item))
        if self.acoustic:
            measured = acoustics.measured(waveform)
            found += measured
            if any(fact.kind == "silence" and fact.value == 1.0 for fact in measured):
                return Reject(item.id, "silent", f"below {acoustics.SILENCE:g} dB from beginning to end")
        try:
            found += self._heard(waveform, str(item.fields.get("name", item.id)))
        except AudioError as error:
            return Reject(item.id, "unreadable", str(error))
        if self._model is not None:
            caption = self._caption(item, waveform)
            if isinstance(caption, Reject):
                return caption
            found.append(caption)
        return item.adding(facts=known.added([], found))

    def _told(self, item: Item) -> Iterator[Fact]:
        for kind, names in (("label", self.labels), ("caption", self.captions), ("seen", self.seen)):
            for name in names:
                words = item.fields.get(name)
                for text in words if isinstance(words, list) else [words]:
                    if isinstance(text, str) and text.strip():
                        value = label_words(text) if kind == "label" else " ".join(text.split())
                        yield Fact("", kind, value, source=name)

    def _heard(self, waveform: Waveform, name: str) -> Iterator[Fact]:
        """Classes of the whole sound; events with their times, the mean activity of each as its confidence."""
        for source, tagger in self._taggers:
            said = tagger.predict(waveform, name=name)
            for place in (-said.probabilities).argsort(kind="stable")[: self.top]:
                chance = float(said.probabilities[place])
                if chance >= self.least:
                    yield Fact("", "label", label_words(said.labels[int(place)]), "", source, round(chance, 4))
        for source, locator in self._locators:
            from audio_llm.tasks.seld.tracks import join_events

            for label, start, end, sure in _joined(
                join_events(locator.locate(waveform, name), locator.labels), self.gap_seconds
            ):
                yield Fact("", "event", label_words(label), "", source, round(sure, 4), start, end)

    def _caption(self, item: Item, waveform: Waveform) -> Fact | Reject:
        from audio_llm.answering.server import audio_part

        assert self._model is not None
        content: list[dict[str, Any]] = [audio_part(waveform), {"type": "text", "text": PROMPT}]
        words = self._model.asked([{"role": "user", "content": content}], self.seed, item.id, _words)
        if isinstance(words, Unusable):
            return Reject(item.id, *words)
        return Fact("", "caption", words, "", self.model, self.confidence)


def _words(said: Said) -> str | Unusable:
    words = " ".join(said.text.split()).strip(" \"'")
    if said.reason or not words:
        return Unusable(said.reason or "no_reply", said.detail or "the model said nothing")
    return words


def _joined(events: Sequence[Mapping[str, Any]], gap: float) -> list[tuple[str, float, float, float]]:
    """Label, onset, offset and mean activity of events: where they lie does not matter here, and networks lose a sound
    for a frame or two."""
    found: list[tuple[str, float, float, float]] = []
    last: dict[str, int] = {}
    for event in sorted(events, key=lambda event: event["onset"]):
        label, start, end, sure = (event[key] for key in ("label", "onset", "offset", "activity"))
        place = last.get(label)
        if place is None or start - found[place][2] > gap + 1e-6:
            last[label] = len(found)
            found.append((label, start, end, sure))
        else:
            _, first, until, before = found[place]
            weights = until - first, end - start
            mean = (before * weights[0] + sure * weights[1]) / sum(weights)
            found[place] = label, first, max(until, end), mean
    return found


def _tagger(path: Path, hearing: str) -> Any:
    from audio_llm.tasks.classification.predict import load

    return load(path, hearing)


def _locator(path: Path, hearing: str) -> Any:
    from audio_llm.tasks.seld.predict import load

    locator = load(path, hearing=hearing)
    try:
        audible(locator.network.encoder.layouts, hearing)
    except ConfigError as error:
        raise ConfigError(f"describe.locator_hearing, {path}: {error}") from error
    return locator


STAGE = Describe
