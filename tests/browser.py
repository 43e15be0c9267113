"""Headless Chromium, driven by the DevTools protocol: pages that tests open, fill in, photograph and listen to."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --mute-audio --no-first-run --disable-background-networking "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream "
    "--remote-debugging-port=0 --remote-allow-origins=*"
).split()


class Tab:
    """One page. `complaints` are what its console says in earnest, `requests` the addresses that it asked for."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self._socket = connect(address, max_size=2**27)
        self._number = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol; events that come meanwhile are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.complaints.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """The first value of `script` that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"((found) => found instanceof Node ? true : found)({script})"):
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds:g} s: {script}\n{self.run('document.body.innerText')[:2000]}")

    def give_file(self, selector: str, file: Path) -> None:
        """Choose `file` in the file input that `selector` finds."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        assert node, selector
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def type(self, selector: str, text: str) -> None:
        """Put `text` into a text field, as a person's typing would."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def screen(self, width: int, height: int) -> None:
        """The size of the screen, in pixels; a narrow one is a telephone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def photograph(self, file: Path, full: bool = True) -> None:
        """A PNG of the page, all of it or what the screen shows."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        file.write_bytes(base64.b64decode(told["data"]))


@contextmanager
def browser(folder: Path, flags: Sequence[str] = ()) -> Iterator[Tab]:
    """A tab of a Chromium with a profile of its own in `folder`; the test is skipped where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium here")
    profile = folder / "profile"
    with (folder / "chromium.log").open("w") as log:
        command = [program, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        try:
            yield Tab(_address(profile))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(profile: Path) -> str:
    """The DevTools address of the first tab."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        file = profile / "DevToolsActivePort"
        if file.is_file() and (lines := file.read_text().split()):
            with urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=30) as reply:
                pages = [one for one in json.load(reply) if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("chromium does not answer")
