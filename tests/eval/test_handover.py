"""Exported lmms-eval tasks: read as lmms-eval reads them, with the sound and the scores that we give ourselves."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from audio_llm.audio import Waveform, decode
from audio_llm.cli import main
from audio_llm.errors import AudioError, ConfigError, DataError
from eval import predictions
from eval.benchmarks.base import Collection, Item
from eval.lmms_export import audio_part, export_task, task_functions
from eval.predictions import Prediction
from eval.scorers import SCORERS
from tests.servers import Listener, serving


def collection(count: int = 6, channels: int = 2) -> Collection:
    rng = np.random.default_rng(0)
    layout = {1: "mono", 2: "stereo", 4: "foa"}[channels]
    waves = [Waveform(rng.uniform(-0.5, 0.5, (channels, 800)).astype(np.float32), 16_000, layout) for _ in range(count)]
    items = [
        Item(f"q{n}", f"Which is {n}?", ["rain", "wind"], "rain", "kind", "format", f"c{n // 2}", {"a": [n]})
        for n in range(count)
    ]
    return Collection(items, load=lambda index: waves[index // 2])  # two questions a clip


def loaded(folder: Path) -> dict[str, Any]:
    """The task's YAML with its functions, found as lmms-eval finds them."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Callable[..., Any]:
        module, name = str(loader.construct_scalar(node)).rsplit(".", 1)
        spec = importlib.util.spec_from_file_location(f"{folder.name}_{module}", folder / f"{module}.py")
        assert spec and spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return getattr(found, name)

    Loader.add_constructor("!function", function)
    (path,) = folder.glob("*.yaml")
    return yaml.load(path.read_text(), Loader=Loader)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_task_folder_holds_questions_sound_and_our_scorer(tmp_path: Path, channels: int) -> None:
    source = collection(channels=channels)
    exported = export_task(source, "audio_llm_test", tmp_path, scorer="option-resolution", title="Test")
    assert exported.questions == 6 and not exported.left_out
    moved = exported.folder.rename(tmp_path / "elsewhere")
    task = loaded(moved)
    assert task["task"] == "audio_llm_test" and task["metric_list"][0]["metric"] == "option-resolution"
    assert str(tmp_path) not in (moved / "audio_llm_test.yaml").read_text() + (moved / "utils.py").read_text()
    docs = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert len({doc["audio"] for doc in docs}) == 3 == len(list((moved / "audio").iterdir()))
    for index, doc in enumerate(docs):
        ((message),) = task["doc_to_messages"](doc)
        sound, text = message["content"]
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["url"].split(",")[1])), always_2d=True)
        assert rate == 16_000 and np.allclose(samples.T, source.waveform(index).samples, atol=2**-15)
        assert text["text"] == task["doc_to_text"](doc, {}) == f"Which is {index}?\nChoices:\n(A) rain\n(B) wind"
        (visual,) = task["doc_to_visual"](doc)
        assert np.allclose(np.atleast_2d(visual["array"].T), samples.T, atol=1e-6) and Path(visual["path"]).is_file()
        assert doc[task["doc_to_target"]] == "rain"
        for reply in ("B", "<think>wind</think><answer>rain</answer>", "(A) wind", ""):
            item = source.items[index]
            row = Prediction(item.id, "kind", "format", item.question, item.choices, item.gold, raw=reply)
            score = SCORERS["option-resolution"].score(row)
            assert score is not None
            assert task["process_results"](doc, [reply]) == {"option-resolution": score.value}


def test_a_letter_that_was_asked_for_is_read_as_one(tmp_path: Path) -> None:
    """A bare "C" is the third option where letters were asked for, and the chord where nothing was."""
    chords = Item("q", "Which chord is it?", ["C", "A", "G"], "G", "kind", "format", "clip")
    wave = Waveform(np.zeros((1, 800), np.float32), 16_000, "mono")
    for answer_as, value in (("letter", 1.0), (None, 0.0)):
        asked = Collection([chords], load=lambda index: wave).asked(None, answer_as)
        task = loaded(export_task(asked, "chords", tmp_path, scorer="option-resolution").folder)
        doc = json.loads((tmp_path / "chords" / "docs.jsonl").read_text())
        assert task["process_results"](doc, ["C"]) == {"option-resolution": value}
        assert ("letter" in task["doc_to_text"](doc)) == (answer_as == "letter")


