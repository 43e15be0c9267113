"""SpatialSoundQA: records of all nine types in three containers, sound rendered from dry clips, every figure."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from sklearn.metrics import average_precision_score, f1_score

from audio_llm.errors import AudioError, AudioLLMError, ConfigError
from eval.benchmarks import get_benchmark, open_benchmark
from eval.benchmarks.base import BenchmarkError
from eval.embedders import CharacterNgrams, LocalEncoder
from eval.predictions import Prediction
from eval.scorers import SCORERS, get_scorers
from eval.scorers.open_answers import SPATIAL_SOUND_QA, score_open
from tests.paths import SHARED

FIXTURES = SHARED / "fixtures" / "bat_ref.npz"
ANSWERS = {
    "CLASSIFICATION": "accelerating, revving, vroom; car",
    "DOA": "left, front, below; 1m",
    "MIXUP_SINGLE_CLASSIFICATION": "speech",
    "MIXUP_SINGLE_DOA": "right, behind, above; 3.5m",
    "MIXUP_DIRECTION": "Yes",
    "MIXUP_DISTANCE_BOTH": "No",
    "MIXUP_NONBINARY_DISTANCE": "1.5m",
    "MIXUP_NONBINARY_SOURCE": "dog; bark",
    "MIXUP_NONBINARY_DIRECTION": "left",
}


def records() -> list[dict[str, Any]]:
    rows = []
    for number, (kind, answer) in enumerate(ANSWERS.items()):
        second = kind.startswith("MIXUP")
        rows.append(
            {
                "audio_id": "eval/audio/Ya",
                "reverb_id": "room/0.npy",
                "audio_id2": "eval/audio/Yb" if second else None,
                "reverb_id2": "room/1.npy" if second else None,
                "question_id": number % 2,
                "question_type": kind,
                "question": f"What of {kind}?",
                "answer": answer,
            }
        )
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "dry" / "eval" / "audio").mkdir(parents=True)
    (tmp_path / "mp3d_reverb" / "binaural" / "room").mkdir(parents=True)
    for name in ("Ya", "Yb"):
        soundfile.write(tmp_path / "dry" / "eval" / "audio" / f"{name}.wav", rng.normal(0, 0.1, 8000), 32_000, "FLOAT")
    for number in range(2):
        np.save(tmp_path / "mp3d_reverb" / "binaural" / "room" / f"{number}.npy", rng.normal(0, 0.2, (2, 300)))
    (tmp_path / "qa" / "stage3-mixup").mkdir(parents=True)
    (tmp_path / "qa" / "stage3-mixup" / "eval.json").write_text(json.dumps({"data": records()}))
    return tmp_path


def opened(folder: Path, data: Path | None = None, **more: str) -> Any:
    options = {"audio": str(folder / "dry"), "responses": str(folder / "mp3d_reverb"), **more}
    return open_benchmark("spatial_sound_qa", data or folder / "qa", **options)


def test_all_types_open_and_are_heard(folder: Path) -> None:
    found = opened(folder)
    assert [item.question_type for item in found.items] == list(SPATIAL_SOUND_QA)
    assert [item.meta["paper_type"] for item in found.items] == list("ABCDEEEEE")
    assert found.items[3].id == "stage3-mixup/eval/3" and not found.errors and not found.counts
    assert found.items[0].clip != found.items[2].clip
    single, double = found.waveform(0), found.waveform(2)
    assert (single.layout, single.sample_rate, single.samples.shape) == ("binaural", 32_000, (2, 320_000))
    # By definition: -14 dBFS, plain convolution, cut to 10 s, mean of the two.
    wet = []
    for name, number in (("Ya", 0), ("Yb", 1)):
        dry, _ = soundfile.read(folder / "dry" / "eval" / "audio" / f"{name}.wav")
        dry *= 10 ** (-14 / 20) / np.sqrt(np.mean(dry**2))
        response = np.load(folder / "mp3d_reverb" / "binaural" / "room" / f"{number}.npy")
        wet.append(np.stack([np.convolve(dry, ear) for ear in response]))
    assert np.allclose(single.samples[:, :8299], wet[0], atol=1e-5)
    assert np.allclose(double.samples[:, :8299], (wet[0] + wet[1]) / 2, atol=1e-5)
    assert not single.samples[:, 8299:].any()


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_rendering_is_the_published_one_to_the_sample(folder: Path) -> None:
    reference = np.load(FIXTURES)
    for name, clip, response in (("Ya", "loader_a", "loader_r1"), ("Yb", "loader_b", "loader_r2")):
        path = folder / "dry" / "eval" / "audio" / f"{name}.wav"
        soundfile.write(path, np.ravel(reference[clip]), 32_000, "DOUBLE")
        np.save(folder / "mp3d_reverb" / "binaural" / "room" / f"{int(name == 'Yb')}.npy", reference[response])
    found = opened(folder)
    assert np.array_equal(found.waveform(0).samples, reference["loader_single"])
    assert np.array_equal(found.waveform(2).samples, reference["loader_dual"])


def test_the_three_containers_are_one(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records()))
    parquet.write_table(arrow.Table.from_pylist(records()), folder / "b.parquet")
    known = [(i.question_type, i.question, i.gold, i.clip, i.meta["sources"]) for i in opened(folder).items]
    for name in ("a.jsonl", "b.parquet"):
        found = opened(folder, folder / name)
        assert [(i.question_type, i.question, i.gold, i.clip, i.meta["sources"]) for i in found.items] == known
        assert len(found.fingerprint) == 1 and len(found.fingerprint[0]) == 64


def test_training_questions_beside_others_are_not_asked(folder: Path) -> None:
    """The published folders hold ``train.json`` beside the evaluation's files."""
    known = [item.id for item in opened(folder).items]
    train = folder / "qa" / "stage3-mixup" / "train.json"
    train.write_text(json.dumps({"data": records()[:4]}))
    for data in (folder / "qa", folder / "qa" / "stage3-mixup"):
        found = opened(folder, data)
        assert len(found.items) == len(known) and found.counts == {"file of training questions left out": 1}
    assert [item.id for item in opened(folder).items] == known
    assert len(opened(folder, train).items) == 4
    (folder / "qa" / "stage3-mixup" / "eval.json").unlink()
    assert len(opened(folder).items) == 4


