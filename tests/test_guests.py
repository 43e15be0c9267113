"""A package from outside the repository adds one of everything, and each is used as ours are, by name or by address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

MODULE = '''
"""One guest of each kind, in one file."""

import dataclasses
from pathlib import Path

import torch

from audio_llm.audio import decode
from audio_llm.model.encoder import AudioEncoder
from eval.benchmarks.base import Collection, Item
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


QUIZ, BREVITY = Quiz(), Brevity()
'''

ENTRY_POINTS = """
[audio_llm.encoders]
energies = guests:Energies
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the guest in it, laid down as pip does it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "guests.py").write_text(MODULE)
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
    return folder


def python(site: Path, *command: str) -> str:
    """What ``python COMMAND`` prints where the guest package is installed."""
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=site.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_encoder_comes_in_by_its_name(site: Path) -> None:
    code = """
import torch
from audio_llm.model.encoder import build_encoder, encoder_config
encoder = build_encoder({"name": "energies", "bands": 4, "channels": "each"})
tokens, mask = encoder(torch.randn(2, 2, 8000), torch.tensor([8000, 4000]))
print(encoder_config(encoder), *tokens.shape, *mask.sum(1).tolist())
"""
    printed = python(site, "-c", code)
    assert printed.split("}") == ["{'name': 'energies', 'channels': 'each', 'bands': 4", " 2 10 8 10 5\n"]


def test_a_reward_comes_in_by_its_address(site: Path) -> None:
    code = """
from audio_llm.training.rewards import build_rewards
(short, _), weights = build_rewards({"guests:short": {"weight": 0.5, "most": 2}, "format": 1})
print(short(["?", "?"], ["two words", "three words now"]), weights)
"""
    assert python(site, "-c", code) == "[1.0, 0.0] [0.5, 1.0]\n"


def test_a_benchmark_and_a_scorer_score_stored_answers(site: Path, sounds: Path, tmp_path: Path) -> None:
    lines = []
    for file in sorted(sounds.glob("*.wav")):
        gold = file.stem.split("-")[0]
        row = dict(id=file.stem, question_type="level", format="quiz", question="?", choices=["yes", "no"], gold=gold)
        lines.append(json.dumps(row | {"raw": "It is loud: yes"}))
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    printed = python(site, "-m", "audio_llm", "rescore", str(tmp_path), "--benchmark", "guests:QUIZ")
    assert "brevity" in printed
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    values = {(line["scorer"], line["id"].split("-")[0]): line["value"] for line in scores}
    assert values == {
        ("brevity", "yes"): 0.25,
        ("brevity", "no"): 0.25,
        ("option-resolution", "yes"): 1.0,
        ("option-resolution", "no"): 0.0,
    }
    python(site, "-m", "audio_llm", "rescore", str(tmp_path), "--scorers", "letter,guests:BREVITY")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scorers", "guests:NOTHING"], "scorer: expected one of"),
        (["--scorers", "guests:QUIZ"], "it has no 'score'"),
        (["--scorers", "nowhere:X"], "No module named 'nowhere'"),
        (["--benchmark", "guests:BREVITY"], "it has no 'open'"),
        (["--benchmark", "mmua"], "did you mean 'mmau'"),
    ],
)
def test_what_is_no_guest_is_told(site: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "predictions.jsonl").write_text(
        '{"id": "a", "question_type": "", "format": "", "question": "?", "choices": [], "gold": "x", "raw": "x"}\n'
    )
    with pytest.raises(AssertionError, match=message):
        python(site, "-m", "audio_llm", "rescore", str(tmp_path), *flags)
