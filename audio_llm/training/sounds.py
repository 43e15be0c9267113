"""What is heard of a stored sample in a run: its sounds, silence or their mirror image, as windows of the encoder.

Where the encoder's cache has the tokens of all of these windows, they are read in place of the sounds, and nothing is
decoded. Which windows a sound has is kept there under a key of everything that decides it: the bytes of its member of
the shard, what its JSON says of it, and what is done to it on the way. A sound has such an entry once it was decoded,
compared with its checksum and cut: with other bytes, another JSON or other settings it has none and is decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import soundfile
import torch
from torch import Tensor

from audio_llm import __version__, audio
from audio_llm.audio import Waveform
from audio_llm.language.mirroring import mirror_sample
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.rendering import is_recipe
from audio_llm.shards.schema import AudioInfo, Sample
from audio_llm.training.encoder_cache import Kept, TokenStore


@dataclass(eq=False)
class Heard:
    """The sounds of a sample as the encoder is given them; where `kept` has their tokens, `input_audio` is None."""

    samples: list[int] = field(default_factory=list)  # of each sound, per channel
    input_audio: Tensor | None = None  # (windows, channels, time) float32
    audio_lengths: Tensor | None = None  # (windows,) int64, valid samples
    kept: Kept | None = None  # where there is a cache


def hear(extractor: Any, item: Mapping[str, Any], hearing: str) -> Heard:
    """The sounds of an `item` of a :class:`ShardDataset`, or what :class:`Sounds` says that is heard in their place.

    Raises :class:`AudioError` for sound that the encoder of `extractor` cannot hear.
    """
    if "heard" in item:
        return item["heard"]
    waveforms, name = item.get("waveforms", []), item["sample"].id
    audios = []
    for number, waveform in enumerate(waveforms, 1):
        called = name if len(waveforms) == 1 else f"{name}, sound {number}"
        waveform = audio.hear(waveform, extractor.layouts, hearing, name=called)
        audio.check(waveform, layouts=None, sample_rate=extractor.sampling_rate, name=called)
        audios.append(waveform.samples)
    if not audios:
        return Heard()
    features = extractor(audios)
    heard = Heard([samples.shape[1] for samples in audios], features["input_audio"], features["audio_lengths"])
    if "keys" in item:  # none of a sound that is not to be known again
        counts = features["audio_windows"].tolist()
        heard.kept = Kept(sum(counts), list(zip(item["keys"], counts, strict=False)))
    return heard


class Sounds:
    """Samples of `shards` with their sounds as a model of `extractor` hears them by `hearing`. With the `store` of an
    encoder's cache, sounds that it knows are not decoded."""

    def __init__(self, shards: ShardDataset, extractor: Any, hearing: str, store: TokenStore | None = None) -> None:
        self.shards, self.store = shards, store
        versions = [__version__, soundfile.__libsndfile_version__]
        self.how = [*versions, extractor.to_dict(), hearing, shards.layouts, shards.sample_rate]

    def read(self, position: int, silent: bool, swap: bool) -> dict[str, Any]:
        """The item of a sample, `silent` or as it is, and with `swap` mirrored together with its text where that is
        certain: with `waveforms` (and the `keys` that they are to be kept by), or with what is `heard`."""
        item = self.shards.entry(position)
        told: list[AudioInfo] = item["sample"].audio
        waveforms = [] if told else self.shards.load_waveforms(position)
        channels = [info.channels for info in told] or [waveform.num_channels for waveform in waveforms]
        mirrored: Sample | None = None
        if swap and max(channels, default=1) > 1:
            mirrored = mirror_sample(item["sample"])  # None: it stays as it is
        if mirrored is not None:
            item["sample"] = mirrored
        if self.store is not None:
            item["keys"] = self.keys(position, told, silent, mirrored is not None)
            if (heard := self._known(item["keys"])) is not None:
                return item | {"heard": heard}
            if self.shards.compared[position]:
                item["keys"] = []  # only the first decoding in a process is compared with the checksum
        waveforms = waveforms or self.shards.load_waveforms(position)
        return item | {"waveforms": [_changed(waveform, silent, mirrored is not None) for waveform in waveforms]}

    def keys(self, position: int, told: Sequence[AudioInfo], silent: bool, mirrored: bool) -> list[bytes]:
        """16 bytes for each sound of a sample, of all that decides its windows; none where more decides them than can
        be seen without decoding: where its JSON does not tell of the sound, or files elsewhere are rendered."""
        members = self.shards.load_audio_bytes(position)
        if len(told) != len(members) or any(map(is_recipe, members)):
            return []
        found = []
        for info, member in zip(told, members, strict=True):
            decided = json.dumps([*self.how, dataclasses.asdict(info), silent, mirrored], sort_keys=True)
            digest = hashlib.sha256(hashlib.sha256(decided.encode()).digest())
            digest.update(member)
            found.append(digest.digest()[:16])
        return found

    def _known(self, keys: Sequence[bytes]) -> Heard | None:
        """What the cache has of the sounds with these keys; None where it lacks some of it."""
        if not keys or self.store is None:
            return None
        sounds = self.store.sounds(keys)
        if not all(key in sounds for key in keys):
            return None
        windows = [window for key in keys for window in sounds[key]]
        tokens = self.store.read([key for key, _ in windows])
        if not all(key in tokens for key, _ in windows):
            return None
        kept = Kept(len(windows), tokens=[tokens[key] for key, _ in windows])
        samples = [sum(length for _, length in sounds[key]) for key in keys]
        return Heard(samples, None, torch.tensor([length for _, length in windows]), kept)


def _changed(waveform: Waveform, silent: bool, mirrored: bool) -> Waveform:
    waveform = audio.silence(waveform) if silent else waveform
    return audio.swap_channels(waveform) if mirrored and waveform.num_channels > 1 else waveform
