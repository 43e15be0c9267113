"""A gym: prompts drawn while a run trains, each for one step, more of the kinds that still teach (``data.gym``).

A group whose replies all earn the same has no gradient. So each kind of question has a running share of groups that
had one, and is drawn by it (:class:`Mixture`). What a kind's draw `n` is depends on seed, kind and `n` alone. Which are
drawn for a step follows from what was told up to the step before the last, so that they are made while the last one
learns. Both stand in every checkpoint (``gym.json``): a resumed run draws what an unbroken one does.

What draws is a guest: a module with ``recognises(path) -> bool`` and ``open_source(path, *, subset, folder, seed,
workers) -> Source``, registered by an entry point of the group ``audio_llm.gyms``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.errors import AudioLLMError, ConfigError, TrainingError, describe
from audio_llm.files import read_json, write_json
from audio_llm.registry import Registry
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample
from audio_llm.training.examples import MAX_REPLACEMENTS, Example, encode, open_shards
from audio_llm.training.grpo_trainer import AudioGRPOTrainer
from audio_llm.training.order import RunSampler
from audio_llm.training.recipes import GRPOData, GymRecipe
from audio_llm.training.run import PolicyRun

GYMS = Registry("gyms", "gym")
FILE = "gym.json"  # of a checkpoint
BLOCK = 1000  # draws that count as an epoch: there is no data whose end would be one
ELSEWHERE = 10**9  # how far from a draw that cannot be used its replacement is: no run draws so many of a kind


class Source(Protocol):
    """Where draws come from. `kinds` are their shares in an even mix, by names without a blank.

    `layout` and `sample_rate` (Hz) are those of the sounds, `recordings` what they are made of; `digest` changes with
    anything that decides a draw.
    """

    kinds: Mapping[str, float]
    layout: str
    sample_rate: int
    recordings: frozenset[str]
    digest: str

    def submit(self, kind: str, number: int, /) -> Future[tuple[Sample, Waveform]]:
        """Draw `number` of `kind`, made by another process if there is one; an :class:`AudioLLMError` as its result
        where it cannot be used. Its sample's id is unique."""

    def close(self) -> None:
        """End what makes draws."""


class Mixture:
    """How many draws of each kind a batch has.

    `shares` are of the groups that had a gradient, by kind: 1 at first, and after each group 1/`span` of the way to
    what it was. A kind is drawn by its share in the even `mix` times the square of that, or `floor` where that is less,
    so that none dies out: what cannot teach yet may later. `drawn` counts the draws of each kind.
    """

    def __init__(self, mix: Mapping[str, float], floor: float, span: int, seed: int) -> None:
        self.mix, self.floor, self.span, self.seed = dict(mix), floor, span, seed
        self.shares, self.drawn = dict.fromkeys(mix, 1.0), dict.fromkeys(mix, 0)

    def weights(self) -> dict[str, float]:
        """The expected share of each kind in a batch."""
        raw = {kind: part * max(self.shares[kind] ** 2, self.floor) for kind, part in self.mix.items()}
        return {kind: value / sum(raw.values()) for kind, value in raw.items()}

    def draw(self, batch: int, count: int) -> list[tuple[str, int]]:
        """Kind and number of `count` draws for the batch of that number: of each kind as many as its weight says,
        rounded up or down by chance (systematic sampling), in random order."""
        weights, rng = self.weights(), np.random.default_rng([self.seed, batch])
        edges = np.cumsum(list(weights.values()))
        places = np.searchsorted(edges / edges[-1], (np.arange(count) + rng.random()) / count, side="right")
        found = []
        for place in rng.permutation(places):
            kind = list(weights)[int(place)]
            found.append((kind, self.drawn[kind]))
            self.drawn[kind] += 1
        return found

    def tell(self, kind: str, taught: bool) -> None:
        """That a group of `kind` had a gradient, or none."""
        self.shares[kind] += (float(taught) - self.shares[kind]) / self.span


