"""DCASE task 5, AudioBench and zero-shot folders as benchmarks; text scores against other implementations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.errors import AudioError, AudioLLMError, ConfigError
from audio_llm.language import prompts
from eval.benchmarks import BENCHMARKS, get_benchmark, names, open_benchmark
from eval.benchmarks.base import Collection, Item
from eval.predictions import Prediction
from eval.scorers import SCORERS
from eval.scorers.stemming import stem
from eval.scorers.text import meteor
from tests.paths import DATA, SHARED

ESC10 = SHARED / "data" / "esc10"
OTHERS = json.loads((DATA / "meteor.json").read_text())


def tone(path: Path, hertz: float, kind: str = "WAV") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.2 * np.sin(2 * np.pi * hertz * np.arange(4000) / 16_000)
    soundfile.write(path, samples, 16_000, format=kind)


def answer(item: Item, raw: str) -> Prediction:
    """What a run stores of `item` when the model says `raw`."""
    return Prediction(
        item.id, item.question_type, item.format, item.question, item.choices, item.gold, raw=raw, meta=item.meta
    )


def aggregate(name: str, rows: list[Prediction]) -> dict[str, float]:
    kept = [(row, score) for row in rows if (score := SCORERS[name].score(row)) is not None]
    return SCORERS[name].aggregate([row for row, _ in kept], [score for _, score in kept])  # type: ignore[attr-defined]


def test_the_names_that_help_lists_are_those_that_are_found():
    assert names() == sorted(BENCHMARKS)


# ------------------------------------------------------------------------------------------------ DCASE task 5


@pytest.fixture
def dcase(tmp_path: Path) -> Path:
    """Six questions of three parts; one clip is MP3, one key broken, one clip twice and one in training too."""
    tone(tmp_path / "dev" / "audio" / "whale.wav", 200)
    tone(tmp_path / "dev" / "audio" / "fold1_a.wav", 300)
    tone(tmp_path / "dev" / "audio" / "audio_1.wav", 400, "MP3")
    rows = [
        ("whale", "A. rain", "species"),
        ("fold1_a", "B. wind", "counting"),
        ("fold1_a", "A. rain", "counting"),
        ("audio_1", "B. wind", "both"),
        ("audio_1", "A. wind", "both"),
        ("gone", "A. rain", "both"),
    ]
    for number, (name, gold, kind) in enumerate(rows):
        row = {"id": f"q{number}", "audio_url": f"audio/{name}.wav", "question": f"Question {number}?"}
        row |= {"choice": ["A. rain", "B. wind"], "answer": gold, "question_type": kind}
        (tmp_path / "dev" / f"q{number}.json").write_text(
            json.dumps(row | {"id": f"part{(1, 2, 2, 3, 3, 3)[number]}_{number}"})
        )
    (tmp_path / "train" / "audio").mkdir(parents=True)
    (tmp_path / "train" / "audio" / "audio_7.wav").write_bytes((tmp_path / "dev" / "audio" / "whale.wav").read_bytes())
    row |= {"id": "t", "audio_url": "audio/audio_7.wav"}
    (tmp_path / "train" / "t.json").write_text(json.dumps(row))
    return tmp_path


def test_dcase_items_errors_and_counts(dcase: Path) -> None:
    found = open_benchmark("dcase_aqa", dcase / "dev", train=str(dcase / "train"))
    assert [item.meta["part"] for item in found.items] == [1, 2, 2, 3, 3, 3]
    assert found.counts == {
        "answer is none of the options": 1,
        "audio file missing": 1,
        "MPEG audio named .wav": 1,
        "questions about a clip that an earlier question has": 2,
        "clip also in the training questions": 1,
    }
    assert sorted(found.errors) == ["part3_4", "part3_5"]
    assert found.items[1].clip == found.items[2].clip != found.items[3].clip
    assert str(dcase) not in json.dumps([item.clip for item in found.items]), "clips have the same names anywhere"
    assert found.waveform(3).sample_rate == 16_000
    dropped = open_benchmark("dcase_aqa", dcase / "dev", train=str(dcase / "train"), duplicates="drop")
    assert [item.id for item in dropped.items] == [item.id for item in found.items][1:]
    with pytest.raises(AudioLLMError, match="train=FOLDER"):
        open_benchmark("dcase_aqa", dcase / "dev", duplicates="drop")


def test_dcase_figures_are_macro_and_weighted(dcase: Path) -> None:
    items = open_benchmark("dcase_aqa", dcase / "dev").items
    rows = [answer(items[0], "A"), answer(items[1], "B. wind"), answer(items[2], "wind"), answer(items[3], "(A) rain")]
    rows += [answer(items[5], "I hear the sound of rain there, I think")]  # a mention is no answer here
    found = aggregate("dcase-aqa", rows)
    assert found["part 1 (bioacoustics)"] == 1 and found["part 2 (temporal soundscapes)"] == 0.5
    assert found["part 3 (complex questions)"] == 0 and found["part 3 (complex questions): questions"] == 2
    assert found["domain average (mean of parts)"] == pytest.approx(0.5)
    assert found["weighted by questions"] == pytest.approx(2 / 5)
    assert found["type counting"] == 0.5
    score = SCORERS["dcase-aqa"].score(rows[-1])
    assert score is not None and not score.parsed and "only mentioned" in score.explanation
    assert SCORERS["dcase-aqa"].score(answer(items[4], "A")) is None, "nothing is right where the key is broken"


def test_the_figure_that_ranks_dcase_has_an_interval_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the tables, in scores.json and in the report's first table; parts of unlike sizes, two questions a clip."""
    from audio_llm.cli import main
    from eval.predictions import FILE_NAME, MANIFEST_NAME, PredictionWriter

    rng, rows = np.random.default_rng(0), []
    for part, size, rate in ((1, 40, 0.3), (2, 80, 0.5), (3, 160, 0.7)):
        for number in range(size):
            raw = "rain" if rng.random() < rate else "wind"
            fields = ("both", "dcase_aqa", "?", ["rain", "wind"], "rain", raw)
            meta = {"part": part}
            rows.append(Prediction(f"{part}_{number}", *fields, clip=f"{part}_{number // 2}", meta=meta))
    with PredictionWriter(tmp_path / "run" / FILE_NAME) as writer:
        writer.write(rows)
    manifest = {"benchmark": "dcase_aqa", "scorer": {"name": "dcase-aqa"}}
    (tmp_path / "run" / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert main(["rescore", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    ranked = json.loads((tmp_path / "run" / "scores.json").read_text())["summary"]["ranked"]
    right = [[row.raw == "rain" for row in rows if row.meta["part"] == part] for part in (1, 2, 3)]
    assert ranked["value"] == pytest.approx(np.mean([np.mean(part) for part in right]))
    pairs = [np.reshape(part, (-1, 2)) for part in right]
    draws = np.mean([part[rng.integers(0, len(part), (4000, len(part)))].mean(axis=(1, 2)) for part in pairs], axis=0)
    low, high = np.quantile(draws, (0.025, 0.975))
    assert abs(ranked["low"] - low) < 0.1 * (high - low) and abs(ranked["high"] - high) < 0.1 * (high - low)
    text = f"{100 * ranked['value']:.1f} [{100 * ranked['low']:.1f}, {100 * ranked['high']:.1f}]"
    assert "domain average (mean of parts)" in shown and text in shown
    assert f"{ranked['value']:.4f} [{ranked['low']:.4f}, {ranked['high']:.4f}]" in shown
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    drawn = f"<b>{100 * ranked['value']:.1f}</b> <small>{100 * ranked['low']:.1f} – {100 * ranked['high']:.1f}</small>"
    assert drawn in page[: page.index("</table>")] and "<th>domain average (mean of parts)</th>" in page


def test_dcase_submission_is_written_and_valid(dcase: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = open_benchmark("dcase_aqa", dcase / "dev").items
    rows = [answer(item, "B") for item in items[:-1]] + [answer(items[-1], "no idea")]
    options = {"label": "Doe_LAB_task5_2", "key": "stem", "answer": "letter"}
    paths = get_benchmark("dcase_aqa").submission(rows, dcase / "out", **options)
    assert [path.name for path in paths] == [f"Doe_LAB_task5_2.{end}" for end in ("output.csv", "meta.yaml", "zip")]
    assert paths[0].read_text().splitlines()[:2] == ["question,answer", "q0,B"]
    assert "no answer to 1 of 6" in capsys.readouterr().err
    with pytest.raises(AudioLLMError, match="options of a DCASE question"):
        get_benchmark("dcase_aqa").submission([Prediction("x", "", "", "", ["a"], "a")], dcase / "out")


# ------------------------------------------------------------------------------------------------ zero-shot folders


@pytest.mark.shared("data/esc10")
def test_a_corpus_becomes_questions_by_its_official_folds() -> None:
    found = open_benchmark("zero_shot", ESC10)
    one = open_benchmark("zero_shot", ESC10, folds="2")
    assert {item.meta["fold"] for item in one.items} == {"2"} and 0 < len(one.items) < len(found.items)
    assert all(item.gold in item.choices and len(set(item.choices)) == 10 for item in found.items)
    places = np.bincount([item.choices.index(item.gold) for item in found.items], minlength=10)
    assert places.min() > 0.5 * places.mean(), "the right choice stands anywhere"
    assert {item.id: item.choices for item in one.items}.items() <= {i.id: i.choices for i in found.items}.items()
    wave = one.waveform(0)
    samples, rate = soundfile.read(ESC10 / "audio" / one.items[0].id)
    assert (wave.sample_rate, wave.num_samples) == (rate, len(samples))
    with pytest.raises(ConfigError, match="option folds"):
        open_benchmark("zero_shot", ESC10, folds="9")


def test_many_classes_are_drawn_from(tmp_path: Path) -> None:
    for number in range(30):
        tone(tmp_path / f"class_{number}" / "a.wav", 100 + number)
    items = open_benchmark("zero_shot", tmp_path).items
    assert {len(item.choices) for item in items} == {10} and all(item.gold in item.choices for item in items)
    assert len({tuple(item.choices) for item in items}) == 30
    assert len(open_benchmark("zero_shot", tmp_path, choices="26").items[0].choices) == 26
    assert items[0].choices != open_benchmark("zero_shot", tmp_path, seed="1").items[0].choices
    for bad in ({"choices": "27"}, {"choices": "many"}, {"folds": "1"}, {"fold": "1"}):
        with pytest.raises(ConfigError):
            open_benchmark("zero_shot", tmp_path, **bad)
    with pytest.raises(AudioError, match="no such folder"):
        open_benchmark("zero_shot", tmp_path / "nowhere")


HEADER = "filename,fold,target,category,esc10,src_file,take\n"
ROWS = "1-7-A-0.wav,1,0,dog,True,7,A\n2-8-A-1.wav,2,1,rooster,True,8,A\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            HEADER.encode() + ROWS.replace("rooster", "").encode(),
            "line 3: expected a value in column category, found none",
        ),
        (HEADER.encode() + ROWS.encode()[:40], "line 3: expected a value in column fold, found none"),
        ((HEADER + ROWS).replace("dog", "dög").encode("latin-1"), "expected CSV in UTF-8"),
        ((HEADER + ROWS).encode("utf-16"), "expected CSV in UTF-8"),
        (("\ufeff" + HEADER + ROWS).encode(), ""),
    ],
)
def test_tables_of_a_corpus_are_read_whole_or_refused(tmp_path: Path, table: bytes, message: str) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_bytes(table)
    if message:
        with pytest.raises(AudioError, match=message):
            open_benchmark("zero_shot", tmp_path)
        return
    assert [item.gold for item in open_benchmark("zero_shot", tmp_path).items] == ["dog", "rooster"]
    with pytest.raises(ConfigError, match="expected each fold once, found '1,1'"):
        open_benchmark("zero_shot", tmp_path, folds="1,1")


# ------------------------------------------------------------------------------------------------ AudioBench


def parquet(path: Path, rows: list[dict], sounds: list[bytes]) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    table = [row | {"context": {"bytes": data, "path": None}} for row, data in zip(rows, sounds, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(arrow.Table.from_pylist(table), path, row_group_size=2)


def heard(collection: Collection, index: int) -> float:
    wave = collection.waveform(index)
    return float(np.argmax(np.abs(np.fft.rfft(wave.samples[0]))) * wave.sample_rate / wave.num_samples)


def test_audiobench_files_open_with_their_sound(tmp_path: Path) -> None:
    for number in range(5):
        tone(tmp_path / f"{number}.wav", 1000 + 400 * number)
    sounds = [(tmp_path / f"{number}.wav").read_bytes() for number in range(5)]
    rows = [{"instruction": f"What is {n}?", "answer": f"a bird {n}"} for n in range(5)]
    parquet(tmp_path / "wavcaps_qa_test" / "data" / "test-0.parquet", rows, sounds)
    found = open_benchmark("audiobench", tmp_path / "wavcaps_qa_test")
    assert [item.meta["set"] for item in found.items] == ["wavcaps_qa"] * 5
    assert [heard(found, n) for n in (4, 0, 3)] == pytest.approx([2600, 1000, 2200], abs=5)
    assert found.items[2].question == "What is 2?" and found.items[2].gold == "a bird 2"
    lines = [{"audio": f"{n}.wav", "answer": {"text": f"a bird {n}"}, "references": ["bird song"]} for n in range(5)]
    (tmp_path / "audiocaps.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*lines, {**lines[0], "audio": "9.wav"}])
    )
    captions = open_benchmark("audiobench", tmp_path / "audiocaps.jsonl")
    assert captions.counts == {"audio file missing": 1} and list(captions.errors) == ["audiocaps/5"]
    assert captions.items[0].question.startswith("Describe") and heard(captions, 1) == pytest.approx(1400, abs=5)
    score = SCORERS["audiobench"].score(answer(captions.items[0], "<answer>bird song</answer>"))
    assert score is not None and score.value > 0.9 and "reference 'bird song'" in score.explanation


def test_audiobench_music_has_choices_from_either_place(tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 500)
    lettered = "Which instrument?\n(A) piano\n(B) A flute"
    rows = [
        {"audio": "a.wav", "instruction": "Which?", "choices": ["piano", "flute"], "answer": "flute"},
        {"audio": "a.wav", "instruction": lettered, "answer": "(B) A flute"},
        {"audio": "a.wav", "instruction": lettered, "answer": "drums"},
    ]
    (tmp_path / "muchomusic.json").write_text(json.dumps(rows))
    found = open_benchmark("audiobench", tmp_path / "muchomusic.json")
    assert [item.choices for item in found.items] == [["piano", "flute"], ["piano", "A flute"], ["piano", "A flute"]]
    assert [item.gold for item in found.items] == ["flute", "A flute", ""]
    assert found.items[1].question == "Which instrument?"
    assert list(found.errors) == ["muchomusic/2"] and "'drums' is none of the options" in found.errors["muchomusic/2"]
    score = SCORERS["audiobench"].score(answer(found.items[1], "B"))
    assert score is not None and score.value == 1
    paths = get_benchmark("audiobench").submission([answer(found.items[0], "<answer>flute</answer>")], tmp_path / "out")
    assert json.loads(paths[0].read_text())[0]["model_prediction"] == "flute"


def test_audiobench_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"audio": "a.wav", "instruction": "?"}]')
    with pytest.raises(ConfigError, match="a path that names its set"):
        open_benchmark("audiobench", tmp_path / "x.json")
    with pytest.raises(ConfigError, match="did you mean 'clotho_aqa'"):
        open_benchmark("audiobench", tmp_path / "x.json", set="clotho")
    with pytest.raises(AudioLLMError, match=r"x\.json: \[0\]: expected 'answer' or 'reference'"):
        open_benchmark("audiobench", tmp_path / "x.json", set="clotho_aqa")
    (tmp_path / "x.json").write_text('[{"audio": "a.wav"}, 3]')
    with pytest.raises(AudioLLMError, match=r"\[1\]: expected an object, found int"):
        open_benchmark("audiobench", tmp_path / "x.json", set="clotho_aqa")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(AudioLLMError, match=r"x\.parquet: expected a Parquet file"):
        open_benchmark("audiobench", tmp_path / "x.parquet", set="clotho_aqa")


def test_no_questions_are_refused_and_equal_names_in_two_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(AudioLLMError, match=r"x\.json: expected questions, found none"):
        open_benchmark("audiobench", tmp_path / "x.json", set="clotho_aqa")
    row = {"audio": "a.wav", "instruction": "Which?", "answer": "dog"}
    for part in ("one", "two"):
        (tmp_path / "sets" / part).mkdir(parents=True)
        (tmp_path / "sets" / part / "q.json").write_text(json.dumps([row]))
    found = open_benchmark("audiobench", tmp_path / "sets", set="clotho_aqa")
    assert [item.id for item in found.items] == ["one/q/0", "two/q/0"]


def test_questions_without_a_right_answer_are_counted_and_not_asked(tmp_path: Path) -> None:
    many = [f"sound {number}" for number in range(27)]
    asked = [
        ("Which?", many[:26], many[25]),
        ("Which?", many, many[26]),
        ("Which?", many[:2], "zebra"),
        ("Which?", [], ""),
    ]
    rows = []
    for number, (question, choices, gold) in enumerate(asked):
        tone(tmp_path / f"{number}.wav", 300)
        rows.append(
            {"audio_id": f"{number}.wav", "question": question, "choices": choices or ["a", "b"], "answer": gold}
        )
        rows[-1] |= {"id": f"q{number}", "task": "sound", "difficulty": "easy"}
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    found = open_benchmark("mmau", tmp_path / "mmau.json")
    assert found.counts == {"more choices than letters": 1, "answer is none of the options": 1, "answer hidden": 1}
    assert list(found.errors) == ["q1", "q2"]
    assert found.errors["q1"] == "item 'q1': expected at most 26 choices, a letter each, found 27."
    with pytest.raises(AudioLLMError, match="at most 26 choices"):
        prompts.question_text("Which?", many)  # nothing is left out in silence
    found = open_benchmark("zero_shot", _classes(tmp_path / "classes"), question=" ")
    assert found.counts == {"question without words": 2} and len(found.errors) == 2


def test_answers_that_name_a_choice_otherwise_are_repaired_and_numbers_are_ids(tmp_path: Path) -> None:
    rows = []
    for number, gold in enumerate(("dog", "DOG", "cat ", "(B) cat")):
        tone(tmp_path / f"{number}.wav", 300)
        rows.append({"id": number, "audio_id": f"{number}.wav", "question": "Which?", "choices": ["dog", "cat"]})
        rows[-1] |= {"answer": gold, "task": "sound", "difficulty": "easy", "model_output": gold}
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    found = open_benchmark("mmau", tmp_path / "mmau.json")
    assert [(item.id, item.gold) for item in found.items] == [("0", "dog"), ("1", "dog"), ("2", "cat"), ("3", "cat")]
    assert not found.errors and sum(found.counts.values()) == 1  # spaces and the right letter are no defects
    answers = get_benchmark("mmau").read_answers(tmp_path / "mmau.json")
    assert [row.gold for row in answers] == ["dog", "dog", "cat", "cat"]


def test_an_id_in_two_places_names_both(tmp_path: Path) -> None:
    for part in ("one", "two"):
        tone(tmp_path / part / "a.wav", 300)
        row = {"audio": "a.wav", "instruction": "Which?", "answer": "dog"}
        (tmp_path / part / "q.json").write_text(json.dumps([row]))
    with pytest.raises(AudioLLMError, match=r"item 'q/0': expected one id, found it in .*one and .*two\. Ask"):
        open_benchmark("audiobench", [tmp_path / "one", tmp_path / "two"], set="clotho_aqa")


def test_shards_without_their_list_are_told_apart(shards, tmp_path: Path) -> None:
    digests = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        shutil.copytree(shards(count=8, seed=seed), folder)
        (folder / "sizes.json").unlink()
        digests += open_benchmark("scenes", folder).fingerprint
    assert len(set(digests)) == 2 and all(digests)


def _classes(folder: Path) -> Path:
    for name in ("dog", "cat"):
        tone(folder / name / "a.wav", 300)
    return folder


# ------------------------------------------------------------------------------------------------ text scores


def test_stems_are_porters() -> None:
    assert {word: stem(word) for word in OTHERS["stems"]} == OTHERS["stems"]


def test_meteor_is_the_common_ports_without_synonyms() -> None:
    for case in OTHERS["meteor"]:
        assert meteor(case["said"], case["reference"])[0] == pytest.approx(case["meteor"], abs=1e-12), case


@given(st.lists(st.sampled_from("a dog barks rain falls on the roof".split()), min_size=1, max_size=12, unique=True))
def test_meteor_of_a_text_with_itself_is_the_best_there_is(text: list[str]) -> None:
    said = " ".join(text)
    best, _ = meteor(said, said)
    assert best == pytest.approx(1 - 0.5 / len(text) ** 3)
    assert meteor(" ".join(reversed(text)), said)[0] <= best + 1e-12
    assert meteor(said + " zebra", said)[0] < best
    assert meteor("zebra", said)[0] == 0


@pytest.mark.parametrize(
    ("raw", "gold", "values"),
    [
        ("A dog.", "a dog", (1, 1)),
        ("<think>a cat</think><answer>It is a dog barking</answer>", "a dog", (0, 1)),
        ("<think>a dog", "a dog", (0, 0)),
        ("hot dogs", "a dog", (0, 0)),
        ("", "a dog", (0, 0)),
    ],
)
def test_string_scores(raw: str, gold: str, values: tuple[int, int]) -> None:
    row = Prediction("x", "question", "audiobench", "?", [], gold, raw=raw)
    found = [SCORERS[name].score(row) for name in ("string-exact", "string-contains")]
    assert tuple(score.value for score in found if score) == values
