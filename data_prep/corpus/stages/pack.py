"""Shards of the questions that items carry, by the same checks, sides and writer as ``kind: manifest``."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from audio_llm import machine
from audio_llm.datasets.records import Record
from audio_llm.errors import AudioError, ConfigError, describe
from audio_llm.files import read_json, write_json, write_lines
from audio_llm.shards.schema import Sample
from data_prep import text_check
from data_prep.corpus.ledger import hashed
from data_prep.corpus.sounds import Clip, sound_of
from data_prep.corpus.stage import FOLDERS, Item, Reject, Stage, Step
from data_prep.manifest import checks, sides
from data_prep.manifest.filling import about, fill
from data_prep.manifest.packing import Packer
from data_prep.manifest.recipe import AudioConfig, ManifestConfig
from data_prep.manifest.rows import Draft, Reason
from data_prep.manifest.rows import Reject as RowReject
from data_prep.manifest.sounds import File
from data_prep.scenes import pool

NO_QUESTIONS, NOT_TAKEN = "no_questions", "not_taken"
STATE, REJECTS = "pack.json", "questions.rejects.jsonl"
# What a question says, beside its type.
_QUESTION = ("question", "choices", "answer", "thinking", "semantic_elements", "events")
_WRITERS = "written_by"  # who wrote which of its texts: goes into the sample's meta
_TASKS = {"rl": ["choice"]}
_PER_WORKER = 64  # questions for which it pays to start a process


@dataclass
class Pack(Step):
    """Makes a sample of each of an item's ``questions``: ``{question, choices?, answer, thinking?, semantic_elements?,
    type, written_by?}``. ``OUT/SIDE`` are shards; ``OUT/items/questions.rejects.jsonl`` has the questions that are no
    sample.

    Items of one recording lie on one side alone, and so do those that hang together by another field of `group`. An
    item of whose questions none is a sample is a reject, for the reason of its first question.
    """

    name: ClassVar[str] = "pack"
    whole: ClassVar[bool] = True
    keeps: ClassVar[bool] = False
    reasons: ClassVar[tuple[str, ...]] = (*(reason.name.lower() for reason in Reason), NO_QUESTIONS, NOT_TAKEN)
    needs: ClassVar[tuple[str, ...]] = ("audio", "source", "questions")
    gives: ClassVar[tuple[str, ...]] = ("side", "samples")

    corpus: str = ""  # begins every id; the recipe's own
    # Shares of recordings.
    splits: dict[str, float] = field(default_factory=lambda: {"sft": 0.7, "rl": 0.1, "validation": 0.1, "test": 0.1})
    # Of a side, the tasks that its questions may have, choice or open; without it, 'rl' takes choice alone.
    tasks: dict[str, list[str]] | None = None
    # Fields of which the first that an item has tells what is never divided between sides.
    group: list[str] = field(default_factory=lambda: ["component", "source"])
    keep: list[str] = field(default_factory=list)  # fields of items that go into the samples' meta
    licence: str | None = None  # of the sounds, written into every sample
    seed: int = 0  # of the sides
    audio: AudioConfig = field(default_factory=AudioConfig)
    samples_per_shard: int = 256  # samples in a tar file

    def check(self) -> None:
        self._manifest(Path("corpus")).check()
        for side, tasks in (self.tasks or {}).items():
            if side not in self.splits:
                raise ConfigError(describe("pack.tasks", f"sides among {', '.join(self.splits)}", f"'{side}'"))
            if not tasks or set(tasks) - {"choice", "open"}:
                raise ConfigError(describe(f"pack.tasks.{side}", "choice, open or both", f"{tasks}"))
        if taken := sorted(set(self.splits) & set(FOLDERS)):
            expected = f"names other than the corpus's own folders, {', '.join(FOLDERS)}"
            raise ConfigError(describe("pack.splits", expected, f"'{taken[0]}'"))
        if not self.group:
            raise ConfigError(describe("pack.group", "at least one field, such as source", "none"))

    def before(self, stages: Sequence[Stage]) -> None:
        if any(isinstance(stage, Pack) for stage in stages):
            cure = "Another one would remove its shards: name all sides under the 'splits' of one."
            raise ConfigError(describe("stages", "one that packs", "two", cure))

    def _manifest(self, folder: Path) -> ManifestConfig:
        return ManifestConfig(
            corpus=self.corpus or "corpus",
            format="jsonl",
            path=folder / "questions",
            root=folder,
            keep=["item", _WRITERS, *self.keep],
            licence=self.licence,
            splits=dict(self.splits),
            seed=self.seed,
            audio=self.audio,
            samples_per_shard=self.samples_per_shard,
        )

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._facts: dict[str, Any] = {}

    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        config, owner = self._manifest(self._folder), dict[str, str]()
        rows = list(self._rows(items, owner))
        drafts, rejects = checks.drafts(rows, config) if rows else ([], [])
        parts, homeless = sides.divided(drafts, config) if drafts else ({}, [])
        rejects += homeless
        refused = [(found.item, found.as_dict()["reason"], found.as_dict()["detail"]) for found in rejects]
        taken = {side: self._taken(side, found, refused) for side, found in parts.items()}
        self._begin(items, config, taken)
        samples = self._filled(taken, config, refused)
        assert sum(map(len, samples.values())) + len(refused) == len(rows)
        keys = ("item", "reason", "detail")
        write_lines(self._folder / "items" / REJECTS, [dict(zip(keys, found, strict=True)) for found in refused])
        self._tell(samples, len(rows), refused)
        return self._results(items, owner, samples, refused)

    def _rows(self, items: Sequence[Item], owner: dict[str, str]) -> Iterator[Record | RowReject]:
        """A row for each question, in the order of the items' ids; `owner` learns whose every row is."""
        for item in sorted(items, key=lambda item: item.id):
            fields = item.fields
            questions = fields.get("questions") or []
            group = next((fields[name] for name in self.group if fields.get(name)), None)
            for number, question in enumerate(questions):
                where = f"{item.id}: question {number}"
                owner[where] = item.id
                if not isinstance(question, Mapping):
                    yield RowReject(where, Reason.BROKEN_ROW, f"expected an object, found {question!r:.60}.")
                    continue
                try:
                    sound = sound_of(fields.get("audio"), self._folder)
                except AudioError as error:
                    yield RowReject(where, Reason.NO_SOUND_NAMED, str(error))
                    continue
                values = {name: question.get(name) for name in _QUESTION} | {"kind": question.get("type")}
                values |= {"audio": sound, "id": f"{item.id}-q{number}", "group": group, "item": item.id}
                values |= {name: fields.get(name) for name in self.keep} | {_WRITERS: question.get(_WRITERS)}
                if "content" not in fields:  # not cut yet
                    values |= {"start": fields.get("start"), "end": fields.get("end")}
                elif isinstance(sound, File):
                    values["audio"] = Clip(sound.path, sound.name, str(fields["content"]))
                yield Record(values, where)

    def _taken(self, side: str, drafts: Sequence[Draft], refused: list[tuple[str, str, str]]) -> list[Draft]:
        """Those of a side whose tasks it takes."""
        tasks = (_TASKS if self.tasks is None else self.tasks).get(side, ["choice", "open"])
        for draft in drafts:
            if draft.sample.task not in tasks:
                detail = f"side '{side}' takes {' and '.join(tasks)} alone (tasks), this one is {draft.sample.task}"
                refused.append((draft.where, NOT_TAKEN, detail))
        return [draft for draft in drafts if draft.sample.task in tasks]

    def _begin(self, items: Sequence[Item], config: ManifestConfig, taken: Mapping[str, Sequence[Draft]]) -> None:
        """Remove the shards of other questions, or of other settings; those of these ones are gone on with."""
        rows = {
            side: [(d.sample.to_json(), [s.name for s in d.sounds], d.stretches) for d in found]
            for side, found in taken.items()
        }
        marks = [(item.id, item.fields.get("mark")) for item in sorted(items, key=lambda item: item.id)]
        mark = hashed(self.version, rows, marks, {k: str(v) for k, v in config.plain().items()})
        state = self._folder / STATE
        try:
            known = read_json(state)
        except (OSError, ValueError):
            known = {}
        if known.get("mark") == mark:
            return
        for side in {*known.get("sides", ()), *self.splits}:
            if (self._folder / side).is_dir():
                shutil.rmtree(self._folder / side)
        write_json(state, {"mark": mark, "sides": list(self.splits)})

    def _filled(
        self, taken: Mapping[str, Sequence[Draft]], config: ManifestConfig, refused: list[tuple[str, str, str]]
    ) -> dict[str, list[Sample]]:
        def reject(found: Sequence[RowReject]) -> None:
            refused.extend((each.item, each.as_dict()["reason"], each.as_dict()["detail"]) for each in found)

        seen: dict[str, str] = {}
        samples: dict[str, list[Sample]] = {}
        most = sum(map(len, taken.values())) // _PER_WORKER + 1
        with pool.open_pool(min(machine.cpus(), most), Packer, (config.audio,)) as jobs:
            for side, drafts in taken.items():
                if drafts:
                    samples[side] = fill(
                        self._folder / side, side, drafts, jobs, seen, config, quiet=True, reject=reject
                    )
        return samples

    def _tell(self, samples: Mapping[str, list[Sample]], rows: int, refused: Sequence[tuple[str, str, str]]) -> None:
        names = list(samples)
        checked = text_check.check(samples[names[0]], samples[names[-1]]) if len(names) > 1 else []
        self._facts = {
            "subsets": {side: about(found) for side, found in samples.items()},
            "questions": rows,
            "question_rejects": dict(sorted(Counter(reason for _, reason, _ in refused).items())),
            "text_only_check": [row.as_dict() for row in checked],
        }

    def _results(
        self,
        items: Sequence[Item],
        owner: Mapping[str, str],
        samples: Mapping[str, list[Sample]],
        refused: Sequence[tuple[str, str, str]],
    ) -> list[Item | Reject]:
        packed: dict[str, tuple[str, int]] = {}
        for side, found in samples.items():
            for sample in found:
                item = sample.meta["item"]
                packed[item] = (side, packed.get(item, (side, 0))[1] + 1)
        first: dict[str, tuple[str, str]] = {}
        for where, reason, detail in sorted(refused):
            first.setdefault(owner[where], (reason, detail))
        results: list[Item | Reject] = []
        for item in items:
            if item.id in packed:
                side, number = packed[item.id]
                results.append(item.adding(side=side, samples=number))
            else:
                results.append(Reject(item.id, *first.get(item.id, (NO_QUESTIONS, "it carries none"))))
        return results


STAGE = Pack
