"""What the GRPO benchmarks share: a policy of the quickstart's shape with random weights, and prompts for it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig

from audio_llm.model.configuration import AudioLLMConfig
from audio_llm.model.encoder import build_encoder, encoder_config
from audio_llm.model.modeling import AudioLLMForConditionalGeneration
from audio_llm.training.policy import make_trainable
from audio_llm.training.recipes import LoRARecipe
from audio_llm.training.rollouts import PolicyWeights

QUICKSTART_PROJECTOR = {
    "num_query_tokens": 16,
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}


def build_policy(hidden: int = 128, layers: int = 4, vocabulary: int = 1024, rank: int = 16) -> PolicyWeights:
    """An audio language model with LoRA, by default of the sizes in ``recipes/quickstart``."""
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(2, hidden // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    encoder = build_encoder({"name": "spatial_ast", "preset": "tiny"})
    config = AudioLLMConfig(
        text_config=text.to_dict(),
        encoder=encoder_config(encoder),
        projector=QUICKSTART_PROJECTOR,
        audio_token_id=vocabulary - 1,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = AudioLLMForConditionalGeneration(config)
    return PolicyWeights(make_trainable(model, lora=LoRARecipe(rank=rank, alpha=2 * rank)))


def embeddings(policy: PolicyWeights, count: int, length: int) -> list[Tensor]:
    """Embeddings (length, hidden) of `count` different random prompts."""
    table = policy.base.get_input_embeddings()
    ids = torch.randint(1, table.weight.shape[0] - 1, (count, length), generator=torch.Generator().manual_seed(1))
    return list(table(ids).detach())
