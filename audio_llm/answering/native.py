"""Audio language models that Transformers brings itself: Qwen2-Audio, and the thinker of Qwen2.5-Omni.

Tokenizer and feature extractor are used directly: the models' processors also need the vision packages, and both models
expand the audio placeholder by the same rule (one token for four log-mel frames of 10 ms).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from audio_llm.answering.base import Options, Request, decoded, folder_config
from audio_llm.answering.engines import TransformersEngine
from audio_llm.audio import Waveform, hear, resample
from audio_llm.errors import AudioError, CheckpointError, describe
from audio_llm.files import read_json
from audio_llm.model.validate import expect_files

# model_type in config.json -> the class that answers in text.
MODELS = {
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
}


def chat_template(folder: Path, tokenizer: Any) -> str:
    """The template of the checkpoint's processor, else of its tokenizer. Raises :class:`CheckpointError`."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return str(read_json(folder / "chat_template.json")["chat_template"])
    if tokenizer.chat_template:
        return str(tokenizer.chat_template)
    raise CheckpointError(describe(f"model {folder}", "a chat template (chat_template.jinja)", "none"))


class NativeEngine(TransformersEngine):
    """Padded batches through ``generate``. One channel at the extractor's rate, at most its window; nothing is cut."""

    _usual_batch = 8

    @classmethod
    def recognises(cls, where: str) -> bool:
        return folder_config(where).get("model_type") in MODELS

    def _check(self, options: Options) -> None:
        if options.adapter is not None:
            expect_files(f"adapter {options.adapter}", Path(options.adapter), ("adapter_config.json",))

    def _load(self, options: Options, **more: Any) -> Any:
        import transformers

        folder = Path(options.model)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        self._template = chat_template(folder, self._tokenizer)
        kind = folder_config(folder)["model_type"]
        loaded = getattr(transformers, MODELS[kind]).from_pretrained(folder, **more)
        self._never_said = [int(loaded.config.audio_token_id)]
        self._audio_token = str(self._tokenizer.convert_ids_to_tokens(self._never_said[0]))
        return loaded

    def prepare(self, sound: Waveform | Path, name: str) -> Waveform:
        """Raises :class:`AudioError` for several channels unasked, and beyond the extractor's window."""
        waveform = hear(decoded(sound), ("mono",), self._hearing, name=name)
        limit, found = self._extractor.chunk_length, waveform.samples.shape[1] / waveform.sample_rate
        if found > limit:
            raise AudioError(describe(name, f"at most {limit} s, this model's window", f"{found:.2f} s"))
        return resample(waveform, self._extractor.sampling_rate)

    def _render(self, request: Request) -> str:
        messages = request.messages()
        for part in messages[-1]["content"]:
            if part["type"] == "text":  # a placeholder in a question would take the audio's place
                part["text"] = part["text"].replace(self._audio_token, "")
        text = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        if text.count(self._audio_token) != len(request.audios):
            expected = f"one {self._audio_token} for each audio"
            raise CheckpointError(describe("the checkpoint's chat template", expected, f"{text[:200]!r}"))
        return str(text) + request.opening

    def _encode(self, texts: list[str], batch: list[Request]) -> Any:
        from transformers import BatchFeature

        clips = [waveform.samples[0] for request in batch for waveform in request.audios]
        data: dict[str, Any] = {}
        if clips:
            features = self._extractor(
                clips,
                sampling_rate=self._extractor.sampling_rate,
                padding="max_length",
                return_attention_mask=True,
                return_tensors="pt",
            )
            mask = features["attention_mask"]  # (clips, frames) at 10 ms
            data = {"input_features": features["input_features"], "feature_attention_mask": mask}
            counts = iter((((mask.sum(-1) - 1) // 2 + 1 - 2) // 2 + 1).tolist())
            token = re.compile(re.escape(self._audio_token))
            texts = [token.sub(lambda found: found[0] * next(counts), text) for text in texts]
        return BatchFeature({**self._tokenizer(texts, padding=True, return_tensors="pt"), **data})
