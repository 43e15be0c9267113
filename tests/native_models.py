"""Tiny random folders of native audio models, as their own classes save them, and what those classes answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.conftest import tiny_corpus

QWEN_MARKS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>"]
QWEN_TEMPLATE = (
    "{% set count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou listen.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}{% if 'audio' in part or part['type'] == 'audio' %}"
    "{% set count.value = count.value + 1 %}Audio {{ count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As that of Audio Flamingo 3 it writes one mark at the head of a turn, however many sounds there are in it.
FLAMINGO_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% set turn = namespace(heard='', said='') %}"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}{% set turn.heard = '<sound>' %}"
    "{% else %}{% set turn.said = turn.said + part['text'] %}{% endif %}{% endfor %}{{ turn.heard + turn.said }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
AUDIO: dict[str, Any] = dict(
    d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=16
)
FRESH_AUDIO = dict(  # by the names of newer configurations
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_mel_bins=16
)
KINDS = ("qwen2_audio", "thinker", "omni", "audio_flamingo_3")
NAMES = {  # of the class in Transformers
    "qwen2_audio": "Qwen2Audio",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinker",
    "qwen2_5_omni": "Qwen2_5OmniThinker",
    "audioflamingo3": "AudioFlamingo3",
}
MARKS = dict.fromkeys(KINDS, QWEN_MARKS) | {"audio_flamingo_3": ["<sound>", "<|vision_start|>"]}  # that of sound first
TEMPLATES = dict.fromkeys(KINDS, QWEN_TEMPLATE) | {"audio_flamingo_3": FLAMINGO_TEMPLATE}
OMNI = ("thinker", "omni")  # whose folders have two forms


def make_native(kind: str, folder: Path, fresh: bool = False, tie: bool = False) -> Path:
    """The folder of a model of `kind` (one of KINDS) with random weights; `fresh`: by the names that Transformers saves
    one under which was not read from a published folder."""
    import transformers
    from safetensors.torch import load_file, save_file

    from audio_llm.tasks.language_model.task import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(tiny_corpus(), vocabulary=400)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[kind]})
    tokenizer.eos_token = "<|endoftext|>"
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in MARKS[kind]}
    tokenizer.chat_template = TEMPLATES[kind]
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "tie_word_embeddings": tie}
    if kind == "qwen2_audio":
        config = transformers.Qwen2AudioConfig(
            audio_config=dict(AUDIO), text_config=text, audio_token_index=ids["<|AUDIO|>"], tie_word_embeddings=tie
        )
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    elif kind == "audio_flamingo_3":
        config = transformers.AudioFlamingo3Config(
            audio_config=FRESH_AUDIO, text_config=text, audio_token_id=ids["<sound>"], tie_word_embeddings=tie
        )
        model = transformers.AudioFlamingo3ForConditionalGeneration(config)
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        config = transformers.Qwen2_5OmniThinkerConfig(
            audio_config=AUDIO | {"output_dim": 64},
            text_config=text,
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64),
            audio_token_index=ids["<|AUDIO|>"],
            image_token_index=ids["<|IMAGE|>"],
            video_token_index=ids["<|VIDEO|>"],
            audio_start_token_id=ids["<|audio_bos|>"],
            audio_end_token_id=ids["<|audio_eos|>"],
            vision_start_token_id=ids["<|IMAGE|>"],
            tie_word_embeddings=tie,
        )
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    with torch.no_grad():  # louder weights: random towers are nearly constant, and a lost sound would not be noticed
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_positions" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config.repetition_penalty = 1.1  # as published ones have; none of ours may depend on it
    model.save_pretrained(folder)
    if kind not in OMNI and not fresh:
        state = load_file(folder / "model.safetensors")
        bad, good = "language_model.model.model.", "language_model.model."
        assert any(key.startswith(bad) for key in state)
        save_file(
            {key.replace(bad, good): value for key, value in state.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    if kind == "omni":
        whole = transformers.Qwen2_5OmniConfig(thinker_config=config.to_dict(), enable_audio_output=False)
        whole.architectures = ["Qwen2_5OmniForConditionalGeneration"]
        whole.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        named = {f"thinker.{key}": value for key, value in state.items()}
        save_file(named | {"talker.codec.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    seconds = 300 if kind in OMNI else 30
    extractor = transformers.WhisperFeatureExtractor(feature_size=AUDIO["num_mel_bins"], chunk_length=seconds)
    if kind == "audio_flamingo_3":
        template = tokenizer.chat_template
        transformers.AudioFlamingo3Processor(
            extractor, tokenizer, chat_template=template, max_audio_len=95
        ).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        extractor.save_pretrained(folder)
    return folder


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """(1, samples) at 16 kHz: noise under a slow swell."""
    rng, samples = np.random.default_rng(seed), int(16000 * seconds)
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * (1 + seed) * np.arange(samples) / 16000)
    return (rng.normal(0, 0.1, samples) * swell).astype(np.float32)[None]


class Stock:
    """The folder's model as Transformers brings it: what ours has to agree with."""

    def __init__(self, folder: Path) -> None:
        import transformers

        name = NAMES[transformers.AutoConfig.from_pretrained(folder).model_type]
        load = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained
        self.model = load(folder, dtype=torch.float32).eval()
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        windows = name == "AudioFlamingo3"
        self.processor = transformers.AutoProcessor.from_pretrained(folder) if windows else None

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        """Of clips (1, samples)."""
        if not clips:
            return {}
        if self.processor is not None:  # which cuts them into windows
            found = self.processor(text=[self.processor.audio_token] * len(clips), audio=[clip[0] for clip in clips])
            return {name: found[name] for name in ("input_features", "input_features_mask")}
        how: dict[str, Any] = dict(sampling_rate=16000, padding="max_length", return_attention_mask=True)
        found = self.extractor([clip[0] for clip in clips], return_tensors="pt", **how)
        return {"input_features": found["input_features"], "feature_attention_mask": found["attention_mask"]}

    def frames(self, clips: list[np.ndarray]) -> Tensor:
        """Of the log-mel, that are sound: (windows,)."""
        return next(value for name, value in self.features(clips).items() if name.endswith("mask")).sum(-1)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, clips: list[np.ndarray]) -> Tensor:
        """(batch, n, vocabulary) for prompts with expanded placeholders."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.features(clips)).logits

    @torch.inference_mode()
    def greedy(self, input_ids: Tensor, clips: list[np.ndarray], tokens: int, never: list[int]) -> list[int]:
        """The likeliest ids behind one prompt, of `tokens` in all; none of `never`."""
        found = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **self.features(clips),
            do_sample=False,
            repetition_penalty=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            suppress_tokens=never,
        )
        return found[0, input_ids.shape[1] :].tolist()
