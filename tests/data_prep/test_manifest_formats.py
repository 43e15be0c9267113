"""Every format of ``kind: manifest``: the same sounds and words become the same samples; recipes on real recordings."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from audio_llm.cli import main
from audio_llm.errors import ConfigError
from audio_llm.model.encoder import build_encoder
from audio_llm.shards.reader import ShardDataset
from data_prep.manifest.formats import FORMATS
from data_prep.manifest.rows import Reason
from eval.benchmarks.spatial_sound_qa import SpatialSoundQA
from tests.data_prep.manifest_tools import made, noise, rejected, samples, wav, write_lines
from tests.paths import ROOT, SHARED

# ------------------------------------------------------------------------------------------------ formats


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


ANSWERS = ("dog", "rain", "dog", "rain")


def _names_of(folder: Path) -> list[str]:
    """Four sounds, and how they are called."""
    return [str(wav(folder / f"{number}.wav", number).relative_to(folder)) for number in range(4)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {"id": f"q{number}", "audio": name, "question": "Which sound?", "answer": answer, "choices": ["dog", "rain"]}
        for number, (name, answer) in enumerate(zip(_names_of(folder), ANSWERS, strict=True))
    ]


def separated(folder: Path, separator: str) -> dict[str, Any]:
    path = folder / "rows.table"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=separator)
        table.writerow(["id", "sound", "q", "a", "one", "two", "three"])
        for row in _rows(folder):
            table.writerow([row["id"], row["audio"], row["question"], row["answer"], *row["choices"], ""])
    columns = {"audio": "sound", "question": "q", "answer": "a", "choices": ["one", "two", "three"]}
    return {"format": "csv" if separator == "," else "tsv", "path": path, "columns": columns}


def json_array(folder: Path) -> dict[str, Any]:
    (folder / "rows.json").write_text(json.dumps({"data": _rows(folder)}))
    return {"format": "json", "path": folder / "rows.json"}


def json_lines(folder: Path) -> dict[str, Any]:
    rows = [row | {"answer": "AB"[row["choices"].index(row["answer"])]} for row in _rows(folder)]
    return {"format": "jsonl", "path": write_lines(folder / "rows.jsonl", rows), "answer_as": "letter"}


def parquet(folder: Path) -> dict[str, Any]:
    """Sounds as Hugging Face writes them: a struct of bytes and path, by either of both; classes by number."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    rows = _rows(folder)
    for number, row in enumerate(rows):
        data = (folder / row["audio"]).read_bytes()
        row["audio"] = {"bytes": data, "path": None} if number else {"bytes": None, "path": row["audio"]}
    struct = {"bytes": Value("binary"), "path": Value("string")}
    texts = {"id": Value("string"), "question": Value("string"), "choices": List(Value("string"))}
    features = Features({**texts, "audio": struct, "answer": ClassLabel(names=["dog", "rain"])})
    Dataset.from_list(rows, features=features).to_parquet(folder / "rows.parquet")
    return {"format": "parquet", "path": folder / "rows.parquet"}


def saved(folder: Path) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict

    rows = [row | {"audio": (folder / row["audio"]).read_bytes()} for row in _rows(folder)]
    parts = {"one": Dataset.from_list(rows[:3]), "two": Dataset.from_list(rows[3:])}
    DatasetDict(parts).save_to_disk(folder / "saved")
    return {"format": "hf_datasets", "path": folder / "saved", "splits": {"train": ["one", "two"]}}


def sidecars(folder: Path) -> dict[str, Any]:
    for number, row in enumerate(_rows(folder)):
        (folder / f"{number}.json").write_text(json.dumps({"choices": row["choices"], "id": row["id"]}))
        (folder / f"{number}.txt").write_text(row["answer"] + "\n")
    return {"format": "sidecars", "path": folder, "columns": {"answer": "txt"}, "question": "Which sound?"}


def named(folder: Path) -> dict[str, Any]:
    for number, (name, answer) in enumerate(zip(_names_of(folder), ANSWERS, strict=True)):
        (folder / name).rename(folder / f"q{number}={answer}.wav")
    how = {"options": {"pattern": "(?P<id>.*)=(?P<answer>.*)"}, "question": "Which sound?", "draw_choices": 2}
    return {"format": "names", "path": folder, **how}


