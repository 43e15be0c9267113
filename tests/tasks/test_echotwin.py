"""EchoTwin-QA: the original's layout and arithmetic, options that may be permuted, resume, and the original's flags."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audio_llm import audio, files
from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.datasets import dcase_aqa
from audio_llm.encoders.beats import BEATs, BEATsConfig
from audio_llm.errors import CheckpointError, ConfigError, TrainingError
from audio_llm.model.encoder import build_encoder
from audio_llm.tasks.echotwin import task as training
from audio_llm.tasks.echotwin.data import Asked, Collator, Listener, best_choice, option_scores
from audio_llm.tasks.echotwin.folder import load_echotwin, load_original, save_echotwin
from audio_llm.tasks.echotwin.model import EchoTwin, EchoTwinConfig, audio_windows, choice_loss, read_text
from tests.paths import ROOT

RATE = 16000
SMALL_BEATS = {
    "name": "beats",
    "preset": "tiny",
    "window_seconds": 0.64,
    "hidden_size": 32,
    "patch_width": 24,
    "depth": 2,
    "mlp_size": 48,
}
# An untrained one whose tokens differ more from sound to sound than an untrained BEATs's do.
SMALL_AST = {"name": "spatial_ast", "preset": "tiny", "layout": "mono", "window_seconds": 0.64, "target_frames": 32,
             "hidden_size": 48, "depth": 1, "heads": 4}  # fmt: skip
TEXT = training.TextTower(hidden_size=32, layers=1, heads=2, vocabulary=300)
OPTIONS = EchoTwinConfig(hidden_size=32, layers=1, heads=2, dropout=0.0)


def tone(frequency: float, seconds: float = 0.5, level: float = 0.3) -> Waveform:
    samples = level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)
    return Waveform(samples[None].astype(np.float32), RATE, "mono")


def make_questions(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """A soft low or a loud high tone, named in the options: DCASE's files, a sound in four MPEG under a WAV's name."""
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True)
    for number in range(count):
        high = bool(rng.integers(2))
        sound = tone(rng.uniform(2000, 3000)) if high else tone(rng.uniform(150, 300), level=0.0005)
        form = ("mp3", "MPEG_LAYER_III") if number % 4 == 0 else ("wav", "PCM_16")
        (folder / "audio" / f"clip_{number}.wav").write_bytes(audio.encode(sound, *form))
        words = ["a low tone", "a high tone", "noise"][: 2 + number % 2]
        words = [words[index] for index in rng.permutation(len(words))]
        options = [f"{chr(65 + index)}. {word}" for index, word in enumerate(words)]
        record = {
            "id": f"part{1 + number % 3}_dev_{number:04d}",
            "audio_url": f"audio/clip_{number}.wav",
            "question": "Which sound is it?",
            "choice": options,
            "answer": options[words.index("a high tone" if high else "a low tone")],
            "question_type": "audio tagging",
        }
        (folder / f"q{number:04d}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_questions(tmp_path_factory.mktemp("aqa") / "dev")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about other recordings than those of `questions`."""
    return make_questions(tmp_path_factory.mktemp("held_out") / "dev", 24, seed=1)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["Which sound is it? A. a low tone B. a high tone C. noise", "How long is the bell? rain wind"]
    return training.build_text_tower(TEXT, words * 20, tmp_path_factory.mktemp("text") / "tower", seed=0)


def make_model(text_folder: Path, config: EchoTwinConfig = OPTIONS, seed: int = 0) -> tuple[EchoTwin, object]:
    from audio_llm.tasks.echotwin.folder import open_text

    torch.manual_seed(seed)
    tower, tokenizer = open_text(text_folder)
    model = EchoTwin(config, build_encoder(SMALL_BEATS), tower).eval()
    for name, parameter in model.named_parameters():  # louder than at the start, so that a difference is seen
        if name.startswith("options") and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    training.freeze_audio(model.audio_enc, 0)
    return model, tokenizer


