"""What the launcher tells the server's guard, without vLLM."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from audio_llm.serving.guard import Guard
from audio_llm.serving.launcher import SERVER, ServeOptions, guard_facts


@pytest.mark.parametrize("allowed", [False, True])
def test_adapters_at_run_time_want_the_switch_first(allowed: bool, tmp_path: Path, monkeypatch) -> None:
    options = ServeOptions(tmp_path, allow_adapter_updates=allowed)
    monkeypatch.setenv(SERVER, json.dumps(guard_facts(options, {}, {"audio_token_id": 3}, [])))
    replies: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the request must not reach vLLM")

    async def receive() -> dict[str, Any]:
        body = {"lora_name": "a", "lora_path": str(tmp_path / "none")}
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: dict[str, Any]) -> None:
        replies.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/load_lora_adapter", "headers": []}
    asyncio.run(Guard(app)(scope, receive, send))
    assert replies[0]["status"] == 400
    assert (b"Start the server with --allow-adapter-updates" in replies[1]["body"]) is not allowed
