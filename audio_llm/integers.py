"""16-bit samples as their file holds them: measured, hashed and encoded without becoming floats as a whole.

What a :class:`Waveform` is rounded to, and the hash of its float32 samples, are known without it where the file has 16
bits already. Passes over the samples take most of the time that is not the encoder's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_llm import audio, pcm
from audio_llm.audio import MAX_SECONDS, Waveform
from audio_llm.pcm import INT16_SCALE


@dataclass(frozen=True)
class Integers:
    """Samples ``(channels, time)`` int16, full scale ±2^15, a rate in Hz and a layout, as a :class:`Waveform` has."""

    samples: np.ndarray
    sample_rate: int
    layout: str

    @property
    def num_samples(self) -> int:
        return int(self.samples.shape[1])

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sample_rate

    @property
    def peak(self) -> float:
        """The largest amplitude, of full scale."""
        return max(int(self.samples.max(initial=0)), -int(self.samples.min(initial=0))) / INT16_SCALE

    def waveform(self) -> Waveform:
        """The same sound in floats."""
        return Waveform(pcm.to_float(self.samples.T), self.sample_rate, self.layout)

    def sha256(self) -> str:
        """:func:`audio_llm.audio.sha256` of :meth:`waveform`, of which a part at a time is made."""
        return audio.hashed(self.layout, self.sample_rate, self.samples.shape, self._parts())

    def _parts(self) -> Iterator[np.ndarray]:
        for channel in self.samples:
            for start in range(0, len(channel), pcm.PART):
                yield channel[start : start + pcm.PART] * np.float32(1 / INT16_SCALE)

    def encode(self, format: str) -> bytes:
        """Bytes of an audio file of 16 bits, the ones that :func:`audio_llm.audio.encode` makes of :meth:`waveform`."""
        frames = np.require(self.samples.T, requirements=["C", "A"])
        return audio.write(frames, self.sample_rate, format, "PCM_16", f"encoding {self.layout} audio")


def decode(
    source: str | Path | bytes, *, name: str | None = None, max_seconds: float = MAX_SECONDS
) -> Waveform | Integers:
    """:func:`audio_llm.audio.decode`, to integers where `source` is a WAV file of 16-bit PCM. Raises as it does."""
    links, header, layout, name = audio.counted(source, None, name, max_seconds, None)
    if len(links) == 1 and links[0].pcm16:
        return Integers(links[0].frames16(header.frames).T, header.samplerate, layout)
    return Waveform(audio.read(links, header, name), header.samplerate, layout)


def floats(sound: Waveform | Integers) -> Waveform:
    """A sound as everything else takes it."""
    return sound.waveform() if isinstance(sound, Integers) else sound
