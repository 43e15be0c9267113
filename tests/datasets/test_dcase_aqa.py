"""DCASE 2025 task 5: reading the layout with its defects, and submissions that a validator accepts."""

from __future__ import annotations

import csv
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from audio_llm.datasets import dcase_aqa
from audio_llm.datasets.dcase_aqa import Answered
from audio_llm.errors import AudioError, DataError

RATE = 16_000


def tone(path: Path, hertz: float, *, mpeg: bool = False, seconds: float = 0.5) -> Path:
    """A sine, by name always a WAV file; `mpeg` writes MP3 data under that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)
    form = {"format": "MP3", "subtype": "MPEG_LAYER_III"} if mpeg else {"format": "WAV"}
    soundfile.write(path, samples, RATE, **form)
    return path


def ask(folder: Path, name: str, audio: str, answer: str | None, choices: list[str], **more: str) -> None:
    row = {"id": name, "audio_url": audio, "question": f"What is heard in {name}?", "choice": choices, **more}
    row |= {} if answer is None else {"answer": answer}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(row))


LETTERED = ["A. rain", "B. a dog, barking", "C. wind", "D. thunder"]


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Three parts; MP3 named WAV, a trailing comma, broken keys, two questions about one clip, a missing file."""
    audio = tmp_path / "audio" / "dev"
    tone(audio / "whale.wav", 200)
    tone(audio / "fold1_a.wav", 300)
    tone(audio / "audio_1.wav", 400, mpeg=True)
    (audio / "audio_2.wav").write_bytes((audio / "audio_1.wav").read_bytes())
    questions = tmp_path / "questions" / "dev"
    ask(questions, "q0", "../../audio/dev/whale.wav", "A. rain", LETTERED, question_type="species")
    ask(questions, "q1", "../../audio/dev/fold1_a.wav", "B. a dog, barking,", LETTERED, question_type="sound counting")
    ask(questions, "q2", "../../audio/dev/audio_1.wav", "C, A, B, D", LETTERED, question_type="both")
    ask(questions, "q3", "../../audio/dev/audio_2.wav", "B. wind", LETTERED, question_type="both")
    ask(questions, "q4", "../../audio/dev/audio_9.wav", "D. thunder", LETTERED, question_type="both")
    ask(questions, "q5", "../../audio/dev/audio_2.wav", "B. no", ["A. yes", "B. no"], question_type="remember")
    return tmp_path


def test_training_questions_are_not_read_with_those_of_another_split(dev: Path) -> None:
    assert len(dcase_aqa.read(dev / "questions").rows) == 6  # one split, in a folder below
    ask(dev / "questions" / "train", "t0", "../../audio/dev/whale.wav", "A. rain", LETTERED)
    with pytest.raises(DataError, match="the questions of one split, found dev, train"):
        dcase_aqa.read(dev / "questions")
    assert [row.id for row in dcase_aqa.read(dev / "questions" / "train").rows] == ["t0"]


def test_the_layout_is_read_with_its_defects_counted(dev: Path) -> None:
    found = dcase_aqa.read(dev / "questions" / "dev")
    assert [row.part for row in found.rows] == [1, 2, 3, 3, 3, 3]
    assert [row.answer for row in found.rows] == [0, 1, None, None, 3, 1]
    assert found.rows[1].choices == ("rain", "a dog, barking", "wind", "thunder")
    assert found.rows[1].gold == "a dog, barking"
    assert "none of the options" in found.rows[2].problem and "'B. wind'" in found.rows[3].problem
    assert found.counts == {
        "answer differs from its option by punctuation, case or spaces": 1,
        "answer is none of the options": 2,
        "MPEG audio named .wav": 2,
        "audio file missing": 1,
    }
    assert len(set(found.contents)) == 4, "two of the files hold the same bytes"
    assert found.contents[2] == found.contents[3] == found.contents[5]


def test_sound_is_decoded_by_content_whatever_its_name(dev: Path) -> None:
    found = dcase_aqa.read(dev / "questions" / "dev")
    wave = found.rows[2].waveform()
    spectrum = np.abs(np.fft.rfft(wave.samples[0]))
    assert wave.sample_rate == RATE
    assert abs(np.argmax(spectrum) * RATE / wave.num_samples - 400) < 5
    with pytest.raises(AudioError, match="audio_9.wav.*no such file"):
        found.rows[4].waveform()


