"""What SFT and GRPO share: what is trained, how a run is launched, logged, stopped, saved and resumed.

Both use the Transformers ``Trainer`` (TRL's trainers are subclasses of it), so everything here is either a setting of
the model before the trainer sees it, or a trainer callback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from audio_llm import config
from audio_llm.checkpoints.export import export_trained, unpartitioned
from audio_llm.checkpoints.validate import LORA_TARGETS
from audio_llm.errors import AudioLLMError, ConfigError, PrerequisiteError, TrainingError, describe
from audio_llm.files import append_line, read_lines, write_json, write_lines

ENCODER, PROJECTOR, LANGUAGE_MODEL = "model.audio_encoder", "model.projector", "model.language_model"
STALE_MINUTES = 30  # a build takes half a minute, a few on a very busy machine
COMPLETE = "complete.json"  # the last file of a checkpoint: without it, the checkpoint was cut off while being written


# --------------------------------------------------------------------------------------------------------- the recipe


@dataclass
class LoRARecipe:
    """Low-rank adapters (Hu et al. 2021) on the attention and MLP linears of the language model."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    rank_stabilized: bool = False


@dataclass
class ModelRecipe:
    """Either `path` (a checkpoint folder) or the three parts to assemble one from.

    `encoder` is ``{path: folder}`` or ``{name: beats, published: file}``; `train` in it is frozen, lora or full, and
    `channels` what an encoder of mono hears of two channels: left, right, mean or each.
    """

    path: Path | None = None
    encoder: dict[str, Any] | None = None
    language_model: dict[str, Any] | None = None
    projector: dict[str, Any] | None = None
    attention: str = "sdpa"


Precision = Literal["auto", "fp32", "bf16"]
EncoderTraining = Literal["frozen", "lora", "full"]
ProjectorTraining = Literal["full", "frozen"]


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16"]:
    """``auto`` is bf16 where the accelerator computes it natively, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


# ---------------------------------------------------------------------------------------------------------- the model


def starting_folder(recipe: ModelRecipe, output: Path) -> Path:
    """The checkpoint folder a recipe starts from; parts are assembled once into ``output/start``.

    Raises :class:`ConfigError` when the recipe names neither a checkpoint nor all parts.
    """
    return recipe.path or assemble(recipe, output / "start")


def load_model(folder: Path, recipe: ModelRecipe, dtype: torch.dtype = torch.float32) -> Any:
    """The model in `folder`, with the attention the recipe asks for."""
    from audio_llm.checkpoints import build

    with unpartitioned():
        return build.load_model(folder, dtype=dtype, attn_implementation=recipe.attention)


def assemble(recipe: ModelRecipe, folder: Path) -> Path:
    """Build the starting checkpoint from the parts; the first process builds, the others wait for it."""
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from audio_llm.checkpoints.build import build_checkpoint
    from audio_llm.checkpoints.encoder import open_encoder

    missing = "model: expected 'path', or parts to assemble;"
    if not recipe.encoder or not {"path", "published"} & set(recipe.encoder):
        raise ConfigError(f"{missing} encoder.path, or encoder.name with encoder.published, is missing.")
    if not recipe.language_model or "path" not in recipe.language_model:
        raise ConfigError(f"{missing} language_model.path is missing.")
    with PartialState().main_process_first():
        if not (folder / "config.json").is_file():
            path = recipe.language_model["path"]
            build_checkpoint(
                folder,
                encoder=open_encoder({key: value for key, value in recipe.encoder.items() if key != "train"}),
                language_model=AutoModelForCausalLM.from_pretrained(path),
                tokenizer=AutoTokenizer.from_pretrained(path),
                projector=recipe.projector,
            )
    return folder


def encoder_training(recipe: Any) -> EncoderTraining:
    """What a recipe trains of the encoder: its `encoder`, or `train` beside the encoder's name in `model`."""
    beside = (recipe.model.encoder or {}).get("train")
    if beside is None:
        return recipe.encoder
    if beside not in get_args(EncoderTraining) or recipe.encoder not in ("frozen", beside):
        found = f"model.encoder.train: {beside} and encoder: {recipe.encoder}"
        raise ConfigError(describe("training of the encoder", f"one of {', '.join(get_args(EncoderTraining))}", found))
    return beside


