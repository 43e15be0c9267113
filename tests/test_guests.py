"""A package from outside the repository adds one of everything, and each is used as ours are, by name or by address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

Guest = Callable[[list[str] | str], str]
MODULE = '''
"""One guest of each kind, in one file."""

import dataclasses
import json
from pathlib import Path

import torch

from audio_llm.answering.base import Answer, Engine, folder_config
from audio_llm.audio import decode
from audio_llm.datasets import open_source
from audio_llm.model.encoder import AudioEncoder, build_encoder
from audio_llm.model.projector import Projector
from audio_llm.shards.schema import AudioInfo, Event, Sample
from audio_llm.tasks.base import Task
from eval.benchmarks.base import Collection, Item
from eval.benchmarks.declared import Declared
from eval.scorers.base import Score


@dataclasses.dataclass
class EnergiesConfig:
    bands: int = 8


class Energies(AudioEncoder):
    """Tokens are the levels of a few bands, ten times a second."""

    name, config_class = "energies", EnergiesConfig
    sample_rate, layouts, num_channels, window_seconds = 8000, ("mono",), 1, 1.0

    def __init__(self, config):
        super().__init__()
        self.config, self.hidden_size = config, config.bands
        self.scale = torch.nn.Parameter(torch.ones(config.bands))

    def encode(self, waveform, lengths):
        frames = waveform[:, 0].unfold(1, 800, 800)  # (batch, 10, 800)
        spectrum = torch.fft.rfft(frames).abs()[..., : 50 * self.config.bands]
        tokens = torch.log1p(spectrum.unflatten(-1, (self.config.bands, 50)).mean(-1)) * self.scale
        return tokens, torch.arange(10) * 800 < lengths[:, None]


@dataclasses.dataclass
class HeardConfig:
    def count(self, samples, tokens):
        return 1


class Heard(Projector):
    """A window's mean token, as one embedding."""

    config_class = HeardConfig

    def __init__(self, config, encoder_size, output_size):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(encoder_size, output_size), torch.nn.LayerNorm(output_size)

    def forward(self, tokens, mask):
        mean = (tokens * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return self.norm(self.linear(mean)), mask[:, :1]


class Quiz:
    """A folder of sounds; the question is whether they are loud."""

    name, title, scorers, groups = "quiz", "Quiz", ("guests:BREVITY", "option-resolution"), ("question_type",)

    def open(self, data: Path, **options: str) -> Collection:
        files = sorted(data.glob("*.wav"))
        words = ("Is it loud?", ["yes", "no"])
        items = [Item(file.stem, *words, file.stem.split("-")[0], "level", "quiz", file.stem) for file in files]
        return Collection(items, fingerprint=[",".join(item.id for item in items)], load=lambda row: decode(files[row]))


class Brevity:
    """One over the number of words."""

    name, version, title = "brevity", "1", "Brevity"

    def score(self, row):
        words = len(row.reply().said.split())
        return Score(row.id, row.question_type, 1 / words if words else 0.0, row.raw, f"{words} words", bool(words))


def short(prompts, completions, *, most: int = 3, **columns):
    """A reward: 1 for at most `most` words."""
    return [float(len(text.split()) <= most) for text in completions]


class Listed:
    """A data set: a folder whose list.tsv has a sound file and its class a line."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = [line.split("\\t") for line in (folder / "list.tsv").read_text().splitlines()]
        self.fingerprint = str(self.rows)

    @staticmethod
    def recognises(folder):
        return (Path(folder) / "list.tsv").is_file()

    @classmethod
    def open_clips(cls, folder, folds, without, use_test_fold):
        return cls(Path(folder))

    def __len__(self):
        return len(self.rows)

    def load_sample(self, number):
        name, label = self.rows[number]
        heard = AudioInfo.of(self.load_waveform(number))
        return Sample(id=name, task="event", events=[Event(label, 0.0, 1.0)], audio=[heard])

    def load_waveform(self, number):
        return decode(self.folder / self.rows[number][0])


@dataclasses.dataclass
class LevelsRecipe:
    train: list[Path]
    output: Path
    encoder: dict
    task: str = "levels"

    def check(self):
        pass


class Levels(Task):
    """The mean of an encoder's tokens by class; a file is of the class whose mean is nearest."""

    name, recipe, models, formats = "levels", LevelsRecipe, "levels.json", ("table",)

    def train(self, recipe):
        source, means = open_source(recipe.train), {}
        for number in range(len(source)):
            means.setdefault(source.load_sample(number).events[0].label, []).append(
                self._mean(build_encoder(recipe.encoder), source.load_waveform(number))
            )
        facts = {"encoder": recipe.encoder, "means": {name: sum(of) / len(of) for name, of in means.items()}}
        recipe.output.mkdir()
        (recipe.output / "levels.json").write_text(json.dumps(facts))
        print("levels of", *sorted(means))

    def recognises(self, path):
        return (path / "levels.json").is_file()

    def predictor(self, path, options):
        facts = json.loads((path / "levels.json").read_text())
        encoder, means = build_encoder(facts["encoder"]), facts["means"]
        return lambda file, form: min(means, key=lambda name: abs(means[name] - self._mean(encoder, decode(file))))

    @staticmethod
    def _mean(encoder, waveform):
        samples = torch.from_numpy(waveform.samples)[None]
        return encoder(samples, torch.tensor([samples.shape[-1]]))[0].mean().item()


class Tones:
    """A gym: where draws come from while a run trains."""

    kinds, layout, sample_rate, recordings, digest = {"pitch": 1.0}, "mono", 8000, frozenset(), "tones"

    @staticmethod
    def recognises(path):
        return Path(path).read_text().startswith("tones:")

    @classmethod
    def open_source(cls, path, *, subset, folder, seed, workers):
        return cls()


class Parrot(Engine):
    """Says yes where there is a sound, whatever it is."""

    name = "parrot"

    def __init__(self, options):
        self.model = options.model

    @classmethod
    def recognises(cls, where):
        return folder_config(where).get("model_type") == "parrot"

    def generate(self, requests):
        for request in requests:
            yield Answer("yes" if request.audios else "I hear nothing", "stop")


QUIZ, BREVITY, LEVELS = Quiz(), Brevity(), Levels()
LOUD = Declared.read(Path(__file__).with_name("loud.yaml"))
'''

# A benchmark of choices without a line of Python.
DECLARATION = """
title: Loudness
files: [loud.csv]
audio: sound
question: asked
choices: [first, second]
answer: key
answer_as: letter
without: {part: [open]}
groups: [part]
scorers: [option-resolution, "guests:BREVITY", mmsu-official]
published_rule: mmsu-official
submission:
  table: {file: loud.out.csv, columns: {sound: id, answer: letter}}
"""

ENTRY_POINTS = """
[audio_llm.encoders]
energies = guests:Energies

[audio_llm.datasets]
listed = guests:Listed

[audio_llm.tasks]
levels = guests:LEVELS

[audio_llm.engines]
parrot = guests:Parrot

[audio_llm.gyms]
tones = guests:Tones
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the guest in it, laid down as pip does it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "guests.py").write_text(MODULE)
    (folder / "loud.yaml").write_text(DECLARATION)
    facts = folder / "guests-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: guests\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(4):
        name, level = ("yes", 0.5) if number % 2 else ("no", 0.01)
        noise = np.random.default_rng(number).uniform(-level, level, 8000)
        soundfile.write(folder / f"{name}-{number}.wav", noise, 8000)
    names = sorted(file.name for file in folder.glob("*.wav"))
    (folder / "list.tsv").write_text("".join(f"{name}\t{name.split('-')[0]}\n" for name in names))
    return folder


# Runs what each line says, a command of audio-llm or a program, and says how it ended and what it printed.
SHELL = """
import contextlib, io, json, sys, traceback
from audio_llm.cli import main
for line in sys.stdin:
    what, printed, told = json.loads(line), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        try:
            code = main(what) if isinstance(what, list) else exec(what, {})
        except BaseException:
            code = traceback.format_exc()
    print("said", json.dumps([code, printed.getvalue(), told.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def process(site: Path) -> Iterator[subprocess.Popen[str]]:
    """The only process where the guest package is installed."""
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SHELL], cwd=site.parent, env=env, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def guest(process: subprocess.Popen[str]) -> Guest:
    """``guest(command or program)`` -> what it prints where the guest package is installed."""

    def run(what: list[str] | str) -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        answer = next(line for line in process.stdout if line.startswith("said "))
        code, printed, told = json.loads(answer.removeprefix("said "))
        assert not code, f"{code}\n{printed}{told}"
        return printed

    return run


def test_an_encoder_comes_in_by_its_name(guest: Guest) -> None:
    code = """
import torch
from audio_llm.model.encoder import build_encoder, encoder_config
encoder = build_encoder({"name": "energies", "bands": 4, "hearing": "each"})
tokens, mask = encoder(torch.randn(2, 2, 8000), torch.tensor([8000, 4000]))
print(encoder_config(encoder), *tokens.shape, *mask.sum(1).tolist())
"""
    printed = guest(code)
    assert printed.split("}") == ["{'name': 'energies', 'hearing': 'each', 'bands': 4", " 2 10 8 10 5\n"]


def test_a_projector_comes_in_by_its_address(guest: Guest) -> None:
    code = """
import torch
from audio_llm.model.configuration import AudioLLMConfig
from audio_llm.model.projector import build_projector
parts = {"encoder": {"name": "energies"}, "projector": {"name": "guests:Heard"}}
config = AudioLLMConfig.from_dict(AudioLLMConfig(**parts, text_config={"model_type": "qwen3"}).to_dict())
embeddings, valid = build_projector(config.projector, 8, 32)(torch.randn(2, 10, 8), torch.ones(2, 10, dtype=bool))
print(config.window_tokens(8000), *embeddings.shape, *valid.shape)
"""
    assert guest(code) == "1 2 1 32 2 1\n"


def test_a_task_trains_a_guest_encoder_on_a_guest_data_set(guest: Guest, sounds: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "levels.yaml"
    recipe.write_text(f"task: levels\ntrain: [{sounds}]\noutput: {tmp_path / 'out'}\nencoder: {{name: energies}}\n")
    assert "levels of no yes" in guest(["train", str(recipe)])
    files = [str(sounds / name) for name in ("yes-1.wav", "no-2.wav")]
    assert guest(["predict", str(tmp_path / "out"), *files]).split() == ["yes", "no"]


def test_a_task_of_ours_trains_a_guest_encoder_on_a_guest_data_set(guest: Guest, sounds: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "classes.yaml"
    recipe.write_text(
        f"task: classification\ntrain: [{sounds}]\noutput: {tmp_path / 'out'}\nencoder: {{name: energies}}\n"
        "steps: 2\nbatch_size: 2\nreport_to: []\n"
    )
    guest(["train", str(recipe)])
    printed = guest(["predict", str(tmp_path / "out"), str(sounds / "yes-1.wav")])
    assert "yes" in printed and "no" in printed


def test_an_engine_answers_a_guest_benchmark(guest: Guest, sounds: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "parrot"}')
    command = ["eval", str(model), str(sounds), "--benchmark", "guests:QUIZ", "--out", str(out), "--quiet"]
    guest([*command, "--controls", "text_only"])
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {(row["control"], row["raw"]) for row in rows} == {("", "yes"), ("text_only", "I hear nothing")}
    run = json.loads((out / "run.json").read_text())
    assert (run["engine"], run["scorer"]["name"]) == ("parrot", "guests:BREVITY")
    assert "answer:   yes" in guest(["ask", str(sounds / "yes-1.wav"), "Is it loud?", "--model", str(model)])


def test_a_declared_benchmark_comes_in_by_its_address_and_by_its_file(
    guest: Guest, site: Path, sounds: Path, tmp_path: Path
) -> None:
    rows = [f"{file.name},Is it loud?,yes,no,{'AB'['no' in file.name]},closed" for file in sorted(sounds.glob("*.wav"))]
    table = ["sound,asked,first,second,key,part", *rows, "no-0.wav,What is it?,,,,open"]
    (tmp_path / "loud.csv").write_text("\n".join([*table, "gone.wav,Is it loud?,yes,no,A,closed"]))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "parrot"}')
    (site.parent / "mine.yaml").write_text(DECLARATION)  # where the process stands: a path may be relative
    asked = [
        "eval",
        str(tmp_path / "model"),
        str(tmp_path),
        "--option",
        f"audio={sounds}",
        "--controls",
        "none",
        "--quiet",
    ]
    for name, benchmark in (("address", "guests:LOUD"), ("file", "mine.yaml")):
        out = tmp_path / name
        printed = guest([*asked, "--benchmark", benchmark, "--out", str(out), "--max-errors", "0.5"])
        assert "brevity" in guest(["rescore", str(out)])
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert [row["gold"] for row in lines] == ["no", "no", "yes", "yes", "yes"] and lines[-1]["error"]
        first = next(line for line in printed.splitlines() if "greedy" in line)
        assert (
            "50.0" in first
            and "chance 50.0" in first
            and first.endswith("mmsu-official – over 0 of 4; left out 33.3 %")
        )
        assert "left out: of a part that is not asked here 1\n" in printed and "left out: could not be asked" in printed
        assert "1 x left out: of a part that is not asked here" in printed and "1 x audio missing" in printed
        with pytest.raises(AssertionError, match="1 left out: of a part that is not asked here"):
            guest(["rescore", str(out), "--submission", str(out / "files")])
        guest(["rescore", str(out), "--submission", str(out / "files"), "--incomplete"])
        assert (out / "files" / "loud.out.csv").read_text().splitlines()[1] == f"{lines[0]['id']},A"
    assert json.loads((tmp_path / "file" / "run.json").read_text())["benchmark"] == str(site.parent / "mine.yaml")


def test_a_gym_comes_in_where_it_knows_the_recipe(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "tones.yaml").write_text("tones: [440]\n")
    code = f"""
from pathlib import Path
from audio_llm.training.gym import open_source
from audio_llm.training.recipes import GymRecipe
print(open_source(GymRecipe(recipe=Path({str(tmp_path / "tones.yaml")!r})), Path(), 0).kinds)
"""
    assert guest(code) == "{'pitch': 1.0}\n"


def test_a_reward_comes_in_by_its_address(guest: Guest) -> None:
    code = """
from audio_llm.training.rewards import build_rewards
(short, _), weights = build_rewards({"guests:short": {"weight": 0.5, "most": 2}, "format": 1})
print(short(["?", "?"], ["two words", "three words now"]), weights)
"""
    assert guest(code) == "[1.0, 0.0] [0.5, 1.0]\n"


def test_a_benchmark_and_a_scorer_score_stored_answers(guest: Guest, sounds: Path, tmp_path: Path) -> None:
    lines = []
    for file in sorted(sounds.glob("*.wav")):
        gold = file.stem.split("-")[0]
        row = dict(id=file.stem, question_type="level", format="quiz", question="?", choices=["yes", "no"], gold=gold)
        lines.append(json.dumps(row | {"raw": "It is loud: yes"}))
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    printed = guest(["rescore", str(tmp_path), "--benchmark", "guests:QUIZ"])
    assert "brevity" in printed
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    values = {(line["scorer"], line["id"].split("-")[0]): line["value"] for line in scores}
    assert values == {
        ("brevity", "yes"): 0.25,
        ("brevity", "no"): 0.25,
        ("option-resolution", "yes"): 1.0,
        ("option-resolution", "no"): 0.0,
    }
    guest(["rescore", str(tmp_path), "--scorers", "letter,guests:BREVITY"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scorers", "guests:NOTHING"], "scorer: expected one of"),
        (["--scorers", "guests:QUIZ"], "it has no 'score'"),
        (["--scorers", "guests:Brevity"], "it is a class: name an object made of it"),
        (["--scorers", "nowhere:X"], "No module named 'nowhere'"),
        (["--benchmark", "guests:BREVITY"], "it has no 'open'"),
        (["--benchmark", "mmua"], "did you mean 'mmau'"),
    ],
)
def test_what_is_no_guest_is_told(guest: Guest, tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "predictions.jsonl").write_text(
        '{"id": "a", "question_type": "", "format": "", "question": "?", "choices": [], "gold": "x", "raw": "x"}\n'
    )
    with pytest.raises(AssertionError, match=message):
        guest(["rescore", str(tmp_path), *flags])
