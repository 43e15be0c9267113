"""Sounds of drafts, decoded, cut, checked and encoded: what worker processes do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.errors import AudioError, AudioLLMError, describe
from audio_llm.integers import Integers, floats
from audio_llm.pcm import INT16_SCALE
from audio_llm.shards.rendering import SUFFIX
from audio_llm.shards.schema import AudioInfo, Sample
from audio_llm.shards.writer import Encoded, Packed, assemble, encode_stored
from data_prep.manifest.recipe import CONTENT, AudioConfig
from data_prep.manifest.rows import CAUSES, Draft, Reason, Reject, RowError
from data_prep.manifest.sounds import Sound


@dataclass(frozen=True)
class Made:
    """A sample ready to be written, or why there is none."""

    key: str
    packed: Packed | None = None
    reject: Reject | None = None


class _Decoded(NamedTuple):
    waveform: Waveform | Integers
    content: str
    stored: bytes | None  # its file, where that is what the encoder would make of the samples


class Packer:
    """What a worker process holds."""

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        # The sounds of the last row and their stretches as they are stored: many rows ask about one.
        self._last: dict[Sound, _Decoded] = {}
        self._stored: dict[tuple[Sound, float, float | None], Encoded] = {}

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

    def _recipes(self, draft: Draft) -> Packed:
        """What the sounds of a draft are rendered from, in their place."""
        recipes = [sound.recipe() for sound in draft.sounds]  # type: ignore[attr-defined]
        told = [recipe.info for recipe in recipes]
        infos = [AudioInfo(rate, audio.LAYOUT_CHANNELS[layout], layout, seconds) for rate, layout, seconds in told]
        texts = [recipe.to_bytes() for recipe in recipes]
        contents = [hashlib.sha256(text).hexdigest() for text in texts]
        meta = draft.sample.meta | {CONTENT: contents if len(contents) > 1 else contents[0]}
        return Packed.of(replace(draft.sample, audio=infos, meta=meta), SUFFIX, texts)

    def _packed(self, draft: Draft) -> Packed:
        if self.config.store == "recipe":
            return self._recipes(draft)
        self._last = {sound: self._decoded(sound) for sound in draft.sounds}
        decoded = [self._last[sound] for sound in draft.sounds]
        places = [(sound, *stretch) for sound, stretch in zip(draft.sounds, draft.stretches, strict=True)]
        self._stored = {
            place: self._stored.get(place) or self._encoded(found, *place)
            for place, found in zip(places, decoded, strict=True)
        }
        packed = assemble(draft.sample, [self._stored[place] for place in places], self.config.store)
        contents = [found.content for found in decoded]
        if [info.sha256 for info in packed.sample.audio] == contents:
            return packed
        # Of a stretch, or of other samples than the file's: what tells the sound itself is kept beside them.
        kept = contents if len(contents) > 1 else contents[0]
        return packed.describing(replace(packed.sample, meta=packed.sample.meta | {CONTENT: kept}))

    def _decoded(self, sound: Sound) -> _Decoded:
        if sound in self._last:
            return self._last[sound]
        waveform: Waveform | Integers
        if self.config.store == "float":
            waveform = sound.exact() if hasattr(sound, "exact") else floats(sound.hear(self.config.max_file_seconds))
        else:
            waveform = sound.hear(self.config.max_file_seconds)
        if waveform.layout == "stereo":
            waveform = replace(waveform, layout=self.config.two_channels)
        content = waveform.sha256() if isinstance(waveform, Integers) else audio.sha256(waveform)
        stored = sound.stored(content) if self.config.store == "flac" and hasattr(sound, "stored") else None
        return _Decoded(waveform, content, stored)

    def _encoded(self, found: _Decoded, sound: Sound, start: float, end: float | None) -> Encoded:
        waveform = self._fitted(self._cut(found.waveform, start, end), sound.name)
        if found.stored is not None and isinstance(waveform, Waveform) and waveform is found.waveform:
            return Encoded(AudioInfo.of(waveform, found.content), found.stored)
        return encode_stored(waveform, self.config.store, found.content if waveform is found.waveform else None)

    def _cut(self, waveform: Waveform | Integers, start: float, end: float | None) -> Waveform | Integers:
        """The stretch from `start` to `end`, to the nearest samples; half a sample beyond the end is the end."""
        rate, total = waveform.sample_rate, waveform.num_samples
        first = round(start * rate)
        last = total if end is None else round(end * rate)
        if first >= total or last > total:
            asked = f"{start:g} to {end:g} s" if end is not None else f"from {start:g} s on"
            raise RowError(Reason.BEYOND_THE_SOUND, f"expected a stretch within {waveform.seconds:g} s, found {asked}.")
        return waveform if (first, last) == (0, total) else replace(waveform, samples=waveform.samples[:, first:last])

    def _fitted(self, sound: Waveform | Integers, name: str) -> Waveform | Integers:
        """As it is to be heard, or :class:`AudioError` with its cause. Integers stay what they are where nothing is to
        be done to them: each pass over the samples counts beside the encoder's."""
        config = self.config
        seconds = sound.seconds
        if not config.min_seconds <= seconds <= config.max_seconds:
            expected = f"{config.min_seconds:g} to {config.max_seconds:g} s (audio.min_seconds, audio.max_seconds)"
            cause = "short" if seconds < config.min_seconds else "long"
            raise AudioError(describe(name, expected, f"{seconds:g} s"), cause)
        fits = config.sample_rate in (None, sound.sample_rate) and sound.layout in (config.layouts or [sound.layout])
        if fits and isinstance(sound, Integers):
            self._check_heard(sound.peak)
            return sound
        waveform = floats(sound)
        try:
            waveform = audio.hear(waveform, config.layouts, config.hearing, name=name) if config.layouts else waveform
        except AudioError as error:
            raise AudioError(str(error), "channels") from error
        peak = highest = waveform.peak
        self._check_heard(peak)
        if config.sample_rate is not None and config.sample_rate != waveform.sample_rate:
            waveform = audio.resample(waveform, config.sample_rate)
            highest = waveform.peak
        if config.store == "flac" and highest > 1.0:
            # Resampling overshoots where the sound is at full scale; a file that is louder itself is refused.
            if peak > config.max_peak:
                expected = f"a peak of at most {config.max_peak:g} (audio.max_peak)"
                raise AudioError(describe(name, expected, f"{peak:.4g}"), "loud")
            waveform = audio.limit_peak(waveform)
        return waveform

    def _check_heard(self, peak: float) -> None:
        if peak < max(self.config.min_peak, 0.5 / INT16_SCALE):
            raise RowError(Reason.SILENT, f"expected a peak of {self.config.min_peak:g} or more, found {peak:.3g}.")


def contents_of(sample: Sample) -> list[str]:
    """What tells each sound of a stored sample from others."""
    kept = sample.meta.get(CONTENT) or [info.sha256 for info in sample.audio if info.sha256] or sample.id
    return list(map(str, kept)) if isinstance(kept, list) else [str(kept)]
