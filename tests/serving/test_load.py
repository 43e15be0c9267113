"""The load of benchmarks/serving.py on the guard, over HTTP, before a small application in vLLM's place."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("aiohttp", reason="the load's client")

from audio_llm.audio import decode
from audio_llm.errors import AudioLLMError
from audio_llm.serving.guard import Guard
from audio_llm.serving.launcher import ServeOptions, guard_facts
from benchmarks import serving as load

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class Answering:
    """Decodes what it is sent, as a model of two channels would, and says two words, the second after a while."""

    seconds, status, head = 0.05, 200, ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/v1/models":
            await self.say(send, 200, json.dumps({"data": [{"id": "tiny"}]}).encode())
            return
        request = json.loads((await receive())["body"])
        try:
            sound = decode(
                base64.b64decode(request["messages"][0]["content"][0]["input_audio"]["data"]), layout="stereo"
            )
        except AudioLLMError:
            await self.say(send, 400)
            return
        if request["model"] != "tiny" or self.status != 200:
            await self.say(send, self.status if self.status != 200 else 404)
            return
        assert sound.num_channels == 2
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for count, word in enumerate(("left", "."), 1):
            event = {"choices": [{"delta": {"content": word}}], "usage": {"completion_tokens": count}}
            body = b"data: " + json.dumps(event).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(self.seconds)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def say(self, send: Any, status: int, body: bytes = b"{}") -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(self.head)})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def guarded(inside: Any, **options: Any) -> Iterator[str]:
    import uvicorn

    facts = guard_facts(ServeOptions(model=Path("model"), name="tiny", **options), {}, {"audio_token_id": 3}, [])
    os.environ["AUDIO_LLM_SERVER"] = json.dumps(facts)
    server = uvicorn.Server(uvicorn.Config(Guard(inside), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        os.environ.pop("AUDIO_LLM_SERVER")


def run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[int, list[dict[str, Any]]]:
    file = tmp_path / "load.json"
    words = [
        "serving",
        address,
        "--seconds",
        "2",
        "--bodies",
        "40",
        "--json",
        str(file),
        *options,
    ]  # the last of a kind counts
    monkeypatch.setattr("sys.argv", words)
    code = load.main()
    return code, json.loads(file.read_text())["rows"]


def test_overload_is_told_and_nothing_else_goes_wrong(tmp_path: Path, monkeypatch, capsys) -> None:
    with guarded(Answering(), max_requests=4) as address:
        code, rows = run(address, tmp_path, monkeypatch, "--clients", "2,16", "--rate", "5", "--bad", "0.3")
    few, many, arriving, same = rows
    assert code == 0 and not [row["wrong"] for row in rows if row["wrong"]]
    assert "429" not in few["statuses"] and many["statuses"]["429"] > 0
    assert few["statuses"]["400"] > 0 and few["answered"] == few["statuses"]["200"]
    assert 0 < few["first"][0] < few["whole"][0] and few["whole"][0] > Answering.seconds
    assert arriving["asked"] > 0 and set(same["statuses"]) == {"200"}


@pytest.mark.parametrize(
    ("status", "head", "says"),
    [(500, (), "500"), (503, (), "503 without Retry-After"), (422, (), "a good request: 422")],
)
def test_what_must_not_happen_is_told(tmp_path: Path, monkeypatch, status: int, head: Any, says: str) -> None:
    inside = Answering()
    inside.status, inside.head = status, head
    with guarded(inside) as address:
        code, rows = run(address, tmp_path, monkeypatch, "--clients", "1", "--rows", "closed", "--bad", "0")
    assert code == 1 and says in rows[0]["wrong"][0]


def test_a_server_that_hangs_is_told(tmp_path: Path, monkeypatch) -> None:
    inside = Answering()
    inside.seconds = 5.0
    with guarded(inside) as address:
        code, rows = run(
            address, tmp_path, monkeypatch, "--clients", "1", "--rows", "closed", "--bad", "0", "--patience", "0.3"
        )
    assert code == 1 and "no answer" in rows[0]["wrong"][0]


def test_memory_stays_while_a_real_server_is_asked(checkpoint, tmp_path: Path, monkeypatch, capsys) -> None:
    """Five minutes; ``AUDIO_LLM_LOAD_SECONDS=1800`` for half an hour. One request in ten is bad."""
    seconds = os.environ.get("AUDIO_LLM_LOAD_SECONDS", "300")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--rows", "memory", "--clients", "8", "--seconds", seconds, "--draw", str(tmp_path / "memory.html")]
    options += ["--lengths", "0.5,1"]  # all that the small model hears
    code, (row,) = run(str(checkpoint()), tmp_path, monkeypatch, *options)
    assert code == 0 and not row["wrong"], row
    assert row["answered"] > 100 and any(int(status) >= 400 for status in row["statuses"])
    tree = json.loads((tmp_path / "load.json").read_text())
    assert len(tree["memory"]) > 100 and tree["growth"] <= load.ALLOWED_GROWTH and tree["slope"] == tree["slope"]
    assert "<polyline" in (tmp_path / "memory.html").read_text()
    print(capsys.readouterr().out)


def test_growth_is_of_what_comes_after_the_warm_up() -> None:
    flat = [(float(second), 1000.0 + (500 if second > 30 else 0)) for second in range(0, 1800, 10)]
    assert load.growth(flat) == 0
    rising = [(second, 1000.0 + second) for second, _ in flat]
    assert load.growth(rising) > load.ALLOWED_GROWTH
    assert abs(load.slope(flat)) < 1e-6 and load.slope(rising) == pytest.approx(3600)
    assert load.slope(flat[:3]) != load.slope(flat[:3])
    own = load.resident(os.getpid())
    assert 20 < own < 20_000
