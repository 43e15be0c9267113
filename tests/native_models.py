"""Tiny random folders of native audio models, as their own classes save them, and what those classes answer."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio_llm.language import tekken
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
NEW_AUDIO = dict(  # by the names of newer configurations
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_mel_bins=16
)
KINDS = ("qwen2_audio", "thinker", "omni", "audio_flamingo_3", "music_flamingo", "glm_asr")
if importlib.util.find_spec("mistral_common"):  # by which its tokenizer is read
    KINDS = (*KINDS, "voxtral")
ONE_FORM = [kind for kind in KINDS if kind != "omni"]  # of Omni's two, which differ in nothing but names
NAMES = {  # of the class in Transformers
    "qwen2_audio": "Qwen2Audio",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinker",
    "qwen2_5_omni": "Qwen2_5OmniThinker",
    "audioflamingo3": "AudioFlamingo3",
    "glmasr": "GlmAsr",
    "musicflamingo": "MusicFlamingo",
    "voxtral": "Voxtral",
}
MARKS = dict.fromkeys(KINDS, QWEN_MARKS) | {  # that of sound first
    "audio_flamingo_3": ["<sound>", "<|vision_start|>"],
    "glm_asr": ["<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>"],
    "music_flamingo": ["<sound>", "<|sound_bos|>", "<|sound_eos|>"],
    "voxtral": ["[AUDIO]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[BEGIN_AUDIO]"],
}
TEMPLATES = dict.fromkeys(KINDS, QWEN_TEMPLATE) | {
    "audio_flamingo_3": FLAMINGO_TEMPLATE,
    "glm_asr": QWEN_TEMPLATE.replace(
        "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|begin_of_audio|><|pad|><|end_of_audio|>"
    ),
    "music_flamingo": FLAMINGO_TEMPLATE,
    "voxtral": tekken.TURNS,
}
ENDS = dict.fromkeys(KINDS, "<|im_end|>") | {"voxtral": "</s>"}  # of a turn
PROCESSORS = {  # which cut a clip into windows
    "audio_flamingo_3": "AudioFlamingo3Processor",
    "music_flamingo": "MusicFlamingoProcessor",
    "glm_asr": "GlmAsrProcessor",
}
OMNI = ("thinker", "omni")  # whose folders have two forms


def make_native(kind: str, folder: Path, fresh: bool = False, tie: bool = False, positions: int = 2048) -> Path:
    """The folder of a model of `kind` (one of KINDS) with random weights; `fresh`: by the names that Transformers saves
    one under which was not read from a published folder."""
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tekken(folder) if kind == "voxtral" else tokenizer_of(kind)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in MARKS[kind]}
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "tie_word_embeddings": tie}
    if kind == "qwen2_audio":
        config = transformers.Qwen2AudioConfig(
            audio_config=dict(AUDIO), text_config=text, audio_token_index=ids["<|AUDIO|>"], tie_word_embeddings=tie
        )
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    elif kind == "audio_flamingo_3":
        config = transformers.AudioFlamingo3Config(
            audio_config=dict(NEW_AUDIO), text_config=text, audio_token_id=ids["<sound>"], tie_word_embeddings=tie
        )
        model = transformers.AudioFlamingo3ForConditionalGeneration(config)
    elif kind == "music_flamingo":
        config = transformers.MusicFlamingoConfig(
            audio_config=NEW_AUDIO | {"model_type": "audioflamingo3_encoder"},
            text_config=text,
            audio_token_id=ids["<sound>"],
            audio_bos_token_id=ids["<|sound_bos|>"],
            audio_eos_token_id=ids["<|sound_eos|>"],
            tie_word_embeddings=tie,
        )
        model = transformers.MusicFlamingoForConditionalGeneration(config)
    elif kind == "glm_asr":
        config = transformers.GlmAsrConfig(
            audio_config=NEW_AUDIO | {"intermediate_size": 128},
            text_config=text | {"head_dim": 32},
            audio_token_id=ids["<|pad|>"],
            tie_word_embeddings=tie,
        )
        model = transformers.GlmAsrForConditionalGeneration(config)
    elif kind == "voxtral":
        config = transformers.VoxtralConfig(
            audio_config=NEW_AUDIO | {"intermediate_size": 128},  # four tokens of 32
            text_config=text | {"head_dim": 32},
            audio_token_id=ids["[AUDIO]"],
            tie_word_embeddings=tie,
        )
        model = transformers.VoxtralForConditionalGeneration(config)
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
                # Sharper attention where most of what is heard is the silence up to 30 s: it would lose the rest.
                sharp = kind == "voxtral" and "language_model" in name and ("q_proj" in name or "k_proj" in name)
                parameter.normal_(std=(3 if sharp else 1) * parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS[kind])]
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
    if kind in PROCESSORS:
        template, own = tokenizer.chat_template, getattr(transformers, PROCESSORS[kind])
        processor = own(extractor, tokenizer, chat_template=template, max_audio_len=95)
        processor.save_pretrained(folder)
        return folder
    extractor.save_pretrained(folder)
    if kind != "voxtral":
        tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(kind: str) -> Any:
    """Our small tokenizer with the marks and the template of `kind`."""
    from audio_llm.tasks.language_model.task import train_tokenizer

    tokenizer = train_tokenizer(tiny_corpus(), vocabulary=400)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[kind]})
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def write_tekken(folder: Path, version: str = "v7") -> Any:
    """A small ``tekken.json`` as Voxtral has one: single bytes, some merges, 40 control tokens. Returns its tokenizer.
    (What mistral-common writes of turns is asked of itself: see audio_llm.language.tekken.)"""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.integrations.mistral import convert_tekken_tokenizer

    merges = ["th", "he", "in", " t", " a", "er", " th", "ing", " the", "ou", "nd", " s", "is", " w", "\n\n", "ich"]
    pieces = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in merges]
    control = [
        getattr(token["token_str"], "value", token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    ]
    control += [f"<SPECIAL_{number}>" for number in range(len(control), 40)]
    control[24:26], control[34] = ["[AUDIO]", "[BEGIN_AUDIO]"], "[TRANSCRIBE]"
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    size = len(pieces) + len(control)
    facts = {
        "config": {
            "pattern": pattern, "num_vocab_tokens": len(pieces), "default_vocab_size": size,
            "default_num_special_tokens": len(control), "version": version,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(control)],
        "audio": {
            "sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
        },
    }  # fmt: skip
    (folder / tekken.FILE).write_text(json.dumps(facts))
    return convert_tekken_tokenizer(str(folder / tekken.FILE), chat_template=tekken.TURNS)


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
        self.processor = (
            transformers.AutoProcessor.from_pretrained(folder) if f"{name}Processor" in PROCESSORS.values() else None
        )
        self.group = 4 if name == "GlmAsr" else 2
        self.chunks = name == "Voxtral"

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        """Of clips (1, samples)."""
        if not clips:
            return {}
        if self.processor is not None:  # which cuts them into windows
            found = self.processor(text=[self.processor.audio_token] * len(clips), audio=[clip[0] for clip in clips])
            return {name: found[name] for name in ("input_features", "input_features_mask")}
        how: dict[str, Any] = dict(sampling_rate=16000, return_tensors="pt")
        if self.chunks:  # as its processor has them, which takes clips in a conversation only
            how |= {"padding": True, "truncation": False, "pad_to_multiple_of": 480000}
            maps = [self.extractor(clip[0], **how)["input_features"][0] for clip in clips]  # (mels, frames)
            return {"input_features": torch.cat([torch.stack(one.split(3000, dim=1)) for one in maps])}
        how |= {"padding": "max_length", "return_attention_mask": True}
        found = self.extractor([clip[0] for clip in clips], **how)
        return {"input_features": found["input_features"], "feature_attention_mask": found["attention_mask"]}

    def embeddings(self, clip: np.ndarray) -> int:
        """Of a clip: its places in a prompt."""
        found = self.features([clip])
        if self.chunks:
            return 375 * len(found["input_features"])
        frames = int(next(value for name, value in found.items() if name.endswith("mask")).sum())
        return ((frames - 1) // 2 + 1 - self.group) // self.group + 1

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
