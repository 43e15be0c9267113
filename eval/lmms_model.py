"""A served model inside lmms-eval: ``lmms_eval --model audio_llm --model_args base_url=http://HOST:PORT``.

lmms-eval finds this module by the entry point ``lmms_eval.models``. Sound goes to the server with all of its channels,
as ``audio-llm eval`` sends it, for our exported tasks and for lmms-eval's own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from audio_llm.answering.server import Endpoint, RefusedRequest
from audio_llm.errors import describe
from eval.lmms_export import audio_part

MANIFEST = ModelManifest(model_id="audio_llm", simple_class_path="eval.lmms_model.AudioLLMServer")


class AudioLLMServer(lmms):
    """Asks an OpenAI-compatible server. `model` is a served model's or adapter's name (default: the first)."""

    is_simple = True

    def __init__(
        self, base_url: str = "http://localhost:8000", model: str | None = None, concurrency: int = 16, **ignored: Any
    ) -> None:
        super().__init__()
        self._endpoint = Endpoint(base_url)
        self._model, self._concurrency = self._endpoint.find(model or ""), int(concurrency)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """One reply a request, in order."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            replies = pool.map(self._ask, (request.args for request in requests))
            return list(tqdm(replies, total=len(requests), desc="audio_llm", disable=self.rank != 0))

    def _ask(self, arguments: tuple[Any, ...]) -> str:
        context, settings, visual, number, task, split = arguments
        doc, name = self.task_dict[task][split][number], f"{task}, document {number}"
        parts = [audio_part(sound, name) for sound in visual(doc) or []]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}],
            "max_tokens": int(settings.get("max_new_tokens", 512)),
            "temperature": float(settings.get("temperature") or 0),
            "seed": 0,
        }
        try:
            reply = self._endpoint.complete(body)
        except RefusedRequest as error:
            raise RefusedRequest(describe(name, "a reply", str(error))) from error
        return str(reply["choices"][0]["message"].get("content") or "")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("audio_llm: a chat server gives replies, no likelihoods of given texts.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("audio_llm: tasks of several rounds are not asked.")