def encoder_targets(model: nn.Module) -> list[str]:
    """Full names of the encoder's layers that LoRA wraps: its linears or, where it has none, its 2-d convolutions.

    ``nn.MultiheadAttention`` reads its output projection's weight without calling it, so that one cannot be wrapped.
    """
    inside_attention = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    layers = {name: module for name, module in model.named_modules() if name.startswith(f"{ENCODER}.")}
    linears = [
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear) and not name.startswith(inside_attention or ("\0",))
    ]
    return linears or [name for name, module in layers.items() if isinstance(module, nn.Conv2d) and _is_plain(module)]


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether B A, of a convolution like it and one of 1x1, is a kernel that can be added to its own."""
    return convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.padding_mode == "zeros"


def lora_config(model: nn.Module, lora: LoRARecipe, encoder: EncoderTraining, projector: ProjectorTraining) -> Any:
    """The PEFT configuration of a run: language-model linears, the projector in full, the encoder as asked for."""
    from peft import LoraConfig

    targets = LORA_TARGETS
    if encoder == "lora":
        names = encoder_targets(model)
        if not names:
            raise ConfigError("encoder: lora, but the encoder has no layer that LoRA can wrap; use frozen or full.")
        targets = f"{targets}|{'|'.join(re.escape(name) for name in names)}"
    whole = [PROJECTOR] if projector == "full" else []
    if encoder == "full":
        whole.append(ENCODER)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules=targets,
        modules_to_save=whole or None,
    )


def make_trainable(
    model: Any, *, lora: LoRARecipe | None, encoder: EncoderTraining = "frozen", projector: ProjectorTraining = "full"
) -> Any:
    """Set what is trained and return the model: wrapped by PEFT with `lora`, else its whole language model trains.

    Trained parameters are float32, whatever the frozen ones are: an update of 1e-5 is lost in bfloat16's 8 bits.
    """
    if encoder == "lora" and lora is None:
        raise ConfigError("encoder: lora needs a 'lora' group in the recipe.")
    # The model itself keeps an encoder without trained parameters in evaluation mode and outside of the graph.
    model.get_submodule(ENCODER).requires_grad_(encoder != "frozen")
    model.get_submodule(PROJECTOR).requires_grad_(projector == "full")
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, lora, encoder, projector))
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # DeepSpeed keeps its own float32 copies
            parameter.data = parameter.data.float()
    return model


def trainable_map(model: nn.Module) -> dict[str, Any]:
    """Parameters of each part: how many, how many are trained, and the names of the trained ones."""
    parts: dict[str, dict[str, int]] = {}
    names = []
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT's untouched copy of a module that is trained in full
            continue
        # Under ZeRO-3 a parameter is an empty local stub; DeepSpeed keeps its true size in ds_numel.
        count = getattr(parameter, "ds_numel", parameter.numel())
        part = next(
            (p for p in (ENCODER, PROJECTOR, LANGUAGE_MODEL) if p in name), "lm_head" if "lm_head" in name else "other"
        )
        entry = parts.setdefault(part.removeprefix("model."), {"parameters": 0, "trained": 0})
        entry["parameters"] += count
        if parameter.requires_grad:
            entry["trained"] += count
            names.append(name)
    total = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "trained")}
    return {"parts": parts, "total": total, "trained_names": names}


def trained_model(recipe: Any, start: Path, dtype: torch.dtype) -> Any:
    """The model in `start` with what the recipe trains, seeded; the first process lists it in ``trainable.json``."""
    from accelerate import PartialState
    from transformers import set_seed

    set_seed(recipe.seed)
    model = load_model(start, recipe.model, dtype)
    model = make_trainable(model, lora=recipe.lora, encoder=encoder_training(recipe), projector=recipe.projector)
    trainable = trainable_map(model)
    if PartialState().is_main_process:
        write_json(recipe.output / "trainable.json", trainable)
        print_trainable(trainable)
    return model


def exported(recipe: Any, trainer: Any, processor: Any) -> dict[str, str]:
    """Export in the recipe's forms, by all processes together; the folders as ``result.json`` lists them."""
    folders = export_trained(trainer, processor, recipe.output, recipe.export)
    return {form: str(folder) for form, folder in folders.items()}


def print_trainable(summary: Mapping[str, Any]) -> None:
    """One line per part, then the total."""
    for part, counts in [*summary["parts"].items(), ("total", summary["total"])]:
        share = counts["trained"] / max(counts["parameters"], 1)
        print(f"  {part:<16} {counts['parameters']:>14,} parameters, {counts['trained']:>13,} trained ({share:.1%})")


# --------------------------------------------------------------------------------------------------------- the launch


