"""Assemble a checkpoint folder from its parts: an encoder, a fresh projector and a causal language model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_folder
from audio_llm.language.prompts import AUDIO_TOKEN, TAGS, TURN_MARKERS, chat_template
from audio_llm.language.templates import ALPACA, alpaca_template
from audio_llm.model.loading import reading, whole_model
from audio_llm.model.validate import (
    check_language_model,
    check_template,
    download_cure,
    expect_files,
    refuse_adapter_in,
)

VOCABULARY_MULTIPLE = 64  # a vocabulary that grows does so to a multiple of it, as tensor cores like it


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """The model of a checkpoint folder (float32 unless ``dtype`` says otherwise), in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    import audio_llm

    expect_files(f"model {folder}", Path(folder), ("config.json",))
    audio_llm.register()
    refuse_adapter_in(folder)
    item, how = f"checkpoint {folder}", {"dtype": torch.float32} | kwargs
    return whole_model(AutoModelForCausalLM, folder, item, "a model that can be loaded", strict=True, **how).eval()


def load_processor(folder: str | Path) -> Any:
    """The processor of a checkpoint folder."""
    import audio_llm
    from audio_llm.model.processing import AudioLLMProcessor

    expect_files(f"model {folder}", Path(folder), ("processor_config.json",))
    check_template(folder)
    audio_llm.register()
    with reading(f"checkpoint {folder}", "a processor that can be loaded (tokenizer, processor_config.json)"):
        processor = AudioLLMProcessor.from_pretrained(folder)
    extractor, encoder = processor.feature_extractor, processor.config.on_paper
    for name, said, heard in (
        ("sampling_rate", extractor.sampling_rate, encoder.sample_rate),
        ("num_channels", extractor.num_channels, encoder.num_channels),
        ("layouts", list(extractor.layouts), list(encoder.layouts)),
        ("window_seconds", extractor.window_seconds, encoder.window_seconds),
    ):
        if said != heard:
            item, expected = f"checkpoint {folder}: {name} in processor_config.json", f"{heard}, as its encoder hears"
            raise CheckpointError(describe(item, expected, f"{said}", "Save the processor beside its own model."))
    return processor


def load_language_model(path: str | Path, item: str = "model.language_model.path") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, of a folder, a GGUF file (dequantised) or a name on the model hub.

    Raises :class:`CheckpointError`, which calls it `item`, for what cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = check_language_model(path, item)
    cure = None if Path(path).exists() else download_cure(path)
    called, expected = f"{item} {path}", "a language model that Transformers can load"
    with reading(called, expected, cure):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent if gguf else path, gguf_file=gguf and gguf.name)
    if gguf is None:
        model = whole_model(AutoModelForCausalLM, path, called, expected, cure)
    else:  # what Transformers has read is dequantised, and still called quantised
        with reading(called, expected, cure):
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        del model.config.quantization_config
    rows = model.get_input_embeddings().num_embeddings
    if (highest := max(tokenizer.get_vocab().values(), default=-1)) >= rows:
        found = f"a tokenizer with the id {highest}"
        raise CheckpointError(describe(called, f"a tokenizer of its own, with ids below {rows}", found))
    return model, tokenizer


def turn_marker(tokenizer: Any) -> str:
    """The marker of ``TURN_MARKERS`` that `tokenizer` knows; the empty one when it has no chat format.

    Raises :class:`CheckpointError` for a chat format of another kind: its model would be asked in words it never saw.
    """
    vocabulary, own = tokenizer.get_vocab(), str(tokenizer.chat_template or "")
    marker = next((marker for marker in TURN_MARKERS if marker and marker in vocabulary), "")
    closing = TURN_MARKERS[marker].of("assistant")[1].strip()
    if closing and closing not in vocabulary:
        raise CheckpointError(
            describe("language model", f"{closing}, which closes a turn of {marker}", "no such token")
        )
    if not marker and own and "### ' + message['role']" not in own:
        known = ", ".join(name for name in TURN_MARKERS if name == name.strip() and name)
        cure = (
            "Give its base model, or delete chat_template (chat_template.jinja) from its folder: "
            "it then learns the plain form '### user:'."
        )
        raise CheckpointError(
            describe("language model", f"a chat format marked by {known}, or none", repr(own[:60]), cure)
        )
    return f"{marker} " if f"{marker} " in TURN_MARKERS and f"{marker} " in own else marker


