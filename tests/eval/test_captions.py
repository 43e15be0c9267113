"""Captions: the layouts of Clotho and AudioCaps, and the measures against transcriptions of their definitions."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, PrerequisiteError
from eval.benchmarks import open_benchmark
from eval.benchmarks.base import Item
from eval.predictions import FILE_NAME, MANIFEST_NAME, Prediction, PredictionWriter
from eval.scorers.captions import CaptionError, CaptionMeasures, measure, meteor, tokenised

pytest.importorskip("pycocoevalcap", reason="needs the captions extra")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

CLOTHO = [
    ("Door, slam.wav", "A door slams, twice.", "someone slams a heavy door", "A door is closed with force"),
    ("rain 1.wav", "Rain falls on a tin roof", "it's raining hard on metal", "Heavy rain drums on the roof"),
    ("dog.wav", "A dog barks at passing cars", "the dog is barking near a road", "cars pass while a dog barks"),
    ("bell.wav", "A church bell rings slowly", "a bell tolls far away", "a large bell rings in a tower"),
]
REPLIES = {
    "Door, slam.wav": "A heavy door slams.",
    "rain 1.wav": "Rain drums on a roof",
    "dog.wav": "A DOG BARKS at passing cars!",
    "bell.wav": "",
}


def clotho(folder: Path) -> Path:
    path = folder / "clotho_captions_evaluation.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["file_name", "caption_1", "caption_2", "caption_3"], *CLOTHO])
    for number, row in enumerate(CLOTHO):
        noise(folder / "evaluation" / row[0], number)
    return path


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, 800), 8000)


def said(item: Item, raw: str, **more: Any) -> Prediction:
    asked = (item.id, item.question_type, item.format, item.question, item.choices, item.gold)
    return Prediction(*asked, raw=raw, meta=item.meta, clip=item.clip, **more)


@needs_java
def test_clotho_has_its_captions_in_columns(tmp_path: Path) -> None:
    found = open_benchmark("captions", clotho(tmp_path), audio=str(tmp_path / "evaluation"))
    assert not found.errors and found.counts == {"sound with 3 captions": 4}
    assert [item.id for item in found.items] == [row[0] for row in CLOTHO]
    assert [item.meta["references"] for item in found.items] == [list(row[1:]) for row in CLOTHO]
    assert found.items[0].gold == "A door slams, twice." and not found.items[0].choices
    assert found.waveform(2).samples.shape == (1, 800)


@needs_java
@pytest.mark.parametrize("named", ["Yq{0}.wav", "q{0}.flac", "q{0}_30.wav", "q{0}_30000_40000.wav"])
def test_audiocaps_has_a_row_a_caption_and_files_as_people_name_them(tmp_path: Path, named: str) -> None:
    rows = ["audiocap_id,youtube_id,start_time,caption"]
    for number, (_, *captions) in enumerate(CLOTHO):
        rows += [f'{7 * number + n},q{number},30,"{text}"' for n, text in enumerate(captions)]
        noise(tmp_path / "audio" / named.format(number), number)
    (tmp_path / "test.csv").write_text("\n".join(rows))
    found = open_benchmark("captions", tmp_path / "test.csv", audio=str(tmp_path / "audio"))
    assert [item.id for item in found.items] == [f"q{number}_30" for number in range(4)]
    assert [item.meta["references"] for item in found.items] == [list(row[1:]) for row in CLOTHO]
    assert not found.errors and found.waveform(3).samples.shape == (1, 800)


@needs_java
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file_name,caption_1,caption_2\na.wav, ,\n", "sound 'a.wav': expected a caption"),
        ("file_name,words\na.wav,x\n", "line 2: expected 'caption' or 'captions'"),
        ("sound,caption\na.wav,x\n", "expected 'file_name' or 'audio' or 'path' or 'youtube_id'"),
        ("youtube_id,start_time,caption\nq,soon,x\n", "'start_time': expected whole seconds"),
        ("file_name,caption\n", "expected at least one sound"),
        ("file_name,caption\na.wav,x\n", "expected audio of its items"),
    ],
)
def test_a_file_that_is_none_of_captions_is_told(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(AudioLLMError, match=sentence):
        open_benchmark("captions", tmp_path / "t.csv")


def test_without_java_captions_are_refused_before_a_model_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clotho(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrerequisiteError, match="default-jre-headless"):
        open_benchmark("captions", path)
    with pytest.raises(PrerequisiteError, match="default-jre-headless"):
        CaptionMeasures().prepare([Prediction("a", "caption", "captions", "?", [], "a dog", raw="a dog")])


@pytest.mark.parametrize("script", ["exit 1", "read line; echo 1 2 3; exit 1", "read line; echo; read line; echo"])
def test_a_program_that_dies_is_told_and_not_waited_for(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    meteor.cache_clear()
    with pytest.raises(CaptionError, match="METEOR's program: expected a score a caption"):
        measure(["a dog", "rain"], [["a dog"], ["it rains"]])
    with pytest.raises(CaptionError, match="Stanford's tokenizer: expected 1 lines"):
        tokenised(["a dog"])


# ------------------------------------------------------------------------------------------------------ transcriptions


def cider_d(candidates: list[list[str]], known: list[list[list[str]]]) -> list[float]:
    """Vedantam et al. 2015, section 3 and appendix: tf-idf of n-grams of one to four words, counts clipped at those of
    the reference, times a Gaussian of the lengths' difference with a sigma of 6, times ten."""

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))

    totals = [0.0] * len(candidates)
    for n in (1, 2, 3, 4):
        seen = Counter(gram for texts in known for gram in {one for text in texts for one in grams(text, n)})
        weight = lambda gram, seen=seen: math.log(len(known)) - math.log(max(1, seen[gram]))  # noqa: E731
        for place, (mine, texts) in enumerate(zip(candidates, known, strict=True)):
            left = {gram: count * weight(gram) for gram, count in grams(mine, n).items()}
            for text in texts:
                right = {gram: count * weight(gram) for gram, count in grams(text, n).items()}
                product = sum(min(value, right.get(gram, 0)) * right.get(gram, 0) for gram, value in left.items())
                norms = math.hypot(*left.values()) * math.hypot(*right.values())
                near = math.exp(-((len(mine) - len(text)) ** 2) / (2 * 6**2))
                totals[place] += near * (product / norms if norms else 0) / len(texts) / 4
    return [10 * total for total in totals]


