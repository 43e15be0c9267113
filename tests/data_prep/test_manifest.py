"""Rows of others as shards: every format, every reason, sides, and a run that is killed and goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import parquet

from audio_llm import audio
from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, ConfigError, DataError
from audio_llm.shards.index import CACHE
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample
from data_prep.manifest.packing import Packer
from data_prep.manifest.recipe import AudioConfig
from data_prep.manifest.rows import Draft, Reason
from data_prep.manifest.sides import draw
from data_prep.manifest.sounds import File
from tests.data_prep.manifest_tools import RATE, made, noise, rejected, rejected_in, samples, wav, write_lines

# ------------------------------------------------------------------------------------------------ from a table to a run


def test_a_table_becomes_shards_that_are_looked_at_and_learnt(tmp_path: Path, checkpoint, capsys) -> None:
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "question", "answer", "choices"])
        for number in range(8):
            wav(tmp_path / f"{number}.wav", number)
            table.writerow([f"{number}.wav", "Which side?\nSay it.", ("left", "right")[number % 2], "left|right"])
    (tmp_path / "recipe.yaml").write_text(
        f"verb: prep\nkind: manifest\ncorpus: mine\nformat: csv\npath: {tmp_path / 'rows.csv'}\nsplits: {{train: 1}}\n"
    )
    out = tmp_path / "out"
    assert main(["prep", str(tmp_path / "recipe.yaml"), str(out), "--workers", "1", "--quiet"]) == 0
    assert "8 rows = 8 samples + 0 rejects" in capsys.readouterr().out
    assert main(["prep", str(tmp_path / "recipe.yaml"), str(out), "--quiet"]) == 0
    assert "up to date" in capsys.readouterr().out
    model = checkpoint(channels=1)
    assert main(["inspect", str(out / "train"), "--model", str(model), "--style", "answer"]) == 0
    assert "⟦<answer>left</answer>" in capsys.readouterr().out
    (tmp_path / "sft.yaml").write_text(
        f"verb: sft\nmodel: {{path: {model}}}\noutput: {tmp_path / 'sft'}\nsteps: 1\nbatch_size: 2\n"
        f"data: {{train: [{out / 'train'}], style: answer}}\n"
    )
    assert main(["sft", str(tmp_path / "sft.yaml")]) == 0
    first = samples(tmp_path)[0]
    assert (first.id, first.choices, first.answer) == ("mine-0000000", ["left", "right"], "left")
    assert first.question == "Which side?\nSay it." and first.source and first.source.dataset == "mine"


@pytest.mark.slow
def test_grpo_trains_on_the_result(tmp_path: Path, checkpoint) -> None:
    rows = []
    for number in range(4):
        wav(tmp_path / f"{number}.wav", number)
        rows.append(GOOD | {"audio": f"{number}.wav", "id": number})
    made(tmp_path, format="jsonl", path=str(write_lines(tmp_path / "rows.jsonl", rows)))
    (tmp_path / "grpo.yaml").write_text(
        f"verb: grpo\nmodel: {{path: {checkpoint(channels=1)}}}\noutput: {tmp_path / 'grpo'}\nsteps: 1\n"
        "prompts_per_step: 1\ngroup_size: 2\nmax_completion_length: 4\nengine: {backend: transformers}\n"
        f"data: {{train: [{tmp_path / 'out' / 'train'}]}}\n"
    )
    assert main(["grpo", str(tmp_path / "grpo.yaml")]) == 0
    assert (tmp_path / "grpo" / "result.json").is_file()


# ------------------------------------------------------------------------------------------------ reasons


def _broken_sounds(folder: Path) -> None:
    """Files that are no sound to learn from, by what is wrong with them."""
    wav(folder / "good.wav", 1)
    wav(folder / "other.wav", 2)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no sound at all, but words\n" * 20)
    whole = wav(folder / "whole.flac", 3, 2.0).read_bytes()
    (folder / "torn.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "silent.wav", np.zeros((RATE, 1)), RATE)
    holes = noise(4)
    holes[5] = np.nan
    soundfile.write(folder / "nan.wav", holes, RATE, subtype="FLOAT")
    soundfile.write(folder / "loud.wav", 4 * noise(5), RATE, subtype="FLOAT")
    wav(folder / "five.wav", 6, channels=5)
    wav(folder / "stereo.wav", 7, channels=2)
    wav(folder / "long.wav", 8, seconds=1.5)
    wav(folder / "short.wav", 9, seconds=0.01)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")  # that nobody writes to
    (folder / "endless.wav").symlink_to("/dev/zero")
    wav(folder.parent / "outside.wav", 10)


GOOD = {"audio": "good.wav", "question": "What is it?", "answer": "dog", "choices": ["dog", "cat"]}
# What is changed in a good row, and the reason that it is rejected for.
DEFECTS: list[tuple[dict[str, Any] | str, Reason]] = [
    ('{"audio": "good.wav", "question": ', Reason.BROKEN_ROW),
    ("[1, 2]", Reason.BROKEN_ROW),
    ({"audio": None}, Reason.NO_SOUND_NAMED),
    ({"audio": "  "}, Reason.NO_SOUND_NAMED),
    ({"audio": []}, Reason.NO_SOUND_NAMED),
    ({"audio": 7}, Reason.WRONG_TYPE),
    ({"audio": ["good.wav"] * 5}, Reason.SEVERAL_SOUNDS),
    ({"audio": "../outside.wav"}, Reason.OUTSIDE_ROOT),
    ({"audio": "a/../../outside.wav"}, Reason.OUTSIDE_ROOT),
    ({"audio": "ABSOLUTE"}, Reason.OUTSIDE_ROOT),
    ({"audio": "..\\outside.wav"}, Reason.OUTSIDE_ROOT),
    ({"audio": "gone.wav"}, Reason.NO_SUCH_FILE),
    ({"audio": "folder.wav"}, Reason.NO_SUCH_FILE),
    ({"audio": "x" * 300 + ".wav"}, Reason.NO_SUCH_FILE),  # longer than a name can be
    ({"audio": "endless.wav"}, Reason.NO_SUCH_FILE),
    ({"audio": "pipe.wav"}, Reason.EMPTY_FILE),
    ({"audio": "empty.wav"}, Reason.EMPTY_FILE),
    ({"audio": "text.wav"}, Reason.NOT_AUDIO),
    ({"audio": "torn.flac"}, Reason.TORN),
    ({"audio": "silent.wav"}, Reason.SILENT),
    ({"audio": "nan.wav"}, Reason.NOT_FINITE),
    ({"audio": "loud.wav"}, Reason.LOUD),
    ({"audio": "five.wav"}, Reason.CHANNELS),
    ({"audio": "stereo.wav"}, Reason.CHANNELS),
    ({"audio": "long.wav"}, Reason.LONG),
    ({"audio": "short.wav"}, Reason.SHORT),
    ({"start": "soon"}, Reason.BAD_TIME),
    ({"start": -1}, Reason.BAD_TIME),
    ({"start": "0_0"}, Reason.BAD_TIME),  # 0 for Python
    ({"start": 0.1, "end": 0.1}, Reason.END_BEFORE_START),
    ({"start": 0.15, "end": 0.05}, Reason.END_BEFORE_START),
    ({"end": 0.5}, Reason.BEYOND_THE_SOUND),
    ({"start": 0.3}, Reason.BEYOND_THE_SOUND),
    ({"id": " "}, Reason.NO_ID),
    ({"id": ["a"]}, Reason.NO_ID),
    ({"id": "first"}, Reason.DUPLICATE_ID),
    ({"question": GOOD["question"], "start": 0.0}, Reason.REPEATED),
    ({"question": ""}, Reason.NO_QUESTION),
    ({"question": {"text": "?"}}, Reason.WRONG_TYPE),
    ({"question": "<|audio|> What is it?"}, Reason.MARKS),
    ({"question": "<THINK>What is it?"}, Reason.MARKS),  # replies are read in any case
    ({"question": "What\0 is it?"}, Reason.WRONG_TYPE),
    ({"answer": " "}, Reason.NO_ANSWER),
    ({"answer": True}, Reason.WRONG_TYPE),
    ({"answer": "bird"}, Reason.ANSWER_NO_CHOICE),
    ({"answer": "A"}, Reason.ANSWER_NO_CHOICE),
    ({"answer": float("nan")}, Reason.NO_ANSWER),
    ({"answer": "<answer>dog</answer>", "choices": None}, Reason.MARKS),
    ({"choices": ["dog", ""]}, Reason.EMPTY_CHOICE),
    ({"choices": ["dog"]}, Reason.ONE_CHOICE),
    ({"choices": {"A": "dog"}}, Reason.WRONG_TYPE),
    ({"choices": ["dog", "Dog"]}, Reason.EQUAL_CHOICES),
    ({"choices": ["a", "a"], "answer": "a"}, Reason.EQUAL_CHOICES),  # one object of Python, for a letter
    ({"choices": ["dog", *map(str, range(26))]}, Reason.TOO_MANY_CHOICES),
    ({"thinking": "So it is <|im_end|>"}, Reason.MARKS),
    ({"events": [{"label": "dog", "onset": 2, "offset": 1}]}, Reason.BAD_EVENT),
    ({"events": [{"name": "dog"}]}, Reason.BAD_EVENT),
    ({"events": [{"label": "<|im_end|>"}]}, Reason.MARKS),
    ({"semantic_elements": ["dog"]}, Reason.WRONG_TYPE),
    ({"semantic_elements": {"who": ["a dog", "</semantic_elements>"]}}, Reason.MARKS),
    ({"who": ""}, Reason.NO_GROUP),
]


def test_every_defect_is_a_reject_with_its_reason(tmp_path: Path) -> None:
    """A table of defects alone but for two rows: as many rejects as defects, each for the reason it was made for."""
    sounds = tmp_path / "sounds"
    _broken_sounds(sounds)
    lines = [json.dumps(GOOD | {"id": "first", "who": "a"})]
    for number, (defect, _) in enumerate(DEFECTS):
        if isinstance(defect, dict):
            row = GOOD | {"id": f"bad-{number}", "who": "a", "question": f"Question {number}?"} | defect
            row["audio"] = str(tmp_path / "outside.wav") if row["audio"] == "ABSOLUTE" else row["audio"]
            defect = json.dumps(row)
        lines.append(defect)
    lines.append(json.dumps(GOOD | {"id": "last", "who": "a", "audio": "other.wav"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    manifest = made(
        tmp_path,
        format="jsonl",
        path=str(tmp_path / "rows.jsonl"),
        root=str(sounds),
        columns={"group": "who"},
        audio={"max_seconds": 1.0, "layouts": ["mono"]},
        max_reject_share=1.0,
    )
    lines_of = {f"rows.jsonl: line {number + 2}": reason for number, (_, reason) in enumerate(DEFECTS)}
    found = rejected(tmp_path)
    assert {item: reason.name.lower() for item, reason in lines_of.items()} == found
    assert len(DEFECTS) >= 40 and manifest["rows"] == len(DEFECTS) + 2 == manifest["rejects"] + 2
    assert [sample.id for sample in samples(tmp_path)] == ["mine-first", "mine-last"]


def test_what_a_lossy_format_decodes_to_beyond_full_scale_is_turned_down(tmp_path: Path) -> None:
    sound = noise(1)
    sound *= 1.06 / np.abs(sound).max()
    soundfile.write(tmp_path / "good.wav", sound, RATE, subtype="FLOAT")
    path = str(write_lines(tmp_path / "rows.jsonl", [GOOD]))
    made(tmp_path, format="jsonl", path=path, audio={"max_peak": 1.1})
    heard = ShardDataset(tmp_path / "out" / "train")[0]["waveforms"][0].samples[0]
    assert 0.99 < np.abs(heard).max() <= 1.0
    assert np.allclose(heard / np.abs(heard).max(), sound[:, 0] / 1.06, atol=1e-4)
    with pytest.raises(DataError, match=r"at most 1\.05 .*found 1\.06"):
        made(tmp_path / "strict", format="jsonl", path=path, audio={"max_peak": 1.05})
    with pytest.raises(ConfigError, match="full scale"):
        made(tmp_path / "below", format="jsonl", path=path, audio={"max_peak": 0.5})


@pytest.mark.parametrize(
    ("how", "answers", "expected"),
    [
        ("letter", ["a", "(B)", "C", "AB", "dog"], ["dog", "cat", None, None, None]),
        ("index", ["0", "1", "2", "-1", "dog"], ["dog", "cat", None, None, None]),
        ("number", ["0", "1", "2", "3", "1.0"], [None, "dog", "cat", None, "dog"]),
        ("key", ["A. dog", "cat.", "B", "A. cat", "bird"], ["dog", "cat", "cat", None, None]),
        ("text", ["dog", " cat ", "B", "Dog", "dog."], ["dog", "cat", None, None, None]),
    ],
)
def test_an_answer_names_its_choice_as_the_recipe_says(how, answers, expected, tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1)
    rows = [GOOD | {"audio": "a.wav", "id": n, "question": f"{n}?", "answer": said} for n, said in enumerate(answers)]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, {**rows[0], "id": "open", "choices": None}])
    made(tmp_path, format="jsonl", path=str(path), answer_as=how, max_reject_share=1.0)
    found = {sample.id: sample.answer for sample in samples(tmp_path)}
    assert [found.get(f"mine-{number}") for number in range(5)] == expected
    assert ("mine-open" in found) == (how in ("text", "key"))  # a letter of no choices names nothing
    assert set(rejected(tmp_path).values()) == {"answer_no_choice"}


def test_choices_are_drawn_among_answers_that_differ(tmp_path: Path) -> None:
    lines = ["audio,answer"]
    for number in range(40):
        wav(tmp_path / f"{number}.wav", number, seconds=0.06)
        lines.append(f"{number}.wav,{('dog', 'Dog', 'cat', 'bell')[number % 4]}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    how = {"format": "csv", "path": str(tmp_path / "rows.csv"), "question": "What?", "draw_choices": 3}
    made(tmp_path, **how)
    found = samples(tmp_path)
    assert len(found) == 40 and all(sample.answer in sample.choices for sample in found)
    assert all({choice.lower() for choice in sample.choices} == {"dog", "cat", "bell"} for sample in found)
    assert {sample.choices.index(sample.answer or "") for sample in found} == {0, 1, 2}
    made(tmp_path / "other", **how, seed=1)
    assert [sample.choices for sample in samples(tmp_path / "other")] != [sample.choices for sample in found]
    often = how | {"draws": 3, "open_share": 0.5, "splits": {"train": 0.5, "test": 0.5}}
    made(tmp_path / "often", **often)
    sides = [samples(tmp_path / "often", side) for side in ("train", "test")]
    asked: dict[str, list[Any]] = {}
    for number, sample in [(number, sample) for number, side in enumerate(sides) for sample in side]:
        asked.setdefault(sample.id.split("-draw")[0], []).append((number, sample.choices))
    assert set(asked) == {sample.id for sample in found}
    for questions in asked.values():  # on one side, none twice
        assert len({number for number, _ in questions}) == 1
        assert len({tuple(sorted(choices)) for _, choices in questions}) == len(questions)
    assert max(map(len, asked.values())) > 1
    made(tmp_path / "once", **often | {"draws": 1})  # further questions change none of the first
    once = {s.id: s.choices for side in ("train", "test") for s in samples(tmp_path / "once", side)}
    assert once == {s.id: s.choices for side in sides for s in side if "-draw" not in s.id}
    with pytest.raises(ConfigError, match="at most the 3 answers there are"):
        made(tmp_path / "more", **how | {"draw_choices": 4})


def test_stretches_are_cut_and_sounds_made_to_fit(tmp_path: Path) -> None:
    """From 0.1 to 0.3 s of a stereo file at 16 kHz, the right channel, at 8 kHz: those samples and no others."""
    wav(tmp_path / "a.wav", 1, seconds=0.5, channels=2)
    rows = [GOOD | {"audio": "a.wav", "start": 0.1, "end": "0.3"}, GOOD | {"audio": "a.wav", "start": 0.25}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    made(tmp_path, format="jsonl", path=str(path))
    dataset = ShardDataset(tmp_path / "out" / "train")
    stored = np.round(32768 * noise(1, 0.5, 2)).T / 32768
    assert np.array_equal(dataset.load_waveform(0).samples, stored[:, 1600:4800].astype(np.float32))
    assert np.array_equal(dataset.load_waveform(1).samples, stored[:, 4000:].astype(np.float32))
    fit = {"layouts": ["mono"], "hearing": "right", "sample_rate": 8000}
    made(tmp_path / "fit", format="jsonl", path=str(path), audio=fit)
    heard = ShardDataset(tmp_path / "fit" / "out" / "train").load_waveform(0)
    expected = audio.resample(audio.Waveform(stored[1:, 1600:4800].astype(np.float32), RATE, "mono"), 8000)
    assert heard.layout == "mono" and np.abs(heard.samples - expected.samples).max() <= 0.51 / 32768


# ------------------------------------------------------------------------------------------------ the whole source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"answer": "anwser"}}, r"columns\.answer: expected a column .*did you mean 'answer'"),
        ({"columns": {"answr": "answer"}}, r"columns: .*did you mean 'answer'"),
        ({"keep": ["colour"]}, "keep: expected a column"),
        ({"keep": ["sound"]}, "keep: expected names other than .*found 'sound'"),
        ({"keep": ["question_type"]}, r"found 'question_type'.*columns\.kind"),
        ({"format": "cvs"}, "did you mean 'csv'"),
        ({"corpus": "a b"}, "corpus: expected a name"),
        ({"options": {"pattern": "x"}}, "options of format: csv: expected none"),
        ({"splits": {"train": 0.5}}, "shares above 0 that sum to 1"),
        ({"splits": {"train": ["a"], "test": ["a"]}}, "each value once"),
        ({"splits": {"train": ["a"]}}, r"columns\.split"),
        ({"splits": {"train": 0.5, "test": ["a"]}}, "shares alone"),
        ({"audio": {"hearing": "left"}}, r"audio\.layouts as well"),
        ({"audio": {"hearing": "left", "layouts": ["stereo"]}}, "hearing left"),
        ({"audio": {"max_seconds": 0.01}}, "min_seconds"),
        ({"samples_per_shard": 0}, "samples_per_shard: expected 1 or more, found 0"),
        ({"choices_separator": ""}, "choices_separator: expected what stands between two choices"),
        ({"draw_choices": 1}, "draw_choices: expected 0, or 2 to 26"),
        ({"draws": 2}, "draws: expected 1, or 2 to 100 with draw_choices as well, found 2 alone"),
        ({"draw_choices": 2, "draws": 101}, "draws: expected 1, or 2 to 100"),
        ({"draw_choices": 9, "columns": {"choices": "answer"}}, "rows without choices"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1)
    (tmp_path / "rows.csv").write_text("audio,question,answer\na.wav,What?,dog\n")
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, **({"format": "csv", "path": str(tmp_path / "rows.csv")} | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audio,question,answer\na.wav,What?,dog\n".encode("utf-16"), "UTF-8 text"),
        (b"", "a name for each column"),
        (b"audio,audio,answer\n", "a name for each column"),
        (b"audio,question,answer\n", "rows in the format 'csv', found none"),
        (b'audio,question,answer\na.wav,"What,dog\n', "quoted"),
        (b"sound,question,answer\na.wav,What?,dog\n", r"columns: \{audio"),
        (b"audio,question,answer\na.wav,What?\na.wav,Who?,dog\n", r"at most 0 of 2 rows .*expected 3 fields, found 2"),
        (b"audio,question,answer\ngone.wav,What?,dog\n", "at most 0 of 1 rows .*no such file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1)
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(AudioLLMError, match=message):
        made(tmp_path, format="csv", path=str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(("row", "reason"), [("a.wav,What?,", "no_answer"), ("gone.wav,What?,dog", "no_such_file")])
def test_rows_that_are_all_rejects_are_told_with_the_first(row: str, reason: str, tmp_path: Path) -> None:
    """However many are allowed: of words that cannot be used, and of sounds."""
    wav(tmp_path / "a.wav", 1)
    (tmp_path / "rows.csv").write_text(f"audio,question,answer\n{row}\n")
    why = re.escape(Reason[reason.upper()].value)
    with pytest.raises(DataError, match=rf"all .*1 .*are rejects\. The first: rows\.csv: line 2: {why}"):
        made(tmp_path, format="csv", path=str(tmp_path / "rows.csv"), max_reject_share=1.0)
    assert rejected(tmp_path) == {"rows.csv: line 2": reason}


def test_what_a_row_says_twice_is_not_taken_once(tmp_path: Path) -> None:
    """JSON and Parquet let a name stand twice, and their readers keep the last."""
    wav(tmp_path / "a.wav", 1)
    said = '{"audio": "a.wav", "question": "What?", "answer": "dog"%s}\n'
    (tmp_path / "rows.jsonl").write_text(said % "" + said % ', "answer": "cat"')
    how = {"format": "jsonl", "path": str(tmp_path / "rows.jsonl"), "max_reject_share": 1.0}
    assert made(tmp_path, **how)["rows"] == 2 and rejected(tmp_path) == {"rows.jsonl: line 2": "broken_row"}
    columns = [pyarrow.array([text]) for text in ("a.wav", "What?", "dog", "cat")]
    table = pyarrow.Table.from_arrays(columns, names=["audio", "question", "answer", "answer"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="a name for each column, once"):
        made(tmp_path / "again", format="parquet", path=str(tmp_path / "rows.parquet"))


def test_accents_in_either_unicode_form_are_one_text(tmp_path: Path) -> None:
    """An answer is its choice, and a recording one group, however é is written; what is stored is the row's own."""
    whole, parted = "Café", unicodedata.normalize("NFD", "Café")
    for number in range(2):
        wav(tmp_path / f"{number}.wav", number)
    rows: list[dict[str, Any]] = [
        {"audio": f"{number}.wav", "question": "What?", "choices": [choice, "Tee"], "answer": answer, "who": choice}
        for number, (choice, answer) in enumerate([(whole, parted), (parted, whole)])
    ]
    how = {"format": "jsonl", "path": str(write_lines(tmp_path / "rows.jsonl", rows)), "columns": {"group": "who"}}
    assert made(tmp_path, **how)["subsets"]["train"]["groups"] == 1
    assert [sample.answer for sample in samples(tmp_path)] == [whole, parted]