def own_system_prompt(tokenizer: Any, marker: str) -> str:
    """The system prompt that the tokenizer's own chat template writes where a conversation has none; "" for nothing."""
    from jinja2 import TemplateError

    opening, closing = (part.strip() for part in TURN_MARKERS[marker].of("system"))
    if not (opening and closing and tokenizer.chat_template):
        return ""
    try:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False))
    except (TemplateError, TypeError, ValueError, LookupError):  # of a template that wants more than a question
        return ""
    return text.partition(opening)[2].partition(closing)[0].strip()


PROMPTS = ("chat", "alpaca")  # how a checkpoint is asked: in its language model's chat format, or in Alpaca's words


def fitting_alpaca_template(tokenizer: Any) -> str:
    """BAT's template for a tokenizer that has the audio placeholder: the ids of a text behind the sounds are those that
    the tokenizer gives to the text alone, as the original put them together (Zheng et al. 2024).

    Tokenizers differ in what they begin a text with, and whether a blank opens words behind a special token, so that
    is tried. Raises :class:`CheckpointError` where nothing gives these ids.
    """
    text = f"{ALPACA[0]}What is it?{ALPACA[1]}"
    wanted = [tokenizer.convert_tokens_to_ids(AUDIO_TOKEN), *tokenizer(text)["input_ids"]]
    for opening in (f"{begin}{blank}" for begin in (tokenizer.bos_token or "", "") for blank in ("", " ")):
        if list(tokenizer(f"{AUDIO_TOKEN}{opening}{text}", add_special_tokens=False)["input_ids"]) == wanted:
            return alpaca_template(AUDIO_TOKEN, opening, tokenizer.eos_token)
    expected = "a tokenizer that splits a text behind a special token as it does alone"
    raise CheckpointError(describe("language model", expected, f"another: {wanted[1:]} alone"))


