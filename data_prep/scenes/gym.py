"""Scenes drawn one at a time for a trainer that learns from each once: a source of ``audio_llm.training.gym``.

A draw is a fresh room, a fresh scene in it and a question about it, of the recipe's training recordings alone. It
depends on the recipe, the seed, the kind of question and its number among the draws of that kind, not on who makes it.
Nothing is written to disk, neither sound nor response.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm import config as recipes
from audio_llm.audio import Waveform
from audio_llm.errors import ConfigError, describe
from audio_llm.shards.schema import Sample, Source
from data_prep import sounds
from data_prep.ledger import digest
from data_prep.questions import planning
from data_prep.questions.common import QuestionsConfig
from data_prep.scenes import interventions, pool, receivers, render, rooms, simulate
from data_prep.scenes.simulate import SceneConfig
from data_prep.scenes.world import World

SPLIT = "train"  # recordings of no other split are drawn
MANIFEST = "dataset.json"  # of a folder that ``audio-llm prep`` made
ROOMS = 200  # drawn before a question counts as impossible: a small room has no place 7 m away
LEVELS = ("easy", "hard")


def level_of(questions: QuestionsConfig, audio: render.AudioConfig, level: str) -> tuple[QuestionsConfig, Any]:
    """What is asked and how it sounds at a level: an easy scene has the upper half of the recipe's signal-to-noise
    ratios, and of the scenes with another sound the lesser share. As many easy scenes as hard ones are the recipe's."""
    low, high = audio.snr_db
    middle, share = (low + high) / 2, 2 * questions.second_event
    if level == "easy":
        return replace(questions, second_event=max(0.0, share - 1)), replace(audio, snr_db=(middle, high))
    return replace(questions, second_event=min(1.0, share)), replace(audio, snr_db=(low, middle))


class Drawer:
    """What makes the draws: all that one needs, built once a process. `formats` are shares of question formats."""

    imports = ("scipy.signal",)

    def __init__(
        self,
        config: SceneConfig,
        questions: QuestionsConfig,
        formats: Mapping[str, float],
        clips: list[sounds.Clip],
        source: Source,
        seed: int,
    ) -> None:
        self.config, self.source, self.seed = config, source, seed
        self.head = receivers.build(config.audio.layout, sofa=config.head.sofa, radius=config.head.radius)
        # The recipe's own rooms say what can be asked at all.
        self.world = simulate.build_world(config, SPLIT, clips)
        self.levels = {level: level_of(questions, config.audio, level) for level in LEVELS}
        self.formats = shares_of(questions, formats)
        self.decks = {name: planning.deck_of(questions, self.world, name) for name in sorted(self.formats)}

    @property
    def kinds(self) -> dict[str, float]:
        """The share of each kind of draw, a type of question and a level, in the recipe's mix."""
        shares = {name: sum(parts.values()) / len(LEVELS) for name, parts in self.formats.items()}
        return {f"{name}-{level}": share for name, share in shares.items() for level in LEVELS}

    def draw(self, job: tuple[str, int]) -> tuple[Sample, Waveform]:
        """Draw number `job[1]` of kind `job[0]`. Raises :class:`ConfigError` where no room has a scene for it, and
        :class:`AudioError` for a recording that cannot be used."""
        kind, number = job
        level = kind.rpartition("-")[2]
        questions, audio = self.levels[level]
        ask, seed = self.ask(kind, number), ("gym", self.seed, kind, number)
        world, draft, choices = self.scene(ask, questions, kind)
        sample = planning.sample_of(ask, draft, choices, world, f"{kind}-{number:06d}", self.source)
        staged, responses = interventions.stage_of(draft.placed, world), []
        for event, item in enumerate(draft.placed):
            own = world.places[item.source][1] % self.config.rooms.positions
            here = staged, event, self.head, self.config.rooms, audio, own
            responses.append(interventions.response_of(*here))
        waveform, done, _ = render.mix_heard(draft.placed, responses, self.head, audio, *seed)
        sample.meta |= done | {"gym": {"kind": kind, "number": number, "level": level}}
        return sample, waveform

    def ask(self, kind: str, number: int) -> planning.Ask:
        """What draw `number` of `kind` asks: (answer, position) pairs in shuffled rounds of all of them."""
        name = kind.rpartition("-")[0]
        deck, chance = self.decks[name]
        turn, place = divmod(number, len(deck))
        target, position = deck[int(rooms.seeded("deck", self.seed, kind, turn).permutation(len(deck))[place])]
        parts = self.formats[name]
        weights, rng = np.array(list(parts.values())), rooms.seeded("format", self.seed, kind, number)
        form = list(parts)[int(rng.choice(len(parts), p=weights / weights.sum()))]
        return planning.Ask(number, name, form, target, position, chance)

    def scene(self, ask: planning.Ask, questions: QuestionsConfig, kind: str) -> tuple[World, Any, list[str]]:
        """A room that has a scene for `ask`, as a world of its own, with the scene and its choices."""
        error: ConfigError | None = None
        for attempt in range(ROOMS):
            room = rooms.draw_room(self.config.rooms, f"gym-{kind}-{ask.index}", attempt, self.seed)
            world = self.world.elsewhere([room])
            try:
                return world, *planning.draft_of(ask, world, questions, "gym", self.seed, kind, attempt)
            except ConfigError as failed:
                error = failed
        assert error is not None
        raise error


