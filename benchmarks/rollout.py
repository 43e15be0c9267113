"""Rollouts: vLLM on prompt embeddings against Transformers' generate, at several batch sizes.

    python -m benchmarks.rollout --out rollout.json

Both get the same prompt embeddings and always decode the full number of tokens. They take turns, round after round,
and a ratio is the median over the rounds, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from audio_llm.serving.rollout_engines import VLLMRollouts
from audio_llm.training.engine_recipe import EngineRecipe
from audio_llm.training.rollouts import PolicyWeights, RolloutEngine, Sampling, forbid_tokens
from audio_llm.training.transformers_rollouts import TransformersRollouts
from benchmarks.policy import build_policy, embeddings

TARGETS = {32: 1.8}  # tokens per second of vLLM over generate's


def seconds(engine: RolloutEngine, prompts: list[Tensor], sampling: Sampling) -> float:
    """Wall time of one completion for every prompt."""
    start = time.perf_counter()
    engine.generate(prompts, [1] * len(prompts), sampling)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per sequence")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--hidden", type=int, default=128, help="width of the language model (quickstart: 128)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    policy: PolicyWeights = build_policy(args.hidden, args.layers)
    placeholder = policy.base.config.audio_token_id
    forbid_tokens(policy.base, [placeholder])  # as the trainer does: a sampled one would miss its audio
    # No stop token: every sequence has the same length.
    sampling = Sampling(max_tokens=args.tokens, forbidden_token_ids=(placeholder,))
    length = args.prompt + args.tokens
    engines: dict[str, RolloutEngine] = {
        "generate": TransformersRollouts(),
        "vllm": VLLMRollouts(policy, EngineRecipe(max_model_len=length, max_num_seqs=max(args.batch))),
    }
    results = []
    try:
        for engine in engines.values():
            engine.sync(policy, 0)
        for batch in args.batch:
            prompts = embeddings(policy, batch, args.prompt)
            for engine in engines.values():  # warm up
                seconds(engine, prompts, sampling)
            rounds = [
                {name: seconds(engine, prompts, sampling) for name, engine in engines.items()}
                for _ in range(args.rounds)
            ]
            row: dict[str, float] = {"batch": batch}
            for name in engines:
                row[f"{name}_tokens_per_second"] = batch * args.tokens / statistics.median(r[name] for r in rounds)
            row["ratio"] = statistics.median(r["generate"] / r["vllm"] for r in rounds)
            results.append(row)
    finally:
        for engine in engines.values():
            engine.close()

    print(f"\n{'batch':>5} {'generate':>10} {'vLLM':>10} {'ratio':>6}   tokens/s, {torch.get_num_threads()} threads")
    for row in results:
        target = TARGETS.get(int(row["batch"]))
        verdict = "" if target is None else f"   target {target}: {'reached' if row['ratio'] >= target else 'MISSED'}"
        print(
            f"{row['batch']:>5} {row['generate_tokens_per_second']:>10.0f} {row['vllm_tokens_per_second']:>10.0f} "
            f"{row['ratio']:>6.2f}{verdict}"
        )
    if args.out:
        args.out.write_text(
            json.dumps({"arguments": vars(args) | {"out": str(args.out)}, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
