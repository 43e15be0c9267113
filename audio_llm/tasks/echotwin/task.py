"""Training of EchoTwin-QA: the Transformers ``Trainer`` on questions in DCASE's format.

A frozen audio tower hears every recording once (and keeps what it made of it on disk, with ``cache``); a run on two CPU
cores is then a matter of minutes. The published training's faults are not repeated: features are float32 whatever the
precision, a frozen tower is in evaluation mode, nothing is mixed, shifted or resynthesised, and the draws of a run are
a function of its seed and position.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from audio_llm import files
from audio_llm.datasets import dcase_aqa
from audio_llm.errors import TrainingError, describe
from audio_llm.identity import Identity, identity_of, start_digest
from audio_llm.model.build import check_reloaded
from audio_llm.model.encoder import AudioEncoder, freeze_below
from audio_llm.model.folder import open_encoder
from audio_llm.tasks.echotwin.data import Collator, Listener, QuestionDataset, RunDataset, accuracy
from audio_llm.tasks.echotwin.folder import open_text, save_echotwin
from audio_llm.tasks.echotwin.model import EchoTwin, freeze_text_pooler, lettered
from audio_llm.tasks.echotwin.recipe import LETTERS, EchoTwinRecipe, TextTower
from audio_llm.training.run import Run, trainer_settings

# ------------------------------------------------------------------------------------------------------- the towers


def build_text_tower(recipe: TextTower, texts: Sequence[str], folder: Path, seed: int) -> Path:
    """A BERT with random weights and a WordPiece tokenizer of `texts`, as a Transformers folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    # Whole words by frequency, and letters to spell the others with. (A trained WordPiece differs from run to run.)
    letters = sorted({letter for word in words for letter in word} | set(ascii_lowercase + digits))
    frequent = sorted(words, key=lambda word: (-words[word], word))[: recipe.vocabulary]
    tokens = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *frequent])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )
    torch.manual_seed(seed)
    tower = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=4 * recipe.hidden_size,
            # As in the small language model: the usual 0.02 leaves attention uniform for long at this width.
            initializer_range=recipe.hidden_size**-0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with files.atomic_folder(folder) as temporary:
        tower.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        check_reloaded(temporary, tokenizer, list(texts[:50]))
    return folder


def freeze_audio(encoder: AudioEncoder, top: int) -> None:
    """Train the `top` last layers but their norms, as published; what is frozen is in evaluation mode, always."""
    encoder.deterministic = True
    freeze_below(encoder, top)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)


def build_model(recipe: EchoTwinRecipe, questions: Sequence[dcase_aqa.Question]) -> tuple[EchoTwin, Any]:
    """The model and tokenizer that a run starts from, seeded."""
    from accelerate import PartialState

    torch.manual_seed(recipe.seed)
    encoder = open_encoder(recipe.encoder)
    text = recipe.text.path
    if text is None:
        text = recipe.output / "text_tower"
        with PartialState().main_process_first():
            if not (text / "config.json").is_file():
                said = [f"{row.question} {' '.join(lettered(row.choices))}" for row in questions]
                build_text_tower(recipe.text, said, text, recipe.seed)
    tower, tokenizer = open_text(text)
    freeze_text_pooler(tower)
    config = recipe.model
    if config.head == "letters":
        most = max((len(row.choices) for row in questions), default=2)
        config = dataclasses.replace(config, num_letters=min(max(most, 2), len(LETTERS)))
    torch.manual_seed(recipe.seed)
    model = EchoTwin(config, encoder, tower)
    model.label_smoothing = recipe.label_smoothing
    freeze_audio(model.audio_enc, recipe.unfreeze)
    return model, tokenizer


# -------------------------------------------------------------------------------------------------------- the trainer


class EchoTwinTrainer(Trainer):
    """``Trainer`` with a rate for each tower, the run's own order, and accuracy as what is validated."""

    control: Any  # what the callbacks ask for, as Trainer keeps it
    optimizer: Any

    def __init__(self, *, recipe: EchoTwinRecipe, tokenizer: Any, validation: QuestionDataset | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.recipe, self.tokenizer, self.validation = recipe, tokenizer, validation

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            assert self.model is not None
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.recipe), lr=self.recipe.learning_rate)
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Accuracy on the validation questions; the weights are kept when it is the best so far."""
        assert self.validation is not None
        before = [log["eval_accuracy"] for log in self.state.log_history if "eval_accuracy" in log]
        model: Any = self.accelerator.unwrap_model(self.model)
        found = accuracy(model, self.data_collator, self.validation, self.args.eval_batch_size)
        metrics = {f"{metric_key_prefix}_accuracy": found}
        if self.state.is_world_process_zero and found > max(before, default=-1.0):
            save_echotwin(self.recipe.output, model, self.tokenizer)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def parameter_groups(model: nn.Module, recipe: EchoTwinRecipe) -> list[dict[str, Any]]:
    """AdamW groups: each tower's rate; vectors are not decayed."""
    rates = {"text_enc": recipe.text_rate, "audio_enc": recipe.audio_rate}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(name.removeprefix("module.").partition(".")[0], recipe.learning_rate)
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": found, "lr": rate, "weight_decay": decay}
        for (rate, decay), found in sorted(groups.items(), key=lambda group: group[0])
    ]


