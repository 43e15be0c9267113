"""What a real small language model is good for: wording what code decided, and not writing questions by itself.

The table of docs/corpus.md is what this test prints: ``pytest -m slow -s tests/data_prep/corpus/test_forms.py``.
``AUDIO_LLM_WEIGHTS`` names a folder with ``smollm2-135m``; without it, ``../shared/tools/pretrained.py`` makes one.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from audio_llm.cli import main
from audio_llm.serving.launcher import server_environment
from tests.paths import ROOT, SHARED

RECORDINGS = 32
TOKENS = 1536  # of a reply: more than the longest that the schema allows
REPLIES = ("no_reply", "refused", "reply_cut", "reply_long", "no_json", "off_schema")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if said := os.environ.get("AUDIO_LLM_WEIGHTS"):
        return Path(said) / "smollm2-135m"
    folder = tmp_path_factory.mktemp("weights")
    made = subprocess.run([sys.executable, str(SHARED / "tools" / "pretrained.py"), str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"the weights cannot be fetched: {made.stderr.decode()[-200:]}")
    return folder / "smollm2-135m"


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of SmolLM2-135M, alone on one thread."""
    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "4096", "--max-num-seqs", str(RECORDINGS), "--dtype", "bfloat16"]
    # A busy machine takes minutes for a step, after which vLLM would give itself up.
    environment = server_environment(True) | {"OMP_NUM_THREADS": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600"}
    environment.pop("VLLM_LOGGING_CONFIG_PATH", None)
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        try:
            for _ in range(900):
                if process.poll() is not None:
                    pytest.fail(log.read_text()[-2000:])
                try:
                    if requests.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except requests.RequestException:
                    pass
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def funnel(folder: Path, server: str, mode: str) -> dict[str, Any]:
    """What became of the recordings, by stage."""
    with open(ROOT / "recipes" / "corpus" / "tiny_captions.csv", newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["planted"]]
    labels = sorted({row["label"] for row in rows})
    chosen = [[row for row in rows if row["label"] == label][number] for number in range(4) for label in labels]
    table = folder / "rows.csv"
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(chosen[:RECORDINGS])
    columns = {"audio": "filename", "id": "filename", "text": "caption", "label": "label", "group": "recording"}
    generate: dict[str, Any] = {"mode": mode, "forms": {"choice": 4, "open": 1, "caption": 1}, "tries": 3}
    generate |= {"skills": {"source": 4, "presence": 2, "caption": 1}} if mode == "slots" else {}
    generate |= {"url": server, "model": "smollm2", "max_tokens": TOKENS, "batch": RECORDINGS, "timeout": 3600}
    tree = {
        "verb": "prep",
        "kind": "corpus",
        "corpus": mode,
        "source": {
            "name": "recordings",
            "format": "csv",
            "path": str(table),
            "root": str(SHARED / "data" / "esc10" / "audio"),
            "columns": columns,
        },
        "stages": {
            "cut": {"max_seconds": 10.0},
            "describe": {"labels": ["label"], "captions": ["text"]},
            "generate": generate,
            "verify": {"thinking_words": [8, 80]},
        },
        "engine": {"name": "local", "workers": 1},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert main(["prep", str(recipe), str(folder / "out"), "--quiet"]) == 0
    stages = {stage["stage"]: stage for stage in json.loads((folder / "out" / "funnel.json").read_text())["stages"]}
    asked = [json.loads(line) for line in (folder / "out" / "costs.jsonl").read_text().splitlines()]
    tokens = [line["completion_tokens"] for line in asked if line.get("completion_tokens")]
    lines = (folder / "out" / "items" / "verify.jsonl").read_text().splitlines()
    questions = [question for line in lines for question in json.loads(line)["fields"]["questions"]]
    return {"stages": stages, "tokens": tokens, "questions": questions}


@pytest.mark.slow
@pytest.mark.shared("data/esc10")
def test_code_rejects_what_the_model_writes_freely_and_keeps_most_of_what_it_words(server, tmp_path, capsys) -> None:
    kept, told = {}, {}
    for mode in ("slots", "free"):
        folder = tmp_path / mode
        folder.mkdir()
        found = funnel(folder, server, mode)
        stages = found["stages"]
        rejects = Counter(stages["generate"]["rejects"]) + Counter(stages["verify"]["rejects"])
        assert stages["describe"]["out"] == RECORDINGS == stages["verify"]["out"] + rejects.total()
        assert not {"reply_cut", "reply_long", "no_reply", "refused"} & set(rejects)  # no limit decides
        for question in found["questions"]:  # none of our own words stand in for the model's
            assert question["written_by"]["question"] == question["written_by"]["thinking"] == "smollm2"
        kept[mode] = stages["verify"]["out"]
        told[mode] = rejects
        with capsys.disabled():
            print(f"\n{mode}: {kept[mode]} of {RECORDINGS} kept; {dict(rejects.most_common())}; ", end="")
            print(
                f"{len(found['tokens'])} replies of {sum(found['tokens'])} tokens, the longest {max(found['tokens'])}"
            )
    assert kept["free"] <= 0.1 * RECORDINGS and kept["slots"] > 0.5 * RECORDINGS
    assert told["free"].total() - sum(told["free"][reason] for reason in REPLIES) >= 0.9 * RECORDINGS
