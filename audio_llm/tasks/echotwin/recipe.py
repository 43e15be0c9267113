"""The recipe of EchoTwin-QA; it imports no torch, so that it is checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any, ClassVar, Literal

from audio_llm.errors import ConfigError, describe
from audio_llm.ranges import check_numbers
from audio_llm.training.recipes import Precision, RunRecipe


@dataclass
class EchoTwinConfig:
    """What surrounds the two towers."""

    head: Literal["options", "letters"] = "options"  # options: each option by itself; letters: a logit per letter
    num_letters: int = 4  # logits of the letter head: the most options that a question has
    columns: bool = True  # one audio token per instant: the mean over the encoder's frequency patches
    hidden_size: int = 256  # of the option head
    layers: int = 2  # of the option head
    heads: int = 4  # of attention in the option head
    dropout: float = 0.1  # of the option head
    max_text: int = 128  # tokens of the question with its options; the question is cut to fit, options never are
    listen: bool = True  # False: the text alone, the control that tells what the audio adds
    # "original": what published weights were trained on: the first window alone, peak-normalised and filled up with
    # 1e-6 instead of masked, and text that is cut at its end, options included.
    conventions: Literal["mended", "original"] = "mended"

    def check(self) -> None:
        """:class:`ConfigError` for a configuration that cannot be built."""
        if self.hidden_size % self.heads or self.hidden_size % 2:
            expected = f"an even multiple of heads ({self.heads})"
            raise ConfigError(describe("hidden_size", expected, str(self.hidden_size)))
        if not 2 <= self.num_letters <= len(LETTERS):
            raise ConfigError(describe("num_letters", f"2 to {len(LETTERS)}", str(self.num_letters)))
        if self.conventions == "original" and self.head != "letters":
            raise ConfigError(describe("conventions: original", "head: letters", f"head: {self.head}"))


@dataclass
class TextTower:
    """A local Transformers encoder, or (`path` null) a small BERT with a tokenizer of the training questions."""

    path: Path | None = None
    vocabulary: int = 2000  # words of its tokenizer
    hidden_size: int = 128  # of the small BERT
    layers: int = 2  # of the small BERT
    heads: int = 4  # of attention in the small BERT


@dataclass(kw_only=True)
class EchoTwinRecipe(RunRecipe):
    """Recipe of ``audio-llm train`` with ``task: echotwin``."""

    verb: ClassVar[str] = "train"
    train: list[Path]  # folders or files of questions (audio_llm.datasets.dcase_aqa)
    task: str = "echotwin"  # what is learnt
    validation: Path | None = None  # scored during training; decides which weights are kept
    duplicates: Literal["keep", "drop"] = "drop"  # validation questions about a clip of the training questions
    audio: Path | None = None  # folder of the sound files, where they do not lie as the questions say
    # An encoder folder {path: …}, or {name: beats, published: …}; by default an untrained one, to try things out.
    encoder: dict[str, Any] = field(default_factory=lambda: {"name": "beats", "preset": "tiny"})
    text: TextTower = field(default_factory=TextTower)  # the tower of question and options
    model: EchoTwinConfig = field(default_factory=EchoTwinConfig)  # what surrounds the two towers
    unfreeze: int = 0  # top layers of the audio tower that learn; its norms never do
    cache: Path | None = None  # folder for what a frozen audio tower makes of the recordings
    permute: bool = True  # the letter head sees the options in another order every time
    batch_size: int = 32  # questions per update and process
    learning_rate: float = 1e-3  # of the head
    text_rate: float = 1e-5  # of the text tower
    audio_rate: float = 1e-6  # of the audio tower's layers that learn
    weight_decay: float = 0.01  # of AdamW
    label_smoothing: float = 0.05  # share of the target that all options get alike
    precision: Precision = "fp32"  # auto: bf16 where the machine computes in it
    log_steps: int = 20  # updates from line to line of metrics.jsonl
    eval_steps: int | None = None  # updates between validations; by default once per epoch
    save_steps: int | None = 200  # updates between checkpoints; null: none
    keep_checkpoints: int = 1  # the newest ones; older are removed
    max_reject_share: float = 0.05  # share of unusable questions beyond which the run stops

    def check(self) -> None:
        """:class:`ConfigError` for values that cannot be trained with."""
        self.model.check()
        if self.steps is None and self.epochs is None:
            raise ConfigError(describe("recipe", "'steps', 'epochs' or both (the smaller counts)", "neither"))
        check_numbers(self)
        if self.unfreeze and self.cache:
            raise ConfigError(describe("cache", "a frozen audio tower (unfreeze: 0)", f"unfreeze: {self.unfreeze}"))
