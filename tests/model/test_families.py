"""Language models of every family: chat formats and special tokens kept, audio as loud as text, one end learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from audio_llm.answering.ask import ask  # noqa: E402
from audio_llm.errors import CheckpointError  # noqa: E402
from audio_llm.language.prompts import AUDIO_TOKEN, target_text  # noqa: E402
from audio_llm.model.build import build_checkpoint, load_language_model, load_model, load_processor  # noqa: E402
from audio_llm.shards.reader import ShardDataset  # noqa: E402
from audio_llm.training import sft  # noqa: E402
from audio_llm.training.examples import IGNORED, encode  # noqa: E402
from tests.conftest import tiny_corpus  # noqa: E402

LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# name -> (family, special tokens, what the tokenizer says of them, the token that ends a turn, the prompt's beginning)
FAMILIES: dict[str, tuple[str, list[str], dict[str, Any], str, str]] = {
    "Qwen2 base": (
        "qwen2",
        QWEN,
        {"eos_token": QWEN[0], "pad_token": QWEN[0], "extra_special_tokens": QWEN[1:]},
        "<|im_end|>",
        "<|im_start|>user\n♪",
    ),
    "Qwen3, thinking tags special": (
        "qwen3",
        [*QWEN, "<think>", "</think>"],
        {"eos_token": QWEN[2], "pad_token": QWEN[0]},
        "<|im_end|>",
        "<|im_start|>user\n♪",
    ),
    "Llama 3 base, no pad": (
        "llama",
        LLAMA,
        {"bos_token": LLAMA[0], "eos_token": LLAMA[1]},
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n♪",
    ),
    "Llama 3, no pad": (
        "llama",
        LLAMA,
        {"bos_token": LLAMA[0], "eos_token": LLAMA[4]},
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n♪",
    ),
    "a base model": (
        "llama",
        ["<|endoftext|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "<|endoftext|>",
        "<|endoftext|>### user:\n♪",
    ),
    "Mistral": (
        "mistral",
        MISTRAL,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": "{% for m in messages %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endfor %}",
        },
        "</s>",
        "<s>[INST] ♪",
    ),
    "Mistral Nemo": (
        "mistral",
        MISTRAL,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "</s>",
        "<s>[INST]♪",
    ),
    **{
        family: (
            family,
            GEMMA,
            {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
            "<end_of_turn>",
            "<bos><start_of_turn>user\n♪",
        )
        for family in ("gemma", "gemma2", "gemma3_text")
    },
}


def tokenizer_of(special: list[str], **says: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        tiny_corpus(), trainers.BpeTrainer(vocab_size=390, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **says)


def language_model_of(family: str, tokenizer: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | changes)).eval()


def build(folder: Path, encoder: Any, tokenizer: Any, language_model: Any) -> Path:
    small = dict(num_query_tokens=4, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return build_checkpoint(
        folder, encoder=encoder, language_model=language_model, tokenizer=tokenizer, projector=small
    )


@pytest.fixture(scope="module")
def encoder(checkpoint) -> Any:
    return load_model(checkpoint()).model.audio_encoder


@pytest.fixture(scope="module")
def item(shards) -> dict[str, Any]:
    return ShardDataset(shards())[0]


@pytest.fixture(scope="module", params=list(FAMILIES))
def built(request, encoder, tmp_path_factory) -> tuple[str, Path, Any]:
    """(name, checkpoint folder, the language model it was built of)."""
    folder = tmp_path_factory.mktemp("family")
    family, special, says, *_ = FAMILIES[request.param]
    tokenizer = tokenizer_of(special, **says)
    tokenizer.save_pretrained(folder / "tokenizer")
    language_model = language_model_of(family, tokenizer)
    language_model.save_pretrained(folder / "lm")
    again = AutoTokenizer.from_pretrained(folder / "tokenizer")
    build(folder / "model", encoder, again, language_model)
    return request.param, folder / "model", AutoModelForCausalLM.from_pretrained(folder / "lm")


def test_audio_is_as_loud_as_text(built, item) -> None:
    _, folder, _ = built
    model, processor = load_model(folder), load_processor(folder)
    seen: list[Any] = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, named: seen.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    inputs = processor(
        text=[f"{AUDIO_TOKEN}Which sound is heard? The dog is left."], audio=[item["waveforms"][0].samples]
    )
    inputs.pop("audio_windows")
    with torch.no_grad():
        model(**inputs)
    heard = inputs["input_ids"][0] == processor.audio_token_id
    loudness = seen[0][0].float().pow(2).mean(-1).sqrt()
    assert 0.5 < float(loudness[heard].mean() / loudness[~heard].mean()) < 2


def test_the_chat_format_is_kept_and_one_end_is_learnt(built, item) -> None:
    name, folder, _ = built
    _, special, _, end, beginning = FAMILIES[name]
    model, processor = load_model(folder), load_processor(folder)
    tokenizer = processor.tokenizer
    example = encode(processor, item, "think")
    reply = example.labels[example.labels != IGNORED]
    assert tokenizer.decode(reply[:-1], skip_special_tokens=True) == target_text(item["sample"], "think")
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert int(reply[-1]) == end_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert (reply == end_id).sum() == 1
    prompt = tokenizer.decode(example.ids[: -len(reply)]).replace(AUDIO_TOKEN * 4, "♪")
    assert prompt.startswith(beginning)
    assert not {*special} - {*tokenizer.get_vocab()}
    with_system = processor.render([{"role": "system", "content": "Be brief."}, *example.row["prompt"]], generate=True)
    words = item["sample"].question
    assert with_system.count("Be brief.") == with_system.count(words) == 1
    assert with_system.index("Be brief.") < with_system.index(AUDIO_TOKEN) < with_system.index(words)


def test_the_language_model_is_the_same_and_its_vocabulary_round(built) -> None:
    _, folder, plain = built
    model, processor = load_model(folder), load_processor(folder)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        found, expected = model(ids).logits, plain(ids).logits
    assert (found[..., : expected.shape[-1]] - expected).abs().max() < 1e-4
    assert model.config.text_config.vocab_size % 64 == 0 and len(processor.tokenizer) > plain.config.vocab_size
    padded = processor(text=["a dog", "a dog is heard on the left"])
    assert padded["attention_mask"].sum(1).tolist()[0] < padded["input_ids"].shape[1]


def test_a_vocabulary_that_holds_the_placeholder_is_left_alone(checkpoint) -> None:
    assert load_model(checkpoint()).config.text_config.vocab_size == len(load_processor(checkpoint()).tokenizer)


def test_gemma_2_caps_its_logits(encoder, tmp_path: Path) -> None:
    """Loud weights, or the cap of 30 would not be noticed."""
    tokenizer = tokenizer_of(GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    loud = language_model_of("gemma2", tokenizer, initializer_range=1.0)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected = loud(ids).logits
        assert 20 < expected.abs().max() <= 30
        found = load_model(build(tmp_path / "model", encoder, tokenizer, loud))(ids).logits
    assert (found[..., : expected.shape[-1]] - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("special", "says", "family", "changes", "words"),
    [
        (
            ["</s>"],
            {"eos_token": "</s>", "chat_template": "<|user|>{{ messages }}"},
            "llama",
            {},
            ["<|user|>", "[INST]"],
        ),
        (["<start_of_turn>", "<eos>"], {"eos_token": "<eos>"}, "gemma", {}, ["<end_of_turn>", "no such token"]),
        (["<unk>"], {"unk_token": "<unk>"}, "llama", {}, ["ends a text", "eos_token"]),
        (["</s>"], {"eos_token": "</s>"}, "granite", {"logits_scaling": 8.0}, ["granite", "logits"]),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(encoder, tmp_path, special, says, family, changes, words) -> None:
    tokenizer = tokenizer_of(special, **says)
    with pytest.raises(CheckpointError) as refusal:
        build(tmp_path / "model", encoder, tokenizer, language_model_of(family, tokenizer, **changes))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("says", [True, False])
def test_a_system_prompt_that_a_template_writes_by_itself_is_said(encoder, tmp_path: Path, capsys, says: bool) -> None:
    words = "You are Q, a helpful assistant."
    opening = f"{{% if messages[0].role != 'system' %}}<|im_start|>system\n{words}<|im_end|>\n{{% endif %}}"
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizer_of(special, eos_token="<|im_end|>", chat_template=(opening if says else "") + turns)
    build(tmp_path / "model", encoder, tokenizer, language_model_of("qwen2", tokenizer))
    assert (words in capsys.readouterr().err) == says


def test_a_plain_format_is_built_again(encoder, tmp_path: Path) -> None:
    """A checkpoint's own language model has our template: taken apart, it can be put together anew."""
    tokenizer = tokenizer_of(["</s>"], eos_token="</s>")
    build(tmp_path / "one", encoder, tokenizer, language_model_of("llama", tokenizer))
    again = load_processor(tmp_path / "one").tokenizer
    assert again.chat_template
    build(tmp_path / "two", encoder, again, language_model_of("llama", again))
    assert load_processor(tmp_path / "two").chat_template == load_processor(tmp_path / "one").chat_template


