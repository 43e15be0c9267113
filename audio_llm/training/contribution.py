"""What the audio contributes to a model's replies: its loss and accuracy with the sound, beside those with silence.

A run can learn to be right without listening, from what the questions alone allow, and its loss looks as if all were
well. Validation therefore scores every sample twice, as it is and with zeros in place of its samples. The difference,
in nats per supervised token, is the contribution of the audio.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from audio_llm.errors import TrainingError, describe
from audio_llm.training.examples import IGNORED

FIRST_STEP = 50  # where a recipe states none: a projector that learns at all has begun to by then
# A smaller gain is none, whatever its error: silence is a sound that was not trained on, and to be less sure of a reply
# to it says nothing of what is heard in the others.
SMALLEST = 0.05


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the supervised positions (m, vocabulary), row after row, and labels (batch, n) -> (batch, 3): summed loss,
    supervised tokens, 1 where all of them are the likeliest ones."""
    supervised = labels != IGNORED
    counts, wanted = supervised.sum(1), labels[supervised]
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").split(counts.tolist())
    right = (logits.argmax(-1) == wanted).split(counts.tolist())
    sums, all_right = (
        torch.stack(parts) for parts in ([part.sum() for part in losses], [part.all() for part in right])
    )
    return torch.stack([sums, counts.float(), all_right.float()], dim=1)


@dataclass(frozen=True)
class Contribution:
    """`gain`: loss in silence less loss with the sound, in nats per supervised token; `error` is its standard error
    over samples, `loss` the loss in silence."""

    gain: float
    error: float
    loss: float

    @classmethod
    def of(cls, heard: Tensor, silent: Tensor) -> Contribution | None:
        """From the :func:`score` of the same samples, (n, 3) each; None without a sample."""
        tokens, count = heard[:, 1], len(heard)
        if not count or not tokens.sum():
            return None
        differences = silent[:, 0] - heard[:, 0]
        gain = float(differences.sum() / tokens.sum())
        # of a ratio of two means (Cochran 1977, Sampling Techniques, eq. 6.13)
        spread = (differences - gain * tokens).square().sum() / max(count - 1, 1)
        error = math.sqrt(count * float(spread)) / float(tokens.sum()) if count > 1 else math.inf
        return cls(gain, error, float(silent[:, 0].sum() / tokens.sum()))

    @property
    def found(self) -> bool:
        """Whether the gain is above twice its error, and more than :data:`SMALLEST` of the loss in silence."""
        return self.gain > 2 * self.error and self.gain > SMALLEST * self.loss

    def __str__(self) -> str:
        return f"{self.gain:.3g} ± {2 * self.error:.2g} nats per token of {self.loss:.3g}"


def summarise(rows: Tensor, accuracy: bool, prefix: str = "eval") -> dict[str, float]:
    """Metrics of validation from (samples, 7): :func:`score` with the sound, the same with silence, and 1
    where there is sound at all. With `accuracy`, the share of replies whose every token is the likeliest one."""
    heard, silent = rows[:, :3], rows[:, 3:6]
    metrics = {"loss": float(heard[:, 0].sum() / heard[:, 1].sum()), "tokens": int(heard[:, 1].sum())}
    if accuracy:
        metrics["accuracy"] = float(heard[:, 2].mean())
    sound = rows[:, 6] > 0
    if (found := Contribution.of(heard[sound], silent[sound])) is not None:
        metrics |= {"loss_silence": found.loss, "audio_contribution": found.gain}
        metrics["audio_contribution_error"] = found.error
        if accuracy:
            metrics["accuracy_silence"] = float(silent[sound, 2].mean())
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


class ListeningCheck(TrainerCallback):
    """Say so when validation finds no contribution of the audio at `first` steps or later, not counting those that
    `before` says (of the run's steps) were no replies; with `stop`, end the run."""

    def __init__(self, action: Literal["warn", "stop"], first: int | None, before: Callable[[int], int] = lambda _: 0):
        self.action, self.first, self.before = action, FIRST_STEP if first is None else first, before
        self.warned = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        found = (metrics or {}).get("eval_audio_contribution")
        if found is None or state.global_step - self.before(state.global_step) < self.first:
            return
        heard = Contribution(found, metrics["eval_audio_contribution_error"], metrics["eval_loss_silence"])
        where = f"validation at step {state.global_step}"
        if heard.found:
            if self.warned:
                self.tell(state, f"{where}: the model has begun to use the sound, which now gains {heard}")
            self.warned = False
            return
        self.warned = True
        expected = f"a lower loss with the sound than with silence, by twice the error and {SMALLEST:.0%} of it"
        cure = (
            "So far the model answers from the text alone. If that stays so, align the projector first (a stage with "
            "objective: align), or lower learning_rate."
        )
        message = describe(where, expected, f"a gain of {heard}", cure)
        if self.action == "stop":
            raise TrainingError(message)
        self.tell(state, f"warning: {message}")

    @staticmethod
    def tell(state: Any, message: str) -> None:
        if state.is_world_process_zero:
            tqdm.write(message, file=sys.stderr)
