"""Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath", §4) of an audio language model.

A recipe names data, rewards, an engine that samples, and any of TRL's own settings under ``grpo:``. What makes it hear
is in ``audio_llm.training.grpo_trainer``, what samples in ``audio_llm.training.rollouts`` and
``audio_llm.serving.rollout_engines``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from audio_llm.errors import ConfigError
from audio_llm.training.engine_recipe import EngineRecipe
from audio_llm.training.examples import Examples, open_shards
from audio_llm.training.grpo_trainer import AudioGRPOTrainer
from audio_llm.training.gym import GymRun, GymTrainer
from audio_llm.training.launch import batch_layout, training_processes
from audio_llm.training.parity import ParityGate, check_distribution
from audio_llm.training.policy import resolve_precision
from audio_llm.training.recipes import GRPORecipe
from audio_llm.training.rewards import build_rewards
from audio_llm.training.rollouts import PolicyWeights, RolloutEngine
from audio_llm.training.run import PolicyRun, trainer_settings
from audio_llm.training.settings import arguments, check_settings, grpo_defaults
from audio_llm.training.validation import BestValidation, OverfitCheck, best

BuildEngine = Callable[[EngineRecipe, PolicyWeights, Any, int], RolloutEngine]


def run(recipe: GRPORecipe, build_engine: BuildEngine) -> dict[str, Any]:
    """Train and export; returns what ``result.json`` holds. Resumes by itself (``resume: auto``).

    `build_engine` makes the rollout engine (``audio_llm.serving.rollout_engines.build_engine``). The run folder also
    gets ``completions.jsonl``.
    """
    functions, weights = build_rewards(recipe.rewards)
    with open_run(recipe, weights) as run:
        if run.finished is not None:
            return run.finished
        model = run.load_model()
        policy = PolicyWeights(model.to(run.arguments.device))
        engine = build_engine(recipe.engine, policy, run.processor.tokenizer, recipe.seed)
        run.at_end(engine.close)  # last: vLLM takes the process group down with it
        if run.main:
            print(f"rollouts by {engine.name}")
        trainer = build_trainer(run, recipe, model, engine, functions)
        result = run.train(trainer) | {"engine": engine.name}
        result["prompts"] = result["steps"] * recipe.prompts_per_step
        result |= run.validate(trainer, result["steps"])
        result |= keep_weights(recipe, trainer, result["steps"])
        return run.finish(trainer, result | reward_summary(trainer.state.log_history))


def open_run(recipe: GRPORecipe, weights: list[float]) -> PolicyRun:
    """The run of `recipe`, with these `weights` of its rewards."""
    position = {"prompts_per_step": recipe.prompts_per_step, "group_size": recipe.group_size}
    kind = GymRun if recipe.data.gym else PolicyRun
    return kind(recipe, training_arguments(recipe, weights), recipe.prompts_per_step, position)


def build_trainer(
    run: PolicyRun, recipe: GRPORecipe, model: Any, engine: RolloutEngine, functions: list[Any]
) -> AudioGRPOTrainer:
    """The trainer of `run` with its prompts, rewards (`functions`) and logs."""
    completions, order_log = recipe.output / "completions.jsonl", recipe.output / "order.jsonl"
    [(data, shards)] = run.data
    validation, checks = None, []
    how: dict[str, Any] = {"style": data.style, "reply": False, "hearing": data.hearing}
    prompts: Any = shards if data.gym else Examples(shards, run.processor, **how)
    if data.validation:
        held_out, limit = open_shards(data.validation, run.processor, data), data.validation_samples
        validation = Examples(held_out, run.processor, limit=limit, **how)
        checks = [BestValidation(recipe.output), OverfitCheck(recipe.on_overfit)]
    return (GymTrainer if data.gym else AudioGRPOTrainer)(
        reward_funcs=functions,
        processing_class=run.processor.tokenizer,
        prompts=prompts,
        engine=engine,
        parity=parity_gate(recipe),
        completions=completions,
        completions_per_step=recipe.completions_per_step,
        order_log=order_log if recipe.record_order else None,
        share_prompts=recipe.share_prompts,
        reference=run.load_reference,
        resample_groups=recipe.resample_groups,
        validation=validation,
        eval_steps=recipe.eval_steps,
        **run.trainer_arguments(model, logs=(completions, order_log), checks=checks),
    )


def keep_weights(recipe: GRPORecipe, trainer: AudioGRPOTrainer, steps: int) -> dict[str, Any]:
    """Give `trainer` the weights that the recipe exports after `steps`; the best validation, and whose these are."""
    found = best(trainer.state.log_history)
    if found is None:
        return {}
    kept = found["step"] if recipe.keep == "best" else steps
    if kept != steps:
        trainer.take_weights(recipe.output / f"checkpoint-{kept}")
    return {"best": found, "kept_step": kept}


def parity_gate(recipe: GRPORecipe) -> ParityGate:
    """The checks of the engine that the recipe asks for."""
    if recipe.parity_bound == "off":
        return ParityGate(None, closed=False)
    if recipe.parity_bound == "auto":
        return ParityGate(1e-3 if resolve_precision(recipe.precision) == "fp32" else None)
    return ParityGate(recipe.parity_bound)


def training_arguments(recipe: GRPORecipe, weights: list[float]) -> Any:
    """The recipe in TRL's words, but for ``max_steps``. Building it sets up the process group and DeepSpeed."""
    from trl import GRPOConfig

    check_settings(GRPOConfig, "grpo", recipe.grpo)
    if parity_gate(recipe).closed:
        check_distribution(recipe.grpo)
    micro, accumulation = batch_layout(recipe, training_processes())
    ours = trainer_settings(recipe) | {
        "num_generations": recipe.group_size,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_completion_length": recipe.max_completion_length,
        "temperature": recipe.temperature,
        "reward_weights": weights,
        "use_vllm": False,
        "router_aux_loss_coef": 0.0,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    found = arguments(GRPOConfig, "grpo", ours, grpo_defaults(recipe.grpo))
    check_resumable(recipe, found)
    return found


def check_resumable(recipe: GRPORecipe, arguments: Any) -> None:
    """A checkpoint must fall where a generation batch is used up: TRL does not save the rest of one."""
    passes = arguments.steps_per_generation * arguments.num_iterations
    if recipe.save_steps and (recipe.save_steps * arguments.gradient_accumulation_steps) % passes:
        updates = math.lcm(passes, arguments.gradient_accumulation_steps) // arguments.gradient_accumulation_steps
        raise ConfigError(
            f"save_steps: expected a multiple of {updates}, the updates made from one generation batch, "
            f"found {recipe.save_steps}; a run resumed from there would not repeat itself."
        )


def reward_summary(history: list[dict[str, Any]], window: int = 10) -> dict[str, float]:
    """Mean reward over the first and the last `window` logged steps: one step's is mostly noise."""
    rewards = [log["reward"] for log in history if log.get("reward") is not None]
    if not rewards:
        return {}
    first, last = rewards[:window], rewards[-window:]
    return {"reward_first": sum(first) / len(first), "reward_last": sum(last) / len(last)}
