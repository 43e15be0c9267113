"""A judge's server, whose every reply is kept on disk: nothing is asked twice, and scores are had again without it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_llm.answering.server import Endpoint, RefusedRequest
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import append_line, read_lines

CONCURRENCY = 8  # requests in flight
SETTINGS = ("url", "model", "cache")


@dataclass(frozen=True)
class Said:
    """A judge's reply, and whether the server cut it for its length."""

    text: str
    cut: bool = False


class KeptReplies:
    """What a judge said, by a key of the request. Settings: ``url`` of the server, ``model`` (default: the first it
    serves), ``cache`` (a file of JSON lines). Without a ``url`` there are only the replies of that model in the cache,
    and without a model none. `scorer` is the name by which errors speak of them."""

    def __init__(self, scorer: str, settings: Mapping[str, str]) -> None:
        self.refused: dict[str, str] = {}  # why, by key: not asked again for every table
        self.model = settings.get("model", "")
        self._endpoint = Endpoint(settings["url"]) if "url" in settings else None
        if self._endpoint is not None and not self.model:
            self.model = next(iter(self._endpoint.models()), "")
            if not self.model:
                found = f"none at {self._endpoint.base}"
                raise ConfigError(
                    describe(f"scorer '{scorer}'", "a served model", found, f"Name it: {scorer}.model=NAME.")
                )
        self._cache = Path(settings["cache"]) if "cache" in settings else default_cache()
        if self._endpoint is not None:  # a reply that cannot be kept is not asked for
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            self._cache.open("a").close()
        self._replies: dict[str, Said] = {}
        self._lock = threading.Lock()
        if self.model:
            for line in read_lines(self._cache):
                if isinstance(line.get("key"), str) and isinstance(line.get("reply"), str):
                    self._replies[line["key"]] = Said(line["reply"], line.get("finish_reason") == "length")

    @property
    def can_ask(self) -> bool:
        return self._endpoint is not None

    def get(self, key: str) -> Said | None:
        return self._replies.get(key)

    def ask(self, key: str, body: Mapping[str, Any], item: str) -> Said | None:
        """The reply under `key`, asked for by `body` where it is not there, and kept on disk. None where nobody can be
        asked, or where the judge refuses this request, with the reason in `refused`. Raises :class:`EngineError` where
        the judge goes away."""
        if (said := self._replies.get(key)) is not None or self._endpoint is None or key in self.refused:
            return said
        try:
            choice = self._endpoint.complete({"model": self.model, **body})["choices"][0]
        except RefusedRequest as error:
            self.refused[key] = f"the judge refuses: {error}"
            return None
        text, reason = choice["message"]["content"], str(choice.get("finish_reason") or "")
        said = Said(text, reason == "length")
        line = {"key": key, "model": self.model, "id": item, "reply": text, "finish_reason": reason}
        with self._lock:
            self._replies[key] = said
            append_line(self._cache, line)
        return said


def key_of(model: str, body: Mapping[str, Any]) -> str:
    """A hash of the whole request."""
    return hashlib.sha256(json.dumps({"model": model, **body}, sort_keys=True).encode()).hexdigest()


def at_once(tasks: Sequence[Callable[[], object]], name: str, unit: str) -> None:
    """Do all of `tasks`, several at a time, with a bar. The first that raises ends it; those in flight end."""
    from tqdm import tqdm

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pending = [pool.submit(task) for task in tasks]
        try:
            for future in tqdm(pending, desc=name, unit=unit, disable=not tasks, file=sys.stderr):
                future.result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise


def check_settings(scorer: str, options: Mapping[str, str], known: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a setting that is none of `known`, and where neither a judge nor a model whose
    replies count is named."""
    for name in options:
        if name not in known:
            found = f"'{name}'{nearest(name, known)}"
            raise ConfigError(describe(f"scorer '{scorer}'", ", ".join(known), found))
    if "url" not in options and "model" not in options:
        raise ConfigError(describe(f"scorer '{scorer}'", "url (or the model whose cached replies count)", "none"))


def default_cache() -> Path:
    """``audio-llm/judge.jsonl`` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "audio-llm" / "judge.jsonl"