def rouge_l(mine: list[str], texts: list[list[str]]) -> float:
    """Lin 2004: the longest common subsequence as precision and recall, the best of either, beta 1.2."""

    def common(one: list[str], two: list[str]) -> int:
        if not one or not two:
            return 0
        rest = common(one[1:], two[1:]) + 1 if one[0] == two[0] else 0
        return rest or max(common(one[1:], two), common(one, two[1:]))

    precision = max(common(mine, text) / len(mine) for text in texts) if mine else 0
    recall = max(common(mine, text) / len(text) for text in texts)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision and recall else 0.0


def bleu(candidates: list[list[str]], known: list[list[list[str]]], most: int) -> float:
    """Papineni et al. 2002: clipped n-gram precisions of the whole set, brevity by the reference of the nearest
    length."""
    logs, mine, wanted = 0.0, 0, 0
    for words, texts in zip(candidates, known, strict=True):
        mine += len(words)
        wanted += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    for n in range(1, most + 1):
        hits = total = 0
        for words, texts in zip(candidates, known, strict=True):
            count = lambda part, n=n: Counter(tuple(part[at : at + n]) for at in range(len(part) - n + 1))  # noqa: E731
            limits = Counter[tuple[str, ...]]()
            for text in texts:
                limits |= count(text)
            hits += (count(words) & limits).total()
            total += max(0, len(words) - n + 1)
        logs += math.log(hits / total) / most
    return math.exp(logs) * min(1.0, math.exp(1 - wanted / mine))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy captions and captions in silence, as a run on disk."""
    folder = tmp_path_factory.mktemp("captions")
    items = open_benchmark("captions", clotho(folder), audio=str(folder / "evaluation")).items
    out = folder / "run"
    with PredictionWriter(out / FILE_NAME) as writer:
        writer.write([said(item, REPLIES[item.id]) for item in items])
        writer.write([said(item, "a sound is heard", control="silence") for item in items])
    told = {"benchmark": "captions", "options": {}, "data": [], "finished": True, "items": 4, "asked": 4}
    (out / MANIFEST_NAME).write_text(json.dumps(told))
    return out


@needs_java
def test_every_measure_is_that_of_its_definition(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescore", str(run), "--scorers", "captions"]) == 0
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    greedy, silent = ([row for row in rows if row["control"] == control] for control in ("", "silence"))
    candidates = [tokenised([REPLIES[row[0]]])[0].split() for row in CLOTHO]
    known = [[text.split() for text in tokenised(row[1:])] for row in CLOTHO]
    wanted = cider_d(candidates, known)
    parts = [row["parts"] for row in greedy]
    assert [part["CIDEr-D / 10"] * 10 for part in parts] == pytest.approx(wanted, abs=1e-9)
    rouges = [rouge_l(mine, texts) for mine, texts in zip(candidates, known, strict=True)]
    assert [part["ROUGE-L"] for part in parts] == pytest.approx(rouges, abs=1e-9)
    assert f"{np.mean(wanted):.4f}" in table
    for n in (1, 2, 3):
        assert f"{bleu(candidates, known, n):.4f}" in table
    values = [row["value"] for row in greedy]
    assert len(silent) == 4 and sum(row["value"] for row in silent) < 0.5 < sum(values)
    assert values[3] == 0 and values[2] == pytest.approx(1.0) and 0.2 < values[0] < 0.6  # 2: a reference, word for word


@needs_java
def test_a_sentence_encoder_adds_the_mean_cosine_to_the_references(tmp_path: Path) -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 3.0], "d": [-1.0, 0.0]}
    (tmp_path / "table.json").write_text(json.dumps(vectors))
    scorer = CaptionMeasures().configured({"embedder": str(tmp_path / "table.json")})
    rows = [
        Prediction(said, "caption", "captions", "?", [], "a", raw=said, meta={"references": ["a", "a", "b"]})
        for said in ("c", "d")
    ]
    scorer.prepare(rows)
    scores = [score for score in map(scorer.score, rows) if score is not None]
    near = [score.parts["sentence similarity"] for score in scores]
    assert near == pytest.approx([math.sqrt(0.5), 0.0])  # below zero there is nothing: -2/3
    assert scorer.aggregate(rows, scores)["sentence similarity"] == pytest.approx(math.sqrt(0.5) / 2)


@needs_java
def test_words_are_those_of_the_package_and_no_reply_moves_another() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    plain = ["A dog's bark; it's loud!", "twenty-two (22) cars, e.g. trucks...", "don't; 'quoted' \"words\""]
    theirs = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(plain)})
    assert tokenised(plain) == [theirs[place][0] for place in range(len(plain))]
    odd = ["one\rtwo\u2028three\x85four\nfive", "", "...", "ein Hündchen bellt – 犬", "last"]
    assert tokenised(odd) == ["one two three four five", "", "", "ein hündchen bellt 犬", "last"]


@needs_java
def test_the_submission_is_a_table_of_file_and_caption(run: Path, tmp_path: Path) -> None:
    assert main(["rescore", str(run), "--scorers", "captions", "--submission", str(tmp_path / "sent")]) == 0
    with (tmp_path / "sent" / "captions.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table == [["file_name", "caption_predicted"], *([row[0], REPLIES[row[0]]] for row in CLOTHO)]