def prepare_torch() -> None:
    """Settings every training process needs, before the trainer is built (idempotent)."""
    # When several CPU processes train, Trainer reloads states with map_location="cpu:0"; torch knows only "cpu".
    if not getattr(torch.serialization, "_audio_llm_cpu_index", False):
        torch.serialization.register_package(5, lambda _: None, _restore_numbered_cpu)
        torch.serialization._audio_llm_cpu_index = True  # type: ignore[attr-defined]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
    # DeepSpeed calls collectives by their old names: a warning per step and process, which nobody here can act on.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit():
        torch.set_num_threads(int(threads))


def trainer_settings(recipe: Any) -> dict[str, Any]:
    """What SFT and GRPO recipes have in common, in Trainer's words; ``max_steps`` is set when the data is known."""
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
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 1,
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
    )


def data_hash(folders: Sequence[Path]) -> str:
    """First 16 hex digits of the SHA-256 of the folders' ``sizes.json``, which hold the checksums of their shards."""
    sizes = hashlib.sha256()
    for folder in folders:
        sizes.update((folder / "sizes.json").read_bytes())
    return sizes.hexdigest()[:16]


def _restore_numbered_cpu(storage: Any, location: Any) -> Any:
    return storage if str(location).startswith("cpu:") else None


def launched_processes(environment: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """How many processes the launcher was asked for, as far as its environment tells, and which variable tells it.

    ``accelerate launch`` without ``--multi_gpu`` starts a single process whatever ``--num_processes`` says; what it
    leaves behind then is a rendezvous address without a world size, which means "more than one": reported as 2.
    """
    env = os.environ if environment is None else environment
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if env.get(name, "").isdigit():
            return int(env[name]), name
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        return 2, "MASTER_ADDR without WORLD_SIZE, left by accelerate launch with num_processes > 1"
    return None, ""


def check_launch(world_size: int, expected: int | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`TrainingError` when a launch for several processes became fewer, silently.

    `expected` is what the recipe (``processes``) or the command line (``--expect-processes``) states.
    """
    cure = (
        "Start several processes with 'accelerate launch --config_file recipes/accelerate/cpu_2.yaml -m audio_llm …', "
        "'accelerate launch --multi_gpu --num_processes N' (without --cpu, also on a machine without GPU) or torchrun."
    )
    if expected is not None and expected != world_size:
        raise TrainingError(describe("launch", f"{expected} processes (as stated)", f"{world_size}", cure))
    asked, source = launched_processes(environment)
    if asked is not None and asked > 1 and world_size == 1:
        raise TrainingError(describe("launch", f"several processes ({source})", "1", cure))


def check_build_locks(environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`PrerequisiteError` for the lock of a DeepSpeed build that was killed: torch would wait for ever."""
    env = os.environ if environment is None else environment
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    root = Path(env.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in root.glob("**/deepspeed_*/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > STALE_MINUTES:
            found = f"the lock of one begun {minutes:.0f} minutes ago"
            raise PrerequisiteError(describe("DeepSpeed", "a finished build", found, f"Remove it: rm {lock}"))


def plain_error(error: AudioLLMError) -> AudioLLMError:
    """The message alone of an error that a loader worker raised: torch hands it over with the worker's traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return error
    return type(error)(text.splitlines()[-1].partition(": ")[2])


# ------------------------------------------------------------------------------------------------- logging and saving


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log beyond `step`: a resumed run does these steps again."""
    if path.is_file():
        write_lines(path, [record for record in read_lines(path) if record.get("step", 0) <= step])


def quiet(trainer: Any) -> None:
    """Replace Trainer's printing by :class:`Progress`; the numbers go to ``metrics.jsonl``."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())


class MetricsFile(TrainerCallback):
    """``metrics.jsonl``: one line per logged step, full precision, with samples seen and seconds of training."""

    def __init__(self, path: Path, samples_per_step: int, dataset_size: int):
        self.path, self.samples_per_step, self.dataset_size = path, samples_per_step, dataset_size
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            forget_after(self.path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        samples = state.global_step * self.samples_per_step
        record = {"step": state.global_step, "samples": samples, "epoch": samples / max(self.dataset_size, 1)}
        record |= {key: value for key, value in logs.items() if key != "epoch"}
        append_line(self.path, record | {"seconds": round(time.monotonic() - self.started, 3)})


class Progress(ProgressCallback):
    """One bar with the newest loss beside it; Trainer's own prints a line per logged step."""

    SHOWN = ("loss", "eval_loss", "learning_rate", "reward", "kl")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in self.SHOWN}
            if shown:
                self.training_bar.set_postfix(shown)


class Checkpoints(TrainerCallback):
    """Mark a checkpoint complete after its last file, then drop the oldest beyond `keep`.

    The trainer's own rotation runs before the new checkpoint is known to be whole, so it is switched off
    (``save_total_limit=None``). `position` goes into the marker: the coordinates of the data stream.
    """

    def __init__(self, folder: Path, keep: int, position: Mapping[str, Any]):
        self.folder, self.keep, self.position = folder, keep, dict(position)

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its own files (random states, ZeRO partitions)
        if not state.is_world_process_zero:
            return
        newest = self.folder / f"checkpoint-{state.global_step}"
        write_json(newest / COMPLETE, {"step": state.global_step, **self.position})
        for old in complete_checkpoints(self.folder)[: -self.keep or None]:
            (old / COMPLETE).unlink()  # first, so that a removal that is cut off does not look complete
            shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def claim(recipe: Any, position: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Path | None]:
    """The result where this very run is finished; else the checkpoint to go on from, and the run folder made ready."""
    from accelerate import PartialState

    if recipe.resume != "never" and (done := finished(recipe.output, recipe, position)):
        return done, None
    checkpoint = find_resume(recipe.output, recipe.resume, position)
    PartialState().wait_for_everyone()  # all have read the run folder before the first process changes it
    if PartialState().is_main_process:
        recipe.output.mkdir(parents=True, exist_ok=True)
        (recipe.output / "result.json").unlink(missing_ok=True)
        config.dump(recipe, recipe.output / "recipe.yaml")
    return None, checkpoint


def finished(folder: Path, recipe: Any, position: Mapping[str, Any]) -> dict[str, Any] | None:
    """``result.json`` of a run of the same recipe on the same data that came to its end, with all that it exported."""
    import yaml

    result, resolved = folder / "result.json", folder / "recipe.yaml"
    if not (result.is_file() and resolved.is_file()):
        return None
    found = json.loads(result.read_text())
    then, now = yaml.safe_load(resolved.read_text()), json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    same = {**then, "resume": None} == {**now, "resume": None} and found.get("position") == dict(position)
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
    saved = json.loads((checkpoint / COMPLETE).read_text())
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


class TimeBudget(TrainerCallback, ExportableState):
    """Stop after `seconds` of training, counted from the first step (after loading and compiling), over all resumes.

    All processes follow the clock of the first one, so that they stop at, and schedule by, the same step.
    """

    def __init__(self, seconds: float, elapsed: float = 0.0):
        self.seconds, self.elapsed, self._last = seconds, elapsed, time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds}, "attributes": {"elapsed": self.elapsed}}

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, 0 to 1."""
        return min(self.elapsed / self.seconds, 1.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        elapsed = torch.tensor(self.elapsed + now - self._last, dtype=torch.float64, device=args.device)
        self._last = now
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(elapsed, src=0)
        self.elapsed = float(elapsed)
        if self.elapsed >= self.seconds:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        return control


class BudgetedSchedule:
    """A mix-in for Trainer: under a :class:`TimeBudget` the rate decays with steps or time, whichever is ahead."""

    args: Any
    optimizer: Any
    lr_scheduler: Any
    callback_handler: Any

    def _time_budget(self) -> TimeBudget | None:
        # looked up every time, because Trainer replaces its callbacks by new ones when it resumes
        return next((found for found in self.callback_handler.callbacks if isinstance(found, TimeBudget)), None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's without a budget, and for a constant rate."""
        if self._time_budget() is None or self.args.lr_scheduler_type == "constant_with_warmup":
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self._budget_rate(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _budget_rate(self, step: int, steps: int) -> float:
        budget = self._time_budget()
        warmup = min(1.0, (step + 1) / self.args.warmup_steps) if self.args.warmup_steps else 1.0
        progress = max(step / steps, budget.progress if budget else 0.0)
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if self.args.lr_scheduler_type == "cosine" else 1 - progress
        return warmup * decay


class StopOnNaN(TrainerCallback):
    """A loss that is not a number never comes back; the checkpoint before it is worth more than hours after it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and loss != loss:
            raise TrainingError(
                describe(
                    f"step {state.global_step}", "a finite loss", "NaN", "Lower learning_rate, or use precision=fp32."
                )
            )
