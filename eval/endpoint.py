"""An OpenAI-compatible server: one request with retries, for models that answer and for models that judge."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from audio_llm.errors import AudioLLMError, describe

RETRIES = 5  # 1 + 2 + 4 + 8 + 16 s: outlives a restarting server, not a dead one
TIMEOUT_SECONDS = 600.0  # a long reply of a large model on CPU takes minutes
KEY_VARIABLE = "OPENAI_API_KEY"


class EngineError(AudioLLMError):
    """An engine that cannot go on (endpoint gone, model not loadable); finished answers are kept."""


class RefusedRequest(AudioLLMError):
    """The endpoint says that this request cannot be served (HTTP 4xx)."""


class Endpoint:
    """A server's address, with or without ``/v1``. A key is sent where ``OPENAI_API_KEY`` holds one."""

    def __init__(self, url: str) -> None:
        self.base = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"

    def models(self) -> list[str]:
        """Names of the served models. Raises :class:`EngineError` where nobody answers."""
        try:
            return [str(entry["id"]) for entry in self.call("/models", retries=2).get("data", [])]
        except (KeyError, TypeError) as error:
            raise EngineError(describe(f"{self.base}/models", "a list of models", repr(error))) from error

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion's reply, with at least one choice. Raises :class:`RefusedRequest` for HTTP 4xx."""
        reply = self.call("/chat/completions", body)
        try:
            reply["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(describe(self.base, "an OpenAI chat completion", f"no {error} in the reply")) from error
        return reply

    def call(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> dict[str, Any]:
        """POST `body` (GET without one). 4xx is the request's fault; everything else is tried again, then fatal."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        reason, retries = "", RETRIES if retries is None else retries
        for attempt in range(retries + 1):
            try:
                call = urllib.request.Request(self.base + path, data=data, headers=headers)
                with urllib.request.urlopen(call, timeout=TIMEOUT_SECONDS) as response:
                    return dict(json.loads(response.read()))
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")[:300]
                if 400 <= error.code < 500 and error.code not in (404, 408, 429) and body is not None:
                    raise RefusedRequest(f"HTTP {error.code}: {text}") from error
                reason = f"HTTP {error.code}: {text}"
                if error.code in (401, 403, 404):
                    break
            except (OSError, ValueError, TypeError) as error:  # URLError is an OSError
                reason = str(getattr(error, "reason", error))
            if attempt < retries:
                time.sleep(2**attempt)
        raise EngineError(describe(f"{self.base}{path}", "a reply", reason, "Start it again and repeat the command."))