def test_a_folder_of_audio_may_lie_elsewhere_and_splits_do_not_mix(dev: Path) -> None:
    tone(dev / "elsewhere" / "train" / "whale.wav", 700)
    tone(dev / "elsewhere" / "dev" / "whale.wav", 800)
    questions = dev / "far" / "dev"
    ask(questions, "q0", "audio/dev/whale.wav", "A. rain", LETTERED)
    (row,) = dcase_aqa.read(questions, dev / "elsewhere").rows
    assert row.audio == dev / "elsewhere" / "dev" / "whale.wav"


def test_clips_of_both_sides_are_found_by_their_bytes(dev: Path) -> None:
    tone(dev / "audio" / "train" / "audio_1.wav", 999)  # the name of another dev clip
    (dev / "audio" / "train" / "x.wav").write_bytes((dev / "audio" / "dev" / "fold1_a.wav").read_bytes())
    ask(dev / "questions" / "train", "t0", "../../audio/train/audio_1.wav", "A. rain", LETTERED)
    ask(dev / "questions" / "train", "t1", "../../audio/train/x.wav", "A. rain", LETTERED)
    train, held_out = (dcase_aqa.read(dev / "questions" / split) for split in ("train", "dev"))
    assert dcase_aqa.heard_in_both(train, held_out) == [1]


