"""``audio-llm doctor``: does this machine fit? And a recipe on it? Every finding comes with its cure."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

HELP = "check versions, libraries and flags, or what a recipe needs; every finding with its cure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --recipe: replaces a value of it")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="print only what is not in order")
    parser.add_argument("--recipe", type=Path, help="of sft, grpo or train: does it fit, before anything is loaded?")
    parser.add_argument("--accelerate", type=Path, metavar="FILE", help="how it is launched: recipes/accelerate/….yaml")
    parser.add_argument("--processes", type=int, metavar="N", help="so many (by default the recipe's, or the file's)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each GPU (by default this machine's)")
    parser.add_argument(
        "--windows", type=int, default=1, metavar="N", help="of sound in a row, where it has more than one"
    )
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens of a row's prompt, where they are known")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 when something has to be mended or does not fit, else 0."""
    if args.recipe is not None:
        return _fit(args)
    if args.overrides or args.accelerate or args.processes or args.gpu_memory:
        from audio_llm.errors import ConfigError, describe

        raise ConfigError(describe("audio-llm doctor", "--recipe beside what is said of one", "none"))
    from audio_llm.inspection.doctor import collect, diagnose

    findings = diagnose(collect())
    bad = sum(finding.level == "bad" for finding in findings)
    if args.json:
        print(json.dumps({"ok": bad == 0, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(bad > 0)
    for finding in findings:
        if args.quiet and finding.level == "ok":
            continue
        print(f"{finding.level:<4}  {finding.item:<16} {finding.text}")
        if finding.cure:
            print(f"{'':<22} cure: {finding.cure}")
    warned = sum(finding.level == "warn" for finding in findings)
    print(f"\n{bad} to mend, {warned} to look at, {len(findings) - bad - warned} in order.")
    return int(bad > 0)


def _fit(args: argparse.Namespace) -> int:
    from audio_llm import config
    from audio_llm.errors import ConfigError, describe
    from audio_llm.inspection import fit
    from audio_llm.inspection.room import room_for
    from audio_llm.training.recipes import GRPORecipe, SFTRecipe

    asked = {
        f"--{name}": vars(args)[name.replace("-", "_")] for name in ("processes", "gpu-memory", "windows", "prompt")
    }
    for name, value in asked.items():
        if value is not None and value <= 0:
            raise ConfigError(describe(name, "more than 0", f"{value:g}"))
    verb = config.verb_of(config.read(args.recipe))
    if verb in ("sft", "grpo"):
        recipe = config.load(SFTRecipe if verb == "sft" else GRPORecipe, args.recipe, args.overrides)
    elif verb == "train":
        from audio_llm.tasks.base import TaskRecipe, load_recipe

        _, recipe = load_recipe(args.recipe, args.overrides)
        if not isinstance(recipe, TaskRecipe):
            raise ConfigError(describe(f"recipe {args.recipe}", "one of an encoder", f"task: {recipe.task}"))
    else:
        raise ConfigError(describe(f"recipe {args.recipe}: verb", "sft, grpo or train", repr(verb)))
    stated = args.processes or (None if args.accelerate else recipe.processes)
    launch = fit.launch_of(args.accelerate, stated)
    room = room_for(recipe.output, args.gpu_memory)
    need, found = fit.judge(recipe, launch, room, fit.Rows(args.windows, args.prompt))
    if args.json:
        print(json.dumps(fit.as_json(need, launch, room, found), indent=2))
    else:
        if not args.quiet:
            print(fit.table(need, launch, room))
        print("\n".join(found) or "It fits.")
    return int(bool(found))
