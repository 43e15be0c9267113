"""A language model at a real HTTP server that misbehaves in every way that we know, and one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio_llm.answering.server import EngineError
from audio_llm.errors import ConfigError
from data_prep.corpus import endpoint
from data_prep.corpus.endpoint import COSTS, Asking, Model, Unusable, misfit, read_object, spent, together
from data_prep.corpus.engines.base import raised
from data_prep.corpus.stage import RunStopped
from tests.servers import ChatServer, serving

SCHEMA = {
    "type": "object",
    "properties": {"question": {"type": "string", "minLength": 1, "maxLength": 20}},
    "required": ["question"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Word it."}]


class Bad(ChatServer):
    """Answers by what it is asked: the words of the user are the name of a fault."""

    def chat(self, body: dict[str, Any]) -> None:
        fault = body["messages"][-1]["content"]
        good = json.dumps({"question": f"Which {body['seed']}?"})
        if fault == "busy" or (fault == "busy once" and type(self).calls == 1):
            return self.reply(429, {"error": {"message": "slow down"}})
        if fault == "broken":
            return self.reply(500, {"error": {"message": "out of memory"}})
        if fault == "refused":
            return self.reply(400, {"error": {"message": "too long a prompt"}})
        if fault == "no completion":
            return self.reply(200, {"hello": []})
        if fault == "cut":
            return self.reply(200, {"choices": [{"message": {"content": good[:9]}, "finish_reason": "length"}]})
        if fault == "gone":
            self.connection.close()
            return None
        if fault == "good at the third":
            return self.answer(good if body["seed"] == 12 else "no")
        texts = {
            "long": json.dumps({"question": "x" * 500}),
            "no json": "Sure! Which animal is heard?",
            "half json": '{"question": "Which',
            "list": "[1, 2]",
            "other key": '{"answer": "dog"}',
            "number": '{"question": 7}',
            "more keys": '{"question": "Which?", "answer": "dog"}',
            "fenced": f"```json\n{good}\n```",
            "thought": f"<think>hm</think>\n{good}",
        }
        return self.answer(texts.get(fault, good))


def asked(url: str, fault: str, folder: Path | None = None, **keys: Any) -> tuple[Any, str, str]:
    how = {"tries": 3, "retries": 0, "max_characters": 400} | keys
    model = Model(Asking(url, "listener", **how), folder, "generate")
    found = model.tree([{"role": "user", "content": fault}], SCHEMA, seed=10, item="a")
    model.close()
    return (None, *found) if isinstance(found, Unusable) else (found, "", "")


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        *(("busy", "no_reply", 1), ("broken", "no_reply", 1), ("gone", "no_reply", 1), ("refused", "refused", 1)),
        *(("no completion", "no_reply", 1), ("cut", "reply_cut", 3), ("long", "reply_long", 3)),
        *(("no json", "no_json", 3), ("half json", "no_json", 3), ("list", "no_json", 3)),
        *(("other key", "off_schema", 3), ("number", "off_schema", 3), ("more keys", "off_schema", 3)),
    ],
)
def test_every_fault_is_bounded_and_has_its_reason(fault: str, reason: str, requests: int, tmp_path: Path) -> None:
    with serving(Bad) as url:
        tree, found, detail = asked(url, fault, tmp_path)
    assert (tree, found) == (None, reason) and detail and reason in endpoint.REASONS
    lines = [json.loads(line) for line in (tmp_path / COSTS).read_text().splitlines()]
    assert len(lines) == requests and all(line["stage"] == "generate" and line["item"] == "a" for line in lines)


@pytest.mark.parametrize(
    ("fault", "question"),
    [("good", "Which 10?"), ("fenced", "Which 10?"), ("thought", "Which 10?"), ("good at the third", "Which 12?")],
)
def test_a_good_reply_is_taken_at_whatever_try_it_comes(fault: str, question: str) -> None:
    with serving(Bad) as url:
        assert asked(url, fault) == ({"question": question}, "", "")


def test_a_server_that_is_not_there_or_serves_another_model_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(Bad) as url:
        with pytest.raises(
            EngineError, match="model: expected one of listener, found 'listner' \\(did you mean 'listener'"
        ):
            Model(Asking(url, "listner"))
        assert Model(Asking(url, "somebody/listener")).tree(ASK, SCHEMA, seed=1) == {"question": "Which 1?"}
    with pytest.raises(EngineError, match="Connection refused"):
        Model(Asking(url, "listener"))


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    with serving(Bad, calls=0) as url:
        assert asked(url, "busy once", retries=1)[0] == {"question": "Which 10?"}


def test_nothing_is_asked_twice_and_every_request_has_its_cost(tmp_path: Path) -> None:
    kind = type("Counting", (Bad,), {"calls": 0})
    with serving(kind) as url:
        first = asked(url, "good at the third", tmp_path)
        again = asked(url, "good at the third", tmp_path)
        other = asked(url, "good at the third", tmp_path, temperature=0.2)
    assert first == again == other and first[0]
    costs = spent(tmp_path)["generate"]
    assert (costs["requests"], costs["failed"]) == (6, 0)  # three and three: the second time from the disk
    assert (costs["prompt_tokens"], costs["completion_tokens"]) == (6 * 20, 6 * 7) and costs["seconds"] >= 0


def test_a_damaged_or_full_store_of_replies_stops_the_run_and_loses_no_item(tmp_path: Path) -> None:
    """As a reject, each item that is left would be lost: the disk is no fault of theirs."""
    with serving(Bad) as url:
        assert asked(url, "good", tmp_path)[0]
        store = tmp_path / "replies" / "generate.sqlite"
        whole = store.read_bytes()
        for damage in (b"no database" * 100, whole[:4096] + b"\xff" * 4096):
            store.write_bytes(damage)
            with pytest.raises(RunStopped, match=r"generate\.sqlite: expected replies.*Delete it"):
                asked(url, "good", tmp_path)
        store.unlink()
        assert asked(url, "good", tmp_path)[0]
        model = Model(Asking(url, "listener", retries=0), tmp_path, "generate")
        assert model._cache is not None
        model._cache._store.execute("PRAGMA max_page_count = 2")  # what SQLite says of a full disk
        with pytest.raises(RunStopped, match=r"expected a disk to write on, found database or disk is full\."):
            for seed in range(200):
                model.tree(ASK, SCHEMA, seed=seed)
        assert isinstance(raised(RunStopped("full")).value, RunStopped)


def test_a_later_run_goes_on_with_the_seeds_after_those_of_kept_replies(tmp_path: Path) -> None:
    with serving(Bad) as url:
        assert asked(url, "good at the third", tmp_path, tries=2)[1] == "no_json"
        assert asked(url, "good at the third", tmp_path, tries=2, again=True)[0] == {"question": "Which 12?"}
        assert asked(url, "good at the third", tmp_path, tries=1, again=True)[0] == {"question": "Which 12?"}
        assert spent(tmp_path)["generate"]["requests"] == 3  # seeds 10 and 11, then 12, then nothing
        assert asked(url, "no json", tmp_path)[1] == asked(url, "no json", tmp_path, again=True)[1] == "no_json"
    assert spent(tmp_path)["generate"]["requests"] == 9


def test_a_check_of_the_words_asks_again_and_its_reason_stays() -> None:
    def check(tree: dict[str, Any]) -> tuple[str, str]:
        return ("", "") if "11" in tree["question"] else ("slots_lost", tree["question"])

    with serving(Bad) as url:
        model = Model(Asking(url, "listener", tries=2, retries=0))
        assert model.tree(ASK, SCHEMA, seed=10, check=check) == {"question": "Which 11?"}
        assert model.tree(ASK, SCHEMA, seed=20, check=check) == ("slots_lost", "Which 21?")


@pytest.mark.parametrize(
    "keys",
    [{"url": "localhost"}, {"model": ""}, {"tries": 0}, {"retries": -1}, {"max_tokens": 0}, {"temperature": -1.0}],
)
def test_settings_that_cannot_be_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generate\.\w+: expected"):
        Asking(**{"url": "http://localhost:1", "model": "m"} | keys).check("generate")


def test_many_are_asked_at_once_in_order() -> None:
    assert together(lambda n: n * n, range(50)) == [n * n for n in range(50)]
    assert together(len, ["a"]) == [1] and together(len, []) == []


@given(st.text(max_size=40))
def test_reading_a_reply_never_fails(text: str) -> None:
    assert read_object(text) is None or isinstance(read_object(text), dict)


KINDS = [SCHEMA, {"type": "array", "items": SCHEMA, "maxItems": 2}, {"type": "number"}, {"type": "boolean"}]
TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=25)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["question", "a"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, st.sampled_from(KINDS))
def test_what_fits_a_schema_is_what_jsonschema_says(tree: Any, schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert (misfit(tree, schema) == "") == jsonschema.Draft202012Validator(schema).is_valid(tree)
