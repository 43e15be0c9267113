"""``audio-llm predict`` where a model finds events in time: windows, formats, refusals."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_llm import audio
from audio_llm.cli import main
from audio_llm.datasets import seld_tables
from audio_llm.encoders import seld_head
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from audio_llm.tasks.seld import predict, tracks

LABELS = ["bell", "dog", "rain"]
ENCODER = {
    "name": "cnn14",
    "preset": "tiny",
    "intensity": "band",
    "widths": [4, 4, 8, 8, 8],
    "decoder": {"kind": "none"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights, loud enough to report something."""
    torch.manual_seed(0)
    encoder = build_encoder(ENCODER)
    head = seld_head.SELDHead(encoder, len(LABELS))
    torch.nn.init.normal_(head.projection.bias, std=1.0)
    facts = {"task": "seld", "labels": LABELS, "seld": head.facts, "thresholds": [0.2, 0.3, 0.4]}
    return save_parts(tmp_path_factory.mktemp("model"), encoder, {"seld": head}, facts)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "street.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((7 * 44100, 2)), 44100)
    return path


def test_the_csv_is_what_the_network_says(folder, file, capsys):
    assert main(["predict", str(folder), str(file), "--format", "csv"]) == 0
    rows = seld_tables.parse_rows(capsys.readouterr().out)
    network = predict.load(folder).network
    output = tracks.locate(network, audio.resample(audio.decode(file), 16000).samples)
    expected = tracks.decode(output, [0.2, 0.3, 0.4]).rows()
    assert len(rows) and rows[:, 0].max() == 69
    np.testing.assert_array_equal(rows[:, [0, 1, 4]], expected[:, [0, 1, 4]])
    np.testing.assert_allclose(rows[:, 3], seld_tables.fold_azimuth(expected[:, 3]), atol=1)


def test_json_and_table_tell_the_same_events(folder, file, capsys):
    assert main(["predict", str(folder), str(file), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(file) and {event["label"] for event in found["events"]} <= set(LABELS)
    assert all(0 <= event["onset"] < event["offset"] <= 7.0 for event in found["events"])
    assert all(abs(event["azimuth"]) <= 90 for event in found["events"])
    assert main(["predict", str(folder), str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(found["events"]) and lines[0].startswith(f"{file}: ")


def test_files_are_written_and_the_broken_one_is_named(folder, file, tmp_path, capsys):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    out = tmp_path / "out"
    assert main(["predict", str(folder), str(file), str(broken), "--format", "csv", "--out", str(out)]) == 2
    assert "broken.wav" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["street.csv"] and len(seld_tables.read_rows(out / "street.csv"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"thresholds": [0.5]}, "expected a threshold for each of 3 labels, found 1 thresholds"),
        ({"thresholds": "low"}, "thresholds in config.json: expected a list of finite numbers"),
        ({"thresholds": [0.5, math.nan, 0.5]}, "thresholds in config.json: expected a list of finite numbers"),
        ({"seld": "x"}, "seld in config.json: expected a mapping"),
        ({"seld": {"corners": 4}}, "expected fields of its head"),
        ({"labels": None}, "labels in config.json: expected a list of names"),
    ],
)
def test_a_spoilt_configuration_is_one_sentence(folder, tmp_path, capsys, changes, words):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert main(["predict", str(tmp_path / "model"), "any.wav"]) == 2
    error = capsys.readouterr().err
    assert words in error and str(tmp_path) in error and error.count("\n") == 1


def test_a_model_that_is_only_scored_is_answered_with_the_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"task": "spatial"}')
    (tmp_path / "encoder.safetensors").touch()
    assert main(["predict", str(tmp_path), "any.wav"]) == 2
    error = capsys.readouterr().err
    assert f"found one of task spatial. audio-llm eval {tmp_path} DATA --out RUN scores it." in error


def test_files_of_one_name_do_not_replace_each_other(folder, file, tmp_path, capsys):
    other = tmp_path / "street.flac"
    soundfile.write(other, np.zeros((8000, 2)), 8000)
    out = tmp_path / "out"
    assert main(["predict", str(folder), str(file), str(other), "--out", str(out)]) == 2
    assert "street.flac" in capsys.readouterr().err and not out.exists()


def test_a_threshold_that_nothing_reaches_gives_an_empty_table(folder, file, capsys):
    assert main(["predict", str(folder), str(file), "--format", "csv", "--threshold", "1.41"]) == 0
    assert not len(seld_tables.parse_rows(capsys.readouterr().out))
    assert main(["predict", str(folder), str(file), "--threshold", "2"]) == 2
    assert "1.41" in capsys.readouterr().err


def test_an_event_as_a_person_reads_it():
    event = {"label": "dog", "onset": 0.5, "offset": 2.0, "azimuth": -31.2, "distance": 1.25}
    assert predict.as_table("a.wav", [event]) == "a.wav: 1 event\n     0.5 to 2.0 s  dog, 31° right, 1.2 m"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "block"], "of task classification"),
        (["--hop", "1"], "--hop"),
        (["--hearing", "mean"], "hearing mean: expected a model of mono"),
    ],
)
def test_options_of_classifiers_are_refused(folder, file, arguments, said, capsys):
    assert main(["predict", str(folder), str(file), *arguments]) == 2
    assert said in capsys.readouterr().err


