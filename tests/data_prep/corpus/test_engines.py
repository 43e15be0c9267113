"""Engines beside each other, through every stage up to the shards: any of them, any number of workers, killed at any
moment, gives the same bytes, and a model behind an address is asked once for each item."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from audio_llm import config as recipes
from audio_llm.errors import ConfigError
from data_prep.corpus.recipe import CorpusConfig
from data_prep.tasks.corpus import prepare
from tests.paths import ROOT
from tests.servers import ChatServer, serving

RATE = 16_000
LABELS = ("dog", "rain", "church bells", "siren", "engine", "frog", "clapping")
SIDES = ("sft", "test")
LEDGERS = ("note", "cut", "describe", "generate", "verify")


class Writer(ChatServer):
    """A language model that words what it is asked to, and counts for whom; it takes its time."""

    pause = 0.0
    asked: ClassVar[list[str]] = []

    def chat(self, body: dict[str, Any]) -> None:
        text = body["messages"][-1]["content"]
        self.asked.append(f"{body['seed']} {text}")
        time.sleep(self.pause)
        question, answer = (text.split(f"{name}: ")[1].split("\n")[0] for name in ("Question", "Answer"))
        tree = {"question": f"Listen: {question}", "thinking": f"It rings in a way of its own, hence {answer}"}
        with contextlib.suppress(ConnectionError):  # who asked was killed
            self.answer(json.dumps(tree))


def recordings(folder: Path, texts: list[str]) -> None:
    """A short noise each, with its text and a class."""
    rows = ["filename,caption,category"]
    for number, text in enumerate(texts):
        samples = np.random.default_rng(number).normal(0, 0.1, RATE // 8)
        soundfile.write(folder / f"{number:03}.wav", samples, RATE)
        rows.append(f"{number:03}.wav,{text},{LABELS[number % len(LABELS)]}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")


def recipe(folder: Path, engine: dict[str, Any], running: dict[str, Any], **generate: Any) -> dict[str, Any]:
    columns = {"audio": "filename", "id": "filename", "text": "caption", "label": "category"}
    note = {"name": "tests.data_prep.corpus.stages:Note", "log": str(folder / "log")}
    stages: dict[str, dict[str, Any]] = {
        "note": note,
        "cut": {},
        "describe": {"labels": ["label"], "captions": [], "acoustic": False},
        "generate": {"skills": {"source": 1}, "retries": 0, "tries": 1} | generate,
        "verify": {},
    }
    source = {"name": "recordings", "format": "csv", "path": str(folder / "rows.csv"), "columns": columns}
    stages = {name: keys | running for name, keys in stages.items()}
    pack = {"splits": {"sft": 0.7, "test": 0.3}, "samples_per_shard": 16}
    return {"corpus": "mine", "source": source, "stages": stages | {"pack": pack}, "engine": engine}


def made(folder: Path, out: str, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The funnel, without what differs from run to run."""
    rows = prepare(recipes.build(CorpusConfig, tree), folder / out, quiet=True).manifest["funnel"]
    return [{name: row[name] for name in ("stage", "in", "out", "rejects")} for row in rows]


def left(out: Path) -> dict[str, bytes]:
    """Shards and their sums, clips, what came out of each stage, and the rejects. Without indexes, which know shards by
    their times and are made of them anew, and without what a killed process had half written."""
    files = [path for name in (*SIDES, "items", "clips") for path in sorted((out / name).rglob("*.*"))]
    files = [path for path in files if path.suffix not in (".npz", ".tmp")] + [out / "rejects.jsonl"]
    assert sum(path.suffix == ".tar" for path in files) > 2
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


RAY = importlib.util.find_spec("ray") is not None
ENGINES: dict[str, dict[str, Any]] = {"local": {"name": "local", "workers": 2}, "ray": {"name": "ray", "workers": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.skipif(not RAY, reason="no Ray"))])
def test_a_run_that_is_killed_twenty_times_asks_nothing_twice(engine: str, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments, from the first stage to the shards."""
    items, workers = 300, 2
    recordings(tmp_path, [f"text {number}" for number in range(items)])
    command = [
        sys.executable,
        "-m",
        "audio_llm",
        "prep",
        "--quiet",
        *map(str, (tmp_path / "recipe.yaml", tmp_path / "out")),
    ]
    with serving(Writer, pause=0.03) as url:
        Writer.asked.clear()
        tree = recipe(tmp_path, ENGINES[engine], {"cpus": 0.5}, url=url, model="listener")
        whole = made(tmp_path, "whole", tree)
        assert whole[-1]["out"] == items == len(Writer.asked)
        (tmp_path / "recipe.yaml").write_text(json.dumps({"verb": "prep", "kind": "corpus"} | tree))
        Writer.asked.clear()
        draw = random.Random(0)
        moments = [*sorted(draw.sample(range(1, items * len(LEDGERS)), 18)), items * len(LEDGERS), items * len(LEDGERS)]
        killed = 0
        for moment in moments:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            goal, deadline = max(moment, done(tmp_path) + 1), time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if done(tmp_path) >= goal or (goal > items * len(LEDGERS) and (tmp_path / "out" / "sft").exists()):
                    time.sleep(draw.random() * 0.05)
                    break
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        assert killed >= 18
        assert made(tmp_path, "out", tree) == whole
    assert left(tmp_path / "out") == left(tmp_path / "whole")
    asked = Counter(Writer.asked)
    # A worker has one call of one item at a time in hand, and what it learnt is kept at once.
    print(f"{engine}: {items} items, {killed} kills, {sum(asked.values())} calls")
    assert len(asked) == items and sum(asked.values()) <= items + killed * workers


def done(folder: Path) -> int:
    """Lines in all ledgers."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "out" / "ledger").glob("*.jsonl"))


@pytest.mark.slow
def test_any_engine_with_any_number_of_workers_gives_the_same_shards(tmp_path: Path) -> None:
    """Also where an item raises, one hangs and one kills its worker: three rejects, and the run goes on."""
    bad = {7: "raise", 11: "hang", 20: "die"}
    recordings(tmp_path, [bad.get(number, f"text {number}") for number in range(40)])
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        str(workers): ({"name": "local", "workers": workers}, {"batch": batch, "timeout": 4})
        for workers, batch in ((1, 1), (2, 3), (4, 2))
    }
    runs["ray"] = (ENGINES["ray"], {"cpus": 0.5, "batch": 2, "timeout": 4})
    if not RAY:
        del runs["ray"]
    found = {name: (made(tmp_path, name, recipe(tmp_path, *how)), left(tmp_path / name)) for name, how in runs.items()}
    funnel, files = found["1"]
    assert funnel[1]["rejects"] == {"raised": 1, "timeout": 1, "worker_died": 1} and funnel[-1]["out"] == 37
    for name, other in found.items():
        assert other == (funnel, files), name
    if RAY:
        with pytest.raises(ConfigError, match="stages.note: expected at most 0 GPU"):
            made(tmp_path, "gpu", recipe(tmp_path, {"name": "ray"}, {"gpus": 0.5}))