def test_lmms_eval_leaves_the_replies_whole(tmp_path: Path) -> None:
    """Its defaults take the reasoning out, and end a reply at an empty line; a name may be a word that YAML knows."""
    task = loaded(export_task(collection(1), "off", tmp_path, scorer="mmau-official").folder)
    assert task["reasoning_tags"] == "none" and task["generation_kwargs"]["until"] == [] and task["task"] == "off"


def test_what_cannot_be_asked_is_left_out_and_listed(tmp_path: Path) -> None:
    source = collection()
    source.items[1] = Item("hidden", "?", ["a", "b"], "", "", "", "x")
    source.errors["q2"] = "no such file"
    load = source.load

    def broken(index: int) -> Waveform:
        if index == 3:
            raise AudioError("clip 3: expected sound, found noise.")
        assert load is not None
        return load(index)

    source.load = broken
    exported = export_task(source, "few", tmp_path, scorer="letter")
    assert exported.questions == 3
    assert exported.left_out == {
        "hidden": "its answer is not public",
        "q2": "no such file",
        "q3": "clip 3: expected sound, found noise.",
    }
    again = export_task(collection(2), "few", tmp_path, scorer="letter")
    assert again.questions == 2 and len((again.folder / "docs.jsonl").read_text().splitlines()) == 2


def test_what_cannot_be_exported_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task name"):
        export_task(collection(), "My Task", tmp_path, scorer="letter")
    with pytest.raises(ConfigError, match="did you mean 'letter'"):
        export_task(collection(), "t", tmp_path, scorer="leter")
    with pytest.raises(ConfigError, match="needs nobody else"):
        export_task(collection(), "t", tmp_path, scorer="judge")
    with pytest.raises(DataError, match="none: gone"):
        export_task(Collection(collection(1).items, {"q0": "gone"}), "t", tmp_path, scorer="letter")
    assert not list(tmp_path.iterdir())


def test_the_verb_exports_a_folder_of_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rain", "wind"):
        for number in range(2):
            path = tmp_path / "sounds" / name / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.random.default_rng(number).uniform(-0.1, 0.1, 400), 8000)
    command = ["export-tasks", str(tmp_path / "sounds"), "--benchmark", "zero_shot", "--out", str(tmp_path / "tasks")]
    assert main([*command, "--limit", "3", "--quiet"]) == 0
    assert "audio_llm_zero_shot: 3 questions" in capsys.readouterr().out
    task = loaded(tmp_path / "tasks" / "audio_llm_zero_shot")
    doc = json.loads((tmp_path / "tasks" / "audio_llm_zero_shot" / "docs.jsonl").read_text().splitlines()[0])
    assert task["process_results"](doc, [doc["answer"]]) == {"option-resolution": 1.0}
    assert main([*command, "--quiet", "--answer-as", "letter"]) == 0
    doc = json.loads((tmp_path / "tasks" / "audio_llm_zero_shot" / "docs.jsonl").read_text().splitlines()[0])
    assert doc["text"].endswith("Answer with the letter of one choice only.")
    for more, words in (
        (("--scorer", "nobody"), "nobody"),
        (("--limit", "-1"), "--limit: expected at least 1, found -1"),
        (("--limit", "2", "--seed", "-1"), "--seed: expected at least 0, found -1"),
    ):
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err


def test_levels_are_handed_over_as_they_are(tmp_path: Path) -> None:
    """Beyond full scale too: how loud a sound is tells how far away it is."""
    rng = np.random.default_rng(3)
    quiet = Waveform(rng.uniform(-0.9, 0.9, (2, 900)).astype(np.float32), 16_000, "binaural")
    loud = Waveform(quiet.samples * 4, 16_000, "binaural")
    item = Item("a", "On which side is it?", ["left", "right"], "left", "side", "t", "c")
    waves = [quiet, loud]
    collection = Collection([item, replace(item, id="b", clip="d")], load=lambda index: waves[index])
    folder = export_task(collection, "levels", tmp_path, scorer="option-resolution").folder
    visual = task_functions(folder, "option-resolution").visual
    for line, wave in zip((folder / "docs.jsonl").read_text().splitlines(), waves, strict=True):
        (heard,) = visual(json.loads(line))
        np.testing.assert_allclose(heard["array"].T, wave.samples, atol=2**-15)
    part = audio_part({"array": loud.samples, "sampling_rate": 16_000}, "doc")["input_audio"]
    np.testing.assert_array_equal(decode(base64.b64decode(part["data"])).samples, loud.samples)


