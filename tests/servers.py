"""OpenAI-like servers for the tests of whatever asks one."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import soundfile


class ChatServer(BaseHTTPRequestHandler):
    """Serves one model. What a request gets is `chat`'s to say, by `answer` or `reply`."""

    served = "listener"
    calls = 0

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": self.served}]})

    def do_POST(self) -> None:
        type(self).calls += 1
        self.chat(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def chat(self, body: dict[str, Any]) -> None:
        raise NotImplementedError

    def answer(self, text: str) -> None:
        """A chat completion that says `text`, with all that the official client reads."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}
        about = {"id": "chat", "object": "chat.completion", "created": 0, "model": self.served}
        self.reply(200, {"choices": [choice], "usage": usage, **about})

    def reply(self, code: int, tree: dict[str, Any]) -> None:
        data = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Listener(ChatServer):
    """A stranger's endpoint that hears which channel is louder, and answers "left" when neither is."""

    broken_until = 0

    def chat(self, body: dict[str, Any]) -> None:
        if self.calls <= self.broken_until:
            return self.reply(503, {"error": "warming up"})
        parts = {part["type"]: part[part["type"]] for part in body["messages"][0]["content"]}
        samples = None
        if "input_audio" in parts or "audio_url" in parts:  # ours, and that of lmms-eval's own models
            data = parts["input_audio"]["data"] if "input_audio" in parts else parts["audio_url"]["url"].split(",")[1]
            samples, _ = soundfile.read(io.BytesIO(base64.b64decode(data)), always_2d=True)
        return self.answer(f"<think>noise</think>\n<answer>{self.heard(parts['text'], samples)}</answer>")

    def heard(self, text: str, samples: np.ndarray | None) -> str:
        """The answer to the question `text` about `samples` (time, channels), or about none."""
        if samples is None:
            return "left"
        power = (samples**2).mean(axis=0)
        return "right" if power[1] > power[0] else "left"


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # five, by default: the sixth client at once would be reset


@contextmanager
def serving(kind: type[BaseHTTPRequestHandler], **attributes: Any) -> Iterator[str]:
    """The address of a server that answers by a class of its own, made of `kind` with `attributes`."""
    server = _Server(("127.0.0.1", 0), type(kind.__name__, (kind,), attributes))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