# ------------------------------------------------------------------------------------------------------------ the run


def read_questions(paths: Sequence[Path], audio: Path | None) -> dcase_aqa.Questions:
    """The questions of all `paths` together."""
    parts = [dcase_aqa.read(path, audio) for path in paths]
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    rows = [row for part in parts for row in part.rows]
    return dcase_aqa.Questions(rows, dict(counts), [path for part in parts for path in part.files])


@dataclass
class Data:
    """The questions of a run: those it uses, and `counts`, what ``result.json`` says about them and the others."""

    train: QuestionDataset
    validation: QuestionDataset | None
    counts: dict[str, Any]


def open_data(
    recipe: EchoTwinRecipe,
    train: dcase_aqa.Questions,
    held_out: dcase_aqa.Questions | None,
    listener: Listener,
    tokenizer: Any,
) -> Data:
    """The usable questions; the others are in ``rejects.jsonl`` by set, with the reason, before anything is raised.

    Weights must not be chosen on recordings that they were trained on: unless the recipe keeps them, validation
    questions about a clip of the training questions, byte for byte, are left out. Raises :class:`TrainingError` where
    a set has no usable question, or too many had to be left out.
    """
    data = Data(QuestionDataset(train.rows, listener, tokenizer), None, {})
    data.counts = {"questions": len(data.train), "repaired or unusable": train.counts}
    data.counts["rejects"] = len(data.train.rejects)
    left_out = [("training", *reject) for reject in data.train.rejects]
    if held_out is not None:
        heard = set(dcase_aqa.heard_in_both(train, held_out))
        dropped = heard if recipe.duplicates == "drop" else set()
        left_out += [
            ("validation", held_out.rows[n].id, "its clip is in the training questions") for n in sorted(dropped)
        ]
        rows = [row for n, row in enumerate(held_out.rows) if n not in dropped]
        data.validation = QuestionDataset(rows, listener, tokenizer)
        left_out += [("validation", *reject) for reject in data.validation.rejects]
        data.counts |= {
            "validation_questions": len(data.validation),
            "validation_repaired or unusable": held_out.counts,
            "validation_rejects": len(data.validation.rejects),
            "validation_duplicates": len(heard),
            "duplicates": recipe.duplicates,
        }
    lines = [{"set": name, "sample": sample, "reason": reason} for name, sample, reason in left_out]
    files.write_lines(recipe.output / "rejects.jsonl", lines)
    check_usable(recipe, data.train, "training")
    if data.validation is not None:
        if not len(data.validation) and not data.validation.rejects:
            expected = "a question about a clip that is not in the training questions"
            cure = "Use another set, or duplicates=keep."
            raise TrainingError(describe(f"validation {recipe.validation}", expected, "none", cure))
        check_usable(recipe, data.validation, "validation")
    return data


def check_usable(recipe: EchoTwinRecipe, dataset: QuestionDataset, name: str) -> None:
    """:class:`TrainingError` where `dataset` has no question, or too many had to be left out."""
    total = len(dataset) + len(dataset.rejects)
    if not len(dataset) or len(dataset.rejects) > recipe.max_reject_share * total:
        sample, reason = dataset.rejects[0]
        found = f"{len(dataset.rejects)} of {total}, the first: {sample}: {reason}"
        cure = f"See {recipe.output / 'rejects.jsonl'}; raise max_reject_share where that is how the data is."
        expected = f"at most {recipe.max_reject_share:.0%}"
        raise TrainingError(describe(f"unusable {name} questions", expected, found, cure))


