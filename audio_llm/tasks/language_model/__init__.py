"""A small language model from nothing, for machines without a pretrained one."""

from __future__ import annotations

from audio_llm.tasks.base import Task
from audio_llm.tasks.language_model.task import LanguageModelRecipe, train


class LanguageModel(Task):
    """Tokenizer and Qwen2 weights, trained on the text of a corpus."""

    name = "language_model"
    recipe = LanguageModelRecipe

    def train(self, recipe: LanguageModelRecipe) -> None:
        train(recipe)


TASK = LanguageModel()
