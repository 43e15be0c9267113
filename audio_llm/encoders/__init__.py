"""Audio encoders: one file per published encoder; `base` has the contract and the registry."""

from audio_llm.encoders.base import ENCODERS, AudioEncoder, build_encoder, encoder_config

__all__ = ["ENCODERS", "AudioEncoder", "build_encoder", "encoder_config"]
