"""The guard in front of vLLM's real routes, in this process: who may ask, where, how much, and with which words."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from starlette.testclient import TestClient

from audio_llm.errors import AudioLLMError, CheckpointError, ConfigError
from audio_llm.model.validate import check_adapter, check_checkpoint
from audio_llm.serving import checks
from audio_llm.serving.fetching import FetchError, HostNotAllowed, check_address, fetch, is_public
from audio_llm.serving.guard import ADAPTERS, CHECKS, READS, Guard, Room
from audio_llm.serving.launcher import ServeOptions, guard_facts, read_keys, server_arguments
from tests.servers import ChatServer, serving
from tests.serving.vllm_tools import make_adapter

pytestmark = pytest.mark.vllm
KEY = {"Authorization": "Bearer right"}
OPEN = {"/v1/chat/completions": "POST", "/v1/completions": "POST", **dict.fromkeys(READS, "GET")}


@pytest.fixture(scope="module")
def routes() -> Any:
    """vLLM's application with every route that it has for a model that generates, adapters and scale-out included."""
    from audio_llm.serving.plugin import present_cpu_build_as_vllm

    present_cpu_build_as_vllm()
    before = dict(os.environ)
    os.environ |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        arguments = ["--model", "none", "--enable-scale-out"]
        return build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(arguments), ("generate",))
    finally:
        os.environ.clear()
        os.environ.update(before)


