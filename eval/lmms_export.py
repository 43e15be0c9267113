"""Our questions in other people's harness: lmms-eval task folders, and what their functions do.

An exported folder holds ``<task>.yaml``, ``utils.py``, ``docs.jsonl`` and the sound as ``audio/*.wav``, and works
wherever it lies. lmms-eval reads it with ``--include_path``; the scorer is ours: a reply gets the value that
``audio-llm rescore`` gives it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.answering import server
from audio_llm.audio import LAYOUT_OF_COUNT, Waveform, encode_level, other_channels, sha256
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, DataError, describe
from audio_llm.files import atomic_folder, write_atomically, write_lines
from audio_llm.language.prompts import question_text
from eval.benchmarks.base import Collection, Item, as_asked
from eval.predictions import Prediction
from eval.scorers import SCORERS, get_scorers
from eval.scorers.base import Asking

DOCS, UTILS, AUDIO = "docs.jsonl", "utils.py", "audio"
MAX_NEW_TOKENS = 512  # lmms-eval's usual 128 cuts every answer that reasons first
UTILS_TEXT = '''"""Functions of this task; the package audio-llm must be installed beside lmms-eval."""

from pathlib import Path

from eval.lmms_export import task_functions

functions = task_functions(Path(__file__).resolve().parent, scorer="{scorer}")
dataset_kwargs = functions.dataset_kwargs
doc_to_visual = functions.visual
doc_to_text = functions.text
doc_to_messages = functions.messages
process_results = functions.results
'''


@dataclass(frozen=True)
class TaskFunctions:
    """What the task's YAML takes from its ``utils.py``: where the questions lie, and what lmms-eval calls."""

    dataset_kwargs: dict[str, Any]
    visual: Callable[[Mapping[str, Any]], list[dict[str, Any]]]
    text: Callable[..., str]
    messages: Callable[..., list[dict[str, Any]]]
    results: Callable[[Mapping[str, Any], list[str]], dict[str, float]]


@dataclass
class Exported:
    """The folder, how many questions it holds, and why the others are not in it."""

    folder: Path
    questions: int
    left_out: dict[str, str]


def export_task(
    collection: Collection, name: str, out: str | Path, *, scorer: str, title: str = "", progress: bool = False
) -> Exported:
    """Write `collection` as the lmms-eval task `name` into the folder `out`/`name`, whole or not at all.

    Sound keeps all of its channels and its level, as WAV. Items that cannot be asked or heard, or have no public
    answer, are left out and listed. Raises :class:`ConfigError` for a name that is no task name and for an unknown
    scorer.
    """
    from tqdm import tqdm

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(describe("task name", "lower-case letters, digits and underscores", f"'{name}'"))
    (judge,) = get_scorers([scorer])
    if isinstance(judge, Asking):
        raise ConfigError(describe("scorer", "one that needs nobody else", f"'{scorer}'"))
    folder = Path(out).resolve() / name
    left_out = dict(collection.errors)
    docs: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    with atomic_folder(folder) as temporary:
        (temporary / AUDIO).mkdir()
        for index, item in enumerate(tqdm(collection.items, unit="question", disable=not progress)):
            if item.id in left_out or not item.gold:
                left_out.setdefault(item.id, "its answer is not public")
                continue
            try:
                waveform = collection.waveform(index)
            except AudioLLMError as error:
                left_out[item.id] = str(error)
                continue
            docs.append(doc_of(item, _write_sound(waveform, temporary / AUDIO, files)))
        if not docs:
            reason = next(iter(left_out.values()), "there are no questions")
            raise DataError(describe(f"task '{name}'", "a question that can be asked", f"none: {reason}"))
        write_lines(temporary / DOCS, docs)
        write_atomically(temporary / UTILS, UTILS_TEXT.format(scorer=scorer))
        write_atomically(temporary / f"{name}.yaml", task_yaml(name, scorer, title))
    return Exported(folder, len(docs), left_out)


def _write_sound(waveform: Waveform, folder: Path, files: dict[str, str]) -> str:
    """Name of the file that holds `waveform`; equal sound is one file."""
    digest = sha256(waveform)[:24]
    if digest not in files:
        files[digest] = f"{AUDIO}/{digest}.wav"
        (folder / f"{digest}.wav").write_bytes(encode_level(waveform))
    return files[digest]


