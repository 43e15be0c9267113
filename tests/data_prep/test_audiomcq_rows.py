"""Thirty training rows of DCASE 2026 task 5, as AudioMCQ lays them out, with everything that may be wrong with one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import soundfile

from audio_llm import config as recipes
from tests.data_prep.manifest_tools import made, noise, rejected, samples, wav, write_lines
from tests.paths import ROOT

RECIPE = ROOT / "recipes" / "manifest" / "audiomcq.yaml"

CHOICES = ["Applause", "A tram", "Rain", "Nothing"]


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for number in range(30):
        row = {"id": f"q{number:02}", "source_dataset": "Clotho", "question_type": "sound"}
        row |= {"audio_path": f"Clotho/{number:02}.wav", "question": f"What is heard in {number}?", "choices": CHOICES}
        found.append(row | {"answer": CHOICES[number % 4], "gemini_cot": f"I hear {CHOICES[number % 4].lower()}."})
        if number != 6:
            wav(folder / str(row["audio_path"]), number)
    found[1]["answer"] = "A train"  # none of the choices
    found[2]["choices"] = ["Rain", "rain ", "A tram"]
    found[3] |= {"choices": ["ship (/ʃɪp/)", "sheep (/ʃiːp/)"], "answer": "sheep (/ʃiːp/)"}
    found[4]["audio_path"] = "Clotho/04.mp3"
    soundfile.write(folder / "Clotho/04.mp3", noise(4), 16_000, format="MP3")
    found[5]["gemini_cot"] = ""
    found[7]["id"] = "q08"
    found[9]["audio_path"] = "../../etc/passwd"
    found[10]["choices"] = ["Rain"]
    del found[11]["question"]
    (folder / "Clotho/12.wav").write_bytes(b"no sound")
    stereo = io.BytesIO()
    soundfile.write(stereo, noise(13).repeat(2, axis=1), 44_100, format="WAV")
    (folder / "Clotho/13.wav").write_bytes(stereo.getvalue())
    found[14]["answer"] = None
    found[15]["audio-contribution"] = "strong"
    return found


BY_LINE = {
    2: "answer_no_choice",
    3: "equal_choices",
    7: "no_such_file",
    9: "duplicate_id",
    10: "outside_root",
    11: "one_choice",
    12: "no_question",
    13: "not_audio",
    15: "no_answer",
}


def test_training_rows_and_every_defect(tmp_path: Path) -> None:
    """By the keys of the recipe: what is wrong is rejected by its reason, what is merely odd is heard as it is."""
    folder = tmp_path / "AudioMCQ"
    path = write_lines(folder / "data.jsonl", rows(folder))
    recipe = recipes.read(RECIPE)
    how = {key: recipe[key] for key in ("format", "keep", "audio")}
    manifest = made(tmp_path, path=str(path), max_reject_share=1.0, **how)
    assert rejected(tmp_path) == {f"data.jsonl: line {line}": reason for line, reason in BY_LINE.items()}
    assert manifest["rows"] == 30 and manifest["subsets"]["train"]["samples"] == 30 - len(BY_LINE)
    found = {sample.id.rpartition("-")[2]: sample for sample in samples(tmp_path)}
    assert found["q03"].answer == "sheep (/ʃiːp/)" and found["q03"].task == "choice"
    assert found["q00"].thinking == "I hear applause." and not found["q05"].thinking
    assert found["q15"].meta["audio-contribution"] == "strong" and "audio-contribution" not in found["q16"].meta
    assert found["q16"].meta["source_dataset"] == "Clotho" and found["q16"].meta["question_type"] == "sound"
    for name in ("q04", "q13"):  # MP3; two channels at 44,100 Hz
        (info,) = found[name].audio
        assert info.channels == 1 and info.sample_rate == 16_000, name
