"""Stereo SELD from a folder of clips to scores: training, resuming, thresholds, the verbs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.datasets import dcase_seld, seld_tables
from audio_llm.errors import AudioLLMError, CheckpointError, ConfigError
from audio_llm.model.encoder import build_encoder
from audio_llm.tasks import clips
from audio_llm.tasks import trainer as trainer_module
from audio_llm.tasks.seld import SELDRecipe
from audio_llm.tasks.seld.task import load_seld
from eval.tasks import seld as seld_run
from tests.killing import assert_same_run, train_and_kill

RATE, SECONDS = 8000, 1.0
FRAMES = round(SECONDS / seld_tables.FRAME_SECONDS)
LABELS = ["low", "high"]
PITCH = {"low": 300.0, "high": 2000.0}
ENCODER = {
    "name": "cnn14",
    "sample_rate": RATE,
    "window_seconds": SECONDS,
    "n_fft": 256,
    "win_length": None,
    "hop": 200,
    "n_mels": 16,
    "fmax": 4000.0,
    "peak_normalize": False,
    "widths": [8, 16],
    "time_pools": [4, 1],
    "frequency_pools": [4, 2],
}


def write_clip(root: Path, name: str, rng: np.random.Generator, empty: bool = False) -> None:
    """A tone from one side: left and right as two cardioids hear it."""
    folder = "dev-test" if name.startswith("fold4") else "dev-train"
    label, azimuth = int(rng.integers(2)), int(rng.choice([-60, 60]))
    first, last = (0, 0) if empty else (int(rng.integers(0, 3)), int(rng.integers(6, FRAMES)))
    time_ = np.arange(round(RATE * SECONDS)) / RATE
    tone = 0.2 * np.sin(2 * np.pi * PITCH[LABELS[label]] * time_)
    tone *= (time_ >= first * 0.1) & (time_ < last * 0.1)
    side = np.sin(np.radians(azimuth))
    samples = np.stack([tone * (1 + side), tone * (1 - side)], axis=1) + 1e-3 * rng.standard_normal((len(time_), 2))
    path = root / "stereo_dev" / folder / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE)
    rows = np.array([[frame, label, 0, azimuth, 200, 0] for frame in range(first, last)]).reshape(-1, 6)
    table = root / "metadata_dev" / folder / f"{name}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    seld_tables.write_rows(table, rows)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Rooms 1 to 3 of fold 3, rooms 1 and 2 of fold 4; one clip of fold 3 is silent."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for fold, rooms, count in ((3, 3, 12), (4, 2, 4)):
        for room in range(1, rooms + 1):
            for mix in range(count):
                write_clip(
                    root, f"fold{fold}_room{room}_mix{mix:03d}_deg000_start0000", rng, empty=(mix == 0 and room == 1)
                )
    (root / "classes.json").write_text(json.dumps(LABELS))
    return root


def recipe(corpus: Path, output: Path, **values) -> SELDRecipe:
    tree = {
        "task": "seld", "train": [str(corpus)], "output": str(output), "train_folds": ["fold3"],
        "validation_folds": ["fold3_room2"], "encoder": ENCODER, "steps": 4, "batch_size": 8, "log_steps": 1,
        "save_steps": 2, "report_to": [], "learning_rate": 3e-3, **values,
    }  # fmt: skip
    return recipes.build(SELDRecipe, tree)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("trained")
    scores = trainer_module.TaskTrainer(
        recipe(corpus, output, steps=60, augment={"gain_db": 0}, distance_weight=0.1)
    ).fit()
    return output, scores


def test_rooms_of_the_validation_are_not_trained_on(corpus, tmp_path):
    trainer = trainer_module.TaskTrainer(recipe(corpus, tmp_path))
    rooms = {clip.room for clip in trainer.store.dataset.clips}
    assert rooms == {"fold3_room1", "fold3_room3"} and len(trainer.store) == 24  # the silent clip is one of them
    assert {clip.room for clip in trainer.validation.dataset.clips} == {"fold3_room2"}
    assert list(trainer.labels) == LABELS  # by their numbers in the tables, not by the alphabet


def test_the_mirror_negates_azimuths_of_the_targets(corpus, tmp_path):
    trainer = trainer_module.TaskTrainer(recipe(corpus, tmp_path))
    clip = trainer.store[3]
    flipped = clips.Clip(*clips.mirror(clip.samples, clip.events))
    batch = clips.collate([clip, flipped], 2, trainer.store.window)
    slots = trainer.raw.targets(batch)[0].slots
    assert slots.shape == (2, FRAMES, 6, 5, 2) and slots[0, :, 0, 0].sum() > 0
    torch.testing.assert_close(slots[1, :, :, [0, 1, 3]], slots[0, :, :, [0, 1, 3]])
    torch.testing.assert_close(slots[1, :, :, 2], -slots[0, :, :, 2])
    assert torch.equal(batch.waveform[0, 0], batch.waveform[1, 1])


def test_it_learns_which_tone_comes_from_which_side(trained, corpus, tmp_path, capsys):
    folder, scores = trained
    assert scores["f_score"] > 0.4 and scores["doa_error"] < 30
    assert main(["eval", str(folder), str(corpus), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    shown = capsys.readouterr().out
    tree = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert tree["metric"]["files"] == 8 and tree["metric"]["degrees"] == 20 and not tree["metric"]["strict"]
    assert tree["scores"]["f_score"] > 0.3 and "F20°/1, macro over 2 classes" in shown
    # the same tables, as any system's
    assert main(["eval", str(tmp_path / "run" / "predictions"), str(corpus), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert again == tree


def test_an_untrained_network_finds_next_to_nothing(corpus, tmp_path):
    scores = trainer_module.TaskTrainer(recipe(corpus, tmp_path, steps=1, learning_rate=1e-9)).fit()
    assert scores["f_score"] < 0.2


def test_thresholds_are_those_of_the_validation(trained):
    folder, _ = trained
    network, config = load_seld(folder)
    assert config["labels"] == LABELS and len(config["thresholds"]) == 2
    assert network.head.frames == FRAMES and not network.training


@pytest.mark.slow
def test_a_run_killed_at_a_random_step_repeats_the_other(corpus, tmp_path):
    """SIGKILL with everything on that carries state: average, best weights, masks, overlaid clips, sums of the log."""
    values = {"steps": 150, "ema": 0.9, "eval_steps": 7, "save_steps": 4, "log_steps": 3}
    values["augment"] = {"overlay": 0.3, "gain_db": 3, "frequency_mask": 4, "time_mask": 4}
    whole, cut = (recipe(corpus, tmp_path / name, **values) for name in ("whole", "cut"))
    trainer_module.TaskTrainer(whole).fit()
    train_and_kill(cut, first=4, last=25)
    trainer_module.TaskTrainer(cut).fit()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_predictions_go_on_where_they_stopped_and_know_their_run(trained, corpus, tmp_path):
    folder, _ = trained
    settings, out = seld_run.Settings(), tmp_path / "run"
    seld_run.hear(folder, corpus, out, settings, progress=False)
    written = sorted((out / "predictions").glob("*.csv"))
    before = {path: path.read_text() for path in written}
    stamp = written[0].stat().st_mtime_ns
    written[3].unlink()
    seld_run.hear(folder, corpus, out, settings, progress=False)
    assert {path: path.read_text() for path in written} == before and written[0].stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="--overwrite"):
        seld_run.hear(folder, corpus, out, seld_run.Settings(threshold=0.3), progress=False)


def test_strict_and_micro_are_said_with_the_scores(trained, corpus, tmp_path):
    folder, _ = trained
    seld_run.hear(folder, corpus, tmp_path, seld_run.Settings(), progress=False)
    texts = []
    for options in ({}, {"strict": "true", "average": "micro"}):
        texts.append(seld_run.score(tmp_path / "predictions", corpus, seld_run.parse_settings(options), tmp_path))
    assert "macro" in texts[0] and "micro" in texts[1] and "every frame" in texts[1] and texts[0] != texts[1]
    for wrong in ({"fold": "4"}, {"strict": "yes"}, {"degrees": "-3"}, {"average": "mean"}):
        with pytest.raises(ConfigError):
            seld_run.parse_settings(wrong)


def test_a_broken_clip_is_listed_and_the_others_are_scored(trained, corpus, tmp_path, capsys):
    folder, _ = trained
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    broken = sorted((copy / "stereo_dev" / "dev-test").glob("*.wav"))[0]
    broken.write_bytes(b"no sound")
    assert main(["eval", str(folder), str(copy), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert broken.stem in (tmp_path / "run" / "rejects.jsonl").read_text()
    assert "1 of 8 clips" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["metric"]["missing"] == 1


def test_a_submission_has_every_clip_of_the_evaluation_set(trained, corpus, tmp_path):
    folder, _ = trained
    root = tmp_path / "corpus"
    (root / "stereo_eval" / "eval").mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps(LABELS))
    sources = sorted((corpus / "stereo_dev" / "dev-test").glob("*.wav"))[:3]
    for number, path in enumerate(sources):
        (root / "stereo_eval" / "eval" / f"sample{number}.wav").write_bytes(path.read_bytes())
    out = tmp_path / "run"
    assert main(["eval", str(folder), str(root), "--out", str(out), "--quiet", "--option", "part=evaluation"]) == 0
    tables = {path.name: seld_tables.read_rows(path) for path in (out / "submission").glob("*.csv")}
    assert sorted(tables) == ["sample0.csv", "sample1.csv", "sample2.csv"]
    assert any(len(rows) for rows in tables.values()) and all(
        abs(rows[:, 3]).max(initial=0) <= 90 for rows in tables.values()
    )


def test_a_published_file_is_scored_as_it_is(tmp_path):
    """As the folder that it is converted to, and with the counts that its constant answer has."""
    encoder = build_encoder({"name": "htsat"})
    state = {
        key if key.startswith("scalar.") else f"encoder.{key}": value for key, value in encoder.state_dict().items()
    }
    bias = torch.zeros(3, 3, 13)
    bias[0, 0, 3] = bias[0, 2, 3] = 1.5  # one track: a telephone straight ahead, at 1.5 m, whatever is heard
    state |= {"tscam_conv.weight": torch.zeros(117, 768, 2, 3), "tscam_conv.bias": bias.flatten()}
    torch.save({"seld_model": state, "epoch": 1, "best_f_score": np.float64(0.4)}, tmp_path / "best_model.pth")
    for number, (label, azimuth) in enumerate(((3, 10), (8, 10), (3, 80))):
        name = f"fold4_room{number}_mix000_deg000_start0000"
        for part in ("stereo_dev", "metadata_dev"):
            (tmp_path / "data" / part / "dev-test-tau").mkdir(parents=True, exist_ok=True)
        samples = 0.1 * np.random.default_rng(number).standard_normal((120000, 2))
        soundfile.write(tmp_path / "data/stereo_dev/dev-test-tau" / f"{name}.wav", samples, 24000)
        rows = np.array([[frame, label, 0, azimuth, 150, 0] for frame in range(11)], float)
        seld_tables.write_rows(tmp_path / "data/metadata_dev/dev-test-tau" / f"{name}.csv", rows)
    assert main(["convert", str(tmp_path / "best_model.pth"), str(tmp_path / "folder")]) == 0
    scores = []
    for model in ("best_model.pth", "folder"):
        out = tmp_path / f"run_{model}"
        assert main(["eval", str(tmp_path / model), str(tmp_path / "data"), "--out", str(out), "--quiet"]) == 0
        scores.append(json.loads((out / "scores.json").read_text()))
    assert scores[0] == scores[1]
    # Ten frames of each clip count: 10 right, 10 misplaced, and in the second clip 10 of another class.
    assert scores[0]["classes"]["telephone"]["f_score"] == pytest.approx(10 / (10 + 10 + 5))
    assert scores[0]["classes"]["telephone"]["doa_error"] == pytest.approx(45)


def test_the_test_fold_neither_trains_nor_chooses_unless_it_is_said(corpus, tmp_path):
    for folds in (
        {"train_folds": ["fold3", "fold4"]},
        {"train_folds": ["fold4_room1"], "validation_folds": None},
        {"validation_folds": ["fold4"]},
    ):
        with pytest.raises(ConfigError, match=r"expected other folds than fold4.*use_test_fold: true"):
            trainer_module.TaskTrainer(recipe(corpus, tmp_path, **folds))
    trainer = trainer_module.TaskTrainer(recipe(corpus, tmp_path, use_test_fold=True, train_folds=["fold3", "fold4"]))
    assert {clip.fold for clip in trainer.store.dataset.clips} == {"fold3", "fold4"}


def test_what_a_model_saw_is_not_scored_without_a_word(corpus, tmp_path, capsys):
    """On folds of its own training, on those it was chosen by, and on those of the model that it began with."""
    first, second = tmp_path / "first", tmp_path / "second"
    everything = {"use_test_fold": True, "train_folds": ["fold3", "fold4_room1"], "validation_folds": ["fold4_room2"]}
    trainer_module.TaskTrainer(recipe(corpus, first, steps=1, **everything)).fit()
    trainer_module.TaskTrainer(recipe(corpus, second, steps=1, init=str(first), train_folds=["fold3_room1"])).fit()
    for model in (first, second):
        command = ["eval", str(model), str(corpus), "--out", str(tmp_path / f"{model.name}_run"), "--quiet"]
        assert main(command) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "fold4_room1, fold4_room2" in said and "--option seen=true" in said
        assert main([*command, "--option", "seen=true"]) == 0
        assert "seen in training or by what was chosen: fold4_room1, fold4_room2" in capsys.readouterr().out
        tree = json.loads((tmp_path / f"{model.name}_run" / "scores.json").read_text())
        assert tree["metric"]["seen"] == ["fold4_room1", "fold4_room2"]


def test_a_finished_run_is_not_returned_for_other_data(corpus, tmp_path):
    """Tables or sounds made anew under their old names and sizes, in training or in validation, are other data."""
    copy, output = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, copy)
    expected = trainer_module.TaskTrainer(recipe(copy, output)).fit()
    assert trainer_module.TaskTrainer(recipe(copy, output)).fit() == expected
    for room in ("fold3_room1", "fold3_room2"):
        name = f"{room}_mix003_deg000_start0000"
        sound = copy / "stereo_dev" / "dev-train" / f"{name}.wav"
        table = copy / "metadata_dev" / "dev-train" / f"{name}.csv"
        for path, other in (
            (sound, sound.with_stem(f"{room}_mix004_deg000_start0000").read_bytes()),
            (table, table.read_bytes().replace(b",200,", b",300,")),
        ):
            before = path.read_bytes()
            assert len(other) == len(before) and other != before
            path.write_bytes(other)
            with pytest.raises(ConfigError, match="found another run"):
                trainer_module.TaskTrainer(recipe(copy, output)).fit()
            path.write_bytes(before)
    assert trainer_module.TaskTrainer(recipe(copy, output)).fit() == expected


def test_weights_that_a_run_begins_with_belong_to_it(corpus, tmp_path):
    """Another file by the name in the recipe is another run."""
    for seed in (0, 1):
        trainer_module.TaskTrainer(recipe(corpus, tmp_path / str(seed), steps=1, seed=seed)).fit()
    target = recipe(corpus, tmp_path / "run", steps=1, init=str(tmp_path / "0"))
    trainer_module.TaskTrainer(target).fit()
    shutil.copy(tmp_path / "1" / "encoder.safetensors", tmp_path / "0" / "encoder.safetensors")
    with pytest.raises(ConfigError, match="found another run"):
        trainer_module.TaskTrainer(target).fit()


def test_a_class_twice_is_refused_before_anything_is_trained(corpus, tmp_path):
    """In the recipe, and in the corpus: its tables would have two numbers for one name."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    with pytest.raises(ConfigError, match=r"labels: expected every class once, found 'high' twice"):
        trainer_module.TaskTrainer(recipe(copy, tmp_path / "run", labels=[*LABELS, "high"]))
    (copy / "classes.json").write_text(json.dumps(["low", "low"]))
    with pytest.raises(AudioLLMError, match=r"classes\.json: expected every class once, found 'low' twice"):
        trainer_module.TaskTrainer(recipe(copy, tmp_path / "run"))


