"""``audio-llm grpo RECIPE [key=value …]``: reinforcement learning from verifiable rewards."""

from __future__ import annotations

import argparse
import os

from audio_llm.cli.options import add_launch, add_recipe, checked

HELP = "improve the model by rewarding its answers (GRPO, rollouts by vLLM)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "quickstart/grpo.yaml")
    add_launch(parser)
    parser.add_argument(
        "--server-command",
        action="store_true",
        help="write the language model for a rollout server, print the command that starts it, and stop",
    )


def recipes() -> dict[str, type]:
    """The dataclass of its recipe; there is one kind."""
    from audio_llm.training.recipes import GRPORecipe

    return {"": GRPORecipe}


def run(args: argparse.Namespace) -> int:
    from audio_llm.training.recipes import GRPORecipe

    recipe = checked(args, GRPORecipe, "grpo", ("trl", "accelerate", "peft"))
    from audio_llm.inspection.room import check_memory
    from audio_llm.serving import rollout_engines
    from audio_llm.training import grpo, policy

    if args.server_command:
        folder = policy.starting_folder(recipe.model, recipe.output)
        target = recipe.output / "rollout-model"
        lora = recipe.lora if recipe.train.language_model == "lora" else None
        print(rollout_engines.prepare_server(folder, target, recipe.engine, lora, recipe.seed))
        return 0
    if not args.ignore_memory:
        check_memory(recipe)
    result = grpo.run(recipe, rollout_engines.build_engine)
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    exported = ", ".join(result["exported"].values())
    print(
        f"{result['steps']} steps, {result['prompts']} prompts, {result['seconds']} s, mean reward "
        f"{result.get('reward_first', 0.0):.3f} -> {result.get('reward_last', 0.0):.3f} (first and last 10 steps)"
        + (f"; wrote {exported}" if exported else "")
    )
    return 0
