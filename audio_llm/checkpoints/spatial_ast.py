"""The published Spatial-AST checkpoint (``finetuned.pth``): strict loading, one way.

Its outer layout is ``{"model", "optimizer", "epoch", "scaler", "args"}``. The file also stores the STFT kernels and the
mel matrix of its front end; they are compared with ours and then left out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_llm import config as recipes
from audio_llm import features
from audio_llm.checkpoints.encoder import load_strictly
from audio_llm.checkpoints.published import Published, length, read_published, state_dict_of
from audio_llm.encoders.spatial_ast import SpatialAST, SpatialASTConfig
from audio_llm.encoders.spectral import SpectralConfig
from audio_llm.errors import CheckpointError, describe
from audio_llm.heads import SpatialHeads

_KERNELS = ("spectrogram_extractor.conv_real.weight", "spectrogram_extractor.conv_imag.weight")
_MEL = "logmel_extractor.melW"
# The reference's inference encoder carries the sound head but none of the spatial ones.
_SPATIAL = ("dis_norm.", "distance_head.", "doa_norm.", "azimuth_head.", "elevation_head.")
_HEADS = ("head.", "fc_norm.", *_SPATIAL)
_FRONT_END_TOLERANCE = 1e-5  # float32 rounding of window times cosine


def load_published(path: str | Path, /, **fields: Any) -> Published:
    """Encoder and heads (no heads where the file has no spatial ones); `fields` replace those of its configuration.

    Raises :class:`CheckpointError` naming every key that is missing, unexpected or of another shape, and when the
    file's own STFT or mel matrix is not that of `config` (by default the published configuration).
    """
    state = state_dict_of(read_published(path), kind="spatial_ast", name=path)
    config = recipes.build(SpatialASTConfig, fields, where="encoder spatial_ast")
    check_front_end(state, config, str(path))
    heads = {key: value for key, value in state.items() if key.startswith(_HEADS)}
    legacy = {*_KERNELS, _MEL}
    encoder = SpatialAST(config)
    rest = {key: value for key, value in state.items() if key not in heads and key not in legacy}
    load_strictly(encoder, rest, str(path))
    if not any(key.startswith(_SPATIAL) for key in heads):
        return Published(encoder.eval())
    sound = heads.get("head.weight")
    count = 1 if sound is None else length(sound)
    spatial = SpatialHeads(config.hidden_size, count)
    load_strictly(spatial, heads, str(path))
    facts = {"labels": [f"class {number}" for number in range(count)]}  # the file does not name them
    return Published(encoder.eval(), {"spatial": spatial.eval()}, facts)


def check_front_end(state: dict[str, Tensor], config: SpatialASTConfig | SpectralConfig, name: str) -> None:
    """:class:`CheckpointError` when the STFT kernels or mel matrix in the file are not those of `config`."""
    bins = config.n_fft // 2 + 1
    angle = 2 * math.pi * torch.outer(torch.arange(bins), torch.arange(config.n_fft)).double() / config.n_fft
    window = features.hann(config.n_fft)
    bank = features.mel_bank(config.sample_rate, config.n_fft, config.n_mels, config.fmin, config.fmax)
    expected = {
        _KERNELS[0]: (angle.cos() * window).float()[:, None],
        _KERNELS[1]: (-angle.sin() * window).float()[:, None],
        _MEL: bank,
    }
    for key, value in expected.items():
        if key not in state:
            continue
        found = state[key]
        if found.shape != value.shape or not torch.allclose(found, value, rtol=0, atol=_FRONT_END_TOLERANCE):
            difference = f"up to {float((found - value).abs().max()):.2g}" if found.shape == value.shape else "shape"
            setting = f"{config.sample_rate} Hz, n_fft {config.n_fft}, {config.n_mels} mels"
            cure = "Give the configuration the file was trained with."
            raise CheckpointError(
                describe(f"checkpoint {name}: {key}", f"the front end of {setting}", f"another ({difference})", cure)
            )
