"""A small language model from nothing: tokenizer and Qwen2 weights, trained on the text of the corpus.

On machines without a model hub the main path needs a language model that already knows the words, the question format
and how an answer follows from a description. It reads descriptions of scenes as text in the place where the audio will
stand, and learns to think and answer. A pretrained model replaces all of this (``model.language_model.path`` of an SFT
recipe).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from audio_llm import config as recipes
from audio_llm.errors import ConfigError
from audio_llm.files import atomic_folder, content_hash, only_writer, write_lines
from audio_llm.identity import identity_of, settle
from audio_llm.identity import write as write_identity
from audio_llm.language.prompts import AUDIO_TOKEN, STYLES, chat_template, question_text, target_text
from audio_llm.language.templates import ALPACA, refuse_marks
from audio_llm.model.build import PROMPTS, check_reloaded
from audio_llm.ranges import check_numbers

# How Qwen2 splits text into words before merging bytes: single digits, letters with one leading mark or space.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Row = tuple[list[int], list[int]]  # token ids of a prompt and of its reply


@dataclass
class ModelSize:
    """Qwen2's sizes; the vocabulary follows from the tokenizer."""

    hidden_size: int = 256  # width of a token
    intermediate_size: int = 768  # width inside an MLP
    num_hidden_layers: int = 4  # blocks of attention and MLP
    num_attention_heads: int = 4  # of a block
    num_key_value_heads: int = 2  # of a block; fewer than heads: they share
    max_position_embeddings: int = 1024  # longest prompt and reply in tokens


@dataclass
class LanguageModelRecipe:
    """Recipe of ``audio-llm train`` with ``task: language_model``."""

    verb: ClassVar[str] = "train"
    text: Path  # JSON lines of samples (audio is not needed)
    output: Path  # the folder of the model, in Transformers' form
    task: str = "language_model"  # what is learnt
    style: str = "think"  # what a reply says before its answer: answer, think, think_semantics, plain
    prompt: str = "chat"  # the words around a question: chat, or alpaca (BAT's, for model.prompt of SFT)
    vocabulary: int = 1024  # tokens at most
    model: ModelSize = field(default_factory=ModelSize)  # sizes of the network
    steps: int = 400  # number of updates
    batch_size: int = 32  # lines per update
    learning_rate: float = 1e-3  # the largest one, after the warm-up
    warmup_steps: int = 40  # updates in which the rate rises from zero
    validation: int = 256  # last lines of the text, never trained on
    seed: int = 0  # of new weights and the order of lines

    def check(self) -> None:
        """:class:`ConfigError` for values that cannot be trained with."""
        check_numbers(self)
        if self.style not in STYLES:
            raise ConfigError(f"style: expected one of {', '.join(STYLES)}, found '{self.style}'.")
        if self.prompt not in PROMPTS:
            raise ConfigError(f"prompt: expected one of {', '.join(PROMPTS)}, found '{self.prompt}'.")


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", AUDIO_TOKEN)  # of the tokenizer


def train_tokenizer(corpus: Iterable[str], vocabulary: int = 1024) -> Any:
    """A byte-level BPE tokenizer with ChatML markers; the reply's tags are single tokens that decoding keeps."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from audio_llm.language.prompts import TAGS

    core = Tokenizer(models.BPE())
    # Qwen2's own splitting: a folder with a Qwen2 configuration is loaded with it, whatever the file says, and a model
    # that learnt " 2" as one token would be fed two.
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_tokens([AddedToken(f"<{slash}{tag}>", normalized=False) for tag in TAGS for slash in ("", "/")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", AUDIO_TOKEN],
        chat_template=chat_template(),
        padding_side="left",
    )


def read_text(path: Path) -> list[Any]:
    """Samples of a JSON-lines file."""
    from audio_llm.shards.schema import Sample

    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # words may hold other characters that end a line
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"text {path}: cannot be read ({why}). `audio-llm prep` writes it.") from error
    return [Sample.from_json(line, where=f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def described(sample: Any, style: str, prompt: str = "chat") -> tuple[str, str]:
    """(prompt, reply) for text-only training: the scene in words (``meta["caption"]``) where the audio will stand."""
    scene = sample.meta.get("caption") or sample.thinking or ""
    question, reply = question_text(sample.question, sample.choices or ()), target_text(sample, style)
    refuse_marks([scene, question, reply], SPECIAL, f"sample '{sample.id}'")
    reply += "<|im_end|>"
    if prompt == "alpaca":
        return f"{scene}{question.join(ALPACA)}", reply
    return f"<|im_start|>user\n{scene}\n{question}<|im_end|>\n<|im_start|>assistant\n", reply


def _batches(rows: Sequence[Row], size: int, pad: int, seed: int) -> Iterator[dict[str, Any]]:
    """Epoch after epoch, each in an order of its own; rows that fill no batch are left out of their epoch."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield _collate([rows[i] for i in order[start : start + size]], pad)


