"""A training run from its launch to its ``result.json``: what SFT, GRPO and EchoTwin share.

All of them use the Transformers ``Trainer`` (TRL's trainers are subclasses of it). :class:`Run` checks the launch,
claims the run folder, trains and writes the result down; :class:`PolicyRun` is one that trains the audio language model
on shards. A run folder holds ``recipe.yaml``, ``metrics.jsonl``, ``checkpoint-N/`` and ``result.json``; of a policy
also ``trainable.json``, ``rejects.jsonl`` and the exported ``merged/``, or ``base/`` and ``adapter/``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from audio_llm import config, machine
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import only_writer, read_own, write_json
from audio_llm.identity import Identity, empty, identity_of, settle, start_digest
from audio_llm.identity import write as write_identity
from audio_llm.language.templates import instruct
from audio_llm.model.build import load_processor
from audio_llm.model.export import export_trained
from audio_llm.shards.index import data_hash, shards_digest
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.remote import StoreError
from audio_llm.training.adapters import load_adapter
from audio_llm.training.callbacks import (
    BEST,
    COMPLETE,
    Checkpoints,
    MetricsFile,
    StopOnNaN,
    Tracked,
    clock,
    complete_checkpoints,
    pickles,
    quiet,
    saved_whole,
)
from audio_llm.training.encoder_cache import EncoderCache, open_cache
from audio_llm.training.examples import open_shards
from audio_llm.training.launch import check_build_locks, check_launch, leave_group
from audio_llm.training.order import RunSampler
from audio_llm.training.policy import (
    load_model,
    make_trainable,
    print_trainable,
    resolve_precision,
    starting_folder,
    trainable_map,
)
from audio_llm.training.recipes import PolicyRecipe, RunRecipe
from audio_llm.training.rejects import Rejects
from audio_llm.training.schedule import JoinedOrders, Stages, TimeBudget, planned_steps
from audio_llm.training.settings import check_quantization
from audio_llm.training.trackers import CURVES, Trackers

# What a run leaves in its folder, by name. What it made is worth keeping: another run is refused there. `resume=never`
# removes all of it.
MADE = ("checkpoint-*", "merged", "adapter", "result.json", "model.safetensors")
WRITTEN = (
    *MADE,
    "base",
    "start",
    "metrics.jsonl",
    BEST,
    "completions.jsonl",
    "order*.jsonl",
    "rejects.jsonl",
    "trainable.json",
    *CURVES,
)


class Run:
    """One run of `recipe`: ``with Run(recipe, arguments) as run``, where `arguments` are Trainer's.

    The claim says what the run does: `finished` is the result of this very run where it came to its end before;
    else `checkpoint` is where it goes on, or None. What :meth:`at_end` is given is closed with the run.
    """

    def __init__(self, recipe: RunRecipe, arguments: Any):
        check_launch(arguments.world_size, recipe.processes)
        self.recipe, self.arguments, self.main = recipe, arguments, arguments.process_index == 0
        self.position: dict[str, Any] = {}
        self.finished: dict[str, Any] | None = None
        self.checkpoint: Path | None = None
        self._closing = contextlib.ExitStack()
        if self.main:
            self._closing.enter_context(only_writer(recipe.output))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.close()
        if self.arguments.world_size > 1 and not any(error):  # after an error it might wait for the others
            atexit.register(leave_group)

    def at_end(self, close: Callable[[], Any]) -> None:
        """Call `close` when the run is over, also after an error."""
        self._closing.callback(close)

    def settle(self, identity: Identity, starts: Sequence[str | Path] = ()) -> None:
        """Make sure that the run folder is this run's before anything is put into it.

        Raises :class:`ConfigError` where it holds another run. ``resume=never`` empties it of what runs write, among
        which `starts`, what this one begins with, must not lie.
        """
        from accelerate import PartialState

        recipe, output = self.recipe, self.recipe.output
        read = functools.partial(config.load, type(recipe))
        same = recipe.resume != "never" and settle(output, identity, read, MADE)
        PartialState().wait_for_everyone()  # all have read the run folder before the first process changes it
        if self.main:
            if not same:
                empty(output, WRITTEN, starts)
            if not (output / "result.json").is_file():  # of a finished one of version 0.1 nothing is changed
                write_identity(output, identity)
        PartialState().wait_for_everyone()

    def claim(self, position: Mapping[str, Any]) -> None:
        """Find what was done before, else make the run folder ready.

        `position` is what decides the samples of every step: a checkpoint carries it, and a resumed run must agree
        (:class:`ConfigError`).
        """
        from accelerate import PartialState

        recipe, self.position = self.recipe, dict(position)
        self.finished = finished(recipe, position)
        if self.finished is not None:
            if self.main:
                print(f"{recipe.output}: this run was finished before; resume=never makes it again")
            return
        self.checkpoint = find_resume(recipe.output, recipe.resume, position)
        PartialState().wait_for_everyone()
        if self.main:
            (recipe.output / "result.json").unlink(missing_ok=True)
            config.dump(recipe, recipe.output / "recipe.yaml")

    def callbacks(self, samples_per_step: int, epoch_size: float, logs: Sequence[Path] = ()) -> list[Any]:
        """What a trainer of the run is watched by; `logs` are more JSON lines files whose lines say their step."""
        output = self.recipe.output
        return [
            log := MetricsFile(output / "metrics.jsonl", samples_per_step, epoch_size, logs, self.checkpoint),
            Checkpoints(output, self.recipe.keep_checkpoints, self.position, log),
            StopOnNaN(),
            Tracked(self._trackers),
        ]

    def _trackers(self, step: int) -> Trackers:
        trackers = Trackers(self.recipe.report_to, self.recipe.output, identity_of(self.recipe).recipe, step)
        self.at_end(trackers.close)
        return trackers

    def train(self, trainer: Any) -> dict[str, Any]:
        """Train to the end of the run, and return how that went: the beginning of ``result.json``."""
        quiet(trainer)
        if self.main and self.checkpoint:
            print(f"resuming from {self.checkpoint}")
        seconds = clock(self.checkpoint)
        try:
            outcome = trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except (AudioLLMError, StoreError) as error:
            raise plain_error(error) from None
        return {
            "steps": trainer.state.global_step,
            "seconds": seconds(),
            "train_loss": outcome.training_loss,
            "processes": self.arguments.world_size,
            "position": self.position,
        }

    def finish(self, trainer: Any, result: dict[str, Any]) -> dict[str, Any]:
        """Write ``result.json``, by which the next start knows that the run is finished; what it holds."""
        if self.main:
            write_json(self.recipe.output / "result.json", result)
        return result


class PolicyRun(Run):
    """A run that trains the audio language model on shards, `samples_per_step` of them at a time over all processes.

    It has the starting checkpoint's `processor`, the `data` of its stages (each that differs from the one before, with
    its shards), the `order` of their samples and the `rejects` among them. `position` is what else decides the samples
    of a step.
    """

    recipe: PolicyRecipe
    cache: EncoderCache | None = None  # of the model's encoder, once it is loaded

    def __init__(self, recipe: PolicyRecipe, arguments: Any, samples_per_step: int, position: Mapping[str, Any]):
        super().__init__(recipe, arguments)
        with contextlib.ExitStack() as failed:
            failed.callback(self._closing.close)
            self._open(samples_per_step, position)
            failed.pop_all()

    def _open(self, samples_per_step: int, position: Mapping[str, Any]) -> None:
        recipe, arguments = self.recipe, self.arguments
        check_quantization(recipe.model.quantization, arguments)
        stages, self.samples_per_step = recipe.stage_recipes(), samples_per_step
        self.settle(*policy_identity(recipe))
        self.start = starting_folder(recipe.model, recipe.output)
        self.processor = instruct(load_processor(self.start), recipe.instruction)
        self.data: list[tuple[Any, ShardDataset]] = []  # of DataRecipes
        self.planned: list[int] = []  # steps of each stage
        orders: list[RunSampler] = []  # of each of `data`
        for stage in stages:
            if not self.data or self.data[-1][0] != stage.data:
                self.data.append((stage.data, self.open_data(stage.data)))
                orders.append(recipe.order(self.data[-1][1], stage.data))
            self.planned.append(planned_steps(stage, orders[-1].epoch_size, samples_per_step))
            orders[-1].samples += self.planned[-1] * samples_per_step
        folders = {(index.folder, index.chosen): index for _, shards in self.data for index in shards.indexes}
        for index in folders.values():
            if self.main and (told := index.told()):
                print(told)
        self.samples = len(self.data[0][1]) if len(self.data) == 1 else sum(map(len, folders.values()))
        self.epoch_size = orders[0].epoch_size if len(orders) == 1 else self.samples
        arguments.max_steps = sum(self.planned)
        self.order = orders[0] if len(orders) == 1 else JoinedOrders(orders)
        self.rejects = Rejects(recipe.output / "rejects.jsonl", self.samples, recipe.data.max_reject_share)
        data = {"data": data_hash(recipe.train_folders()), **recipe.tags_digest()}
        self.claim({**data, "samples": self.samples, "seed": recipe.seed, **position})

    def open_data(self, data: Any) -> Any:
        """The samples of a DataRecipe: a ``ShardDataset``, or what stands in for one."""
        return open_shards(data.chosen(), self.processor, data)

    def load_model(self) -> Any:
        """The starting model, seeded, with what the recipe trains of it; ``trainable.json`` lists that."""
        from transformers import set_seed

        recipe = self.recipe
        set_seed(recipe.seed)
        model = make_trainable(self.load_reference(), recipe.trained(), recipe.lora)
        if recipe.model.adapter:
            load_adapter(model, recipe.model.adapter)
        if recipe.encoder_cache:
            self.cache = open_cache(recipe, model, bool(self.arguments.bf16))
        if self.main:
            summary = trainable_map(model)
            write_json(recipe.output / "trainable.json", summary)
            print_trainable(summary)
        return model

    def load_reference(self) -> Any:
        """The starting model as it is."""
        # FSDP shards weights of one dtype only; a language model that is trained in full is float32.
        in_full = self.recipe.trained().language_model == "full"
        mixed = self.arguments.bf16 and not in_full and not self.arguments.fsdp
        return load_model(self.start, self.recipe.model, torch.bfloat16 if mixed else torch.float32)

    def trainer_arguments(self, model: Any, logs: Sequence[Path] = (), checks: Sequence[Any] = ()) -> dict[str, Any]:
        """What both trainers are given."""
        stages = self.recipe.stage_recipes()
        rates = {part: max(stage.rates()[part] for stage in stages) for part in stages[0].rates()}
        budget: list[TimeBudget] = []
        divided = stages[0] is not self.recipe
        if divided:
            budget.append(Stages.of(stages, self.planned))
        elif self.recipe.seconds is not None:
            budget.append(TimeBudget(self.recipe.seconds))
        return {
            "model": model,
            "args": self.arguments,
            "order": self.order,
            "rejects": self.rejects,
            "rates": rates if divided or len({*rates.values()} - {0.0}) > 1 else None,
            "cache": self.cache,
            "callbacks": [*self.callbacks(self.samples_per_step, self.epoch_size, logs), *checks, *budget],
        }

    def validate(self, trainer: Any, steps: int) -> dict[str, Any]:
        """Metrics of validation after the last of `steps`, measured now where they were not; {} without data for it."""
        if not self.recipe.data.validation:
            return {}
        logs = [log for log in trainer.state.log_history if any(key.startswith("eval_") for key in log)]
        fresh = logs[-1] if logs and logs[-1]["step"] == steps else trainer.evaluate()
        return {key: value for key, value in fresh.items() if key.startswith("eval_")}

    def finish(self, trainer: Any, result: dict[str, Any]) -> dict[str, Any]:
        """Export what `trainer` has trained, in the recipe's forms, by all processes together; write the result."""
        result = {**result, "rejects": len(self.rejects.seen)}
        if trainer.cache is not None:
            result["encoder_cache"] = {"hits": trainer.cache.hits, "misses": trainer.cache.misses}
        folders = export_trained(trainer, self.processor, self.recipe.output, self.recipe.export)
        return super().finish(trainer, result | {"exported": {form: str(folder) for form, folder in folders.items()}})


