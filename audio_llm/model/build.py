"""Assemble a checkpoint folder from its parts: an encoder, a fresh Q-Former and a causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_folder
from audio_llm.language.prompts import AUDIO_TOKEN, TURN_MARKERS, chat_template
from audio_llm.model.validate import check_language_model, download_cure, expect_files


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """The model of a checkpoint folder (float32 unless ``dtype`` says otherwise), in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    import audio_llm

    expect_files(f"model {folder}", Path(folder), ("config.json",))
    audio_llm.register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kwargs.pop("dtype", torch.float32), **kwargs).eval()


def load_processor(folder: str | Path) -> Any:
    """The processor of a checkpoint folder."""
    import audio_llm
    from audio_llm.model.processing import AudioLLMProcessor

    expect_files(f"model {folder}", Path(folder), ("processor_config.json",))
    audio_llm.register()
    return AudioLLMProcessor.from_pretrained(folder)


def load_language_model(path: str | Path, item: str = "model.language_model.path") -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder, or by a name on the model hub.

    Raises :class:`CheckpointError`, which calls it `item`, for what cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_language_model(path, item)
    try:
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's own: no space, no permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = None if Path(path).is_dir() else download_cure(path)
        expected = "a language model that Transformers can load"
        raise CheckpointError(describe(item, expected, f"'{path}': {reason}", cure)) from error


def turn_marker(tokenizer: Any) -> str:
    """The marker of ``TURN_MARKERS`` that `tokenizer` knows; the empty one when it has no chat format."""
    vocabulary = tokenizer.get_vocab()
    return next((marker for marker in TURN_MARKERS if marker and marker in vocabulary), "")


def build_checkpoint(
    destination: str | Path,
    *,
    encoder: Any,
    language_model: Any,
    tokenizer: Any,
    projector: dict[str, Any] | None = None,
    max_windows: int = 4,
    seed: int = 0,
) -> Path:
    """Write a checkpoint folder of `encoder` (an ``AudioEncoder``), a fresh projector and `language_model`.

    `language_model` is a Transformers causal language model with its `tokenizer`; ``<|audio|>`` is added to the
    vocabulary when missing. The projector's output is scaled to the language model's embeddings, so that untrained
    audio does not drown the text.
    """
    import torch

    from audio_llm.model.configuration import AudioLLMConfig
    from audio_llm.model.encoder import encoder_config
    from audio_llm.model.modeling import AudioLLMForConditionalGeneration
    from audio_llm.model.processing import AudioLLMFeatureExtractor, AudioLLMProcessor

    if AUDIO_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))
    marker = turn_marker(tokenizer)
    closing = TURN_MARKERS[marker][1].strip()
    end_id = tokenizer.convert_tokens_to_ids(closing) if closing else tokenizer.eos_token_id
    config = AudioLLMConfig(
        text_config=language_model.config.to_dict(),
        encoder=encoder_config(encoder),
        projector=dict(projector or {}),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        max_windows=max_windows,
        architectures=["AudioLLMForConditionalGeneration"],
        eos_token_id=end_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = AudioLLMForConditionalGeneration(config)
    model.model.audio_encoder.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    with torch.no_grad():
        scale = model.get_input_embeddings().weight.float().pow(2).mean().sqrt()
        model.model.projector.norm.weight.fill_(float(scale))
    model.generation_config.eos_token_id = end_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.generation_config.do_sample = False
    # A sampled placeholder would be counted as one more audio by the next forward.
    model.generation_config.suppress_tokens = [config.audio_token_id]
    extractor = AudioLLMFeatureExtractor(
        sampling_rate=encoder.sample_rate,
        num_channels=encoder.num_channels,
        layouts=encoder.layouts,
        window_seconds=encoder.window_seconds,
        max_windows=max_windows,
    )
    tokenizer.chat_template = chat_template(marker, tokenizer.bos_token if marker != "<|im_start|>" else None)
    processor = AudioLLMProcessor(
        extractor, tokenizer, tokenizer.chat_template, num_query_tokens=config.num_query_tokens
    )
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