def classes(folder: Path) -> dict[str, Any]:
    for number, answer in enumerate(ANSWERS):
        wav(folder / answer / f"q{number}.wav", number)
    return {"format": "classes", "path": folder, "question": "Which sound?", "draw_choices": 2, "columns": {}}


def chat(folder: Path) -> dict[str, Any]:
    """ms-swift's form, and both of TRL's, with thinking and without."""
    rows = []
    for number, row in enumerate(_rows(folder)):
        asked, reply = row["question"], f"<think>I hear it.</think>\n<answer>{row['answer']}</answer>"
        parts = [{"type": "audio", "audio": row["audio"]}, {"type": "text", "text": asked}]
        user, assistant = {"role": "user", "content": parts}, {"role": "assistant", "content": reply}
        if number == 0:
            messages = [{"role": "system", "content": "Listen."}, user | {"content": f"<audio>{asked}"}, assistant]
            rows.append({"messages": messages, "audios": [row["audio"]]})
        elif number == 1:
            rows.append({"messages": [user, assistant]})
        else:
            rows.append({"prompt": [user], "completion": [assistant]})
        rows[-1] |= {"id": row["id"], "choices": row["choices"]}
    return {"format": "chat", "path": write_lines(folder / "rows.jsonl", rows)}


def webdataset(folder: Path) -> dict[str, Any]:
    members = {}
    for row in _rows(folder):
        members[f"{row['id']}.wav"] = (folder / row["audio"]).read_bytes()
        members[f"{row['id']}.cls"] = row["answer"].encode()
        members[f"{row['id']}.json"] = json.dumps({"question": row["question"], "choices": row["choices"]}).encode()
    _tar(folder / "0000.tar", members)
    return {"format": "webdataset", "path": folder, "columns": {"answer": "cls"}}


def audsem(folder: Path) -> dict[str, Any]:
    members = {}
    for row in _rows(folder):
        letter = "AB"[row["choices"].index(row["answer"])]
        lines = [f"{letter}. {choice}" for letter, choice in zip("AB", row["choices"], strict=True)]
        words = {
            "file_name": f"tar/{row['id']} (1.0-2.0)",
            "question": "\n".join([row["question"], "Choices:", *lines]),
            "answer": f"{letter}. {row['answer']}",
            "thinking": "I hear it.",
            "semantic_elements": "who: a dog; how: it barks",
        }
        members[f"{row['id']}.flac"] = (folder / row["audio"]).read_bytes()
        members[f"{row['id']}.json"] = json.dumps(words).encode()
    _tar(folder / "0000.tar", members)
    return {"format": "audsem", "path": folder}


def dcase(folder: Path) -> dict[str, Any]:
    for row in _rows(folder / "audio"):
        options = [f"{letter}. {choice}" for letter, choice in zip("AB", row["choices"], strict=True)]
        record = {"id": row["id"], "audio_url": f"audio/{row['audio']}", "question": row["question"]}
        answer = options[row["choices"].index(row["answer"])]
        (folder / f"{row['id']}.json").write_text(json.dumps(record | {"choice": options, "answer": answer}))
    return {"format": "dcase_aqa", "path": folder}


def mmau(folder: Path) -> dict[str, Any]:
    rows = [row | {"audio_id": f"./sounds/{row.pop('audio')}", "task": "sound"} for row in _rows(folder)]
    (folder / "mmau.json").write_text(json.dumps(rows))
    return {"format": "mmau", "path": folder / "mmau.json"}


def audiomcq(folder: Path) -> dict[str, Any]:
    rows = [row | {"audio_path": row.pop("audio"), "gemini_cot": "I hear it."} for row in _rows(folder)]
    return {"format": "audiomcq", "path": write_lines(folder / "data.jsonl", rows)}


def mmar(folder: Path) -> dict[str, Any]:
    rows = [row | {"audio_path": f"./{row.pop('audio')}", "url": row["id"]} for row in _rows(folder)]
    return {"format": "mmar", "path": write_lines(folder / "meta.jsonl", rows)}


