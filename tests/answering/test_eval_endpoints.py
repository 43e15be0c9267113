"""Endpoints of strangers under evaluation: what they are sent, what they reply, and what happens when they go away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_llm.answering.base import Request
from audio_llm.answering.engines import open_engine
from audio_llm.answering.server import EngineError
from audio_llm.audio import Waveform
from audio_llm.cli import main
from eval.controls import Item
from tests.eval.test_eval_runs import Hearing, command, lines, make_mmau
from tests.servers import Listener, serving


class Peak(Listener):
    """Says how loud the loudest sample is that it is sent."""

    def heard(self, text: str, samples: np.ndarray | None) -> str:
        return f"{np.abs(samples).max():.4f}"


def test_an_endpoint_hears_levels_above_full_scale() -> None:
    """As the engines of this process do: a rendered scene may be louder, and how loud it is tells how far away."""
    item = Item("a", "How loud?", [], "x", "level", "t", "c")
    samples = np.array([[0.1] * 20, [-0.5] * 20], np.float32)
    with serving(Peak) as address:
        engine = open_engine(address, "listener")
        waves = [Waveform(samples * gain, 16_000, "binaural") for gain in (1, 2, 6)]
        requests = [Request(item, (engine.prepare(wave, "a"),)) for wave in waves]
        found = [answer.raw.split("<answer>")[1].split("<")[0] for answer in engine.generate(requests)]
    assert found == ["0.5000", "1.0000", "3.0000"]


class Stopping(Listener):
    """Is stopped while it answers for the first time, as vLLM is: status 200, half a reply and a reason for its end."""

    def chat(self, body: dict[str, Any]) -> None:
        if self.calls > 1:
            return super().chat(body)
        choice = {"index": 0, "message": {"role": "assistant", "content": "<think>no"}, "finish_reason": "abort"}
        return self.reply(200, {"choices": [choice], "usage": {}})


def test_a_reply_that_was_broken_off_is_asked_for_again(monkeypatch) -> None:
    from audio_llm.answering import server as server_module

    request = Request(
        Item("a", "Which side?", [], "x", "side", "t", "c"),
        (Waveform(np.ones((2, 20), np.float32), 16_000, "binaural"),),
    )
    with serving(Stopping) as address:
        (answer,) = open_engine(address, "listener").generate([request])
    assert answer.raw.endswith("<answer>left</answer>") and answer.finish_reason == "stop"
    monkeypatch.setattr(server_module, "RETRIES", 0)
    with serving(Stopping, calls=0) as address, pytest.raises(EngineError, match=r"found one broken off \(abort\)"):
        list(open_engine(address, "listener").generate([request]))


class Parts(Hearing):
    """Hears wherever the sound stands, and keeps the shape of what it is asked."""

    shapes: set[str]

    def chat(self, body: dict[str, Any]) -> None:
        *before, user = body["messages"]
        said = [message["role"] for message in before] + [part["type"] for part in user["content"]]
        self.shapes.add(" ".join(said))
        super().chat(body | {"messages": [user]})


def test_a_run_asks_in_the_order_that_it_is_told(tmp_path: Path, capsys) -> None:
    data = make_mmau(tmp_path / "data", 6)
    shapes = {"audio": "input_audio text", "text": "text input_audio", "system": "system input_audio text"}
    for order, shape in shapes.items():
        seen: set[str] = set()
        with serving(Parts, shapes=seen) as address:
            assert main(command(data, tmp_path / order, address, "--controls", "none", "--order", order)) == 0
        found = lines(tmp_path / order)
        assert len(found) == 6 and all(row["gold"] in row["raw"] for row in found)
        assert json.loads((tmp_path / order / "run.json").read_text())["settings"]["order"] == order
        assert seen == {shape}
    assert main(command(data, tmp_path / "audio", address, "--controls", "none", "--order", "text")) == 2
    assert "order" in capsys.readouterr().err
    assert main(command(data, tmp_path / "x", address, "--order", "sound")) == 2
    assert "expected one of audio, text, system" in capsys.readouterr().err


def test_an_endpoint_that_goes_away_costs_no_answers(tmp_path: Path, monkeypatch, capsys) -> None:
    from audio_llm.answering import server as server_module

    def die_after_thirty(self: Hearing) -> None:
        if type(self).calls < 30:
            Hearing.do_POST(self)
        self.close_connection = True  # as a process that died: no reply at all

    monkeypatch.setattr(server_module, "RETRIES", 0)
    data, out = make_mmau(tmp_path / "data", 60), tmp_path / "run"
    with serving(Hearing, do_POST=die_after_thirty) as address:
        assert main(command(data, out, address, "--controls", "none", "--batch-size", "2")) == 2
    assert "repeat the command" in capsys.readouterr().err
    kept = lines(out)
    assert len(kept) >= 28 and not any(row["error"] for row in kept)
    with serving(Hearing) as address:
        assert main(command(data, out, address, "--controls", "none")) == 0
    assert lines(out)[: len(kept)] == kept and len(lines(out)) == 60


def raw_reply(data: bytes, length: int | None = None) -> Callable[[Hearing], None]:
    """Sends `data` under status 200 and says that it is `length` bytes."""

    def send(self: Hearing) -> None:
        type(self).calls += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    return send


def said(content: object, **more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}], **more}).encode()


def refusal(code: int) -> Callable[[Hearing], None]:
    def refuse(self: Hearing) -> None:
        type(self).calls += 1
        self.reply(code, {"error": f"code {code}"})

    return refuse


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (raw_reply(said("rain"), 400), "IncompleteRead"),
        (raw_reply(b"<html>"), "expected a reply in JSON, found '<html>'"),
        (raw_reply(b"[]"), r"expected a reply in JSON, found '\[\]'"),
        (raw_reply(b'{"id": 1}'), 'expected an OpenAI chat completion, found {"id": 1}'),
        (raw_reply(said(5)), "expected an OpenAI chat completion"),
        (raw_reply(b'{"choices": 5}'), "expected an OpenAI chat completion"),
        (raw_reply(b'{"choices": [5]}'), "expected an OpenAI chat completion"),
        (raw_reply(b'{"error": {"message": "no quota"}}'), "expected a reply in JSON, found an error: no quota"),
        (raw_reply(said("rain", error={"code": 5})), 'found an error: {"code": 5}'),
        (raw_reply(said("rain", error="no quota")), "found an error: no quota"),
        (lambda self: self.wfile.write(b"no http\r\n\r\n"), "expected a reply in JSON, found no http"),
        (refusal(401), "HTTP 401.*Mend the address, the model's name or OPENAI_API_KEY"),
        (refusal(402), "HTTP 402"),
        (refusal(404), "HTTP 404.*Mend the address"),
        (refusal(429), "HTTP 429.*Start it again"),
        (refusal(500), "HTTP 500.*Start it again"),
        (refusal(400), "3 of 3 questions could not be asked.*HTTP 400"),
        (refusal(413), "3 of 3 questions could not be asked.*HTTP 413"),
    ],
)
def test_what_no_question_can_be_answered_with_ends_the_run(
    tmp_path: Path, monkeypatch, capsys, server, message: str
) -> None:
    from audio_llm.answering import server as server_module

    monkeypatch.setattr(server_module, "RETRIES", 0)
    data, out = make_mmau(tmp_path / "data", 3), tmp_path / "run"
    with serving(Hearing, do_POST=server) as address:
        code = main(command(data, out, address, "--controls", "none"))
    error = capsys.readouterr().err
    assert code == (1 if "could not be asked" in message else 2)  # it ran, and nothing was heard; or it could not go on
    assert re.search(message, error) and "Traceback" not in error


@pytest.mark.parametrize(
    ("reply", "raw"),
    [
        (said(None), ""),
        (said([{"type": "text", "text": "ra"}, {"type": "image"}, {"type": "text", "text": "in"}]), "rain"),
        (said("rain", usage=[1]), "rain"),
        (said("rain", usage={"prompt_tokens": "many"}), "rain"),
        (said("rain", usage={"prompt_tokens": True, "completion_tokens": -1}), "rain"),
        (said("rain", usage={"prompt_tokens": 10**30}, error=None), "rain"),
        (json.dumps({"choices": [{"message": {"content": None, "refusal": "I will not"}}]}).encode(), "I will not"),
    ],
)
def test_replies_that_say_less_or_otherwise_are_replies(tmp_path: Path, reply: bytes, raw: str) -> None:
    data, out = make_mmau(tmp_path / "data", 2), tmp_path / "run"
    with serving(Hearing, do_POST=raw_reply(reply)) as address:
        assert main(command(data, out, address, "--controls", "none")) == 0
    assert [(row["raw"], row["error"], row["prompt_tokens"]) for row in lines(out)] == [(raw, "", 0)] * 2


def test_a_reply_that_a_filter_withheld_is_no_answer_of_the_model(tmp_path: Path, capsys) -> None:
    """It would be scored as a wrong one."""
    data, out = make_mmau(tmp_path / "data", 2), tmp_path / "run"
    reply = json.dumps({"choices": [{"message": {"content": "ra"}, "finish_reason": "content_filter"}]}).encode()
    with serving(Hearing, do_POST=raw_reply(reply)) as address:
        assert main(command(data, out, address, "--controls", "none")) == 1
    assert "withheld (content_filter)" in capsys.readouterr().err
    assert [row["raw"] for row in lines(out)] == ["", ""]


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"], ids=["head", "body"])
def test_a_reply_that_drips_is_not_waited_for(monkeypatch, sent: bytes) -> None:
    """Byte by byte, each within the limit of a socket: the head as well, before there is a reply to read."""
    from audio_llm.answering import server as server_module

    monkeypatch.setattr(server_module, "TIMEOUT_SECONDS", 0.6)
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(sent)
            while not over.wait(0.02):
                handler.wfile.write(b" " if sent else b"H")
                handler.wfile.flush()

    started = time.monotonic()
    with serving(BaseHTTPRequestHandler, do_GET=drip) as address:
        try:
            with pytest.raises(EngineError, match=rf"{address}/v1/models: expected .* within 0.6 s, found one that"):
                server_module.Endpoint(address).models()
        finally:
            over.set()
    assert time.monotonic() - started < 10


def test_a_server_that_says_nothing_is_asked_again(monkeypatch) -> None:
    from audio_llm.answering import server as server_module

    monkeypatch.setattr(server_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(server_module.time, "sleep", lambda seconds: None)
    asked: list[float] = []
    over = threading.Event()
    with serving(BaseHTTPRequestHandler, do_GET=lambda handler: (asked.append(1), over.wait(30))) as address:
        try:
            with pytest.raises(EngineError, match="a reply in JSON, found timed out"):
                server_module.Endpoint(address).models()
        finally:
            over.set()
    assert len(asked) == 3


# Whether each client reaches a server of this machine, and what it is told by one that lies elsewhere.
CLIENTS = """
import sys
import requests
from audio_llm.answering.server import Endpoint
from audio_llm.serving.health import healthy, is_here, proxies_for
here, there = sys.argv[1:]
assert is_here(here) and is_here("localhost") and is_here("[::1]:8000") and not is_here("192.168.0.1:80")
assert not is_here("localhost.example:80") and not is_here("//[")
for url in (here, there):
    session = requests.Session()
    session.trust_env = not is_here(url)
    print(Endpoint(url).models(), healthy(url + "/v1/models"), session.get(url + "/v1/models").json()["data"][0]["id"],
          requests.get(url + "/v1/models", proxies=proxies_for(url)).json()["data"][0]["id"])
