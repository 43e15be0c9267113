"""Audio and text -> model inputs: windows for the encoder, one placeholder id per embedding of the projector.

The feature extractor only cuts windows; features are computed inside the encoder, on its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from audio_llm.audio import channels_cure
from audio_llm.errors import AudioError, CheckpointError, describe
from audio_llm.language.templates import rendered
from audio_llm.model.configuration import AudioLLMConfig

MIN_SAMPLES = 16  # below it there is nothing to analyse; the encoders pad short clips to their window


class AudioLLMFeatureExtractor(SequenceFeatureExtractor):
    """Arrays ``(channels, time)`` at `sampling_rate` -> windows ``(windows, num_channels, time)`` and their lengths."""

    model_input_names = ["input_audio", "audio_lengths"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 32000,
        padding_value: float = 0.0,
        num_channels: int = 2,
        layouts: Sequence[str] = ("binaural",),
        window_seconds: float = 10.0,
        max_windows: int = 4,
        min_samples: int = MIN_SAMPLES,
        least_rest: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.num_channels = num_channels
        self.layouts = list(layouts)
        self.window_seconds = window_seconds
        self.max_windows = max_windows
        self.min_samples = min_samples
        self.least_rest = least_rest  # samples: a shorter last window behind others is left out

    @property
    def window_samples(self) -> int:
        return round(self.window_seconds * self.sampling_rate)

    def validate(self, audio: Any, name: str = "audio") -> np.ndarray:
        """`audio` as a float32 array ``(channels, time)``; :class:`AudioError` when the encoder cannot take it."""
        samples = np.asarray(audio, dtype=np.float32)
        if samples.ndim == 1:
            samples = samples[None]
        expected = f"{self.num_channels} channel{'s' if self.num_channels > 1 else ''} ({' or '.join(self.layouts)})"
        if samples.ndim != 2 or samples.shape[0] != self.num_channels:
            expected, found = f"{expected} as (channels, time)", f"shape {samples.shape}"
            cure = channels_cure(self.layouts, samples.shape[0] if samples.ndim == 2 else 0)
            raise AudioError(describe(name, expected, found, cure))
        if samples.shape[1] < self.min_samples:
            raise AudioError(f"{name}: expected at least {self.min_samples} samples, found {samples.shape[1]}.")
        limit = self.window_samples * self.max_windows
        if samples.shape[1] > limit:
            raise AudioError(
                f"{name}: expected at most {limit / self.sampling_rate:g} s ({self.max_windows} windows of "
                f"{self.window_seconds:g} s), found {samples.shape[1] / self.sampling_rate:.2f} s. "
                "Raise max_windows in config.json and processor_config.json, or cut the audio."
            )
        if not np.isfinite(samples).all():
            raise AudioError(f"{name}: expected finite samples, found NaN or infinity.")
        return samples

    def cut(self, samples: int) -> tuple[int, int]:
        """How many full windows a clip of `samples` samples has, and the samples of a last, shorter one (0: none)."""
        whole, rest = divmod(samples, self.window_samples)
        return whole, 0 if whole and rest < self.least_rest else rest

    def __call__(
        self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """-> input_audio (windows, channels, time), audio_lengths (windows,), audio_windows (audios,)."""
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(
                f"audio: expected {self.sampling_rate} Hz, found {sampling_rate} Hz. "
                f"Resample it, for instance by `ffmpeg -i IN -ar {self.sampling_rate} OUT.wav`."
            )
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            raw_speech = [raw_speech]
        windows: list[np.ndarray] = []
        counts: list[int] = []
        for number, audio in enumerate(raw_speech):
            samples = self.validate(audio, f"audio {number}")
            step, (whole, rest) = self.window_samples, self.cut(samples.shape[1])
            parts = [samples[:, start : start + step] for start in range(0, whole * step + rest, step)]
            windows += parts
            counts.append(len(parts))
        lengths = [part.shape[1] for part in windows]
        batch = np.zeros((len(windows), self.num_channels, max(lengths, default=0)), np.float32)
        for row, part in zip(batch, windows, strict=True):
            row[:, : part.shape[1]] = part
        return BatchFeature(
            {
                "input_audio": torch.from_numpy(batch),
                "audio_lengths": torch.tensor(lengths, dtype=torch.long),
                "audio_windows": torch.tensor(counts, dtype=torch.long),
            }
        )


class AudioLLMProcessor(ProcessorMixin):
    """Text with an audio placeholder for each audio, and arrays -> ids, mask, windows.

    ``processor(text=[...], audio=[...])``: `audio` is a flat list in prompt order, or one list per text. Placeholder
    and counts are those of the model's configuration, whose file ``from_pretrained`` reads beside its own.
    """

    def __init__(
        self,
        feature_extractor: AudioLLMFeatureExtractor,
        tokenizer: Any,
        config: AudioLLMConfig,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer.pad_token is None:  # of a checkpoint that was built before every one had its own
            tokenizer.pad_token = tokenizer.eos_token
        self.config = config
        self.audio_token_id = config.audio_token_id
        self.audio_token = str(tokenizer.convert_ids_to_tokens(config.audio_token_id))
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_audio", "audio_lengths"]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """As the base class, with the model's configuration from the same folder or model on the hub."""
        fields, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        names = ("cache_dir", "local_files_only", "revision", "token")
        where = {name: kwargs[name] for name in names if name in kwargs}
        return fields | {"config": AudioLLMConfig.from_pretrained(pretrained_model_name_or_path, **where)}, rest

    def to_dict(self) -> dict[str, Any]:
        """What ``processor_config.json`` holds: nothing of the model's configuration, which has its own file."""
        return {name: value for name, value in super().to_dict().items() if name != "config"}

    def audio_tokens(self, samples: int) -> int:
        """Placeholders of an audio of `samples` samples: the embeddings of all its windows."""
        whole, rest = self.feature_extractor.cut(samples)
        count = self.config.window_tokens
        full = whole * count(self.feature_extractor.window_samples) if whole else 0
        return full + (count(rest) if rest else 0)

    def expand(self, texts: Sequence[str], samples: Sequence[int]) -> list[str]:
        """The placeholder of each audio becomes as many as it has embeddings, in order over all texts."""
        found = sum(text.count(self.audio_token) for text in texts)
        if found != len(samples):
            raise AudioError(f"prompt: {found} audio placeholders for {len(samples)} audios.")
        counts = map(self.audio_tokens, samples)

        def grow(text: str) -> str:
            head, *tail = text.split(self.audio_token)
            return head + "".join(self.audio_token * next(counts) + rest for rest in tail)

        return [grow(text) for text in texts]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """-> input_ids, attention_mask (batch, n) and, with audio, input_audio, audio_lengths, audio_windows."""
        data: dict[str, Any] = {}
        samples: list[int] = []
        if audio is not None:
            flat = [clip for entry in audio for clip in (entry if isinstance(entry, (list, tuple)) else [entry])]
            if flat:
                features = self.feature_extractor(flat, sampling_rate=sampling_rate)
                samples = [np.shape(clip)[-1] for clip in flat]
                data.update(features)
        if text is not None:
            texts = self.expand([text] if isinstance(text, str) else list(text), samples)
            tokens = self.tokenizer(
                texts,
                padding=padding,
                padding_side=padding_side,
                return_tensors=return_tensors,
                add_special_tokens=False,  # the chat template writes them
            )
            data.update(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return BatchFeature(data)

    def render(self, messages: Sequence[dict[str, Any]], *, generate: bool = False) -> str:
        """The chat template's text for `messages`; with `generate` the assistant's turn is opened."""
        template = self.chat_template or self.tokenizer.chat_template
        return rendered(self.tokenizer, messages, generate=generate, template=template)

    @property
    def turn_end(self) -> int:
        """The id that ends the assistant's turn: of the special token that the chat template writes behind its words,
        or where it writes none, of the token that ends a text."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "¶"}]
        closing = self.tokenizer(self.render(turns).rpartition("¶")[2], add_special_tokens=False)["input_ids"]
        known = self.tokenizer.added_tokens_decoder
        if closing and closing[0] in known and known[closing[0]].special:
            return int(closing[0])
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(describe("chat template", "a special token behind the assistant's words", "none"))
        return int(self.tokenizer.eos_token_id)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)