def recipe_of(questions: Path, output: Path, **changes: object) -> training.EchoTwinRecipe:
    fields: dict = {
        "train": [questions],
        "output": output,
        "encoder": SMALL_BEATS,
        "text": TEXT,
        "model": OPTIONS,
        "steps": 8,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "text_rate": 3e-3,
        "save_steps": 4,
        "log_steps": 1,
    }
    return training.EchoTwinRecipe(**{**fields, **changes})


# ------------------------------------------------------------------------------------------------------ option head


def test_permuting_options_permutes_the_scores_and_nothing_else(text_folder: Path) -> None:
    model, tokenizer = make_model(text_folder)
    listener = Listener(model)
    heard = listener.hear([listener.windows(tone(440, 0.9)), listener.windows(tone(3000, 0.3))])
    choices = ("a low tone", "a high tone", "noise", "rain")
    collator = Collator(model, tokenizer, 4)
    plain = option_scores(model, collator, [Asked("Which sound is it?", choices, None, part) for part in heard])
    assert abs(plain[0][0] - plain[1][0]) > 1e-4  # it listens
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(4)
        moved = tuple(choices[index] for index in order)
        again = option_scores(model, collator, [Asked("Which sound is it?", moved, None, part) for part in heard])
        for before, after in zip(plain, again, strict=True):
            assert after == [before[index] for index in order]  # to the last digit


