"""An OpenAI-compatible server: one request with retries, for models that answer and for models that judge."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from audio_llm.answering.base import Answer, Engine, Options, Request, decoded, is_address
from audio_llm.audio import Waveform, encode_level, hear
from audio_llm.errors import AudioLLMError, ConfigError, describe, nearest
from audio_llm.files import parse_json
from audio_llm.language import prompts
from audio_llm.serving.health import Proxies, broken_off

RETRIES = 5  # 1 + 2 + 4 + 8 + 16 s: outlives a restarting server, not a dead one
MAX_REPLY_BYTES = 2**26
TIMEOUT_SECONDS = 600.0  # a long reply of a large model on CPU takes minutes
KEY_VARIABLE = "OPENAI_API_KEY"
# What says that this one request cannot be served. Other 4xx would meet every request: a wrong key, no credit left, a
# wrong address (402, 404, …); those of AGAIN pass by themselves.
REFUSED, AGAIN = (400, 413, 414, 415, 422), (408, 409, 425, 429)


class EngineError(AudioLLMError):
    """An engine that cannot go on (endpoint gone, model not loadable); finished answers are kept."""


class ClosedEndpoint(EngineError):
    """The endpoint is there and serves no request as it is asked (HTTP 401, 402, 403, 404, …)."""


class RefusedRequest(AudioLLMError):
    """The endpoint says that this request cannot be served (HTTP 400, 413, 422, …)."""


class Endpoint:
    """A server's address, with or without ``/v1``. A key is sent where ``OPENAI_API_KEY`` holds one.

    Raises :class:`ConfigError` for what is no address.
    """

    def __init__(self, url: str) -> None:
        if not _names_host(url):
            raise ConfigError(describe("address", "http://HOST:PORT or https://HOST:PORT", f"'{url}'"))
        self.base = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"

    def models(self) -> list[str]:
        """Names of the served models. Raises :class:`EngineError` where nobody answers."""
        reply = self.call("/models", retries=2)
        try:
            return [str(entry["id"]) for entry in reply["data"]]
        except (KeyError, TypeError) as error:
            raise EngineError(describe(f"{self.base}/models", "a list of models", _short(reply))) from error

    def find(self, wanted: str = "", kind: str = "model") -> str:
        """The server's own name of the model, or adapter (`kind`), that is `wanted`; the first one's for "".

        The name of its owner may be there or not. A server has its own name for a checkpoint folder. Raises
        :class:`EngineError` for a name that it does not know: that would be another model.
        """
        served = self.models()
        if not served and not wanted:
            raise EngineError(describe(f"{self.base}/models", "a served model", "none"))
        if not served or wanted in served:
            return wanted
        if not wanted or (kind == "model" and Path(wanted).is_dir()):
            return served[0]
        alike = [name for name in served if Path(name).name == Path(wanted).name]
        if len(alike) != 1:
            found, cure = f"'{wanted}'{nearest(wanted, served)}", f"Give the server's own name as {kind.upper()}."
            raise EngineError(describe(f"{self.base}: {kind}", f"one of {', '.join(served)}", found, cure))
        return alike[0]

    def complete(self, body: dict[str, Any], retries: int | None = None) -> dict[str, Any]:
        """A chat completion's reply: at least one choice, whose message has a text as its `content` (its `refusal`, or
        "", where the server sent none), and counts of tokens under `usage`. `retries` as of :meth:`call`.

        Raises :class:`RefusedRequest` where the server will not serve this request, or its filter withholds the reply,
        :class:`EngineError` where it serves none or replies with something else.
        """
        reply = self.call("/chat/completions", body, retries)
        try:
            choice = reply["choices"][0]
            said = _text(choice["message"].get("content")) or _text(choice["message"].get("refusal"))
            choice["message"]["content"] = said
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(describe(self.base, "an OpenAI chat completion", _short(reply))) from error
        if choice.get("finish_reason") == "content_filter":  # these are not the model's words, or not all of them
            raise RefusedRequest("the reply was withheld (content_filter)")
        usage = reply.get("usage")
        counts = usage.items() if isinstance(usage, dict) else ()
        reply["usage"] = {name: count for name, count in counts if type(count) is int and 0 <= count < 2**63}
        return reply

    def call(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> dict[str, Any]:
        """POST `body` (GET without one). What may pass by itself is tried again with growing pauses, also a reply that
        a server broke off as it was stopped: read as an answer it would be an empty one.

        Raises :class:`RefusedRequest` for what is this request's fault, :class:`EngineError` for everything else:
        :class:`ClosedEndpoint` for what every other request would meet as well.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := sent_key():
            headers["Authorization"] = f"Bearer {key}"
        reason, cure, kind = "", "Start it again (audio-llm serve MODEL) and repeat the command.", EngineError
        retries = RETRIES if retries is None else retries
        for attempt in range(retries + 1):
            try:
                call = urllib.request.Request(self.base + path, data=data, headers=headers)
                with _OPENER.open(call, timeout=TIMEOUT_SECONDS) as response:
                    said = _read(response)
                reply = _object(said)
                if reply is not None and not (broken := broken_off(reply)) and not reply.get("error"):
                    return reply
                if reply is None:
                    reason = repr(said[:200].decode(errors="replace"))
                else:  # some gateways send status 200 with an error, also beside a reply
                    reason = f"one broken off ({broken})" if broken else f"an error: {_message(reply)}"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_body(error)}"
                if error.code in REFUSED and body is not None:
                    raise RefusedRequest(reason) from error
                if error.code < 500 and error.code not in AGAIN:
                    cure = f"Mend the address, the model's name or {KEY_VARIABLE}, and repeat the command."
                    kind = ClosedEndpoint
                    break
            except _Endless as error:
                limit = f"a reply of at most {MAX_REPLY_BYTES} bytes within {TIMEOUT_SECONDS:g} s"
                raise EngineError(describe(f"{self.base}{path}", limit, "one that goes on")) from error
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < retries:
                time.sleep(2**attempt)
        raise kind(describe(f"{self.base}{path}", "a reply in JSON", reason, cure))


