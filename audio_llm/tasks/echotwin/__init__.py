"""EchoTwin-QA: two towers and a head that scores the options of a question about a recording.

It answers in ``audio-llm eval`` through its engine (:mod:`audio_llm.tasks.echotwin.engine`).
"""

from __future__ import annotations

from audio_llm.tasks.base import Task
from audio_llm.tasks.echotwin.recipe import EchoTwinRecipe


class EchoTwinTask(Task):
    """Trained on questions in DCASE's format."""

    name = "echotwin"
    recipe = EchoTwinRecipe

    def train(self, recipe: EchoTwinRecipe) -> None:
        from audio_llm.tasks.echotwin.task import report

        report(recipe)


TASK = EchoTwinTask()
