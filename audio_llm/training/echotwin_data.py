"""Questions about recordings as batches for EchoTwin-QA: text by a tokenizer, audio by a frozen tower, once a clip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from audio_llm.audio import Waveform
from audio_llm.dcase_aqa import Question
from audio_llm.echotwin import EchoTwin, audio_windows, read_text
from audio_llm.errors import AudioLLMError, TrainingError, describe
from audio_llm.training.encoder_cache import EncoderCache

BATCH_WINDOWS = 32  # through the frozen tower at a time


class Asked(NamedTuple):
    """A question as an item of a batch; `draw` seeds what is random about it in training."""

    question: Question
    draw: tuple[int, int] | None = None


class Heard(NamedTuple):
    """A recording's tokens (n, hidden) and their centres in seconds (n,)."""

    tokens: Tensor
    seconds: Tensor


@dataclass
class Listener:
    """Recordings through the audio tower of `model`, each once; `cache` is a folder shared by runs, or None.

    `rejects` has a line for every recording that cannot be used; the rule is one for training and for prediction.
    """

    model: EchoTwin
    cache: Path | None = None
    learning: bool = False  # the tower is trained: recordings are only checked here, and heard in every batch anew
    silent: bool = False  # digital silence of the same length instead: the control
    rejects: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: dict[Any, Heard] = {}
        self._encode: Any = self.model.encode_audio
        if self.cache is not None and not self.learning:
            kind = "columns" if self.model.config.columns else "tokens"
            self._encode = EncoderCache(self.cache / kind, self.model)

    def __getitem__(self, question: Question) -> Heard:
        return self._known[question.audio]

    def listen(self, questions: Iterable[Question], quiet: bool = False) -> None:
        """Hear every recording that was not heard yet."""
        from tqdm import tqdm

        known = self._known.keys() | self.rejects.keys()
        wanted = {question.audio: question for question in questions if question.audio not in known}
        waiting: list[tuple[Any, list[np.ndarray]]] = []
        self.model.eval()
        for clip, question in tqdm(wanted.items(), desc="listen", unit="clip", disable=quiet, leave=False):
            try:
                windows = self.windows(question)
                if not self.learning:
                    waiting.append((clip, windows))
            except AudioLLMError as error:
                self.rejects[clip] = str(error)
            if sum(len(windows) for _, windows in waiting) >= BATCH_WINDOWS:
                self._hear(waiting)
                waiting = []
        self._hear(waiting)

    def windows(self, question: Question) -> list[np.ndarray]:
        """What the tower is given of a question's recording. Raises :class:`AudioError`."""
        waveform = question.waveform()
        if self.silent:
            waveform = Waveform(np.zeros_like(waveform.samples), waveform.sample_rate, waveform.layout)
        return audio_windows(waveform, self.model.audio_enc, self.model.config)

    def _hear(self, clips: Sequence[tuple[Any, list[np.ndarray]]]) -> None:
        windows = [window for _, parts in clips for window in parts]
        found: list[Tensor] = []
        for start in range(0, len(windows), BATCH_WINDOWS):
            found += self._tokens(windows[start : start + BATCH_WINDOWS])
        position = 0
        for clip, parts in clips:
            mine, position = found[position : position + len(parts)], position + len(parts)
            self._known[clip] = self._joined(mine)

    @torch.no_grad()
    def _tokens(self, windows: Sequence[np.ndarray]) -> list[Tensor]:
        """Per window its tokens (n, hidden) with NaN where nothing may be attended to."""
        waveform, lengths = stack_windows(windows)
        device = next(self.model.parameters()).device
        tokens, mask = self._encode(waveform.to(device), lengths.to(device))
        if not torch.isfinite(tokens[mask]).all():
            cure = "The features are computed in float32; the weights of the encoder are damaged."
            raise TrainingError(describe("audio tower", "finite tokens", "NaN or infinity", cure))
        return list(tokens.float().masked_fill(~mask[..., None], torch.nan).cpu())

    def _joined(self, windows: Sequence[Tensor]) -> Heard:
        tokens = torch.cat(list(windows))
        seconds = torch.cat([self.model.token_seconds(len(w), number) for number, w in enumerate(windows)])
        kept = ~tokens[:, 0].isnan()
        return Heard(tokens[kept], seconds[kept])