FORMS: list[Callable[[Path], dict[str, Any]]] = [
    *(lambda folder: separated(folder, ","), lambda folder: separated(folder, "\t"), json_array, json_lines, parquet),
    *(saved, sidecars, named, classes, chat, webdataset, audsem, dcase, mmau, audiomcq, mmar),
]
THINKING = {"chat", "audsem", "audiomcq"}


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_samples(write, tmp_path: Path) -> None:
    """Four sounds and what is asked of them, however they lie: the same words, the same samples of sound."""
    folder = tmp_path / "data"
    folder.mkdir()
    keys = {name: str(value) if isinstance(value, Path) else value for name, value in write(folder).items()}
    manifest = made(tmp_path, **keys)
    found = samples(tmp_path)
    assert manifest["rows"] == 4 and not rejected(tmp_path)
    assert {(sample.question, sample.answer) for sample in found} == {("Which sound?", "dog"), ("Which sound?", "rain")}
    assert all(sorted(sample.choices) == ["dog", "rain"] and sample.task == "choice" for sample in found)
    assert all(sample.thinking == ("I hear it." if keys["format"] in THINKING else None) for sample in found)
    dataset = ShardDataset(tmp_path / "out" / "train")
    heard = {dataset.load_sample(n).answer: dataset.load_waveform(n).samples[0] for n in range(4)}
    stored = [np.round(noise(seed)[:, 0] * 32768) / 32768 for seed in (0, 1, 2, 3)]
    for answer, expected in (("dog", (0, 2)), ("rain", (1, 3))):
        assert any(np.allclose(heard[answer], stored[seed], atol=2 / 32768) for seed in expected)
    if keys["format"] not in ("classes",):
        assert {sample.id.rpartition("-")[2][:2] for sample in found} == {"q0", "q1", "q2", "q3"}


def test_spatial_scenes_are_rendered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "responses" / "binaural" / "room").mkdir(parents=True)
    for number in range(2):
        np.save(tmp_path / "responses" / "binaural" / "room" / f"{number}.npy", rng.normal(0, 0.2, (2, 300)))
        soundfile.write(tmp_path / f"Y{number}.wav", rng.normal(0, 0.1, 4000), 32_000)
    record = {"audio_id": "Y0", "reverb_id": "room/0.npy", "audio_id2": "Y1", "reverb_id2": "room/1.npy"}
    words = {"question_type": "MIXUP_DISTANCE_BOTH", "question": "Is it closer?", "answer": "Yes"}
    rows = [record | words, record | words | {"reverb_id": "../0.npy"}, record | words | {"audio_id": "gone"}]
    (tmp_path / "qa.json").write_text(json.dumps({"data": rows}))
    made(tmp_path, format="spatial_sound_qa", path=str(tmp_path / "qa.json"), max_rejects=2)
    (sample,) = samples(tmp_path)
    assert [(info.layout, info.seconds) for info in sample.audio] == [("binaural", 10.0)]
    assert sample.meta["question_type"] == "MIXUP_DISTANCE_BOTH" and sample.source and sample.source.clip == "Y0+Y1"
    assert rejected(tmp_path) == {"qa/1": "broken_row", "qa/2": "no_such_file"}
    own = tmp_path / "dataset.json"  # as beside the responses of our own scenes
    own.write_text('{"config": {"audio": {"sample_rate": 16000}}}')
    how = {"format": "spatial_sound_qa", "path": str(tmp_path / "qa.json"), "max_rejects": 2}
    with pytest.raises(ConfigError, match="options.sample_rate: expected 16000 Hz, .* found 32000 Hz"):
        made(tmp_path / "other", **how, root=str(tmp_path))
    asked = {"audio": str(tmp_path), "responses": str(tmp_path / "responses")}
    with pytest.raises(ConfigError, match="option sample_rate: expected 16000 Hz"):
        SpatialSoundQA().open(tmp_path / "qa.json", **asked)
    made(tmp_path / "own", **how, root=str(tmp_path), options={"sample_rate": 16000})
    own.unlink()
    for name in ("train", "eval-stage3-distance"):  # as published, side by side
        (tmp_path / "closed-end").mkdir(exist_ok=True)
        (tmp_path / "closed-end" / f"{name}.json").write_text(json.dumps({"data": rows[:1]}))
    with pytest.raises(ConfigError, match="questions of one split"):
        made(tmp_path, format="spatial_sound_qa", path=str(tmp_path / "closed-end"))