def test_missing_sound_is_that_rows_error_alone_or_left_out(folder: Path) -> None:
    (folder / "mp3d_reverb" / "binaural" / "room" / "1.npy").unlink()
    found = opened(folder)
    assert len(found.items) == 9 and len(found.errors) == 7 and found.counts == {"room response missing": 7}
    assert "1.npy: expected a file, found none" in found.errors["stage3-mixup/eval/2"]
    assert found.waveform(0).num_samples == 320_000
    assert len(opened(folder, missing="skip").items) == 2
    (folder / "dry" / "eval" / "audio" / "Ya.wav").write_bytes(b"RIFF nonsense")
    with pytest.raises(AudioError, match=r"Ya\.wav"):
        opened(folder).waveform(0)
    shutil.rmtree(folder / "mp3d_reverb")
    with pytest.raises(
        BenchmarkError, match=r"9 questions, none of them with its sound \(the first one's room resp.*0.npy"
    ):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_type": "MIXUP_DIRECTIONS"}, "did you mean 'MIXUP_DIRECTION'"),
        ({"audio_id2": None}, "both 'audio_id2' and 'reverb_id2'"),
        ({"answer": ""}, "'answer'"),
        ({"audio_id": "../../etc/passwd"}, "a path inside its folder"),
        ({"reverb_id": 3}, "'reverb_id': expected a text"),
    ],
)
def test_malformed_records_are_named(folder: Path, change: dict[str, Any], words: str) -> None:
    rows = records()
    rows[4] |= change
    (folder / "bad.json").write_text(json.dumps({"data": rows}))
    with pytest.raises(AudioLLMError, match=r"data\[4\]") as caught:
        opened(folder, folder / "bad.json")
    assert words in str(caught.value)


