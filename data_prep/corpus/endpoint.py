"""A language model behind an address, asked for JSON: what it says is kept, paid for once, and never trusted.

Every request goes through :class:`audio_llm.answering.server.Endpoint`, as those of engines and judges do. A reply is
kept under the hash of its whole request in ``OUT/replies/``, so that no question is asked twice; what each request
cost, in tokens and seconds, is a line of ``OUT/costs.jsonl``. A reply that is no JSON, cut, too long or of another form
is asked for again with the next seed, a bounded number of times, and is then a reject with its reason. Where that item
is tried again in a later run, kept replies do not count among its tries: it goes on with the seeds after theirs.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from audio_llm.answering.base import is_address
from audio_llm.answering.server import ClosedEndpoint, Endpoint, EngineError, RefusedRequest
from audio_llm.errors import ConfigError, describe
from audio_llm.files import append_line, parse_json, read_lines
from data_prep.corpus.stage import RunStopped

COSTS = "costs.jsonl"
REASONS = {
    "no_reply": "the endpoint gave no answer after all retries (429, 5xx, connection lost)",
    "refused": "the endpoint refuses the request",
    "reply_cut": "the reply ended before its end (max_tokens)",
    "reply_long": "the reply is longer than max_characters",
    "no_json": "the reply is no JSON",
    "off_schema": "the reply has another form than asked for",
}
Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")
R = TypeVar("R")
_FENCE = re.compile(r"^\s*(?:<think>.*?</think>)?\s*```(?:json)?\s*\n(.*?)\n?```\s*$", re.DOTALL)
_THOUGHT = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Asking:
    """How a model is asked. `url` and `retries` decide nothing about what it says."""

    url: str
    model: str
    temperature: float = 0.7
    max_tokens: int = 768
    max_characters: int = 20_000
    tries: int = 3  # requests with a seed each, until a reply can be used
    retries: int = 3  # of one request that meets a busy server, with pauses of 1, 2, 4 … seconds
    again: bool = False  # whether replies that are kept do not count among the tries

    def check(self, where: str) -> None:
        if not is_address(self.url):
            raise ConfigError(describe(f"{where}.url", "http://HOST:PORT or https://HOST:PORT", f"'{self.url}'"))
        if not self.model:
            cure = "The ledger knows what was made by the model's name."
            raise ConfigError(describe(f"{where}.model", "the name of a served model", "none", cure))
        for name, least in (("max_tokens", 1), ("max_characters", 1), ("tries", 1), ("retries", 0), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ConfigError(describe(f"{where}.{name}", f"{least} or more", f"{getattr(self, name):g}"))


@dataclass(frozen=True)
class Said:
    """A reply: its words, or the reason why there are none that can be used. `first` are log-probabilities of what the
    first token could have been, where they were asked for; `kept` says that it was not asked for now."""

    text: str = ""
    reason: str = ""
    detail: str = ""
    first: Mapping[str, float] | None = None
    kept: bool = False


class Unusable(NamedTuple):
    """Why nothing that a model said is of use, and what was found."""

    reason: str
    detail: str


class Model:
    """A model behind an address, for one stage (`label`) of the corpus in `folder`.

    Raises :class:`EngineError` where nobody answers there, or the model is not served: else every item would be lost.
    Where it comes to that later, whatever asks raises :class:`RunStopped`.
    """

    def __init__(self, asking: Asking, folder: Path | None = None, label: str = "") -> None:
        self.asking, self.label = asking, label
        self._endpoint = Endpoint(asking.url)
        self._served = self._endpoint.find(asking.model)
        self._costs = folder / COSTS if folder is not None and folder.is_dir() else None
        self._cache = _Cache(folder / "replies" / f"{label}.sqlite") if self._costs and folder else None

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def say(self, messages: Messages, seed: int, item: str = "", **more: Any) -> Said:
        """One reply. `more` goes into the request: a ``response_format``, ``logprobs``, another ``temperature``."""
        asking = self.asking
        body = {
            "model": asking.model,
            "messages": list(messages),
            "temperature": asking.temperature,
            "max_tokens": asking.max_tokens,
            "seed": seed,
            **more,
        }
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if self._cache is not None and (kept := self._cache.find(key)) is not None:
            return replace(self._read(kept), kept=True)
        started = time.monotonic()
        try:
            reply = self._endpoint.complete(body | {"model": self._served}, asking.retries)
        except RefusedRequest as error:
            self._cost(item, key, started, {}, "refused")
            return Said(reason="refused", detail=str(error))
        except EngineError as error:
            self._cost(item, key, started, {}, "no_reply")
            stop_if_gone(self._endpoint, asking.model, error)
            return Said(reason="no_reply", detail=str(error))
        self._cost(item, key, started, reply["usage"], "")
        if self._cache is not None:
            self._cache.add(key, reply)
        return self._read(reply)

    def _read(self, reply: Mapping[str, Any]) -> Said:
        choice = reply["choices"][0]
        text, limit = str(choice["message"]["content"]), self.asking.max_characters
        first = _first(choice.get("logprobs"))
        if len(text) > limit:
            return Said(text[:limit], "reply_long", f"{len(text)} characters where at most {limit} are read", first)
        if choice.get("finish_reason") == "length":
            return Said(text, "reply_cut", f"cut after {self.asking.max_tokens} tokens: …{text[-60:]!r}", first)
        return Said(text, first=first)

    def _cost(self, item: str, key: str, started: float, usage: Mapping[str, int], reason: str) -> None:
        if self._costs is None:
            return
        line: dict[str, Any] = {"stage": self.label, "model": self.asking.model, "item": item, "request": key[:16]}
        line |= {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")}
        append_line(self._costs, line | {"seconds": round(time.monotonic() - started, 3), "problem": reason})

    def asked(
        self,
        messages: Messages,
        seed: int,
        item: str,
        read: Callable[[Said], T | Unusable],
        **more: Any,
    ) -> T | Unusable:
        """What `read` makes of a reply; of the last one, where none of all tries was of use.

        Each try has a seed of its own, the same in every run. `more` as of :meth:`say`.
        """
        return self._tried(lambda: (messages, more), seed, item, read)

    def _tried(
        self, request: Callable[[], tuple[Messages, dict[str, Any]]], seed: int, item: str, read: Callable[[Said], Any]
    ) -> Any:
        left = self.asking.tries
        for attempt in count():
            messages, more = request()
            said = self.say(messages, seed + attempt, item, **more)
            if said.reason in ("no_reply", "refused"):
                return Unusable(said.reason, said.detail)  # the same request again would fare no better
            found = read(said)
            left -= not (said.kept and self.asking.again)
            if not isinstance(found, Unusable) or not left:
                return found
        raise AssertionError

    def tree(
        self,
        messages: Messages,
        schema: Mapping[str, Any],
        seed: int,
        item: str = "",
        check: Callable[[dict[str, Any]], tuple[str, str]] | None = None,
    ) -> dict[str, Any] | Unusable:
        """A reply as an object of `schema`. `check` gives a reason, and what was found, for an object that is of no
        use; then it is asked again as well."""
        return self.trees(lambda: (messages, schema), seed, item, check)

    def trees(
        self,
        request: Callable[[], tuple[Messages, Mapping[str, Any]]],
        seed: int,
        item: str = "",
        check: Callable[[dict[str, Any]], tuple[str, str]] | None = None,
    ) -> dict[str, Any] | Unusable:
        """As :meth:`tree`, with messages and a schema of its own for each try: what an earlier reply was good for need
        not be asked for again."""
        schema: Mapping[str, Any] = {}

        def form() -> tuple[Messages, dict[str, Any]]:
            nonlocal schema
            messages, schema = request()
            asked = {"name": "reply", "schema": dict(schema), "strict": True}
            return messages, {"response_format": {"type": "json_schema", "json_schema": asked}}

        def read(said: Said) -> dict[str, Any] | Unusable:
            if said.reason:
                return Unusable(said.reason, said.detail)
            found = read_object(said.text)
            if found is None:
                return Unusable("no_json", f"{said.text[:80]!r}")
            if wrong := misfit(found, schema):
                return Unusable("off_schema", wrong)
            reason, detail = check(found) if check else ("", "")
            return Unusable(reason, detail) if reason else found

        found: dict[str, Any] | Unusable = self._tried(form, seed, item, read)
        return found


def stop_if_gone(endpoint: Endpoint, model: str, error: EngineError) -> None:
    """Raise :class:`RunStopped` where `error` would meet every request: nobody is there, `model` is not, or not even a
    word can be asked."""
    try:
        served = endpoint.find(model)
        if isinstance(error, ClosedEndpoint):
            word = [{"role": "user", "content": "1"}]
            endpoint.complete({"model": served, "messages": word, "max_tokens": 1}, retries=0)
    except EngineError as again:
        raise RunStopped(str(error if isinstance(error, ClosedEndpoint) else again)) from error
    except RefusedRequest:
        pass


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a reply is, also in a fence or after its thinking; None for any other reply."""
    match = _FENCE.match(text)
    try:
        found = parse_json(match[1] if match else _THOUGHT.sub("", text))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def misfit(value: Any, schema: Mapping[str, Any], where: str = "reply") -> str:
    """Where `value` breaks a JSON schema of the keywords that our requests have; "" where it does not."""
    kind = schema.get("type")
    types: dict[Any, Any] = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}
    types["boolean"] = bool
    if kind in types and (not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return f"{where}: expected {kind}, found {value!r:.60}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where}: expected one of {', '.join(map(str, schema['enum']))}, found {value!r:.60}"
    if kind == "string" and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{where}: expected {schema.get('minLength', 0)} to {schema.get('maxLength')} characters"
    if kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where}: expected {schema.get('minItems', 0)} to {schema.get('maxItems')} entries"
        parts = ((one, schema.get("items", {}), f"{where}[{n}]") for n, one in enumerate(value))
        return next(filter(None, (misfit(*part) for part in parts)), "")
    if kind == "object":
        known = schema.get("properties", {})
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            return f"{where}: expected '{missing[0]}', found none"
        if schema.get("additionalProperties", True) is False and (strange := set(value) - set(known)):
            return f"{where}: '{min(strange)}' was not asked for"
        named = ((value[name], known[name], f"{where}.{name}") for name in known if name in value)
        return next(filter(None, (misfit(*part) for part in named)), "")
    return ""


