"""``audio-llm predict``: files of any length and condition, formats, ensembles."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.encoders.heads import build_classifier
from audio_llm.errors import ConfigError
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from audio_llm.tasks.classification import predict

RATE = 16000
LABELS = ["car horn", "dog", "rain"]


def write_model(folder: Path, seed: int, hearing: str = "refuse", labels: list[str] = LABELS) -> Path:
    torch.manual_seed(seed)
    encoder = build_encoder({"name": "urbansound_cnn", "preset": "tiny"})
    head = build_classifier({}, encoder, len(labels))
    facts = {"task": "classification", "labels": labels, "head": {}, "hearing": hearing}
    return save_parts(folder, encoder, {"head": head}, facts)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), seed=0)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> str:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return str(path)


def noise(*shape: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(shape)


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_files_in_any_condition_give_a_result_or_one_sentence(model, tmp_path, capsys):
    good = {
        "silent.wav": (np.zeros(RATE), RATE),
        "8khz.wav": (noise(4000), 8000),
        "short.wav": (noise(40), RATE),
        "ten_minutes.wav": (noise(600 * 8000), 8000),
    }
    for name, (samples, rate) in good.items():
        assert main(["predict", str(model), write(tmp_path / name, samples, rate), "--format", "json"]) == 0, name
        (record,) = lines(capsys)
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-5), name
        assert record["windows"][-1]["end"] == pytest.approx(len(samples) / rate, abs=1e-3), name
    spoilt = noise(RATE)
    spoilt[100] = np.nan
    bad = {
        "one_sample.wav": (noise(1), "samples"),
        "none.wav": (noise(0), "samples"),
        "nan.wav": (spoilt, "finite"),
        "three.wav": (noise(RATE, 3), "3 channels"),
        "stereo.wav": (noise(RATE, 2), "expected layout mono"),
        "foa.wav": (noise(RATE, 4), "expected layout mono"),
    }
    for name, (samples, _) in bad.items():
        write(tmp_path / name, samples)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not a sound")
    whole = tmp_path / "whole.flac"
    soundfile.write(whole, noise(RATE), RATE)
    (tmp_path / "truncated.flac").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    soundfile.write(tmp_path / "whole.ogg", noise(RATE), RATE)
    whole = (tmp_path / "whole.ogg").read_bytes()
    (tmp_path / "truncated.ogg").write_bytes(whole[: len(whole) * 97 // 100])
    write(tmp_path / "huge.wav", 1e30 * noise(RATE))
    messages = {name: text for name, (_, text) in bad.items()}
    messages |= {"truncated.ogg": "cut short", "huge.wav": "full scale at 1"}
    messages |= {"empty.wav": "0 bytes", "text.wav": "", "truncated.flac": "", "absent.wav": ""}
    for name, message in messages.items():
        assert main(["predict", str(model), str(tmp_path / name)]) == 2, name
        output = capsys.readouterr()
        assert not output.out and output.err.count("\n") == 1, output.err
        assert name in output.err and message in output.err and "Traceback" not in output.err


def test_one_bad_file_does_not_lose_the_others(model, tmp_path, capsys):
    good, bad = write(tmp_path / "good.wav", noise(RATE)), str(tmp_path / "bad.wav")
    assert main(["predict", str(model), bad, good, "--format", "json"]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out)["file"] == good and "bad.wav" in output.err


def test_channels_by_name(model, tmp_path, capsys):
    stereo = np.stack([noise(RATE), 0.3 * noise(RATE)[::-1]], axis=1)
    left, mean = write(tmp_path / "left.wav", stereo[:, 0]), write(tmp_path / "mean.wav", stereo.mean(axis=1))
    both = write(tmp_path / "both.wav", stereo)
    found = {}
    for name, file, rule in (
        ("first", both, "first"),
        ("mean", both, "mean"),
        ("l", left, "mean"),
        ("m", mean, "mean"),
    ):
        flag = "--channels" if rule == "first" else "--hearing"  # the flag and the word of version 0.1
        assert main(["predict", str(model), file, flag, rule, "--format", "json"]) == 0
        found[name] = lines(capsys)[0]["probabilities"]
    assert (
        found["first"] == found["l"]
        and found["mean"] == pytest.approx(found["m"], abs=2e-6)  # printed with six digits
        and found["mean"] != found["l"]
    )
    assert main(["predict", str(model), both]) == 2
    message = capsys.readouterr().err
    assert "--hearing left" in message and "--hearing mean" in message
    asked = write_model(tmp_path / "asked", seed=0, hearing="mean")  # as the model was trained
    assert main(["predict", str(asked), both, "--format", "json"]) == 0
    assert lines(capsys)[0]["probabilities"] == found["mean"]


def test_a_model_of_two_channels_has_no_choice_of_them(tmp_path, capsys):
    encoder = build_encoder({"name": "beats", "preset": "tiny", "hearing": "each"})
    facts = {"task": "classification", "labels": LABELS, "head": {}, "channels": "mean"}  # of version 0.1, in vain
    model = str(save_parts(tmp_path / "model", encoder, {"head": build_classifier({}, encoder, 3)}, facts))
    both, one = write(tmp_path / "both.wav", noise(RATE, 2)), write(tmp_path / "one.wav", noise(RATE))
    assert main(["predict", model, both]) == 0
    assert main(["predict", model, both, "--hearing", "mean"]) == 2
    assert "found one that hears stereo or binaural" in capsys.readouterr().err
    assert main(["predict", model, one]) == 2
    message = capsys.readouterr().err
    assert "found mono" in message and "--hearing duplicate" in message
    assert main(["predict", model, one, "--hearing", "duplicate"]) == 0


def test_names_that_are_no_text(model, tmp_path):
    """Bytes that are no UTF-8 and line breaks are shown as escapes; a terminal may be strict about what it writes."""
    names = [b"bad\xff.wav", b"two\nlines.wav"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(wav_bytes())
    command = [sys.executable, "-m", "audio_llm", "predict", os.fsencode(model)]
    files = [os.fsencode(tmp_path) + b"/" + name for name in [*names, b"gone\n.wav"]]
    done = subprocess.run([*command, *files], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and rb"gone\n.wav: expected" in done.stderr
    assert rb"bad\udcff.wav: " in done.stdout and rb"two\nlines.wav: " in done.stdout


def wav_bytes() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, noise(RATE), RATE, format="WAV")
    return stream.getvalue()


def test_block_is_the_one_that_the_original_prints(model, tmp_path, capsys):
    assert main(["predict", str(model), write(tmp_path / "a.wav", noise(RATE)), "--format", "block"]) == 0
    pattern = r"""--- Prediction Results ---
