"""``python -m audio_llm.serving.health [URL]``: exit code 0 where a server, or a page, answers; for containers. And
whether what a server replied is whole.

The key of ``OPENAI_API_KEY`` is sent where there is one. Nothing but the standard library is imported.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import sys
import urllib.parse
import urllib.request
from typing import Any

URL = "http://127.0.0.1:8000/health"
BROKEN_OFF = ("abort", "error")  # vLLM's finish reasons of a reply that nobody ended: its engine was stopped, or died


def is_here(url: str) -> bool:
    """Whether `url`, or ``HOST:PORT``, is an address of this machine alone (localhost, 127.0.0.1, ::1)."""
    try:
        name = urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Proxies(urllib.request.ProxyHandler):
    """Those of the environment (``http_proxy``), but for servers on this machine: a proxy would look for them on its
    own, and be sent the key and the sounds. Containers often get the variable without ``no_proxy``."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        return None if is_here(req.host) else super().proxy_open(req, proxy, type)


def proxies_for(url: str) -> dict[str, Any]:
    """The same as the package `requests` takes it."""
    return {"http": None, "https": None} if is_here(url) else {}


def healthy(url: str = URL) -> bool:
    """Whether `url` answers a GET with 2xx within five seconds."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.build_opener(Proxies).open(request, timeout=5) as reply:
            return 200 <= reply.status < 300
    except (OSError, http.client.HTTPException, ValueError):
        return False


def broken_off(reply: Any) -> str:
    """Why a completion in OpenAI's form, sent with status 200, is no whole reply: the finish reason of the first of its
    choices that was broken off, "" where none was."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    entries = choices if isinstance(choices, list) else []
    reasons = [choice.get("finish_reason") for choice in entries if isinstance(choice, dict)]
    return next((str(reason) for reason in reasons if reason in BROKEN_OFF), "")


if __name__ == "__main__":
    sys.exit(not healthy(*sys.argv[1:2]))