def _first(logprobs: Any) -> dict[str, float] | None:
    """Log-probabilities of the candidates for the first token of a reply."""
    try:
        entries = logprobs["content"][0]["top_logprobs"]
        return {str(entry["token"]): float(entry["logprob"]) for entry in entries}
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def together(call: Callable[[T], R], items: Sequence[T], threads: int = 16) -> list[R]:
    """`call` of every item, several at a time, in order: a server answers many as fast as one."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(call, items))


def spent(folder: Path) -> dict[str, dict[str, float]]:
    """What the requests of each stage cost so far: requests, failed ones, tokens and seconds."""
    total: dict[str, dict[str, float]] = {}
    for line in read_lines(folder / COSTS):
        row = total.setdefault(str(line.get("stage")), dict.fromkeys(_COUNTED, 0.0))
        row["requests"] += 1
        row["failed"] += bool(line.get("problem"))
        for name in _COUNTED[2:]:
            row[name] += float(line.get(name, 0))
    return {stage: {name: round(value, 3) for name, value in row.items()} for stage, row in sorted(total.items())}


_COUNTED = ("requests", "failed", "prompt_tokens", "completion_tokens", "seconds")


class _Cache:
    """Replies by the hash of their request, in a file that several processes share.

    A full disk, or a file that was damaged, would meet every item: it raises :class:`RunStopped`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._store = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        self._do("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")

    def find(self, key: str) -> dict[str, Any] | None:
        row = self._do("SELECT reply FROM replies WHERE request = ?", key)
        return None if row is None else dict(json.loads(row[0]))

    def add(self, key: str, reply: Mapping[str, Any]) -> None:
        self._do("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, json.dumps({"choices": reply["choices"][:1]}))

    def _do(self, statement: str, *values: str) -> Any:
        try:
            with self._lock:
                return self._store.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:  # no space, no right to write, or a lock that nobody lets go of
            cure = "Mend that, and run the same command again: it goes on where it was."
            raise RunStopped(describe(str(self._path), "a disk to write on", str(error), cure)) from error
        except sqlite3.DatabaseError as error:
            cure = "Delete it, and run the same command again: what its stage still lacks is asked for anew."
            raise RunStopped(describe(str(self._path), "replies that an earlier run kept", str(error), cure)) from error

    def close(self) -> None:
        with self._lock:
            self._store.close()