def test_clips_of_both_sides_are_found_inside_parquet_files(dev: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def table(name: str, clips: list[bytes | None]) -> dcase_aqa.Questions:
        columns = {
            "audio": arrow.array(clips, arrow.binary()),
            "question": ["Which?"] * len(clips),
            "choices": [["rain", "wind"]] * len(clips),
            "answer": ["A. rain"] * len(clips),
            "id": [f"{name}{n}" for n in range(len(clips))],
            "audio_url": [f"{n}.wav" for n in range(len(clips))],
            "question_type": ["both"] * len(clips),
        }
        parquet.write_table(arrow.table(columns), dev / f"{name}.parquet")
        return dcase_aqa.read(dev / f"{name}.parquet")

    whale, other = ((dev / "audio" / "dev" / name).read_bytes() for name in ("whale.wav", "audio_1.wav"))
    train, held_out = table("train", [whale, None]), table("dev", [other, whale, whale, None])
    assert dcase_aqa.heard_in_both(train, held_out) == [1, 2]
    assert held_out.contents[1] == held_out.contents[2] != held_out.contents[0]
    folder = dcase_aqa.read(dev / "questions" / "dev")
    assert dcase_aqa.heard_in_both(train, folder) == [0]
    assert dcase_aqa.heard_in_both(folder, held_out) == [0, 1, 2]


def test_one_file_of_all_questions_reads_alike(dev: Path) -> None:
    """The mirror's columns: choices without letters, the part under `subset`, sound inside the Parquet file."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = ["whale.wav", "fold1_a.wav", "audio_1.wav"]
    sounds = [(dev / "audio" / "dev" / name).read_bytes() for name in names]
    table = arrow.table(
        {
            "audio": [{"bytes": data, "path": name} for data, name in zip(sounds, names, strict=True)],
            "question_text": ["Which?"] * 3,
            "choices": [["rain", "wind"]] * 3,
            "answer": ["A. rain", "B. wind", "A. wind"],
            "id": ["a", "b", "c"],
            "audio_url": names,
            "question_type": ["both"] * 3,
            "subset": ["part1", "part2", "part3"],
        }
    )
    parquet.write_table(table, dev / "dev.parquet", row_group_size=2)
    found = dcase_aqa.read(dev / "dev.parquet")
    assert [(row.id, row.part, row.answer) for row in found.rows] == [("a", 1, 0), ("b", 2, 1), ("c", 3, None)]
    folder = dcase_aqa.read(dev / "questions" / "dev")
    for mine, theirs in zip(found.rows, folder.rows, strict=False):
        assert np.array_equal(mine.waveform().samples, theirs.waveform().samples)


def test_malformed_questions_are_named(tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 100)
    (tmp_path / "q").mkdir()
    path = tmp_path / "q" / "x.json"
    path.write_text('{"id": "x", ')
    with pytest.raises(DataError, match=r"x\.json: expected valid JSON"):
        dcase_aqa.read(tmp_path / "q")
    path.write_text(json.dumps({"id": "x", "audio_url": "../a.wav", "question": "?", "choises": ["A. b"]}))
    with pytest.raises(DataError, match="choises.*did you mean 'choises'"):
        dcase_aqa.read(tmp_path / "q")
    ask(tmp_path / "q", "x", "../a.wav", "A. b", ["A. b"])
    ask(tmp_path / "q", "y", "../a.wav", "A. b", ["A. b"], id="x")
    with pytest.raises(DataError, match="question 'x'.*occurs once"):
        dcase_aqa.read(tmp_path / "q")
    with pytest.raises(DataError, match="no such path"):
        dcase_aqa.read(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ submissions

ROWS = [
    Answered("part1_test_0000", "file0", ("A. rain", "B. a dog, barking"), 1),
    Answered("part2_test_0001", "file1", ('A. "quoted"', "B. two\nlines", "C. c"), 0),
    Answered("part3_test_0002", "file2", ("A. x", "B. y"), None),
]


@pytest.mark.parametrize("key", ["id", "stem"])
@pytest.mark.parametrize("answer", ["text", "letter"])
def test_a_submission_round_trips(tmp_path: Path, key: str, answer: str) -> None:
    label = "Seed_LAB_task5_1"
    meta = {"submission": {"name": "system"}, "system": {"complexity": {"total_parameters": 12}}}
    table, about, package = dcase_aqa.write_submission(ROWS, tmp_path, label=label, key=key, answer=answer, meta=meta)
    for path in (table, package):
        assert not dcase_aqa.validate_submission(path, ROWS, key=key, answer=answer, unanswered=True)
        assert len(dcase_aqa.validate_submission(path, ROWS, key=key, answer=answer)) == 1
    rows = list(csv.DictReader(table.open(newline="")))
    assert [row["question"] for row in rows] == [getattr(row, key) for row in ROWS]
    assert [row["answer"] for row in rows] == (
        ["B", "A", ""] if answer == "letter" else ["B. a dog, barking", 'A. "quoted"', ""]
    )
    assert yaml.safe_load(about.read_text())["submission"]["label"] == label
    with zipfile.ZipFile(package) as archive:
        assert sorted(archive.namelist()) == [f"{label}/{label}.meta.yaml", f"{label}/{label}.output.csv"]
    assert (
        package.read_bytes()
        == dcase_aqa.write_submission(ROWS, tmp_path / "again", label=label, key=key, answer=answer, meta=meta)[
            2
        ].read_bytes()
    )


def test_what_is_wrong_with_a_submission_is_said(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"

    def problems(text: str) -> list[str]:
        path.write_text(text)
        return dcase_aqa.validate_submission(path, ROWS[:2])

    good = 'question,answer\npart1_test_0000,A. rain\npart2_test_0001,"B. two\nlines"\n'
    assert problems(good) == []
    assert "expected question,answer" in problems(good.replace("question,answer", "id,answer"))[0]
    assert "1 missing, first 'part1_test_0000'" in problems(good.replace("part1_test_0000,A. rain\n", ""))[0]
    assert "one answer" in problems(good + "part1_test_0000,A. rain\n")[0]
    assert "one of the question's options" in problems(good.replace("A. rain", "C. c"))[0]
    assert "the id of a question" in problems(good + "file0,A. rain\n")[0]
    assert "2 fields" in problems(good.replace("A. rain", "A. rain,1"))[0]
    assert "cannot be read" in dcase_aqa.validate_submission(tmp_path / "none.csv", ROWS)[0]
    (tmp_path / "x.zip").write_bytes(b"PK nonsense")
    assert "cannot be read" in dcase_aqa.validate_submission(tmp_path / "x.zip", ROWS)[0]
    with pytest.raises(DataError, match="Surname_INST_task5_1"):
        dcase_aqa.write_submission(ROWS, tmp_path, label="mine")
    with pytest.raises(DataError, match="meta: system"):
        dcase_aqa.write_submission(ROWS, tmp_path, label="A_B_task5_1", meta={"system": 3})


def test_one_format_of_names_whatever_the_counts(dev: Path) -> None:
    """The fingerprint is of the question files' bytes and names, not of where they lie."""
    first = dcase_aqa.read(dev / "questions" / "dev").fingerprint
    (dev / "questions" / "dev").rename(dev / "moved")
    moved = dcase_aqa.read(dev / "moved")
    assert moved.fingerprint == first
    text = (dev / "moved" / "q0.json").read_text()
    (dev / "moved" / "q0.json").write_text(text.replace("q0?", "q0 ?"))
    assert dcase_aqa.read(dev / "moved").fingerprint != first
    assert Counter(row.part for row in moved.rows) == {1: 1, 2: 1, 3: 4}
