"""What GRPO's policy knows of questions that it does not learn from: its replies to them, read and counted.

A reward can rise while the policy gets worse at what it is for, and only other questions tell. Every question is asked
three times: greedily, at the temperature of the rollouts, and greedily with silence in place of its sound, so that what
listening gains is seen beside what is right. What a run decides by it (its best weights, whether it is overfit) is read
from the history that checkpoints carry: a resumed run decides the same.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from audio_llm.errors import TrainingError, describe
from audio_llm.files import write_json
from audio_llm.training.callbacks import BEST
from audio_llm.training.examples import Example, Examples
from audio_llm.training.rewards import answer_accuracy
from audio_llm.training.rollouts import Sampling, random_state_kept
from audio_llm.training.schedule import stop

History = Iterable[Mapping[str, Any]]  # what Trainer has logged, oldest first


@dataclass(frozen=True)
class Answered:
    """What the replies to one question are worth, 0 or 1: greedy, sampled, and greedy without the sound (None where the
    question has none). `place` is the question's in the validation set, `kind` its question type."""

    place: int
    kind: str | None
    greedy: float
    sampled: float
    silence: float | None


def grade(row: Mapping[str, Any], replies: Sequence[str]) -> list[float]:
    """1 for each of `replies` that answers the question of `row` (an ``Example.row``), else 0: read as the reward
    ``answer_accuracy`` reads it."""
    columns = {name: [row[name]] * len(replies) for name in ("answer", "choices")}
    return [value or 0.0 for value in answer_accuracy([], replies, **columns)]


def summarise(answered: Iterable[Answered], prefix: str = "eval") -> dict[str, float]:
    """Metrics of validation, every question once, however often it was asked to fill up the share of a process."""
    found = list({one.place: one for one in answered}.values())
    metrics: dict[str, float] = {"accuracy": _mean([one.greedy for one in found])}
    metrics["accuracy_sampled"] = _mean([one.sampled for one in found])
    heard = [(one.greedy, one.silence) for one in found if one.silence is not None]
    if heard:
        metrics["accuracy_silence"] = _mean([silence for _, silence in heard])
        metrics["audio_gain"] = _mean([greedy for greedy, _ in heard]) - metrics["accuracy_silence"]
    kinds: dict[str, list[float]] = defaultdict(list)
    for one in found:
        if one.kind:
            kinds[one.kind].append(one.greedy)
    metrics |= {f"accuracy/{kind}": _mean(kinds[kind]) for kind in sorted(kinds)}
    metrics["questions"] = len(found)
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def validations(history: History) -> list[tuple[int, float, int]]:
    """(step, greedy accuracy, questions) of every validation of a run."""
    return [(log["step"], log["eval_accuracy"], log["eval_questions"]) for log in history if "eval_accuracy" in log]


def best(history: History) -> dict[str, Any] | None:
    """`step`, `accuracy` and `questions` of the best validation, of equal ones the first; None before there is any."""
    found = validations(history)
    if not found:
        return None
    step, accuracy, questions = max(found, key=lambda one: one[1])
    return {"step": step, "accuracy": accuracy, "questions": questions}


def overfit(history: History) -> str | None:
    """What shows that the last validation is overfit, in words; None where nothing does.

    It is where accuracy has fallen below the best one by more than twice its binomial standard error while rewards
    rose: the mean reward of the steps since the validation before it, against that of the steps before the best one.
    """
    history = list(history)
    found = validations(history)
    if len(found) < 2:
        return None
    top = max(range(len(found)), key=lambda place: found[place][1])
    (_, accuracy, questions), highest = found[-1], found[top][1]
    share = (highest + accuracy) / 2  # of one alone the error would be 0 where all replies are right
    error = math.sqrt(share * (1 - share) / questions)
    if highest - accuracy <= 2 * error:
        return None
    ends = [0, *(one[0] for one in found)]
    now, then = (_rewards(history, ends[place], ends[place + 1]) for place in (len(found) - 1, top))
    if now is None or then is None or now <= then:
        return None
    return (
        f"{accuracy:.1%} of {questions} questions (twice the error: {2 * error:.1%}) and a mean reward of {now:.3g}, "
        f"against {highest:.1%} and {then:.3g} at step {found[top][0]}"
    )


def _rewards(history: History, after: int, until: int) -> float | None:
    """Mean reward that was logged after a step up to another one."""
    rewards = [log["reward"] for log in history if log.get("reward") is not None and after < log["step"] <= until]
    return _mean(rewards) if rewards else None


class BestValidation(TrainerCallback):
    """Keeps ``best.json``, by which :class:`~audio_llm.training.callbacks.Checkpoints` spares the best checkpoint."""

    def __init__(self, folder: Path):
        self.path = folder / BEST

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.tell(state)

    def tell(self, state: Any) -> None:
        """Write what is best in the run's history; nothing before its first validation."""
        if not state.is_world_process_zero:
            return
        found = best(state.log_history)
        if found is None:
            self.path.unlink(missing_ok=True)
        else:
            write_json(self.path, found)