def test_without_a_pad_token_it_is_trained_and_asked(encoder, shards, tmp_path: Path) -> None:
    """SFT, GRPO and a question: also a checkpoint that was built before every one had a pad token."""
    pytest.importorskip("trl")
    from audio_llm.training import grpo
    from tests.training.test_grpo import make_recipe, transformers_engine
    from tests.training.test_sft import recipe_of

    tokenizer = tokenizer_of(LLAMA, bos_token=LLAMA[0], eos_token=LLAMA[4])
    folder = build(tmp_path / "model", encoder, tokenizer, language_model_of("llama", tokenizer))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token"', '"no_such_key"'))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    sft.run(recipe_of(tmp_path / "sft", folder, shards(), steps=1, export=["merged"]))
    recipe = make_recipe(lambda: tmp_path / "sft" / "merged", shards, tmp_path / "grpo", steps=1)
    grpo.run(recipe, transformers_engine)
    wave = tmp_path / "clip.wav"
    _write(wave)
    assert isinstance(ask(str(folder), "what?", [wave, wave], max_tokens=4), str)


def _write(path: Path) -> None:
    import numpy as np
    import soundfile

    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (8000, 2)), 16000)


def write_gguf(path: Path, tokenizer: Any, model: Any) -> None:
    """`model` (Qwen2) and its byte-level BPE as GGUF's own package writes them, matrices in 8 bits."""
    import json

    import gguf

    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    inner |= {f"{one}_proj": f"attn_{one}" for one in "qkv"} | {
        f"{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")
    }
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in QWEN else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in pieces["merges"]])
    for name, tensor in model.model.state_dict().items():
        layer, kind = name.split(".")[-2:]
        block = f"blk.{name.split('.')[1]}." if name.startswith("layers.") else ""
        array = tensor.float().numpy()
        kept = array.ndim == 1 or not block
        data = array if kept else gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(
            f"{block}{(inner if block else names)[layer]}.{kind}",
            data,
            raw_dtype=None if kept else gguf.GGMLQuantizationType.Q8_0,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantised_and_built_on(encoder, tmp_path: Path) -> None:
    """Near the weights that it was made of, and not called quantised."""
    pytest.importorskip("gguf")
    tokenizer = tokenizer_of(QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    source = language_model_of("qwen2", tokenizer, tie_word_embeddings=True, hidden_size=64, num_attention_heads=2)
    write_gguf(tmp_path / "small-q8.gguf", tokenizer, source)
    model, read = load_language_model(tmp_path)
    text = read("the dog barks on the left", return_tensors="pt")["input_ids"]
    assert text.tolist() == [tokenizer("the dog barks on the left")["input_ids"]]
    with torch.no_grad():
        assert torch.allclose(model(text).logits, source(text).logits, atol=0.1)
    model.float()  # refused to what is called quantised
    build(tmp_path / "model", encoder, read, model)
    built, processor = load_model(tmp_path / "model"), load_processor(tmp_path / "model")
    assert (processor.tokenizer.eos_token, processor.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert not hasattr(built.config.text_config, "quantization_config")


def test_the_opening_of_a_turn_never_pads(encoder, tmp_path: Path) -> None:
    """Read from SmolLM2's GGUF file, the end of a text is <|im_start|>."""
    tokenizer = tokenizer_of(QWEN, eos_token="<|im_start|>")
    build(tmp_path / "model", encoder, tokenizer, language_model_of("qwen2", tokenizer))
    built = load_processor(tmp_path / "model").tokenizer
    assert built.eos_token == built.pad_token == "<|im_end|>"
