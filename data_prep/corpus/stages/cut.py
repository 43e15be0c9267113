"""The stretch of a recording that an item is about, as a sound file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.datasets.folders import OTHERS
from audio_llm.errors import AudioError, ConfigError, PrerequisiteError, describe
from audio_llm.files import atomic_file
from audio_llm.integers import Integers, floats
from audio_llm.pcm import INT16_SCALE
from data_prep.corpus import films
from data_prep.corpus.sounds import sound_of
from data_prep.corpus.stage import Item, Reject, Step
from data_prep.manifest.rows import CAUSES, Reason
from data_prep.manifest.sounds import File

NO_DECODER = "no_decoder"
_REASONS = (Reason.SILENT, Reason.BEYOND_THE_SOUND, Reason.END_BEFORE_START, *CAUSES.values())
_HALF = 0.5 / INT16_SCALE  # below it 16 bits hold nothing


@dataclass
class Cut(Step):
    """Writes the stretch from ``start`` to ``end`` (seconds; without them the whole recording) into ``clips/``, as FLAC
    or WAV: its own rate, all channels, exact to the sample. A file is named after its samples, so equal sounds are one.

    Items get ``audio`` (the clip), ``content`` (tells its samples from any other's), ``start`` and ``end`` as they were
    cut, ``seconds``, ``sample_rate`` and ``layout``.
    """

    name: ClassVar[str] = "cut"
    version: ClassVar[int] = 3
    reasons: ClassVar[tuple[str, ...]] = (*sorted({reason.name.lower() for reason in _REASONS}), NO_DECODER)
    retryable: ClassVar[tuple[str, ...]] = (Reason.NOT_AUDIO.name.lower(), NO_DECODER)  # a decoder may be there by then
    needs: ClassVar[tuple[str, ...]] = ("audio", "mark", "start", "end")
    gives: ClassVar[tuple[str, ...]] = ("audio", "content", "start", "end", "seconds", "sample_rate", "layout")

    min_seconds: float = 0.1  # a shorter stretch is a reject
    max_seconds: float = 30.0  # a longer stretch is a reject
    margin: float = 0.0  # seconds added on both sides, as far as the recording goes
    min_peak: float = 1e-3  # of full scale; below it there is nothing to hear
    max_peak: float = 2.0  # of full scale; a louder sound is a reject, one between full scale and this is turned down
    max_file_seconds: float = 3600.0  # of a recording that a stretch is cut from
    subtype: Literal["PCM_16", "PCM_24"] = "PCM_16"  # bits of a sample in the clip
    format: Literal["flac", "wav"] = "flac"  # of the clip; WAV takes a tenth of the time, and twice the room
    two_channels: Literal["stereo", "binaural"] = "stereo"  # what two channels of a file are

    def check(self) -> None:
        if not 0 < self.min_seconds <= self.max_seconds <= self.max_file_seconds:
            found = f"{self.min_seconds:g}, {self.max_seconds:g} and {self.max_file_seconds:g}"
            raise ConfigError(describe("cut", "0 < min_seconds ≤ max_seconds ≤ max_file_seconds", found))
        if self.margin < 0 or self.max_peak < 1:
            found = f"{self.margin:g} and {self.max_peak:g}"
            raise ConfigError(describe("cut", "margin of 0 or more, and max_peak of 1 or more", found))

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[Any, float, Waveform | Integers] | None = None  # what was decoded last, and how far

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return [self._result(item) for item in items]

    def _result(self, item: Item) -> Item | Reject:
        fields = item.fields
        start, end = fields.get("start"), fields.get("end")
        if end is not None and end <= (start or 0.0):
            detail = f"expected an end after {start or 0.0:g} s, found {end:g} s."
            return Reject(item.id, Reason.END_BEFORE_START.name.lower(), detail)
        try:
            return item.adding(**self._cut(fields, start or 0.0, end))
        except AudioError as error:
            reason = _SILENT if error.cause == _SILENT else _BEYOND if error.cause == _BEYOND else None
            return Reject(item.id, reason or CAUSES[error.cause].name.lower(), str(error))
        except PrerequisiteError as error:
            return Reject(item.id, NO_DECODER, str(error))

    def _cut(self, fields: Mapping[str, Any], start: float, end: float | None) -> dict[str, Any]:
        name = str(fields.get("name") or fields["audio"])
        length = None if end is None else end - start
        if length is not None and not self.min_seconds <= length <= self.max_seconds:
            raise self._unfit(name, length)
        whole = self._whole(fields["audio"], name, None if end is None else end + self.margin + 1)
        rate, total = whole.sample_rate, whole.num_samples
        first, last = round(start * rate), total if end is None else round(end * rate)
        if first < 0 or first >= total or last > total:
            asked = f"from {start:g} s on" if end is None else f"{start:g} to {end:g} s"
            raise AudioError(describe(name, f"a stretch within {whole.seconds:g} s", asked), _BEYOND)
        first, last = max(0, first - round(self.margin * rate)), min(total, last + round(self.margin * rate))
        waveform = replace(whole, samples=whole.samples[:, first:last])
        if end is None and not self.min_seconds <= waveform.seconds <= self.max_seconds:
            raise self._unfit(name, waveform.seconds)
        waveform = self._fitted(waveform, name)
        path, content = self._written(waveform)
        return {
            "audio": path,
            "content": content,
            "start": first / rate,
            "end": last / rate,
            "seconds": waveform.seconds,
            "sample_rate": rate,
            "layout": waveform.layout,
        }

    def _unfit(self, name: str, seconds: float) -> AudioError:
        expected = f"{self.min_seconds:g} to {self.max_seconds:g} s (min_seconds, max_seconds)"
        cause = "short" if seconds < self.min_seconds else "long"
        return AudioError(describe(name, expected, f"{seconds:g} s"), cause)

    def _whole(self, where: Any, name: str, until: float | None) -> Waveform | Integers:
        """The recording, decoded at least as far as `until` seconds: stretches of one follow each other."""
        far = np.inf if until is None else until
        if self._last is not None and self._last[0] == where and far <= self._last[1]:
            return self._last[2]
        sound = sound_of(where, self._folder, name)
        waveform: Waveform | Integers
        if isinstance(sound, File) and sound.path.suffix.lower() in OTHERS:
            waveform = films.decode(sound.path, name, self.max_file_seconds, until)
        else:
            try:
                waveform, far = sound.hear(self.max_file_seconds), np.inf
            except AudioError as error:
                if error.cause or not isinstance(sound, File) or not films.installed() or films.damaged(sound.path):
                    raise
                waveform = films.decode(sound.path, name, self.max_file_seconds, until)  # by another name, perhaps
        if waveform.layout == "stereo":
            waveform = replace(waveform, layout=self.two_channels)
        self._last = (where, far, waveform)
        return waveform

    def _fitted(self, waveform: Waveform | Integers, name: str) -> Waveform | Integers:
        peak = waveform.peak
        if peak < max(self.min_peak, _HALF):
            expected = f"a peak of {self.min_peak:g} or more (min_peak)"
            raise AudioError(describe(name, expected, f"{peak:.3g}"), _SILENT)
        if peak > self.max_peak:
            raise AudioError(describe(name, f"a peak of at most {self.max_peak:g} (max_peak)", f"{peak:.3g}"), "loud")
        return waveform if isinstance(waveform, Integers) else audio.limit_peak(waveform)

    def _written(self, sound: Waveform | Integers) -> tuple[str, str]:
        """Path of the clip below the corpus folder, and what tells its samples."""
        bits = 16 if self.subtype == "PCM_16" else 24
        if isinstance(sound, Integers) and bits == 16:
            return self._kept(sound.sha256(), sound.encode)
        waveform = floats(sound)
        integers = audio.quantise(waveform, bits)
        content = audio.sha256(replace(waveform, samples=integers * np.float32(2.0 ** (1 - bits))))
        return self._kept(content, lambda form: audio.encode(waveform, form, self.subtype, integers=integers))

    def _kept(self, content: str, encode: Callable[[str], bytes]) -> tuple[str, str]:
        path = Path("clips") / content[:2] / f"{content[:40]}.{self.format}"
        target = self._folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as temporary:
                temporary.write_bytes(encode(self.format))
        return path.as_posix(), content


_SILENT, _BEYOND = Reason.SILENT.name.lower(), Reason.BEYOND_THE_SOUND.name.lower()
STAGE = Cut