def test_sound_of_other_peoples_tasks_is_sent_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for shape in ((900,), (900, 2), (2, 900), (4, 900)):
        array = rng.uniform(-0.9, 0.9, shape).astype(np.float32)
        part = audio_part({"array": array, "sampling_rate": 22_050, "path": "elsewhere.wav"}, "doc")["input_audio"]
        heard = decode(base64.b64decode(part["data"]))
        wide = np.atleast_2d(array if shape != (900, 2) else array.T)
        assert heard.sample_rate == 22_050 and np.allclose(heard.samples, wide, atol=2**-15)
    path = tmp_path / "a.flac"
    soundfile.write(path, rng.uniform(-0.5, 0.5, (500, 2)), 48_000)
    part = audio_part({"array": None, "path": str(path)}, "doc")["input_audio"]
    assert part["format"] == "flac" and base64.b64decode(part["data"]) == path.read_bytes()
    for wrong in ("a.wav", {"array": np.zeros((3, 900)), "sampling_rate": 8000}):
        with pytest.raises(AudioError, match="document 7"):
            audio_part(wrong, "document 7")


class Wordy(Listener):
    """Hears the louder channel, and thinks aloud of both sides, with empty lines."""

    def answer(self, text: str) -> None:
        super().answer(text.replace("noise", "Is it left?\n\nOr right?") + "\n\nSo it is.")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["audio_llm", "async_openai"])
@pytest.mark.parametrize("scorer", ["option-resolution", "mmau-official"])
def test_lmms_eval_gives_every_reply_our_score(tmp_path: Path, model: str, scorer: str) -> None:
    """Where lmms-eval is installed: its own command line on a folder that was moved, our model and its OpenAI model,
    against ``audio-llm eval`` of the same questions."""
    pytest.importorskip("lmms_eval")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        gains = np.array([0.5, 0.1]) if number % 2 else np.array([0.1, 0.5])
        soundfile.write(tmp_path / f"{number}.wav", rng.uniform(-1, 1, (800, 2)) * gains, 16_000)
        rows.append({"id": f"q{number}", "audio_id": f"{number}.wav", "question": "On which side is it?"})
        rows[-1] |= {"choices": ["left", "right"], "answer": "left" if number < 4 else "right", "task": "sound"}
        rows[-1] |= {"split": "test-mini", "difficulty": "easy", "sub-category": "Sides"}
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    data = [str(tmp_path / "mmau.json"), "--benchmark", "mmau", "--option", f"audio={tmp_path}"]
    assert main(["export-tasks", *data, "--out", str(tmp_path / "first"), "--task", "sides", "--scorer", scorer]) == 0
    (tmp_path / "first").rename(tmp_path / "tasks")
    with serving(Wordy) as address:
        run = str(tmp_path / "run")
        assert main(["eval", "listener", *data, "--engine", address, "--controls", "none", "--out", run]) == 0
        served = f"base_url={address}" if model == "audio_llm" else f"model=listener,base_url={address}/v1"
        command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", served, "--batch_size", "1"]
        command += ["--include_path", "tasks", "--tasks", "sides", "--log_samples", "--output_path", "out"]
        environment = os.environ | {"OPENAI_API_KEY": "none", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("*samples_sides.jsonl")
    found = {row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())}
    ours = predictions.read(run)
    assert [found[index]["filtered_resps"] for index in range(6)] == [row.raw for row in ours]
    scores = [SCORERS[scorer].score(row) for row in ours]
    assert [found[index][scorer] for index in range(6)] == [score and score.value for score in scores]