RATE = 16000


def noise(*shape: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(1).standard_normal(shape)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (np.zeros((2 * RATE, 2)), RATE),
        (noise(16000, 2), 8000),
        (noise(60 * 8000, 2), 8000),
        (noise(RATE // 20, 2), RATE),
    ],
    ids=["silent", "8 kHz", "a minute", "half a frame"],
)
def test_files_of_any_length_and_level_have_events_inside_them(folder, tmp_path, capsys, samples, rate):
    path = tmp_path / "sound.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    seconds = len(samples) / rate
    assert main(["predict", str(folder), str(path), "--format", "json"]) == 0
    events = json.loads(capsys.readouterr().out)["events"]
    assert all(0 <= event["onset"] < event["offset"] <= 0.1 * math.ceil(10 * seconds) + 1e-6 for event in events)
    assert all(math.isfinite(event["azimuth"]) and math.isfinite(event["distance"]) for event in events)
    assert main(["predict", str(folder), str(path), "--format", "csv"]) == 0
    rows = seld_tables.parse_rows(capsys.readouterr().out)
    assert len(rows) == 0 or rows[:, 0].max() < math.ceil(10 * seconds)
    if seconds >= 1:
        assert len(events) and len(rows)  # the network is loud enough


def spoilt(samples: np.ndarray) -> np.ndarray:
    samples[100, 1] = np.nan
    return samples


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (noise(0, 2), "samples"),
        (noise(1, 2), "found 1 sample"),
        (spoilt(noise(RATE, 2)), "finite"),
        (noise(RATE, 3), "3 channels"),
        (noise(RATE, 4), "stereo"),
        (noise(RATE), "stereo"),
    ],
    ids=["no samples", "one sample", "NaN", "3 channels", "4 channels", "mono"],
)
def test_sounds_that_cannot_be_located_are_one_sentence(folder, tmp_path, capsys, samples, said):
    path = tmp_path / "sound.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert_refused(folder, path, said, capsys)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "empty"])
def test_files_that_are_cut_short_are_one_sentence(folder, tmp_path, capsys, suffix):
    path = tmp_path / ("sound.wav" if suffix == "empty" else f"sound.{suffix}")
    soundfile.write(path, noise(2 * RATE, 2), RATE)
    whole = path.read_bytes()
    path.write_bytes(b"" if suffix == "empty" else whole[: len(whole) // 2])
    assert_refused(folder, path, "", capsys)


def assert_refused(folder: Path, path: Path, said: str, capsys) -> None:
    for shape in ("table", "csv", "json"):
        assert main(["predict", str(folder), str(path), "--format", shape]) == 2
        output = capsys.readouterr()
        assert not output.out and output.err.count("\n") == 1 and "Traceback" not in output.err, output.err
        assert path.name in output.err and said in output.err


def test_mono_is_refused_by_name(folder, tmp_path, capsys):
    path = tmp_path / "mono.wav"
    soundfile.write(path, np.ones(16000) * 0.1, 16000)
    assert main(["predict", str(folder), str(path)]) == 2
    assert "mono.wav" in (said := capsys.readouterr().err) and "stereo" in said
