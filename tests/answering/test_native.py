"""Audio language models that Transformers brings itself, tiny and random: the same tokens as their own processors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_llm.answering.base import Request
from audio_llm.answering.engines import open_engine
from audio_llm.answering.native import NativeEngine
from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.errors import AudioError, CheckpointError, ConfigError
from eval import predictions
from eval.benchmarks.base import Item
from tests.conftest import tiny_corpus

MARKS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
AUDIO = dict(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=16)


def make(kind: str, folder: Path) -> Path:
    """A checkpoint folder of `kind` with random weights, as its own classes save it."""
    import transformers

    from audio_llm.tasks.language_model.task import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(tiny_corpus(), vocabulary=400)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in MARKS}
    text = TEXT | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.3}
    if kind == "qwen2_audio":
        config = transformers.Qwen2AudioConfig(
            audio_config=AUDIO | {"initializer_range": 0.3}, text_config=text, audio_token_index=ids["<|AUDIO|>"]
        )
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        config = transformers.Qwen2_5OmniThinkerConfig(
            audio_config=AUDIO | {"output_dim": 32, "initializer_range": 0.3},
            text_config=text,
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32),
            audio_token_index=ids["<|AUDIO|>"],
            audio_token_id=ids["<|AUDIO|>"],
            image_token_index=ids["<|IMAGE|>"],
            video_token_index=ids["<|VIDEO|>"],
            audio_start_token_id=ids["<|audio_bos|>"],
            audio_end_token_id=ids["<|audio_eos|>"],
            vision_start_token_id=ids["<|IMAGE|>"],
        )
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    with torch.no_grad():  # random towers are nearly constant: louder ones, so that a deaf engine would be noticed
        for name, parameter in model.named_parameters():
            if "audio" in name and parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=30).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2_audio", "qwen2_5_omni_thinker"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("native") / request.param)


def ask(seconds: float, seed: int = 0, heard: bool = True, question: str = "Which side?") -> Request:
    samples = np.random.default_rng(seed).normal(0, 0.1, (1, int(16000 * seconds))).astype(np.float32)
    item = Item(str(seed), question, ["left", "right"], "left", "side", "test", "c")
    return Request(item, (Waveform(samples, 16000, "mono"),) if heard else (), max_tokens=6)


def test_a_batch_answers_what_each_request_alone_does_and_hears(native: Path) -> None:
    engine = open_engine("auto", str(native), batch_size=4)
    assert isinstance(engine, NativeEngine)
    requests = [ask(1.0, 0), ask(2.5, 1), ask(1.0, 2, heard=False), ask(4.0, 3)]
    together = list(engine.generate(requests))
    alone = [next(iter(engine.generate([request]))) for request in requests]
    assert [answer.raw for answer in together] == [answer.raw for answer in alone]
    assert [answer.prompt_tokens for answer in together] == [answer.prompt_tokens for answer in alone]
    assert together[0].prompt_tokens - together[2].prompt_tokens == 25 + 2  # 25 audio tokens a second, and two marks
    both = Request(requests[0].item, requests[0].audios + requests[1].audios, max_tokens=6)
    (answer,) = engine.generate([both])  # each audio has as many tokens as it has alone, and its own two marks
    heard = [answer.prompt_tokens - together[2].prompt_tokens for answer in (together[0], together[1], answer)]
    assert heard[0] + heard[1] == heard[2]
    embedded = logits(engine, requests[0]), logits(engine, ask(1.0, 9))
    assert (embedded[0] - embedded[1]).abs().max() > 1e-3  # another sound, other logits


def logits(engine: NativeEngine, request: Request) -> torch.Tensor:
    with torch.inference_mode():
        return engine._model(**engine._encode([engine._render(request)], [request])).logits[0, -1]


def test_the_placeholder_is_expanded_as_the_models_own_processor_does(tmp_path: Path) -> None:
    from transformers import Qwen2AudioProcessor

    engine = open_engine("transformers", str(make("qwen2_audio", tmp_path / "model")))
    theirs = Qwen2AudioProcessor(engine._extractor, engine._tokenizer, chat_template=TEMPLATE)
    requests = [ask(0.3, 0), ask(7.77, 1)]
    texts = [engine._render(request) for request in requests]
    ours = engine._encode(texts, requests)
    clips = [request.audios[0].samples[0] for request in requests]
    wanted = theirs(text=texts, audio=clips, sampling_rate=16000, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "feature_attention_mask", "input_features"):
        assert torch.equal(ours[name], wanted[name]), name


def test_what_it_cannot_hear_is_refused_by_name(native: Path) -> None:
    engine = open_engine("auto", str(native))
    two = Waveform(np.zeros((2, 16000), np.float32), 16000, "stereo")
    with pytest.raises(AudioError, match=r"item 'x': expected layout mono, found stereo.*--hearing left"):
        engine.prepare(two, "item 'x'")
    with pytest.raises(AudioError, match=r"expected at most 30 s.*found 31\.00 s"):
        engine.prepare(Waveform(np.zeros((1, 31 * 16000), np.float32), 16000, "mono"), "item 'x'")
    assert engine.prepare(Waveform(np.zeros((1, 8000), np.float32), 8000, "mono"), "x").sample_rate == 16000
    with pytest.raises(ConfigError, match="--engine transformers"):
        open_engine("vllm", str(native))


def test_a_typed_placeholder_and_a_deaf_template_do_not_pass(native: Path) -> None:
    engine = open_engine("auto", str(native))
    assert engine._render(ask(1.0, question="Is <|AUDIO|> this?")).count("<|AUDIO|>") == 1
    engine._template = TEMPLATE.replace("<|AUDIO|>", "")
    with pytest.raises(CheckpointError, match="chat template"):
        engine._render(ask(1.0))


def test_a_whole_run_by_one_of_two_channels(native: Path, shards, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["eval", str(native), str(shards(count=12)), "--out", str(out), "--engine", "transformers", "--quiet"]
    command += ["--max-tokens", "4", "--controls", "silence,text_only", "--hearing", "left"]
    assert main(command) == 0
    rows = predictions.read(out)
    assert len(rows) == 36 and not any(row.error for row in rows)
    tokens = {row.control: row.prompt_tokens for row in rows}  # of the last item
    assert tokens[""] == tokens["silence"] > tokens["text_only"]
    assert json.loads((out / "run.json").read_text())["settings"]["hearing"] == "left"
