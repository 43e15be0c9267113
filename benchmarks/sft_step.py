"""Seconds of an SFT step: head and loss on every position, and on the supervised ones alone, as training has it.

    python -m benchmarks.sft_step MODEL... [--batch 8] [--words 40] [--reply 40] [--seconds 2] [--precision fp32]

Every row of the batch is a prompt with `--words` tokens of text and `--seconds` of sound, and a reply of `--reply`
tokens. LoRA and the projector learn, the encoder is frozen. The two kinds of step take turns; medians are printed.

Then follow tokens per second, where the time of a step goes, and the share of the machine's speed: floating point
operations of a step (``torch.utils.flop_counter``) a second over those of a product of two square matrices in the same
run, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_llm.model.build import load_model, load_processor
from audio_llm.training.policy import make_trainable

IGNORED = -100


def make_batch(processor: Any, batch: int, words: int, reply: int, seconds: float) -> dict[str, Tensor]:
    """Rows of one length: audio, text and reply of random ids."""
    extractor = processor.feature_extractor
    generator = torch.Generator().manual_seed(0)
    clip = 0.1 * torch.randn(extractor.num_channels, round(seconds * extractor.sampling_rate), generator=generator)
    features = extractor([clip.numpy()] * batch)
    places = torch.full((batch, processor.audio_tokens(clip.shape[1])), processor.audio_token_id)
    forbidden = set(processor.tokenizer.all_special_ids)
    plain = torch.tensor([token for token in processor.tokenizer.get_vocab().values() if token not in forbidden])
    text = plain[torch.randint(len(plain), (batch, words + reply), generator=generator)]
    ids = torch.cat([places, text], dim=1)
    labels = ids.clone()
    labels[:, :-reply] = IGNORED
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "input_audio": features["input_audio"],
        "audio_lengths": features["audio_lengths"],
    }


def on_every_position(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss from all logits, the unsupervised ones left out at the end."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED)


def on_supervised_ones(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss as the model gives it."""
    loss: Tensor = model(**batch).loss
    return loss


def products(size: int = 2048, rounds: int = 5) -> dict[str, float]:
    """Operations a second of a product of two matrices (size, size), the best of `rounds`."""
    speeds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(size, size, dtype=dtype)
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        speeds[name] = 2 * size**3 / min(times[1:])
    return speeds


def where(model: Any, batch: dict[str, Tensor], precision: contextlib.AbstractContextManager[Any]) -> dict[str, float]:
    """Seconds of one step by part: what encoder, projector and language model take forward, and what comes after."""
    names = {"encoder": "audio_encoder", "projector": "projector", "language model": "language_model"}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = {told: getattr(inner.model, name) for told, name in names.items()}
    spent: dict[str, float] = dict.fromkeys([*parts, "head, loss and the rest", "backward"], 0.0)
    began: dict[str, float] = {}
    handles = []
    for told, part in parts.items():
        handles.append(part.register_forward_pre_hook(lambda *_, t=told: began.update({t: time.perf_counter()})))
        handles.append(
            part.register_forward_hook(lambda *_, t=told: spent.update({t: spent[t] + time.perf_counter() - began[t]}))
        )
    start = time.perf_counter()
    with precision:
        loss = on_supervised_ones(model, batch)
    forward = time.perf_counter()
    loss.backward()
    spent["backward"] = time.perf_counter() - forward
    spent["head, loss and the rest"] = forward - start - sum(spent[told] for told in parts)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return spent


def operations(model: Any, batch: dict[str, Tensor]) -> int:
    """Floating point operations of a step, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        on_supervised_ones(model, batch).backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def measure(folder: Path, args: argparse.Namespace) -> list[tuple[str, float, float]]:
    """(kind, median seconds of a step, loss of the first one)."""
    half = args.precision == "bf16"
    model = make_trainable(load_model(folder, dtype=torch.bfloat16 if half else torch.float32)).train()
    batch = make_batch(load_processor(folder), args.batch, args.words, args.reply, args.seconds)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)  # the loss stays the same
    kinds: dict[str, Callable[..., Tensor]] = {"every": on_every_position, "supervised": on_supervised_ones}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    losses = {}
    for turn in range(args.steps + 1):
        for name, loss_of in kinds.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = loss.item()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    print(
        f"{folder}: {batch['input_ids'].shape[0]} rows of {batch['input_ids'].shape[1]} tokens, {args.reply} supervised"
    )
    rows = [(name, statistics.median(times[name]), losses[name]) for name in kinds]
    report(model, batch, rows[-1][1], "bf16" if half else "fp32")
    return rows


def report(model: Any, batch: dict[str, Tensor], seconds: float, precision: str) -> None:
    """Print tokens a second, the share of the machine's speed, and where the time goes, of the kind that is trained."""
    half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    count, speeds = operations(model, batch), products()
    speed = count / seconds
    shares = ", ".join(f"{speed / peak:.0%} of {peak / 1e9:.0f} in {name}" for name, peak in speeds.items())
    tokens = batch["input_ids"].numel() / seconds
    print(
        f"  {tokens:.0f} tokens/s in {precision}; {count / 1e9:.1f} GFLOP a step, {speed / 1e9:.0f} GFLOP/s: {shares}"
    )
    spent = where(model, batch, half)
    whole = sum(spent.values())
    print("  " + ", ".join(f"{told} {share / whole:.0%}" for told, share in spent.items()), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_step", description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--reply", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args(argv)
    for folder in args.models:
        rows = measure(folder, args)
        for name, seconds, loss in rows:
            share = seconds / rows[0][1]
            print(f"  head on {name:<11}{seconds:>9.3f} s a step{share:>8.0%}   loss {loss:.5f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