def shares_of(questions: QuestionsConfig, formats: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The share of all questions that each type has in each format, by type."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, weight in formats.items():
        mix = planning.mix_of(questions, name)
        for kind, part in mix.items():
            if weight * part > 0:
                found[kind][name] = weight / sum(formats.values()) * part / sum(mix.values())
    return dict(sorted(found.items()))


class SceneSource:
    """Draws of a scenes recipe by `workers` processes, or by this one: see ``audio_llm.training.gym.Source``."""

    def __init__(
        self, config: SceneConfig, subset: str | None, folder: Path, seed: int, workers: int, name: str
    ) -> None:
        config.check()
        asked, formats = questions_of(config, subset, name)
        folder.mkdir(parents=True, exist_ok=True)
        found = simulate.find_sounds(config)
        library, groups, _ = simulate.split_sounds(config, folder, found, max(1, workers), quiet=True)
        clips = groups.get(SPLIT, [])
        source = Source(library.dataset, SPLIT, licence=library.licence)
        args = (config, asked, formats, clips, source, seed)
        self._drawer = Drawer(*args)
        self.kinds = self._drawer.kinds
        self.layout, self.sample_rate = config.audio.layout, config.audio.sample_rate
        self.recordings = frozenset(clip.recording for clip in clips)
        decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("subsets", "text")}
        decisive["sounds"] = {key: value for key, value in decisive["sounds"].items() if key != "folder"}
        measured = [simulate.head_digest(config)] if config.head.sofa else []
        asks = dataclasses.asdict(asked), formats
        self.digest = digest(simulate.FORMAT_VERSION, decisive, asks, simulate.sounds_digest(found), *measured)
        self._closing = ExitStack()
        self._jobs = self._closing.enter_context(pool.open_pool(workers, Drawer, args, apart=True))

    def submit(self, kind: str, number: int) -> Future[tuple[Sample, Waveform]]:
        """Draw `number` of `kind`, to be asked for later."""
        return self._jobs.submit("draw", (kind, number))

    def close(self) -> None:
        """End the worker processes."""
        self._closing.close()


def questions_of(config: SceneConfig, subset: str | None, name: str) -> tuple[QuestionsConfig, dict[str, float]]:
    """What a `subset` of the recipe asks, and in which shares of formats; None: its questions with choices."""
    if subset is None:
        return config.questions, {"mmau": 1.0}
    parts = config.parts
    if subset not in parts or parts[subset].split != SPLIT:
        known = ", ".join(key for key, part in parts.items() if part.split == SPLIT) or "it has none"
        found = f"'{subset}'" + (f", of split {parts[subset].split}" if subset in parts else "")
        raise ConfigError(describe("data.gym.subset", f"a subset of split {SPLIT} in {name} ({known})", found))
    return parts[subset].asked(config.questions), parts[subset].formats


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The keys of a scenes recipe, or of the recipe of a data set's folder; None for anything else."""
    if path.is_dir():
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        tree = manifest.get("config") if isinstance(manifest, dict) else None
    else:
        tree = recipes.read(path)
        if recipes.verb_of(tree) != "prep" or tree.get("kind", "scenes") != "scenes":
            return None
        tree = {key: value for key, value in tree.items() if key not in ("verb", "kind")}
    return tree if isinstance(tree, dict) and {"subsets", "questions"} <= set(tree) else None


def recognises(path: Path) -> bool:
    """Whether `path` is a scenes recipe, or a folder that ``audio-llm prep`` made of one."""
    return read_recipe(path) is not None


def open_source(path: Path, *, subset: str | None, folder: Path, seed: int, workers: int) -> SceneSource:
    """The source of the draws of `path`; `folder` is for what was found out about its sounds."""
    tree = read_recipe(path)
    assert tree is not None
    return SceneSource(recipes.build(SceneConfig, tree, str(path)), subset, folder, seed, workers, str(path))