def sent_key() -> str:
    """The key of the environment, as the head of a request can hold it; "" without one. Raises :class:`ConfigError`."""
    key = os.environ.get(KEY_VARIABLE, "").strip()  # a file that it is read from may end with a line break
    if not key.isascii() or not (key or "x").isprintable() or " " in key:
        raise ConfigError(describe(f"environment variable {KEY_VARIABLE}", "printable ASCII, no spaces", "other text"))
    return key


def audio_part(sound: Waveform | Path) -> dict[str, Any]:
    """`sound` in a chat message: a file's bytes as they are, a waveform as a WAV file with all of its channels."""
    if isinstance(sound, Path):
        data, kind = sound.read_bytes(), sound.suffix.removeprefix(".").lower() or "wav"
    else:
        data, kind = encode_level(sound), "wav"
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode("ascii"), "format": kind}}


class HttpEngine(Engine):
    """A model behind an OpenAI-compatible server (``audio-llm serve``, vLLM, …), asked several questions at a time.

    It is sent every sound as it is, but for what `hearing` names, and refuses what its model cannot take."""

    name = "http"
    constrains = True

    @classmethod
    def recognises(cls, where: str) -> bool:
        return is_address(where)

    def __init__(self, options: Options) -> None:
        self._endpoint = Endpoint(options.address)
        self.name = self._endpoint.base
        adapter = options.adapter
        self.model = self._endpoint.find(options.model) if adapter is None else self._endpoint.find(adapter, "adapter")
        self._concurrency, self._hearing = options.batch_size or 16, options.hearing

    def prepare(self, sound: Waveform | Path, name: str) -> Waveform | Path:
        return sound if self._hearing == "refuse" else hear(decoded(sound, name), None, self._hearing, name=name)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        pending: deque[Future[Answer]] = deque()
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for request in requests:
                    pending.append(pool.submit(self._ask, request))
                    if len(pending) >= 2 * self._concurrency:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _ask(self, request: Request) -> Answer:
        messages = request.messages()
        digest = prompts.prompt_hash(json.dumps(messages, ensure_ascii=False) + request.opening)
        sounds = map(audio_part, request.audios)
        user = messages[-1]
        user["content"] = [next(sounds) if part["type"] == "audio" else part for part in user["content"]]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        if request.constrain:
            body["structured_outputs"] = {"grammar": request.grammar}
        if request.opening:
            messages.append({"role": "assistant", "content": request.opening})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        started = time.monotonic()
        try:
            reply = self._endpoint.complete(body)
        except RefusedRequest as error:
            return Answer(error=str(error), prompt_hash=digest)
        choice, usage = reply["choices"][0], reply["usage"]
        return Answer(
            raw=request.opening + choice["message"]["content"],
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            prompt_hash=digest,
            seconds=round(time.monotonic() - started, 4),
        )


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key, and the sounds, to another host: it is an answer like any other error."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Endless(TimeoutError):
    """A reply that has begun and does not end: the next one would not either."""


class _Timed(io.RawIOBase):
    """What comes out of a socket until ``TIMEOUT_SECONDS`` are over. The limit of the socket itself begins anew with
    every byte, so that a reply which drips would hold its reader for days."""

    def __init__(self, sock: socket.socket, stream: io.RawIOBase) -> None:
        self._socket, self._stream = sock, stream
        self._end, self._begun = time.monotonic() + TIMEOUT_SECONDS, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(max(self._end - time.monotonic(), 1e-3))
        try:
            count = self._stream.readinto(buffer)
        except TimeoutError as error:
            raise (_Endless() if self._begun else error) from None
        self._begun = True
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    """One whose head and body come in time, or not at all."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_Timed(sock, self.fp.detach()))


class _Connection(http.client.HTTPConnection):
    response_class = _Reply


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Reply


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request)


_OPENER = urllib.request.build_opener(Proxies, _Stay, _Http, _Https)


def _read(response: Any) -> bytes:
    """The whole reply. Raises :class:`_Endless` for one that does not end."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(2**20):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise _Endless
    if response.length:  # `read1` says nothing of a reply that ends too early
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _names_host(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname)
        return named and parts.port != 0 and not any(map(str.isspace, url))
    except ValueError:  # a port that is no number, or beyond 65535
        return False


def _object(said: bytes) -> dict[str, Any] | None:
    try:
        tree = parse_json(said)
    except ValueError:
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
    """What the server says went wrong; the beginning of its reply, as far as it came, where that is not its JSON."""
    try:
        text = error.read(2**16).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    return _message(_object(text.encode())) or text[:300]


def _message(reply: Any) -> str:
    """What an error in OpenAI's form says; "" for what is none."""
    error = reply.get("error") if isinstance(reply, dict) else None
    return str(error.get("message") or _short(error)) if isinstance(error, dict) else str(error or "")


def _short(reply: Any) -> str:
    return json.dumps(reply)[:200]
