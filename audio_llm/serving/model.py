"""The model as vLLM runs it: our encoder and projector in front of vLLM's own language model.

Written for vLLM 0.31; every import of vLLM's multimodal machinery is in this file. The encoder and the projector are
the very modules that training uses, and the audio reaches them as float32 waveforms whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    AudioEmbeddingItems,
    AudioProcessorItems,
    MultiModalDataItems,
    MultiModalDataParser,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.renderers.base import BaseRenderer
from vllm.sequence import IntermediateTensors

from audio_llm.audio import Waveform, resample
from audio_llm.errors import AudioLLMError
from audio_llm.language.prompts import AUDIO_TOKEN
from audio_llm.model.configuration import AudioLLMConfig
from audio_llm.model.encoder import build_encoder
from audio_llm.model.processing import AudioLLMFeatureExtractor, AudioLLMProcessor
from audio_llm.model.projector import build_projector


class AudioLLMDataParser(MultiModalDataParser):
    """What a caller passes as audio → float32 arrays ``(channels, time)`` at the encoder's rate, checked.

    Checked here and not in the processor, because vLLM rewords what the processor raises into a dump of the arrays.
    An item is an array or tensor at the encoder's rate, ``(array, sample rate)``, or a :class:`Waveform`. A bare 2-D
    array is one audio (vLLM's own parser takes it for several).
    """

    def __init__(self, extractor: AudioLLMFeatureExtractor, **kwargs: Any) -> None:
        super().__init__(target_sr=extractor.sampling_rate, target_channels=None, **kwargs)
        self.extractor = extractor

    def _parse_audio_data(self, data: Any) -> Any:
        if data is None:
            return None
        if self.is_embeddings(data):
            return AudioEmbeddingItems(data, self.expected_hidden_size)
        many = isinstance(data, list) and not (data and isinstance(data[0], float))
        many = many or (isinstance(data, (np.ndarray, torch.Tensor)) and data.ndim > 2)
        items = list(data) if many else [data]
        return AudioProcessorItems([self._read(item, number) for number, item in enumerate(items)])

    def _read(self, item: Any, number: int) -> np.ndarray:
        name = f"audio {number}"
        if item is None:  # the client names one that it sent before
            reason = f"{name}: no data; what was heard is not kept, so that the sound must be sent again"
            raise VLLMValidationError(reason, parameter="audio")
        if isinstance(item, Waveform):
            item = (item.samples, item.sample_rate)
        samples, rate = item if isinstance(item, tuple) else (item, None)
        try:
            array = np.atleast_2d(np.asarray(samples, dtype=np.float32))
            if array.ndim == 2 and array.shape[0] > array.shape[1]:  # (time, channels), as soundfile reads it
                array = np.ascontiguousarray(array.T)
            target = self.extractor.sampling_rate
            if rate is not None and rate != target and array.shape[0] == self.extractor.num_channels:
                layout = self.extractor.layouts[0]
                array = resample(Waveform(array, int(rate), layout), target).samples
            return self.extractor.validate(array, name)
        except (AudioLLMError, TypeError, ValueError) as error:
            raise VLLMValidationError(str(error), parameter="audio") from error


class AudioLLMProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> AudioLLMConfig:
        return self.ctx.get_hf_config(AudioLLMConfig)

    def get_hf_processor(self, **kwargs: object) -> AudioLLMProcessor:
        return self.ctx.get_hf_processor(AudioLLMProcessor, **kwargs)

    @property
    def extractor(self) -> AudioLLMFeatureExtractor:
        return self.get_hf_processor().feature_extractor

    def get_data_parser(self) -> MultiModalDataParser:
        return AudioLLMDataParser(
            self.extractor,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        longest = self.extractor.max_windows * self.extractor.window_samples
        return {"audio": self.get_hf_processor().audio_tokens(longest)}


class AudioLLMDummyInputsBuilder(BaseDummyInputsBuilder[AudioLLMProcessingInfo]):
    """The longest audio there may be, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().audio_token * mm_counts.get("audio", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> MultiModalDataDict:
        extractor = self.info.extractor
        silence = np.zeros((extractor.num_channels, extractor.window_samples * extractor.max_windows), np.float32)
        return {"audio": [silence] * mm_counts.get("audio", 0)}


class AudioLLMMultiModalProcessor(BaseMultiModalProcessor[AudioLLMProcessingInfo]):
    """Windows of each audio, and in the prompt one placeholder id for each of its embeddings."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As the base class, for prompts with one placeholder per audio or already expanded ones; others are refused.

        The base class would let surplus placeholders pass and would expand expanded ones again. It would also take a
        client's name of an audio (``uuid``) for the audio: another one of that name would be answered from the first
        one's embeddings. Audio is known by its samples here.
        """
        prompt = self._one_placeholder_each(list(inputs.prompt), inputs.mm_data_items)
        return super().apply(dataclasses.replace(inputs, prompt=prompt, mm_uuid_items=None), timing_ctx)

    def _one_placeholder_each(self, prompt: list[int], mm_items: MultiModalDataItems) -> list[int]:
        token = self.info.get_hf_config().audio_token_id
        audios, found = mm_items.get_count("audio", strict=False), prompt.count(token)
        if found == audios:
            return prompt
        lengths = self._expanded_lengths(mm_items) if audios else []
        if found == sum(lengths) and (collapsed := _collapse(prompt, token, lengths)) is not None:
            return collapsed
        message = f"the prompt has {found} audio placeholders for {audios} audio{'' if audios == 1 else 's'}"
        raise VLLMValidationError(message, parameter="audio")

    def _expanded_lengths(self, mm_items: MultiModalDataItems) -> list[int]:
        items = mm_items["audio"]
        if isinstance(items, AudioEmbeddingItems):
            return [items.get_feature_size(i) for i in range(len(items))]
        return [self.info.get_hf_processor().audio_tokens(item.shape[-1]) for item in items.get_all()]

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        # Not through vLLM's helper, which casts to the model's dtype: a waveform in bfloat16 is noise at -50 dB.
        processor: Any = self.info.get_hf_processor(**hf_kwargs)
        return processor(**hf_data)

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        """Give each audio its own windows, without the padding of its neighbours: items are cached one by one."""
        if "input_audio" in processed_data:
            counts = processed_data.pop("audio_windows").tolist()
            lengths = processed_data["audio_lengths"].split(counts)
            windows = processed_data["input_audio"].split(counts)
            processed_data["audio_lengths"] = list(lengths)
            processed_data["input_audio"] = [
                part[..., : int(length.max())].contiguous() for part, length in zip(windows, lengths, strict=True)
            ]
        return processed_data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "input_audio": MultiModalFieldConfig.batched("audio"),
            "audio_lengths": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
            "audio_embeds": MultiModalFieldConfig.batched("audio"),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        token = config.audio_token_id

        def placeholders(number: int) -> PromptUpdateDetails:
            fields: Mapping[str, Any] = out_mm_kwargs["audio"][number].get_data()
            if "audio_embeds" in fields:
                count = len(fields["audio_embeds"])
            else:
                count = sum(config.window_tokens(samples) for samples in fields["audio_lengths"].tolist())
            return PromptUpdateDetails.select_token_id([token] * count, embed_token_id=token)

        return [PromptReplacement(modality="audio", target=[token], replacement=placeholders)]


def compare_prompts_without_audio() -> None:
    """Have vLLM's renderer refuse placeholders in a prompt without audio, which it never shows to the processor."""
    for name in ("_process_tokens", "_process_tokens_async"):
        stock = getattr(BaseRenderer, name)
        if hasattr(stock, "__wrapped__"):
            continue

        @functools.wraps(stock)
        def compared(self: BaseRenderer, prompt: Any, *, _stock: Any = stock, **kwargs: Any) -> Any:
            config = self.model_config.hf_config
            if isinstance(config, AudioLLMConfig) and not prompt.get("multi_modal_data"):
                found = list(prompt["prompt_token_ids"]).count(config.audio_token_id)
                if found:
                    reason = f"the prompt has {found} audio placeholders for 0 audios"
                    raise VLLMValidationError(reason, parameter="audio")
            return _stock(self, prompt, **kwargs)

        setattr(BaseRenderer, name, compared)


compare_prompts_without_audio()


def _collapse(prompt: list[int], token: int, lengths: list[int]) -> list[int] | None:
    """`prompt` with each run of `lengths[i]` placeholders replaced by one; None when the runs are cut otherwise."""
    collapsed: list[int] = []
    remaining = iter(lengths)
    position = 0
    while position < len(prompt):
        if prompt[position] == token:
            length = next(remaining)
            if length < 1 or prompt[position : position + length] != [token] * length:
                return None
            position += length - 1
        collapsed.append(prompt[position])
        position += 1
    return collapsed


@MULTIMODAL_REGISTRY.register_processor(
    AudioLLMMultiModalProcessor, info=AudioLLMProcessingInfo, dummy_inputs=AudioLLMDummyInputsBuilder
)
class AudioLLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """Encoder and projector as plain modules (replicated under tensor parallelism), language model from vLLM."""

    language_model: Any  # whichever class vLLM has for the configuration

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    # vLLM renames checkpoints and PEFT adapters alike through it.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.audio_encoder.": "audio_encoder.",
            "model.projector.": "projector.",
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("audio"):  # of templates that take a text alone, which ours and native ones do not
            return AUDIO_TOKEN
        raise ValueError(f"this model listens to audio; it cannot take a part of type '{modality}'")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config  # AudioLLMConfig
        text: Any = config.text_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=[config.audio_token_id])
        with self._mark_tower_model(vllm_config, "audio"):
            self.audio_encoder = build_encoder(config.encoder)
            self.projector = build_projector(config.projector or {}, self.audio_encoder.hidden_size, text.hidden_size)
        with self._mark_language_model(vllm_config):
            # A nested configuration carries no architecture name, so it is looked up by model type.
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )
        self.register_buffer("never_said", torch.tensor(config.forbidden_token_ids, dtype=torch.long), persistent=False)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="projector", tower_model="audio_encoder"
        )

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """One ``(embeddings, hidden)`` tensor per audio, in prompt order."""
        embeddings, audios, lengths = (kwargs.get(name) for name in ("audio_embeds", "input_audio", "audio_lengths"))
        if embeddings is not None:
            return list(embeddings)
        if audios is None or lengths is None:
            return []
        audios, lengths = list(audios), list(lengths)
        weight = self.projector.linear.weight
        counts = [audio.shape[0] for audio in audios]
        longest = max(audio.shape[-1] for audio in audios)
        batch = torch.zeros(
            (sum(counts), audios[0].shape[1], longest), dtype=torch.float32, device=weight.device
        )  # (windows of all audios, channels, time)
        for rows, audio in zip(batch.split(counts), audios, strict=True):
            rows[..., : audio.shape[-1]] = audio
        tokens, mask = self.audio_encoder(batch, torch.cat(lengths))
        projected, valid = self.projector(tokens.to(weight.dtype), mask)
        return [part[kept] for part, kept in zip(projected.split(counts), valid.split(counts), strict=True)]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(tokens, vocabulary); None on a rank that does not sample. What marks audio is no word, whatever a request
        says: a sampled placeholder would be read back as audio that nobody sent. Here and not in a logits processor,
        of which vLLM has one interface for its older model runner and another for the one that it takes on GPUs."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:  # finite, for a log-probability is written as JSON
            logits.index_fill_(-1, self.never_said, torch.finfo(logits.dtype).min)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