def test_sounds_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    folders = ("a", "b")
    rows = [{"id": name, "audio_id": f"./{name}/1.wav", "question": "Which?", "answer": name} for name in folders]
    for number, row in enumerate(rows):
        wav(tmp_path / row["audio_id"], number)
    (tmp_path / "mmau.json").write_text(json.dumps([row | {"choices": ["a", "b"]} for row in rows]))
    made(tmp_path, format="mmau", path=str(tmp_path / "mmau.json"))
    dataset = ShardDataset(tmp_path / "out" / "train")
    for number in range(2):
        stored = np.round(32768 * noise(number)).T / 32768
        assert np.array_equal(dataset.load_waveform(number).samples, stored.astype(np.float32))


def test_no_sound_and_no_class_are_told(tmp_path: Path) -> None:
    """As ``datasets`` writes them: null for a sound, -1 for a class."""
    from datasets import ClassLabel, Dataset, Features, Value

    data, text = wav(tmp_path / "a.wav", 1).read_bytes(), "rows.parquet: row"
    sounds = [{"bytes": data, "path": None}, {"bytes": None, "path": None}, {"bytes": None, "path": "../a.wav"}, None]
    rows = [{"audio": sound, "answer": 0} for sound in sounds] + [{"audio": sounds[0], "answer": -1}]
    struct = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": struct, "answer": ClassLabel(names=["dog", "rain"])})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    how = {"format": "parquet", "path": str(tmp_path / "rows.parquet"), "question": "Which?", "max_reject_share": 1.0}
    assert made(tmp_path, **how)["rows"] == 5
    reasons = ("no_sound_named", "outside_root", "no_sound_named", "no_answer")
    assert rejected(tmp_path) == {f"{text} {number}": reason for number, reason in enumerate(reasons, start=1)}


def test_what_two_files_say_is_not_taken_of_one(tmp_path: Path) -> None:
    """Two sounds of one name, and words that differ: beside sounds, and in tars."""
    one, other = wav(tmp_path / "one.wav", 1).read_bytes(), wav(tmp_path / "other.flac", 2).read_bytes()
    members = {"a.wav": one, "a.flac": other, "a.txt": b"dog", "b.wav": one, "b.txt": b"dog"}
    members |= {"b.json": b'{"txt": "rain"}', "c.wav": one, "c.txt": b"\xef\xbb\xbfdog\n"}
    members |= {"d.wav": other, "d.txt": "dog".encode("utf-16-le"), "e.wav": other, "e.json": b"[]"}
    (tmp_path / "beside").mkdir()
    for name, data in members.items():
        (tmp_path / "beside" / name).write_bytes(data)
    _tar(tmp_path / "0.tar", members)
    how = {"columns": {"answer": "txt"}, "question": "Which?", "max_reject_share": 1.0}
    made(tmp_path, format="webdataset", path=str(tmp_path / "0.tar"), **how)
    assert [sample.answer for sample in samples(tmp_path)] == ["dog"]
    wrong = {"a": "broken_row", "b": "broken_row", "d": "not_text", "e": "broken_row"}
    assert rejected(tmp_path) == {f"0.tar: {key}": reason for key, reason in wrong.items()}
    made(tmp_path / "again", format="sidecars", path=str(tmp_path / "beside"), **how)
    assert [sample.answer for sample in samples(tmp_path / "again")] == ["dog"]
    beside = {("a.flac" if key == "a" else f"{key}.wav"): reason for key, reason in wrong.items()}
    assert rejected(tmp_path / "again") == beside | {"a.flac": "several_sounds"}


