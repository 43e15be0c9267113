"""Cross-validation over a corpus's official folds: choose on a validation fold, test once, go on where it stopped.

For every test fold the next one (cyclically) is the validation fold and the rest is trained on. Where several
`candidates` are given, each is trained so and the best on the validation fold is chosen; the test fold is heard once,
by the chosen model. Nothing is ever chosen by a test fold.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from audio_llm import config as recipes
from audio_llm.datasets import folders, sounds
from audio_llm.encoders.heads import UrbanSoundHead
from audio_llm.encoders.urbansound_cnn import CLASSES, UrbanSoundCNN, UrbanSoundCNNConfig
from audio_llm.errors import AudioLLMError, ConfigError, NothingHeardError, describe
from audio_llm.files import atomic_file, only_writer, read_lines, read_own, write_atomically, write_json, write_lines
from audio_llm.identity import identity_of, settle
from audio_llm.identity import write as write_identity
from audio_llm.tasks.classification import ClassificationRecipe, predict
from audio_llm.tasks.classification.task import load_classifier
from audio_llm.tasks.trainer import TaskTrainer
from eval.tasks import classification
from eval.tasks.folds_recipe import PLAIN, FoldsRecipe

DONE, SCORES, TABLE, PICTURE = "fold.json", "scores.json", "scores.md", "confusion.png"
PREDICTIONS = "predictions.jsonl"
MODELS = "models"  # of models that the UrbanSound8K project's own layout can hold: one file a fold, in its names
_FREE_KEYS = ("sounds", "output", "test_folds", "seeds", "min_accuracy", "max_reject_share")  # a fold is no other


class CrossValidation:
    """One run; every step of it leaves a file, and what has its file is not done again."""

    def __init__(self, recipe: FoldsRecipe) -> None:
        recipe.check()
        self.recipe = recipe
        self.library = sounds.find(recipe.sounds)
        self.folds = sounds.official_folds(self.library)
        if len(self.folds) < 3:
            raise ConfigError(
                describe(str(recipe.sounds), "three folds or more: to train, choose, test", str(len(self.folds)))
            )
        self.tested = [str(fold) for fold in recipe.test_folds] if recipe.test_folds else list(self.folds)
        unknown = [fold for fold in self.tested if fold not in self.folds]
        if unknown:
            raise ConfigError(describe("test_folds", ", ".join(self.folds), f"'{unknown[0]}'"))
        seen = sounds.SoundFolder(self.library.clips, self.library.dataset).fingerprint
        digests = {"sounds": self.library.fingerprint, "sounds (their bytes)": seen}
        self.identity = identity_of(recipe, digests, free=_FREE_KEYS)

    def run(self) -> dict[str, Any]:
        """Train and test what is still to do; write scores, table and picture; returns the scores."""
        classification.require_drawing()
        with only_writer(self.recipe.output):
            return self._run()

    def _run(self) -> dict[str, Any]:
        if left_out := folders.told(self.library.left_out):
            print(left_out)
        output = self.recipe.output
        settle(
            output,
            self.identity,
            type(self.recipe),
            ["**/" + DONE],
            "Choose another output folder, or remove this one.",
        )
        write_identity(output, self.identity)
        recipes.dump(self.recipe, output / "recipe.yaml")
        seeds: dict[int, dict[str, list[dict[str, Any]]]] = {}
        for seed in self.recipe.seeds:
            seeds[seed] = {fold: self.fold(fold, seed) for fold in self.tested}
        scores = classification.summarise(seeds, self.library.labels)
        scores |= {"dataset": self.library.dataset, "seeds": self.recipe.seeds, "chosen": self._chosen()}
        members = [str(self.folder(fold, seed).relative_to(output) / "model") for seed in seeds for fold in self.tested]
        write_json(output / predict.FOLDS, {"members": members})
        write_json(output / SCORES, scores)
        write_atomically(output / TABLE, classification.table(scores) + "\n")
        title = f"{self.recipe.sounds.name}: {classification.headline(scores).partition(';')[0]}"
        classification.draw_confusion(scores, output / PICTURE, title)
        return scores

    def _chosen(self) -> dict[str, str]:
        found = {}
        for seed in self.recipe.seeds:
            for fold in self.tested:
                folder = self.folder(fold, seed)
                cure = f"Delete {folder}: that fold is trained again."
                found[f"{seed}/{fold}"] = str(read_own(folder / DONE, cure)["chosen"])
        return found

    def folder(self, fold: str, seed: int) -> Path:
        """Where one test fold's models and predictions lie."""
        root = self.recipe.output if len(self.recipe.seeds) == 1 else self.recipe.output / f"seed-{seed}"
        return root / f"fold-{fold}"

    def fold(self, test: str, seed: int) -> list[dict[str, Any]]:
        """The predictions of one test fold, made now or before."""
        folder = self.folder(test, seed)
        done = self._done(folder)
        if done is None:
            chosen, scores = self._choose(test, seed, folder)
            model = self._final(test, seed, folder, chosen)
            lines = self._test(test, model)
            write_published(model, folder.parent / MODELS / predict.FOLD_FILE.format(test))
            write_lines(folder / PREDICTIONS, lines)
            write_json(folder / DONE, {"chosen": chosen, "validation": scores})
            done = lines
        accuracy = classification.score(done, self.library.labels)["accuracy"]
        print(f"fold {test}: {100 * accuracy:.1f} % of {len(done)} clips", flush=True)
        return done

    def _done(self, folder: Path) -> list[dict[str, Any]] | None:
        if not (folder / DONE).is_file():
            return None
        return read_lines(folder / PREDICTIONS)

    def _validation_fold(self, test: str) -> str:
        names = list(self.folds)
        return names[(names.index(test) + 1) % len(names)]

    def _train(self, recipe: ClassificationRecipe, train: list[str], validation: list[str] | None) -> dict[str, Any]:
        recipe = dataclasses.replace(
            recipe,
            labels=self.library.labels,
            train_folds=list[int | str](train),
            validation_folds=list[int | str](validation) if validation else None,
        )
        return TaskTrainer(recipe).fit()

    def _choose(self, test: str, seed: int, folder: Path) -> tuple[str, dict[str, float]]:
        """The best candidate on the validation fold; without a choice to make, and with a refit, nothing is trained."""
        candidates = list(self.recipe.candidates) or [PLAIN]
        if len(candidates) == 1 and self.recipe.refit is not None:
            return candidates[0], {}
        validation = self._validation_fold(test)
        train = [fold for fold in self.folds if fold not in (test, validation)]
        scores = {}
        for name in candidates:
            print(f"fold {test}: '{name}' on folds {', '.join(train)}, validated on {validation}", flush=True)
            recipe = self.recipe.training_recipe(name, self._candidate(folder, name), seed=seed)
            scores[name] = self._train(recipe, train, [validation])["score"]
        return max(scores, key=lambda name: scores[name]), scores

    @staticmethod
    def _candidate(folder: Path, name: str) -> Path:
        return folder / f"candidate-{name}"

    def _final(self, test: str, seed: int, folder: Path, chosen: str) -> Path:
        """The folder of the model to test: ``model``, by a refit or as a link to the chosen candidate."""
        model = folder / "model"
        if self.recipe.refit is None:
            if not model.exists():
                model.symlink_to(self._candidate(folder, chosen).name, target_is_directory=True)
            return model
        train = [fold for fold in self.folds if fold != test]
        print(f"fold {test}: '{chosen}' on folds {', '.join(train)}", flush=True)
        self._train(self.recipe.training_recipe(chosen, model, seed=seed, refit=True), train, None)
        return model

    def _test(self, test: str, model: Path) -> list[dict[str, Any]]:
        """One line per clip of the test fold; a clip that cannot be read is named, too many of them stop the run."""
        from tqdm import tqdm

        classifier = predict.load(model)
        lines, rejects = [], []
        for clip in tqdm(self.folds[test], desc=f"test fold {test}", unit="clip"):
            try:
                lines.append(classification.line_of(classifier, clip, test))
            except AudioLLMError as error:
                rejects.append({"clip": clip.name, "reason": str(error)})
        write_lines(model.parent / "rejects.jsonl", rejects)
        if len(rejects) > self.recipe.max_reject_share * len(self.folds[test]) or not lines:
            expected = f"at most {100 * self.recipe.max_reject_share:g} % of the clips unusable"
            found_text = f"{len(rejects)} of {len(self.folds[test])}, the first: {rejects[0]['reason']}"
            kind = AudioLLMError if lines else NothingHeardError
            raise kind(describe(f"test fold {test}", expected, found_text))
        return lines


def write_published(model: Path, path: Path) -> bool:
    """Write the model of an encoder folder as the UrbanSound8K project does: its keys, one file.

    Only where that file says all there is to say: published front end and layers, UrbanSound8K's classes. Returns
    whether it was written.
    """
    from safetensors.torch import save_file

    encoder, head, facts = load_classifier(model)
    if not isinstance(encoder, UrbanSoundCNN) or not isinstance(head, UrbanSoundHead):
        return False
    usual = UrbanSoundCNNConfig()
    config = dataclasses.replace(encoder.config, dropout=usual.dropout)  # of training alone
    if json.dumps(dataclasses.asdict(config)) != json.dumps(dataclasses.asdict(usual)):
        return False
    if tuple(facts["labels"]) != CLASSES or facts["task"] != "classification":
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file({**encoder.state_dict(), **head.state_dict()}, temporary, metadata={"format": "pt"})
    return True