class Gym(RunSampler):
    """The order of a run, and the prompts at its places: batches of `batch` draws of `source`, and `reserve` more for
    groups that are drawn again, whose places are behind the run's end.

    Its memory is what two batches need.
    """

    def __init__(
        self, source: Source, recipe: GymRecipe, processor: Any, data: GRPOData, seed: int, batch: int, reserve: int
    ) -> None:
        self.source, self.data, self.processor, self.name = source, data, processor, str(recipe.recipe)
        self.mixture = Mixture(source.kinds, recipe.floor, recipe.span, seed)
        self.batch, self.reserve, self.indexes = batch, reserve, ()
        self.plans: dict[int, list[tuple[str, int]]] = {}  # of this batch and the next: its draws, then the reserve's
        self._ahead: dict[int, Future[tuple[Sample, Waveform]]] = {}  # by place
        super().__init__(self, seed, 0)  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------------- an order

    def epoch(self, number: int) -> np.ndarray:
        return np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64)

    @property
    def epoch_size(self) -> float:
        return float(BLOCK)

    def place(self, position: int) -> tuple[int, int]:
        return divmod(position, BLOCK)

    # ---------------------------------------------------------------------------------------------------- and prompts

    def begin(self, batch: int, places: Sequence[int]) -> None:
        """Begin a batch, of which this process reads the prompts at `places`: what it lacks is drawn, and its places of
        the next one are drawn ahead."""
        self.plans = {number: plan for number, plan in self.plans.items() if number >= batch}
        offsets = [place - batch * self.batch for place in places]
        for number in (batch, batch + 1):
            if number * self.batch >= len(self) and number > batch:
                continue
            if number not in self.plans:
                self.plans[number] = self.mixture.draw(number, self.batch + self.reserve)
            behind = [len(self) + number * self.reserve + place for place in range(self.reserve)]
            for place in [number * self.batch + offset for offset in offsets] + behind:
                if place not in self._ahead:
                    self._ahead[place] = self.source.submit(*self.draw_at(place))

    def end(self, batch: int) -> None:
        """Forget the draws of a batch that were not needed."""
        for place in [place for place in self._ahead if self._batch_of(place)[0] <= batch]:
            self._ahead.pop(place).cancel()

    def _batch_of(self, place: int) -> tuple[int, int]:
        if place < len(self):
            return divmod(place, self.batch)
        number, offset = divmod(place - len(self), self.reserve)
        return number, self.batch + offset

    def draw_at(self, place: int) -> tuple[str, int]:
        """Kind and number of the draw at a place of this batch or the next."""
        number, offset = self._batch_of(place)
        return self.plans[number][offset]

    def __getitem__(self, place: int) -> Example:
        """The prompt at `place`, with those drawn for it that cannot be used among its `rejects`."""
        kind, number = self.draw_at(place)
        made = self._ahead.pop(place, None) or self.source.submit(kind, number)
        rejects: list[tuple[str, str]] = []
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                sample, waveform = made.result()
                item = {"sample": sample, "waveforms": [waveform]}
                item["coordinates"] = {"index": place, "shard": f"{self.name}/{sample.id}", "key": sample.id}
                how: dict[str, Any] = {"reply": False, "hearing": self.data.hearing}
                example = encode(self.processor, item, self.data.style, **how)
            except BrokenProcessPool as error:
                cure = "The same command goes on from the last checkpoint; data.gym.workers=0 draws without processes."
                raise TrainingError(describe("data.gym", "workers that live", "a dead one", cure)) from error
            except TrainingError:
                raise
            except AudioLLMError as error:
                rejects.append((f"{self.name}: {kind} {number}", str(error)))
                number = number % ELSEWHERE + attempt * ELSEWHERE
                made = self.source.submit(kind, number)
                continue
            example.rejects = rejects
            return example
        raise TrainingError(f"data.gym: {len(rejects)} draws in a row cannot be used; the first: {rejects[0][1]}")

    # ----------------------------------------------------------------------------------------------------- and a state

    def state(self) -> dict[str, Any]:
        """What decides all further draws, as JSON has it."""
        plans = {str(number): plan for number, plan in self.plans.items()}
        return {"shares": self.mixture.shares, "drawn": self.mixture.drawn, "plans": plans}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.mixture.shares, self.mixture.drawn = dict(state["shares"]), dict(state["drawn"])
        self.plans = {
            int(number): [(str(kind), int(draw)) for kind, draw in plan] for number, plan in state["plans"].items()
        }