Predicted Class: (\w+) \(ID: (\d)\)
Confidence: (\d\.\d{4})

Full Probabilities:
  car_horn            : (\d\.\d{4})
  dog                 : (\d\.\d{4})
  rain                : (\d\.\d{4})
"""
    name, number, confidence, *values = re.fullmatch(pattern, capsys.readouterr().out).groups()
    assert name == ["car_horn", "dog", "rain"][int(number)]
    assert confidence == values[int(number)] == max(values)


def test_windows_are_averaged_and_runs_of_one_class_are_shown_together(model, tmp_path, capsys):
    loud, quiet = noise(2 * RATE), np.zeros(2 * RATE)
    path = write(tmp_path / "long.wav", np.concatenate([loud, quiet]))
    classifier = predict.load(model)
    found = predict.predict_file(classifier, path)
    assert found.starts == [0, 1, 2, 3] and found.windows.shape == (4, 3)
    np.testing.assert_allclose(found.probabilities, found.windows.mean(axis=0), rtol=1e-6)
    parts = [Waveform(loud[None, start : start + RATE].astype(np.float32), RATE, "mono") for start in (0, RATE)]
    for row, part in enumerate(parts):
        np.testing.assert_allclose(found.windows[row], classifier.predict(part).probabilities, atol=1e-4)
    assert len(predict.predict_file(classifier, path, 0.5).starts) == 7
    assert main(["predict", str(model), path, "--hop", "2"]) == 2
    assert "at most the window's 1 seconds, found 2" in capsys.readouterr().err
    assert main(["predict", str(model), path]) == 0
    shown = capsys.readouterr().out.splitlines()
    changes = int((np.diff(found.windows.argmax(axis=1)) != 0).sum())
    assert shown[0].startswith(f"{path}: ") and len(shown) == 2 + changes and shown[-1].startswith("  ")


def test_an_ensemble_answers_with_the_mean_of_its_members(tmp_path, capsys):
    members = [write_model(tmp_path / f"fold-{number}" / "model", seed=number) for number in (1, 2)]
    (tmp_path / "folds.json").write_text(json.dumps({"members": ["fold-1/model", "fold-2/model"]}))
    waveform = Waveform(noise(1, 3 * RATE).astype(np.float32), RATE, "mono")
    each = [predict.load(member).predict(waveform).probabilities for member in members]
    together = predict.load(tmp_path).predict(waveform).probabilities
    np.testing.assert_allclose(together, np.mean(each, axis=0), rtol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    write_model(members[1], seed=2, labels=["a", "b", "c"])
    assert main(["predict", str(tmp_path), "any.wav"]) == 2
    assert "members with the same classes" in capsys.readouterr().err
    (tmp_path / "folds.json").write_text('{"members": [1]}')
    assert main(["predict", str(tmp_path), "any.wav"]) == 2
    assert "a list of members, found [1]" in capsys.readouterr().err
    (tmp_path / "folds.json").write_text("[]")
    assert main(["predict", str(tmp_path), "any.wav"]) == 2
    assert "a list of members" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "nowhere"), "any.wav"]) == 2


def test_one_fold_of_an_ensemble_by_its_number(tmp_path, capsys):
    """--fold_num is what the UrbanSound8K project's script calls it; its default, 0, is no fold's number."""
    members = [write_model(tmp_path / f"fold-{number}" / "model", seed=number) for number in (1, 2, 10)]
    names = [str(member.relative_to(tmp_path)) for member in members]
    (tmp_path / "folds.json").write_text(json.dumps({"members": names}))
    file = write(tmp_path / "a.wav", noise(RATE))
    for number, member in (("2", members[1]), ("10", members[2])):
        expected = predict.predict_file(predict.load(member), file).probabilities
        assert main(["predict", str(tmp_path), file, "--fold", number, "--format", "json"]) == 0
        np.testing.assert_allclose(list(lines(capsys)[0]["probabilities"].values()), expected, atol=1e-6)
    assert main(["predict", str(tmp_path), file, "--fold_num", "0"]) == 2
    assert "--fold 0: expected one of 1, 2, 10, found none of that number" in capsys.readouterr().err
    assert main(["predict", str(members[0]), file, "--fold", "1"]) == 2
    assert "expected a folder of folds" in capsys.readouterr().err


def test_files_of_the_urbansound_project_are_an_ensemble(tmp_path, capsys):
    from tests.encoders.test_urbansound import reference_state

    state = reference_state()
    for number in (1, 2, 10):
        changed = {**state, "fc2.bias": state["fc2.bias"] + number * torch.linspace(-1, 1, 10)}
        save_file(changed, tmp_path / f"model_fold_{number}_best.safetensors")
    file = write(tmp_path / "a.wav", noise(RATE))
    alone = [predict.load(tmp_path / f"model_fold_{number}_best.safetensors") for number in (1, 2, 10)]
    each = [predict.predict_file(member, file).probabilities for member in alone]
    together = predict.predict_file(predict.load(tmp_path), file).probabilities
    np.testing.assert_allclose(together, np.mean(each, axis=0), rtol=1e-5)
    one = predict.predict_file(predict.load(tmp_path, fold="10"), file).probabilities
    np.testing.assert_array_equal(one, each[2])
    assert main(["predict", str(tmp_path), file, "--fold_num", "0"]) == 2
    assert "expected one of 1, 2, 10" in capsys.readouterr().err


def test_a_folder_without_a_model_is_told_what_one_has(tmp_path, capsys):
    (tmp_path / "fold-1").mkdir()
    assert main(["predict", str(tmp_path), "any.wav"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("config.json", "folds.json", "model_fold_N_best.safetensors", str(tmp_path)))
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": None}, "encoder in config.json: expected a mapping, found None"),
        ({"encoder": "beats"}, "encoder in config.json: expected a mapping, found 'beats'"),
        ({"labels": "abc"}, "labels in config.json: expected a list of names"),
        ({"labels": [1, 2, 3]}, "labels in config.json: expected a list of names"),
        ({"labels": ["a"]}, "expected (1, 128), found (3, 128)"),
        ({"task": "sorting"}, "expected a classifier"),
        ({"head": "linear"}, "head in config.json: expected a mapping"),
        ({"head": {"name": "conical"}}, "expected a name of linear"),
        ({"head": {"dropout": 2}}, "head.dropout: expected a share"),
        ({"hearing": "both"}, "hearing: expected one of refuse, left, right, mean, omni, duplicate, found 'both'"),
    ],
)
def test_a_spoilt_configuration_is_one_sentence(model, tmp_path, capsys, changes, words):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert main(["predict", str(folder), "any.wav"]) == 2
    error = capsys.readouterr().err
    assert words in error and str(folder) in error and error.count("\n") == 1
    for key in set(config) & set(changes):
        (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name != key}))
        assert main(["predict", str(folder), "any.wav"]) == 2
        capsys.readouterr()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 600), st.data())
def test_windows_cover_every_sample(length, window, data):
    hop = data.draw(st.integers(1, window))
    places = predict.window_places(length, window, hop)
    heard = np.zeros(length, dtype=bool)
    for start, end in places:
        heard[start:end] = True
        assert end - start == min(window, length)
    assert heard.all() and places == sorted(set(places))


def test_identifiers_get_their_names_by_a_table(tmp_path):
    """``/m/…`` by the identifier; bare numbers by the row, where the table has as many classes as the model."""
    from audio_llm.encoders.beats import _labels
    from audio_llm.tasks.classification.predict import named

    table = tmp_path / "class_labels_indices.csv"
    table.write_text(
        '\ufeffindex,mid,display_name\r\n0,/m/068hy,"Animals, pets"\r\n1,/m/x,"Roar ""lion"""\r\n2,/m/z,Speech\r\n'
    )
    names = ["animals, pets", 'roar "lion"', "speech"]
    assert named(["/m/068hy", "/m/x", "/m/z"], table) == names
    assert named(_labels({"2": "/m/068hy", 0: "/m/z"}, 3), table) == ["speech", 'roar "lion"', "animals, pets"]
    assert named(_labels(None, 3), table) == names
    assert named(["/m/z", "siren"], table) == ["speech", "siren"]
    with pytest.raises(ConfigError, match="names of the model's 2 classes"):
        named(["dog", "cat"], table)


def test_a_file_whose_name_looks_like_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("-0RWZT.wav").write_bytes(b"RIFF")
    assert main(["predict", "nothing", "-0RWZT.wav"]) == 2
    assert "model nothing" in capsys.readouterr().err  # the file was taken as one
    with pytest.raises(SystemExit):
        main(["predict", "nothing", "-1RWZT.wav"])