def test_the_head_itself_scores_rows_independently_of_their_order_and_of_each_other(text_folder: Path) -> None:
    model, tokenizer = make_model(text_folder)
    rows = read_text(tokenizer, "Which sound is it?", ["noise", "rain", "a low tone"], OPTIONS)
    batch = Collator(model, tokenizer, 3)._text([rows])
    tokens, mask, seconds = torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool), torch.arange(6.0)[None]

    def scores(order: list[int]) -> torch.Tensor:
        part = {name: value[:, order] for name, value in batch.items()}
        present = torch.ones(1, len(order), dtype=torch.bool)
        with torch.no_grad():
            return model(**part, option_mask=present, audio_tokens=tokens, audio_mask=mask, audio_seconds=seconds)[
                "logits"
            ][0]

    plain = scores([0, 1, 2])
    assert plain.std() > 1e-3
    torch.testing.assert_close(scores([2, 0, 1]), plain[[2, 0, 1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores([1]), plain[[1]], atol=1e-5, rtol=0)


def test_padding_changes_nothing_and_time_is_heard(text_folder: Path) -> None:
    model, tokenizer = make_model(text_folder)
    collator, listener = Collator(model, tokenizer, 2), Listener(model)
    early = Waveform(np.pad(tone(3000, 0.4).samples, ((0, 0), (0, 12800))), RATE, "mono")
    late = Waveform(np.ascontiguousarray(early.samples[:, ::-1]), RATE, "mono")
    heard = listener.hear([listener.windows(wave) for wave in (tone(440, 0.3), early, late)])
    assert [len(part.seconds) for part in heard] == [1, 6, 6]  # windows of 0.64 s, tokens of 0.16 s
    items = [Asked("Which sound is it?", ("noise", "rain"), None, part) for part in heard]
    together = option_scores(model, collator, items)
    alone = [option_scores(model, collator, [item])[0] for item in items]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert abs(together[1][0] - together[2][0]) > 1e-5
    assert (heard[1].seconds.diff() > 0).all() and heard[1].seconds.max() < 1.2 + 0.1


def test_options_are_never_cut_and_questions_are(text_folder: Path) -> None:
    _, tokenizer = make_model(text_folder)
    config = dataclasses.replace(OPTIONS, max_text=24)
    (row,) = read_text(tokenizer, "bell " * 60, ["a low tone"], config)
    assert len(row["input_ids"]) == 24
    assert tokenizer.decode(row["input_ids"]).endswith("a low tone [SEP]")
    letters = dataclasses.replace(config, head="letters")
    (row,) = read_text(tokenizer, "bell " * 60, ["rain", "wind"], letters)
    assert tokenizer.decode(row["input_ids"]).lower().endswith("a . rain b . wind [sep]")
    with pytest.raises(ConfigError, match="max_text"):
        read_text(tokenizer, "bell", ["bell " * 30], config)


def test_smoothing_goes_to_the_options_that_are_there() -> None:
    logits = torch.tensor([[2.0, -1.0, -torch.inf], [0.5, 0.1, 0.3]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    labels = torch.tensor([0, 2])
    plain = choice_loss(logits, mask, labels, 0.0)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, labels))
    smooth = choice_loss(logits, mask, labels, 0.1)
    oracle = nn.functional.cross_entropy(logits[1:], labels[1:], label_smoothing=0.1)
    first = nn.functional.cross_entropy(logits[:1, :2], labels[:1], label_smoothing=0.1)
    torch.testing.assert_close(smooth, (oracle + first) / 2)
    smooth.backward()
    assert torch.isfinite(logits.grad).all()


# -------------------------------------------------------------------------------------------------- original's files


class OriginalTwin(nn.Module):
    """The published head, as its description has it: mean audio vector beside the first text token."""

    def __init__(self, audio_enc: nn.Module, text_enc: nn.Module, letters: int) -> None:
        super().__init__()
        self.audio_enc, self.text_enc = audio_enc, text_enc
        self.fusion = nn.Sequential(nn.Linear(96 + 32, 512), nn.ReLU(), nn.Linear(512, letters))

    def forward(self, waveform: torch.Tensor, text: dict) -> torch.Tensor:
        tokens = self.audio_enc(waveform, torch.tensor([waveform.shape[2]]))[0]
        first = self.text_enc(**text).last_hidden_state[:, 0]
        return self.fusion(torch.cat((tokens.mean(dim=1), first), dim=1))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, text_folder: Path):
    """An original ``best.pt`` with legacy keys, its BEATs checkpoint, and the module both were written from."""
    from audio_llm.tasks.echotwin.folder import open_text

    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(3)
    config = BEATsConfig(window_seconds=10.0, patch_width=32, hidden_size=96, depth=2, heads=4, mlp_size=96)
    twin = OriginalTwin(BEATs(config), open_text(text_folder)[0], letters=5).eval()
    state = {**twin.state_dict(), "text_enc.embeddings.position_ids": torch.arange(512)[None]}
    bias = "encoder.layers.0.self_attn.relative_attention_bias.weight"
    for layer in (1,):  # published files list the shared table in every layer
        state[f"audio_enc.{bias.replace('layers.0', f'layers.{layer}')}"] = state[f"audio_enc.{bias}"]
    torch.save({"epoch": 3, "model": state, "best_acc": 0.5}, folder / "best.pt")
    published = {
        "input_patch_size": 16, "embed_dim": 32, "encoder_embed_dim": 96, "encoder_layers": 2,
        "encoder_ffn_embed_dim": 96, "encoder_attention_heads": 4, "deep_norm": True, "max_distance": 800,
        "relative_position_embedding": True, "gru_rel_pos": True, "finetuned_model": False,
    }  # fmt: skip
    weights = {key.removeprefix("audio_enc."): value for key, value in state.items() if key.startswith("audio_enc.")}
    torch.save({"cfg": published, "model": {key: torch.zeros_like(value) for key, value in weights.items()}},
               folder / "beats.pt")  # fmt: skip
    return folder, twin


def test_an_original_file_answers_as_the_original_did(original, text_folder: Path) -> None:
    folder, twin = original
    model, tokenizer = load_original(folder / "best.pt", folder / "beats.pt", text_folder)
    assert model.config.num_letters == 5 and model.config.conventions == "original"
    wave = Waveform(np.concatenate([tone(500, 1.3).samples, np.zeros((1, 4000), np.float32)], axis=1), RATE, "mono")
    choices = ("a low tone", "a high tone", "noise")
    listener = Listener(model)
    item = Asked("Which sound is it?", choices, None, listener.hear([listener.windows(wave)])[0])
    scores = option_scores(model, Collator(model, tokenizer, 3), [item])[0]

    peak = wave.samples / np.abs(wave.samples).max()
    peak = np.sign(peak) * np.maximum(np.abs(peak), 1e-6)
    padded = np.pad(peak, ((0, 0), (0, 160000 - peak.shape[1])), constant_values=1e-6)
    text = tokenizer("Which sound is it? A. a low tone B. a high tone C. noise", return_tensors="pt")
    with torch.no_grad():
        logits = twin(torch.from_numpy(padded.astype(np.float32))[None], dict(text))[0]
    np.testing.assert_allclose(scores, logits[:3].log_softmax(0).numpy(), atol=2e-4)


def test_original_conventions_cut_and_fill(text_folder: Path) -> None:
    encoder = build_encoder(SMALL_BEATS)
    config = EchoTwinConfig(head="letters", conventions="original")
    stereo = Waveform(np.stack([tone(500, 2.0).samples[0], np.zeros(32000, np.float32)]), RATE, "stereo")
    (window,) = audio_windows(stereo, encoder, config)
    assert window.shape == (1, encoder.window_samples) and window.max() == pytest.approx(1.0, abs=1e-3)
    assert len(audio_windows(stereo, encoder, OPTIONS)) == 4  # 2 s in windows of 0.64 s: nothing is cut
    (silent,) = audio_windows(Waveform(np.zeros((1, 100), np.float32), RATE, "mono"), encoder, config)
    assert (silent == np.float32(1e-6)).all()


def test_wrong_files_are_named(original, text_folder: Path, tmp_path: Path) -> None:
    folder, _ = original
    with pytest.raises(CheckpointError, match="fusion"):
        load_original(folder / "beats.pt", folder / "beats.pt", text_folder)
    with pytest.raises(CheckpointError, match="config.json"):
        load_original(folder / "best.pt", folder / "beats.pt", tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_echotwin(tmp_path)
    assert main(["echotwin", "evaluate", "--model_checkpoint", str(folder / "best.pt"), "--dev_json_dir", "x"]) == 2


def test_a_folder_round_trips(text_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = make_model(text_folder)
    again, _ = load_echotwin(save_echotwin(tmp_path / "model", model, tokenizer))
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    tree = json.loads((tmp_path / "model" / "config.json").read_text())
    for part in ("echotwin", "encoder"):
        (tmp_path / "model" / "config.json").write_text(json.dumps(tree | {part: "small"}))
        with pytest.raises(CheckpointError, match="expected a configuration of version 1"):
            load_echotwin(tmp_path / "model")


# ----------------------------------------------------------------------------------------------------------- training


def test_training_resumes_to_the_same_weights(questions: Path, tmp_path: Path) -> None:
    whole = recipe_of(questions, tmp_path / "whole", model=dataclasses.replace(OPTIONS, dropout=0.1))
    result = training.fit(whole)
    assert result["questions"] == 24 and result["repaired or unusable"] == {"MPEG audio named .wav": 6}
    assert training.fit(whole) == result  # finished: nothing is done again
    killed = dataclasses.replace(whole, output=tmp_path / "killed")
    stop = training.EchoTwinTrainer.training_step

    class Killed(Exception): ...

    def dies(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Killed
        return stop(self, *args, **kwargs)

    training.EchoTwinTrainer.training_step = dies  # type: ignore[method-assign]
    try:
        with pytest.raises(Killed):
            training.fit(killed)
    finally:
        training.EchoTwinTrainer.training_step = stop  # type: ignore[method-assign]
    training.fit(killed)
    one, other = (load_echotwin(tmp_path / name)[0].state_dict() for name in ("whole", "killed"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    with pytest.raises(ConfigError, match="another run: learning_rate is 0.0001 here"):
        training.fit(dataclasses.replace(killed, learning_rate=1e-4))


def test_training_learns_to_listen_and_keeps_the_best(questions: Path, held_out: Path, tmp_path: Path) -> None:
    recipe = recipe_of(questions, tmp_path / "run", validation=held_out, steps=120, eval_steps=40, save_steps=None)
    recipe = dataclasses.replace(recipe, encoder=SMALL_AST)
    result = training.fit(dataclasses.replace(recipe, cache=tmp_path / "cache"))
    assert result["validation_accuracy"] > 0.9
    deaf = dataclasses.replace(OPTIONS, listen=False)
    text_only = training.fit(dataclasses.replace(recipe, output=tmp_path / "deaf", model=deaf, eval_steps=20, steps=20))
    assert text_only["validation_accuracy"] < 0.8
    (store,) = (tmp_path / "cache" / "columns").glob("*.sqlite")
    assert store.stat().st_size > 10_000


def test_an_audio_tower_can_learn_but_its_norms(questions: Path, tmp_path: Path) -> None:
    recipe = recipe_of(questions, tmp_path / "run", steps=2, unfreeze=1, audio_rate=1e-2, save_steps=None)
    training.fit(recipe)
    torch.manual_seed(recipe.seed)
    before = build_encoder(SMALL_BEATS).state_dict()
    after = load_echotwin(tmp_path / "run")[0].audio_enc.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("encoder.layers.1.") and "layer_norm" not in name for name in moved)


def test_too_many_unusable_questions_stop_a_run(questions: Path, tmp_path: Path) -> None:
    folder = make_questions(tmp_path / "dev", 8)
    (folder / "audio" / "clip_1.wav").write_bytes(b"RIFF")
    (folder / "audio" / "clip_2.wav").unlink()
    with pytest.raises(TrainingError, match="2 of 8.*rejects.jsonl"):
        training.fit(recipe_of(folder, tmp_path / "run"))
    listed = {row["sample"]: row["reason"] for row in files.read_lines(tmp_path / "run" / "rejects.jsonl")}
    assert sorted(listed) == ["part2_dev_0001", "part3_dev_0002"] and "clip_2.wav" in listed["part3_dev_0002"]
    result = training.fit(recipe_of(folder, tmp_path / "run", max_reject_share=0.5, steps=1))
    assert result["questions"] == 6 and result["rejects"] == 2
    # A model that does not listen learns from the same questions.
    deaf = dataclasses.replace(OPTIONS, listen=False)
    result = training.fit(recipe_of(folder, tmp_path / "deaf", max_reject_share=0.5, steps=1, model=deaf))
    assert result["questions"] == 6 and result["rejects"] == 2
    again = files.read_lines(tmp_path / "deaf" / "rejects.jsonl")
    assert {row["sample"]: row["reason"] for row in again} == listed
    with pytest.raises(ConfigError, match="steps"):
        training.fit(recipe_of(folder, tmp_path / "run", steps=None))
    for steps, epochs, expected in ((8, 2.0, 3), (2, 2.0, 2), (None, 2.0, 3), (8, None, 8)):  # the smaller counts
        recipe = recipe_of(folder, tmp_path / "run", steps=steps, epochs=epochs, batch_size=4)
        recipe.check()
        assert training.training_arguments(recipe, 6).max_steps == expected


def rewrite(folder: Path, number: int, **fields: object) -> None:
    """Change a question of :func:`make_questions`."""
    path = folder / f"q{number:04d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("config", [OPTIONS, dataclasses.replace(OPTIONS, listen=False)], ids=["hears", "deaf"])
def test_validation_and_evaluation_leave_out_the_same_questions(
    questions: Path, tmp_path: Path, config: EchoTwinConfig, capsys
) -> None:
    from audio_llm.tasks.echotwin.engine import EchoTwinEngine
    from eval.figures.scores import item_values
    from eval.tasks import echotwin

    dev = make_questions(tmp_path / "dev", 10, seed=1)
    (dev / "audio" / "clip_1.wav").write_bytes(b"RIFF")
    rewrite(dev, 2, answer="Z. nothing of the kind")
    rewrite(dev, 3, choice=["A. " + "noise " * 200, "B. rain"], answer="B. rain")
    recipe = recipe_of(questions, tmp_path / "run", model=config, validation=dev, save_steps=None)
    with pytest.raises(TrainingError, match="unusable validation questions.*3 of 10"):
        training.fit(recipe)
    result = training.report(dataclasses.replace(recipe, max_reject_share=0.3))
    said = capsys.readouterr().out
    assert "24 questions, 0 left out" in said
    assert "validation: 7 questions, 3 left out (" in said and "1 × answer is none of the options" in said
    assert (result["rejects"], result["validation_rejects"], result["validation_questions"]) == (0, 3, 7)
    reasons = {row["sample"]: row["reason"] for row in files.read_lines(tmp_path / "run" / "rejects.jsonl")}
    assert sorted(reasons) == ["part1_dev_0003", "part2_dev_0001", "part3_dev_0002"]
    assert "none of the options" in reasons["part3_dev_0002"] and "max_text" in reasons["part1_dev_0003"]

    answers = echotwin.answer(EchoTwinEngine(*load_echotwin(tmp_path / "run")), dev)
    scored = [row for row in answers if row.scores and row.question.answer is not None]
    assert {row.question.id for row in answers} - {row.question.id for row in scored} == set(reasons)
    assert np.mean([row.choice == row.question.answer for row in scored]) == result["validation_accuracy"]
    table = echotwin.dev_table(answers)
    assert table.startswith("overall") and "n 7" in table.splitlines()[0]
    command = ["eval", str(tmp_path / "run"), str(dev), "--benchmark", "dcase_aqa", "--quiet", "--controls", "none"]
    assert main([*command, "--out", str(tmp_path / "eval")]) == 0
    values = item_values(echotwin.row_of("run", tmp_path / "eval").scored)
    assert len(values) == 7 and np.mean(list(values.values())) == result["validation_accuracy"]


@pytest.mark.parametrize("head", ["options", "letters"])
def test_a_question_that_is_too_long_costs_itself_in_training(tmp_path: Path, head: str) -> None:
    folder = make_questions(tmp_path / "train", 8)
    rewrite(folder, 5, choice=["A. " + "noise " * 200, "B. rain"], answer="B. rain")
    config = dataclasses.replace(OPTIONS, head=head)
    changes = {"model": config, "max_reject_share": 0.2, "steps": 2, "save_steps": None}
    result = training.fit(recipe_of(folder, tmp_path / "run", **changes))
    assert result["questions"] == 7 and result["rejects"] == 1
    (line,) = files.read_lines(tmp_path / "run" / "rejects.jsonl")
    assert line["set"] == "training" and line["sample"].endswith("0005") and "options are never cut" in line["reason"]


def test_weights_are_not_chosen_on_recordings_of_the_training_set(questions: Path, tmp_path: Path, capsys) -> None:
    dev = make_questions(tmp_path / "dev", 9, seed=1)
    for number in (0, 4):  # the bytes of training clips, under names of their own
        clip = questions / "audio" / f"clip_{number + 1}.wav"
        (dev / "audio" / f"clip_{number}.wav").write_bytes(clip.read_bytes())
    recipe = recipe_of(questions, tmp_path / "run", validation=dev, steps=1, save_steps=None)
    result = training.report(recipe)
    assert (result["validation_questions"], result["validation_duplicates"], result["validation_rejects"]) == (7, 2, 0)
    said = capsys.readouterr()
    for log in (said.out, said.err):  # at the end, and before the training
        assert "2 about a clip of the training questions, left out as well" in log
    listed = files.read_lines(tmp_path / "run" / "rejects.jsonl")
    assert [(row["set"], row["sample"]) for row in listed] == [
        ("validation", "part1_dev_0000"),
        ("validation", "part2_dev_0004"),
    ]
    result = training.report(dataclasses.replace(recipe, output=tmp_path / "kept", duplicates="keep"))
    assert (result["validation_questions"], result["validation_duplicates"]) == (9, 2)
    assert "kept" in capsys.readouterr().out and not files.read_lines(tmp_path / "kept" / "rejects.jsonl")
    with pytest.raises(TrainingError, match="not in the training questions, found none.*duplicates=keep"):
        training.fit(dataclasses.replace(recipe, output=tmp_path / "same", validation=questions))


# ------------------------------------------------------------------------------------------------- the whole, by verb


def test_the_flags_of_the_original_train_score_and_submit(questions: Path, tmp_path: Path, capsys) -> None:
    from audio_llm.model.folder import save_parts

    tower = save_parts(tmp_path / "tower", build_encoder(SMALL_BEATS), {}, {})
    flags = ["--batch_size", "8", "--epochs", "1", "--num_workers", "0", "--head", "letters", "--lr_text", "1e-3"]
    data = [
        "--json_dir_train",
        str(questions),
        "--json_dir_val",
        str(questions),
        "--audio_dir",
        str(questions / "audio"),
    ]
    run = tmp_path / "exp1"
    command = ["echotwin", "train", *data, "--checkpoint", str(tower), "--save_dir", str(run), *flags]
    assert main(command) == 2 and "found none. Use another set, or duplicates=keep" in capsys.readouterr().err
    assert main([*command, "--duplicates", "keep", "--max_rejects", "0"]) == 0
    submission = tmp_path / "submission.csv"
    flags = ["--dev_json_dir", str(questions), "--eval_json_dir", str(questions), "--output_csv", str(submission)]
    assert main(["echotwin", "evaluate", "--model_checkpoint", str(run), *flags]) == 0
    said = capsys.readouterr().out
    assert "overall" in said and "mean of the parts" in said and "24 questions, valid" in said
    with submission.open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["question", "answer"] and rows[1][0] == "q0000" and len(rows) == 25
    assert main(["echotwin", "evaluate", "--model_checkpoint", str(run), *flags, "--batch_size", "-1"]) == 2
    assert "--batch_size: expected at least 1, found -1" in capsys.readouterr().err
    options = {row.stem: row.options for row in dcase_aqa.read(questions).rows}
    assert all(answer in options[stem] for stem, answer in rows[1:])


def test_benchmark_runs_and_the_table(questions: Path, tmp_path: Path, capsys) -> None:
    training.fit(recipe_of(questions, tmp_path / "model", steps=60, save_steps=None))
    deaf = dataclasses.replace(OPTIONS, listen=False)
    training.fit(recipe_of(questions, tmp_path / "deaf", model=deaf, steps=2, save_steps=None))
    for name in ("model", "deaf"):
        command = ["eval", str(tmp_path / name), str(questions), "--benchmark", "dcase_aqa", "--quiet"]
        out = ["--controls", "silence,shuffled_options", "--out", str(tmp_path / f"run-{name}")]
        assert main([*command, *out]) == 0
    capsys.readouterr()
    runs = [f"option head={tmp_path / 'run-model'}", "--baseline", f"text only={tmp_path / 'run-deaf'}"]
    assert main(["echotwin", "table", *runs, "--train", str(questions)]) == 0
    said = capsys.readouterr().out
    assert "| option head | " in said and "0.0 % of 24" in said and "majority letter" in said
    assert "option head over text only: " in said and "option head over majority letter" in said
    for arguments, words in (
        (["nameless", "--train", str(questions)], "expected NAME=RUN, found 'nameless'"),
        ([runs[0], runs[0], "--train", str(questions)], "run 'option head': expected a name of its own"),
        ([runs[0], "--train", str(hidden(questions, tmp_path / "hidden"))], "questions with their right answers"),
    ):
        capsys.readouterr()
        assert main(["echotwin", "table", *arguments]) == 2
        assert words in capsys.readouterr().err
    # A model that writes its answers is read as everywhere else.
    spoken = tmp_path / "run-model" / "predictions.jsonl"
    rows = [json.loads(line) for line in spoken.read_text().splitlines()]
    tagged = [row | {"raw": f"<think>noise? no</think><answer>{row['raw']}</answer>"} for row in rows]
    spoken.write_text("".join(json.dumps(row) + "\n" for row in tagged))
    assert main(["echotwin", "table", *runs, "--train", str(questions)]) == 0
    assert capsys.readouterr().out == said


def hidden(questions: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in questions.glob("*.json"):
        record = json.loads(path.read_text())
        del record["answer"]
        (folder / path.name).write_text(json.dumps(record))
    return folder


def write_run(folder: Path, right: str, moved: str = "", orders: int = 2, permuted: bool = True) -> Path:
    """A run of `right` (one character an item, "1" for a right answer) that has orders where `moved` is not "0".

    An item that moves does so in the first of the orders alone.
    """
    from eval.predictions import Prediction

    choices = ["rain", "wind", "bell"]
    lines = []
    for number, mark in enumerate(right):
        gold = choices[1 + number % 2]
        answer = gold if mark == "1" else "rain"
        item = {"id": f"q{number}", "question_type": "both", "format": "dcase_aqa", "question": "?", "gold": gold,
                "meta": {"part": 1}}  # fmt: skip
        lines.append(Prediction(**item, choices=choices, raw=answer))
        for sample in range(orders if permuted else 0):
            order = choices[sample + 1 :] + choices[: sample + 1]
            leaves = sample == 0 and moved[number : number + 1] == "1"
            raw = next(choice for choice in choices if choice != answer) if leaves else answer
            lines.append(Prediction(**item, choices=order, raw=raw, control="shuffled_options", sample=sample))
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(f"{line.to_json()}\n" for line in lines))
    return folder


def test_the_strict_table_wants_gains_and_a_choice_that_never_moves(questions: Path, tmp_path: Path, capsys) -> None:
    best, next_best, nothing = "1" * 36 + "0" * 4, "1" * 20 + "0" * 20, "0" * 40
    letters = write_run(tmp_path / "letters", next_best, "1" * 30)
    text = write_run(tmp_path / "text", nothing, permuted=False)

    def table(options: Path, *flags: str) -> tuple[int, str, str]:
        runs = [f"option head={options}", f"letter head={letters}", "--baseline", f"text only={text}"]
        code = main(["echotwin", "table", *runs, "--train", str(questions), *flags])
        return code, *capsys.readouterr()

    steady = write_run(tmp_path / "steady", best)
    code, said, problems = table(steady, "--strict")
    assert code == 0 and not problems, problems
    assert "0.0 % of 40" in said and "75.0 % of 40" in said and "(40 questions, 0 left out)" in said
    unsteady = write_run(tmp_path / "unsteady", best, "0" * 39 + "1")
    code, said, problems = table(unsteady, "--strict")
    assert code == 1 and "option head, options permuted: expected a choice that never moves, found 1 of 40" in problems
    assert "2.5 % of 40" in said  # moved in one order of two
    assert table(unsteady)[0] == 0
    code, _, problems = table(write_run(tmp_path / "unasked", best, permuted=False), "--strict")
    assert code == 1 and "expected answers to 40 questions, found 0. Evaluate it with --controls" in problems
    code, _, problems = table(write_run(tmp_path / "worse", next_best), "--strict")
    assert code == 1 and "option head over letter head: expected a gain beyond its interval" in problems
    script = ROOT / "scripts" / "echotwin.sh"
    assert "--strict" in script.read_text()


def test_choices_that_are_read_alike_do_not_move_either(text_folder: Path) -> None:
    from audio_llm.tasks.echotwin.engine import EchoTwinEngine

    model, tokenizer = make_model(text_folder)
    engine = EchoTwinEngine(model, tokenizer)
    heard = engine.listener.hear([engine.listener.windows(tone(440, 0.9))])[0]
    for choices in (("Rain", "rain", "RAIN"), ("雨", "风", "雷")):  # of one case for it, and not in its vocabulary
        picked = set()
        for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
            asked = tuple(choices[place] for place in order)
            (scores,) = engine.score([Asked("Which sound is it?", asked, None, heard)])
            picked.add(asked[best_choice(scores, asked)])
        assert len(picked) == 1, picked


@pytest.mark.parametrize("head", ["options", "letters"])
def test_options_that_are_too_long_cost_their_own_question(text_folder: Path, head: str) -> None:
    from audio_llm.tasks.echotwin.engine import EchoTwinEngine

    model, tokenizer = make_model(text_folder, dataclasses.replace(OPTIONS, head=head))
    engine = EchoTwinEngine(model, tokenizer)
    heard = engine.listener.hear([engine.listener.windows(tone(440, 0.9))])[0]
    asked = [("noise", "rain"), ("noise " * 500, "rain"), ("wind", "bell")]
    scores = engine.score([Asked("Which sound is it?", choices, None, heard) for choices in asked])
    assert [isinstance(row, str) for row in scores] == [False, True, False]
    assert "options are never cut" in scores[1]