def stack_windows(windows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Windows (channels, time) → (windows, channels, time) zero-padded, and their lengths (windows,)."""
    longest = max(window.shape[1] for window in windows)
    padded = [np.pad(window, ((0, 0), (0, longest - window.shape[1]))) for window in windows]
    return torch.from_numpy(np.stack(padded)), torch.tensor([window.shape[1] for window in windows])


class QuestionDataset(Dataset):
    """The questions that can be learnt from or scored: their recording can be heard, their answer is known.

    `rejects` names the others by id, with the reason; the rule is the same for training, validation and scoring.
    """

    def __init__(self, questions: Sequence[Question], model: EchoTwin, listener: Listener, quiet: bool = False) -> None:
        if model.config.listen:
            listener.listen(questions, quiet)
        self.listener = listener
        self.questions: list[Question] = []
        self.rejects: dict[str, str] = {}
        letters = model.config.num_letters if model.config.head == "letters" else None
        for question in questions:
            reason = listener.rejects.get(question.audio) or reason_against(question, letters)
            if reason:
                self.rejects[question.id] = reason
            else:
                self.questions.append(question)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Asked:
        return Asked(self.questions[index])


class RunDataset(Dataset):
    """A whole run of `length` questions: item p is a function of (seed, p), so a resumed run needs p and nothing else.

    Every epoch has another order; epochs follow each other without a seam.
    """

    def __init__(self, questions: QuestionDataset, length: int, seed: int) -> None:
        self.questions, self.length, self.seed = questions, length, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Asked:
        epoch, place = divmod(position, len(self.questions))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.questions))
        return Asked(self.questions.questions[self._order[place]], (self.seed, position))


def reason_against(question: Question, letters: int | None) -> str:
    """Why a question cannot be learnt from, "" where it can; `letters` are as many options as a letter head knows."""
    if question.answer is None:
        return question.problem or "no answer"
    if letters is not None and len(question.choices) > letters:
        return f"{len(question.choices)} options, the letter head has {letters}"
    return "" if len(question.choices) > 1 else "a single option"


class Collator:
    """Questions → a batch for :class:`EchoTwin`.

    The option head is given the options in the order of their text, whatever order they were asked in, and
    :meth:`asked_order` puts its scores back: sums in another order would differ in the last digit. With `permute` the
    letter head sees the options of a training question in another order each time.
    """

    def __init__(
        self, model: EchoTwin, tokenizer: Any, listener: Listener, options: int, permute: bool = False
    ) -> None:
        self.config, self.tokenizer, self.listener = model.config, tokenizer, listener
        self.options = model.config.num_letters if model.config.head == "letters" else options
        self.permute = permute and model.config.head == "letters"

    def order(self, item: Asked) -> list[int]:
        """Which of the choices stands where in the batch."""
        choices = item.question.choices
        if self.config.head == "options":
            return sorted(range(len(choices)), key=lambda place: choices[place])
        if self.permute and item.draw is not None:
            return np.random.default_rng(item.draw).permutation(len(choices)).tolist()
        return list(range(len(choices)))

    def __call__(self, items: Sequence[Asked]) -> dict[str, Tensor]:
        questions = [item.question for item in items]
        orders = [self.order(item) for item in items]
        rows = [
            read_text(self.tokenizer, question.question, [question.choices[place] for place in order], self.config)
            for question, order in zip(questions, orders, strict=True)
        ]
        batch = self._text(rows)
        sizes = torch.tensor([len(order) for order in orders])
        batch["option_mask"] = torch.arange(self.options) < sizes[:, None]
        if self.config.listen:
            batch |= self._audio(questions)
        answers = [question.answer for question in questions]
        if None not in answers:
            batch["labels"] = torch.tensor([o.index(int(a or 0)) for o, a in zip(orders, answers, strict=True)])
        return batch

    def _audio(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        if self.listener.learning:
            parts = [self.listener.windows(question) for question in questions]
            waveform, lengths = stack_windows([window for windows in parts for window in windows])
            counts = torch.tensor([len(windows) for windows in parts])
            return {"waveform": waveform, "audio_lengths": lengths, "audio_windows": counts}
        heard = [self.listener[question] for question in questions]
        tokens = pad_sequence([part.tokens for part in heard], batch_first=True)
        seconds = pad_sequence([part.seconds for part in heard], batch_first=True)
        counts = torch.tensor([len(part.seconds) for part in heard])
        mask = torch.arange(tokens.shape[1]) < counts[:, None]
        return {"audio_tokens": tokens, "audio_seconds": seconds, "audio_mask": mask}

    def _text(self, rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
        """Rows of token ids → (batch, rows, length); a row that an item lacks has one token, so that it is finite."""
        count = 1 if self.config.head == "letters" else self.options
        length = max(len(row["input_ids"]) for item in rows for row in item)
        fill = {"input_ids": self.tokenizer.pad_token_id}
        batch = {}
        for name in rows[0][0]:
            table = torch.full((len(rows), count, length), fill.get(name, 0))
            for i, item in enumerate(rows):
                for j, row in enumerate(item):
                    table[i, j, : len(row[name])] = torch.tensor(row[name])
            batch[name] = table
        batch["attention_mask"][:, :, 0] = 1
        return batch

    def asked_order(self, scores: Sequence[float], question: Question) -> list[float]:
        """Scores of a batch's row, in the order in which the question has its choices."""
        order = self.order(Asked(question))
        return [scores[order.index(place)] for place in range(len(order))]


@torch.inference_mode()
def option_scores(
    model: EchoTwin, collator: Collator, questions: Sequence[Question], batch_size: int, quiet: bool = True
) -> list[list[float]]:
    """Log-probabilities of every question's choices, in the order in which it has them."""
    from tqdm import tqdm

    training = model.training
    model.eval()
    device = next(model.parameters()).device
    found: list[list[float]] = []
    for start in tqdm(range(0, len(questions), batch_size), desc="answer", disable=quiet, leave=False):
        part = questions[start : start + batch_size]
        batch = {name: value.to(device) for name, value in collator([Asked(question) for question in part]).items()}
        batch.pop("labels", None)
        rows = model(**batch)["logits"].log_softmax(dim=1).tolist()
        found += [collator.asked_order(row, question) for row, question in zip(rows, part, strict=True)]
    model.train(training)
    return found


def accuracy(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> float:
    """Share of questions whose best-scored choice is the right one."""
    right = [row.index(max(row)) == question.answer for row, question in zip(scores, questions, strict=True)]
    return sum(right) / max(1, len(right))
