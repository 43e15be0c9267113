"""What stands between the network and vLLM: who may ask, where, how much, and whether what is asked means anything.

An ASGI middleware (``vllm serve --middleware``), the outermost one. In this order: the key, the origin of a web page,
the path, how many are being answered, the size of the body, its JSON. Without the key nothing of a request is read but
its head, and no file is opened. Paths are those of :data:`READS`, :data:`CHECKS` and :data:`ADAPTERS`: vLLM has more,
which generate, score or scale without asking for its key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from audio_llm.errors import AudioLLMError, one_line
from audio_llm.files import parse_json
from audio_llm.serving.checks import check_chat, check_completion, check_load, check_unload

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Check = Callable[[dict[str, Any], dict[str, Any]], None]

READS = frozenset({"/health", "/ping", "/version", "/metrics", "/v1/models"})
CHECKS: dict[str, Check] = {"/v1/chat/completions": check_chat, "/v1/completions": check_completion}
ADAPTERS: dict[str, Check] = {"/v1/load_lora_adapter": check_load, "/v1/unload_lora_adapter": check_unload}
TOKEN, TOKEN_FILE = "AUDIO_LLM_ROLLOUT_TOKEN", "AUDIO_LLM_ROLLOUT_TOKEN_FILE"
BODY_SECONDS = 120.0  # for the whole body to arrive
CHECK_SECONDS = 60.0  # for what it says to be checked
RETRY_SECONDS = b"2"  # a few replies of a small model take as long
HELD_BODIES = 8  # bodies of full size in memory at the same time; further ones wait before they are read


class Refused(Exception):
    """A request that goes no further: HTTP status, reason, and what else the head of the reply says."""

    def __init__(self, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


STUCK = b'"Internal server error"'  # the whole message of vLLM's GenerationError
NO_WORD = Refused(
    400,
    "constraint: expected one that a reply can keep to its end, found one that leaves no next word "
    "(a rule or $ref that names only itself, allowed_token_ids without its words)",
)
NO_KEY = Refused(401, "a key is wanted: Authorization: Bearer KEY", (b"www-authenticate", b"Bearer"))


class Guard:
    """Answers with a reason, or hands the request on as it came."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.facts: dict[str, Any] = json.loads(os.environ["AUDIO_LLM_SERVER"])
        self.keys = [bytes.fromhex(digest) for digest in self.facts["keys"]]
        self.origins = set(self.facts["origins"])
        self.limit: int = self.facts["max_body_bytes"]
        self.checks = CHECKS | ADAPTERS
        self.slow = ThreadPoolExecutor(2)
        self.room = Room(HELD_BODIES * self.limit)
        self.most: int = self.facts["max_requests"]
        self.answering = 0  # requests that are read, checked or answered now

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._announcing(send))
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            check = self._admit(scope)
            if check is None:
                await self.app(scope, receive, send)
                return
            with self._turn():
                async with self.room.for_body(self._length(scope)):
                    body = await self._read(receive)
                    request = await self._checked(check, body)
                    constrained = any(request.get(key) for key in ("structured_outputs", "response_format", "tools"))
                    await self.app(scope, _replay(body, receive), _blaming(send) if constrained else send)
        except Refused as error:
            await _refuse(send, error)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One of the requests that are answered at once; beyond them it is said when to come again, before a queue
        grows in which everybody waits longer than clients do."""
        if self.answering >= self.most:
            text = f"busy: {self.most} requests are being answered (audio-llm serve --max-requests)"
            raise Refused(429, text, (b"retry-after", RETRY_SECONDS))
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1

    def _admit(self, scope: dict[str, Any]) -> Check | None:
        """The check of the request's body, None for one without; :class:`Refused` by its head alone."""
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        foreign = [origin for origin in origins if origin not in self.origins]
        path, method = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"]
        if method == "OPTIONS" and origins and not foreign:  # a browser asks first, without the key
            return None
        if self.keys and not _has_key(scope, self.keys):
            raise NO_KEY
        if foreign:
            raise Refused(403, "web pages may not ask this server (audio-llm serve --allow-origin)")
        if path not in READS and path not in self.checks:
            raise Refused(404, f"no such path here; there are {', '.join(sorted(READS | self.checks.keys()))}")
        if method not in (("GET", "HEAD") if path in READS else ("POST",)):
            raise Refused(405, f"{path}: expected {'GET' if path in READS else 'POST'}, found {method}")
        return self.checks.get(path)

    def _length(self, scope: dict[str, Any]) -> int:
        """Bytes of the body, the most there may be where the request does not say."""
        said = [value for name, value in scope["headers"] if name == b"content-length"]
        length = int(said[0]) if said and said[0].isdigit() and len(said[0]) < 20 else self.limit
        if length > self.limit:
            raise self._too_large()
        return length

    def _too_large(self) -> Refused:
        return Refused(413, f"body: expected at most {self.limit} bytes (audio-llm serve --max-body-mb), found more")

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the body ends too early")
                    body += message.get("body", b"")
                    if len(body) > self.limit:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise Refused(408, f"body: expected within {BODY_SECONDS:g} s") from error

    async def _checked(self, check: Check, body: bytes) -> dict[str, Any]:
        """Adapters lie on disks that may not answer: they are looked at by threads of their own, within a time."""
        pool = self.slow if check is check_load else None
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(pool, self._check, check, body)
        except TimeoutError as error:
            raise Refused(400, f"expected to be looked at within {CHECK_SECONDS:g} s") from error

    def _check(self, check: Check, body: bytes) -> dict[str, Any]:
        try:
            request = parse_json(body)
        except ValueError as error:
            raise Refused(400, f"body: expected JSON, found other text ({error})") from error
        if not isinstance(request, dict):
            raise Refused(400, f"body: expected a JSON object, found {type(request).__name__}")
        try:
            check(request, self.facts)
        except AudioLLMError as error:
            raise Refused(400, str(error)) from error
        return request

    def _announcing(self, send: Send) -> Send:
        async def announce(message: dict[str, Any]) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                text = f"audio-llm serve: '{self.facts['name']}' listens at {self.facts['address']}"
                print(one_line(text), file=sys.stderr, flush=True)

        return announce


