"""``python -m audio_llm.serving.health [URL]``: exit code 0 where a server, or a page, answers; for containers.

The key of ``OPENAI_API_KEY`` is sent where there is one. Nothing but the standard library is imported.
"""

from __future__ import annotations

import http.client
import os
import sys
import urllib.request

URL = "http://127.0.0.1:8000/health"


def healthy(url: str = URL) -> bool:
    """Whether `url` answers a GET with 2xx within five seconds."""
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return 200 <= reply.status < 300
    except (OSError, http.client.HTTPException, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(not healthy(*sys.argv[1:2]))
