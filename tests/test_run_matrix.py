"""Every verb that fills a folder, and what may change before it is called again: another run is refused with what
differs, and nothing in the folder is touched. ``sft`` and ``grpo`` are in :mod:`tests.test_identity`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from audio_llm.cli import main
from tests.conftest import make_shards
from tests.tasks.test_classification import write_esc50
from tests.tasks.test_echotwin import SMALL_BEATS, make_questions
from tests.tasks.test_language_model import write_text


@dataclass
class Case:
    """A command that ran to its end. `changes` are words to add, with what the refusal says; `places` are changes in
    place, with the same; `honoured` are words that make no other run."""

    command: list[str]
    output: Path
    changes: dict[str, tuple[list[str], str]]
    places: dict[str, tuple[Callable[[], object], str]]
    honoured: list[list[str]] = field(default_factory=list)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree, default=str))))
    return str(path)


def louder(folder: Path) -> None:
    """Train the model in `folder` anew, as far as anyone can tell."""
    path = next(folder.glob("*.safetensors"))
    save_file({key: value * 1.5 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


def reversed_samples(path: Path) -> None:
    """Another sound of the same length in `path`."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    soundfile.write(path, np.ascontiguousarray(samples[::-1]), rate)


ENCODER = {"name": "spatial_ast", "preset": "tiny", "window_seconds": 0.64, "target_frames": 32, "hidden_size": 32,
           "depth": 1, "heads": 2}  # fmt: skip


def encoder(root: Path) -> Case:
    data = make_shards(root / "shards", 16)
    base = {"verb": "train", "task": "spatial", "train": [data], "encoder": ENCODER, "steps": 1, "batch_size": 4}
    base |= {"report_to": [], "log_steps": 1}
    start = root / "start"
    assert main(["train", written(root / "start.yaml", base | {"output": start})]) == 0
    other = shutil.copytree(start, root / "other")
    louder(other)
    recipe = written(root / "recipe.yaml", base | {"output": root / "out", "init": start})
    changes = {
        "length": (["steps=2"], "steps is 2 here and 1 there"),
        "rate": (["learning_rate=0.5"], "learning_rate is 0.5 here and 0.001 there"),
        "precision": (["precision=bf16"], "precision is bf16 here and fp32 there"),
        "batch": (["batch_size=2"], "batch_size is 2 here and 4 there"),
        "seed": (["seed=3"], "seed is 3 here and 0 there"),
        "data": ([f"train=[{make_shards(root / 'more', 16, seed=7)}]"], "train is"),
        "starting model": ([f"init={other}"], "init encoder.safetensors is"),
        "network": (["encoder.depth=2"], "encoder.depth is 2 here and 1 there"),
        "what learns": (["unfreeze=0"], "unfreeze is 0 here and None there"),
        "hearing": (["hearing=duplicate"], "hearing is duplicate here and refuse there"),
        "augmentation": (["augment.swap=false"], "augment.swap is False here and True there"),
        "loss": (["weights.azimuth_smoothing=1"], "weights.azimuth_smoothing is 1.0 here and 8.0 there"),
        "validation": ([f"validation={root / 'more'}"], "validation is"),
    }
    places = {
        "starting model": (lambda: louder(start), "init encoder.safetensors is"),
        "data": (lambda: (shutil.rmtree(data), make_shards(data, 16, seed=9)), "train is"),
    }
    return Case(
        ["train", recipe], root / "out", changes, places, [["log_steps=7"], ["save_steps=3", "report_to=[tensorboard]"]]
    )


def language_model(root: Path) -> Case:
    text = write_text(root / "text.jsonl", 40)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    base = {"verb": "train", "task": "language_model", "text": text, "output": root / "out", "model": sizes}
    base |= {"steps": 1, "batch_size": 4, "validation": 4, "style": "answer", "vocabulary": 320}
    changes = {
        "length": (["steps=2"], "steps is 2 here and 1 there"),
        "rate": (["learning_rate=0.5"], "learning_rate is 0.5 here and 0.001 there"),
        "warm-up": (["warmup_steps=2"], "warmup_steps is 2 here and 40 there"),
        "batch": (["batch_size=2"], "batch_size is 2 here and 4 there"),
        "seed": (["seed=3"], "seed is 3 here and 0 there"),
        "data": ([f"text={write_text(root / 'more.jsonl', 44)}"], "text is"),
        "network": (["model.hidden_size=32"], "model.hidden_size is 32 here and 16 there"),
        "depth": (["model.num_hidden_layers=2"], "model.num_hidden_layers is 2 here and 1 there"),
        "tokenizer": (["vocabulary=330"], "vocabulary is 330 here and 320 there"),
        "style": (["style=think"], "style is think here and answer there"),
        "validation": (["validation=8"], "validation is 8 here and 4 there"),
    }
    places = {"data": (lambda: text.write_text(text.read_text().replace("left", "port")), "text is")}
    return Case(["train", written(root / "recipe.yaml", base)], root / "out", changes, places)


