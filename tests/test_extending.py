"""The code on the pages of docs/extending does what they say."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_llm.errors import AudioLLMError, ConfigError
from tests.paths import ROOT

PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))


def code(page: str) -> dict[str, Any]:
    """The names that the Python of a page defines."""
    text = (ROOT / "docs" / "extending" / f"{page}.md").read_text()
    module = types.ModuleType(f"extending_{page}")
    sys.modules[module.__name__] = module  # dataclasses look for the module of their class
    names = vars(module)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, f"{page}.md", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short(page) -> None:
    assert len(page.read_text().splitlines()) <= 60


def test_the_encoder() -> None:
    names = code("encoder")
    encoder = names["Energy"](names["EnergyConfig"]()).eval()
    waveform = torch.randn(2, 2, 16000)
    tokens, mask = encoder(waveform, torch.tensor([16000, 8000]))
    assert tokens.shape == (2, 100, 32) and mask.sum(1).tolist() == [100, 50]
    assert [encoder.count_tokens(n) for n in (16000, 8000)] == [100, 50]
    alone, _ = encoder(waveform[1:, :, :8000], torch.tensor([8000]))
    torch.testing.assert_close(alone[0, :50], tokens[1, :50])


def test_the_scorer() -> None:
    from eval.predictions import Prediction

    scorer = code("scorer")["SCORERS"][0]
    asked = dict(id="q", question_type="t", format="mmau", question="Which?", choices=["dog barks", "rain"])

    def score(raw: str):
        return scorer.score(Prediction(**asked, gold="dog barks", raw=raw, control="none", temperature=0.0))

    assert score("<answer>dog on the left</answer>").value == 1
    assert score("<answer>rain</answer>").value == 0
    assert not score("<answer>thunder</answer>").parsed


def test_the_declared_benchmark(tmp_path: Path) -> None:
    from eval.benchmarks import get_benchmark, open_benchmark

    page = (ROOT / "docs" / "extending" / "choices.md").read_text()
    (tmp_path / "quiz.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    table = ["number,asked,first,second,third,key,sound,topic,recorded,state"]
    table += [
        "16,What is it?,dog,,cow,C,a/1.wav,animals,Kiel; Bonn,done",
        "17,What is it?,dog,cat,,A,a/1.wav,animals,,done",
    ]
    table += ["18,What is it?,dog,cat,cow,B,a/1.wav,animals,,draft"]
    (tmp_path / "quiz.csv").write_text("\n".join(table))
    (tmp_path / "sounds" / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "sounds" / "a" / "1.wav", np.zeros(800), 8000)
    found = open_benchmark(str(tmp_path / "quiz.yaml"), tmp_path, audio=str(tmp_path / "sounds"))
    assert [(item.id, item.choices, item.gold) for item in found.items] == [("16", ["dog", "cow"], "cow")]
    assert found.left_out == {"known to be defective": 1, "of a part that is not asked here": 1}
    assert found.counts == {"choices that are empty, left away": 1, "more than one place": 1}
    declared = code("choices")["quiz"](tmp_path)
    assert declared.declaration == get_benchmark(str(tmp_path / "quiz.yaml")).declaration  # type: ignore[attr-defined]


def test_the_reward() -> None:
    reward = code("reward")["names_a_side"]
    said = ["<think>On the left.</think><answer>a</answer>", "<think>Somewhere.</think><answer>a</answer>", ""]
    assert reward([None] * 3, said, events=[[{}], [{}], []], bonus=0.5) == [0.5, 0.0, None]


def sound(path: Path, level: float = 0.1) -> Path:
    soundfile.write(path, np.random.default_rng(0).uniform(-level, level, 1600), 16000)
    return path


def test_the_benchmark_in_code(tmp_path: Path) -> None:
    benchmark = code("benchmark")["BENCHMARK"]
    sound(tmp_path / "a.wav")
    table = tmp_path / "quiz.csv"
    table.write_text("clip,question,options,answer\na.wav,Which?,dog|cat,dog\nb.wav,Which?,dog|cat,cat\n")
    opened = benchmark.open(table)
    assert [item.gold for item in opened.items] == ["dog", "cat"] and list(opened.errors) == [opened.items[1].id]
    assert opened.load(0).sample_rate == 16000
    table.write_text("clip,question,options,answer\na.wav,Which?,dog|cat,\n")
    with pytest.raises(AudioLLMError, match="row 2: expected a value for 'answer', found none"):
        benchmark.open(table)


def test_the_kind_of_data_to_prepare(tmp_path: Path) -> None:
    names = code("prep")
    made = [names["KIND"].prepare(names["CopyConfig"]("here", count), tmp_path / "out") for count in (3, 3)]
    assert [summary.fresh for summary in made] == [True, False]
    assert made[1].manifest["subsets"] == {"train": {"samples": 3}}
    with pytest.raises(ConfigError, match="count is 4 here and 3 there"):
        names["KIND"].prepare(names["CopyConfig"]("here", 4), tmp_path / "out")


def test_the_format_of_rows(tmp_path: Path) -> None:
    from data_prep.manifest.formats.base import Place

    rows = tmp_path / "rows.txt"
    rows.write_text("a.wav: dog\nnothing\n")
    row, reject = code("format")["FORMAT"].rows(Place(rows, tmp_path, {}))
    assert row.values == {"audio": "a.wav", "answer": "dog"} and reject.item == "rows.txt: line 2"


def test_the_stage_of_a_corpus(tmp_path: Path) -> None:
    from data_prep.corpus.stage import Item, Stage

    stage = code("stage")["Peaks"](least=0.01)
    assert isinstance(stage, Stage)
    stage.open(tmp_path)
    files = {"loud": sound(tmp_path / "loud.wav"), "soft": sound(tmp_path / "soft.wav", 0.001)}
    (tmp_path / "none.wav").write_bytes(b"no sound")
    items = [Item(name, {"audio": str(path)}) for name, path in files.items()]
    loud, soft, none = stage.run([*items, Item("none", {"audio": str(tmp_path / "none.wav")})])
    assert loud.fields["peak"] == pytest.approx(0.1, rel=0.05)
    assert [soft.reason, none.reason] == ["soft", "unreadable"]


def test_the_engine(tmp_path: Path) -> None:
    """Beside Transformers' own pipeline, on a small classifier with random weights."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, pipeline

    from audio_llm.answering.base import Options, Request
    from eval.benchmarks.base import Item

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64)
    config = ASTConfig(**sizes, num_mel_bins=32, id2label={0: "dog", 1: "rain", 2: "bell"})
    model = tmp_path / "model"
    ASTForAudioClassification(config).save_pretrained(model)
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(model)
    kind = code("engine")["Classifier"]
    assert kind.recognises(str(model)) and not kind.recognises(str(tmp_path))
    engine = kind.open(Options(str(model)))
    file = sound(tmp_path / "a.wav")
    item = Item("1", "What is it?", ["dog", "rain", "bell"], "dog", "what", "csv", "a.wav")
    one, none = engine.generate([Request(item, (engine.prepare(file, "a.wav"),)), Request(item)])
    samples, rate = soundfile.read(file, dtype="float32")
    best = pipeline("audio-classification", str(model))({"raw": samples, "sampling_rate": rate})[0]["label"]
    assert (one.raw, none.error) == (best, "expected one sound")
    soundfile.write(tmp_path / "b.wav", np.zeros((1600, 2)), 16000)
    with pytest.raises(AudioLLMError, match="expected layout mono, found stereo"):
        engine.prepare(tmp_path / "b.wav", "b.wav")
