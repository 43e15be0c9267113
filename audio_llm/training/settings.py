"""What a recipe may tell Transformers' Trainer and TRL in their own words: ``trainer:`` (SFT) and ``grpo:`` (GRPO).

Anything that these know is passed on, but for what a recipe says with a key of its own, and for what would do nothing
here or break what a run promises. Those are refused by name: a setting without effect would be believed.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from audio_llm import config
from audio_llm.errors import ConfigError, describe, nearest, require

# Settings that a recipe states in its own words, because they must agree with something else in it.
OWN_WORDS = {
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule",
    "warmup_steps": "warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "weight_decay": "weight_decay",
    "bf16": "precision",
    "fp16": "precision",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "seed": "seed",
    "data_seed": "seed",
    "save_strategy": "save_steps",
    "save_steps": "save_steps",
    "save_total_limit": "keep_checkpoints",
    "logging_strategy": "log_steps",
    "logging_steps": "log_steps",
    "eval_strategy": "eval_steps",
    "eval_steps": "eval_steps",
    "report_to": "report_to",
    "resume_from_checkpoint": "resume",
    "dataloader_num_workers": "data.workers",
    "dataloader_persistent_workers": "data.workers",
}
GRPO_WORDS = {
    "num_generations": "group_size",
    "generation_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "prompts_per_step and micro_batch_size",
    "reward_weights": "rewards",
    "use_vllm": "engine.backend",
    "vllm_mode": "engine.backend",
    "vllm_server_base_url": "engine.url",
    "vllm_server_host": "engine.url",
    "vllm_server_port": "engine.url",
    "vllm_gpu_memory_utilization": "engine.gpu_memory_utilization",
    "vllm_enable_sleep_mode": "engine.sleep",
    "vllm_max_model_length": "engine.max_model_len",
    "temperature": "temperature",
    "max_completion_length": "max_completion_length",
    "shuffle_dataset": "seed",
    "log_completions": "completions_per_step",
    "num_completions_to_print": "completions_per_step",
}
_ORDER = "the order of samples is the run's own, the same in every layout of processes"
_RESUME = "a run that is taken up again would not repeat itself"
_UPLOAD = "nothing is uploaded while a run goes; upload the folder that it exports"
_EVAL = "a run measures its validation itself"
_LOSS = "the loss is the mean over the supervised tokens of a whole step"
_BEST = "the last weights are exported"
_LAUNCH = (
    "how a model is shared out is the launcher's to say (accelerate launch --config_file recipes/accelerate/….yaml)"
)
_NAMES = "exports and engines know the weights by their plain names, which compiling changes"
_TRACKERS = "trackers are told by report_to and by their own environment variables"
# Settings that would do nothing here, or break what a run promises, and why.
NO_USE = {
    **dict.fromkeys(("train_sampling_strategy", "length_column_name", "dataloader_drop_last"), _ORDER),
    **dict.fromkeys(("dataloader_in_order", "accelerator_config"), _ORDER),
    **dict.fromkeys(("ignore_data_skip", "save_only_model", "enable_jit_checkpoint"), _RESUME),
    "restore_callback_states_from_checkpoint": _RESUME,
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _UPLOAD),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _UPLOAD),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "eval_on_start", "eval_delay"), _EVAL),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), _EVAL),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "prediction_loss_only"), _EVAL),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("average_tokens_across_devices", "label_smoothing_factor"), _LOSS),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "these kernels know none of this model's classes"),
    **dict.fromkeys(("remove_unused_columns", "label_names"), "batches are made here"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ddp_backend"), _LAUNCH),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _NAMES),
    **dict.fromkeys(("run_name", "project", "trackio_space_id", "trackio_bucket_id"), _TRACKERS),
    "trackio_static_space_id": _TRACKERS,
    "local_rank": _LAUNCH,
    "auto_find_batch_size": "the run would not be that of its recipe",
    "ddp_find_unused_parameters": "the stages decide it",
    "use_cache": "a key-value cache is of no use in training",
    "use_cpu": "precision and engine follow the GPU that is seen (CUDA_VISIBLE_DEVICES= hides it from the whole run)",
    "logging_nan_inf_filter": "it hides a loss that is not a number, at which a run stops",
    "debug": "its hooks fail at masks, which are no numbers",
    "skip_memory_metrics": "audio-llm doctor --recipe tells the memory of a run",
    "save_on_each_node": "a run has one folder, which all its processes see",
    "optim_target_modules": "optimisers of low rank want a model's layers before there is one",
}
_REFERENCE = "the reference is the model that the run began with"
_KEEP = "the recipe's own key keep says which weights are exported"
_ENGINE = "the engine is the recipe's own (engine:)"
_READ = "prompts are read where they are sampled"
GRPO_NO_USE = {
    **dict.fromkeys(("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching"), _ENGINE),
    **dict.fromkeys(("transformers_continuous_batching_config", "use_transformers_paged"), _ENGINE),
    **dict.fromkeys(("vllm_tensor_parallel_size", "vllm_model_impl"), _ENGINE),
    **dict.fromkeys(("vllm_structured_outputs_regex", "vllm_server_timeout", "vllm_group_port"), _ENGINE),
    "ds3_gather_for_generation": _ENGINE,
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the model is built from the recipe's parts (model:)"),
    **dict.fromkeys(("chat_template_kwargs", "max_tool_calling_iterations"), "prompts are written by the checkpoint"),
    **dict.fromkeys(("log_completions_hub_repo", "log_multimodal", "log_unique_prompts"), _UPLOAD),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _KEEP),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), _REFERENCE),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor"), _READ),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_multiprocessing_context"), _READ),
    **dict.fromkeys(("num_generations_eval", "per_device_eval_batch_size"), _EVAL),
    "pad_to_multiple_of": "replies to one prompt share its computation",
    "neftune_noise_alpha": "with noise the policy that scores is not the one that sampled",
    "include_num_input_tokens_seen": "num_tokens of metrics.jsonl counts them",
    "router_aux_loss_coef": "the routers of a mixture of experts are not heard through the audio model",
}

_ROWS = (
    "each sample has a row of its own, told from its padding by a mask, which every kind of attention takes; the "
    "samples of a step are dealt out to its passes by length, so that little is padding"
)
_WORDS = "prompts are written by the checkpoint, with its own tokenizer and template"
_TURN = "the loss is over the assistant's turn alone"
# What the SFT of TRL has beside Transformers' settings: its users look for these names. The first are said otherwise.
SFT_WORDS = {
    "max_length": "data.max_length",
    "truncation_mode": "data.max_length (a longer sample is a reject, never cut)",
    "activation_offloading": "gradient_checkpointing",
}
SFT_NO_USE = {
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "padding_free", "pad_to_multiple_of"), _ROWS),
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), _WORDS),
    **dict.fromkeys(
        ("dataset_text_field", "dataset_kwargs", "dataset_num_proc"), "samples are read from shards (data:)"
    ),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), _TURN),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), GRPO_NO_USE["model_init_kwargs"]),
    "router_aux_loss_coef": GRPO_NO_USE["router_aux_loss_coef"],
    "shuffle_dataset": _ORDER,
    "loss_type": _LOSS,
}
_PACKED = dict.fromkeys(("packing", "padding_free"), _ROWS)

# What TRL looks at only when a batch is scored: the values that it knows.
VALUES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
}
# Optimisers of the package bitsandbytes, whose kernels run on a GPU.
BITSANDBYTES = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit"),
    *("paged_lion_8bit", "paged_lion_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_8bit"),
    *("paged_ademamix_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
_BY_LAYERS = ("galore", "apollo", "lomo", "adalomo")  # are made of a model's layers, which is not loaded yet
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
Holds = Callable[[Any], bool]


def _loss(*kinds: str) -> tuple[str, Holds]:
    return f"loss_type {' or '.join(kinds)}", lambda found: found.loss_type in kinds


def _optimiser_has(found: Any, name: str) -> bool:
    """Whether the optimiser of the arguments `found` is another with another value of the setting `name`."""
    from transformers import Trainer

    def with_value(value: Any) -> Any:
        changed = copy.copy(found)
        setattr(changed, name, value)
        return Trainer.get_optimizer_cls_and_kwargs(changed)

    if name != "optim_args":
        return bool(with_value(0.25) != with_value(0.5))
    parts = (found.optim_args or "").split(",")
    return all(with_value(",".join(p for p in parts if p != part)) != with_value(found.optim_args) for part in parts)


def _has_tf32(found: Any) -> bool:
    from transformers.utils import is_torch_tf32_available

    return bool(is_torch_tf32_available())


_WORKERS: tuple[str, Holds] = ("data.workers above 0", lambda found: found.dataloader_num_workers > 0)
_ADAPTIVE: tuple[str, Holds] = ("use_adaptive_entropy: true", lambda found: found.use_adaptive_entropy)
_CORRECTED: tuple[str, Holds] = (
    "vllm_importance_sampling_correction: true",
    lambda found: found.vllm_importance_sampling_correction,
)
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
# Settings that act beside others only: what has to be set, in words, and whether it is.
BESIDE: dict[str, tuple[str, Holds]] = {
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_multiprocessing_context"), _WORKERS),
    "tf32": ("a GPU that has it", _has_tf32),
    **{name: ("an optim that has it", partial(_optimiser_has, name=name)) for name in _ADAM},
    **dict.fromkeys(("epsilon", "delta"), _loss(*_CLIPPED)),
    "epsilon_high": _loss(*_CLIPPED, "cispo"),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _loss("sapo")),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _loss("vespo")),
    "importance_sampling_level": ("loss_type other than vespo", lambda found: found.loss_type != "vespo"),
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"), _ADAPTIVE),
    "use_bias_correction_kl": ("beta above 0", lambda found: found.beta != 0.0),
    "vllm_importance_sampling_mode": _CORRECTED,
    **dict.fromkeys(("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"), _CORRECTED),
    "vllm_importance_sampling_cap": _CORRECTED,
    "cast_lm_head_to_fp32": ("precision: bf16", lambda found: found.bf16),
}


def arguments(known: type, group: str, ours: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """`known` (Trainer's or TRL's arguments) of `ours` and of the recipe's `settings` under `group`, which win.

    Raises :class:`ConfigError` for a setting that `known` does not have, that the recipe says in its own words or that
    would do nothing, and for values that cannot be had.
    """
    check_settings(known, group, settings)
    hints = typing.get_type_hints(known)
    settings = {name: config.convert(hints[name], value, f"{group}: {name}") for name, value in settings.items()}
    try:
        found = known(**{**ours, **settings})
        _check_optimiser(found, group)
    except (ValueError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(describe(group, f"settings that {known.__name__} takes", reason)) from error
    for name in settings:
        needed, holds = BESIDE.get(name, ("", None))
        if holds is not None and not holds(found):
            raise ConfigError(describe(f"{group}: {name}", f"{needed} beside it, for it does nothing else", "none"))
    return found


def _check_optimiser(found: Any, group: str) -> None:
    """:class:`ConfigError` for an optimiser that cannot be had: now, and not when the model has been loaded."""
    from transformers import Trainer

    name = str(found.optim.value)
    if name in BITSANDBYTES:
        check_bitsandbytes(f"{group}: optim: {name}")
    if name.startswith(_BY_LAYERS):
        expected = "an optimiser of parameters, not of a model's layers"
        raise ConfigError(describe(f"{group}: optim", expected, name, "Adapters (train: …: lora) save as much."))
    Trainer.get_optimizer_cls_and_kwargs(found)


def check_quantization(kind: str | None, arguments: Any) -> None:
    """:class:`ConfigError` for a quantised language model (`kind`) that cannot be trained where `arguments` say."""
    if kind is None:
        return
    check_bitsandbytes(f"model.quantization: {kind}")
    zero3 = arguments.deepspeed_plugin is not None and arguments.deepspeed_plugin.zero_stage == 3
    if arguments.fsdp or zero3:
        cure = "Use recipes/accelerate/multi_gpu.yaml or zero2.yaml: each process holds the quantised model whole."
        found = "FSDP" if arguments.fsdp else "ZeRO-3"
        raise ConfigError(describe(f"model.quantization: {kind}", "weights that are not shared out", found, cure))


def check_bitsandbytes(item: str) -> None:
    """:class:`ConfigError` without a CUDA device, :class:`PrerequisiteError` without the package; both say that `item`
    wants it."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(describe(item, "a CUDA GPU, for which bitsandbytes is made", "none"))
    require("bitsandbytes", item, "bitsandbytes")


