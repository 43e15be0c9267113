"""Heads that published checkpoints bring: clip classes, and direction and distance of a clip."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import AudioEncoder

DISTANCE_CLASSES = 21  # 0 to 10 m
AZIMUTH_CLASSES = 360
ELEVATION_CLASSES = 180


_EPS = 1e-6


# Order of the published cls tokens; `audio_llm.encoders.spatial_ast` emits them so.
_DISTANCE_TOKEN, _DIRECTION_TOKEN, _SOUND_TOKEN = 0, 1, 2


class SpatialLogits(NamedTuple):
    """``(batch, classes)``, ``(batch, 21)``, ``(batch, 360)``, ``(batch, 180)``; the published order."""

    sound: Tensor
    distance: Tensor
    azimuth: Tensor
    elevation: Tensor


class SpatialHeads(nn.Module):
    """Spatial-AST's heads with their published keys, on the three cls tokens (distance, direction, sound)."""

    def __init__(self, hidden_size: int, num_classes: int = 355) -> None:
        super().__init__()
        self.fc_norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.head = nn.Linear(hidden_size, num_classes)
        self.dis_norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.distance_head = nn.Linear(hidden_size, DISTANCE_CLASSES)
        self.doa_norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.azimuth_head = nn.Linear(hidden_size, AZIMUTH_CLASSES)
        self.elevation_head = nn.Linear(hidden_size, ELEVATION_CLASSES)
        for linear in (self.head, self.distance_head, self.azimuth_head, self.elevation_head):
            nn.init.trunc_normal_(linear.weight, std=2e-5)  # published: heads start silent
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> SpatialLogits:
        """`tokens` ``(batch, n, hidden)``, the cls tokens first."""
        direction = self.doa_norm(tokens[:, _DIRECTION_TOKEN])
        return SpatialLogits(
            self.head(self.fc_norm(tokens[:, _SOUND_TOKEN])),
            self.distance_head(self.dis_norm(tokens[:, _DISTANCE_TOKEN])),
            self.azimuth_head(direction),
            self.elevation_head(direction),
        )


class UrbanSoundHead(nn.Module):
    """The UrbanSound8K CNN's classifier with its published keys: a convolution along frequency, two linear maps.

    Its input is the mean over time, so any number of time columns will do; the number of rows is fixed.
    """

    _CHANNELS, _HIDDEN = 64, 128  # published

    def __init__(self, hidden_size: int, grid: tuple[int, int], num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.grid = grid
        self.conv1d = nn.Conv1d(hidden_size, self._CHANNELS, 3, padding=1)
        self.fc1 = nn.Linear(self._CHANNELS * grid[1], self._HIDDEN)
        self.fc2 = nn.Linear(self._HIDDEN, num_classes)
        self.dropout = dropout

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of `tokens` ``(batch, time x frequency, hidden)``; `mask` is all true."""
        rows = tokens.unflatten(1, self.grid).mean(dim=1).transpose(1, 2)  # (batch, hidden, frequency)
        hidden = F.relu(self.fc1(F.relu(self.conv1d(rows)).flatten(1)))
        return self.fc2(F.dropout(hidden, self.dropout, self.training))


class LinearClassifier(nn.Module):
    """Mean of the normalised tokens that may be attended to, then one linear map: what any encoder can be asked by."""

    def __init__(self, hidden_size: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.linear = nn.Linear(hidden_size, num_classes)
        self.dropout = dropout

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of `tokens` ``(batch, n, hidden)`` where `mask` ``(batch, n)`` is true."""
        kept = mask[..., None].to(tokens.dtype)
        mean = (self.norm(tokens) * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        return self.linear(F.dropout(mean, self.dropout, self.training))


class TokenMeanHead(nn.Module):
    """BEATs' classifier with its published key: one linear map of the mean token (the mean of every token's logits)."""

    def __init__(self, hidden_size: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.predictor = nn.Linear(hidden_size, num_classes)
        self.dropout = dropout

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of `tokens` ``(batch, n, hidden)`` where `mask` ``(batch, n)`` is true."""
        kept = mask[..., None].to(tokens.dtype)
        mean = (F.dropout(tokens, self.dropout, self.training) * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        return self.predictor(mean)


class PANNsHead(nn.Module):
    """The classifier of PANNs with its published keys: the largest and the mean token together, two linear maps."""

    def __init__(self, hidden_size: int, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc_audioset = nn.Linear(hidden_size, num_classes)
        self.dropout = dropout

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of `tokens` ``(batch, n, hidden)`` where `mask` ``(batch, n)`` is true."""
        kept = mask[..., None]
        mean = (tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        most = tokens.masked_fill(~kept, torch.finfo(tokens.dtype).min).amax(dim=1)
        pooled = F.dropout(most + mean, self.dropout, self.training)
        return self.fc_audioset(F.dropout(F.relu(self.fc1(pooled)), self.dropout, self.training))


CLASSIFIERS = ("linear", "urbansound", "token_mean", "panns")
_OWN_CLASSIFIER = {"urbansound_cnn": "urbansound", "beats": "token_mean"}


def build_classifier(config: dict[str, Any], encoder: AudioEncoder, num_classes: int) -> nn.Module:
    """Classifier of ``{"name": one of CLASSIFIERS, "dropout"?: share}`` on an encoder's tokens.

    Without a name it is the encoder's own where the published model has one, else the linear one.
    """
    fields = {"name": _OWN_CLASSIFIER.get(encoder.name, "linear"), **config}
    name, dropout = fields.pop("name"), fields.pop("dropout", None)
    if name not in CLASSIFIERS or fields:
        found = f"'{name}'" if name not in CLASSIFIERS else f"the key '{next(iter(fields))}'"
        raise ConfigError(describe("head", f"a name of {', '.join(CLASSIFIERS)} and 'dropout'", found))
    if dropout is not None and not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ConfigError(describe("head.dropout", "a share in [0, 1)", repr(dropout)))
    options = {} if dropout is None else {"dropout": float(dropout)}
    if name != "urbansound":
        kind = {"token_mean": TokenMeanHead, "panns": PANNsHead}.get(name, LinearClassifier)
        return kind(encoder.hidden_size, num_classes, **options)
    if encoder.grid is None:
        raise ConfigError(describe(f"head '{name}'", "an encoder with a grid of tokens", encoder.name))
    return UrbanSoundHead(encoder.hidden_size, encoder.grid, num_classes, **options)
