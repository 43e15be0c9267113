"""Rows about several sounds: the formats that state them, where they stand in the words, splits, and the way back."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_llm.cli import main
from audio_llm.errors import DataError
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.splits import joined
from data_prep.manifest.sides import draw
from tests.data_prep.manifest_tools import RATE, made, noise, rejected, samples, wav, write_lines

# (sounds, question, where they stand in it, answer)
ASKED = [
    (["a.wav"], "What is it?", [], "noise"),
    (["a.wav", "b.wav"], "Which is louder?", [], "the second"),
    (["b.wav", "a.wav", "c.wav"], "First:  Second: , and third: . Which differs?", [7, 16, 30], "the third"),
]


def json_lines(folder: Path) -> dict[str, Any]:
    rows = [
        {
            "id": f"q{n}",
            "audio": heard if n else heard[0],
            "question": asked,
            "answer": answer,
            "places": places or None,
        }
        for n, (heard, asked, places, answer) in enumerate(ASKED)
    ]
    return {"format": "jsonl", "path": write_lines(folder / "rows.jsonl", rows)}


def columns(folder: Path) -> dict[str, Any]:
    with open(folder / "rows.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "one", "two", "three", "question", "answer", "places"])
        for n, (heard, asked, places, answer) in enumerate(ASKED):
            table.writerow([f"q{n}", *heard, *[""] * (3 - len(heard)), asked, answer, places or ""])
    return {"format": "csv", "path": folder / "rows.csv", "columns": {"audio": ["one", "two", "three"]}}


def separated(folder: Path) -> dict[str, Any]:
    with open(folder / "rows.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "audio", "question", "answer", "places"])
        for n, (heard, asked, places, answer) in enumerate(ASKED):
            table.writerow([f"q{n}", "; ".join(heard), asked, answer, places or ""])
    return {"format": "csv", "path": folder / "rows.csv", "audio_separator": ";"}


def _marked(asked: str, places: list[int], sounds: int, mark: str = "<audio>") -> str:
    parts = [asked[a:b] for a, b in zip([0, *places], [*places, len(asked)], strict=True)]
    return mark.join(parts) if places else mark * sounds + asked


def swift(folder: Path) -> dict[str, Any]:
    """ms-swift's rows: marks in the text, the sounds in a column."""
    rows = []
    for n, (heard, asked, places, answer) in enumerate(ASKED):
        user = {"role": "user", "content": _marked(asked, places, len(heard))}
        rows.append({"id": f"q{n}", "messages": [user, {"role": "assistant", "content": answer}], "audios": heard})
    return {"format": "chat", "path": write_lines(folder / "rows.jsonl", rows)}


def swift_without_marks(folder: Path) -> dict[str, Any]:
    """Without marks the sounds stand in front; only the last row says where its own stand."""
    made = swift(folder)
    path = folder / "rows.jsonl"
    head, body = path.read_text().replace("<audio>", "", 3).splitlines()[:2], path.read_text().splitlines()[2:]
    path.write_text("\n".join([*head, *body]) + "\n")
    return made


def trl(folder: Path) -> dict[str, Any]:
    """TRL's: parts of a message, each sound in its part or in a column."""
    rows: list[dict[str, Any]] = []
    for n, (heard, asked, places, answer) in enumerate(ASKED):
        parts: list[dict[str, Any]] = []
        if n < 2:
            sounds = [{"type": "audio", "audio": name} if n else {"type": "audio"} for name in heard]
            parts = [*sounds, {"type": "text", "text": asked}]
        else:  # texts of one message are lines: the marks of ms-swift stand within one
            parts = [{"type": "text", "text": _marked(asked, places, len(heard))}]
        asked_for = [{"role": "user", "content": parts}]
        rows.append({"id": f"q{n}", "prompt": asked_for, "completion": [{"role": "assistant", "content": answer}]})
        rows[-1] |= {} if n == 1 else {"audios": heard}
    return {"format": "chat", "path": write_lines(folder / "rows.jsonl", rows)}


