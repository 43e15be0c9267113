"""Scores of classifiers that are there: of a run over folds, of published files, of a folder of classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import soundfile

from audio_llm.cli import main
from audio_llm.encoders import urbansound_cnn
from audio_llm.encoders.heads import build_classifier
from audio_llm.files import read_lines
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from eval.tasks import classification_folds as folds
from tests.tasks.test_classification import CLASSES, ENCODER, RATE, sound, write_rows


def test_cross_validation_of_the_published_network_leaves_its_files(tmp_path):
    root, rng = tmp_path / "US8K", np.random.default_rng(0)
    (root / "metadata").mkdir(parents=True)
    rows = []
    for fold in (1, 2, 3):
        (root / "audio" / f"fold{fold}").mkdir(parents=True)
        for number, label in enumerate(urbansound_cnn.CLASSES):
            name = f"{100 * fold + number}-{number}-0-0.wav"
            soundfile.write(root / "audio" / f"fold{fold}" / name, 0.1 * rng.standard_normal(2000), RATE)
            row = {"slice_file_name": name, "fsID": 100 * fold + number, "fold": fold, "classID": number}
            rows.append(row | {"class": label.replace(" ", "_")})
    write_rows(root / "metadata" / "UrbanSound8K.csv", rows)
    training = {"encoder": {"name": "urbansound_cnn"}, "steps": 1, "batch_size": 4, "report_to": []}
    output = tmp_path / "run"
    folds.CrossValidation(folds.FoldsRecipe(root, output, training, test_folds=[1, 3])).run()
    assert sorted(path.name for path in (output / "models").iterdir()) == [
        "model_fold_1_best.safetensors",
        "model_fold_3_best.safetensors",
    ]
    check_evaluations_of_folds(output, root, tmp_path)


def check_evaluations_of_folds(run: Path, root: Path, tmp_path: Path) -> None:
    """What ``eval`` makes of the models of a run over folds is what the run made, each heard on its own test fold."""

    def scored(model: Path, *options: str) -> tuple[int, Path]:
        out = tmp_path / f"eval {model.name} {' '.join(options)}"
        words = [word for option in options for word in ("--option", option)]
        return main(["eval", str(model), str(root), "--out", str(out), "--quiet", *words]), out

    lines = read_lines

    wanted = {fold: lines(run / f"fold-{fold}" / "predictions.jsonl") for fold in ("1", "3")}
    code, out = scored(run)
    assert code == 0 and lines(out / "predictions.jsonl") == wanted["1"] + wanted["3"]
    here, there = (json.loads((folder / "scores.json").read_text()) for folder in (out, run))
    assert {key: here[key] for key in there if key not in ("chosen", "seeds")} == {
        key: there[key] for key in there if key not in ("chosen", "seeds")
    }
    (out / "predictions.jsonl").write_text((out / "predictions.jsonl").read_text()[:-20])  # killed in mid-line
    code, out = scored(run)
    assert code == 0 and lines(out / "predictions.jsonl")[-1] == wanted["3"][-1]
    code, out = scored(run / "models", "folds=3")  # the files of the UrbanSound8K project
    assert code == 0 and lines(out / "predictions.jsonl") == wanted["3"]
    assert scored(run, "folds=2")[0] == scored(run, "fold=1")[0] == 2
    # A single model: not on what it saw, unless that is said.
    model = run / "fold-1" / "model"
    assert scored(model)[0] == scored(model, "folds=1,3")[0] == 2
    code, out = scored(model, "folds=1")
    assert code == 0 and lines(out / "predictions.jsonl") == wanted["1"]
    code, out = scored(model, "folds=1,3", "seen=true")
    assert code == 0 and json.loads((out / "scores.json").read_text())["seen"] == ["3"]
    code, out = scored(run / "models" / "model_fold_1_best.safetensors", "folds=1")  # says nothing of its training
    assert code == 0 and lines(out / "predictions.jsonl") == wanted["1"]


def test_a_folder_of_classes_is_not_scored_by_what_was_trained_on_it(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in CLASSES:
            (tmp_path / part / label).mkdir(parents=True)
            soundfile.write(tmp_path / part / label / f"{part}.wav", sound(label, rng), RATE)
    built = build_encoder(ENCODER)
    facts = {"task": "classification", "labels": [*CLASSES, "rain"], "head": {}}
    model = save_parts(tmp_path / "model", built, {"head": build_classifier({}, built, 4)}, facts)

    def scored(part: str) -> int:
        return main(["eval", str(model), str(tmp_path / part), "--out", str(tmp_path / f"out_{part}"), "--quiet"])

    assert scored("test") == 0 and "is not known" in capsys.readouterr().out  # and nothing of the class without clips
    (model / "recipe.yaml").write_text(f"train: ['{tmp_path / 'train'}']\n")
    assert scored("train") == 2 and "neither trained nor chosen on" in capsys.readouterr().err
    (tmp_path / "test" / "snow").mkdir()
    soundfile.write(tmp_path / "test" / "snow" / "a.wav", sound("hiss", rng), RATE)
    shutil.rmtree(tmp_path / "out_test")
    assert scored("test") == 2 and "found 'snow'" in capsys.readouterr().err
    assert not (tmp_path / "out_test" / "run.json").exists()  # the folder is nobody's: nothing was asked