"""


def test_a_proxy_is_not_asked_for_a_server_of_this_machine() -> None:
    """It would be sent the key and the sounds, and look for the server on a machine of its own."""

    def answering(name: str) -> Callable[[Listener], None]:
        return lambda handler: handler.reply(200, {"data": [{"id": name}]})

    with serving(Listener, do_GET=answering("own")) as own, serving(Listener, do_GET=answering("proxy")) as proxy:
        kept = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "all_proxy")}
        done = subprocess.run(
            [sys.executable, "-c", CLIENTS, own, "http://elsewhere.test"],
            env=kept | {"http_proxy": proxy, "HTTP_PROXY": proxy},
            capture_output=True,
            text=True,
        )
    assert done.stdout.splitlines() == ["['own'] True own own", "['proxy'] True proxy proxy"], done.stderr


def test_a_server_is_not_asked_by_a_name_it_does_not_know(tmp_path: Path, capsys) -> None:
    data = make_mmau(tmp_path / "data", 2)
    with serving(Hearing) as address:
        arguments = command(data, tmp_path / "run", address, "--controls", "none")
        arguments[1] = "listner"
        assert main(arguments) == 2
        assert "model: expected one of listener, found 'listner' (did you mean 'listener'?)" in capsys.readouterr().err
        arguments[1] = "owner/listener"  # the same name, with whose it is
        assert main(arguments) == 0
        arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
        (tmp_path / "model").mkdir()  # a folder has another name there
        arguments[1] = str(tmp_path / "model")
        assert main(arguments) == 0
    for address in ("http://127.0.0.1:port", "http://a b", "http://"):
        assert main(command(data, tmp_path / "other", address)) == 2
        assert "address: expected http://HOST:PORT" in capsys.readouterr().err