def test_wrong_options_and_containers_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'responses'"):
        open_benchmark("spatial_sound_qa", folder / "qa", response="x")
    for rate in ("0", "99999999999"):
        with pytest.raises(ConfigError, match="sample_rate: expected 4000 to 192000 Hz"):
            opened(folder, sample_rate=rate)
    with pytest.raises(ConfigError, match="did you mean 'binaural'"):
        opened(folder, layout="binaurl")
    (folder / "bad.json").write_text('{"data": {"a": 1}}')
    with pytest.raises(AudioLLMError, match=r"bad\.json.*'question_type'"):
        opened(folder, folder / "bad.json")
    with pytest.raises(AudioLLMError, match="no such path"):
        opened(folder, folder / "qa" / "none.json")


# ------------------------------------------------------------------------------------------------ figures


def said(kind: str, gold: str, raw: str, number: int = 0) -> Prediction:
    return Prediction(f"{kind}-{number}", kind, "spatialsoundqa", "?", [], gold, raw=raw, meta={"file": "f"})


def figures(name: str, rows: list[Prediction], **settings: str) -> dict[str, float]:
    (scorer,) = get_scorers([name], {name: settings} if settings else None)
    scores = [scorer.score(row) for row in rows]
    kept = [(row, score) for row, score in zip(rows, scores, strict=True) if score is not None]
    return scorer.aggregate([row for row, _ in kept], [score for _, score in kept])  # type: ignore[attr-defined]


def test_the_right_answer_is_right_for_every_type(folder: Path) -> None:
    for item in opened(folder).items:
        for text in (
            item.gold,
            f"<answer>{item.gold}</answer>",
            f"<think>hm</think><answer>{item.gold.upper()}</answer>",
        ):
            score = SCORERS["spatial-sound-qa"].score(said(item.question_type, item.gold, text))
            assert score is not None and score.value == 1.0 and score.parsed, text


def test_f1_over_labels_is_scikit_learns() -> None:
    rng = np.random.default_rng(3)
    names = ["car", "engine, large", "dog", "rain (heavy)"]
    gold, mine = rng.random((40, 4)) < 0.5, rng.random((40, 4)) < 0.5
    gold[~gold.any(axis=1), 0] = True
    text = ["; ".join(name for name, there in zip(names, row, strict=True) if there) or "silence" for row in mine]
    rows = [
        said("CLASSIFICATION", "; ".join(n for n, there in zip(names, row, strict=True) if there), text[i], i)
        for i, row in enumerate(gold)
    ]
    found = figures("spatial-sound-qa", rows)
    table = np.array([["silence" in one, *row] for one, row in zip(text, mine, strict=True)])
    truth = np.array([[False, *row] for row in gold])
    assert found["labels: micro F1"] == pytest.approx(f1_score(truth, table, average="micro"))
    assert found["labels: macro F1"] == pytest.approx(f1_score(truth, table, average="macro", labels=[1, 2, 3, 4]))
    assert found["labels: exact set"] == pytest.approx((truth == table).all(axis=1).mean())


@pytest.mark.parametrize(
    ("text", "value"), [("Yes", 1.0), ("Yes, it is not further", 1.0), ("not yes", 0.0), ("no, yes is wrong", 0.0)]
)
def test_a_denied_yes_is_none(text: str, value: float) -> None:
    fields = dict(id="a", format="", question="?", choices=[], gold="Yes", question_type="MIXUP_DIRECTION")
    assert score_open(Prediction(**fields, raw=f"<answer>{text}</answer>")).value == value  # type: ignore[arg-type]


def test_directions_and_distances() -> None:
    kind = "DOA"
    rows = [
        said(kind, "left, front, below; 1m", "left, front, below; 1.5m", 0),
        said(kind, "left, front, below; 1m", "right, front, below; 2m", 1),
        said(kind, "left, behind, above; 2m", "left, front, below; 2m", 2),
        said(kind, "left, behind, above; 2m", "I do not know", 3),
    ]
    found = figures("spatial-sound-qa", rows)
    assert found["parse failures"] == 0.25
    assert found["place: all axes"] == 0.25
    assert found["place: left/right"] == 0.5 and found["place: front/behind"] == 0.5
    assert found["place: DER beyond 0 m"] == 0.75
    assert found["place: DER beyond 0.5 m"] == 0.5
    assert found["place: DER beyond 1 m"] == 0.25
    assert found["place: MAE (m)"] == pytest.approx(0.5)
    assert found["place: without a distance"] == 0.25


