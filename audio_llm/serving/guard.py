"""What the server refuses before vLLM sees it, because vLLM would accept it and answer wrongly.

An ASGI middleware (``vllm serve --middleware``). It checks adapters that are loaded at run time, and prompts of the
plain completions endpoint, which can carry a placeholder but no audio.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from audio_llm.errors import AudioLLMError, describe
from audio_llm.language.prompts import AUDIO_TOKEN
from audio_llm.model.validate import check_adapter

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """Answers HTTP 400 with a reason, or hands the request on untouched."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.facts: dict[str, Any] = json.loads(os.environ["AUDIO_LLM_SERVER"])
        self.checks = {"/v1/load_lora_adapter": self.check_load, "/v1/completions": self.check_completion}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._announcing(send))
            return
        check = (
            self.checks.get(scope.get("path", "")) if scope["type"] == "http" and scope["method"] == "POST" else None
        )
        if check is None:
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        problem = await asyncio.to_thread(_problem, check, body)
        if problem is None:
            await self.app(scope, _replay(body, receive), send)
        else:
            await _refuse(send, problem)

    def check_load(self, request: dict[str, Any]) -> None:
        """An adapter that would be mis-scaled or partly ignored, of another base, or answering from stale caches."""
        if not self.facts["adapters"]:
            cure = "Start the server with --allow-adapter-updates."
            raise AudioLLMError(describe("adapter", "a server that loads adapters while it runs", "another", cure))
        if request.get("load_inplace"):
            raise AudioLLMError(
                "load_inplace: prompts that were answered with the old weights would be answered from its cache. "
                "Load the new adapter under a new name, then unload the old one."
            )
        folder = request.get("lora_path")
        if isinstance(folder, str) and folder:
            check_adapter(folder, self.facts["checkpoint"], self.facts["max_lora_rank"])

    def check_completion(self, request: dict[str, Any]) -> None:
        """A prompt with audio placeholders at an endpoint that has no audio."""
        prompts = request.get("prompt")
        token = self.facts["audio_token_id"]
        stack = [prompts]
        while stack:
            prompt = stack.pop()
            if (isinstance(prompt, str) and AUDIO_TOKEN in prompt) or (isinstance(prompt, list) and token in prompt):
                raise AudioLLMError(
                    f"prompt: {AUDIO_TOKEN} stands for audio, and this endpoint has none. Use /v1/chat/completions "
                    "with input_audio or audio_url parts."
                )
            if isinstance(prompt, list):
                stack += [entry for entry in prompt if isinstance(entry, (str, list))]

    def _announcing(self, send: Send) -> Send:
        async def announce(message: dict[str, Any]) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                print(
                    f"audio-llm serve: '{self.facts['name']}' listens at {self.facts['address']}",
                    file=sys.stderr,
                    flush=True,
                )

        return announce


def _problem(check: Callable[[dict[str, Any]], None], body: bytes) -> str | None:
    try:
        request = json.loads(body)
    except ValueError:
        return None  # vLLM's own answer to malformed JSON says where it is malformed
    if not isinstance(request, dict):
        return None
    try:
        check(request)
    except AudioLLMError as error:
        return str(error)
    return None


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` again from the start: the body once, then whatever comes (the client's disconnection)."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> dict[str, Any]:
        return next(messages, None) or await receive()

    return again


async def _refuse(send: Send, reason: str) -> None:
    content = {"error": {"message": reason, "type": "BadRequestError", "param": None, "code": 400}}
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
