"""An OpenAI-compatible server: one request with retries, for models that answer and for models that judge."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from audio_llm.errors import AudioLLMError, ConfigError, describe

RETRIES = 5  # 1 + 2 + 4 + 8 + 16 s: outlives a restarting server, not a dead one
TIMEOUT_SECONDS = 600.0  # a long reply of a large model on CPU takes minutes
KEY_VARIABLE = "OPENAI_API_KEY"
# What says that this one request cannot be served. Other 4xx would meet every request: a wrong key, no credit left, a
# wrong address (402, 404, …); those of AGAIN pass by themselves.
REFUSED, AGAIN = (400, 413, 414, 415, 422), (408, 409, 425, 429)


class EngineError(AudioLLMError):
    """An engine that cannot go on (endpoint gone, model not loadable); finished answers are kept."""


class RefusedRequest(AudioLLMError):
    """The endpoint says that this request cannot be served (HTTP 400, 413, 422, …)."""


class Endpoint:
    """A server's address, with or without ``/v1``. A key is sent where ``OPENAI_API_KEY`` holds one.

    Raises :class:`ConfigError` for what is no address.
    """

    def __init__(self, url: str) -> None:
        if not _is_address(url):
            raise ConfigError(describe("address", "http://HOST:PORT or https://HOST:PORT", f"'{url}'"))
        self.base = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"

    def models(self) -> list[str]:
        """Names of the served models. Raises :class:`EngineError` where nobody answers."""
        reply = self.call("/models", retries=2)
        try:
            return [str(entry["id"]) for entry in reply["data"]]
        except (KeyError, TypeError) as error:
            raise EngineError(describe(f"{self.base}/models", "a list of models", _short(reply))) from error

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion's reply: at least one choice, whose message has a text as its `content` ("" where the
        server sent none), and counts of tokens under `usage`.

        Raises :class:`RefusedRequest` where the server will not serve this request, :class:`EngineError` where it
        serves none or replies with something else.
        """
        reply = self.call("/chat/completions", body)
        try:
            choice = reply["choices"][0]
            choice["message"]["content"] = _text(choice["message"].get("content"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(describe(self.base, "an OpenAI chat completion", _short(reply))) from error
        usage = reply.get("usage")
        counts = usage.items() if isinstance(usage, dict) else ()
        reply["usage"] = {name: count for name, count in counts if isinstance(count, int)}
        return reply

    def call(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> dict[str, Any]:
        """POST `body` (GET without one). What may pass by itself is tried again with growing pauses.

        Raises :class:`RefusedRequest` for what is this request's fault, :class:`EngineError` for everything else.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        reason, cure = "", "Start it again and repeat the command."
        retries = RETRIES if retries is None else retries
        for attempt in range(retries + 1):
            try:
                call = urllib.request.Request(self.base + path, data=data, headers=headers)
                with urllib.request.urlopen(call, timeout=TIMEOUT_SECONDS) as response:
                    said = response.read()
                if (reply := _object(said)) is not None:
                    return reply
                reason = repr(said[:200].decode(errors="replace"))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_body(error)}"
                if error.code in REFUSED and body is not None:
                    raise RefusedRequest(reason) from error
                if 400 <= error.code < 500 and error.code not in AGAIN:
                    cure = f"Mend the address, the model's name or {KEY_VARIABLE}, and repeat the command."
                    break
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < retries:
                time.sleep(2**attempt)
        raise EngineError(describe(f"{self.base}{path}", "a reply in JSON", reason, cure))


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname)
        return named and parts.port != 0 and not any(map(str.isspace, url))
    except ValueError:  # a port that is no number, or beyond 65535
        return False


def _object(said: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _text(content: Any) -> str:
    """A message's words: a text, nothing, or a list of parts. Raises :class:`TypeError` for anything else."""
    if isinstance(content, list):
        return "".join(str(part["text"]) for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(content)
    return content or ""


def _body(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with an HTTP error, as far as it came."""
    try:
        return error.read().decode(errors="replace")[:300]
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _short(reply: Any) -> str:
    return json.dumps(reply)[:200]