def test_figures_that_are_sums_have_intervals_over_clips() -> None:
    """Against a bootstrap that scores the drawn rows again; no clip, no interval that is wider or narrower."""
    rng = np.random.default_rng(5)
    rows = []
    for number in range(120):
        gold, mine = 1.0 + rng.integers(6) / 2, 1.0 + rng.integers(6) / 2
        rows.append(said("DOA", f"left, front, above; {gold}m", f"left, front, above; {mine}m", number))
        labels = [";".join(rng.choice(["car", "dog", "wind"], rng.integers(1, 3), replace=False)) for _ in range(2)]
        rows.append(said("CLASSIFICATION", *labels, number))
    rows = [replace(row, clip=f"c{number // 4}") for number, row in enumerate(rows)]
    scorer = SCORERS["spatial-sound-qa"]
    scores = [scorer.score(row) for row in rows]
    found = scorer.intervals(rows, scores)  # type: ignore[attr-defined]
    values = figures("spatial-sound-qa", rows)
    assert set(found) == {"labels: micro F1", "place: MAE (m)"} | {
        f"place: DER beyond {limit} m" for limit in ("0", "0.5", "1")
    }
    clips = np.arange(240).reshape(60, 4)
    draws = [figures("spatial-sound-qa", [rows[n] for n in clips[rng.integers(0, 60, 60)].ravel()]) for _ in range(300)]
    for name, interval in found.items():
        assert interval.value == pytest.approx(values[name])
        low, high = np.quantile([draw[name] for draw in draws], (0.025, 0.975))
        width = high - low
        assert abs(interval.low - low) < 0.25 * width and abs(interval.high - high) < 0.25 * width, name


def test_one_who_always_says_yes_is_seen() -> None:
    rows = [said("MIXUP_DIRECTION", gold, "Yes.", n) for n, gold in enumerate(["Yes", "Yes", "Yes", "No"])]
    rows += [said("MIXUP_DISTANCE_BOTH", gold, gold, n) for n, gold in enumerate(["Yes", "No"])]
    rows += [said("MIXUP_NONBINARY_DISTANCE", "2m", "2 m"), said("MIXUP_NONBINARY_DIRECTION", "left", "right")]
    found = figures("spatial-sound-qa", rows)
    assert found["MIXUP_DIRECTION: accuracy"] == 0.75
    assert found["binary accuracy, mean of direction and distance"] == pytest.approx((0.75 + 1) / 2)
    assert found["non-binary accuracy, mean of types"] == 0.5
    only = figures("spatial-sound-qa", rows[:4])
    assert only["yes_no: balanced accuracy"] == 0.5 and only["yes_no: yes among answers"] == 1.0
    assert only["yes_no: yes among gold answers"] == 0.75


def test_map_is_the_published_rule_with_given_tables(tmp_path: Path) -> None:
    """Cosine of the whole answer with every class, scikit-learn's average precision, mean over all classes."""
    rng = np.random.default_rng(5)
    classes = ["car", "dog", "bell, chime", "wind"]
    lines = ["index,mid,display_name", *(f"{n},/m/{n},{name.title()}" for n, name in enumerate(classes))]
    (tmp_path / "classes.csv").write_text("\n".join(lines))
    golds = ["car; dog", "bell, chime", "dog", "car", "dog; bell, chime"]
    answers = ["a car", "chimes", "a dog", "a bus", "dogs"]
    table, spoken = rng.normal(size=(4, 6)), rng.normal(size=(5, 6))
    (tmp_path / "classes.json").write_text(json.dumps(dict(zip(classes, table.tolist(), strict=True))))
    np.savez(tmp_path / "answers.npz", texts=np.array(answers), vectors=spoken)
    rows = [said("CLASSIFICATION", g, a, n) for n, (g, a) in enumerate(zip(golds, answers, strict=True))]
    found = figures(
        "label-similarity",
        rows,
        classes=str(tmp_path / "classes.csv"),
        class_table=str(tmp_path / "classes.json"),
        answer_table=str(tmp_path / "answers.npz"),
    )
    cosine = (spoken @ table.T) / np.linalg.norm(spoken, axis=1)[:, None] / np.linalg.norm(table, axis=1)
    truth = np.array([[name in gold.split("; ") for name in classes] for gold in golds])
    each = [average_precision_score(truth[:, k], cosine[:, k]) for k in range(3)]
    assert list(found.values()) == pytest.approx([np.mean(each), np.sum(each) / 4])
    assert all("table answers.npz" in name for name in found)
    with pytest.raises(ConfigError, match="a vector for 'a bike'"):
        figures(
            "label-similarity",
            [said("CLASSIFICATION", "car", "a bike")],
            answer_table=str(tmp_path / "answers.npz"),
            class_table=str(tmp_path / "classes.json"),
        )
    with pytest.raises(ConfigError, match="did you mean 'embedder'"):
        get_scorers(["label-similarity"], {"label-similarity": {"embeder": "x"}})


