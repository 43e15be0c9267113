"""``retry``: whatever a model lost is asked for again, once that is wanted, and nothing else is."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from audio_llm import config as recipes
from audio_llm.errors import AudioLLMError, ConfigError
from data_prep.corpus.recipe import CorpusConfig
from data_prep.tasks.corpus import prepare
from tests.servers import ChatServer, serving

RATE = 16_000
# What is lost, where, and why, while the server is broken; by the class of a recording.
LOST = {
    "owl": ("classify", "no_yes_no"),
    "church bells": ("describe", "no_reply"),
    "horn": ("generate", "no_json"),
    "frog": ("judge", "no_reply"),
    "cat": ("judge", "reply_cut"),
}
PARTLY = {"drums": ("generate", "slots_lost"), "siren": ("judge", "refused")}  # one of two questions each
LABELS = (*LOST, *PARTLY, "rain")


class Moody(ChatServer):
    """A language model that does well; while it is `broken`, it loses what :data:`LOST` and :data:`PARTLY` say.

    It knows recordings by their class in the prompt; where there is the sound alone, by its level."""

    broken = True
    asked: ClassVar[list[tuple[str, int]]] = []  # what for, and the seed

    def chat(self, body: dict[str, Any]) -> None:
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        stage = {"A caption": "classify", "Describe i": "describe", "A question": "generate", "You check ": "judge"}
        what = stage[text[:9] if text[:9] in stage else text[:10]]
        answer = text.split("Answer: ")[1].split("\n")[0] if "Answer: " in text else ""
        found = [label for label in LABELS if f"'a {label}'" in text or label in answer or f"- label: {label}" in text]
        label = found[0] if found else LABELS[round(_peak(content) * 10) - 1]
        self.asked.append((f"{what} {label}", body["seed"]))
        bad = self.broken and (
            LOST.get(label, ("",))[0] == what or (PARTLY.get(label, ("",))[0] == what and answer == label)
        )
        if what == "classify":
            return self.yes(not bad)
        if what == "describe":
            return self.answer("" if bad else f"A sound of a {label}.")
        if what == "judge":
            if bad and label == "frog":
                return self.reply(503, {"error": {"message": "out of memory"}})
            if bad and label == "siren":
                return self.reply(400, {"error": {"message": "too long a prompt"}})
            whole = json.dumps({"reason": "It follows.", "valid": True})
            choice = {"message": {"content": whole[:9] if bad else whole}, "finish_reason": "length" if bad else "stop"}
            return self.reply(200, {"choices": [choice]})
        if bad and label == "horn":
            return self.answer("Sure, here it is:")
        tree = {
            "question": "Which one of these is to be heard?",
            "thinking": f"A ring of its own: {'it' if bad else answer}",
            "answer": f"Here, {answer}",
        }
        wanted = body["response_format"]["json_schema"]["schema"]["required"]
        return self.answer(json.dumps({name: tree[name] for name in wanted}))

    def yes(self, likely: bool) -> None:
        choice: dict[str, Any] = {"message": {"content": "Yes"}, "finish_reason": "length"}
        if likely:
            first = [{"token": "Yes", "logprob": math.log(0.9)}, {"token": "no", "logprob": math.log(0.1)}]
            choice["logprobs"] = {"content": [{"token": "Yes", "logprob": math.log(0.9), "top_logprobs": first}]}
        self.reply(200, {"choices": [choice]})


def _peak(content: Any) -> float:
    data = next(part["input_audio"]["data"] for part in content if part["type"] == "input_audio")
    return float(np.abs(soundfile.read(io.BytesIO(base64.b64decode(data)))[0]).max())


def made(folder: Path, url: str, **keys: Any) -> dict[str, Any]:
    at = {"url": url, "model": "listener", "retries": 0}
    skills = {"source": 1, "caption": 1}
    columns = {"audio": "filename", "id": "filename", "text": "caption", "label": "category"}
    generate = {
        "count": 2,
        "forms": {"choice": 1, "caption": 1},
        "skills": skills,
        "labels": ["bus", "saw", "hen", "tap"],
    }
    stages = {
        "classify": at | {"readers": ["model"]},
        "describe": at | {"labels": ["label"], "captions": [], "acoustic": False},
        "generate": at | generate | {"tries": 2},
        "judge": at | {"tries": 2},
    }
    source = {"name": "recordings", "format": "csv", "path": str(folder / "rows.csv"), "columns": columns}
    tree = {"corpus": "mine", "source": source, "stages": stages, "engine": {"name": "local", "workers": 1}}
    return prepare(recipes.build(CorpusConfig, tree | keys), folder / "out", quiet=True).manifest


def rejects(folder: Path) -> dict[str, tuple[str, str]]:
    lines = map(json.loads, (folder / "out" / "rejects.jsonl").open())
    return {LABELS[int(line["item"].split("-")[1][:2])]: (line["stage"], line["reason"]) for line in lines}


def questions(folder: Path) -> dict[str, int]:
    lines = map(json.loads, (folder / "out" / "items" / "judge.jsonl").open())
    return {LABELS[int(line["id"].split("-")[1][:2])]: len(line["fields"]["questions"]) for line in lines}


def test_what_a_model_lost_is_asked_for_again_where_that_is_wanted(tmp_path: Path) -> None:
    recorded(tmp_path, LABELS)
    kind = type("Counting", (Moody,), {"asked": []})
    log: list[tuple[str, int]] = kind.asked

    def calls() -> dict[str, list[int]]:
        """The seeds of the requests since the last call, by what they were for."""
        found: dict[str, list[int]] = {}
        for about, seed in log:
            found.setdefault(about, []).append(seed)
        log.clear()
        return found

    with serving(kind) as url:
        made(tmp_path, url)
        first = calls()
        assert rejects(tmp_path) == LOST
        assert questions(tmp_path) == {"drums": 1, "siren": 1, "rain": 2}
        made(tmp_path, url, engine={"name": "local", "workers": 2})  # not wanted: nobody is asked
        assert not calls()

        before = made(tmp_path, url, retry=True)["funnel"]  # wanted, and as broken as before
        again = calls()
        lost = {f"{stage} {label}" for label, (stage, _) in (LOST | PARTLY).items()}
        assert set(again) == lost and [row["computed"] for row in before[1:]] == [1, 1, 2, 3]
        for label in ("horn", "drums"):  # replies that are kept, so further seeds; two tries of each question
            first_seeds, further = first[f"generate {label}"], again[f"generate {label}"]
            assert len(set(further)) == len(further) and not set(further) & set(first_seeds)
        assert len(again["generate horn"]) == len(first["generate horn"])
        assert rejects(tmp_path) == LOST

        kind.broken = False
        after = made(tmp_path, url, retry=True)["funnel"]
        assert not rejects(tmp_path) and set(questions(tmp_path).values()) == {2} and len(questions(tmp_path)) == 8
        healed = calls()
        assert lost <= set(healed) and not [about for about in healed if "rain" in about]
        assert after[-1]["out"] == after[0]["in"] == len(LABELS)
        made(tmp_path, url, retry=True)  # nothing is lost any more
        assert not calls()


class Closing(Moody):
    """Does well until it has been asked so many questions; then it is shut in its way."""

    broken = False
    left: ClassVar[list[int]] = []  # one number: `serving` makes a class of its own of this one
    way = ""

    def do_GET(self) -> None:
        gone = self.left[0] <= 0 and self.way == "unloaded"
        self.reply(200, {"data": [{"id": "another" if gone else self.served}]})

    def chat(self, body: dict[str, Any]) -> None:
        self.left[0] -= 1
        if self.left[0] >= 0:
            return super().chat(body)
        self.asked.append(("shut", 0))
        code = {"key": 401, "unloaded": 404, "one": 403}[self.way]
        if self.way == "one" and body["max_tokens"] == 1:  # a gateway that forbids some questions
            return self.answer("1")
        return self.reply(code, {"error": {"message": "no more"}})


def recorded(folder: Path, labels: Sequence[str]) -> None:
    rows = ["filename,caption,category"]
    for number, label in enumerate(labels):
        samples = np.random.default_rng(number).uniform(-1, 1, RATE // 4)
        soundfile.write(folder / f"{number:02}.wav", samples * (number + 1) / 10 / np.abs(samples).max(), RATE)
        rows.append(f"{number:02}.wav,a {label},{label}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(("way", "moments"), [("key", (1, 3)), ("unloaded", (2, 4))])
def test_an_endpoint_that_refuses_everybody_stops_the_run_and_costs_no_item(
    tmp_path: Path, way: str, moments: tuple[int, int]
) -> None:
    """In any stage; what it answered is kept, and is not asked for again by the command that goes on."""
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
        recorded(tmp_path / name, LABELS[:2])
    whole = type("Closing", (Closing,), {"asked": [], "left": [10**9]})
    with serving(whole) as url:
        made(tmp_path / "whole", url)
    kind = type("Closing", (Closing,), {"asked": [], "way": way, "left": [0]})
    with serving(kind) as url:
        for left in moments:  # while it classifies, describes, generates or judges
            kind.left[0] = left
            with pytest.raises(AudioLLMError, match="HTTP 40[14]: no more|model: expected one of another"):
                made(tmp_path / "stopped", url)
        kind.left[0] = 10**9
        assert made(tmp_path / "stopped", url)["funnel"][-1]["out"] == 2
    assert not rejects(tmp_path / "stopped")
    assert sorted(about for about in kind.asked if about[0] != "shut") == sorted(whole.asked)


def test_an_endpoint_that_refuses_one_item_alone_costs_that_item(tmp_path: Path) -> None:
    recorded(tmp_path, LABELS[:2])
    kind = type("Closing", (Closing,), {"asked": [], "way": "one", "left": [1]})
    with serving(kind) as url:
        made(tmp_path, url)
    assert rejects(tmp_path) == {LABELS[0]: ("describe", "no_reply"), LABELS[1]: ("classify", "no_yes_no")}


def test_reasons_that_a_stage_does_not_have_cannot_be_retried(tmp_path: Path) -> None:
    stages = {"x": {"name": "tests.data_prep.corpus.stages:Forgetful"}}
    tree = {"corpus": "mine", "source": {"name": "recordings", "path": str(tmp_path)}, "stages": stages}
    with pytest.raises(ConfigError, match="stages.x: expected retryable ones among its reasons, found 'asleep'"):
        recipes.build(CorpusConfig, tree).check()
