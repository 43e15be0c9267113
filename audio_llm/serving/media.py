"""How vLLM's server fetches audio: every channel is kept, and what cannot be read is the client's error (HTTP 4xx).

vLLM's own connector averages all channels, so the server runs with ``VLLM_MEDIA_CONNECTOR=audio_llm``. Files are
decoded by :func:`audio_llm.audio.decode`, the function that training reads its shards with. Addresses are those of
:mod:`audio_llm.serving.fetching`; what is there and what is not, clients are not told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from vllm import envs
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, AudioMediaIO, MediaConnector

from audio_llm import audio
from audio_llm.errors import AudioLLMError, one_line
from audio_llm.serving.fetching import FetchError, HostNotAllowed, fetch

CONNECTOR = "audio_llm"
logger = logging.getLogger("vllm.audio_llm")  # vLLM's handlers write it


class NoSuchFile(Exception):
    """A file that is not there, or may not be read by clients, or is none."""


class MultiChannelAudioIO(AudioMediaIO):
    """Encoded bytes or a file → ``(samples (channels, time) float32, sample rate in Hz)``.

    A server's ``--hearing`` converts its channels; with vLLM's ``--trust-request-mm-kwargs`` so does a request's
    ``media_io_kwargs: {"audio": {"hearing": …}}``.
    """

    def load_bytes(self, data: bytes) -> tuple[np.ndarray, float]:
        self._validate_encoded_size(len(data))
        return self._decode(data, "audio")

    def load_file(self, filepath: Path) -> tuple[np.ndarray, float]:
        try:
            descriptor = os.open(filepath, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # a pipe would wait for ever
            with open(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise NoSuchFile
                self._validate_encoded_size(os.fstat(descriptor).st_size)
                data = stream.read()
        except OSError as error:
            raise NoSuchFile from error
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
        return asyncio.run(self.fetch_audio_async(audio_url))

    async def fetch_audio_async(self, audio_url: str) -> Any:
        """``(samples (channels, time), rate)``; 422 for an address that gives nothing, 400 for the rest."""
        scheme = audio_url[:12].partition(":")[0].lower()
        load = {"data": self._data, "file": self._file, "http": self._fetched, "https": self._fetched}.get(scheme)
        if load is None:
            raise _refused("expected an address that begins with data:, file:, http: or https:")
        try:
            return await load(audio_url, MultiChannelAudioIO(**self.media_io_kwargs.get("audio", {})))
        except VLLMValidationError:
            raise
        except NoSuchFile as error:
            raise _refused("no such file under the folder that this server may read") from error
        except HostNotAllowed as error:
            raise _refused(
                "this server fetches nothing from that host (audio-llm serve --allow-hosts). "
                "Send the sound itself: input_audio, or a data: address."
            ) from error
        except FetchError as error:
            logger.warning("cannot fetch %s: %s", one_line(audio_url[:200]), one_line(str(error)))
            reason = "the sound cannot be fetched from its address"
            raise VLLMUnprocessableEntityError(reason, parameter="audio_url") from error
        except (ValueError, NotImplementedError) as error:  # base64, and the form of data: addresses
            reason = (
                f"expected data in base64, without blanks or line breaks, found others ({one_line(str(error))[:200]})"
            )
            raise _refused(reason) from error

    async def _data(self, url: str, loader: MultiChannelAudioIO) -> Any:
        return await asyncio.to_thread(self._load_data_url, url, loader)

    async def _fetched(self, url: str, loader: MultiChannelAudioIO) -> Any:
        most, seconds = envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB * 2**20, float(envs.VLLM_AUDIO_FETCH_TIMEOUT)
        data = await fetch(url, self.allowed_media_domains, most, seconds)
        return await asyncio.to_thread(loader.load_bytes, data)

    async def _file(self, url: str, loader: MultiChannelAudioIO) -> Any:
        return await asyncio.to_thread(lambda: loader.load_file(self._allowed(url)))

    def _allowed(self, url: str) -> Path:
        """The file of a ``file:`` address, its links followed, where it lies under ``--allow-files``."""
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path)).resolve()
        except (ValueError, OSError, RuntimeError) as error:
            raise NoSuchFile from error
        root = self.allowed_local_media_path
        if root is None or parts.netloc not in ("", "localhost") or root not in path.parents:
            raise NoSuchFile
        return path


def _refused(reason: str) -> VLLMValidationError:
    return VLLMValidationError(reason, parameter="audio_url")
