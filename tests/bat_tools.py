"""Forged files of BAT, and a tokenizer of LLaMA's kind whose pieces have the published ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

# The 37 ids of BAT's prompt for "What is it?" with LLaMA-2's tokenizer, as published code gives them, and their pieces.
PIECES = (
    *((1, "<s>"), (16564, "▁Based"), (373, "▁on"), (278, "▁the"), (10348, "▁audio"), (366, "▁you"), (29915, "'")),
    *((345, "ve"), (6091, "▁heard"), (29892, ","), (2737, "▁refer"), (304, "▁to"), (278, "▁the")),
    *((15278, "▁instruction"), (322, "▁and"), (3867, "▁provide"), (263, "▁a"), (2933, "▁response"), (29889, ".")),
    *((13, "<0x0A>"), (13, "<0x0A>"), (2277, "##"), (29937, "#"), (2799, "▁Inst"), (4080, "ruction"), (29901, ":")),
    *((13, "<0x0A>"), (5618, "What"), (338, "▁is"), (372, "▁it"), (29973, "?"), (13, "<0x0A>"), (13, "<0x0A>")),
    *((2277, "##"), (29937, "#"), (13291, "▁Response"), (29901, ":")),
)
QUESTION = "What is it?"
SIZES = dict(num_query_tokens=5, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)


def llama_tokenizer(scheme: str = "metaspace") -> Any:
    """LLaMA-2's tokenizer with few pieces: `metaspace` as Transformers 5 builds it (a blank opens a text alone), or
    `legacy`, by a normaliser (a blank opens whatever stands behind a special token as well)."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    fixed = {piece: number for number, piece in PIECES} | {"<unk>": 0, "</s>": 2}
    fixed |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words = sorted((piece for _, piece in PIECES if not piece.startswith("<")), key=lambda piece: piece[0] != "▁")
    words += ["left", "front", "▁front", "▁left"]
    words.sort(key=lambda piece: piece[0] != "▁")
    merges = list(dict.fromkeys((w[:n], w[n]) for w in words for n in range(1, len(w))))
    pieces = [*map(chr, range(33, 127)), "▁", *("".join(pair) for pair in merges)]
    free = (number for number in range(259, 32000) if number not in set(fixed.values()))
    vocabulary = dict(fixed)
    for piece in pieces:
        if piece not in vocabulary:
            vocabulary[piece] = next(free)
    vocabulary |= {f"<nothing {number}>": number for number in free}
    if scheme == "metaspace":
        return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_llama(folder: Path, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A folder with a random LLaMA of four heads, two of them with keys and values of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=hidden**-0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return folder


class Projector(nn.Module):
    """BAT's projector by its published names, of Transformers' parts."""

    def __init__(self, encoder: int, output: int, sizes: dict[str, int]) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        fields = {name: value for name, value in sizes.items() if name != "num_query_tokens"}
        config = Blip2QFormerConfig(encoder_hidden_size=encoder, **fields)
        self.query = nn.Parameter(torch.randn(1, sizes["num_query_tokens"], config.hidden_size))
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(config.hidden_size, output)
        self.norm = nn.LayerNorm(output, eps=1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(self.qformer(self.query, encoder_hidden_states=tokens).last_hidden_state))


def forge(folder: Path, language_model: Path, encoder: int, sizes: dict[str, int] = SIZES) -> tuple[Any, Projector]:
    """Write ``model.pt``; return the language model in PEFT's clothes and the projector that it was taken from."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(plain, config).eval()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    projector = Projector(encoder, plain.config.hidden_size, sizes).eval()
    for parameter in projector.qformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    state = {f"llm.{name}": value.detach() for name, value in adapted.named_parameters() if value.requires_grad}
    state |= {f"encoder_projector.{name}": value.detach() for name, value in projector.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "model.pt")
    return adapted, projector


def make_encoder(folder: Path) -> Path:
    """A small Spatial-AST as an encoder folder, whose tokens tell sounds apart."""
    from audio_llm.model.encoder import build_encoder
    from audio_llm.model.folder import save_parts

    torch.manual_seed(2)
    sizes = {"window_seconds": 0.64, "target_frames": 32, "hidden_size": 48, "depth": 2, "heads": 4}
    return save_parts(folder, build_encoder({"name": "spatial_ast", "preset": "tiny", **sizes}), {}, {})