def echotwin(root: Path) -> Case:
    data = make_questions(root / "questions", 12)
    base = {"verb": "train", "task": "echotwin", "train": [data], "output": root / "out", "encoder": SMALL_BEATS}
    base |= {"text": {"hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 300}, "steps": 1, "batch_size": 4}
    base |= {"model": {"hidden_size": 32, "layers": 1, "heads": 2}, "log_steps": 1}
    changes = {
        "length": (["steps=2"], "steps is 2 here and 1 there"),
        "rate": (["learning_rate=0.5"], "learning_rate is 0.5 here and 0.001 there"),
        "precision": (["precision=bf16"], "precision is bf16 here and fp32 there"),
        "batch": (["batch_size=2"], "batch_size is 2 here and 4 there"),
        "seed": (["seed=3"], "seed is 3 here and 0 there"),
        "data": ([f"train=[{make_questions(root / 'more', 12, seed=5)}]"], "questions is"),
        "encoder": (["encoder.depth=1"], "encoder.depth is 1 here and 2 there"),
        "text tower": (["text.layers=2"], "text.layers is 2 here and 1 there"),
        "head": (["model.head=letters"], "model.head is letters here and options there"),
        "what learns": (["unfreeze=1"], "unfreeze is 1 here and 0 there"),
        "loss": (["label_smoothing=0.3"], "label_smoothing is 0.3 here and 0.05 there"),
        "orders": (["permute=false"], "permute is False here and True there"),
        "control": (["model.listen=false"], "model.listen is False here and True there"),
        "validation": ([f"validation={root / 'more'}"], "validation is"),
    }
    sound = data / "audio" / "clip_1.wav"
    question = data / "q0001.json"
    places = {
        "sounds": (lambda: reversed_samples(sound), "sounds is"),
        "questions": (lambda: question.write_text(question.read_text().replace("Which", "What")), "questions is"),
    }
    command = ["train", written(root / "recipe.yaml", base)]
    return Case(command, root / "out", changes, places, [["log_steps=7"], ["keep_checkpoints=2", "save_steps=9"]])


def folds(root: Path) -> Case:
    sounds = write_esc50(root / "sounds", folds=3, per_class=1)
    network = {"name": "urbansound_cnn", "preset": "tiny", "window_seconds": 0.5}
    training = {"encoder": network, "steps": 1, "batch_size": 4, "report_to": [], "learning_rate": 0.001}
    base = {"verb": "folds", "task": "folds", "sounds": sounds, "output": root / "out", "training": training}
    base |= {"test_folds": [1]}
    changes = {
        "length": (["training.steps=2"], "training.steps is 2 here and 1 there"),
        "rate": (["training.learning_rate=0.5"], "training.learning_rate is 0.5 here and 0.001 there"),
        "precision": (["training.precision=bf16"], "training.precision is bf16 here and None there"),
        "batch": (["training.batch_size=2"], "training.batch_size is 2 here and 4 there"),
        "data": ([f"sounds={write_esc50(root / 'more', folds=3, per_class=1, seed=4)}"], "sounds (their bytes) is"),
        "network": (["training.encoder.window_seconds=0.4"], "training.encoder.window_seconds is 0.4 here and 0.5"),
        "what learns": (["training.unfreeze=0"], "training.unfreeze is 0 here and None there"),
        "augmentation": (["training.augment={swap: false}"], "training.augment is"),
        "loss": (["training.label_smoothing=0.1"], "training.label_smoothing is 0.1 here and None there"),
        "head": (["training.head={name: linear}"], "training.head is"),
        "candidates": (["candidates={other: {learning_rate: 0.1}}"], "candidates.other is"),
        "refit": (["refit={steps: 2}"], "refit is"),
    }
    places = {"sounds": (lambda: reversed_samples(next((sounds / "audio").glob("*.wav"))), "sounds (their bytes) is")}
    return Case(
        ["folds", written(root / "recipe.yaml", base)], root / "out", changes, places, [["max_reject_share=0.5"]]
    )


def prep(root: Path) -> Case:
    sounds = write_esc50(root / "sounds", folds=1, per_class=4)
    for number in range(4):  # a fourth class: every question has so many choices
        shutil.copy(next((sounds / "audio").glob("*.wav")), sounds / "audio" / f"1-99{number}-A-3.wav")
    table = sounds / "meta" / "esc50.csv"
    table.write_text(table.read_text() + "".join(f"1-99{n}-A-3.wav,1,3,drum,True,99{n},A\n" for n in range(4)))
    base = {
        "verb": "prep",
        "audio": {"seconds": 1.5},
        "sounds": {"folder": sounds, "shortest": 0.05},
        "split": {"train": 1.0},
        "rooms": {"train": 1, "positions": 24, "seconds": 0.05, "max_order": 1},
        "events": {"seconds": [0.2, 0.4], "gap": 0.05, "overlap": 0.1},
        "questions": {"choice": {"identity": 1}, "metres": [1.0, 2.5], "steps": [1, 2]},
        "subsets": {"sft": {"split": "train", "count": 8}},
    }
    changes = {
        "seed": (["seed=3"], "seed is 3 here and 0 there"),
        "rate": (["audio.sample_rate=8000"], "audio.sample_rate is 8000 here and 16000 there"),
        "length": (["audio.seconds=2"], "audio.seconds is 2.0 here and 1.5 there"),
        "layout": (["audio.layout=foa"], "audio.layout is foa here and binaural there"),
        "level": (["audio.level_db=-40"], "audio.level_db is -40.0 here and -32.0 there"),
        "head": (["head.radius=0.1"], "head.radius is 0.1 here and 0.0875 there"),
        "rooms": (["rooms.positions=12"], "rooms.positions is 12 here and 24 there"),
        "events": (["events.gap=0.1"], "events.gap is 0.1 here and 0.05 there"),
        "questions": (["questions.metres=[1.0, 3.0]"], "questions.metres is"),
        "subsets": (["subsets.sft.count=9"], "subsets.sft.count is 9 here and 8 there"),
        "text": (["text.count=5"], "text.count is 5 here and 0 there"),
        "sounds": (["sounds.folder="], "sounds is builtin"),
        "shards": (["samples_per_shard=4"], "samples_per_shard is 4 here and 256 there"),
    }
    places = {"sounds": (lambda: reversed_samples(next((sounds / "audio").glob("*.wav"))), "sounds is esc50")}
    command = ["prep", written(root / "recipe.yaml", base), str(root / "out"), "--quiet", "--workers", "1"]
    return Case(command, root / "out", changes, places)


def evaluation(root: Path, model: Path) -> Case:
    data, model = make_shards(root / "shards", 8), shutil.copytree(model, root / "model")
    louder(shutil.copytree(model, root / "other"))
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    changes = {
        "number": (["--limit", "3"], "limit is 3 here and 2 there"),
        "seed": (["--seed", "3"], "seed is 3 here and 0 there"),
        "temperature": (["--temperature", "1"], "temperatures is [1.0] here and [0.0] there"),
        "samples": (["--samples", "2"], "samples is 2 here and 1 there"),
        "controls": (["--controls", "silence"], "controls is ['silence'] here and [] there"),
        "orders": (["--permutations", "2"], "permutations is 2 here and 1 there"),
        "length": (["--max-tokens", "9"], "max_tokens is 9 here and 4 there"),
        "style": (["--style", "answer"], "style is answer here and None there"),
        "instruction": (["--instruction", "Be brief."], "instruction is Be brief. here and None there"),
        "answer as": (["--answer-as", "letter"], "answer_as is letter here and None there"),
        "hearing": (["--hearing", "duplicate"], "hearing is duplicate here and refuse there"),
        "engine": (["--engine", "http://127.0.0.1:9/v1"], "engine is http here and transformers there"),
        "adapter": (["--adapter", str(adapter)], "weights of the adapter is"),
    }

    def another_template() -> None:
        with open(model / "tokenizer_config.json", "r+") as stream:
            tree = json.load(stream) | {"note": "changed"}
            stream.seek(0)
            json.dump(tree, stream)

    places = {
        "model": (lambda: louder(model), "weights of the model is"),
        "tokenizer": (another_template, "tokenizer and settings of the model is"),
        "data": (lambda: (data / "sizes.json").write_text((data / "sizes.json").read_text() + " "), "questions is"),
    }
    command = ["eval", str(model), str(data), "--out", str(root / "out"), "--quiet", "--engine", "transformers"]
    command += ["--limit", "2", "--max-tokens", "4", "--controls", "none"]
    return Case(command, root / "out", changes, places, [["--batch-size", "1"], ["--max-errors", "0.5"]])


MAKERS = {f.__name__: f for f in (encoder, language_model, echotwin, folds, prep)}


@pytest.mark.parametrize("verb", [*MAKERS, "evaluation"])
def test_another_run_is_refused_with_what_differs(verb: str, checkpoint, tmp_path: Path, capsys) -> None:
    case = evaluation(tmp_path, checkpoint()) if verb == "evaluation" else MAKERS[verb](tmp_path)
    assert len(case.changes) + len(case.places) >= 12
    assert main(case.command) == 0
    kept = contents(case.output)
    for words in ([], *case.honoured):
        assert main([*case.command, *words]) == 0, words
    assert {name: data for name, data in contents(case.output).items() if name.endswith((".safetensors", ".tar"))} == {
        name: data for name, data in kept.items() if name.endswith((".safetensors", ".tar"))
    }
    kept = contents(case.output)

    def refused(name: str, words: list[str], told: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
        capsys.readouterr()
        assert main([*case.command, *words]) == 2, name
        error = capsys.readouterr().err
        assert "another run: " in error and told in error, (name, error)
        assert contents(case.output) == kept, name

    for name, (words, told) in case.changes.items():
        refused(name, words, told)
    for name, (change, told) in case.places.items():
        change()
        refused(name, [], told)