class OverfitCheck(TrainerCallback):
    """Says so when rewards rise and validation falls; with `stop`, the run ends there."""

    def __init__(self, action: Literal["warn", "stop"]):
        self.action = action

    def on_evaluate(self, args, state, control, **kwargs):
        found = overfit(state.log_history)
        if found is None:
            return
        cure = "The policy learns to please its rewards: lower learning_rate, raise grpo.beta, or export keep: best."
        where = f"validation at step {state.global_step}"
        message = describe(where, "an accuracy that rises with the rewards", found, cure)
        if state.is_world_process_zero:
            tqdm.write(f"{'stopping' if self.action == 'stop' else 'warning'}: {message}", file=sys.stderr)
        if self.action == "stop":
            stop(args, control)


class ValidatedTrainer:
    """A mix-in for the GRPO trainer: asks the questions of `validation`, every `eval_steps` updates and at the end."""

    args: Any
    state: Any
    control: Any
    accelerator: Any
    callback_handler: Any
    processing_class: Any
    engine: Any
    policy: Any
    rejects: Any
    sampling: Any
    log: Any
    _encode: Any
    _embed: Any
    _logged: tuple[float, int] | None

    def __init__(
        self, *args: Any, validation: Examples | None = None, eval_steps: int | None = None, **kwargs: Any
    ) -> None:
        self.validation, self.eval_steps, self._validated_at = validation, eval_steps, -1
        super().__init__(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with a validation every `eval_steps` updates and at the end, before the weights are saved."""
        step = self.state.global_step
        due = self.control.should_training_stop or bool(self.eval_steps and step % self.eval_steps == 0)
        if self.validation is not None and due and step != self._validated_at:
            self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Ask the questions of `validation`, a share of them in each process; what
        :func:`summarise` tells, logged.

        The draws are the same at every validation and no others than a run without one would have been left with: two
        validations differ by the policy alone, and the training is that of a run without them.
        """
        started, model = time.perf_counter(), self.policy.model
        training = model.training
        self._validated_at = self.state.global_step
        model.eval()  # also tells TRL's log that these are not numbers of the training
        try:
            with random_state_kept():
                set_seed(int(self.args.seed) + self.accelerator.process_index)
                answered = self._ask_all()
            metrics = summarise(gather_object(answered), metric_key_prefix)
            self.log(dict(metrics))
        finally:
            model.train(training)
        if self._logged is not None:  # the time of a step is that of training
            self._logged = (self._logged[0] + time.perf_counter() - started, self._logged[1])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _ask_all(self) -> list[Answered]:
        """This process's share of the questions, as many at once as there are replies in a rollout. Shares are filled
        up to one size by questions of the beginning: under ZeRO-3 all processes must generate equally often."""
        validation, processes = self.validation, self.accelerator.num_processes
        if not validation:
            raise TrainingError(describe("validation", "questions (data.validation)", "none"))
        rounds = math.ceil(len(validation) / processes)
        share = [(n * processes + self.accelerator.process_index) % len(validation) for n in range(rounds)]
        self.engine.sync(self.policy, self.state.global_step)
        at_once = max(1, int(self.args.generation_batch_size or 0) // processes)
        parts = [share[start : start + at_once] for start in range(0, rounds, at_once)]
        return [answered for places in parts for answered in self._ask(validation, places)]

    def _ask(self, validation: Examples, places: Sequence[int]) -> list[Answered]:
        """What the replies to the questions at `places` are worth."""
        rows: list[dict[str, Any]] = []
        has_sound: list[bool] = []
        heard: list[Tensor] = []
        silent: list[Tensor] = []
        step = max(1, int(self.args.per_device_train_batch_size))
        for start in range(0, len(places), step):  # the waveforms of all at once would be much
            loaded = [validation[place] for place in places[start : start + step]]
            self.rejects.add([reject for example in loaded for reject in example.rejects])
            rows += [example.row for example in loaded]
            has_sound += [bool(example.windows) for example in loaded]
            for embedded, examples in ((heard, loaded), (silent, [silenced(example) for example in loaded])):
                self._encode(examples)
                embedded += self._embed(examples)
        greedy = dataclasses.replace(self.sampling, temperature=0.0)
        asked = [(heard, greedy), (heard, self.sampling), (silent, greedy)]
        replies = [self._replies(embedded, sampling) for embedded, sampling in asked]
        answered = []
        for place, row, sound, texts in zip(places, rows, has_sound, zip(*replies, strict=True), strict=True):
            right, sampled, unheard = grade(row, texts)
            answered.append(Answered(place, row["question_type"], right, sampled, unheard if sound else None))
        return answered

    def _replies(self, embedded: Sequence[Tensor], sampling: Sampling) -> list[str]:
        """One reply to each prompt (n, lm_hidden), as TRL hands it to rewards."""
        groups = self.engine.generate(embedded, [1] * len(embedded), sampling)
        texts: list[str] = self.processing_class.batch_decode(
            [group[0].token_ids for group in groups], skip_special_tokens=True
        )
        return texts

    def take_weights(self, checkpoint: Path) -> None:
        """Go back to the weights of `checkpoint`, one of this run's; all processes together."""
        if not checkpoint.is_dir():
            cure = "Set keep=last to export the last weights."
            raise TrainingError(describe("keep: best", f"{checkpoint}, the best by validation", "none there", cure))
        self.state.best_model_checkpoint = str(checkpoint)
        self._load_best_model()  # type: ignore[attr-defined]  # Trainer's: an adapter, whole weights or partitions


def silenced(example: Example) -> Example:
    """`example` with zeros in place of its sound."""
    sound = None if example.input_audio is None else torch.zeros_like(example.input_audio)
    return dataclasses.replace(example, input_audio=sound, tokens=None)
