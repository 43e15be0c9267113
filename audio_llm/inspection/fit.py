"""Does a recipe fit? What a run of it holds in memory and leaves on disk, for ``audio-llm doctor --recipe``.

Everything is told from configurations and shapes (``audio_llm.inspection.trace``); no weights are read.
The model is the run's own, with its adapters and its trained parts. A process holds, at the recipe's longest row,

    runtime + weights + optimiser + max(gradients and activations of a step, a rollout, the export) + engine + buffers

An engine that sleeps (``engine.sleep``) holds nothing while the policy learns, so of it and of gradients and
activations the larger counts.

Weights and what belongs to them are bytes of parameters as the run has them. What is kept for the gradient is counted
over the real forward and backward passes of 2 and of 4 layers and continued to all of them: layers are alike. Shards of
ZeRO (Rajbhandari et al. 2020, "ZeRO", §3) and FSDP follow their definitions; they have not been measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from audio_llm import config
from audio_llm.errors import ConfigError, describe, require
from audio_llm.model.loading import reading
from audio_llm.training.recipes import GRPORecipe, ModelRecipe, PolicyRecipe, SFTRecipe

GIB = 2**30
CUDA_RUNTIME = round(0.7 * GIB)  # a context with its kernels, and the workspaces of cuBLAS
ENGINE_RUNTIME = round(0.9 * GIB)  # vLLM in a process on a CPU, beside its weights and cache
TRAINER = 60 << 20  # libraries that a run alone imports: accelerate's engines, trackers, loaders
ADAM = 8  # bytes of AdamW's two moments in float32, for each trained parameter; STATES has other optimisers'
STATES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit", "adamw_torch_4bit"), 1),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit", "grokadamw"), 12),
    **dict.fromkeys(("adafactor", "sgd"), 0),  # a row and a column of each matrix, and nothing without a momentum
}
LIVE_PARAMETERS = 10**9  # of ZeRO-3, gathered at once: DeepSpeed's default of stage3_max_live_parameters
Way = Literal["one", "ddp", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class Launch:
    """How many processes, and what each of them holds of what is trained; `bucket` elements travel at once."""

    processes: int = 1
    way: Way = "one"
    offload: bool = False  # ZeRO-3, FSDP: weights and optimiser stay in host memory
    bucket: int = 0
    optimiser_offload: bool = False  # ZeRO: the optimiser alone does

    @property
    def shards(self) -> int:
        """Of the optimiser; those of the weights are as many, but under ZeRO-2."""
        return self.processes if self.way in ("zero2", "zero3", "fsdp") else 1


@dataclass(frozen=True)
class Room:
    """What there is, in bytes: of one GPU (`device`, None without), and free memory, disk and /dev/shm."""

    device: int | None
    memory: int | None
    disk: int | None
    shm: int | None


@dataclass
class Need:
    """What a run needs, in bytes: of each process's device by item, and of the whole machine."""

    title: str
    rows: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    batch: tuple[str, int] = ("batch_size", 1)  # the key that says how many rows a pass has, and how many these are
    host: int = 0  # of each process beside a GPU
    disk: int = 0
    shm: int = 0
    takes_turns: bool = False  # the engine sleeps while the policy learns, which has no gradients while the engine runs

    def put(self, item: str, size: float, note: str) -> None:
        self.rows[item], self.notes[item] = round(size), note

    @property
    def total(self) -> int:
        learning = self.rows.get("gradients", 0) + self.rows.get("activations", 0)
        spared = min(self.rows.get("engine", 0), learning) if self.takes_turns else 0
        return sum(self.rows.values()) - spared