def prepare_torch() -> None:
    """Settings every training process needs, before the trainer is built (idempotent)."""
    # When several CPU processes train, Trainer reloads states with map_location="cpu:0"; torch knows only "cpu".
    if not getattr(torch.serialization, "_audio_llm_cpu_index", False):
        torch.serialization.register_package(5, lambda _: None, _restore_numbered_cpu)
        torch.serialization._audio_llm_cpu_index = True  # type: ignore[attr-defined]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
    threads = os.environ.get("OMP_NUM_THREADS") or str(min(torch.get_num_threads(), machine.cpus()))
    if threads and threads.isdigit():
        torch.set_num_threads(int(threads))


def _restore_numbered_cpu(storage: Any, location: Any) -> Any:
    return storage if str(location).startswith("cpu:") else None


def trainer_settings(recipe: RunRecipe) -> dict[str, Any]:
    """What all recipes of runs say, in Trainer's words; ``max_steps`` is set when the data is known.

    Trainer's arguments set up the process group and DeepSpeed, so that torch is made ready here, before them.
    """
    prepare_torch()
    check_build_locks()
    return dict(
        output_dir=str(recipe.output),
        max_steps=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=resolve_precision(recipe.precision) == "bf16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        restore_callback_states_from_checkpoint=True,  # else the clock and the stages begin anew
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 1,
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=False,
        remove_unused_columns=False,
        report_to=[],
    )