FORMS = [json_lines, columns, separated, swift, swift_without_marks, trl]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_samples(form: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        wav(tmp_path / f"{name}.wav", number, channels=1 + (name == "c"))
    made(tmp_path, **form(tmp_path))
    dataset, found = ShardDataset(tmp_path / "out" / "train"), samples(tmp_path)
    assert [(s.id, s.question, s.places, s.answer) for s in found] == [
        (f"mine-q{n}", asked, places, answer) for n, (_, asked, places, answer) in enumerate(ASKED)
    ]
    assert [sample.recordings for sample in found] == [[f"mine/{name}" for name in heard] for heard, *_ in ASKED]
    for number, (heard, *_) in enumerate(ASKED):
        for wave, name in zip(dataset.load_waveforms(number), heard, strict=True):
            stored = np.round(32768 * noise("abc".index(name[0]), channels=1 + (name == "c.wav"))) / 32768
            np.testing.assert_array_equal(wave.samples, stored.T.astype(np.float32))


def test_parts_between_words_stand_there(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1), wav(tmp_path / "b.wav", 2)
    parts = [
        {"type": "text", "text": "Here"},
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "and here"},
        {"type": "audio", "audio": "b.wav"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "the same"}]}
    made(tmp_path, format="chat", path=str(write_lines(tmp_path / "rows.jsonl", [row])))
    (sample,) = samples(tmp_path)
    assert (sample.question, sample.places) == ("Here\nand here", [5, 13])


GOOD = {"audio": ["a.wav", "b.wav"], "question": "Which?", "answer": "the first"}
USER, REPLY = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "the first"}
DEFECTS: list[tuple[dict[str, Any], str]] = [
    ({"audio": ["a.wav", "gone.wav"]}, "no_such_file"),
    ({"audio": ["a.wav", ""]}, "no_sound_named"),
    ({"audio": ["a.wav", None, "b.wav"]}, "no_sound_named"),
    ({"audio": ["a.wav", "../b.wav"]}, "outside_root"),
    ({"audio": ["a.wav", 7]}, "wrong_type"),
    ({"audio": ["a.wav", "silent.wav"]}, "silent"),
    ({"audio": ["a.wav", "stereo.wav"]}, "channels"),
    ({"audio": ["a.wav"] * 4}, "several_sounds"),
    ({"start": 0.1}, "bad_time"),
    ({"start": [0.1, "x"]}, "bad_time"),
    ({"start": [0.0, 0.1], "end": [0.1, 0.05]}, "end_before_start"),
    ({"end": [0.1, 9.0]}, "beyond_the_sound"),
    ({"places": [1]}, "wrong_type"),
    ({"places": [3, 1]}, "wrong_type"),
    ({"places": [0, 99]}, "wrong_type"),
    ({"places": "x"}, "wrong_type"),
]


def test_what_is_wrong_with_one_sound_rejects_the_row(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1), wav(tmp_path / "b.wav", 2), wav(tmp_path / "stereo.wav", 3, channels=2)
    import soundfile

    soundfile.write(tmp_path / "silent.wav", np.zeros(3200), RATE)
    rows = [GOOD | {"question": f"Which, {number}?"} | defect for number, (defect, _) in enumerate(DEFECTS)]
    path = write_lines(tmp_path / "rows.jsonl", [GOOD, *rows])
    how = {"audio": {"max_sounds": 3, "layouts": ["mono"]}, "max_reject_share": 1.0}
    made(tmp_path, format="jsonl", path=str(path), **how)
    expected = {f"rows.jsonl: line {number + 2}": reason for number, (_, reason) in enumerate(DEFECTS)}
    assert rejected(tmp_path) == expected and len(samples(tmp_path)) == 1