def prepare_tokenizer(tokenizer: Any, prompt: str = "chat") -> str:
    """Make `tokenizer` the checkpoint's, in place, and return the marker of its chat format.

    It gets the audio placeholder beside its own special tokens, the template of a `prompt` of ``PROMPTS``, one token
    that ends a turn (which is learnt, and where generation stops) and one to pad with; the tags of a reply become words
    that decoding keeps.
    """
    from tokenizers import AddedToken

    marker = turn_marker(tokenizer) if prompt == "chat" else ""
    closing = TURN_MARKERS[marker].of("assistant")[1].strip() or tokenizer.eos_token
    if closing is None:
        cure = "Name one in its tokenizer_config.json: eos_token."
        raise CheckpointError(describe("language model", "a token that ends a text", "a tokenizer without", cure))
    if AUDIO_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [AUDIO_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:  # of a GGUF file the opening of a turn may be called the end of a text
        tokenizer.pad_token = closing if tokenizer.eos_token in (None, marker.strip()) else tokenizer.eos_token
    tokenizer.eos_token = closing
    if prompt == "chat" and (said := own_system_prompt(tokenizer, marker)):
        note = f"its chat template writes the system prompt {said!r} where none is given; the checkpoint's writes none"
        print(f"language model: {note} (data.order_share asks with one)", file=sys.stderr, flush=True)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tags = [tag for name in TAGS for tag in (f"<{name}>", f"</{name}>") if tag in special]
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    bos = tokenizer.bos_token if marker != "<|im_start|>" else None
    tokenizer.chat_template = chat_template(marker, bos) if prompt == "chat" else fitting_alpaca_template(tokenizer)
    return marker


def build_checkpoint(
    destination: str | Path,
    *,
    encoder: Any,
    language_model: Any,
    tokenizer: Any,
    projector: dict[str, Any] | None = None,
    max_windows: int = 4,
    seed: int = 0,
    prompt: str = "chat",
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder of `encoder` (an ``AudioEncoder``), a projector and `language_model`.

    The projector is fresh, or has these `weights`. `prompt` is one of ``PROMPTS``.

    `language_model` is a Transformers causal language model with its `tokenizer`; ``<|audio|>`` is added to the
    vocabulary when missing. The projector's output is scaled to the language model's embeddings, so that untrained
    audio does not drown the text. Raises :class:`CheckpointError` for a chat format that cannot be kept, a tokenizer
    without an end, and a family that computes something which this package's model does not.
    """
    import torch

    from audio_llm.model.configuration import AudioLLMConfig
    from audio_llm.model.encoder import encoder_config
    from audio_llm.model.modeling import AudioLLMForConditionalGeneration
    from audio_llm.model.processing import MIN_SAMPLES, AudioLLMFeatureExtractor, AudioLLMProcessor

    prepare_tokenizer(tokenizer, prompt)
    audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
    words = [token for token in range(min(9, language_model.config.vocab_size)) if token != audio_token_id]
    text = torch.tensor([words], device=language_model.device)
    with torch.no_grad():
        expected = language_model.eval()(text).logits.float()
    rows = max(tokenizer.get_vocab().values()) + 1
    if rows > language_model.config.vocab_size:  # matrices of such a size are multiplied without a rest
        language_model.resize_token_embeddings(rows, pad_to_multiple_of=VOCABULARY_MULTIPLE)
    config = AudioLLMConfig(
        text_config=language_model.config.to_dict(),
        encoder=encoder_config(encoder),
        projector=dict(projector or {}),
        audio_token_id=audio_token_id,
        max_windows=max_windows,
        architectures=["AudioLLMForConditionalGeneration"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AudioLLMForConditionalGeneration(config)
    model.model.audio_encoder.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    with torch.no_grad():
        # What the table gives, not its weights: Gemma's multiplies them by √hidden, and audio comes in behind it.
        table = model.get_input_embeddings()(torch.arange(rows))
        model.model.projector.set_loudness(float(table.float().pow(2).mean().sqrt()))
        if weights is not None:
            model.model.projector.load_state_dict(weights)
        found = model.eval()(text.cpu()).logits[..., : expected.shape[-1]].float()
    apart = float((found - expected.cpu()).abs().max())
    if not apart <= 0.05 * float(expected.abs().max()):  # bfloat16 against float32 is one or two per cent
        cure = f"Models of type {language_model.config.model_type} compute something that this package's does not."
        raise CheckpointError(
            describe("language model", "the same logits as a part of the checkpoint", f"{apart:.3g} between them", cure)
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.generation_config.do_sample = False
    # A sampled placeholder would be counted as one more audio by the next forward.
    model.generation_config.suppress_tokens = config.forbidden_token_ids
    extractor = AudioLLMFeatureExtractor(
        sampling_rate=encoder.sample_rate,
        num_channels=encoder.num_channels,
        layouts=encoder.layouts,
        window_seconds=encoder.window_seconds,
        max_windows=max_windows,
        min_samples=next(n for n in range(MIN_SAMPLES, encoder.window_samples + 1) if config.window_tokens(n)),
    )
    processor = AudioLLMProcessor(extractor, tokenizer, config, tokenizer.chat_template)
    with atomic_folder(destination) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Path(destination)


def check_reloaded(folder: Path, tokenizer: Any, texts: list[str]) -> None:
    """Raise :class:`CheckpointError` unless the tokenizer read back from `folder` splits `texts` as it did."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        expected, found = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, again))
        if expected != found:
            raise CheckpointError(describe(f"tokenizer of {folder}, read back", f"{expected}", f"{found} for {text!r}"))
