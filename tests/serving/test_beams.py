"""The search that vLLM's tokens are put through, against Transformers' ``generate`` on the same network."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from audio_llm.serving.beams import Search


def network(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=12, initializer_range=0.7, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def searched(model: LlamaForCausalLM, prompt: list[int], width: int, ends: tuple[int, ...], longest: int) -> list[int]:
    search = Search(width, ends, longest)
    while not search.done:
        ids = torch.tensor([[*prompt, *beam.ids] for beam in search.running])
        rows = model(ids).logits[:, -1].log_softmax(-1).topk(min(search.keep, 12))
        search.advance(
            [list(zip(i, v, strict=True)) for i, v in zip(rows.indices.tolist(), rows.values.tolist(), strict=True)]
        )
    return list(search.best)


@pytest.mark.parametrize(("width", "ends"), [(1, (1,)), (2, (1,)), (4, (1,)), (4, (1, 2)), (5, (1,))])
def test_it_finds_what_transformers_finds(width: int, ends: tuple[int, ...]) -> None:
    longest, early, cut = 9, 0, 0
    for seed in range(4):
        model = network(seed)
        model.generation_config.eos_token_id = list(ends)
        for start in range(3, 7):
            prompt = [start, (start * 5) % 9 + 3]
            how = dict(num_beams=width, do_sample=False, max_new_tokens=longest)
            found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 2, dtype=torch.long), **how)
            ours = searched(model, prompt, width, ends, longest)
            assert ours == found[0, 2:].tolist(), (seed, start)
            early, cut = early + (len(ours) < longest), cut + (len(ours) == longest)
    assert early and cut, "replies that end and replies that are cut"
