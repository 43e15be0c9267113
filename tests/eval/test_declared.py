"""Benchmarks that a YAML file declares: MMAR's own list, every kind of defect of the others in rows of their layouts,
the scripts' rules against transcriptions of their descriptions, submissions, declarations of one's own."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, ConfigError
from eval.benchmarks import get_benchmark, names, open_benchmark
from eval.benchmarks.base import Collection, Item
from eval.benchmarks.declared import Declared, LeftOut
from eval.predictions import FILE_NAME, MANIFEST_NAME, Prediction, PredictionWriter
from eval.scorers import SCORERS
from tests.paths import ROOT, SHARED

MMAR = SHARED / "data" / "mmar" / "MMAR-meta.jsonl"
FOLDER = ROOT / "eval" / "benchmarks"
DECLARED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def noise(*paths: Path) -> None:
    """A tenth of a second of noise in each file."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(number).uniform(-0.1, 0.1, 800), 8000, format="WAV")


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(item: Item, raw: str, **more: Any) -> Prediction:
    asked = (item.id, item.question_type, item.format, item.question, item.choices, item.gold)
    return Prediction(*asked, raw=raw, meta=item.meta, clip=item.clip, **more)


def by_id(found: Collection) -> dict[str, Item]:
    return {item.id: item for item in found.items}