def test_spelling_alone_orders_labels() -> None:
    rows = [
        said("CLASSIFICATION", gold, raw, n)
        for n, (gold, raw) in enumerate([("car", "car"), ("dog", "dogs"), ("wind", "")])
    ]
    found = figures("label-similarity", rows)
    assert found["mAP over classes that occur (character n-grams 3-5)"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    same, near, far = (
        CharacterNgrams()(["race car", "race car", "cars", "vehicle"]) @ CharacterNgrams()(["race car"]).T
    ).ravel()[1:]
    assert same == pytest.approx(1) and same > near > far


def test_a_local_encoder_embeds_a_text_alike_in_any_batch(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "car", "dog", "wind", "a", ";"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "tiny-bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tiny-bert")
    embed = LocalEncoder(str(tmp_path / "tiny-bert"))
    assert embed.name == "tiny-bert"
    together = embed(["car", "a dog ; a wind a wind", "wind"])
    alone = np.concatenate([embed([text]) for text in ("car", "a dog ; a wind a wind", "wind")])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1)
    found = figures("label-similarity", [said("CLASSIFICATION", "car", "car")], embedder=str(tmp_path / "tiny-bert"))
    assert any("tiny-bert" in name for name in found)
    with pytest.raises(ConfigError, match=r"config\.json"):
        LocalEncoder(str(tmp_path / "nothing"))


def test_files_for_the_published_script(tmp_path: Path) -> None:
    rows = [said("CLASSIFICATION", "car; dog", "<answer>car</answer>", 0), said("CLASSIFICATION", "wind", " \n", 1)]
    paths = get_benchmark("spatial_sound_qa").submission(rows, tmp_path)
    assert [path.name for path in paths] == ["f_pred", "f_gt"]
    said_, gold = (path.read_text().splitlines() for path in paths)
    assert [line.strip().split("\t") for line in said_] == [
        ["CLASSIFICATION-0", "car"],
        ["CLASSIFICATION-1", "(no answer)"],
    ]
    assert [line.split("\t")[1].split("; ") for line in gold] == [["car", "dog"], ["wind"]]


def test_an_unscored_pass_gives_no_figures_that_look_like_numbers() -> None:
    assert math.isnan(figures("spatial-sound-qa", [])["parse failures"])