def doc_of(item: Item, sound: str) -> dict[str, Any]:
    """One line of ``docs.jsonl``. `item` is a text, for columns of many kinds cannot be read back as one table."""
    text = question_text(item.question, item.choices, item.instruction)
    return {"id": item.id, "audio": sound, "text": text, "answer": item.gold, "item": json.dumps(as_asked(item))}


def task_yaml(name: str, scorer: str, title: str) -> str:
    """The task's YAML. Function names are tags there, which no YAML library writes plainly.

    Left alone, lmms-eval takes the reasoning out of a reply before it is scored, and cuts it at its first empty line.
    """
    found = SCORERS.find(scorer)
    return f"""task: {json.dumps(name)}
dataset_path: json
dataset_kwargs: !function utils.dataset_kwargs
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_messages: !function utils.doc_to_messages
doc_to_target: answer
process_results: !function utils.process_results
reasoning_tags: none
generation_kwargs:
  max_new_tokens: {MAX_NEW_TOKENS}
  temperature: 0
  do_sample: false
  until: []
metric_list:
  - metric: {json.dumps(scorer)}
    aggregation: mean
    higher_is_better: true
metadata:
  version: {json.dumps(found.version)}
  title: {json.dumps(title or name)}
  scorer: {json.dumps(found.title)}
"""


def task_functions(folder: str | Path, scorer: str) -> TaskFunctions:
    """The functions of an exported task that lies in `folder`."""
    root = Path(folder)
    (judge,) = get_scorers([scorer])

    def visual(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Samples (time,) or (time, channels) with their rate, and the file: what lmms-eval's audio models take."""
        import soundfile

        samples, rate = soundfile.read(root / doc["audio"], dtype="float32")
        return [{"array": samples, "sampling_rate": rate, "path": str(root / doc["audio"])}]

    def text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
        return str(doc["text"])

    def messages(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> list[dict]:
        """Chat messages whose audio is a data URL: lmms-eval's OpenAI models pass it on as it is."""
        data = base64.b64encode((root / doc["audio"]).read_bytes()).decode("ascii")
        content = [{"type": "audio", "url": f"data:audio/wav;base64,{data}"}, {"type": "text", "text": text(doc)}]
        return [{"role": "user", "content": content}]

    def results(doc: Mapping[str, Any], replies: list[str]) -> dict[str, float]:
        score = judge.score(Prediction(**json.loads(doc["item"]), raw=replies[0]))
        return {scorer: score.value if score is not None else 0.0}

    return TaskFunctions({"data_files": {"test": str(root / DOCS)}}, visual, text, messages, results)


def audio_part(sound: Any, name: str) -> dict[str, Any]:
    """An ``input_audio`` part: of a file's own bytes where there is a file, else of ``array`` and ``sampling_rate``.

    An array is (time,), (time, channels) or (channels, time). Raises :class:`AudioError` for anything else.
    """
    if hasattr(sound, "get_all_samples"):  # torchcodec's decoder, which newer versions of datasets hand out
        found = sound.get_all_samples()
        sound = {"array": np.asarray(found.data), "sampling_rate": found.sample_rate}
    if not isinstance(sound, Mapping):
        raise AudioError(describe(name, "sound as a mapping with array and sampling_rate", type(sound).__name__))
    path = Path(str(sound.get("path") or ""))
    return server.audio_part(path if path.is_file() else _waveform(sound, name))


def _waveform(sound: Mapping[str, Any], name: str) -> Waveform:
    samples = np.atleast_2d(np.asarray(sound["array"], dtype=np.float32))
    if samples.shape[0] > samples.shape[1]:  # more rows than columns: time runs downwards
        samples = samples.T
    layout = LAYOUT_OF_COUNT.get(samples.shape[0])
    if samples.ndim != 2 or layout is None:
        cure = other_channels(2, samples.shape[0])
        raise AudioError(describe(name, "1, 2 or 4 channels", f"shape {samples.shape}", cure))
    return Waveform(np.ascontiguousarray(samples), int(sound["sampling_rate"]), layout)