def test_marks_that_do_not_fit_the_sounds(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1), wav(tmp_path / "b.wav", 2)
    parts = [{"type": "audio", "audio": "a.wav"}, {"type": "audio"}, {"type": "text", "text": "Which?"}]
    chats = [
        {"messages": [USER | {"content": "<audio>Which?"}, REPLY], "audios": ["a.wav", "b.wav"]},
        {"messages": [USER | {"content": "<audio><audio><audio>Which?"}, REPLY], "audios": ["a.wav", "b.wav"]},
        {"messages": [USER | {"content": parts}, REPLY], "audios": ["b.wav"]},  # which comes first is not told
        {"messages": [USER | {"content": parts[1:]}, REPLY], "audios": ["a.wav", "b.wav"]},
        {"messages": [USER, REPLY], "audios": ["a.wav", "b.wav"]},
    ]
    path = write_lines(tmp_path / "rows.jsonl", chats)
    made(tmp_path, format="chat", path=str(path), max_reject_share=1.0)
    assert list(rejected(tmp_path).values()) == ["marks"] * 4 and len(samples(tmp_path)) == 1


def test_a_stretch_of_each_sound(tmp_path: Path) -> None:
    """Cut apart; a whole sound beside a stretch; what tells the sounds is that of the whole ones."""
    wav(tmp_path / "a.wav", 1), wav(tmp_path / "b.wav", 2)
    rows = [GOOD | {"start": [0.1, 0.05], "end": [None, 0.1]}, GOOD | {"question": "And now?", "end": [0.2, 0.15]}]
    made(tmp_path, format="jsonl", path=str(write_lines(tmp_path / "rows.jsonl", rows)))
    dataset = ShardDataset(tmp_path / "out" / "train")
    whole = [np.round(32768 * noise(seed)).T.astype(np.float32) / 32768 for seed in (1, 2)]
    for number, cuts in enumerate([((1600, 3200), (800, 1600)), ((0, 3200), (0, 2400))]):
        for wave, sound, (first, last) in zip(dataset.load_waveforms(number), whole, cuts, strict=True):
            np.testing.assert_array_equal(wave.samples, sound[:, first:last])
    contents = [sample.meta["sound"] for sample in samples(tmp_path)]
    assert contents[0] == contents[1] and len(set(contents[0])) == 2


# ------------------------------------------------------------------------------------------------ splits


def test_no_recording_lies_on_two_sides(tmp_path: Path) -> None:
    """Rows pair sounds at random within small families: whatever is drawn, a family stays whole."""
    for number in range(24):
        wav(tmp_path / f"{number}.wav", number, 0.06)
    rng = np.random.default_rng(0)
    for trial in range(4):
        rows = []
        for number in range(60):
            family = int(rng.integers(8))
            heard = [f"{3 * family + int(part)}.wav" for part in rng.integers(3, size=rng.integers(1, 4))]
            rows.append({"audio": heard, "question": f"What, {number}?", "answer": "noise"})
        path = write_lines(tmp_path / f"{trial}.jsonl", rows)
        out = tmp_path / str(trial)
        made(out, format="jsonl", path=str(path), splits={"train": 0.6, "test": 0.4}, seed=trial)
        sides = [{r for s in samples(out, name) for r in s.recordings} for name in ("train", "test")]
        assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_rows_of_one_sound_are_divided_as_ever() -> None:
    names = [f"clip-{number}" for number in range(50)]
    whole = joined([[name] for name in names])
    assert whole == {name: name for name in names}
    shares = {"train": 0.8, "test": 0.2}
    assert draw(list(whole.values()), shares, 3) == draw(names, shares, 3)
    assert joined([["c", "b"], ["d"], ["b", "a"], ["e", "d"]]) == dict(a="a", b="a", c="a", d="d", e="d")


