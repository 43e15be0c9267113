"""Where the time of a GRPO step goes: load, rollout, reward, log-probabilities, sync, update.

    python -m benchmarks.grpo_step RUN/metrics.jsonl                    # of a run that was made
    python -m benchmarks.grpo_step --recipe recipes/quickstart/grpo.yaml --steps 6 key=value ...   # of one made now

With ``--recipe`` the same steps are made one after the other with vLLM, with vLLM and every reply scored with a prompt
of its own (``share_prompts: false``), and with Transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

PARTS = ("load", "sync", "rollout", "reward", "logprob", "update")


def split(path: Path, skip: int = 1) -> dict[str, float]:
    """Median seconds of every part over the steps of a ``metrics.jsonl``, without the first `skip` (warming up)."""
    logs = [json.loads(line) for line in path.read_text().splitlines()]
    logs = [log for log in logs if "time/step" in log]
    if len(logs) <= skip:
        raise SystemExit(f"{path}: expected more than {skip} logged steps, found {len(logs)}")
    return {name: statistics.median(log[f"time/{name}"] for log in logs[skip:]) for name in (*PARTS, "step")}


VARIANTS = {
    "vllm": ["engine.backend=vllm"],
    "vllm, prompts not shared": ["engine.backend=vllm", "share_prompts=false"],
    "transformers": ["engine.backend=transformers"],
}


def run(recipe_path: Path, overrides: list[str], variant: list[str], steps: int, folder: Path) -> Path:
    """Make `steps` steps with the settings of one variant; returns the metrics file."""
    from audio_llm import config
    from audio_llm.serving.rollout_engines import build_engine
    from audio_llm.training import grpo

    stated = [f"output={folder}", *variant, f"steps={steps}", "seconds=", "epochs=", "save_steps="]
    recipe = config.load(grpo.GRPORecipe, recipe_path, [*overrides, *stated, "export=[]", "resume=never"])
    grpo.run(recipe, build_engine)
    return folder / "metrics.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", help="metrics.jsonl files; with --recipe: key=value overrides")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    results = {}
    if args.recipe:
        with tempfile.TemporaryDirectory() as folder:
            for name, variant in VARIANTS.items():
                output = Path(folder) / name.replace(" ", "_")
                results[name] = split(run(args.recipe, args.metrics, variant, args.steps, output))
    else:
        results = {name: split(Path(name)) for name in args.metrics}
    if not results:
        parser.error("expected a metrics.jsonl, or --recipe")

    for name, parts in results.items():
        print(f"\n{name}: {parts['step']:.2f} s per step")
        for part in PARTS:
            share = parts[part] / parts["step"]
            print(f"  {part:<8} {parts[part]:>7.3f} s {share:>6.1%} {'█' * round(40 * share)}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
