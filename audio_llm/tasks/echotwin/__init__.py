"""EchoTwin-QA: two towers and a head that scores the options of a question about a recording.

It answers in ``audio-llm eval`` through its engine (:mod:`audio_llm.tasks.echotwin.engine`).
"""

from __future__ import annotations

from typing import Any

from audio_llm.tasks.base import Task


class EchoTwinTask(Task):
    """Trained on questions in DCASE's format."""

    name = "echotwin"

    @property
    def recipe(self) -> type:
        from audio_llm.tasks.echotwin.task import EchoTwinRecipe

        return EchoTwinRecipe

    def train(self, recipe: Any) -> None:
        from audio_llm.tasks.echotwin.task import report

        report(recipe)


TASK = EchoTwinTask()
