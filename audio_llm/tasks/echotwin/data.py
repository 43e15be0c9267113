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
from audio_llm.datasets.dcase_aqa import Question
from audio_llm.errors import AudioLLMError, ConfigError, TrainingError, describe
from audio_llm.tasks.echotwin.model import EchoTwin, EchoTwinConfig, audio_windows, read_text
from audio_llm.training.encoder_cache import EncoderCache

BATCH_WINDOWS = 32  # through the frozen tower at a time


class Heard(NamedTuple):
    """A recording's tokens (n, hidden) and their centres in seconds (n,)."""

    tokens: Tensor
    seconds: Tensor


class Asked(NamedTuple):
    """A question as an item of a batch. `heard` is a recording's tokens, or its windows for a tower that learns.

    `answer` is an index into `choices`; `draw` seeds what is random about the item in training.
    """

    question: str
    choices: tuple[str, ...]
    answer: int | None
    heard: Heard | list[np.ndarray] | None
    draw: tuple[int, int] | None = None


@dataclass
class Listener:
    """Recordings through the audio tower of `model`, each once; `cache` is a folder shared by runs, or None.

    `rejects` holds why a recording cannot be used; the rule is one for training and for prediction, and for a model of
    the text alone as well: it is compared with those that listen, on the same questions.
    """

    model: EchoTwin
    cache: Path | None = None
    learning: bool = False  # the tower is trained: recordings are only checked here, and heard in every batch anew
    rejects: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: dict[Any, Heard] = {}
        self._checked: set[Any] = set()
        self._encode: Any = self.model.encode_audio
        if self.cache is not None and not self.learning:
            kind = "columns" if self.model.config.columns else "tokens"
            self._encode = EncoderCache(self.cache / kind, self.model)

    def listen(self, questions: Iterable[Question]) -> None:
        """Hear every recording that was not heard yet; for a tower that learns, or is not listened to, check it."""
        from tqdm import tqdm

        known = self._known.keys() | self._checked | self.rejects.keys()
        wanted = {question.audio: question for question in questions if question.audio not in known}
        waiting: dict[Any, list[np.ndarray]] = {}
        check_only = self.learning or not self.model.config.listen
        for clip, question in tqdm(wanted.items(), desc="listen", unit="clip", leave=False):
            try:
                windows = self.windows(question.waveform())
            except AudioLLMError as error:
                self.rejects[clip] = str(error)
                continue
            if check_only:
                self._checked.add(clip)
            else:
                waiting[clip] = windows
            if sum(map(len, waiting.values())) >= BATCH_WINDOWS:
                self._known |= dict(zip(waiting, self.hear(list(waiting.values())), strict=True))
                waiting = {}
        self._known |= dict(zip(waiting, self.hear(list(waiting.values())), strict=True))

    def ask(self, question: Question, draw: tuple[int, int] | None = None) -> Asked:
        """A question whose recording was listened to, as an item."""
        heard: Any = None
        if self.model.config.listen:
            heard = self.windows(question.waveform()) if self.learning else self._known[question.audio]
        return Asked(question.question, question.choices, question.answer, heard, draw)

    def windows(self, waveform: Waveform) -> list[np.ndarray]:
        """What the tower is given of a recording. Raises :class:`AudioError`."""
        return audio_windows(waveform, self.model.audio_enc, self.model.config)

    def hear(self, recordings: Sequence[list[np.ndarray]]) -> list[Heard]:
        """Recordings, each as its windows, to what the model hears of them."""
        windows = [window for parts in recordings for window in parts]
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(windows), BATCH_WINDOWS):
            found += self._tokens(windows[start : start + BATCH_WINDOWS])
        result, rest = [], iter(found)
        for parts in recordings:
            mine = [next(rest) for _ in parts]
            tokens, mask = (torch.cat(pieces) for pieces in zip(*mine, strict=True))
            seconds = torch.cat([self.model.token_seconds(len(piece), n) for n, (piece, _) in enumerate(mine)])
            result.append(Heard(tokens[mask], seconds[mask]))
        return result

    @torch.no_grad()
    def _tokens(self, windows: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """Per window its tokens (n, hidden) and mask (n,)."""
        self.model.audio_enc.eval()
        waveform, lengths = stack_windows(windows)
        device = next(self.model.parameters()).device
        tokens, mask = self._encode(waveform.to(device), lengths.to(device))
        if not torch.isfinite(tokens[mask]).all():
            cure = "Features are computed in float32, so the weights of the encoder are damaged."
            raise TrainingError(describe("audio tower", "finite tokens", "NaN or infinity", cure))
        return list(zip(tokens.float().cpu(), mask.cpu(), strict=True))


def stack_windows(windows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Windows (channels, time) → (windows, channels, time) zero-padded, and their lengths (windows,)."""
    longest = max(window.shape[1] for window in windows)
    padded = [np.pad(window, ((0, 0), (0, longest - window.shape[1]))) for window in windows]
    return torch.from_numpy(np.stack(padded)), torch.tensor([window.shape[1] for window in windows])


class QuestionDataset(Dataset):
    """The questions that can be learnt from or scored: recording heard, answer known, options as the model takes them.

    `rejects` has (id, reason) of the others; the rule is the same for training, validation and scoring.
    """

    def __init__(self, questions: Sequence[Question], listener: Listener, tokenizer: Any) -> None:
        listener.listen(questions)
        self.listener = listener
        self.questions: list[Question] = []
        self.rejects: list[tuple[str, str]] = []
        for question in questions:
            unknown = (question.problem or "no answer") if question.answer is None else ""
            reason = listener.rejects.get(question.audio) or unknown
            reason = reason or reason_against(question, tokenizer, listener.model.config)
            if reason:
                self.rejects.append((question.id, reason))
            else:
                self.questions.append(question)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Asked:
        return self.listener.ask(self.questions[index])


def reason_against(item: Question | Asked, tokenizer: Any, config: EchoTwinConfig) -> str:
    """Why the model cannot tell the choices of a question apart, "" where it can: in training and in evaluation."""
    choices = len(item.choices)
    if choices < 2:
        return describe("question for EchoTwin", "at least two choices", str(choices))
    if config.head == "letters" and choices > config.num_letters:
        return describe("question for EchoTwin", f"at most {config.num_letters} choices (letters)", str(choices))
    try:
        read_text(tokenizer, item.question, item.choices, config)
    except ConfigError as error:  # its options alone are longer than the model reads
        return str(error)
    return ""


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
        question = self.questions.questions[self._order[place]]
        return self.questions.listener.ask(question, (self.seed, position))


class Collator:
    """Questions → a batch for :class:`EchoTwin`.

    The option head is given the options in the order of their text, whatever order they were asked in, and
    :meth:`asked_order` puts its scores back: sums in another order would differ in the last digit. With `permute` the
    letter head sees the options of a training question in another order each time.
    """

    def __init__(self, model: EchoTwin, tokenizer: Any, options: int, permute: bool = False) -> None:
        self.config, self.tokenizer = model.config, tokenizer
        self.options = model.config.num_letters if model.config.head == "letters" else options
        self.permute = permute and model.config.head == "letters"

    def order(self, item: Asked) -> list[int]:
        """Which of the choices stands where in the batch."""
        if self.config.head == "options":
            return sorted(range(len(item.choices)), key=lambda place: item.choices[place])
        if self.permute and item.draw is not None:
            return np.random.default_rng(item.draw).permutation(len(item.choices)).tolist()
        return list(range(len(item.choices)))

    def __call__(self, items: Sequence[Asked]) -> dict[str, Tensor]:
        orders = [self.order(item) for item in items]
        rows = [
            read_text(self.tokenizer, item.question, [item.choices[place] for place in order], self.config)
            for item, order in zip(items, orders, strict=True)
        ]
        batch = self._text(rows)
        sizes = torch.tensor([len(order) for order in orders])
        batch["option_mask"] = torch.arange(self.options) < sizes[:, None]
        if self.config.listen:
            batch |= self._audio(items)
        if all(item.answer is not None for item in items):
            places = [order.index(item.answer or 0) for item, order in zip(items, orders, strict=True)]
            batch["labels"] = torch.tensor(places)
        return batch

    def _audio(self, items: Sequence[Asked]) -> dict[str, Tensor]:
        heard: list[Any] = [item.heard for item in items]
        if not isinstance(heard[0], Heard):
            waveform, lengths = stack_windows([window for windows in heard for window in windows])
            counts = torch.tensor([len(windows) for windows in heard])
            return {"waveform": waveform, "audio_lengths": lengths, "audio_windows": counts}
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

    def asked_order(self, scores: Sequence[float], item: Asked) -> list[float]:
        """Scores of a batch's row, in the order in which the item has its choices."""
        order = self.order(item)
        return [scores[order.index(place)] for place in range(len(order))]


@torch.inference_mode()
def option_scores(model: EchoTwin, collator: Collator, items: Sequence[Asked]) -> list[list[float]]:
    """Log-probabilities of every item's choices, in the order in which it has them; one batch."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in collator(items).items()}
    batch.pop("labels", None)
    rows = model(**batch)["logits"].log_softmax(dim=1).tolist()
    model.train(training)
    return [collator.asked_order(row, item) for row, item in zip(rows, items, strict=True)]


def best_choice(scores: Sequence[float], choices: Sequence[str]) -> int:
    """Index of the best-scored choice; of equally scored ones the first by its text, wherever it stands.

    Choices that the tokenizer reads alike ("Rain" and "rain", or words in letters it does not know) score alike.
    """
    return min(range(len(scores)), key=lambda place: (-scores[place], choices[place]))


def accuracy(model: EchoTwin, collator: Collator, questions: QuestionDataset, batch_size: int) -> float:
    """Share of questions whose best-scored choice is the right one."""
    right = 0
    for start in range(0, len(questions), batch_size):
        items = [questions[index] for index in range(start, min(start + batch_size, len(questions)))]
        scores = option_scores(model, collator, items)
        right += sum(best_choice(row, item.choices) == item.answer for row, item in zip(scores, items, strict=True))
    return right / max(1, len(questions))