@pytest.mark.parametrize("name", DECLARED)
def test_every_declaration_is_short_and_has_its_name_and_origin(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    declared = Declared.read(path)
    assert declared.name == name in names()
    assert declared.declaration.source and declared.declaration.licence and declared.declaration.submission
    assert len(path.read_text().splitlines()) < 60


# --------------------------------------------------------------------------------------------------- MMAR


@pytest.fixture(scope="module")
def mmar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMAR's sounds: noise for the first twenty, a file without a sound for all others but one."""
    folder = tmp_path_factory.mktemp("mmar")
    paths = [folder / json.loads(line)["audio_path"] for line in MMAR.read_text().splitlines()]
    noise(*paths[:20])
    for path in paths[20:-1]:
        path.touch()
    return folder


@pytest.mark.shared("data/mmar/MMAR-meta.jsonl")
def test_mmars_own_list_opens_with_its_known_defects(mmar: Path) -> None:
    found = open_benchmark("mmar", MMAR, audio=str(mmar))
    rows = [json.loads(line) for line in MMAR.read_text().splitlines()]
    assert len(found.items) == found.total == 1000 and not found.left_out
    assert [(item.id, item.question, item.choices, item.gold) for item in found.items] == [
        (row["id"], row["question"], [one for one in row["choices"] if one], row["answer"]) for row in rows
    ]
    assert found.counts == {
        "another choice, said word for word, is right by mmau-official": 20,
        "several stretches of a video in one clip": 18,
        "characters beyond Latin": 4,
        "a choice that is the word None": 2,
        "choices that are empty, left away": 4,
        "audio missing": 1,
    }
    assert list(found.errors) == [rows[-1]["id"]]
    assert found.waveform(3).samples.shape == (1, 800)
    assert {item.meta["modality"] for item in found.items} == {row["modality"] for row in rows}
    # What tells the answer is in nothing that goes on from here.
    assert not any({"rubric", "cue", "thinking"} & item.meta.keys() for item in found.items)
    chance = np.mean([1 / len(item.choices) for item in found.items])
    assert round(100 * float(chance), 1) == 29.4  # the README's 29.3 has the four empty choices for choices
    videos = open_benchmark("mmar", MMAR, audio=str(mmar), unit="url")
    assert len({item.clip for item in videos.items}) == 917
    (out := mmar / "flat").mkdir()
    noise(out / f"{rows[0]['id']}.wav")  # the files themselves, without their folder
    assert len(open_benchmark("mmar", MMAR, audio=str(out)).errors) == 999


def mmar_match(gold: str, reply: str, choices: list[str]) -> bool:
    """The rule as the specification of MMAR's script describes it, with its sets written out by hand."""

    def words(text: str) -> set[str]:
        found, word = set(), ""
        for character in text.lower() + " ":
            if re.fullmatch(r"\w", character):
                word += character
            elif word:
                found.add(word)
                word = ""
        return found

    said, wanted = words(reply), words(gold)
    foreign: set[str] = set()
    for choice in choices:
        if words(choice) != wanted:
            foreign.update(words(choice).difference(wanted))
    return len(said) > 0 and wanted.issubset(said) and said.isdisjoint(foreign)


@pytest.mark.shared("data/mmar/MMAR-meta.jsonl")
def test_mmars_rule_equals_a_transcription_on_fuzzed_replies(mmar: Path) -> None:
    items = open_benchmark("mmar", MMAR, audio=str(mmar)).items
    rule, draw = SCORERS["mmau-official"], random.Random(0)
    forms = ["{}", "B. {}", "The answer is {}.", "<answer>{}</answer>", "{} {}", "not {}, {}", "({})", "{}\n", "É_{}"]
    right = 0
    for number in range(20_000):
        item = items[number % 1000]
        pool = [item.gold, item.gold, *item.choices, " ".join(reversed(item.gold.split())), "B", item.question, "_"]
        form = draw.choice(forms)
        reply = form.format(*(draw.choice(pool) for _ in range(2)))
        if draw.random() < 0.2:
            reply = "".join(one.upper() if draw.random() < 0.5 else one for one in reply if draw.random() < 0.97)
        expected = mmar_match(item.gold, reply, item.choices)
        score = rule.score(answer(item, reply))
        assert score is not None and score.value == expected, (item, reply)
        right += expected
    assert 4_000 < right < 16_000  # both verdicts are tried
    # Of the specification: by the rule the gold text in a sentence fails for 90 of the 1,000, a lone letter for all.
    for form, wrong in {"{1}. {0}": 15, "The answer is {0}.": 90, "<answer>{0}</answer>": 4}.items():
        said = [form.format(one.gold, "ABCDEF"[one.choices.index(one.gold)]) for one in items]
        assert sum(not mmar_match(one.gold, raw, one.choices) for one, raw in zip(items, said, strict=True)) == wrong
        assert sum(rule.score(answer(one, raw)).value == 0 for one, raw in zip(items, said, strict=True)) == wrong
    assert sum(rule.score(answer(one, "B")).value for one in items) == 0


@pytest.mark.shared("data/mmar/MMAR-meta.jsonl")
def test_mmars_submissions(mmar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, benchmark = open_benchmark("mmar", MMAR, audio=str(mmar)), get_benchmark("mmar")
    thought = "<think>" + "long " * 3000 + "</think>"
    rows = [answer(item, f"{thought}<answer>{item.gold}</answer>") for item in found.items[:20]]
    for row in rows[10:]:
        row.raw = "I cannot tell."
    (path,) = benchmark.submission(rows, tmp_path)
    written, meta = map(json.loads, path.read_text().splitlines()), map(json.loads, MMAR.read_text().splitlines())
    for line, row in zip(written, meta, strict=False):
        kept = {key: value for key, value in row.items() if key not in ("thinking", "cue", "rubric")}
        assert {key: value for key, value in line.items() if key != "answer_prediction"} == kept
    assert json.loads(path.read_text().splitlines()[0])["answer_prediction"] == found.items[0].gold
    assert "no option in 10 of 20 answers" in capsys.readouterr().err
    (path,) = benchmark.submission(rows, tmp_path, form="rubrics")
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["id", "thinking_prediction", "answer_prediction"]
    assert len(first["thinking_prediction"]) < 10_000
    assert "reasoning cut at 9999 characters in 10 answers" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean 'rubrics'"):
        benchmark.submission(rows, tmp_path, form="rubric")


# --------------------------------------------------------------------------------------------------- MMSU


def mmsu_rows() -> list[dict[str, Any]]:
    """Thirty rows: four choices, two at any place, the word "None", an answer that is no choice, a sound that is not
    there, MP3 data in a file named wav, a hidden answer."""
    rows = []
    for number in range(30):
        choices: list[str | None] = ["a child", "an adult", "a teenager", "None" if number == 4 else "a robot"]
        if number % 10 in (1, 2, 3):  # only b and d; only a and c; only c and d
            keep = {1: (1, 3), 2: (0, 2), 3: (2, 3)}[number % 10]
            choices = [choice if place in keep else None for place, choice in enumerate(choices)]
        there = [choice for choice in choices if choice]
        name = f"age_prediction_{number:04}"
        row = {"id": name, "audio_path": f"/audio/{name}.wav", "task_name": "age_prediction" if number % 2 else "puns"}
        row |= {"question": "How old is the speaker?", "answer_gt": there[-1]}
        row |= {f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)}
        row |= {"category": "Perception", "sub-category": "Paralinguistics", "sub-sub-category": "Speaker traits"}
        rows.append(row | {"linguistics_sub_discipline": "Paralinguistics"})
    rows[5]["answer_gt"] = "a dog"
    rows[7]["answer_gt"] = ""
    return rows


@pytest.fixture
def mmsu(tmp_path: Path) -> Path:
    rows = mmsu_rows()
    noise(*(tmp_path / row["audio_path"].lstrip("/") for row in rows[:-1]))
    soundfile.write(tmp_path / "audio" / "age_prediction_0000.wav", np.zeros(8000), 16_000, format="MP3")
    (tmp_path / "mmsu.json").write_text(json.dumps(rows))
    return tmp_path


def test_mmsu_counts_every_defect(mmsu: Path) -> None:
    found = open_benchmark("mmsu", mmsu)
    items = by_id(found)
    assert len(items) == found.total == 30
    assert found.counts == {
        "choices that are empty, left away": 9,
        "a choice that is the word None": 1,
        "answer hidden": 1,
        "answer is none of the options": 1,
        "audio missing": 1,
    }
    assert set(found.errors) == {"age_prediction_0005", "age_prediction_0029"}
    two = items["age_prediction_0001"]
    assert (two.choices, two.meta["letters"], two.gold) == (["an adult", "a robot"], ["B", "D"], "a robot")
    assert items["age_prediction_0004"].choices[-1] == "None" and items["age_prediction_0007"].gold == ""
    assert found.waveform(0).sample_rate == 16_000  # MP3 in a file named wav
    assert two.question_type == "age_prediction" and two.meta["sub-category"] == "Paralinguistics"


def test_mmsu_reads_the_sound_inside_parquet(mmsu: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = (mmsu / "audio" / "age_prediction_0001.wav").read_bytes()
    rows = [{key: row[key] for key in row if key != "audio_path"} for row in mmsu_rows()]
    for shard in range(3):
        part = [row | {"audio": {"bytes": data, "path": "x.wav"}} for row in rows[10 * shard : 10 * shard + 10]]
        (mmsu / "hub").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(part), mmsu / "hub" / f"train-{shard}-of-3.parquet")
    found = open_benchmark("mmsu", mmsu / "hub")
    assert len(found.items) == 30 and found.waveform(29).samples.shape == (1, 800)
    assert found.items[1].meta["letters"] == ["B", "D"]
    with pytest.raises(AudioLLMError, match="Name the file itself"):
        open_benchmark("mmsu", mmsu)  # an array and Parquet


def test_mmsus_rule_drops_what_it_cannot_read(mmsu: Path) -> None:
    item = by_id(open_benchmark("mmsu", mmsu))["age_prediction_0001"]  # (A) an adult, (B) a robot
    ours, theirs = SCORERS["option-resolution"], SCORERS["mmsu-official"]
    told = {  # what the script gave when it was run on such replies: 1, 0, or no score
        **dict.fromkeys(("B", "(B)", "B. a robot", "The answer is B.", "Because it is B."), 1),
        **dict.fromkeys(("Answer: B", "A or B", "Definitely B", "", "None"), 0),
        **dict.fromkeys(("a robot", "The answer is a robot.", "b", "**B**", "<answer>B</answer>"), None),
    }
    found = {raw: theirs.score(answer(item, raw)) for raw in told}
    # "Definitely B" and "Answer: B" begin with letters of the script
    assert {raw: score and score.value for raw, score in found.items()} == told
    assert all(ours.score(answer(item, raw)).value == 1 for raw in ("**B**", "Answer: B", "a robot"))

    def transcribed(reply: str, choices: list[str], gold: str) -> int | None:
        text = reply.strip().replace("\n", "")
        if text == "" or text == "None":
            return 0
        if text[0] in "ABCD":
            letter = text[0]
        elif len(text) > 1 and text[-2] in "ABCD":
            letter = text[-2]
        else:
            return None
        columns = {f"choice_{name}": one for name, one in zip("ABCD", choices, strict=False)}
        return int(columns.get(f"choice_{letter}") == gold)

    draw = random.Random(1)
    for _ in range(5_000):
        reply = "".join(draw.choice("ABCDE().\n *ab:N") for _ in range(draw.randrange(6)))
        score = theirs.score(answer(item, reply))
        assert (score and score.value) == transcribed(reply, item.choices, item.gold), reply


def test_mmsus_submission_has_the_letters_of_its_file(mmsu: Path) -> None:
    found, benchmark = open_benchmark("mmsu", mmsu), get_benchmark("mmsu")
    rows = [answer(item, f"({'AB'[place % 2]})") for place, item in enumerate(found.items)]
    (path,) = benchmark.submission(rows, mmsu)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for line, row, said in zip(written, mmsu_rows(), rows, strict=True):
        expected = {key: value for key, value in row.items() if value != "" or key != "answer_gt"}
        assert {key: value for key, value in line.items() if key != "response"} == expected
        assert line[f"choice_{line['response'].lower()}"] == said.choices["AB".index(said.raw[1])]
    spoilt = [json.dumps(line) for line in written]
    spoilt[1] = json.dumps(written[1] | {"response": "A"})  # an empty column of that row
    spoilt[2] = spoilt[4]
    path.write_text("\n".join(spoilt))
    problems = Declared.read(FOLDER / "mmsu.yaml").form().validate(path, rows)
    assert len(problems) == 3 and "'response': expected B, D, found 'A'" in problems[0]
    assert "a second answer to it" in problems[1] and "no answer to 1: age_prediction_0002" in problems[2]


# ------------------------------------------------------------------------------------------------ MuChoMusic


@pytest.fixture
def muchomusic(tmp_path: Path) -> Path:
    """Thirty rows of the CSV: two corpora, two questions a clip, empty lists, equal options, a missing sound."""
    rows = []
    for number in range(30):
        sdd = number < 20
        clip = f"{415600 + number // 2}.json" if sdd else f"-a_{number // 2}_1.json"
        row = {"question": 'Which genre, "broadly"?', "correct_answer": "Blues"}
        row |= {"distractor_1_answer": "Rock", "distractor_2_answer": "Jazz,\nslow", "distractor_3_answer": "rock "}
        row["distractor_3_answer"] = "rock " if number == 3 else "Dance"
        row |= {"dataset": "sdd" if sdd else "musiccaps", "dataset_identifier": clip, "genre": "Blues"}
        rows.append(row | {"music_knowledge": "['genre and style']" if number % 2 else "", "music_reasoning": "[]"})
    with open(tmp_path / "muchomusic.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    noise(*(tmp_path / "sounds" / f"{415600 + number}.mp3" for number in range(9)))
    noise(*(tmp_path / "sounds" / f"-a_{number}.wav" for number in range(10, 15)))
    return tmp_path


def test_muchomusic_draws_the_order_of_its_choices(muchomusic: Path) -> None:
    audio = str(muchomusic / "sounds")
    found = open_benchmark("muchomusic", muchomusic, audio=audio)
    assert found.items[0].id == "muchomusic/0" and len(found.items) == 30
    # "Dance" is the letter D by the rule, and right where Blues is that; the other words have no capital of a letter.
    blues = [item.choices.index("Blues") for item in found.items]
    wrong = sum("Dance" in item.choices and place == 3 for item, place in zip(found.items, blues, strict=True))
    assert found.counts == {
        "choices that are equal but for case and spaces": 1,
        "questions about a clip that an earlier question has": 15,
        "another choice, said word for word, is right by muchomusic-official": wrong,
        "audio missing": 2,
    }
    places = [item.choices.index("Blues") for item in found.items]
    assert set(places) == {0, 1, 2, 3}
    again = open_benchmark("muchomusic", muchomusic, audio=audio)
    assert [item.choices for item in again.items] == [item.choices for item in found.items]
    other = open_benchmark("muchomusic", muchomusic, audio=audio, seed="1")
    assert [item.choices for item in other.items] != [item.choices for item in found.items]
    benchmark = get_benchmark("muchomusic")
    (path,) = benchmark.submission([answer(item, "Blues") for item in found.items], muchomusic)
    for line, item in zip(json.loads(path.read_text()), found.items, strict=True):
        assert line["answers"] == item.choices and line["answers"][line["answer_orders"].index(0)] == "Blues"
        assert line["model_output"] == "ABCD"[item.choices.index("Blues")]
        assert line["knowledge"] == (["genre and style"] if int(item.id.split("/")[1]) % 2 else [])


def test_muchomusics_rule(muchomusic: Path) -> None:
    item = Item("a", "Which?", ["Rock", "Blues", "Jazz", "Dance"], "Jazz", "", "", "")
    rule = SCORERS["muchomusic-official"]
    told = {"C": "Jazz", "Blues": "Blues", "jazz": "Jazz", "The correct answer is: (C) Jazz": "Jazz"}
    told |= {"rock or jazz": "Rock", "A or B": None, "": None, "Comedy jazz": "Jazz", "Definitely jazz": "Dance"}
    assert {raw: rule.score(answer(item, raw)).answer for raw in told} == told

    def transcribed(reply: str) -> int:
        reply = reply.split("The correct answer is:")[-1].strip()
        capitals = [letter for letter in "ABCD" if letter in reply]
        if len(capitals) == 1:
            return "ABCD".index(capitals[0])
        return next((n for n, one in enumerate(item.choices) if one.lower() in reply.lower()), -1)

    draw = random.Random(2)
    pieces = ["A", "B", "C", "rock", "jazz", "Blues", " ", "The correct answer is:", "x", "dance"]
    for _ in range(5_000):
        reply = "".join(draw.choice(pieces) for _ in range(draw.randrange(5)))
        assert rule.score(answer(item, reply)).value == (transcribed(reply) == 2), reply


# ----------------------------------------------------------------------------------------------------- ADQA


@pytest.fixture
def adqa(tmp_path: Path) -> Path:
    """Thirty rows: a phonetic transcription, an answer that is no option, options that are equal, a missing sound."""
    rows = []
    for number in range(30):
        row = {"id": f"dev_{number:04}", "audio_path": f"dev_audios/dev_{number:04}.wav"}
        row |= {"question_text": "What is heard?", "multi_choice": ["Applause", "A tram", "Rain", "Nothing"]}
        rows.append(row | {"answer": "A tram"})
    rows[1] |= {"multi_choice": ["ship (/ʃɪp/)", "sheep (/ʃiːp/)"], "answer": "sheep (/ʃiːp/)"}
    rows[2] |= {"answer": "A train"}
    rows[3] |= {"multi_choice": ["Rain", "rain ", "A tram"]}
    rows[4] |= {"answer": "a tram."}
    noise(*(tmp_path / row["audio_path"] for row in rows[:-1]))
    soundfile.write(tmp_path / rows[5]["audio_path"], np.zeros((400, 3)), 44_100)
    lines(tmp_path / "dev.jsonl", rows)
    hidden = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    lines(tmp_path / "eval" / "eval-noanswer.jsonl", hidden)
    return tmp_path


def test_adqa_counts_every_defect_and_writes_its_csv(adqa: Path) -> None:
    found = open_benchmark("adqa", adqa / "dev.jsonl")
    assert len(found.items) == 30 and set(found.errors) == {"dev_0002", "dev_0029"}
    assert found.counts == {
        "choices that end in a phonetic transcription": 1,
        "choices that are equal but for case and spaces": 1,
        "answer is none of the options": 1,
        "answer differs from its option by punctuation, case or spaces": 1,
        "audio missing": 1,
        "sound unlike most, of 3 channels at 44100 Hz": 1,
    }
    items = by_id(found)
    assert items["dev_0004"].gold == "A tram" and items["dev_0001"].choices[1] == "sheep (/ʃiːp/)"
    assert items["dev_0001"].question_type == "adqa"
    with pytest.raises(AudioLLMError, match=r"found dev\.jsonl, eval-noanswer\.jsonl\. Name the file itself"):
        open_benchmark("adqa", adqa)
    hidden = open_benchmark("adqa", adqa / "eval", audio=str(adqa))
    assert hidden.counts["answer hidden"] == 30 and not any(item.gold for item in hidden.items)
    assert SCORERS["option-resolution"].score(answer(hidden.items[0], "A tram")) is None
    rows = [answer(item, "(B)") for item in hidden.items]
    rows[7].raw = "I do not know"
    (path,) = get_benchmark("adqa").submission(rows, adqa)
    table = list(csv.reader(path.read_text().splitlines()))
    assert table[0] == ["question", "answer"] and table[2] == ["dev_0001", "sheep (/ʃiːp/)"] and table[8][1] == ""
    path.write_text("question,answer\ndev_0000,B\ndev_9999,Rain\n")
    problems = Declared.read(FOLDER / "adqa.yaml").form(form="csv").validate(path, rows)
    assert "'answer': expected Applause, A tram, Rain, Nothing, found 'B'" in problems[0]
    assert "a question that was not asked" in problems[1] and "no answer to 29: dev_0001" in problems[2]


def test_sounds_of_other_benchmarks_are_named_item_by_item(adqa: Path, tmp_path: Path, capsys) -> None:
    mmar, mmsu = tmp_path / "MMAR", tmp_path / "MMSU"
    for number, folder in ((7, mmar), (8, mmar / "deep"), (8, mmsu), (9, mmsu)):
        folder.mkdir(parents=True, exist_ok=True)
        data = (adqa / "dev_audios" / f"dev_{number:04}.wav").read_bytes()
        (folder / f"{number}.wav").write_bytes(data if number < 9 else data[:-2] + b"ab")  # as long, and another sound
    found = open_benchmark("adqa", adqa / "dev.jsonl", also=f"{mmar},{mmsu}")
    told = {item.id: (item.meta["also_in"], item.meta["same_sound_as"]) for item in found.items}
    assert told.pop("dev_0007") == ("MMAR", ["MMAR/7.wav"])
    assert told.pop("dev_0008") == ("MMAR, MMSU", ["MMAR/deep/8.wav", "MMSU/8.wav"])
    assert set(map(str, told.values())) == {"('no other', [])"}  # dev_0029, whose sound is missing, as well
    assert found.counts["sound that lies in MMAR as well"] == 2 and found.counts["sound that lies in MMSU as well"] == 1
    run = tmp_path / "run"
    with PredictionWriter(run / FILE_NAME) as writer:
        writer.write(answer(item, "A tram") for item in found.items if item.id not in found.errors)
    (run / MANIFEST_NAME).write_text(json.dumps({"benchmark": "adqa", "options": {}, "data": []}))
    assert main(["rescore", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "by also_in" in shown and re.search(r"MMAR, MMSU +100\.0 .* n 1\n", shown)
    with pytest.raises(AudioLLMError, match="expected a folder of another benchmark's audio, found no files"):
        open_benchmark("adqa", adqa / "dev.jsonl", also=str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------- one's own

OWN = """
title: A quiz
files: [quiz.tsv]
audio: [clip]
id: number
choices: [one, two, three]
question: asked
answer: key
answer_as: letter
kind: topic
groups: [topic]
left_out: {"3": the clip is cut}
submission:
  plain: {file: out.csv, columns: {number: id, key: letter, topic: topic}}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A table of one's own with a declaration: letters as answers, one of a column that is empty."""
    (tmp_path / "quiz.yaml").write_text(OWN)
    rows = ["number\tclip\tasked\tone\ttwo\tthree\tkey\ttopic"]
    for number, key in enumerate("ABCCAB"):
        two = "" if number % 2 else "cat"
        rows.append(f"{number}\tsounds/{number}\tWhich?\tdog\t{two}\tcow\t{key}\tanimals")
    (tmp_path / "quiz.tsv").write_text("\n".join(rows))
    noise(*(tmp_path / "sounds" / f"{number}.flac.wav" for number in range(6)))
    for number in range(6):
        (tmp_path / "sounds" / f"{number}.flac.wav").rename(tmp_path / "sounds" / f"{number}.wav")
    return tmp_path


def test_a_declaration_of_ones_own_is_opened_by_its_path(own: Path) -> None:
    name = str(own / "quiz.yaml")
    found = open_benchmark(name, own)
    assert found.left_out == {LeftOut.DEFECT: 1} and found.total == 6
    assert [item.gold for item in found.items] == ["dog", "letter B", "cow", "dog", "letter B"]
    assert found.counts["answer is none of the options"] == 2  # B is empty there: nothing is guessed
    benchmark = get_benchmark(name)
    assert (benchmark.name, benchmark.title) == ("quiz", "A quiz")
    kept = [item for item in found.items if item.id not in found.errors]
    (path,) = benchmark.submission([answer(item, "cow") for item in kept], own)
    assert path.read_text() == "number,key,topic\n0,C,animals\n2,C,animals\n4,C,animals\n"
    array = own / "mmau.yaml"  # arrays like MMAU's
    keys = "title: T\nfiles: ['*.json']\nid: id\nchoices: choices\naudio: audio_id\nkind: task\ngroups: [difficulty]\n"
    array.write_text(keys + "answer_as: index\n")
    row = {"id": 1, "audio_id": "./sounds/0", "question": "?", "choices": ["x", "y"], "answer": 1, "task": "music"}
    (own / "rows.json").write_text(json.dumps([row, row | {"id": 2, "answer": 2}, row | {"id": 3, "answer": None}]))
    assert [item.gold for item in open_benchmark(str(array), own / "rows.json").items] == ["y", "number 2", ""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title: A quiz\n", ""), "missing key title"),
        (("answer_as: letter", "answer_as: letters"), "did you mean 'letter'"),
        (("answer: key", "anwser: key"), "unknown key 'anwser' .did you mean 'answer'"),
        (("kind: topic", "kind: topic\npublished_rule: letters"), "published_rule: expected one of its scorers"),
        (("key: letter,", "key: leter,"), r"submission.plain.columns.key: expected one of .* found 'leter' .did you"),
        (("out.csv", "../out.csv"), "submission.plain.file: expected a name that ends in"),
        (("kind: topic", "kind: topic\naudio_name: '('"), "expected a regular expression"),
        (("audio: [clip]", "audio: [clop]"), r"line 2: expected 'clop', found number, clip.*did you mean 'clip'"),
        (("choices: [one, two, three]", "choices: one"), "'one': expected texts, found 'dog'"),
        (("[quiz.tsv]", "['../*.tsv']"), "files: expected names or patterns of names, without folders"),
        (("[quiz.tsv]", "[quizz.tsv]"), "expected A quiz's file, quizz.tsv, found none"),
        (("kind: topic", "kind: topic\nonly: {topic: [plants]}"), "found 6 left out: of a part that is not asked"),
        (("kind: topic", "kind: topic\nonly: {topc: [plants]}"), "expected 'topc'.*did you mean 'topic'"),
    ],
)
def test_what_is_wrong_with_a_declaration_is_one_sentence(own: Path, change: tuple[str, str], message: str) -> None:
    text = OWN.replace(*change)
    if "only" in text or "left" in change[0]:
        text = text.replace('left_out: {"3": the clip is cut}\n', "")
    (own / "quiz.yaml").write_text(text)
    with pytest.raises(AudioLLMError, match=message):
        open_benchmark(str(own / "quiz.yaml"), own)


ODD = [None, "", 0, 1.5, True, [], {}, "[", "['a.wav']", "[1]", ["a"], [None], [""], ["a", 1], {"a": 1}, "x" * 5000]
ODD += [
    "../a.wav",
    "/a.wav",
    "a\0b",
    "\ud800",
    ["dog", "dog "],
    [["a"]],
    "(B)",
    "9" * 400,
    ["a.wav", "a.wav"],
    "[" * 900,
]
ODD += [[str(number) for number in range(40)], "dog", ["dog", "cat"], "a.wav"]


def test_odd_values_end_in_items_or_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands under a key: no traceback, and what opens can be stored, read back and handed in."""
    noise(tmp_path / "a.wav")
    fits = {"audio_path": "a.wav", "choices": ["dog", "cat"], "multi_choice": ["dog", "cat"], "choice_a": "dog"}
    fits |= {"choice_b": "cat", "choice_c": None, "choice_d": None, "answer_gt": "dog", "answer": "dog"}
    fits |= {f"distractor_{number}_answer": f"x{number}" for number in (1, 2, 3)}
    fits |= {"correct_answer": "dog", "dataset_identifier": "a_1.json"}
    draw, opened = random.Random(3), 0
    for number in range(400):
        benchmark = Declared.read(FOLDER / f"{DECLARED[number % len(DECLARED)]}.yaml")
        asked = benchmark.declaration
        keys = [asked.id or "none", *asked.kept, *asked.lists]
        for named in (asked.question, asked.choices, asked.answer, asked.audio):
            keys += [named] if isinstance(named, str) else named
        rows = [{key: fits.get(key, f"{key} {place}") for key in keys} for place in range(2)]
        for _ in range(draw.randrange(4)):
            draw.choice(rows)[draw.choice(keys)] = draw.choice(ODD)
        try:
            items = benchmark.open(
                lines(tmp_path / "rows.jsonl", rows), several=draw.choice(["skip", "first", "all"])
            ).items
        except AudioLLMError as error:
            assert "expected" in str(error)
            continue
        opened += 1
        stored = [answer(item, draw.choice(["dog", "B", ""])).to_json() for item in items]
        read = [Prediction.from_json(line, "line") for line in stored]
        for form in asked.submission:
            benchmark.submission(read, tmp_path, form=form)
    assert 100 < opened < 380


def test_names_that_lead_elsewhere_and_names_that_clips_share(own: Path) -> None:
    table = (own / "quiz.tsv").read_text()
    (own / "sounds" / "deep").mkdir()
    (own / "quiz.tsv").write_text(table.replace("sounds/0", "../sounds/0").replace("sounds/2", "elsewhere/4"))
    found = open_benchmark(str(own / "quiz.yaml"), own)
    # 0 has its last name to itself, but there is none at the top; 2 must not be heard as 4
    assert {"0", "2"} <= set(found.errors) and "4" not in found.errors
    with pytest.raises(AudioLLMError, match="no-such.yaml"):
        open_benchmark(str(own / "no-such.yaml"), own)