def test_what_does_not_fit_is_one_sentence(corpus, trained, tmp_path):
    with pytest.raises(ConfigError, match="which folds"):
        trainer_module.TaskTrainer(recipe(corpus, tmp_path, train_folds=None, validation_folds=None))
    with pytest.raises(ConfigError, match="fold3_room9"):
        trainer_module.TaskTrainer(recipe(corpus, tmp_path, validation_folds=["fold3_room9"]))
    with pytest.raises(ConfigError, match="expected 'name'.* To go on from a folder: init: runs/here"):
        recipe(corpus, tmp_path, encoder={"path": "runs/here"}).check()
    with pytest.raises(ConfigError, match=r"head\.elements"):
        trainer_module.TaskTrainer(recipe(corpus, tmp_path, head={"elements": ["y"]}))
    with pytest.raises(AudioLLMError, match="classes"):
        other = tmp_path / "other"
        (other / "stereo_dev").mkdir(parents=True)
        for name in ("stereo_dev", "metadata_dev"):
            (other / name).exists() or (other / name).mkdir()
        write_clip(other, "fold4_room1_mix000_deg000_start0000", np.random.default_rng(1))
        seld_run.hear(trained[0], other, tmp_path / "run", seld_run.Settings(), progress=False)
    for label in LABELS:  # sounds with labels, from nowhere
        (tmp_path / "sounds" / label).mkdir(parents=True)
        soundfile.write(tmp_path / "sounds" / label / "a.wav", np.full((RATE, 2), 0.1), RATE)
    with pytest.raises(AudioLLMError, match="expected events with an azimuth and a distance, found none"):
        trainer_module.TaskTrainer(
            recipe(tmp_path / "sounds", tmp_path / "run", train_folds=None, validation_folds=None)
        )
    with pytest.raises(CheckpointError):
        load_seld(tmp_path)
    assert dcase_seld.recognises(corpus)
