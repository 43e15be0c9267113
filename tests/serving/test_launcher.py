"""What the launcher tells the server's guard, without vLLM; and whether both of vLLM's model runners take it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from audio_llm.serving.guard import Guard
from audio_llm.serving.launcher import SERVER, ServeOptions, guard_facts, server_arguments


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


@pytest.mark.vllm
@pytest.mark.parametrize("cpu", [False, True])
def test_both_model_runners_take_what_the_launcher_passes(cpu: bool, tmp_path: Path) -> None:
    """vLLM's runner for GPUs refuses logits processors of the older interface when the engine starts; the build for
    CPUs never asks. So it is asked here, with the arguments as vLLM itself reads them."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    arguments = server_arguments(ServeOptions(tmp_path), {}, cpu=cpu)
    assert arguments[0] == "serve"
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments[1:])
    build_custom_logits_processors_params_validator(read.logits_processors)
    with pytest.raises(ValueError, match="not a subclass"):  # the check itself still checks
        build_custom_logits_processors_params_validator(["vllm.v1.sample.logits_processor:MinPLogitsProcessor"])
