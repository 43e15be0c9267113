"""How vLLM's server fetches audio: every channel is kept, and what cannot be read is the client's error (HTTP 4xx).

vLLM's own connector averages all channels, so the server runs with ``VLLM_MEDIA_CONNECTOR=audio_llm``. Files are
decoded by :func:`audio_llm.audio.decode`, the function that training reads its shards with.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import requests
from vllm import envs
from vllm.exceptions import VLLMClientError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, AudioMediaIO, MediaConnector

from audio_llm import audio
from audio_llm.errors import AudioLLMError

CONNECTOR = "audio_llm"


class MultiChannelAudioIO(AudioMediaIO):
    """Encoded bytes or a file → ``(samples (channels, time) float32, sample rate in Hz)``.

    A server's ``--hearing``, and a request's ``media_io_kwargs: {"audio": {"hearing": …}}``, convert its channels.
    """

    def load_bytes(self, data: bytes) -> tuple[np.ndarray, float]:
        self._validate_encoded_size(len(data))
        return self._decode(data, "audio")

    def load_file(self, filepath: Path) -> tuple[np.ndarray, float]:
        if not filepath.is_file():
            raise VLLMValidationError(f"audio file '{filepath.name}' does not exist on the server", parameter="audio")
        try:
            self._validate_encoded_size(filepath.stat().st_size)
            data = filepath.read_bytes()
        except OSError as error:
            reason = f"audio file '{filepath.name}' cannot be read ({error.strerror})"
            raise VLLMValidationError(reason, parameter="audio") from error
        return self._decode(data, f"audio file '{filepath.name}'")

    def _decode(self, data: bytes, name: str) -> tuple[np.ndarray, float]:
        try:
            waveform = audio.decode(
                data,
                name=name,
                max_seconds=float(envs.VLLM_MAX_AUDIO_DECODE_DURATION_S),
                max_bytes=float(envs.VLLM_MAX_AUDIO_DECODE_BYTES),
            )
            waveform = audio.hear(waveform, None, str(self.kwargs.get("hearing", "refuse")), name=name)
        except AudioLLMError as error:
            raise VLLMValidationError(str(error), parameter="audio") from error
        return waveform.samples, float(waveform.sample_rate)


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class MultiChannelMediaConnector(MediaConnector):
    """``input_audio`` (base64) and ``audio_url`` (``data:``, ``file:``, ``http(s):``) with all channels."""

    def fetch_audio(self, audio_url: str) -> Any:
        try:
            return self.load_from_url(audio_url, self._audio_io(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT)
        except Exception as error:
            raise _client_error(audio_url, error) from error

    async def fetch_audio_async(self, audio_url: str) -> Any:
        try:
            return await self.load_from_url_async(
                audio_url, self._audio_io(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT
            )
        except Exception as error:
            raise _client_error(audio_url, error) from error

    def _audio_io(self) -> MultiChannelAudioIO:
        return MultiChannelAudioIO(**self.media_io_kwargs.get("audio", {}))


def _client_error(url: str, error: Exception) -> Exception:
    """What the client is told: 422 for an address that gives nothing, 400 for the rest; never a 500 for either."""
    shown = url if len(url) <= 120 and not url.startswith("data:") else url[:40] + "…"
    if isinstance(error, VLLMUnprocessableEntityError) or _is_fetch_error(error):
        return VLLMUnprocessableEntityError(f"cannot fetch {shown}: {_fetch_reason(error)}", parameter="audio_url")
    if isinstance(error, VLLMClientError):
        return error
    if isinstance(error, (ValueError, RuntimeError, NotImplementedError, OSError)):
        return VLLMValidationError(f"cannot use {shown}: {error}", parameter="audio_url")
    return error


def _is_fetch_error(error: Exception) -> bool:
    if isinstance(error, requests.exceptions.RequestException):
        return True
    return isinstance(error, (aiohttp.ClientError, asyncio.TimeoutError, TimeoutError, ConnectionError))


def _fetch_reason(error: Exception) -> str:
    root = error.__cause__ if isinstance(error, VLLMUnprocessableEntityError) and error.__cause__ else error
    if isinstance(root, aiohttp.ClientResponseError):
        return f"the address answered HTTP {root.status}"
    if isinstance(root, requests.exceptions.HTTPError) and root.response is not None:
        return f"the address answered HTTP {root.response.status_code}"
    if isinstance(root, (asyncio.TimeoutError, TimeoutError, requests.exceptions.Timeout)):
        return "the address did not answer in time"
    return f"no connection ({str(root) or type(root).__name__})"
