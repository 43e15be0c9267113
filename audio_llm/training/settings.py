"""What a recipe may tell Transformers' Trainer and TRL in their own words: ``trainer:`` (SFT) and ``grpo:`` (GRPO).

Anything that these know is passed on, but for what a recipe says with a key of its own, and for what would do nothing
here or break what a run promises. Those are refused by name: a setting without effect would be believed.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from audio_llm import config
from audio_llm.errors import ConfigError, describe, nearest

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
    "warmup_steps": "warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "weight_decay": "weight_decay",
    "bf16": "precision",
    "fp16": "precision",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
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
    "auto_find_batch_size": "the run would not be that of its recipe",
    "ddp_find_unused_parameters": "the stages decide it",
    "use_cache": "a key-value cache is of no use in training",
    "local_rank": "the launcher says it",
}
_REFERENCE = "the reference is the model that the run began with"
_KEEP = "the recipe's own key keep says which weights are exported"
_ENGINE = "the engine is the recipe's own (engine:)"
GRPO_NO_USE = {
    **dict.fromkeys(("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching"), _ENGINE),
    **dict.fromkeys(("transformers_continuous_batching_config", "use_transformers_paged"), _ENGINE),
    **dict.fromkeys(("vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_model_impl"), _ENGINE),
    **dict.fromkeys(("vllm_structured_outputs_regex", "vllm_server_timeout", "vllm_group_port"), _ENGINE),
    "ds3_gather_for_generation": _ENGINE,
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the model is built from the recipe's parts (model:)"),
    **dict.fromkeys(("chat_template_kwargs", "max_tool_calling_iterations"), "prompts are written by the checkpoint"),
    **dict.fromkeys(("log_completions_hub_repo", "log_multimodal", "log_unique_prompts"), _UPLOAD),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _KEEP),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), _REFERENCE),
    "num_generations_eval": _EVAL,
    "pad_to_multiple_of": "replies to one prompt share its computation",
    "per_device_eval_batch_size": _EVAL,
    "dataloader_num_workers": "prompts are read where they are sampled",
    "dataloader_persistent_workers": "prompts are read where they are sampled",
    "dataloader_prefetch_factor": "prompts are read where they are sampled",
}


def arguments(known: type, group: str, ours: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """`known` (Trainer's or TRL's arguments) of `ours` and of the recipe's `settings` under `group`, which win.

    Raises :class:`ConfigError` for a setting that `known` does not have, that the recipe says in its own words or that
    would do nothing, and for values that cannot be had.
    """
    from transformers import Trainer

    check_settings(known, group, settings)
    hints = typing.get_type_hints(known)
    settings = {name: config.convert(hints[name], value, f"{group}: {name}") for name, value in settings.items()}
    try:
        found = known(**{**ours, **settings})
        Trainer.get_optimizer_cls_and_kwargs(found)  # now, and not when the model has been loaded
    except (ValueError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(describe(group, f"settings that {known.__name__} takes", reason)) from error
    return found


def check_settings(known: type, group: str, settings: Mapping[str, Any]) -> None:
    """Refuse by name what :func:`arguments` does."""
    own, no_use = OWN_WORDS, NO_USE
    if group == "grpo":
        own, no_use = OWN_WORDS | GRPO_WORDS, NO_USE | GRPO_NO_USE
    names = {field.name for field in dataclasses.fields(known)}
    for name in settings:
        if name not in names:
            raise ConfigError(
                f"{group}: unknown setting '{name}'{nearest(name, names)}; {known.__name__} lists them all."
            )
        if name in no_use:
            raise ConfigError(describe(f"{group}: {name}", "a setting that does something here", no_use[name]))
        if name in own:
            raise ConfigError(f"{group}: '{name}' is set by the recipe's own key {own[name]}.")