class GymTrainer(AudioGRPOTrainer):
    """GRPO on the prompts of a :class:`Gym`."""

    prompts: Gym  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prompts.batch = int(self.args.generation_batch_size or 0) // self._group_size("train")

    @property
    def _batch(self) -> int:
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        places = [row["index"] for row in inputs]
        self.prompts.begin(self._batch, list(dict.fromkeys(places)))
        self._places, self._replaced = gather_object(places)[:: self._group_size("train")], []
        output = super()._generate_and_score_completions(inputs)
        self.prompts.end(self._batch)
        return output

    def _log_groups(self, mode: str) -> list[int]:
        flat, gym, size = super()._log_groups(mode), self.prompts, self._group_size(mode)
        kinds = [gym.draw_at(place)[0] for place in self._places]
        for place in self._replaced:
            gym.mixture.tell(gym.draw_at(place)[0], False)
        for number, kind in enumerate(kinds):
            gym.mixture.tell(kind, number not in flat)
        assert len(kinds) == len(self._group) // size
        for kind, share in gym.mixture.shares.items():
            self._metrics[mode][f"gym/prompts/{kind}"].append(kinds.count(kind) / len(kinds))
            self._metrics[mode][f"gym/share/{kind}"].append(share)
        return flat

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.accelerator.is_main_process:
            write_json(
                Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}" / FILE, self.prompts.state()
            )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            self.prompts.load(read_json(Path(resume_from_checkpoint) / FILE))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class GymRun(PolicyRun):
    """A run whose prompts are drawn by a gym."""

    gym: Gym

    def open_data(self, data: Any) -> Any:
        recipe: Any = self.recipe
        extractor, wanted = self.processor.feature_extractor, data.gym
        source = open_source(wanted, self.recipe.output / "gym", recipe.seed)
        self.at_end(source.close)
        name = f"data.gym {wanted.recipe}"
        layouts, rate = audio.audible(extractor.layouts, data.hearing) or (), extractor.sampling_rate
        if (layouts and source.layout not in layouts) or source.sample_rate != rate:
            found, cure = f"{source.layout}, {source.sample_rate} Hz", "Set audio.layout and audio.sample_rate in it."
            raise ConfigError(describe(name, f"scenes in {' or '.join(layouts)}, {rate} Hz", found, cure))
        if data.validation:
            check_apart(source, open_shards(data.validation, self.processor, data), name)
        batch, reserve = recipe.prompts_per_step, recipe.resample_groups
        self.gym = Gym(source, wanted, self.processor, data, recipe.seed, batch, reserve)
        return self.gym

    def claim(self, position: Mapping[str, Any]) -> None:
        super().claim({**position, "data": self.gym.source.digest})


def open_source(recipe: GymRecipe, folder: Path, seed: int) -> Source:
    """What the recipe of a gym draws from. Raises :class:`ConfigError` where no registered one knows it."""
    names = [name for name in sorted(GYMS) if GYMS[name].recognises(recipe.recipe)]
    if not names:
        expected = f"a recipe of scenes, or a folder made of one, that one of these knows: {', '.join(sorted(GYMS))}"
        raise ConfigError(describe(f"data.gym {recipe.recipe}", expected, "something else"))
    how: dict[str, Any] = {"subset": recipe.subset, "folder": folder, "seed": seed, "workers": recipe.workers}
    found: Source = GYMS[names[0]].open_source(recipe.recipe, **how)
    return found


def recordings_of(shards: ShardDataset) -> Iterator[tuple[str, str]]:
    """The recordings that are heard in `shards`, each with its sample's id."""
    for place in range(len(shards)):
        sample = shards.load_sample(place)
        clip = [sample.source.clip] if sample.source and sample.source.clip else []
        yield from ((str(recording), sample.id) for recording in sample.meta.get("recordings") or clip)


def check_apart(source: Source, validation: ShardDataset, name: str) -> None:
    """Raise :class:`ConfigError` where a gym draws a recording that is validated on."""
    shared = next((pair for pair in recordings_of(validation) if _names(pair[0]) & source.recordings), None)
    if shared is not None:
        cure = "Name the folder that audio-llm prep made, whose seed and folds split the recordings."
        found = f"'{shared[0]}', which data.validation has in '{shared[1]}'"
        raise ConfigError(describe(name, "recordings that are not validated on", found, cure))


def _names(recording: str) -> set[str]:
    """What a recording may be called: shards of single clips name files, scenes what files are named without ending."""
    return {recording, os.path.splitext(recording)[0]}
