"""The recipe of ``audio-llm prep`` with ``kind: corpus``: a source, stages in their order, and an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

from audio_llm import config
from audio_llm.errors import AudioLLMError, ConfigError, describe, nearest
from data_prep.corpus.engines import ENGINES
from data_prep.corpus.engines.base import Engine, Running, told
from data_prep.corpus.ledger import hashed
from data_prep.corpus.sources import SOURCES
from data_prep.corpus.stage import FAILED, Source, Stage, Step
from data_prep.corpus.stages import STAGES

T = TypeVar("T")
# What a stage has to have; not to be asked of its class, for some are keys of its recipe.
_PARTS = ("name", "needs", "gives", "run", *(part for part in vars(Step) if not part.startswith("_")))
LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Entry:
    """A stage of a recipe: `label` is what the recipe calls it, and its ledger and funnel after it."""

    label: str
    stage: Stage
    running: Running
    name: str

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever decides the stage's results, beside the items."""
        kept = {
            item.name: getattr(self.stage, item.name)
            for item in dataclasses.fields(self.stage)  # type: ignore[arg-type]
            if item.name not in self.stage.free
        }
        try:
            return hashed(self.name, self.stage.version, _plain(kept), dict(self.stage.digests()))
        except (AudioLLMError, OSError):
            raise
        except Exception as error:  # of a stage of anybody's
            expected = "a version, and digests that are words by name"
            raise ConfigError(describe(f"stages.{self.label}", expected, told(error))) from error


def _plain(value: Any) -> Any:
    """Keys of a recipe as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


@dataclass(frozen=True)
class CorpusConfig:
    """`stages` holds an entry for each stage, in their order: its own keys, those of how it is run, and ``name`` where
    the entry is called otherwise. `corpus` begins every id and says whose the folder is: with another name it is
    refused, with other stages it is taken over, and what they found before is used again."""

    verb: ClassVar[str] = "prep"
    corpus: str
    source: dict[str, Any]  # where items come from: its name and its own keys
    stages: dict[str, dict[str, Any] | None]
    kind: Literal["corpus"] = "corpus"  # the kind of data set
    # What runs the stages, its name and its own keys: decides nothing about the result.
    engine: dict[str, Any] = field(default_factory=lambda: {"name": "local"})
    seed: int = 0  # of everything that is drawn
    # Whether what was lost in an earlier run is tried again where that could help: what raised, took too long or killed
    # its worker, what a model did not answer, or answered so that it was of no use.
    retry: bool = False

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that do not go together; no file is looked at."""
        if not LABEL.fullmatch(self.corpus):
            expected = "a name of letters, digits, - and _, at most 32"
            raise ConfigError(describe("corpus", expected, f"'{self.corpus}'", "Every id begins with it."))
        if not self.stages:
            raise ConfigError(describe("stages", "at least one", "none"))
        self.opened_source.check()
        self.opened_engine.check()
        given = set(self.opened_source.gives)
        for entry in self.entries:
            where = f"stages.{entry.label}"
            entry.running.check(where)
            entry.stage.check()
            if clash := set(entry.stage.reasons) & set(FAILED):
                raise ConfigError(describe(where, "reasons of its own", f"'{min(clash)}', which is the engine's"))
            if strange := set(entry.stage.retryable) - set(entry.stage.reasons):
                raise ConfigError(describe(where, "retryable ones among its reasons", f"'{min(strange)}'"))
            for name in entry.stage.needs:
                if name not in given:
                    found = f"none that gives '{name}'{nearest(name, given)}; there are {', '.join(sorted(given))}"
                    cure = "Put the stage that gives it before, or name the column of the source."
                    raise ConfigError(describe(where, f"a stage or a source before it with '{name}'", found, cure))
            given |= set(entry.stage.gives)

    @cached_property
    def opened_source(self) -> Source:
        found: Source = self._made(SOURCES.find, self.source, "source")[1]
        return found

    @cached_property
    def opened_engine(self) -> Engine:
        found: Engine = self._made(ENGINES.find, self.engine, "engine")[1]
        return found

    @cached_property
    def entries(self) -> list[Entry]:
        """The stages of the recipe, in order."""
        found = []
        own = {item.name for item in dataclasses.fields(Running)}
        for label, keys in self.stages.items():
            if not LABEL.fullmatch(label):
                raise ConfigError(describe("stages", "names of letters, digits, - and _", f"{label!r}"))
            where, tree = f"stages.{label}", {"name": label} | (keys or {})
            running = config.build(Running, {k: v for k, v in tree.items() if k in own}, where)
            name, stage = self._made(STAGES.find, {k: v for k, v in tree.items() if k not in own}, where)
            if missing := [part for part in _PARTS if not hasattr(stage, part)]:
                cure = "Let it inherit data_prep.corpus.stage.Step, and say the rest itself: docs/extending/stage.md."
                raise ConfigError(describe(f"{where}: {name}", f"a stage with '{missing[0]}'", "none", cure))
            found.append(Entry(label, stage, running, name))
        for number, entry in enumerate(found):
            entry.stage.before([later.stage for later in found[number + 1 :]])
        return found

    def _made(self, find: Callable[[Any], Any], tree: Mapping[str, Any], where: str) -> tuple[str, Any]:
        """What the ``name`` in `tree` stands for, filled with its other keys."""
        if "name" not in tree:
            raise ConfigError(describe(where, "a key 'name'", ", ".join(map(str, tree)) or "none"))
        kind = find(tree["name"])
        if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
            raise ConfigError(describe(f"{where}: {tree['name']}", "a dataclass of its keys", f"{kind!r:.60}"))
        known = {item.name for item in dataclasses.fields(kind)}
        usual = {name: getattr(self, name) for name in ("seed", "corpus", "retry") if name in known}
        rest = {key: value for key, value in tree.items() if key != "name"}
        return str(tree["name"]), config.build(kind, usual | rest, where)