def test_words_beside_a_sound_may_be_missing_or_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for number, words in enumerate(
        [b"dog", "dog".encode("utf-16"), None, b"{", b"[1]", b'[{"answer": "a"}, {"answer": "b"}]']
    ):
        wav(folder / f"{number}.wav", number)
        if words is not None:
            (folder / f"{number}.{'json' if words[:1] in b'{[' else 'txt'}").write_bytes(words)
    (folder / "5.txt").write_text("dog")
    (folder / "6.txt").write_text("no sound")
    how = {"columns": {"answer": "txt"}, "question": "What?", "max_reject_share": 1.0}
    manifest = made(tmp_path, format="sidecars", path=str(folder), **how)
    expected = {"1.wav": "not_text", "2.wav": "no_sidecar", "3.wav": "not_text", "4.wav": "broken_row"}
    assert rejected(tmp_path) == expected | {"5.wav": "repeated", "6.wav": "no_such_file"}
    assert [sample.id for sample in samples(tmp_path)] == ["mine-0", "mine-5_0"] and manifest["rows"] == 8


def test_sidecars_lie_beside_their_sounds_in_a_linked_folder_as_well(tmp_path: Path) -> None:
    """Sounds were found there, and every one rejected for words that lay beside it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part").symlink_to(tmp_path / "disk")
    how = sidecars(tmp_path / "disk") | {"path": str(tmp_path / "data")}
    assert made(tmp_path, **how)["rejects"] == 0 and len(samples(tmp_path)) == len(ANSWERS)


@pytest.mark.parametrize(
    "how", [{"format": "classes"}, {"format": "names", "options": {"pattern": "(?P<answer>.+)/.+"}}]
)
def test_what_is_left_out_of_a_folder_is_told(how: dict[str, Any], tmp_path: Path, capsys) -> None:
    """Links of git-annex and DVC whose files were not fetched; formats that are not read."""
    folder = tmp_path / "data"
    for number in range(4):
        wav(folder / ("dog", "cat")[number % 2] / f"{number}.wav", number)
    for number in range(3):
        (folder / "dog" / f"annexed{number}.wav").symlink_to(tmp_path / f"object{number}")
    (folder / "cat" / "u.m4a").write_bytes(b"x")
    made(tmp_path, path=str(folder), question="What?", **how)
    told = capsys.readouterr().err
    assert f"note: {folder}: Left out: " in told and told.count("Left out") == 1
    assert "3, dog/annexed0.wav the first (a link to a file that is not there)" in told
    assert "cat/u.m4a (m4a is no format that is read" in told


def test_captions_of_a_sound_are_samples_of_one_side(tmp_path: Path) -> None:
    """Clotho's columns and AudioCaps' rows; an empty caption and a sound that is missing are rejects."""
    clotho = ["file_name,caption_1,caption_2"]
    for number in range(6):
        wav(tmp_path / f"a clip {number}.wav", number)
        clotho.append(f'a clip {number}.wav,"one, of {number}",' + (f"two of {number}" if number else " "))
    (tmp_path / "clotho.csv").write_text("\n".join(clotho))
    how = {"format": "captions", "question": "What is heard?", "max_rejects": 2}
    splits = {"train": 0.5, "test": 0.5}
    made(tmp_path, path=tmp_path / "clotho.csv", splits=splits, **how)
    sides = [{(*one.recordings, one.answer) for one in samples(tmp_path, side)} for side in splits]
    assert not {group for group, _ in sides[0]} & {group for group, _ in sides[1]} and all(sides)
    said = {(f"mine/a clip {n}.wav", text.format(n)) for n in range(6) for text in ("one, of {}", "two of {}")}
    assert sides[0] | sides[1] == said - {("mine/a clip 0.wav", "two of 0")}
    assert rejected(tmp_path) == {"clotho.csv: line 2": Reason.NO_ANSWER.name.lower()}

    rows = ["audiocap_id,youtube_id,start_time,caption", "1,q,30,rain", "2,q,30,rain falls", "3,r,5,wind"]
    (tmp_path / "caps.csv").write_text("\n".join([*rows, "4,q,30,rain"]))
    wav(tmp_path / "wavs" / "Yq.wav", 9)
    caps = {"path": tmp_path / "caps.csv", "root": tmp_path / "wavs", "splits": {"train": 1}, "corpus": "caps"}
    made(tmp_path / "caps", **caps, **how)
    assert [one.answer for one in samples(tmp_path / "caps")] == ["rain", "rain falls"]
    assert sorted(rejected(tmp_path / "caps").values()) == ["no_such_file", "repeated"]


def test_a_chat_is_one_question_with_one_reply(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 1)
    user, reply = {"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A dog."}
    chats: list[tuple[dict[str, Any], str]] = [
        ({"messages": [user, reply, user, reply]}, "turns"),
        ({"messages": [reply]}, "turns"),
        ({"messages": "What?"}, "turns"),
        ({"prompt": "What?", "completion": "A dog."}, "turns"),
        ({"messages": [user | {"content": [{"type": "image"}]}, reply]}, "turns"),
        ({"messages": [user | {"content": "<audio><audio>What?"}, reply]}, "marks"),
        ({"messages": [user, reply], "audios": ["a.wav", "a.wav"]}, "marks"),
        ({"messages": [user | {"content": "What?"}, reply], "audios": ["a.wav"] * 5}, "several_sounds"),
        ({"messages": [user | {"content": "What?"}, reply], "audios": []}, "no_sound_named"),
        ({"messages": [user, reply], "audios": None}, "no_sound_named"),
        ({"messages": [user, reply | {"tool_calls": [{"id": "1"}]}]}, "turns"),
        ({"messages": [user, reply | {"loss": False}]}, "turns"),
        ({"messages": [user, reply | {"content": "<think>Hm.</think> A dog."}]}, "marks"),
        ({"messages": [user, reply | {"content": "<answer>A dog.</answer> Sure."}]}, "marks"),
        ({"messages": [user | {"loss": False}, reply | {"weight": 1}]}, ""),
    ]
    path = write_lines(tmp_path / "rows.jsonl", [{"audios": ["a.wav"]} | row for row, _ in chats])
    made(tmp_path, format="chat", path=str(path), max_reject_share=1.0)
    assert list(rejected(tmp_path).values()) == [reason for _, reason in chats if reason]
    assert [(sample.question, sample.answer) for sample in samples(tmp_path)] == [("What?", "A dog.")]


# ------------------------------------------------------------------------------------------------ real recordings


def _recipe(name: str, out: Path, *changes: str) -> int:
    return main(["prep", str(ROOT / "recipes" / "manifest" / f"{name}.yaml"), str(out), *changes, "--quiet"])


@pytest.mark.shared("data/fsdd")
def test_spoken_digits_of_unseen_speakers(tmp_path: Path, capsys) -> None:
    assert _recipe("names", tmp_path / "out", f"path={SHARED / 'data' / 'fsdd'}", "--workers=1") == 0
    assert "600 rows = 600 samples + 0 rejects" in capsys.readouterr().out
    train, test = samples(tmp_path, "train"), samples(tmp_path, "test")
    assert (len(train), len(test)) == (400, 200)
    speakers = [{sample.source.clip for sample in side if sample.source} for side in (train, test)]
    assert [len(found) for found in speakers] == [4, 2] and not speakers[0] & speakers[1]
    for side in (train, test):
        assert {sample.answer for sample in side} == set("0123456789")
        assert 0.4 < sum(sample.task == "open" for sample in side) / len(side) < 0.6
        assert all(len(set(sample.choices)) == 10 for sample in side if sample.choices)
    places = [sample.choices.index(sample.answer or "") for sample in train if sample.choices]
    assert max(places.count(place) for place in range(10)) < 0.2 * len(places)


@pytest.mark.shared("data/esc10", "data/mmau", "data/mmar")
@pytest.mark.parametrize("name", ["csv", "classes", "mmau", "mmar"])
def test_recipes_on_real_recordings(name: str, tmp_path: Path) -> None:
    """A dozen real recordings by the table of ESC-10, and under the names of real questions of MMAU and MMAR."""
    esc10, data = SHARED / "data" / "esc10", tmp_path / "data"
    (data / "audio").mkdir(parents=True)
    heading, *rows = (esc10 / "meta" / "esc50.csv").read_text().splitlines()
    rows = [row for fold in "14" for row in rows if row.startswith(f"{fold}-")][::14][:12]
    for row in rows:
        (data / "audio" / row.partition(",")[0]).symlink_to(esc10 / "audio" / row.partition(",")[0])
    sounds = sorted((data / "audio").iterdir())
    changes = [f"path={data}"]
    if name in ("csv", "classes"):
        (data / "meta").mkdir()
        (data / "meta" / "esc50.csv").write_text("\n".join([heading, *rows, ""]))
        changes = [f"path={data}"] if name == "classes" else [f"path={data}/meta/esc50.csv", f"root={data}/audio"]
        changes.append("draw_choices=2")
    elif name == "mmau":
        items = json.loads((SHARED / "data" / "mmau" / "mmau-test-mini.json").read_text())[:12]
        (data / "mmau.json").write_text(json.dumps(items))
        named = [item["audio_id"] for item in items]
    else:
        lines = (SHARED / "data" / "mmar" / "MMAR-meta.jsonl").read_text().splitlines()[:12]
        (data / "meta.jsonl").write_text("\n".join(lines) + "\n")
        changes, named = [f"path={data}/meta.jsonl"], [json.loads(line)["audio_path"] for line in lines]
    if name in ("mmau", "mmar"):
        for sound, place in zip(sounds, named, strict=True):
            (data / place).parent.mkdir(exist_ok=True)
            (data / place).symlink_to(sound)
    assert _recipe(name, tmp_path / "out", *changes, "--workers=1") == 0
    found = [
        sample for split in (tmp_path / "out").glob("*/sizes.json") for sample in samples(tmp_path, split.parent.name)
    ]
    assert len(found) == 12 and not rejected(tmp_path)
    assert all(info.layout == "mono" and 4.9 < info.seconds < 7.5 for sample in found for info in sample.audio)
    assert all(sample.answer in sample.choices for sample in found if sample.choices)
    if name == "mmar":
        assert all(
            sample.thinking and sample.source and str(sample.source.clip).startswith("https:") for sample in found
        )


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_names_every_format_and_every_reason() -> None:
    page = (ROOT / "docs" / "your_data.md").read_text()
    for reason in Reason:
        assert f"| `{reason.name.lower()}` | {reason.value} |" in page
    for name in FORMATS:
        assert f"`{name}`" in page and (ROOT / "recipes" / "manifest" / f"{name}.yaml").is_file()


def test_the_shortest_recipe_of_the_page_makes_what_the_quickstart_hears(tmp_path: Path, monkeypatch) -> None:
    """Recordings of 44.1 kHz and two channels, whose names have blanks, as its encoder is built to hear them."""
    page = (ROOT / "docs" / "your_data.md").read_text()
    (tmp_path / "birds.yaml").write_text(page.split("```yaml")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    with open("data/birds.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "question", "answer", "choices"])
        for number in range(10):
            soundfile.write(f"data/take {number} (garden).wav", noise(number, 1.0, 2), 44100)
            table.writerow([f"take {number} (garden).wav", "Which bird?", "wren", "wren|crow"])
    assert main(["prep", "birds.yaml", "runs/birds", "--quiet"]) == 0
    encoder = build_encoder(yaml.safe_load((ROOT / "recipes/quickstart/encoder.yaml").read_text())["encoder"])
    for split in ("train", "validation", "test"):
        assert len(ShardDataset(f"runs/birds/{split}", layouts=encoder.layouts, sample_rate=encoder.sample_rate))


def test_a_format_of_ones_own_is_one_function(tmp_path: Path, monkeypatch) -> None:
    page = (ROOT / "docs" / "extending" / "format.md").read_text()
    (tmp_path / "guest_format.py").write_text(page.split("```python")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    wav(tmp_path / "a.wav", 1)
    (tmp_path / "rows.txt").write_text("a.wav: dog\nno answer\n")
    how = {"path": str(tmp_path / "rows.txt"), "question": "What?", "max_rejects": 1}
    made(tmp_path, format="guest_format:FORMAT", **how)
    assert [sample.answer for sample in samples(tmp_path)] == ["dog"]
    assert rejected(tmp_path) == {"rows.txt: line 2": "broken_row"}