def plain_error(error: AudioLLMError | StoreError) -> AudioLLMError | StoreError:
    """The message alone of an error that a loader worker raised: torch hands it over with the worker's traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return error
    return type(error)(text.splitlines()[-1].partition(": ")[2])


def policy_identity(recipe: PolicyRecipe) -> tuple[Identity, list[Path]]:
    """The identity of a run on shards, and the folders that it begins with."""
    model, data = recipe.model, recipe.data
    parts: dict[str, Any] = {"model.path": model.path, "model.adapter": model.adapter}
    if not model.path:
        encoder, language_model = model.encoder or {}, model.language_model or {}
        parts = {"model.encoder": encoder.get("path") or encoder.get("published")}
        parts["model.language_model"] = language_model.get("path")
    begun = {key: Path(path) for key, path in parts.items() if path}
    digests = recipe.tags_digest() | data.digests
    digests |= {f"weights of {key}": start_digest(path) for key, path in begun.items()}
    for key, folders in (("train", recipe.train_folders()), ("validation", data.validation)):
        if folders:
            digests[f"data.{key} (its shards)"] = data_hash(folders)
            digests[f"data.{key} (their bytes)"] = shards_digest(folders)
    places = ("model.path", "model.adapter", "data.train", "data.validation", "data.gym.recipe")
    return identity_of(recipe, digests, places), list(begun.values())


def finished(recipe: RunRecipe, position: Mapping[str, Any]) -> dict[str, Any] | None:
    """``result.json`` of the folder's run that came to its end, with all that it exported."""
    result = recipe.output / "result.json"
    if not result.is_file():
        return None
    found = read_own(result, "Delete it: the run then goes on from its last checkpoint.")
    same = all(found.get("position", {}).get(key) == value for key, value in position.items())
    return found if same and all(Path(path).is_dir() for path in found.get("exported", {}).values()) else None


def find_resume(folder: Path, resume: str, position: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from: ``auto`` takes the last complete one, ``never`` none, a path that one.

    Raises :class:`ConfigError` when its data stream (data, seed, batch, style) is not the one that `position` tells.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = complete_checkpoints(folder)
        if not found:
            return None
        checkpoint = found[-1]
    else:
        checkpoint = Path(resume)
        if not (checkpoint / COMPLETE).is_file():
            raise ConfigError(
                describe(f"resume {checkpoint}", "a complete checkpoint", "none", "Use auto, never or a path.")
            )
    saved = saved_whole(checkpoint)
    if resume == "auto" and (here := pickles(checkpoint)) and here != saved.get("pickles"):
        cure = f"Loading them runs code: if you trust who wrote them, say resume={checkpoint}, else resume=never."
        raise ConfigError(describe(f"resume from {checkpoint}", "DeepSpeed's files as they were saved", "others", cure))
    for key, value in position.items():
        if saved.get(key) != value:
            raise ConfigError(
                describe(
                    f"resume from {checkpoint}",
                    f"the same {key} as when it was saved ({saved.get(key)!r})",
                    repr(value),
                    "Set resume=never to start over, or choose another output folder.",
                )
            )
    return checkpoint