def test_a_run_hears_what_was_rendered_and_follows_swapped_ears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions → rendered sound → a stranger's endpoint that hears the louder ear → figures and official files."""
    from audio_llm.cli import main
    from tests.servers import Listener, serving

    rng = np.random.default_rng(0)
    (tmp_path / "responses" / "binaural" / "room").mkdir(parents=True)
    soundfile.write(tmp_path / "a.wav", rng.normal(0, 0.1, 4000), 8000)
    for number, gains in enumerate(((1.0, 0.3), (0.3, 1.0))):
        response = rng.normal(0, 0.1, (2, 50)) * np.array(gains)[:, None]
        np.save(tmp_path / "responses" / "binaural" / "room" / f"{number}.npy", response)
    rows = [
        {"audio_id": "a", "reverb_id": f"room/{n % 2}.npy", "question_type": "MIXUP_NONBINARY_DIRECTION"}
        | {"question": "On which side is it?", "answer": ("left", "right")[n % 2]}
        for n in range(20)
    ]
    (tmp_path / "eval.json").write_text(json.dumps({"data": rows}))
    run = str(tmp_path / "run")
    with serving(Listener) as address:
        command = ["eval", "listener", str(tmp_path / "eval.json"), "--benchmark", "spatial_sound_qa", "--out", run]
        assert main([*command, "--option", "sample_rate=8000", "--engine", address, "--controls", "silence,swap"]) == 0
    summary = json.loads((tmp_path / "run" / "scores.json").read_text())["summary"]
    assert summary["greedy"]["accuracy"]["value"] == 1.0 and summary["greedy"]["chance"] == 0.5
    assert summary["controls"]["silence"]["accuracy"]["value"] == 0.5
    assert summary["flips"]["share"]["value"] == 1.0
    assert main(["rescore", run, "--submission", str(tmp_path / "out")]) == 0
    assert "direction: left/right                          1.0000" in capsys.readouterr().out
    lines = [(tmp_path / "out" / f"eval_{kind}").read_text() for kind in ("pred", "gt")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 20


def test_logs_are_the_originals_and_score_by_its_rule(folder: Path, tmp_path: Path) -> None:
    """``calculate_map.py``: line by line, the whole answer embedded, scikit-learn's average precision by class, and 0
    for a class that nothing names."""
    rng = np.random.default_rng(8)
    classes = ["accelerating, revving, vroom", "car", "dog", "speech", "wind"]
    lines = ["index,mid,display_name", *(f"{n},/m/{n},{name.title()}" for n, name in enumerate(classes))]
    (tmp_path / "classes.csv").write_text("\n".join(lines))
    golds = [" ; ".join([classes[n % 4], classes[(n * 3) % 4]]).replace(" ; ", "; ") for n in range(0, 40, 3)]
    rows = []
    for number, gold in enumerate(golds):
        row = said("CLASSIFICATION", gold, ["a car\nor two", "dog; speech", "", "a  sound"][number % 4], number)
        rows.append(replace(row, meta={"file": "stage1/eval", "question_id": 500 - number}))
    paths = get_benchmark("spatial_sound_qa").submission(rows, tmp_path)
    assert [path.name for path in paths] == ["stage1-eval_pred", "stage1-eval_gt"]
    told, true = ([line.split("\t") for line in path.read_text().splitlines()] for path in paths)
    assert [key for key, _ in told] == [key for key, _ in true] == [f"CLASSIFICATION-{500 - n}" for n in range(14)]
    assert told[0][1] == "a car or two" and true[0][1] == golds[0]
    table = rng.normal(size=(len(classes), 6))
    spoken = {text: rng.normal(size=6) for text in {row.reply().said for row in rows} | {text for _, text in told}}
    spoken |= {"a car\nor two": spoken["a car or two"], "a  sound": spoken["a sound"]}
    (tmp_path / "classes.json").write_text(json.dumps(dict(zip(classes, table.tolist(), strict=True))))
    np.savez(tmp_path / "answers.npz", texts=np.array(list(spoken)), vectors=np.array(list(spoken.values())))
    names = {line.split(",", 2)[2].lower(): n for n, line in enumerate(lines[1:])}
    target = np.zeros((len(true), len(classes)))
    for row, (_, text) in zip(target, true, strict=True):
        for label in text.split("; "):
            row[names[label]] = 1
    answered = [n for n, (_, text) in enumerate(told) if text != "(no answer)"]
    score = np.zeros_like(target)
    for n in answered:
        mine = spoken[told[n][1]]
        score[n] = [mine @ one / np.linalg.norm(mine) / np.linalg.norm(one) for one in table]
    each = [average_precision_score(target[:, k], score[:, k]) if target[:, k].any() else 0.0 for k in range(5)]
    given = {"class_table": "classes.json", "answer_table": "answers.npz", "classes": "classes.csv"}
    found = figures("label-similarity", rows, **{name: str(tmp_path / file) for name, file in given.items()})
    (published,) = [value for name, value in found.items() if "all 5 classes" in name]
    assert abs(published - np.mean(each)) < 1e-9