def test_sounds_that_all_hang_together_cannot_be_divided(tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        wav(tmp_path / f"{number}.wav", number)
        rows.append(GOOD | {"audio": [f"{number}.wav", f"{(number + 1) % 6}.wav"]})
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"none, of 6 rows in 6 groups, 1 of them apart.*make rows of sounds of one side"
    ):
        made(tmp_path, format="jsonl", path=str(path), splits={"train": 0.5, "test": 0.5})
    sided = [row | {"side": "train" if number < 3 else "test"} for number, row in enumerate(rows)]
    path = write_lines(tmp_path / "rows.jsonl", sided)
    by_value = {"splits": {"train": ["train"], "test": ["test"]}, "columns": {"split": "side"}}
    with pytest.raises(DataError, match=r"'3.wav': expected only in train, found in test as well"):
        made(tmp_path, format="jsonl", path=str(path), **by_value)


def test_a_copy_of_one_sound_is_found_on_the_other_side(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("copy", 2), ("d", 4)):
        wav(tmp_path / f"{name}.wav", seed)
    rows = [
        {"audio": ["a.wav", "b.wav"], "question": "Which?", "answer": "the first", "side": "train"},
        {"audio": ["c.wav", "copy.wav"], "question": "Which?", "answer": "the first", "side": "test"},
        {"audio": ["c.wav", "d.wav"], "question": "Which?", "answer": "the first", "side": "test"},
        {"audio": ["d.wav", "c.wav"], "question": "Which?", "answer": "the second", "side": "test"},
        {"audio": ["c.wav", "d.wav"], "question": "Which?", "answer": "the first", "side": "test"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    by_value = {"splits": {"train": ["train"], "test": ["test"]}, "columns": {"split": "side"}}
    made(tmp_path, format="jsonl", path=str(path), max_reject_share=1.0, **by_value)
    assert list(rejected(tmp_path).values()) == ["other_side", "repeated"] and len(samples(tmp_path, "test")) == 2


# ------------------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize("form", ["csv", "jsonl", "chat"])
def test_shards_become_a_table_and_shards_again(form: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abc"):
        wav(tmp_path / f"{name}.wav", number, channels=1 + (name == "c"))
    made(tmp_path, **json_lines(tmp_path))
    before = ShardDataset(tmp_path / "out" / "train")
    assert main(["convert", "shards", str(tmp_path / "out" / "train"), "table", "--form", form]) == 0
    assert main(["prep", "table/recipe.yaml", "again", "--workers=1", "--quiet"]) == 0
    after = ShardDataset(tmp_path / "again" / "train")
    for number in range(3):
        old, new = before.load_sample(number), after.load_sample(number)
        assert (new.id, new.question, new.answer, new.places) == (old.id, old.question, old.answer, old.places)
        assert new.audio == old.audio and new.recordings == old.recordings
        assert after.load_audio_bytes(number) == before.load_audio_bytes(number)


def test_parquet_holds_one_sound_and_says_so(tmp_path: Path, capsys) -> None:
    wav(tmp_path / "a.wav", 1), wav(tmp_path / "b.wav", 2)
    made(tmp_path, format="jsonl", path=str(write_lines(tmp_path / "rows.jsonl", [GOOD])))
    command = ["convert", "shards", str(tmp_path / "out" / "train"), str(tmp_path / "table"), "--form", "parquet"]
    assert main(command) == 2
    assert "expected one sound, found 2. Write csv, jsonl or chat." in capsys.readouterr().err


def test_our_own_shards_are_a_format_of_others(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1), wav(tmp_path / "b.wav", 2)
    made(tmp_path, format="jsonl", path=str(write_lines(tmp_path / "rows.jsonl", [GOOD])))
    first = ShardDataset(tmp_path / "out" / "train")
    again = {"format": "webdataset", "path": str(tmp_path / "out" / "train"), "columns": {"audio": "audio"}}
    made(tmp_path / "again", **again)
    second = ShardDataset(tmp_path / "again" / "out" / "train")
    assert second.load_audio_bytes(0) == first.load_audio_bytes(0) and len(second.load_sample(0).audio) == 2
