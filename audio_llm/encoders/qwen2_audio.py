"""The tower of Qwen2-Audio (Chu et al. 2024, "Qwen2-Audio Technical Report"): Whisper's encoder, then a mean of two.

Its layers are Transformers', its keys those of the published folders under ``audio_tower.``; the log-mel is ours, on
the module's device. The whole model (tower, linear projector, Qwen2) is read by :mod:`audio_llm.model.native`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoderLayer

from audio_llm import config as recipes
from audio_llm.encoders import features
from audio_llm.encoders.published import configured, read_published, read_transformers, state_dict_of
from audio_llm.encoders.whisper import FIELDS, SAMPLE_RATE, WhisperConfig
from audio_llm.errors import CheckpointError, describe
from audio_llm.model.encoder import AudioEncoder, Published
from audio_llm.model.folder import load_strictly
from audio_llm.model.layouts import NativeForm, NativeLayout

HOP = 160  # samples, of the log-mel
_LEAST = 8  # frames: all that the first token is made of lies in them
_BEHIND = 3  # frames of silence after the longest clip: no frame of sound then is mirrored at the end

LINEAR = {"name": "linear", "norm": False}  # the projector: one embedding a token


@dataclasses.dataclass
class Qwen2AudioTowerConfig(WhisperConfig):
    """Sizes. The defaults are those of Qwen2-Audio-7B."""

    token: ClassVar[int] = 4 * HOP  # samples

    n_mels: int = 128
    hidden_size: int = 1280
    depth: int = 32
    heads: int = 20
    mlp_size: int = 5120

    @property
    def frames(self) -> int:
        """Frames of the log-mel of a full window, 100 a second."""
        return self.samples // HOP


class Qwen2AudioTower(AudioEncoder):
    """Tokens after the last norm, 40 ms each. What follows a clip is masked; clips under 30 ms end in silence."""

    name = "qwen2_audio"
    config_class: ClassVar[type] = Qwen2AudioTowerConfig
    transformers_type = "qwen2_audio"
    native_types: ClassVar[tuple[str, ...]] = ("qwen2_audio",)
    signs = r"^audio_tower\.layer_norm\."
    licence = "see the model's page (Qwen2-Audio-7B and -Instruct: Apache-2.0)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "7b": {},
        "tiny": {"window_seconds": 2.56, "hidden_size": 64, "depth": 2, "heads": 4, "mlp_size": 128},
    }

    config: Qwen2AudioTowerConfig

    def __init__(self, config: Qwen2AudioTowerConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.sample_rate, self.window_seconds = SAMPLE_RATE, config.window_seconds
        self.layouts, self.num_channels = ("mono",), 1
        self.hidden_size = config.hidden_size
        self.conv1 = nn.Conv1d(config.n_mels, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        self.embed_positions = self.positions()
        self.layers = nn.ModuleList(self.layer(number) for number in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def positions(self) -> nn.Module:
        """What gives the embeddings of positions (n,) after the convolutions."""
        return nn.Embedding(self.config.frames // 2, self.config.hidden_size)

    def layer(self, number: int) -> nn.Module:
        """The layer of this `number`, from 0 on."""
        fields = {theirs: getattr(self.config, ours) for ours, (theirs, _) in FIELDS.items()}
        return Qwen2AudioEncoderLayer(Qwen2AudioEncoderConfig(**fields, attn_implementation="sdpa"))

    @property
    def layer_prefixes(self) -> list[str]:
        return [f"layers.{number}." for number in range(self.config.depth)]

    @property
    def num_tokens(self) -> int:
        return self.config.frames // 4

    def count_tokens(self, samples: int) -> int:
        return pooled(-(-samples // HOP))

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames = -(-lengths // HOP)  # (batch,)
        # A frame is a matter of its samples alone, so that the silence up to the window's end need not be computed.
        longest = min(max(-(-(int(frames.max()) + _BEHIND) // 4) * 4, _LEAST), self.config.frames)
        maps = features.whisper_log_mel(waveform[:, 0, : longest * HOP], self.config.n_mels, exact=True)[:, None]
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        maps = maps[:, 0].to(self.conv1.weight.dtype)  # (batch, frames, mels)
        return self.attend(maps, frames.to(maps.device))

    def attend(self, maps: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel (batch, frames, mels), of which the first `frames` (batch,) are the clip's -> tokens and mask."""
        hidden = self.transform(self.convolve(maps), (frames - 1) // 2 + 1)  # (batch, frames / 2, hidden)
        tokens = self.layer_norm(hidden.unflatten(1, (-1, 2)).mean(2))  # (batch, frames / 4, hidden)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < pooled(frames)[:, None]

    def convolve(self, maps: Tensor) -> Tensor:
        """Log-mel (rows, frames, mels) -> (rows, frames / 2, hidden)."""
        hidden = nn.functional.gelu(self.conv1(maps.transpose(1, 2)))
        return nn.functional.gelu(self.conv2(hidden)).transpose(1, 2)

    def transform(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """Positions and layers on (rows, n, hidden), each of which attends to its first `valid` (rows,), or to all."""
        place = torch.arange(hidden.shape[1], device=hidden.device)
        mask = None if valid is None else (place < valid[:, None])[:, None, None]  # (rows, 1, 1, n)
        hidden = nn.functional.dropout(
            hidden + self.embed_positions(place).to(hidden.dtype), self.config.dropout, self.training
        )
        return self.through(hidden, attention_mask=mask)

    def through(self, hidden: Tensor, **given: Any) -> Tensor:
        """`hidden` through all layers, each of which is `given` the same."""
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and not layer.gradient_checkpointing:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **given)
            else:
                hidden = layer(hidden, **given)
        return hidden

    # --------------------------------------------------------------------------------------------- published folders

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """See the base class. `path` is the folder of a whole model, of which the tower alone is read."""
        from audio_llm.model.native import read_config

        if not Path(path).is_dir():
            state_dict_of(read_published(path), kind=cls.name, name=path)  # refuses another encoder's by its name
            raise CheckpointError(describe(f"checkpoint {path}", "the folder of a whole model", "a file"))
        found = read_config(path)
        if found.model_type not in cls.native_types:
            expected = f"model_type {' or '.join(cls.native_types)}"
            raise CheckpointError(describe(f"model {path}", expected, str(found.model_type)))
        layout = cls.native_layout(found)
        _, state = read_transformers(path, tuple(theirs for ours, theirs in layout.keys if ours.startswith(_ENCODER)))
        names = {key: ours for key in state if (ours := layout.ours(key)) and ours.startswith(_ENCODER)}
        with configured(path):
            encoder = cls(recipes.build(cls.config_class, {**layout.encoder, **fields}, where=cls.name))
        load_strictly(encoder, {ours.removeprefix(_ENCODER): state[key] for key, ours in names.items()}, str(path))
        return Published(encoder.eval())

    @classmethod
    def native_forms(cls) -> dict[str, NativeForm]:
        """The one that is published."""
        return {}

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """The whole model: see :class:`~audio_llm.model.layouts.NativeEncoder`."""
        return NativeLayout(
            encoder=cls.sizes(config.audio_config, config.audio_config.max_source_positions * 2 * HOP / SAMPLE_RATE),
            projector=LINEAR,
            text=text_config(config.text_config),
            keys=(*KEYS, ("model.projector.", "multi_modal_projector.")),
            misnamed=MISNAMED,
            audio_token_id=config.audio_token_id,
        )

    @classmethod
    def sizes(cls, audio_config: Any, window_seconds: float) -> dict[str, Any]:
        """Fields of the encoder's configuration from those of a published ``audio_config``."""
        fields = {ours: getattr(audio_config, theirs) for ours, (theirs, _) in FIELDS.items()}
        return {"window_seconds": window_seconds, **fields}


def text_config(config: Any, name: str = "qwen2", alike: tuple[str, ...] = ()) -> dict[str, Any]:
    """The configuration of a language model that computes what Transformers' `name` does, as that one's own.

    Raises :class:`CheckpointError` for one that is neither `name` nor one of `alike`.
    """
    if config.model_type not in (name, *alike):
        raise CheckpointError(describe("config.json: text_config", f"model_type {name}", str(config.model_type)))
    known = set(CONFIG_MAPPING[name]().to_dict()) - {"model_type", "architectures", "dtype", "transformers_version"}
    fields = {key: value for key, value in config.to_dict().items() if key in known}
    rope = {key: value for key, value in (config.rope_parameters or {}).items() if key not in ("mrope_section", "type")}
    return {**fields, "model_type": name, "rope_parameters": rope}


_ENCODER = "model.audio_encoder."
# Tower and language model in the folders of Transformers' audio models that are made like this one.
KEYS = (
    (_ENCODER, "audio_tower."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# What a model that was built, and not read from a published folder, is saved under by Transformers 5.
MISNAMED = (("language_model.model.model.", "language_model.model."),)
# The same for a projector of two linears.
TWO_LINEARS = (
    ("model.projector.hidden.0.", "multi_modal_projector.linear_1."),
    ("model.projector.linear.", "multi_modal_projector.linear_2."),
)


def two_linears(config: Any, bias: bool, group: int = 1) -> dict[str, Any]:
    """The projector of two linears with GELU between them, on every `group` of tokens side by side.

    Raises :class:`CheckpointError` for another activation.
    """
    if config.projector_hidden_act != "gelu":
        raise CheckpointError(describe("config.json: projector_hidden_act", "gelu", str(config.projector_hidden_act)))
    return {"name": "mlp", "norm": False, "bias": bias, "group": group}


def pooled(frames: Any) -> Any:
    """Tokens of so many frames: every other one by the second convolution, of these the mean of each whole pair. A clip
    too short for a pair has one token, where the published code has none and answers without having heard it."""
    pairs = ((frames - 1) // 2 + 1) // 2
    return pairs.clamp(min=1) if isinstance(pairs, Tensor) else max(pairs, 1)