def test_ids_that_differ_stay_apart(tmp_path: Path) -> None:
    """Dots, slashes and spaces are none in shards; the two forms of an accent are one id."""
    wav(tmp_path / "good.wav", 1)
    ids = ["a.b", "a b", "a_b", "Ä", "A\u0308", "ä", "कि", "की", "🐶", "🐱", "a.b", None, "0000011"]
    rows = [GOOD | {"id": name, "question": f"{number}?"} for number, name in enumerate(ids)]
    how = {"format": "jsonl", "path": str(write_lines(tmp_path / "rows.jsonl", rows)), "max_reject_share": 1.0}
    made(tmp_path, **how)
    found = {sample.question: sample.id for sample in samples(tmp_path)}
    assert len(found) == len(set(found.values())) == len(ids) - 2
    assert (found["0?"], found["3?"], found["11?"]) == ("mine-a_b", "mine-Ä", "mine-0000011")
    twice = {f"rows.jsonl: line {number}": "duplicate_id" for number in (5, 11)}
    assert rejected(tmp_path) == twice


@pytest.mark.parametrize("how", ["letter", "key"])
def test_a_letter_that_means_two_choices_is_no_answer(how: str, tmp_path: Path) -> None:
    wav(tmp_path / "good.wav", 1)
    mixed, ordered = ["B. dog", "A. cat"], ["A. cat", "B. dog"]
    rows = [GOOD | {"question": f"{n}?", "choices": listed, "answer": "B"} for n, listed in enumerate((mixed, ordered))]
    rows += [GOOD | {"question": "2?", "choices": ["J. S. Bach", "W. A. Mozart"], "answer": "B"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    made(tmp_path, format="jsonl", path=str(path), answer_as=how, max_reject_share=1.0)
    assert [sample.answer for sample in samples(tmp_path)] == ["B. dog", "W. A. Mozart"]
    assert rejected(tmp_path) == {"rows.jsonl: line 1": "answer_no_choice"}


def test_nan_is_nothing_and_infinity_no_text(tmp_path: Path) -> None:
    """As Parquet has them in columns of numbers, and Python's JSON."""
    wav(tmp_path / "good.wav", 1)
    rows = [GOOD | {"id": "kept", "level": 1.5}, GOOD | {"id": "none", "question": "Why?", "level": float("nan")}]
    rows += [GOOD | {"id": "end", "end": float("inf")}]
    how = {"format": "jsonl", "path": str(write_lines(tmp_path / "rows.jsonl", rows)), "keep": ["level"]}
    made(tmp_path, **how, max_reject_share=1.0)
    assert [sample.meta.get("level") for sample in samples(tmp_path)] == [1.5, None]
    assert rejected(tmp_path) == {"rows.jsonl: line 3": "wrong_type"}


# ------------------------------------------------------------------------------------------------ sides


def test_groups_are_divided_by_a_seed_and_no_side_is_empty() -> None:
    groups = [f"speaker-{number}" for number in range(6)]
    sides = draw(groups, {"train": 0.67, "validation": 0.01, "test": 0.32}, seed=1)
    counts = [list(sides.values()).count(name) for name in ("train", "validation", "test")]
    assert counts == [4, 1, 1] and sides == draw(
        [*reversed(groups)] * 2, {"train": 0.67, "validation": 0.01, "test": 0.32}, 1
    )
    assert sides != draw(groups, {"train": 0.67, "validation": 0.01, "test": 0.32}, seed=2)


def test_a_sound_is_on_one_side_whatever_its_file_is_called(tmp_path: Path) -> None:
    """Equal samples in a WAV and a FLAC file, and stretches of equal files, are found on two sides."""
    wav(tmp_path / "a.wav", 1, subtype="PCM_16")
    wav(tmp_path / "b.flac", 1, subtype="PCM_16")
    wav(tmp_path / "c.wav", 1)
    wav(tmp_path / "d.wav", 2)
    rows = [("a.wav", "x", ""), ("b.flac", "y", ""), ("c.wav", "y", 0.1), ("d.wav", "y", ""), ("d.wav", "z", "")]
    lines = [f"{name},What?,dog,{part},{start}" for name, part, start in rows]
    (tmp_path / "rows.csv").write_text("\n".join(["audio,question,answer,part,start", *lines, ""]))
    how = {"format": "csv", "path": str(tmp_path / "rows.csv"), "columns": {"split": "part"}, "max_reject_share": 1.0}
    made(tmp_path, splits={"train": ["x"], "test": ["y"]}, **how)
    expected = {3: "other_side", 4: "other_side", 6: "unknown_split"}
    assert rejected(tmp_path) == {f"rows.csv: line {line}": reason for line, reason in expected.items()}
    assert len(samples(tmp_path, "train")) == len(samples(tmp_path, "test")) == 1
    (tmp_path / "rows.csv").write_text("audio,question,answer,part\na.wav,What?,dog,x\na.wav,Who?,dog,y\n")
    with pytest.raises(DataError, match="expected only in train, found in test as well"):
        made(tmp_path / "again", splits={"train": ["x"], "test": ["y"]}, **how)


def test_words_that_give_the_answer_away_are_told(tmp_path: Path, capsys) -> None:
    lines = ["audio,question,answer,choices,side"]
    for number in range(160):
        wav(tmp_path / f"{number}.wav", number, seconds=0.06)
        answer = ("dog", "cat")[number % 2]
        words = "What barks?" if answer == "dog" else "What meows?"
        lines.append(f"{number}.wav,{words},{answer},dog|cat,{'test' if number > 99 else 'train'}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    recipe = {"verb": "prep", "kind": "manifest", "corpus": "mine", "format": "csv", "path": str(tmp_path / "rows.csv")}
    recipe |= {"columns": {"split": "side"}, "splits": {"train": ["train"], "test": ["test"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["prep", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--workers", "1", "--quiet"]) == 1
    said = capsys.readouterr()
    assert "ABOVE CHANCE" in said.out and "can be answered without audio" in said.err


# ------------------------------------------------------------------------------------------------ killed, and on


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL once the first shard is there, then the same command: every file as of a run that was left alone."""
    lines = ["audio,question,answer,side"]
    for number in range(600):
        wav(tmp_path / f"{number}.wav", number % 590, seconds=1.0)  # the last ten are rejects: heard before
        lines.append(f"{number}.wav,What?,dog,{'ab'[number > 400]}")
    (tmp_path / "rows.csv").write_text("\n".join([*lines, "gone.wav,What?,dog,a", ""]))
    recipe = {"verb": "prep", "kind": "manifest", "corpus": "mine", "format": "csv", "path": str(tmp_path / "rows.csv")}
    recipe |= {"columns": {"split": "side"}, "splits": {"train": ["a"], "test": ["b"]}, "max_rejects": 11}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"samples_per_shard": 20}))
    command = ["prep", str(tmp_path / "recipe.yaml")]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [sys.executable, "-m", "audio_llm", *command, str(killed), "--workers", "1", "--quiet"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (killed / "train" / "shard-000001.tar").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    assert not (killed / "test" / "sizes.json").exists()
    for out in (killed, whole):
        assert main([*command, str(out), "--workers", "1", "--quiet"]) == 0

    def files(folder: Path) -> dict[str, bytes]:
        kept = (path for path in folder.rglob("*") if path.is_file() and path.name != CACHE)  # which names inodes
        return {str(path.relative_to(folder)): path.read_bytes() for path in kept}

    assert files(killed) == files(whole) and len(files(whole)) > 30
    assert set(rejected_in(whole).values()) == {"other_side", "no_such_file"}


def test_more_rejects_than_allowed_end_the_run_with_a_list(tmp_path: Path, capsys) -> None:
    rows = ["audio,question,answer", *(f"gone{number}.wav,What?,dog" for number in range(3))]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"at most 1 of 3 rows \(max_rejects\), found 2\. The first: rows\.csv: line 2"):
        made(tmp_path, format="csv", path=str(tmp_path / "rows.csv"), max_rejects=1)
    assert len(rejected(tmp_path)) == 2
    wav(tmp_path / "a.wav", 1)  # mended: nothing was made that would be lost
    (tmp_path / "rows.csv").write_text("\n".join([*rows[:2], "a.wav,What?,dog", ""]))
    assert made(tmp_path, format="csv", path=str(tmp_path / "rows.csv"), max_rejects=1)["rejects"] == 1
    (tmp_path / "rows.csv").write_text("\n".join([*rows[:2], "a.wav,What is it?,dog", ""]))
    with pytest.raises(ConfigError, match="another run"):
        made(tmp_path, format="csv", path=str(tmp_path / "rows.csv"), max_rejects=1)


# ------------------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "chat"])
def test_shards_become_a_table_and_shards_again(form: str, tmp_path: Path, shards, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = shards(8)
    assert main(["convert", "shards", str(source), "table", "--form", form]) == 0
    assert main(["prep", "table/recipe.yaml", "again", "--workers", "1", "--quiet"]) == 0
    before, after = ShardDataset(source), ShardDataset(tmp_path / "again" / "train")
    assert len(before) == len(after) == 8
    for number in range(8):
        one, other = before.load_sample(number), after.load_sample(after.find(before.load_sample(number).id))
        for name in ("id", "question", "choices", "answer", "thinking", "semantic_elements", "events", "audio", "task"):
            expected = "choice" if name == "task" else getattr(one, name)
            assert getattr(other, name) == expected, name
        assert other.source and one.source and other.source.clip == one.source.clip
        assert other.meta["question_type"] == one.meta["question_type"]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "chat"])
def test_a_table_keeps_licence_meta_and_every_bit(form: str, tmp_path: Path, monkeypatch) -> None:
    """What a sample has beside its question: of a table whose cells are texts, as a text."""
    monkeypatch.chdir(tmp_path)
    loud = noise(1) + 1e-6  # between the steps of 16 bits
    soundfile.write("a.wav", loud, RATE, subtype="FLOAT")
    rows = [
        GOOD | {"audio": "a.wav", "level": 1.5, "room": {"size": [3, 4]}},
        GOOD | {"audio": "a.wav", "question": "?"},
    ]
    how = {"format": "jsonl", "path": str(write_lines(tmp_path / "rows.jsonl", rows)), "licence": "CC BY 4.0"}
    made(tmp_path, **how, keep=["level", "room"], audio={"store": "float"})
    assert main(["convert", "shards", "out/train", "table", "--form", form]) == 0
    assert main(["prep", "table/recipe.yaml", "again", "--workers", "1", "--quiet"]) == 0
    before, after = ShardDataset("out/train"), ShardDataset("again/train")
    assert np.array_equal(before.load_waveform(0).samples, after.load_waveform(0).samples)
    found = [after.load_sample(number) for number in range(2)]
    assert [sample.source.licence for sample in found if sample.source] == ["CC BY 4.0"] * 2
    texts = {"level": "1.5", "room": '{"size": [3, 4]}'}
    told: dict[str, Any] = texts if form in ("csv", "parquet") else {"level": 1.5, "room": {"size": [3, 4]}}
    assert found[0].meta == {"question_type": "mine", "format": form, **told}
    assert found[1].meta == {"question_type": "mine", "format": form}


@pytest.mark.parametrize("config", [AudioConfig(), AudioConfig(sample_rate=8000), AudioConfig(store="float")])
def test_what_was_encoded_for_the_row_before_is_what_would_be_encoded_for_this_one(config, tmp_path: Path) -> None:
    """Rows about one sound, its stretches, and two sounds at once, packed in a row and each by a packer of its own."""
    sounds = {name: File(wav(tmp_path / f"{name}.wav", seed, 1.0), name) for seed, name in enumerate("ab")}
    asked = [("a", 0.0, None), ("a", 0.0, None), ("a", 0.25, 0.5), ("a", 0.0, 0.5), ("b", 0.25, 0.5), ("a", 0.25, 0.5)]
    rows = [[one] for one in asked] + [[asked[2], asked[4]], [asked[4], asked[2]], [asked[0]]]
    drafts = [
        Draft(
            str(number),
            Sample(id=f"s{number}", task="open", question="What?", answer="noise"),
            tuple(sounds[name] for name, _, _ in row),
            (),
            stretches=tuple((start, end) for _, start, end in row),
        )
        for number, row in enumerate(rows)
    ]
    together = Packer(config).pack((drafts,))
    alone = [made for draft in drafts for made in Packer(config).pack(([draft],))]
    assert [made.packed for made in together] == [made.packed for made in alone] and None not in together
    stored = [[info.sha256 for info in made.packed.sample.audio] for made in together if made.packed]
    assert stored[0] == stored[1] == stored[8] and stored[6] == stored[7][::-1] == stored[5] + stored[4]
    assert len({tuple(found) for found in stored[:5]}) == 4
