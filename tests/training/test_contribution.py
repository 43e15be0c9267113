"""What the audio contributes: measured on validation, and told while the run goes on."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from audio_llm import files
from audio_llm.errors import TrainingError
from audio_llm.model.build import load_model, load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import contribution, examples, sft
from tests.training.test_sft import recipe_of


def rows(*pairs: tuple[float, float]) -> torch.Tensor:
    """Scores from (summed loss, tokens) of each sample."""
    return torch.tensor([(loss, tokens, 0.0) for loss, tokens in pairs], dtype=torch.float64)


def test_the_gain_is_a_mean_over_tokens_with_the_error_of_its_samples():
    heard, silent = rows((1, 2), (2, 2), (0, 4)), rows((3, 2), (3, 2), (5, 4))
    found = contribution.Contribution.of(heard, silent)
    assert found.gain == pytest.approx(8 / 8) and found.loss == pytest.approx(11 / 8)
    residuals = [2 - 2, 1 - 2, 5 - 4]
    assert found.error == pytest.approx(math.sqrt(3 * sum(r * r for r in residuals) / 2) / 8)
    assert contribution.Contribution.of(rows()[:0].reshape(0, 3), rows()[:0].reshape(0, 3)) is None


@pytest.mark.parametrize(
    ("gain", "error", "found"), [(0.5, 0.1, True), (0.5, 0.3, False), (0.03, 0.001, False), (-1.0, 0.1, False)]
)
def test_a_gain_counts_above_its_error_and_a_share_of_the_loss(gain, error, found):
    assert contribution.Contribution(gain, error, loss=1.0).found is found


def test_a_score_counts_supervised_tokens_alone():
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 4] = logits[1, 0, 2] = 9.0
    labels = torch.tensor([[-100, 4, -100], [1, -100, -100]])
    loss, tokens, right = contribution.score(logits[labels != -100], labels).T
    assert tokens.tolist() == [1, 1] and right.tolist() == [1, 0]
    expected = torch.nn.functional.cross_entropy(logits[[0, 1], [1, 0]], torch.tensor([4, 1]), reduction="none")
    assert torch.allclose(loss, expected)


def test_validation_scores_every_sample_with_sound_and_with_silence(checkpoint, shards, tmp_path):
    held_out = shards(10, 2, 1)
    how = {"data": {"validation": [str(held_out)], "style": "answer"}, "steps": 1, "export": ["merged"]}
    result = sft.run(recipe_of(tmp_path, checkpoint(), shards(), **how))
    model, processor = load_model(tmp_path / "merged"), load_processor(tmp_path / "merged")
    for name, share in (("eval_loss", 0.0), ("eval_loss_silence", 0.999999)):
        of = examples.Examples(ShardDataset(held_out), processor, "answer", silent_share=share)
        batch = examples.collate([of[i] for i in range(len(of))], processor.tokenizer)
        inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        with torch.no_grad():
            assert result[name] == pytest.approx(float(model(**inputs).loss), abs=1e-4)
    assert result["eval_audio_contribution"] == pytest.approx(result["eval_loss_silence"] - result["eval_loss"])
    assert 0 <= result["eval_accuracy"] <= 1 and 0 <= result["eval_accuracy_silence"] <= 1


@pytest.fixture(scope="module")
def unmoved(checkpoint, tmp_path_factory):
    """A checkpoint whose projector gives the same embeddings whatever is heard."""
    folder = tmp_path_factory.mktemp("unmoved") / "model"
    shutil.copytree(checkpoint(), folder)
    state = load_file(folder / "model.safetensors")
    for name in state:
        if "projector.norm.weight" in name:
            state[name] = torch.zeros_like(state[name])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_run_that_does_not_hear_is_told(unmoved, checkpoint, shards, tmp_path, capsys):
    held_out = shards(40, 2, 1)
    how = {"train": {"projector": "frozen"}, "steps": 4, "eval_steps": 2, "contribution_steps": 3}
    how |= {"data": {"validation": [str(held_out)], "style": "answer"}}
    result = sft.run(recipe_of(tmp_path / "warned", unmoved, shards(), **how))
    assert result["eval_audio_contribution"] == pytest.approx(0, abs=1e-6)
    assert capsys.readouterr().err.count("warning: validation at step 4: expected a lower loss with the sound") == 1
    with pytest.raises(TrainingError, match="answers from the text alone"):
        sft.run(recipe_of(tmp_path / "stopped", unmoved, shards(), on_no_contribution="stop", **how))
    assert not (tmp_path / "stopped" / "result.json").exists()


def told(checkpoint, shards, folder, rate: float, steps: int) -> tuple[list[int], dict]:
    """The steps of the validations, and the result, of a run at a rate."""
    how = {
        "steps": steps,
        "eval_steps": steps // 2,
        "batch_size": 8,
        "contribution_steps": steps,
        "learning_rate": rate,
    }
    how |= {"data": {"validation": [str(shards(40, 2, 1))], "style": "answer"}}
    result = sft.run(recipe_of(folder, checkpoint(), shards(96, 2, 2), **how))
    lines = files.read_lines(folder / "metrics.jsonl")
    return [line["step"] for line in lines if "eval_audio_contribution" in line], result


def test_at_a_high_rate_a_run_learns_to_do_without_sound_and_at_a_lower_one_to_use_it(
    checkpoint, shards, tmp_path, capsys
):
    steps, result = told(checkpoint, shards, tmp_path / "high", 3e-3, 50)
    assert result["eval_loss"] < 0.3 and abs(result["eval_audio_contribution"]) < 0.01  # the loss looks fine
    assert steps == [25, 50] and "warning: validation at step 50" in capsys.readouterr().err
    steps, result = told(checkpoint, shards, tmp_path / "low", 5e-4, 100)
    assert steps == [50, 100] and "warning" not in capsys.readouterr().err
    assert result["eval_audio_contribution"] > 0.1 and result["eval_accuracy"] > 0.9
    assert result["eval_accuracy_silence"] < 0.7
