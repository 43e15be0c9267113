"""Bringing a rollout engine to the policy: seconds per update, by merged weights and by adapter, in process and HTTP.

    python -m benchmarks.sync --out sync.json
    python -m benchmarks.sync --http            # also over HTTP, from a server that is started for it

Every update changes the adapter and is checked: a sync that did nothing would be the fastest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from audio_llm.serving.rollout_engines import HTTPRollouts, VLLMRollouts
from audio_llm.training.engine_recipe import EngineRecipe
from audio_llm.training.rollouts import PolicyWeights, Sampling
from benchmarks.policy import build_policy, embeddings

TARGET_MILLISECONDS = 100.0  # for the quickstart's language model, by the default way


def measure(engine: Any, policy: PolicyWeights, updates: int) -> dict[str, float]:
    """Milliseconds per update, and the largest |Δ log p| between engine and policy after all of them."""
    times = []
    for version in range(updates):
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.01)
        times.append(engine.sync(policy, version) * 1000)
    prompts = embeddings(policy, 4, 32)
    groups = engine.generate(prompts, [2] * 4, Sampling(max_tokens=16))
    difference = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor(completion.token_ids)
            with torch.no_grad():
                inputs = torch.cat([prompt, policy.base.get_input_embeddings()(ids)])[None]
                logits = policy.base.eval()(inputs_embeds=inputs).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            difference = max(difference, float((logprobs - torch.tensor(completion.logprobs)).abs().max()))
    if difference > 1e-3:
        raise SystemExit(
            f"{engine.name} ({engine.mode}): |Δ log p| {difference:.3g} after the last update; not in step"
        )
    return {
        "median_ms": statistics.median(times[1:]),
        "worst_ms": max(times[1:]),
        "first_ms": times[0],
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128, help="width of the language model (quickstart: 128)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    policy = build_policy(args.hidden, args.layers)
    size = sum(p.numel() * p.element_size() for n, p in policy.base.named_parameters() if "language_model" in n) / 1e6
    results = []
    for kind in (VLLMRollouts, HTTPRollouts) if args.http else (VLLMRollouts,):
        for mode in ("merged", "adapter"):
            recipe = EngineRecipe(sync=mode, max_model_len=64, max_num_seqs=8)
            if kind is HTTPRollouts:
                from audio_llm.tasks.language_model.task import train_tokenizer

                engine: Any = HTTPRollouts(policy, recipe, tokenizer=train_tokenizer(["a b c d"] * 9, vocabulary=300))
            else:
                engine = VLLMRollouts(policy, recipe)
            try:
                results.append({"engine": kind.name, "mode": mode} | measure(engine, policy, args.updates))
            finally:
                engine.close()

    print(f"\nlanguage model of {size:.0f} MB, {args.updates} updates")
    print(f"{'engine':<10} {'mode':<8} {'median':>9} {'worst':>9}")
    for row in results:
        verdict = ""
        if (row["engine"], row["mode"]) == ("vllm", "merged"):
            reached = row["median_ms"] < TARGET_MILLISECONDS
            verdict = f"   target {TARGET_MILLISECONDS:.0f} ms: {'reached' if reached else 'MISSED'}"
        print(f"{row['engine']:<10} {row['mode']:<8} {row['median_ms']:>6.1f} ms {row['worst_ms']:>6.1f} ms{verdict}")
    if args.out:
        args.out.write_text(json.dumps({"megabytes": size, "results": results}, indent=2))


if __name__ == "__main__":
    main()