def fit(recipe: EchoTwinRecipe) -> dict[str, Any]:
    """Train and keep the best weights on `validation` (without one: the last); returns what ``result.json`` holds.

    The run folder gets the model (see :mod:`audio_llm.tasks.echotwin.folder`), ``recipe.yaml``, ``metrics.jsonl``,
    ``rejects.jsonl`` and ``checkpoint-N/``. The same command goes on where a run was stopped.
    """
    recipe.check()
    questions = read_questions(recipe.train, recipe.audio)
    held_out = read_questions([recipe.validation], recipe.audio) if recipe.validation else None
    with Run(recipe, training_arguments(recipe, len(questions.rows))) as run:
        run.settle(*identity(recipe, questions, held_out))
        run.claim(run_position(recipe, questions, held_out))
        if run.finished is not None:
            return run.finished
        model, tokenizer = build_model(recipe, questions.rows)
        listener = Listener(model, recipe.cache, learning=recipe.unfreeze > 0)
        data = open_data(recipe, questions, held_out, listener, tokenizer)
        if run.main:
            print("\n".join(data_lines(data.counts)), file=sys.stderr)
        trainer = build_trainer(run, recipe, model, tokenizer, data)
        result = run.train(trainer) | data.counts
        if trainer.validation is not None:
            logs = [log for log in trainer.state.log_history if "eval_accuracy" in log]
            if not logs or logs[-1]["step"] != result["steps"]:
                trainer.evaluate()
            scores = [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
            result |= {"validation_accuracy": max(scores), "last_validation_accuracy": scores[-1]}
        elif run.main:
            save_echotwin(recipe.output, trainer.accelerator.unwrap_model(trainer.model), tokenizer)
        return run.finish(trainer, result | {"exported": {"model": str(recipe.output)}})


def training_arguments(recipe: EchoTwinRecipe, questions: int) -> TrainingArguments:
    """The recipe in Trainer's words."""
    arguments = TrainingArguments(
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        **trainer_settings(recipe),
    )
    per_step = recipe.batch_size * arguments.world_size
    per_epoch = -(-questions // per_step)
    limits = [] if recipe.epochs is None else [max(1, round(recipe.epochs * questions / per_step))]
    arguments.max_steps = min(limits + ([] if recipe.steps is None else [recipe.steps]))
    if recipe.validation:
        arguments.eval_strategy = type(arguments.eval_strategy)("steps")
        arguments.eval_steps = recipe.eval_steps or per_epoch
    return arguments


def identity(
    recipe: EchoTwinRecipe, questions: dcase_aqa.Questions, held_out: dcase_aqa.Questions | None
) -> tuple[Identity, list[Path]]:
    """The identity of the run, and the folders that it begins with."""
    begun = {"encoder": recipe.encoder.get("path") or recipe.encoder.get("published"), "text": recipe.text.path}
    digests = {f"weights of {key}": start_digest(path) for key, path in begun.items() if path}
    digests |= {"questions": questions.fingerprint[:16], "sounds": questions.sounds}
    if held_out is not None:  # it decides which weights are kept
        digests["questions of validation"] = held_out.fingerprint[:16]
        digests["sounds of validation"] = held_out.sounds
    places = ("train", "validation", "text.path")
    return identity_of(recipe, digests, places, free=("audio",)), [Path(path) for path in begun.values() if path]


def run_position(
    recipe: EchoTwinRecipe, questions: dcase_aqa.Questions, held_out: dcase_aqa.Questions | None
) -> dict[str, Any]:
    """What decides the samples of every step; a checkpoint carries it, and a resumed run must agree."""
    position = {"data": questions.fingerprint[:16], "samples": len(questions.rows)}
    if held_out is not None:
        position["validation"] = held_out.fingerprint[:16]
    return position | {"seed": recipe.seed}


def build_trainer(run: Run, recipe: EchoTwinRecipe, model: EchoTwin, tokenizer: Any, data: Data) -> EchoTwinTrainer:
    """The trainer of `run` with its data."""
    train, validation, arguments = data.train, data.validation, run.arguments
    known = [*train.questions, *(validation.questions if validation else [])]
    per_step = recipe.batch_size * arguments.world_size
    return EchoTwinTrainer(
        recipe=recipe,
        tokenizer=tokenizer,
        validation=validation,
        model=model,
        args=arguments,
        train_dataset=RunDataset(train, arguments.max_steps * per_step, recipe.seed),
        eval_dataset=validation,
        data_collator=Collator(model, tokenizer, max(len(row.choices) for row in known), recipe.permute),
        callbacks=run.callbacks(per_step, len(train)),
    )


def data_lines(counts: Mapping[str, Any]) -> list[str]:
    """What a person reads of a run's questions: a line on those of training, one on those of validation."""
    lines = []
    for words, prefix in (("", ""), ("validation: ", "validation_")):
        if f"{prefix}questions" in counts:
            found = counts[f"{prefix}repaired or unusable"]
            unusable = ", ".join(f"{count} × {reason}" for reason, count in found.items()) or "nothing to repair"
            rejects = counts[f"{prefix}rejects"]
            lines.append(f"{words}{counts[f'{prefix}questions']} questions, {rejects} left out ({unusable})")
    if twice := counts.get("validation_duplicates"):
        done = "left out as well" if counts["duplicates"] == "drop" else "kept (duplicates: keep)"
        lines[-1] += f"; {twice} about a clip of the training questions, {done}"
    return lines


def report(recipe: EchoTwinRecipe) -> dict[str, Any]:
    """:func:`fit`, and a few lines about it."""
    result = fit(recipe)
    print("\n".join(data_lines(result)))
    if "validation_accuracy" in result:
        print(f"  validation accuracy      {result['validation_accuracy']:.3f}")
    print(f"  model                    {recipe.output}")
    return result