def launch_of(path: Path | None, processes: int | None) -> Launch:
    """The launch by an accelerate configuration, or plain data parallel. Raises :class:`ConfigError`."""
    if path is None:
        return Launch(processes or 1, "ddp" if (processes or 1) > 1 else "one")
    tree = config.read(path)
    count = processes or int(tree.get("num_processes") or 1)
    kind = str(tree.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        return Launch(count, "fsdp", bool((tree.get("fsdp_config") or {}).get("fsdp_offload_params")))
    if kind != "DEEPSPEED":
        return Launch(count, "ddp" if count > 1 else "one")
    plugin = tree.get("deepspeed_config") or {}
    file = plugin.get("deepspeed_config_file")
    return zero_launch(count, read_zero(file, str(path)) if file is not None else plugin)


def read_zero(file: str, where: str) -> dict[str, Any]:
    """What DeepSpeed's configuration in `file` says of ZeRO. Raises :class:`ConfigError`, which begins with `where`."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"])
    except (OSError, ValueError, LookupError) as error:
        cure = "Its path is relative to the folder that you are in."
        raise ConfigError(describe(f"{where}: {file}", "a configuration of ZeRO", str(error), cure)) from error


def zero_launch(count: int, plugin: Mapping[str, Any]) -> Launch:
    """`count` processes under ZeRO, in DeepSpeed's words or in those of Accelerate's plugin."""
    stage = int(plugin.get("stage", plugin.get("zero_stage", 2)))

    def offloads(what: str) -> bool:
        group = plugin.get(f"offload_{what}") or {"device": plugin.get(f"offload_{what}_device", "none")}
        return str(group.get("device", "none")) != "none"

    bucket = plugin.get("reduce_bucket_size", "auto")
    elements = int(bucket) if str(bucket).isdigit() else 5 * 10**8  # DeepSpeed's own default
    way: Way = "zero3" if stage == 3 else "zero2"
    return Launch(count, way, stage == 3 and offloads("param"), elements, offloads("optimizer"))


# ------------------------------------------------------------------------------------------------------------- models


def model_config(recipe: ModelRecipe) -> Any:
    """The :class:`AudioLLMConfig` of what a run begins with, from configuration files alone.

    Beside what training takes, an encoder may be named by its configuration, and `path` may be a folder without
    weights. Raises :class:`CheckpointError` and :class:`ConfigError`.
    """
    import audio_llm
    from audio_llm.model.configuration import AudioLLMConfig
    from audio_llm.model.native import native_kind, read_config
    from audio_llm.model.validate import MODEL_TYPE, check_language_model, expect_files, read_facts

    audio_llm.register()
    if recipe.path:
        cure = (
            "Where it is yet to be made, name its parts: model.path= model.language_model.path=FOLDER "
            "model.encoder.name=spatial_ast (or model.encoder.path=FOLDER)."
        )
        expect_files(f"model {recipe.path}", recipe.path, ("config.json",), cure)
        if read_facts(recipe.path).get("model_type") == MODEL_TYPE:
            with reading(f"model {recipe.path}: config.json", "a configuration that can be built"):
                return AudioLLMConfig.from_pretrained(recipe.path)
        kind = native_kind(recipe.path)
        if kind is None:
            raise ConfigError(describe(f"model {recipe.path}", "a checkpoint, or a native audio model", "another"))
        layout = kind.native_layout(read_config(recipe.path))
        encoder = {"name": kind.name, **layout.encoder}
        return AudioLLMConfig(text_config=layout.text, encoder=encoder, projector=dict(layout.projector))
    from transformers import AutoConfig

    if not recipe.language_model or "path" not in recipe.language_model:
        raise ConfigError(describe("model", "a path, or language_model.path and encoder", "neither"))
    path = recipe.language_model["path"]
    gguf = check_language_model(path)
    with reading(f"model.language_model.path {path}", "a configuration"):
        where, more = (gguf.parent, {"gguf_file": gguf.name}) if gguf else (path, {})
        text = AutoConfig.from_pretrained(where, **more)
    return AudioLLMConfig(
        text_config=text.get_text_config().to_dict(),
        encoder=_encoder_config(recipe.encoder or {}),
        projector=dict(recipe.projector or {}),
    )


def _encoder_config(fields: dict[str, Any]) -> dict[str, Any]:
    import torch

    from audio_llm.model.encoder import build_encoder, encoder_config
    from audio_llm.model.validate import check_encoder

    if "path" in fields:
        heard = {key: value for key, value in fields.items() if key in ("hearing", "channels")}
        return {**check_encoder(fields["path"])["encoder"], **heard}
    with torch.device("meta"):
        return encoder_config(build_encoder(fields))


def with_layers(whole: Any, layers: int) -> Any:
    """The configuration `whole` with a language model of so many layers."""
    tree = whole.to_dict()
    text = dict(tree["text_config"], num_hidden_layers=layers)
    if text.get("layer_types"):
        text["layer_types"] = (list(text["layer_types"]) * layers)[:layers]
    return type(whole)(**{**tree, "text_config": text})


def build(whole: Any, recipe: PolicyRecipe, dtype: Any) -> Any:
    """The model that the run of `recipe` trains, without data."""
    import torch

    from audio_llm.model.modeling import AudioLLMForConditionalGeneration
    from audio_llm.training.policy import make_trainable

    with torch.device("meta"):
        with reading(f"model {recipe.model.path or recipe.output / 'start'}", "a configuration that can be built"):
            model: Any = AudioLLMForConditionalGeneration(whole)
        model.set_attn_implementation(recipe.model.attention)
        model = make_trainable(model.to(dtype), recipe.trained(), recipe.lora).train()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of distinct tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


@dataclass(frozen=True)
class Parameters:
    """Of a model in training: `numbers` of all and of what is `trained`; bytes of all `weights` and buffers, of those
    that are `adapted`, of a `plain` checkpoint and of its language model's `text`; numbers of its largest `layer`."""

    weights: int
    trained: int
    adapted: int
    plain: int
    text: int
    layer: int
    numbers: int = 0

    @classmethod
    def of(cls, model: Any) -> Parameters:
        from torch import nn

        named = dict(model.named_parameters())
        blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
        plain = {name: p for name, p in named.items() if ".original_module." not in name and ".lora_" not in name}
        return cls(
            weights=size_of([*named.values(), *model.buffers()]),
            trained=sum(p.numel() for p in named.values() if p.requires_grad),
            adapted=size_of(p for name, p in named.items() if name.endswith(".base_layer.weight")),
            plain=size_of(plain.values()),
            text=size_of(p for name, p in plain.items() if ".language_model." in name or "lm_head" in name),
            layer=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
            numbers=sum(p.numel() for p in plain.values()),
        )


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Rows:
    """What a recipe does not say of its rows: the `windows` of sound in one, and tokens of its `prompt` (None: in SFT
    no more than the sound, so that all else is supervised; in GRPO what the longest reply leaves)."""

    windows: int = 1
    prompt: int | None = None


def policy_need(recipe: PolicyRecipe, launch: Launch, device: int | None, longest: Rows) -> Need:
    """What a run of SFT or GRPO needs on devices of `device` bytes (None: a CPU)."""
    if isinstance(recipe, GRPORecipe):
        require("trl", "a sum for GRPO", "train")
        import torch

        from audio_llm.training.scoring import size_tiles

        size_tiles(torch.device("cpu" if device is None else "cuda"))
    half, dtype = _precision(recipe, launch, device)
    whole = model_config(recipe.model)
    if isinstance(recipe, GRPORecipe):
        step = _grpo_step(recipe, whole, launch, longest)
    else:
        assert isinstance(recipe, SFTRecipe)
        step = _sft_step(recipe, whole, longest)
    need = Need(step.title, batch=step.batch)

    parts = _parameters(recipe, whole, dtype)
    kept = _peak(recipe, whole, dtype, step, half)

    _put_runtime(need, device)
    _put_states(need, recipe, whole, launch, device, parts, half, step.rows.prompt + step.rows.reply)
    phases = {f"a pass of {step.words}": kept, "export": 0 if device is not None else parts.adapted}
    if "rollout" in need.rows:
        phases[need.notes.pop("rollout")] = need.rows.pop("rollout")
    largest = max(phases, key=lambda name: phases[name])
    need.put("activations", max(0, phases[largest] - 4 * parts.trained), largest)

    states, in_full = _states(recipe), recipe.trained().language_model == "full"
    saved = (parts.weights if in_full else 4 * parts.trained) + states * parts.trained
    checkpoints = recipe.keep_checkpoints + 1 if recipe.save_steps else 0
    exported = {*recipe.export} | ({"merged"} if in_full and recipe.export else set())
    need.disk = checkpoints * saved + len(exported) * parts.plain + (0 if recipe.model.path else 4 * parts.numbers)
    if device is not None:
        offloaded = (parts.weights if launch.offload else 0) // launch.shards
        if launch.offload or launch.optimiser_offload:
            offloaded += (4 + states) * parts.trained // launch.shards
        need.host += 2 * GIB + max(parts.weights + offloaded, parts.plain + parts.adapted)  # read whole, exported there
    return need


def least_need(recipe: PolicyRecipe, launch: Launch, device: int | None) -> Need:
    """What a run holds whatever its rows are: weights, gradients, optimiser and engine. In seconds."""
    half, dtype = _precision(recipe, launch, device)
    whole = model_config(recipe.model)
    need = Need("GRPO" if isinstance(recipe, GRPORecipe) else "SFT")
    _put_states(need, recipe, whole, launch, device, _parameters(recipe, whole, dtype), half, 1)
    for item in ("buffers", "rollout"):
        need.rows.pop(item, None)
    if str(_settings(recipe).get("optim")).startswith("paged"):  # its states may lie in host memory
        need.rows["optimiser"] = 0
    return need


def _parameters(recipe: PolicyRecipe, whole: Any, dtype: Any) -> Parameters:
    from audio_llm.model.quantization import bytes_saved

    model = build(whole, recipe, dtype)
    found, kind = Parameters.of(model), recipe.model.quantization
    return dataclasses.replace(found, weights=found.weights - bytes_saved(model, kind)) if kind else found


def _precision(recipe: PolicyRecipe, launch: Launch, device: int | None) -> tuple[bool, Any]:
    """(whether a run computes in bfloat16, the dtype of its frozen weights)."""
    import torch

    from audio_llm.training.policy import resolve_precision

    auto = "bf16" if device is not None else resolve_precision("auto")
    half = (auto if recipe.precision == "auto" else recipe.precision) == "bf16"
    in_full = recipe.trained().language_model == "full"
    return half, torch.bfloat16 if half and not in_full and launch.way != "fsdp" else torch.float32


def _put_states(
    need: Need,
    recipe: PolicyRecipe,
    whole: Any,
    launch: Launch,
    device: int | None,
    parts: Parameters,
    half: bool,
    longest: int,
) -> None:
    """All that lies beside the activations of a step of rows of at most `longest` tokens."""
    for item, (size, note) in trained_rows(parts, launch, half, _states(recipe)).items():
        need.put(item, size, note)
    if not isinstance(recipe, GRPORecipe):
        return
    _put_engine(need, recipe, whole, launch, device, parts.text, half, longest)
    if recipe.trained().language_model == "full" and recipe.grpo.get("beta", 0.0):
        need.put("reference", parts.weights / (launch.processes if launch.way == "zero3" else 1), "for beta > 0")


@dataclass(frozen=True)
class _Step:
    """The largest pass of a recipe, in words and in numbers, and `passes` to an update."""

    title: str
    words: str
    batch: tuple[str, int]
    rows: Any  # a trace.Batch
    passes: int


def _sft_step(recipe: SFTRecipe, whole: Any, longest: Rows) -> _Step:
    from audio_llm.inspection.trace import Batch
    from audio_llm.training import sft  # noqa: F401  (what a run imports is counted)

    length, sound = recipe.data.max_length, longest.windows * _window_tokens(whole)
    prompt = max(sound, longest.prompt or 0)
    if prompt >= length:
        raise ConfigError(describe("data.max_length", f"more than {prompt}, the prompt's tokens", f"{length}"))
    rows, windows = recipe.batch_size, f"{longest.windows} window{'s' * (longest.windows > 1)} of sound"
    words = f"{rows} rows of {length} tokens, {length - prompt} supervised, {windows}"
    batch = Batch(rows, prompt, length - prompt, rows * longest.windows, rows)
    return _Step("SFT", words, ("batch_size", rows), batch, recipe.gradient_accumulation)


def _grpo_step(recipe: GRPORecipe, whole: Any, launch: Launch, longest: Rows) -> _Step:
    from audio_llm.inspection.trace import Batch
    from audio_llm.training.launch import batch_layout

    reply, limit = recipe.max_completion_length, _longest(recipe, whole)
    prompt = longest.prompt or limit - reply
    if not 0 < prompt <= limit - reply:
        expected = f"room for a prompt{f' of {prompt}' if prompt > 0 else ''} beside max_completion_length, {reply}"
        raise ConfigError(describe("engine.max_model_len", expected, f"{limit}"))
    rows, passes = batch_layout(recipe, launch.processes)
    prompts = (
        math.ceil(rows / recipe.group_size) if recipe.share_prompts and not recipe.gradient_checkpointing else rows
    )
    words = f"{rows} replies of {reply} tokens to {prompts} prompt{'s' * (prompts > 1)} of {prompt}"
    batch = Batch(rows, prompt, reply, prompts * longest.windows, prompts)
    return _Step("GRPO", words, ("micro_batch_size", rows), batch, passes)


def _longest(recipe: GRPORecipe, whole: Any) -> int:
    """Tokens of prompt and reply: as far as the engine goes."""
    return min(int(whole.text_config.max_position_embeddings), recipe.engine.max_model_len or 4096)


def _window_tokens(whole: Any) -> int:
    import torch

    from audio_llm.model.encoder import build_encoder

    with torch.device("meta"):
        return int(whole.window_tokens(build_encoder(dict(whole.encoder)).window_samples))


def _peak(recipe: PolicyRecipe, whole: Any, dtype: Any, step: _Step, half: bool) -> int:
    """Most bytes of a step beside weights and optimiser, of all layers by those of few."""
    from audio_llm.inspection.trace import policy_step

    layers = int(whole.text_config.num_hidden_layers)
    few = [2, 4] if layers > 4 else [layers]
    peaks = []
    for count in few:
        model = build(with_layers(whole, count), recipe, dtype)
        score = _fused_score(model, recipe, step) if isinstance(recipe, GRPORecipe) else None
        peaks.append(policy_step(model, step.rows, half, step.passes, score))
    if len(peaks) == 1:
        return peaks[0]
    return max(peaks[0] + (peaks[1] - peaks[0]) * (layers - few[0]) // (few[1] - few[0]), 0)


def _fused_score(model: Any, recipe: GRPORecipe, step: _Step) -> Callable[..., Any]:
    """GRPO's forward pass: TRL's head, which scores in tiles, and prompts that replies share."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from audio_llm.model.modeling import SharedPrompt

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base, recipe.temperature, outputs=("log_probs", "entropy"))
    rows = step.rows

    def score(model: Any, arguments: dict[str, Any]) -> Any:
        more: dict[str, Any] = {}
        if rows.prompts < rows.rows:
            more["shared_prompt"] = SharedPrompt(torch.empty(rows.rows, dtype=torch.long), rows.prompt)
            arguments["labels"] = arguments["labels"][:, rows.prompt - 1 :]
        return model(**arguments, **more, fused_lm_head=True).log_probs[:, -rows.reply :].mean()

    return score


def _settings(recipe: PolicyRecipe) -> Mapping[str, Any]:
    return recipe.grpo if isinstance(recipe, GRPORecipe) else getattr(recipe, "trainer", {})


def _states(recipe: PolicyRecipe) -> int:
    """Bytes of the optimiser's states for a trained parameter."""
    return STATES.get(str(_settings(recipe).get("optim", "adamw")), ADAM)


def _put_runtime(need: Need, device: int | None) -> None:
    if device is not None:
        need.put("runtime", CUDA_RUNTIME, "CUDA's context and workspaces")
    else:
        need.put("runtime", resident() + TRAINER, "Python and its libraries: those of this process and of a trainer")


def trained_rows(parts: Parameters, launch: Launch, half: bool, states: int) -> dict[str, tuple[float, str]]:
    """Bytes of weights, gradients, optimiser (`states` bytes for a trained parameter) and buffers of one process."""
    shards, weights, trained = launch.shards, parts.weights, parts.trained
    size = 2 if half else 4
    if launch.way in ("one", "ddp"):
        rows: dict[str, tuple[float, str]] = {
            "weights": (weights, "frozen ones in their dtype, trained ones in float32"),
            "gradients": (4 * trained, f"of {trained:,} trained parameters"),
            "optimiser": (states * trained, "AdamW's moments" if states == ADAM else "of the one that is named"),
        }
        return rows | ({"buffers": (4 * trained, "gradients on their way (DDP)")} if launch.way == "ddp" else {})
    here = 0 if launch.offload else 1
    if launch.way == "fsdp":
        return {
            "weights": (here * weights / shards, f"1/{shards} of all, float32"),
            "gradients": (here * 4 * trained / shards, f"1/{shards}"),
            "optimiser": (here * states * trained / shards, f"1/{shards}"),
            "buffers": (2 * size * parts.layer, "two layers, gathered"),
        }
    whole, kept = launch.way == "zero2", 0 if launch.offload or launch.optimiser_offload else 1
    bucket, gathered = min(launch.bucket, trained) * size, 0 if whole else min(weights, LIVE_PARAMETERS * size)
    return {
        "weights": (weights if whole else here * weights / shards, "all" if whole else f"1/{shards} of all"),
        "gradients": (size * trained / shards, f"1/{shards}"),
        "optimiser": (kept * (4 + states) * trained / shards, f"1/{shards}, with weights in float32"),
        "buffers": (2 * bucket + gathered, "of DeepSpeed: buckets" + ("" if whole else ", gathered weights")),
    }


def _put_engine(
    need: Need,
    recipe: GRPORecipe,
    whole: Any,
    launch: Launch,
    device: int | None,
    text: int,
    half: bool,
    longest: int,
) -> None:
    """The engine that samples: vLLM with its weights and cache, or the model's own cache in Transformers."""
    from importlib.util import find_spec

    engine, model = recipe.engine, whole.text_config
    backend = engine.backend
    if backend == "auto":
        backend = "vllm" if find_spec("vllm") is not None else "transformers"
    rows = recipe.prompts_per_step * recipe.group_size // launch.processes
    size = 2 if half else 4
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    sequence = 2 * model.num_hidden_layers * heads * width * size * longest  # keys and values
    if backend == "transformers":
        rows = min(rows, engine.batch_size or rows)
        scores = rows * recipe.max_completion_length * model.vocab_size * 4  # Transformers keeps those of every token
        need.put("rollout", rows * sequence + scores, f"a rollout of {rows} replies (cache and scores)")
        return
    if backend == "vllm_http" and engine.url:
        need.notes["engine"] = "another process's"
        return
    if device is not None:
        share = round(engine.gpu_memory_utilization * device)
        text, sequence = (-(-size // engine.tensor_parallel_size) for size in (text, sequence))  # of each of its GPUs
        at_once = max(0, share - text) // sequence
        note = f"engine.gpu_memory_utilization {engine.gpu_memory_utilization:g}: weights {text / GIB:.1f} GiB"
        note += f", cache for {at_once} of {rows} sequences"
        if engine.sleep and backend == "vllm":
            need.takes_turns = True
            need.host += text  # where its weights wait
            note += "; asleep in a step, so the total has the larger of it and gradients with activations"
        need.put("engine", share, note)
        if at_once < 1:
            need.notes["too small"] = "engine"
    else:
        import os

        said = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "1"
        if not said.isdecimal():
            raise ConfigError(describe("environment variable VLLM_CPU_KVCACHE_SPACE", "a number of GiB", f"'{said}'"))
        cache = int(said) * GIB
        need.put("engine", text + cache + ENGINE_RUNTIME, f"vLLM: weights, {cache / GIB:g} GiB of cache, itself")
    if engine.sync == "adapter" or (engine.sync == "auto" and device is not None):
        need.shm = text * (launch.processes if backend == "vllm" else 1)  # what engines read their base from


def task_need(recipe: Any, launch: Launch, device: int | None) -> Need:
    """What a run of ``audio-llm train`` with an encoder needs; its heads, which are small, are left out."""
    import torch

    from audio_llm.inspection.trace import encoder_pass
    from audio_llm.model.encoder import build_encoder

    fields = _encoder_config({"path": recipe.init} if recipe.init else recipe.encoder)
    with torch.device("meta"):
        encoder = build_encoder(fields).train()
    weights = size_of([*encoder.parameters(), *encoder.buffers()])
    trained = 0 if recipe.unfreeze == 0 else sum(p.numel() for p in encoder.parameters())
    clips = max(1, recipe.batch_size // launch.processes)
    half = recipe.precision == "bf16" or (recipe.precision == "auto" and device is not None)
    encoder.gradient_checkpointing = recipe.gradient_checkpointing
    _, most, kept = encoder_pass(encoder, clips, half, trained > 0)
    need = Need(f"encoder {encoder.name}", batch=("batch_size", clips))
    _put_runtime(need, device)
    need.put("weights", weights, "float32" + (", and their moving average" if recipe.ema else ""))
    need.rows["weights"] *= 2 if recipe.ema else 1
    need.put("gradients", 4 * trained, f"of {trained:,} trained parameters")
    need.put("optimiser", ADAM * trained, "AdamW's moments")
    if launch.processes > 1:
        need.put("buffers", 4 * trained, "of gradients on their way (DDP)")
    need.put("activations", max(most, kept), f"{clips} clips of {encoder.window_seconds:g} s")
    held = round(recipe.memory_gib * GIB)
    if device is None:
        need.put("clips", held, "memory_gib: what of the corpus is kept decoded, at most")
    need.host = 0 if device is None else 2 * GIB + weights + held
    need.disk = 2 * (weights + ADAM * trained) + weights
    return need


# --------------------------------------------------------------------------------------------------------- judgement


def resident() -> int:
    """Bytes of this process's memory, that of libraries included; what a training process has before its model."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return GIB
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def problems(need: Need, launch: Launch, room: Room) -> list[str]:
    """What does not fit, each with what to change, in one sentence."""
    found = []
    processes = launch.processes
    own = need.total if room.device is None else need.host
    device = room.device if room.device is not None else (room.memory // processes if room.memory is not None else None)
    if need.notes.get("too small"):
        found.append(
            "The engine's share does not hold its weights and one sequence: raise engine.gpu_memory_utilization."
        )
    if device is not None and need.total > device:
        found.append(f"A process needs {need.total / GIB:.2f} of {device / GIB:.2f} GiB: {cure_of(need, device)}.")
    if room.device is not None and room.memory is not None and own * processes > room.memory:
        found.append(
            f"{processes} processes read the model into {own * processes / GIB:.1f} GiB of host memory, "
            f"{room.memory / GIB:.1f} are free: start fewer processes on this machine."
        )
    for item, size, free, cure in (
        ("disk", need.disk, room.disk, "set output= to a larger one, or lower keep_checkpoints"),
        ("/dev/shm", need.shm, room.shm, "mount -o remount,size=… /dev/shm, or set engine.sync: merged"),
    ):
        if free is not None and size > free:
            found.append(f"{item} needs {size / GIB:.1f} GiB, {free / GIB:.1f} are free: {cure}.")
    return found


def cure_of(need: Need, device: int) -> str:
    """What to change where a process needs more than `device` bytes."""
    activations, (key, rows) = need.rows.get("activations", 0), need.batch
    rest = device - (need.total - activations)
    fitting = int(rows * rest / activations) if activations else 0
    if 1 <= fitting < rows:
        return f"set {key} to {fitting} or less"
    if rest > 0:
        return "set gradient_checkpointing: true, or shorten the longest row (data.max_length, engine.max_model_len)"
    largest = max(need.rows, key=lambda item: need.rows[item])
    return {
        "engine": "lower engine.gpu_memory_utilization, or give rollouts a server of their own (engine.url)",
        "weights": "shard the model (recipes/accelerate/zero3.yaml on more processes), or take a smaller one",
        "clips": "lower memory_gib",
    }.get(largest, "train adapters (train: {language_model: lora}), or shard what is trained (zero2.yaml, zero3.yaml)")


def table(need: Need, launch: Launch, room: Room) -> str:
    """The sum as text."""
    place = "GPU" if room.device is not None else "process on the CPU"
    lines = [
        f"{need.title}: {launch.processes} process{'es' * (launch.processes > 1)} ({launch.way}); GiB of each {place}"
    ]
    for item, size in need.rows.items():
        lines.append(f"  {item:<12}{size / GIB:>9.2f}  {need.notes.get(item, '')}")
    lines.append(f"  {'total':<12}{need.total / GIB:>9.2f}  of {_free(room.device or room.memory)}")
    whole = need.host * launch.processes if room.device is not None else need.total * launch.processes
    for item, size, free in (
        ("host memory", whole, room.memory),
        ("disk", need.disk, room.disk),
        ("/dev/shm", need.shm, room.shm),
    ):
        lines.append(f"  {item:<12}{size / GIB:>9.2f}  of {_free(free)}, all processes")
    return "\n".join(lines)


def _free(size: int | None) -> str:
    return "what cannot be told" if size is None else f"{size / GIB:.2f}"


def judge(recipe: Any, launch: Launch, room: Room, longest: Rows = Rows()) -> tuple[Need, list[str]]:
    """The need of `recipe` (SFT, GRPO, or an encoder's) and what of it does not fit."""
    policy = isinstance(recipe, PolicyRecipe)
    need = policy_need(recipe, launch, room.device, longest) if policy else task_need(recipe, launch, room.device)
    return need, problems(need, launch, room)


def as_json(need: Need, launch: Launch, room: Room, found: list[str]) -> dict[str, Any]:
    """The same for programs; bytes."""
    return {"ok": not found, "need": dataclasses.asdict(need) | {"total": need.total}, "problems": found} | {
        "launch": dataclasses.asdict(launch),
        "room": dataclasses.asdict(room),
    }