def check_settings(known: type, group: str, settings: Mapping[str, Any]) -> None:
    """Refuse by name what :func:`arguments` does."""
    own, no_use = OWN_WORDS | SFT_WORDS, NO_USE | SFT_NO_USE
    if group == "grpo":
        own, no_use = OWN_WORDS | GRPO_WORDS, NO_USE | GRPO_NO_USE | _PACKED
    names = {field.name for field in dataclasses.fields(known)} | set(own) | set(no_use)
    for name in settings:
        if name not in names:
            raise ConfigError(
                f"{group}: unknown setting '{name}'{nearest(name, names)}; {known.__name__} lists them all."
            )
        if name in no_use:
            raise ConfigError(f"{group}: {name}: expected none, for {no_use[name]}.")
        if name in own:
            raise ConfigError(f"{group}: '{name}' is set by the recipe's own key {own[name]}.")
        if name in VALUES and settings[name] not in VALUES[name]:
            known_values = ", ".join(str(value) for value in VALUES[name] if not isinstance(value, bool))
            raise ConfigError(describe(f"{group}: {name}", f"one of {known_values}", repr(settings[name])))
    if settings.get("loss_type") == "vespo":
        mode = settings.get("vllm_importance_sampling_mode", "token_truncate")
        if not mode.startswith("token_"):
            expected = "token_mask or token_truncate beside loss_type: vespo"
            raise ConfigError(describe(f"{group}: vllm_importance_sampling_mode", expected, mode))


def grpo_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of a recipe's ``grpo:`` with what this project sets otherwise than TRL where they say nothing."""
    found = dict(settings)
    if found.get("loss_type") == "cispo":
        found.setdefault("epsilon_high", 5.0)  # without it TRL clamps the ratio to epsilon, a fifth of the gradient
    if found.get("loss_type") == "vespo" and found.get("vllm_importance_sampling_correction", True):
        found.setdefault("vllm_importance_sampling_mode", "token_truncate")  # the only kind VESPO can use
    found.setdefault("disable_dropout", True)  # with dropout the policy that scores is not the one that sampled
    return found
