"""The model: audio encoder, projector and a causal language model, in the layout Transformers, PEFT, TRL and
vLLM expect (``model`` = multimodal backbone, ``lm_head`` on top)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from audio_llm.model.configuration import AudioLLMConfig
from audio_llm.model.encoder import build_encoder
from audio_llm.model.projector import Projector, build_projector


class AudioLLMPreTrainedModel(PreTrainedModel):
    config_class = AudioLLMConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projector):
            module.reset_parameters()


@dataclass(frozen=True)
class SharedPrompt:
    """Replies to the same prompt in one batch: its keys and values are computed once, with their gradient.

    `rows` (batch,) names for every row the first row with the same prompt; `length` is the width of the left-padded
    prompts. Exact for every language model whose only memory is its key-value cache.
    """

    rows: Tensor
    length: int


class AudioLLMModel(AudioLLMPreTrainedModel):
    """The backbone: embeds text and audio, runs the language model, returns hidden states."""

    def __init__(self, config: AudioLLMConfig) -> None:
        super().__init__(config)
        self.audio_encoder = build_encoder(config.encoder or {})
        self.projector = build_projector(
            config.projector or {}, self.audio_encoder.hidden_size, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode_audio(self, input_audio: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder tokens (windows, n, encoder hidden) and their mask (windows, n)."""
        trainable = any(parameter.requires_grad for parameter in self.audio_encoder.parameters())
        if not trainable:  # whenever it was frozen: batch statistics and stochastic depth must not move
            self.audio_encoder.eval()
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return self.audio_encoder(input_audio.float(), audio_lengths)

    def get_audio_features(self, input_audio: Tensor, audio_lengths: Tensor) -> Tensor:
        """(windows, channels, time) float32 and valid samples (windows,) -> embeddings (m, text hidden) in their order,
        ``config.window_tokens`` of each window."""
        return self.project_audio(*self.encode_audio(input_audio, audio_lengths))

    def project_audio(self, tokens: Tensor, mask: Tensor, index: Tensor | None = None) -> Tensor:
        """Encoder tokens (windows, n, hidden) and mask (windows, n) -> embeddings (m, text hidden) of the windows in
        their order, or as `index` (rows,) names them."""
        embeddings, valid = self.projector(tokens.to(self.projector.linear.weight.dtype), mask)
        return embeddings[valid] if index is None else embeddings[index][valid[index]]

    def embed(
        self,
        input_ids: Tensor,
        input_audio: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_embeddings: Tensor | None = None,
        audio_tokens: tuple[Tensor, Tensor] | None = None,
        audio_index: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (batch, n, hidden) with the audio in place of its placeholder ids.

        The audio is given as samples, as `audio_tokens` (what :meth:`encode_audio` returns) or projected (m, hidden).
        With `audio_index` (windows in prompt order,) samples or tokens are those of distinct windows, however many
        rows share them.
        Raises ``ValueError`` when placeholders and audio do not match: nothing is answered without its sound.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        placeholders = input_ids == self.config.audio_token_id
        expected = int(placeholders.sum())
        if audio_embeddings is None and input_audio is not None and input_audio.shape[0]:
            if audio_lengths is None:
                raise ValueError("input_audio came without audio_lengths (valid samples per window)")
            audio_tokens = self.encode_audio(input_audio, audio_lengths)
        if audio_embeddings is None and audio_tokens is not None:
            audio_embeddings = self.project_audio(*audio_tokens, index=audio_index)
        if audio_embeddings is None:
            if expected:
                raise ValueError(
                    f"the prompt has {expected} audio placeholder ids but no audio reached the model; pass input_audio "
                    "and audio_lengths as the processor returns them"
                )
            return embeddings
        if len(audio_embeddings) != expected:
            found = f"the audio gives {len(audio_embeddings)} embeddings"
            raise ValueError(f"the prompt has {expected} audio placeholder ids but {found}")
        return embeddings.masked_scatter(
            placeholders.unsqueeze(-1).expand_as(embeddings), audio_embeddings.to(embeddings.dtype)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        input_audio: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_embeddings: Tensor | None = None,
        audio_tokens: tuple[Tensor, Tensor] | None = None,
        audio_index: Tensor | None = None,
        shared_prompt: SharedPrompt | None = None,
        kept_positions: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids or inputs_embeds, and the audio of all rows in prompt order (see :meth:`embed`).

        With `shared_prompt` the audio is that of the distinct prompts alone, and the hidden states (batch, n - length
        + 1, hidden) begin with the prompt's last token: see :class:`SharedPrompt`. Of `kept_positions` (their batch and
        width, bool) they are (1, m, hidden), row after row.
        """
        if shared_prompt is not None:
            if input_ids is None or attention_mask is None:
                raise ValueError("a shared prompt needs input_ids and attention_mask")
            audio = (input_audio, audio_lengths, audio_embeddings, audio_tokens, audio_index)
            return self._forward_shared(input_ids, attention_mask, shared_prompt, audio, kept_positions, **kwargs)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("expected input_ids or inputs_embeds, found neither")
            inputs_embeds = self.embed(
                input_ids, input_audio, audio_lengths, audio_embeddings, audio_tokens, audio_index
            )
        elif input_audio is not None or audio_embeddings is not None or audio_tokens is not None:
            raise ValueError("inputs_embeds already hold the audio; input_audio beside them would be ignored")
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = output.last_hidden_state
        return BaseModelOutputWithPast(
            last_hidden_state=hidden if kept_positions is None else hidden[kept_positions][None],
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _forward_shared(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt: SharedPrompt,
        audio: tuple[Any, ...],
        kept: Any,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        first, index = prompt.rows.unique(return_inverse=True)
        head = self.embed(input_ids[first, : prompt.length], *audio)
        # The last token of the prompt predicts the first of the reply: it is computed with the reply, once per row.
        before = self.language_model(
            inputs_embeds=head[:, :-1],
            attention_mask=attention_mask[first, : prompt.length - 1],
            past_key_values=DynamicCache(config=self.config.text_config),
            use_cache=True,
        )
        cache = before.past_key_values
        cache.batch_select_indices(index)
        tail = torch.cat([head[index, -1:], self.embed(input_ids[:, prompt.length :])], dim=1)
        output = self.language_model(
            inputs_embeds=tail, attention_mask=attention_mask, past_key_values=cache, **kwargs | {"use_cache": True}
        )
        hidden = output.last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=hidden if kept is None else hidden[kept][None])


class AudioLLMForConditionalGeneration(AudioLLMPreTrainedModel, GenerationMixin):
    """The backbone with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    loss_type = "ForCausalLM"

    def __init__(self, config: AudioLLMConfig) -> None:
        super().__init__(config)
        self.model = AudioLLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_audio_features(self, input_audio: Tensor, audio_lengths: Tensor) -> Tensor:
        """(windows, channels, time) float32, (windows,) -> embeddings (m, text hidden), window after window."""
        return self.model.get_audio_features(input_audio, audio_lengths)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        input_audio: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_embeddings: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        audio_windows: Tensor | None = None,
        heard: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, n, vocabulary). With `labels` (batch, n; -100 = not supervised) the mean loss, and logits of
        the supervised positions alone (m, vocabulary), row after row: the head is the widest layer of a small model,
        and most of a row is its prompt.

        `audio_windows` is the processor's count of windows per audio; the windows themselves arrive already flat.

        With `heard` (batch, t), ids of words for what is heard in each row (-100: no more), the language model is not
        run: the loss alone is returned, and says how far the audio's embeddings are from those of the words.
        """
        if heard is not None:
            if input_ids is None:
                raise ValueError("heard needs input_ids, whose placeholders say which row has which audio")
            audio = (input_audio, audio_lengths, audio_embeddings, kwargs.get("audio_tokens"))
            return CausalLMOutputWithPast(loss=self._distance(self.model.embed(input_ids, *audio), input_ids, heard))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            input_audio=input_audio,
            audio_lengths=audio_lengths,
            audio_embeddings=audio_embeddings,
            use_cache=use_cache,
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        hidden = output.last_hidden_state
        if labels is not None:
            supervised = labels[:, 1:] != -100
            hidden, labels = hidden[:, :-1][supervised], labels[:, 1:][supervised]
        else:
            hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(hidden)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)  # of Gemma 2
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _distance(self, embeddings: Tensor, input_ids: Tensor, heard: Tensor) -> Tensor:
        """Mean over the rows with audio of 1 − cos(mean embedding of the audio, mean embedding of the words). Of all
        embeddings the words' are those that the language model already reads, and no other row decides a row's loss."""
        sound, words = input_ids == self.config.audio_token_id, heard >= 0  # (batch, n), (batch, t)
        with torch.no_grad():
            said = self.get_input_embeddings()(heard.clamp(min=0)).float() * words[..., None]
        both = sound.any(1) & words.any(1)
        cosine = nn.functional.cosine_similarity(
            (embeddings.float() * sound[..., None]).sum(1), said.sum(1), dim=-1
        )  # (batch,); sums, for a cosine knows no length
        return ((1 - cosine) * both).sum() / both.sum().clamp(min=1)

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Audio goes in once: later steps continue from the key-value cache, where it already is.

        `inputs_embeds` is named because ``generate`` looks for it before it accepts a prompt of embeddings.
        """
        inputs = super().prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("input_audio", "audio_lengths", "audio_embeddings"):
                inputs[name] = None
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Several sequences per prompt repeat each row's windows as a block: a row may own any number of windows."""
        names = ("input_audio", "audio_lengths", "audio_embeddings")
        audio = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
        model_kwargs.pop("audio_windows", None)
        if audio and input_ids is not None and expand_size > 1:
            embeddings = (input_ids == self.config.audio_token_id).sum(dim=1).tolist()
            windows = self._windows_of_rows(embeddings, audio["audio_lengths"]) if "audio_lengths" in audio else []
            for name, value in audio.items():
                blocks = value.split(embeddings if name == "audio_embeddings" else windows)
                audio[name] = torch.cat([block.repeat(expand_size, *[1] * (block.ndim - 1)) for block in blocks])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **audio}

    def _windows_of_rows(self, embeddings: list[int], audio_lengths: Tensor) -> list[int]:
        """How many of the windows belong to each row, whose audio has so many embeddings."""
        counts = torch.tensor([self.config.window_tokens(samples) for samples in audio_lengths.tolist()])
        places = torch.searchsorted(counts.cumsum(0), torch.tensor(embeddings).cumsum(0), right=True)
        return places.diff(prepend=places.new_zeros(1)).tolist()