class RolloutGuard:
    """Of a rollout server, whose every path belongs to the trainer: it could load other weights into the policy."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        token = os.environ.get(TOKEN) or Path(os.environ[TOKEN_FILE]).read_text(encoding="ascii").strip()
        self.keys = [hashlib.sha256(token.encode()).digest()]

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _has_key(scope, self.keys)):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send, NO_KEY)
        else:
            await send({"type": "websocket.close", "code": 1008})


def _has_key(scope: dict[str, Any], keys: list[bytes]) -> bool:
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = (sent[0] if len(sent) == 1 else b"").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    known = [hmac.compare_digest(digest, each) for each in keys]  # all of them, however soon one fits
    return scheme.lower() == b"bearer" and any(known)


class Room:
    """Memory for bodies: each takes what it may need before it is read, so that many large ones wait for each other."""

    def __init__(self, size: int) -> None:
        self.free, self.changed = size, asyncio.Condition()

    @asynccontextmanager
    async def for_body(self, size: int) -> AsyncIterator[None]:
        async with self.changed:
            await self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            async with self.changed:
                self.free += size
                self.changed.notify_all()


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` again from the start: the body once, then whatever comes (the client's disconnection)."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> dict[str, Any]:
        return next(messages, None) or await receive()

    return again


def _blaming(send: Send) -> Send:
    """`send` of a constrained request: that no word can follow which the constraint allows is the request's error.

    vLLM ends such a reply as an internal error of its own, in a stream as an event.
    """
    failed: list[dict[str, Any]] = []  # the head of an error and its body, until that is whole

    async def blame(message: dict[str, Any]) -> None:
        body = message.get("body", b"")
        if failed or (message["type"] == "http.response.start" and message["status"] == 500):
            failed.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                if STUCK in b"".join(part.get("body", b"") for part in failed):
                    await _refuse(send, NO_WORD)
                else:
                    for part in failed:
                        await send(part)
        elif body.startswith(b"data: ") and STUCK in body and b'"choices"' not in body:
            await send(message | {"body": b"data: " + _error_body(NO_WORD) + b"\n\n"})
        else:
            await send(message)

    return blame


def _error_body(error: Refused) -> bytes:
    kind = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}.get(
        error.status, "BadRequestError"
    )
    return json.dumps({"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}).encode()


async def _refuse(send: Send, error: Refused) -> None:
    body = _error_body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *error.headers]
    if error.status in (401, 403, 404, 405, 408, 413, 429):  # what the client still sends is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
