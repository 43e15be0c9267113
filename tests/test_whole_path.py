"""The whole path at the smallest size, through the command line: sounds, scenes, encoder, SFT, GRPO, answers, report.

Nothing is learnt in so few steps; what is tested is that every part takes what the part before it wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audio_llm.cli import main
from tests.paths import ROOT

RECIPES = ROOT / "recipes" / "quickstart"
pytest.importorskip("pyroomacoustics", reason="needs the demo extra")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def override(**values: object) -> list[str]:
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]


ROOMS = ["rooms.train=2", "rooms.validation=1", "rooms.test=1", "rooms.positions=6", "rooms.listeners=1"]
SUBSETS = "subsets={encoder: {split: train, count: 24}, sft: {split: train, count: 16}, rl: {split: train, count: 16}, \
validation: {split: validation, count: 8}, test: {split: test, count: 8}}"
ENCODER = "encoder={name: spatial_ast, preset: tiny, window_seconds: 2.56, hidden_size: 48, depth: 1, heads: 4}"
SMALL = "model={hidden_size: 128, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, \
num_key_value_heads: 2}"
PROJECTOR = "model.projector={num_query_tokens: 4, hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 4, \
intermediate_size: 96}"


def test_from_sounds_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    scenes = [*ROOMS, SUBSETS, "text.count=200", "sounds.recordings=12", "samples_per_shard=8"]
    # Exit code 1 would be a text-only bias, which eight test questions can show by chance.
    assert run("prep", RECIPES / "scenes.yaml", data, *scenes, "--workers", 1, "--quiet") in (0, 1)
    manifest = json.loads((data / "dataset.json").read_text())
    assert manifest["subsets"]["test"]["samples"] == 8

    encoder = override(train=f"[{data / 'encoder'}]", validation=data / "validation", output=runs / "encoder")
    short = override(steps=2, seconds="", batch_size=8)
    assert run("train", RECIPES / "encoder.yaml", *encoder, *short, ENCODER) == 0
    text = override(
        text=data / "text.jsonl",
        output=runs / "lm",
        vocabulary=400,
        steps=3,
        batch_size=8,
        warmup_steps=1,
        validation=20,
    )
    assert run("train", RECIPES / "language_model.yaml", *text, SMALL) == 0

    parts = override(model__encoder__path=runs / "encoder", model__language_model__path=runs / "lm")
    sft = override(data__train=f"[{data / 'sft'}]", output=runs / "sft", steps=2, batch_size=4, warmup_steps=0)
    assert run("sft", RECIPES / "sft.yaml", *parts, *sft, PROJECTOR) == 0
    grpo = override(
        model__path=runs / "sft" / "merged", data__train=f"[{data / 'rl'}]", output=runs / "grpo", steps=2, seconds=""
    )
    size = override(prompts_per_step=2, group_size=2, max_completion_length=12, engine__backend="transformers")
    assert run("grpo", RECIPES / "grpo.yaml", *grpo, *size, "micro_batch_size=") == 0

    model = runs / "grpo" / "merged"
    command = ["eval", model, data / "test", "--engine", "transformers", "--max-tokens", 8, "--quiet"]
    assert run(*command, "--out", runs / "eval", "--controls", "silence,swap") == 0
    rows = [json.loads(line) for line in (runs / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 8
    page = tmp_path / "report.html"
    assert run("report", runs / "eval", "--out", page, "--training", runs / "sft", runs / "grpo") == 0
    assert "<html" in page.read_text()[:200].lower()

    from audio_llm.audio import encode
    from audio_llm.shards.reader import ShardDataset

    clip = tmp_path / "clip.flac"
    clip.write_bytes(encode(ShardDataset(data / "test")[0]["waveforms"][0]))
    capsys.readouterr()
    assert run("ask", clip, "Which sound is heard?", "--model", model, "--max-tokens", 8) == 0
    assert "answer:" in capsys.readouterr().out