class Inside:
    """What is behind the guard: says what came through, and with how many bytes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope["method"], scope["path"], len(body)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


FACTS: dict[str, Any] = {"special_words": ["<|im_end|>"]}  # what a check of a chat asks of the server


def guarded(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path | None = None, **options: Any
) -> tuple[TestClient, Inside]:
    keys = options.pop("keys", ["right", "other"])
    facts = guard_facts(ServeOptions(model=Path("model"), name="tiny", **options), {}, {"audio_token_id": 3}, keys)
    monkeypatch.setenv("AUDIO_LLM_SERVER", json.dumps(facts))
    inside = Inside()
    return TestClient(Guard(inside), raise_server_exceptions=True), inside


def paths_of(app: Any) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        for method in getattr(route, "methods", None) or ("GET", "POST"):
            yield method, route.path.replace("{", "").replace("}", "")


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **more}


def test_every_route_wants_the_key_and_few_are_open(routes: Any, monkeypatch) -> None:
    client, inside = guarded(monkeypatch)
    walked = sorted(set(paths_of(routes)))
    assert len(walked) > 35 and ("POST", "/invocations") in walked and ("POST", "/collective_rpc") in walked
    wrong = [{}, {"Authorization": "right"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}]
    for method, path in walked:
        for head in wrong:
            reply = client.request(method, path, headers=head, content=b"[" * 1000)
            assert reply.status_code == 401, (method, path)
        before = len(inside.seen)
        body = {"prompt": "x"} if path == "/v1/completions" else chat()
        status = client.request(method, path, headers=KEY, json=body).status_code
        expected = 200 if OPEN.get(path) == method or (method == "HEAD" and path in READS) else None
        assert status == expected or (expected is None and status in (400 if path in ADAPTERS else 404, 404, 405)), (
            method,
            path,
            status,
        )
        assert len(inside.seen) == before + (status == 200)
    assert {path for _, path, _ in inside.seen} == set(OPEN)


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/V1/completions", "/"])
def test_a_path_is_its_exact_spelling(monkeypatch, path: str) -> None:
    client, inside = guarded(monkeypatch)
    assert client.post(path, headers=KEY, json={"prompt": "x"}).status_code == 404 and not inside.seen


def test_adapters_are_open_where_they_are_allowed(monkeypatch) -> None:
    for allowed in (False, True):
        client, _ = guarded(monkeypatch, allow_adapter_updates=allowed)
        assert client.post("/v1/load_lora_adapter", json={}).status_code == 401
        statuses = {client.post(path, headers=KEY, json={"lora_name": "a"}).status_code for path in ADAPTERS}
        assert statuses == ({400, 200} if allowed else {400})


def test_without_keys_nobody_is_asked_for_one(monkeypatch) -> None:
    client, inside = guarded(monkeypatch, keys=[])
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    assert client.post("/invocations", json=chat()).status_code == 404
    assert [path for _, path, _ in inside.seen] == ["/v1/chat/completions"]


def test_web_pages_do_not_ask(monkeypatch) -> None:
    page = {"Origin": "http://page.example"}
    preflight = page | {"Access-Control-Request-Method": "POST"}
    for options, allowed in (({}, False), ({"allow_origins": ["http://page.example"]}, True)):
        for keys, head in ((["right"], KEY), ([], {})):
            client, _ = guarded(monkeypatch, keys=keys, **options)
            plain = {"Content-Type": "text/plain"} | page | head
            status = client.post("/v1/chat/completions", headers=plain, content=json.dumps(chat())).status_code
            assert status == (200 if allowed else 403)
            asked = client.options("/v1/chat/completions", headers=preflight)
            assert asked.status_code == (200 if allowed else 401 if keys else 403)
            other = page | head | {"Origin": "null"}
            assert client.get("/v1/models", headers=other).status_code == 403


def test_bodies_are_bounded(monkeypatch) -> None:
    client, inside = guarded(monkeypatch, max_body_mb=0.01)
    large = json.dumps(chat(user="x" * 20_000)).encode()
    assert client.post("/v1/chat/completions", headers=KEY, content=large).status_code == 413
    pieces = (large[start : start + 1000] for start in range(0, len(large), 1000))  # no length is said
    assert client.post("/v1/chat/completions", headers=KEY, content=pieces).status_code == 413
    assert not inside.seen
    assert client.post("/v1/chat/completions", headers=KEY, json=chat()).status_code == 200


def test_a_body_is_not_read_before_the_key_nor_beyond_its_length(monkeypatch) -> None:
    async def ask(head: list[tuple[bytes, bytes]]) -> tuple[int, int]:
        client, _ = guarded(monkeypatch, max_body_mb=1)
        asked, status = 0, 0

        async def receive() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            return {"type": "http.request", "body": bytes(2**18), "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": head}
        await client.app(scope, receive, send)
        return status, asked

    assert asyncio.run(ask([])) == (401, 0)
    assert asyncio.run(ask([(b"authorization", b"Bearer right"), (b"content-length", b"9999999999")])) == (413, 0)
    assert asyncio.run(ask([(b"authorization", b"Bearer right")])) == (413, 5)


def test_beyond_its_requests_it_says_when_to_come_again(monkeypatch) -> None:
    """Requests in flight are counted, those that end or fail no longer; reading the counters is never refused."""
    client, _ = guarded(monkeypatch, max_requests=2, keys=[])
    guard: Any = client.app
    started, going_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        await going_on.wait()
        if scope["path"] == "/v1/completions":
            raise RuntimeError("a defect")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    guard.app = slow

    async def ask(path: str, body: dict[str, Any] | None) -> tuple[int, dict[bytes, bytes]]:
        told: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)

        scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "headers": []}
        await guard(scope, receive, send)
        return told[0]["status"], dict(told[0]["headers"])

    async def scenario() -> None:
        first = asyncio.create_task(ask("/v1/chat/completions", chat()))
        second = asyncio.create_task(ask("/v1/completions", {"model": "tiny", "prompt": "x"}))
        await started.wait()
        while guard.answering < 2:
            await asyncio.sleep(0)
        status, head = await ask("/v1/chat/completions", chat())
        assert status == 429 and int(head[b"retry-after"]) > 0 and b"connection" in head
        going_on.set()
        assert (await first)[0] == 200
        with pytest.raises(RuntimeError):
            await second
        assert guard.answering == 0
        assert (await ask("/metrics", None))[0] == 200
        assert (await ask("/v1/chat/completions", chat()))[0] == 200

    asyncio.run(scenario())


def test_a_slow_body_ends(monkeypatch) -> None:
    from audio_llm.serving import guard

    async def ask() -> int:
        client, _ = guarded(monkeypatch)
        status = []

        async def send(message: dict[str, Any]) -> None:
            status.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        head = [(b"authorization", b"Bearer right")]
        await client.app(scope | {"headers": head}, lambda: asyncio.sleep(60), send)
        return status[0]

    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    assert asyncio.run(ask()) == 408


def test_bodies_wait_for_room() -> None:
    async def many() -> int:
        room, held, most = Room(10), 0, 0

        async def one(size: int) -> None:
            nonlocal held, most
            async with room.for_body(size):
                held += size
                most = max(most, held)
                await asyncio.sleep(0.001)
                held -= size

        await asyncio.gather(*(one(size) for size in (10, 3, 7, 5, 5, 9) * 5))
        return most if room.free == 10 else -1

    assert asyncio.run(many()) == 10


BODIES = {
    "no json": (b"{nope", "body: expected JSON"),
    "a list": (b"[]", "a JSON object, found list"),
    "nothing": (b"", "body: expected JSON"),
    "no text": (b'{"model": "\xff"}', "body: expected JSON"),
    "deep": (b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested without end"),
    "rather deep": (b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100"),
    "a long number": (b'{"seed": 1' + b"0" * 5000 + b"}", "more than 300 digits"),
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("path", CHECKS)
def test_bodies_that_say_nothing_are_refused(monkeypatch, path: str, case: str) -> None:
    client, inside = guarded(monkeypatch)
    body, reason = BODIES[case]
    reply = client.post(path, headers=KEY, content=body)
    assert reply.status_code == 400 and reason in reply.json()["error"]["message"] and not inside.seen


KEYS = {
    "guided_choice": (["a"], "structured_outputs: {'choice': ...}"),
    "guided_json": ({}, "structured_outputs: {'json': ...}"),
    "guided_regex": ("a", "structured_outputs: {'regex': ...}"),
    "structured_output": ({"choice": ["a"]}, "did you mean 'structured_outputs'?"),
    "max_token": (1, "did you mean 'max_tokens'?"),
    "temprature": (1, "did you mean 'temperature'?"),
    "modalities": (["text", "audio"], "no such key"),
    "structured_outputs": ({"choices": ["a"]}, "did you mean 'choice'?"),
    "n": (10_000, "n: expected at most 128"),
    "messages": ([{"role": "<|audio|>", "content": "hi"}], "messages[0].role: expected one of system"),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_mean_nothing_are_named(monkeypatch, key: str) -> None:
    client, inside = guarded(monkeypatch)
    value, reason = KEYS[key]
    reply = client.post("/v1/chat/completions", headers=KEY, json=chat() | {key: value})
    assert reply.status_code == 400 and reason in reply.json()["error"]["message"] and not inside.seen


def test_keys_that_clients_send_pass(monkeypatch) -> None:
    client, inside = guarded(monkeypatch)
    known = {"temperature": 0, "n": 2, "metadata": {}, "store": False, "user": "me", "modalities": ["text"], "seed": 1}
    known |= {"logprobs": True, "top_logprobs": 5, "return_token_ids": True, "continue_final_message": True}
    known |= {"structured_outputs": {"choice": ["a", "b"]}, "stream": True, "stream_options": {"include_usage": True}}
    assert client.post("/v1/chat/completions", headers=KEY, json=chat(**known)).status_code == 200
    body = {"prompt": "x", "max_tokens": 2, "echo": True, "suffix": None}
    assert client.post("/v1/completions", headers=KEY, json=body).status_code == 200
    assert len(inside.seen) == 2


@pytest.mark.parametrize(
    "wanted",
    [
        {"choice": [f"c{number}" for number in range(20_000)]},
        {"regex": "((x{1,1000}){1,1000}){1,1000}"},
        {"regex": "((((a?){200}){200}){200})b"},
        {"json": {"type": "string", "maxLength": 10**9}},
        {"json": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
        {"json": {"type": "array", "maxItems": 1000, "items": {"type": "string", "maxLength": 1000}}},
        {"grammar": 'root ::= "' + "a" * 70_000 + '"'},
        {"choice": []},
        # xgrammar took over 200 s and 4.8 GB for the first of these, within the bound of bytes.
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}},
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(300)}, "required": ["p299"]}},
        {"json": json.dumps({"anyOf": [{"properties": {f"p{i}": {} for i in range(100)}} for _ in range(4)]})},
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(100)}, "minProperties": 3}},
        {"json": {"type": "string", "pattern": "a?" * 300}},
        {"json": {"type": "object", "patternProperties": {"a?" * 300: {}}}},
        {"regex": ".*" * 300},
        {"regex": "(a|)" * 300},
        {"regex": "(" * 20 + "(?:a?|b)" * 300 + ")" * 20},
        {"regex": "|".join("x" + "a?" * 60 for _ in range(20))},
        {"regex": "(" + "a?" * 300},
        {"regex": "(?:a|b|aa)*" * 200},
        {"grammar": "root ::= " + '"a"? ' * 300},
        {"grammar": "root ::= " + '("" | "a") ' * 300},
        {"grammar": "start: " + '"a"? ' * 300},
    ],
)
def test_constraints_that_take_for_ever_are_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(AudioLLMError, match="structured_outputs"):
        checks.check_chat(chat(structured_outputs=wanted), FACTS)


@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": r"(\d{1,3}\.){3}\d{1,3} [a-z{}]{2,40}"},
        {"choice": ["left"] * 1000},
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 200} for i in range(50)}}},
        {"grammar": 'root ::= "<answer>" ("(A) left" | "(B) right") "</answer>"'},
        {"grammar": "\n".join(f'r{i} ::= "What?"* [?*+]+ r{i + 1}?' for i in range(500))},
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(128)}}},
        {"regex": "|".join(f"(?:a|b){{1,60}}{i}" for i in range(300))},
        {"regex": "(" + "|".join(f"a{i}?" for i in range(300)) + ")"},
        {
            "json": {
                "type": "object",
                "properties": {f"p{i}": {} for i in range(999)},
                "required": [f"p{i}" for i in range(900)],
            }
        },
        {"json": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1, "description": "?" * 999}},
        {"regex": r"(\?|\*|[?*+]|\d+\.?\d* (m|cm)){1,9}"},
    ],
)
def test_ordinary_constraints_pass(wanted: dict[str, Any]) -> None:
    checks.check_chat(chat(structured_outputs=wanted), FACTS)


class Failing:
    """What is behind the guard: ends as vLLM does where no word can follow, or in another way."""

    def __init__(self, status: int, *bodies: bytes) -> None:
        self.status, self.bodies = status, bodies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-of", b"vllm")]})
        for body in self.bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


ERROR = b'{"error":{"message":"%s","type":"InternalServerError","param":null,"code":500}}'
EVENT = b'data: {"choices": [{"delta": {"content": "\\"Internal server error\\""}}]}\n\n'


def test_a_constraint_without_a_next_word_is_the_clients_error(monkeypatch) -> None:
    client, _ = guarded(monkeypatch)
    stuck, other = ERROR % b"Internal server error", ERROR % b"out of memory"
    constrained, free = chat(response_format={"type": "json_object"}), chat()

    def reply(request: dict[str, Any], status: int, *bodies: bytes) -> tuple[int, str]:
        client.app.app = Failing(status, *bodies)
        found = client.post("/v1/chat/completions", headers=KEY, json=request)
        return found.status_code, found.text

    status, text = reply(constrained, 500, stuck)
    assert status == 400 and "leaves no next word" in json.loads(text)["error"]["message"]
    assert reply(constrained, 500, other) == (500, other.decode())
    assert reply(free, 500, stuck) == (500, stuck.decode())
    events = [EVENT, b"data: " + stuck + b"\n\n", b"data: [DONE]\n\n"]
    status, text = reply(constrained, 200, *events)
    first, second, last = text.strip().split("\n\n")
    assert first == EVENT.decode().strip() and last == "data: [DONE]"
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == 400
    assert reply(free, 200, *events) == (200, b"".join(events).decode())


@pytest.mark.parametrize("prompt", ["<|audio|>", [3, 5], ["a", "b<|audio|>"], [[1], [3]]])
def test_placeholders_without_audio_are_refused_at_completions(prompt: object) -> None:
    with pytest.raises(AudioLLMError, match="/v1/chat/completions"):
        checks.check_completion({"prompt": prompt}, {"audio_marks": ["<|audio|>"], "audio_mark_ids": [3]})


def test_keys_come_from_a_file_and_never_stand_in_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    passed_on = ["--api-key", "three", "four", "--seed", "1", "--api-key=five"]
    options = ServeOptions(model=Path("m"), api_key_file=file, vllm_arguments=passed_on)
    assert read_keys(options, {"VLLM_API_KEY": "six"}) == ["three", "four", "five", "six", "one", "two"]
    arguments = server_arguments(options, {}, cpu=True)
    assert arguments[-2:] == ["--seed", "1"] and not {"--api-key", "three", "five"} & set(arguments)
    assert "one" not in json.dumps(guard_facts(options, {}, {"audio_token_id": 3}, ["one"]))
    assert arguments[arguments.index("--allowed-origins") + 1] == "[]"
    for text in ("", "\n", "a key", "schlüssel"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="key"):
            read_keys(ServeOptions(model=Path("m"), api_key_file=file), {})
    with pytest.raises(ConfigError, match="a file of keys"):
        read_keys(ServeOptions(model=Path("m"), api_key_file=tmp_path / "none"), {})


# ---------------------------------------------------------------------------------------------------- addresses

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "172.16.0.1",
    "169.254.169.254",
    "0.0.0.0",
    "224.0.0.1",
    "100.64.0.1",
]
PRIVATE += ["::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "ff02::1"]
PRIVATE += ["100.64.0.1", "64:ff9b::7f00:1", "240.0.0.1", "255.255.255.255"]


def test_addresses_of_this_machine_and_its_network_are_not_public() -> None:
    assert not [address for address in PRIVATE if is_public(address)]
    assert is_public("1.1.1.1") and is_public("2606:4700::1111") and is_public("::ffff:1.1.1.1")


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/a",
        "http://u:p@good.example/a",
        "http://good.example@evil.example/",
        "http://good.example\\@evil.example/",
        "http://good.example:0/",
        "http://good.example:99999/",
        "ftp://good.example/a",
        "http://good.example.evil.example/",
        "http://[::1",
        "http://",
        "http://good.example/\r\nX: 1",
        "http://2130706433/",
    ],
)
def test_hosts_that_are_not_named_are_not_asked(url: str) -> None:
    with pytest.raises(HostNotAllowed):
        check_address(url, ["good.example"])
    check_address("https://good.example:8443/a.wav?x=1", ["good.example"])


class Web(ChatServer):
    """Sounds, and what else an address may answer with."""

    def do_GET(self) -> None:
        type(self).calls += 1
        if self.path == "/ok":
            data = b"sound"
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        elif self.path.startswith("/to="):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(1000):
                    self.wfile.write(bytes(2**16))
            except OSError:
                return
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            self.finished = threading.Event()
            for _ in range(50):
                try:
                    self.wfile.write(b"R")
                    self.wfile.flush()
                except OSError:
                    return
                self.finished.wait(0.1)
        else:
            self.send_error(404)


def test_fetching_ends_and_goes_nowhere_else() -> None:
    with serving(Web) as address, serving(Web) as other:
        port = address.rpartition(":")[2]

        def get(url: str, hosts: tuple[str, ...] = ("127.0.0.1",)) -> bytes:
            return asyncio.run(fetch(url, hosts, 2**20, 1.0))

        assert get(f"{address}/ok") == b"sound"  # the operator named that very address
        for path in (f"/to={other}/ok", "/to=/ok", "/to=file:///etc/passwd", "/none", "/endless", "/slow"):
            with pytest.raises(FetchError):
                get(address + path)
        with pytest.raises(FetchError):
            get("http://127.0.0.1:1/ok")
        with pytest.raises(FetchError):  # a name that means this machine, or nothing
            get(f"http://localhost:{port}/ok", ("localhost",))
        with pytest.raises(FetchError):
            get("http://no-such-host.invalid/ok", ("no-such-host.invalid",))


# ----------------------------------------------------------------------------------------------------- adapters


def test_adapters_say_nothing_that_could_run(checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen2", 2)
    adapter = make_adapter(model, tmp_path / "adapter")
    check_adapter(adapter, model)
    path = adapter / "adapter_config.json"
    plain = json.loads(path.read_text())
    for name, value in {
        "megatron_core": "evil",
        "megatron_config": {"a": 1},
        "auto_mapping": {"parent_library": "evil"},
        "corda_config": {"x": 1},
        "layer_replication": [[0, 4000]],
        "target_parameters": ["x"],
        "lora_bias": True,
        "target_modules": "(([a-z_.0-9]+)+)+X",
        "new_key": "anything",
        "r": 1 << 40,
    }.items():
        path.write_text(json.dumps(plain | {name: value}))
        with pytest.raises(CheckpointError, match=name if name != "r" else "rank"):
            check_adapter(adapter, model, max_rank=64)
    path.write_text(json.dumps(plain | {"target_modules": ["q_proj", "v_proj"]}))
    check_adapter(adapter, model)


def test_adapters_are_loaded_from_their_own_folders(checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen2", 2)
    facts = {"adapters": True, "name": "tiny", "checkpoint": str(model), "max_lora_rank": 64}
    told = set()
    for path in ("/etc", "/root", "/nonexistent", "/etc/shadow", "/dev/zero", "/proc/self"):
        with pytest.raises(AudioLLMError) as refused:
            checks.check_load({"lora_name": "a", "lora_path": path}, facts)
        told.add(str(refused.value).replace(path, "PATH"))
    assert len(told) == 1, told
    os.mkfifo(tmp_path / "adapter_config.json")  # a reader would wait for its writer
    for name, path in (("a", str(tmp_path)), ("a", str(model)), ("a", "relative"), ("tiny", "/etc"), ("a\x1b", "/etc")):
        with pytest.raises(AudioLLMError):
            checks.check_load({"lora_name": name, "lora_path": path}, facts)
    make_adapter(model, tmp_path / "good")
    checks.check_load({"lora_name": "a", "lora_path": str(tmp_path / "good")}, facts)


def test_a_model_does_not_bring_an_adapter_along(checkpoint, tmp_path: Path) -> None:
    import shutil

    from audio_llm.model.build import load_model

    model = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2", 2), model)
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))
    for load in (check_checkpoint, load_model):
        with pytest.raises(CheckpointError, match="Move the adapter's files away"):
            load(model)
