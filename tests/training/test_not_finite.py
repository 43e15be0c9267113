"""Weights that a gradient made NaN while every loss that was logged is finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from audio_llm.errors import TrainingError
from audio_llm.training.callbacks import Checkpoints, MetricsFile, StopOnNaN, complete_checkpoints


class Distance(torch.nn.Module):
    """Its loss is the length of a vector, whose gradient is 0 / 0 where the vector is zero, as in many a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        at = torch.where(target[0] == 0, self.weight.detach(), target[0])  # a target of 0: where the weight is now
        return {"loss": ((self.weight - at) ** 2).sum().sqrt()}


def train(folder: Path, undefined: int, steps: int, save_steps: int) -> None:
    """`steps` of them, of which number `undefined` has no gradient."""
    rows = [{"target": torch.full((2,), 0.0 if step == undefined else 5.0)} for step in range(1, steps + 1)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        logging_steps=100,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 1,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=[],
        train_sampling_strategy="sequential",
    )
    log = MetricsFile(folder / "metrics.jsonl", 1, float(steps))
    Trainer(
        Distance(), arguments, train_dataset=rows, callbacks=[log, Checkpoints(folder, 9, {}, log), StopOnNaN()]
    ).train()


@pytest.mark.parametrize(("undefined", "saved"), [(3, [2]), (4, [2])])
def test_no_checkpoint_holds_weights_that_are_not_finite(undefined: int, saved: list[int], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 4: weight: expected finite weights, found NaN or infinity. Lower"):
        train(tmp_path, undefined, 6, save_steps=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in saved]


def test_a_run_does_not_end_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 3: weight"):
        train(tmp_path, 3, 3, save_steps=0)
    train(tmp_path / "sound", 9, 3, save_steps=2)
    assert len(complete_checkpoints(tmp_path / "sound")) == 2
