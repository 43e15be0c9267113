"""Language models of 1B to 70B in published shapes, without data: what is adapted, trained, synced and exported."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from audio_llm.model.configuration import AudioLLMConfig
from audio_llm.model.export import adapter_tensors, language_model_weights, merge, scale_of, split_state
from audio_llm.model.modeling import AudioLLMForConditionalGeneration
from audio_llm.training.policy import make_trainable, trainable_map
from audio_llm.training.recipes import LoRARecipe

# As their config.json has them; (parameters in all, by the model's card, in billions).
SHAPES: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3-8B": (
        dict(model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8)
        | dict(head_dim=128, intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False),
        8.2,
    ),
    "Llama-3.1-70B": (
        dict(model_type="llama", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
        | dict(intermediate_size=28672, vocab_size=128256, tie_word_embeddings=False),
        70.6,
    ),
    "Mistral-7B-v0.3": (
        dict(model_type="mistral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=32768, sliding_window=None)
        | dict(tie_word_embeddings=False),
        7.25,
    ),
    "Gemma-3-1B": (
        dict(model_type="gemma3_text", hidden_size=1152, num_hidden_layers=26, num_attention_heads=4)
        | dict(num_key_value_heads=1, head_dim=256, intermediate_size=6912, vocab_size=262144)
        | dict(tie_word_embeddings=True),
        1.0,
    ),
}
RANK = 64


def text_config(name: str) -> Any:
    fields = dict(SHAPES[name][0])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@cache
def model_of(name: str) -> Any:
    config = AudioLLMConfig(text_config=text_config(name).to_dict(), encoder={"name": "spatial_ast"})
    with torch.device("meta"):
        model = AudioLLMForConditionalGeneration(config).to(torch.bfloat16)
        return make_trainable(model, lora=LoRARecipe(rank=RANK, alpha=2 * RANK))


def linears(text: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of a layer, from the published numbers alone."""
    width, inner = text.hidden_size, text.intermediate_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    query, key = head * text.num_attention_heads, head * text.num_key_value_heads
    shapes = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width), "o_proj": (width, query)}
    return shapes | {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}


@pytest.mark.parametrize("name", SHAPES)
def test_adapters_stand_on_every_linear_of_every_layer(name):
    text, summary = text_config(name), trainable_map(model_of(name))
    low_rank = [n for n in summary["trained_names"] if ".lora_" in n]
    assert len(low_rank) == 2 * 7 * text.num_hidden_layers
    assert all("audio_encoder" not in n and "projector" not in n for n in low_rank)
    of_layer = sum(RANK * (rows + columns) for rows, columns in linears(text).values())
    assert summary["parts"]["language_model"]["trained"] == of_layer * text.num_hidden_layers
    assert summary["parts"]["audio_encoder"]["trained"] == 0
    projector = summary["parts"]["projector"]
    assert projector["trained"] == projector["parameters"] > 0


@pytest.mark.parametrize("name", SHAPES)
def test_the_language_model_has_its_published_size(name):
    base = model_of(name).get_base_model()
    counted = {id(p): p.numel() for n, p in base.named_parameters() if "language_model" in n or "lm_head" in n}
    adapters = sum(p.numel() for n, p in base.named_parameters() if ".lora_" in n)
    assert (sum(counted.values()) - adapters) / 1e9 == pytest.approx(SHAPES[name][1], rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_an_engine_gets_the_names_and_shapes_of_the_plain_language_model(name):
    """vLLM and Transformers load a checkpoint of this family by these names."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(text_config(name))
    expected = {n: tuple(p.shape) for n, p in plain.named_parameters()}
    sent = {n: tuple(t.shape) for n, t in language_model_weights(model_of(name).get_base_model())}
    assert sent == expected
    parts = split_state(dict(model_of(name).state_dict()))
    parts.lora = {module: (torch.empty(0), torch.empty(0)) for module in parts.lora}  # names alone: there is no data
    swapped = adapter_tensors(parts, alone=True)
    layers = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in swapped}
    assert {f"{layer}.weight" for layer in layers} <= set(expected) and len(layers) == 7 * SHAPES[name][0][
        "num_hidden_layers"
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_exports_have_the_keys_of_a_checkpoint(name):
    model = model_of(name)
    parts = split_state(dict(model.state_dict()))
    merged = merge(parts, scale_of(model.peft_config["default"]))
    base = model.get_base_model()
    with torch.device("meta"):
        plain = AudioLLMForConditionalGeneration(base.config)
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in plain.state_dict().items()}
    for module, (a, b) in parts.lora.items():
        assert (b.shape[0], a.shape[1]) == tuple(merged[f"{module}.weight"].shape)
    assert {module.rpartition(".")[2] for module in parts.lora} == set(linears(text_config(name)))