def _collate(rows: Sequence[Row], pad: int) -> dict[str, Any]:
    """Tensors of shape (rows, longest row), filled up on the right; the loss counts the replies alone."""
    import torch

    def padded(lists: list[list[int]], fill: int) -> Any:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in lists], True, fill)

    whole = [prompt + reply for prompt, reply in rows]
    labels = [[-100] * len(prompt) + reply for prompt, reply in rows]
    mask = [[1] * len(ids) for ids in whole]
    return {"input_ids": padded(whole, pad), "labels": padded(labels, -100), "attention_mask": padded(mask, 0)}


def exact_share(model: Any, rows: Sequence[Row], pad: int) -> float:
    """Share of replies whose every token is the most likely one (teacher forced)."""
    import torch

    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = _collate(rows[start : start + 64], pad)
            labels = batch.pop("labels")[:, 1:]
            guess = model(**batch).logits[:, :-1].argmax(-1)
            right += int(((guess == labels) | (labels == -100)).all(dim=1).sum())
    return right / max(1, len(rows))


def train(recipe: LanguageModelRecipe) -> Path:
    """Train tokenizer and model; writes a Transformers folder at `recipe.output` with ``metrics.jsonl`` beside it."""
    recipe.check()
    with only_writer(recipe.output):
        return _train(recipe)


def _train(recipe: LanguageModelRecipe) -> Path:
    import torch
    from tqdm import trange
    from transformers import AutoModelForCausalLM, Qwen2Config, get_cosine_schedule_with_warmup

    identity = identity_of(recipe, {"text": content_hash(recipe.text)}, places=("text",))
    cure = "Choose another output folder, or remove this one."
    settle(recipe.output, identity, lambda path: recipes.load(LanguageModelRecipe, path), ["metrics.jsonl"], cure)
    if (recipe.output / "metrics.jsonl").is_file():  # the folder appears whole or not at all
        print(f"{recipe.output}: this run was finished before")
        return recipe.output
    samples = read_text(recipe.text)
    if len(samples) <= recipe.validation + recipe.batch_size:
        needed = recipe.validation + recipe.batch_size
        raise ConfigError(f"text {recipe.text}: expected more than {needed} lines, found {len(samples)}.")
    texts = [described(sample, recipe.style, recipe.prompt) for sample in samples]
    tokenizer = train_tokenizer((part for text in texts for part in text), recipe.vocabulary)
    ids = [tokenizer(list(text), add_special_tokens=False)["input_ids"] for text in texts]
    rows: list[Row] = [(prompt, reply) for prompt, reply in ids]
    held_out, rows = rows[-recipe.validation :], rows[: -recipe.validation]
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            # The usual 0.02 suits thousands of units. At 128 it leaves attention uniform for hundreds of steps, and the
            # heads that look a word up again hardly form; at this width unit activations stay near unit size.
            initializer_range=recipe.model.hidden_size**-0.5,
            **vars(recipe.model),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    batches = _batches(rows, recipe.batch_size, tokenizer.pad_token_id, recipe.seed)
    metrics: list[dict[str, Any]] = []
    progress = trange(1, recipe.steps + 1, desc="language model", mininterval=2)
    for step in progress:
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps:
            model.eval()
            exact = exact_share(model, held_out, tokenizer.pad_token_id)
            model.train()
            metrics.append({"step": step, "loss": loss.item(), "validation/exact": exact})
            progress.set_postfix(loss=f"{loss.item():.3f}", exact=f"{exact:.3f}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_folder(recipe.output) as folder:
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_reloaded(folder, tokenizer, [reply for _, reply in texts[:200]])
        recipes.dump(recipe, folder / "recipe.yaml")
        write_identity(folder, identity)
        write_lines(folder / "metrics.jsonl", metrics)
    return recipe.output
