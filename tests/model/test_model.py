"""The model as Transformers knows it: it hears, refuses to be deaf, and does not depend on its neighbours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from audio_llm.errors import AudioError
from audio_llm.model.build import load_model, load_processor
from audio_llm.model.export import language_model_weights, write_language_model
from audio_llm.model.projector import QFormerConfig, QFormerProjector
from tests.paths import SHARED


def clip(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal((channels, samples))).astype(np.float32)


def ask(processor, audios: int, question: str = "Which sound?") -> str:
    content = [{"type": "audio"}] * audios + [{"type": "text", "text": question}]
    return processor.render([{"role": "user", "content": content}], generate=True)


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_projector_reproduces_the_published_one() -> None:
    import runpy

    reference = np.load(SHARED / "fixtures/bat_ref.npz")
    keys = json.loads((SHARED / "fixtures/bat_ref_keys.json").read_text())["projector"]
    projector = QFormerProjector(QFormerConfig(), 768, 4096).eval()
    ours = {key: list(value.shape) for key, value in projector.state_dict().items()}
    theirs = {key.removeprefix("encoder_projector."): shape for key, shape in keys.items()}
    assert ours == {key: value[0] if isinstance(value[0], list) else value for key, value in theirs.items()}
    assert sum(p.numel() for p in projector.parameters()) == 69_367_296
    runpy.run_path(str(SHARED / "fixtures/fill_weights.py"))["fill"](projector, "bat")
    tokens = torch.from_numpy(reference["tokens"])
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        hidden = projector.qformer(
            projector.query, encoder_hidden_states=tokens, encoder_attention_mask=mask
        ).last_hidden_state
        output, valid = projector(tokens, mask)
    assert np.abs(hidden.numpy() - reference["qformer_hidden"]).max() < 1e-5
    assert np.abs(output.numpy() - reference["projector_out"]).max() < 1e-5 and valid.all()


@pytest.mark.parametrize(
    "family, channels, tie, projector",
    [
        *[("qwen2", 2, False, "qformer"), ("qwen2", 2, True, "qformer"), ("qwen3", 4, False, "qformer")],
        *[("llama", 1, False, "qformer"), ("qwen3", 1, False, "linear"), ("llama", 1, True, "mlp")],
    ],
)
def test_a_row_alone_and_in_a_padded_batch_are_the_same(
    checkpoint, family: str, channels: int, tie: bool, projector: str
) -> None:
    folder = checkpoint(family, channels, tie, projector)
    model, processor = load_model(folder), load_processor(folder)
    texts = [ask(processor, 2), ask(processor, 0, "hello"), ask(processor, 1, "Is it near?")]
    audio = [[clip(channels, 8000), clip(channels, 15000, 1)], [], [clip(channels, 3000, 2)]]
    batch = processor(text=texts, audio=audio)
    assert batch["audio_windows"].tolist() == [1, 2, 1]
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = torch.cat(
            [model(**processor(text=[t], audio=[a])).logits[:, -1] for t, a in zip(texts, audio, strict=True)]
        )
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_the_model_refuses_to_be_deaf(checkpoint) -> None:
    model, processor = load_model(checkpoint()), load_processor(checkpoint())
    batch = processor(text=[ask(processor, 1)], audio=[[clip(2, 8000)]])
    text_only = processor(text=[ask(processor, 0)])
    audio = {key: batch[key] for key in ("input_audio", "audio_lengths")}
    with pytest.raises(ValueError, match="no audio reached the model"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="0 audio placeholder ids"):
        model(**text_only, **audio)
    with pytest.raises(ValueError, match="would be ignored"):
        model(inputs_embeds=model.model.embed(batch["input_ids"], **audio), input_audio=audio["input_audio"])
    with pytest.raises(AudioError, match="1 audio placeholders for 2 audios"):
        processor(text=[ask(processor, 1)], audio=[[clip(2, 8000), clip(2, 8000)]])


def test_other_audio_gives_other_words(checkpoint) -> None:
    model, processor = load_model(checkpoint()), load_processor(checkpoint())
    text = [ask(processor, 1)]
    with torch.no_grad():
        first, swapped = (
            model(**processor(text=text, audio=[[a]])).logits[:, -1] for a in (clip(2, 8000), clip(2, 8000)[::-1])
        )
    assert (first - swapped).abs().max() > 0.01


@pytest.mark.parametrize("channels, projector", [(2, "qformer"), (1, "mlp")])
def test_several_sequences_keep_each_rows_windows_together(checkpoint, channels: int, projector: str) -> None:
    folder = checkpoint(channels=channels, projector=projector)
    model, processor = load_model(folder), load_processor(folder)
    texts = [ask(processor, 2), ask(processor, 1)]
    audio = [[clip(channels, 8000), clip(channels, 15000, 1)], [clip(channels, 3000, 2)]]
    out = model.generate(
        **processor(text=texts, audio=audio),
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]
    torch.testing.assert_close(out[0], out[2])
    torch.testing.assert_close(out[3], out[5])
    assert (out[0] - out[3]).abs().max() > 1e-3


def test_generation_with_cache_equals_without(checkpoint) -> None:
    model, processor = load_model(checkpoint()), load_processor(checkpoint())
    batch = processor(
        text=[ask(processor, 1), ask(processor, 2)], audio=[[clip(2, 8000)], [clip(2, 3000), clip(2, 9000)]]
    )
    cached = model.generate(**batch, max_new_tokens=8, do_sample=False)
    plain = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_gradient_checkpointing_leaves_the_gradient_alone(checkpoint) -> None:
    processor = load_processor(checkpoint())
    batch = processor(text=[ask(processor, 1)], audio=[[clip(2, 8000)]])
    gradients = []
    for flag in (False, True):
        model = load_model(checkpoint()).train()
        model.model.audio_encoder.requires_grad_(False)
        if flag:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(model.model.projector.linear.weight.grad.clone())
        assert not model.model.audio_encoder.training, "a frozen encoder stays in evaluation mode"
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros((3, 8000), np.float32), "2 channels"),
        (np.zeros((1, 8000), np.float32), "2 channels"),
        (np.zeros((2, 1), np.float32), "at least 16 samples"),
        (np.full((2, 800), np.nan, np.float32), "NaN"),
        (np.zeros((2, 16000 * 600), np.float32), "at most 1.92 s"),
    ],
)
def test_audio_that_does_not_fit_is_refused_in_one_sentence(checkpoint, audio: np.ndarray, message: str) -> None:
    processor = load_processor(checkpoint())
    with pytest.raises(AudioError, match=message):
        processor(text=[ask(processor, 1)], audio=[[audio]])


def test_the_exported_language_model_continues_the_same_embeddings(checkpoint, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, processor = load_model(checkpoint("qwen3", 2)), load_processor(checkpoint("qwen3", 2))
    folder = write_language_model(model, tmp_path / "lm", language_model_weights(model), processor.tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = processor(text=[ask(processor, 1)], audio=[[clip(2, 8000)]])
    with torch.no_grad():
        embeddings = model.model.embed(batch["input_ids"], batch["input_audio"], batch["audio_lengths"])
        torch.testing.assert_close(plain(inputs_embeds=embeddings).logits, model(**batch).logits)
