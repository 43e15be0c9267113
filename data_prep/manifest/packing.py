"""Sounds of drafts, decoded, cut, checked and encoded: what worker processes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.errors import AudioError, AudioLLMError, describe
from audio_llm.shards.schema import AudioInfo, Sample
from audio_llm.shards.writer import Packed, pack
from data_prep.manifest.recipe import AudioConfig
from data_prep.manifest.rows import CAUSES, Draft, Reason, Reject, RowError

CONTENT = "sound"  # the key of meta that tells a whole sound from others, where a sample is a stretch of one


@dataclass(frozen=True)
class Made:
    """A sample ready to be written, or why there is none."""

    key: str
    packed: Packed | None = None
    reject: Reject | None = None


class _Decoded(NamedTuple):
    """The sound that was decoded last: many rows ask about one."""

    name: str
    waveform: Waveform
    content: str


class Packer:
    """What a worker process holds."""

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self._last: _Decoded | None = None

    def pack(self, job: tuple[Sequence[Draft]]) -> list[Made]:
        """One result a draft, in order."""
        return [self._made(draft) for draft in job[0]]

    def _made(self, draft: Draft) -> Made:
        try:
            return Made(draft.sample.id, self._packed(draft))
        except RowError as error:
            reject = Reject.of(draft.where, error)
        except AudioError as error:
            reject = Reject(draft.where, CAUSES[error.cause], str(error))
        except AudioLLMError as error:
            reject = Reject(draft.where, Reason.NOT_AUDIO, str(error))
        return Made(draft.sample.id, reject=reject)

    def _packed(self, draft: Draft) -> Packed:
        decoded = self._decoded(draft)
        waveform = self._fitted(self._cut(decoded.waveform, draft), draft)
        packed = pack(draft.sample, waveform, digest=decoded.content if waveform is decoded.waveform else None)
        if packed.sample.audio and packed.sample.audio.sha256 == decoded.content:
            return packed
        # Of a stretch, or of other samples than the file's: what tells the sound itself is kept beside them.
        return packed.describing(replace(packed.sample, meta=packed.sample.meta | {CONTENT: decoded.content}))

    def _decoded(self, draft: Draft) -> _Decoded:
        if self._last is None or self._last.name != draft.sound.name:
            waveform = draft.sound.hear(self.config.max_file_seconds)
            if waveform.layout == "stereo":
                waveform = replace(waveform, layout=self.config.two_channels)
            self._last = _Decoded(draft.sound.name, waveform, audio.sha256(waveform))
        return self._last

    def _cut(self, waveform: Waveform, draft: Draft) -> Waveform:
        """The stretch from `start` to `end`, to the nearest samples; half a sample beyond the end is the end."""
        rate, total = waveform.sample_rate, waveform.num_samples
        first = round(draft.start * rate)
        last = total if draft.end is None else round(draft.end * rate)
        if first >= total or last > total:
            asked = f"{draft.start:g} to {draft.end:g} s" if draft.end is not None else f"from {draft.start:g} s on"
            raise RowError(Reason.BEYOND_THE_SOUND, f"expected a stretch within {waveform.seconds:g} s, found {asked}.")
        return waveform if (first, last) == (0, total) else replace(waveform, samples=waveform.samples[:, first:last])

    def _fitted(self, waveform: Waveform, draft: Draft) -> Waveform:
        """As it is to be heard, or :class:`AudioError` with its cause."""
        config, name = self.config, draft.sound.name
        seconds = waveform.seconds
        if not config.min_seconds <= seconds <= config.max_seconds:
            expected = f"{config.min_seconds:g} to {config.max_seconds:g} s (audio.min_seconds, audio.max_seconds)"
            cause = "short" if seconds < config.min_seconds else "long"
            raise AudioError(describe(name, expected, f"{seconds:g} s"), cause)
        try:
            waveform = audio.hear(waveform, config.layouts, config.hearing, name=name) if config.layouts else waveform
        except AudioError as error:
            raise AudioError(str(error), "channels") from error
        peak = float(np.abs(waveform.samples).max(initial=0.0))
        if peak < max(config.min_peak, 0.5 / audio.INT16_SCALE):
            raise RowError(Reason.SILENT, f"expected a peak of {config.min_peak:g} or more, found {peak:.3g}.")
        if config.sample_rate is not None:
            waveform = audio.resample(waveform, config.sample_rate)
        if float(np.abs(waveform.samples).max(initial=0.0)) > 1.0:
            # Resampling overshoots where the sound is at full scale; a file that is louder itself is refused.
            if peak > config.max_peak:
                expected = f"a peak of at most {config.max_peak:g} (audio.max_peak)"
                raise AudioError(describe(name, expected, f"{peak:.4g}"), "loud")
            waveform = audio.limit_peak(waveform)
        return waveform


def content_of(sample: Sample) -> str:
    """What tells the sound of a stored sample from others."""
    info: AudioInfo | None = sample.audio
    return str(sample.meta.get(CONTENT) or (info.sha256 if info else None) or sample.id)
