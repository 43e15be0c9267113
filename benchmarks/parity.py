"""Does vLLM compute what Transformers computes? Greedy ids must be equal, log-probabilities within a bound.

    python -m benchmarks.parity MODEL... [--adapter DIR] [--json FILE]

Prompts with 0 to 3 audios of a quarter window up to the longest allowed, one by one and as one batch; with an adapter
also through LoRA, and merged into a copy of the checkpoint. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.serving.launcher import cpu_build, server_environment

BOUND = 1e-4  # on |Δ log p| in float32; sums in another order give about 1e-6 on small models
AUDIOS = (0, 1, 1, 2, 0, 3)


@dataclass
class Case:
    """One prompt: rendered text with one placeholder per audio, and the audios ``(channels, time)``."""

    text: str
    audios: list[np.ndarray]


@dataclass
class Outcome:
    """Greedy continuation: ids and the log-probability of each."""

    ids: list[int]
    logprobs: list[float]


@dataclass
class Row:
    """One comparison of the table."""

    name: str
    prompts: int
    same_ids: int
    max_difference: float


def make_cases(processor: Any, seed: int = 0, audios: Sequence[int] = AUDIOS) -> list[Case]:
    """Tones in noise, different in every channel; lengths from a quarter window to `max_windows` windows."""
    rng = np.random.default_rng(seed)
    extractor = processor.feature_extractor
    longest = extractor.window_samples * extractor.max_windows
    cases = []
    for number, count in enumerate(audios):
        clips = [_clip(rng, extractor, longest) for _ in range(count)]
        content: list[dict[str, str]] = [{"type": "audio"} for _ in clips]
        content.append({"type": "text", "text": f"Question {number}: which sound is heard?"})
        cases.append(Case(processor.render([{"role": "user", "content": content}], generate=True), clips))
    return cases


def _clip(rng: np.random.Generator, extractor: Any, longest: int) -> np.ndarray:
    samples = int(rng.integers(extractor.window_samples // 4, longest + 1))
    time = np.arange(samples) / extractor.sampling_rate
    tones = np.sin(2 * np.pi * rng.uniform(100, 3000, (extractor.num_channels, 1)) * time)
    noise = rng.normal(0, 0.05, (extractor.num_channels, samples))
    return (rng.uniform(0.05, 0.4, (extractor.num_channels, 1)) * tones + noise).astype(np.float32)


def reference(model: Any, processor: Any, cases: Sequence[Case], tokens: int, batch: bool = False) -> list[Outcome]:
    """Transformers' greedy continuation, one prompt at a time or as one left-padded batch."""
    import torch

    groups = [list(cases)] if batch else [[case] for case in cases]
    outcomes = []
    for group in groups:
        audio = [case.audios for case in group]
        inputs = processor(text=[case.text for case in group], audio=audio if any(audio) else None)
        inputs.pop("audio_windows", None)
        with torch.no_grad():
            output = model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_scores=True
            )
        logprobs = torch.stack(output.scores, 1).float().log_softmax(-1)  # (batch, tokens, vocabulary)
        ends = model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        for row, ids in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
            stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            outcomes.append(Outcome(ids[:stop], [logprobs[row, i, ids[i]].item() for i in range(stop)]))
    return outcomes


def start_engine(model: Path, **options: Any) -> Any:
    """vLLM in this process, float32, without compilation."""
    from vllm import LLM

    defaults: dict[str, Any] = dict(dtype="float32", enforce_eager=True, max_num_seqs=16)
    defaults |= dict(limit_mm_per_prompt={"audio": max(AUDIOS)}, max_model_len=min(1024, _positions(model)))
    if cpu_build():
        defaults["block_size"] = 32
    return LLM(str(model), **(defaults | options))


def _positions(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int(config["text_config"].get("max_position_embeddings", 1024))


def continuation(llm: Any, processor: Any, cases: Sequence[Case], tokens: int, batch: bool, lora: Any) -> list[Outcome]:
    """vLLM's greedy continuation of the same prompts."""
    from vllm import SamplingParams

    rate = processor.feature_extractor.sampling_rate
    prompts = []
    for case in cases:
        prompt: dict[str, Any] = {"prompt": case.text}
        if case.audios:
            prompt["multi_modal_data"] = {"audio": [(clip, rate) for clip in case.audios]}
        prompts.append(prompt)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0)
    outputs = []
    for group in [prompts] if batch else [[prompt] for prompt in prompts]:
        outputs += llm.generate(group, sampling, lora_request=lora, use_tqdm=False)
    outcomes = []
    for output in outputs:
        best = output.outputs[0]
        logprobs = [entry[token].logprob for entry, token in zip(best.logprobs, best.token_ids, strict=True)]
        outcomes.append(Outcome(list(best.token_ids), logprobs))
    return outcomes


def compare(name: str, expected: Sequence[Outcome], found: Sequence[Outcome]) -> Row:
    """Equal ids, and the largest difference of log-probabilities over the common beginning."""
    worst, same = 0.0, 0
    for left, right in zip(expected, found, strict=True):
        same += left.ids == right.ids
        for i, (a, b) in enumerate(zip(left.ids, right.ids, strict=False)):
            if a != b:
                break
            worst = max(worst, abs(left.logprobs[i] - right.logprobs[i]))
    return Row(name, len(expected), same, worst)


def run_parity(model: Path, adapter: Path | None, tokens: int = 24, seed: int = 0) -> list[Row]:
    """All comparisons for one checkpoint; the engine is built once, and once more for the merged copy."""
    from audio_llm.model.build import load_model, load_processor

    processor = load_processor(model)
    cases = make_cases(processor, seed)
    base = load_model(model)
    expected = reference(base, processor, cases, tokens)
    rows = [compare("Transformers, batch", expected, reference(base, processor, cases, tokens, batch=True))]
    tuned = None
    if adapter is not None:
        from peft import PeftModel

        tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
        with_lora = reference(tuned, processor, cases, tokens)
    llm = start_engine(model, **(dict(enable_lora=True, max_lora_rank=64) if adapter else {}))
    for batch in (False, True):
        found = continuation(llm, processor, cases, tokens, batch, None)
        rows.append(compare(f"vLLM, {'batch' if batch else 'single'}", expected, found))
    if tuned is not None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, str(adapter))
        for batch in (False, True):
            found = continuation(llm, processor, cases, tokens, batch, request)
            rows.append(compare(f"vLLM + LoRA, {'batch' if batch else 'single'}", with_lora, found))
    _stop(llm)
    if tuned is not None:
        with tempfile.TemporaryDirectory() as folder:
            tuned.merge_and_unload().save_pretrained(folder)
            processor.save_pretrained(folder)
            llm = start_engine(Path(folder))
            found = continuation(llm, processor, cases, tokens, True, None)
            rows.append(compare("vLLM, merged", with_lora, found))
            _stop(llm)
    return rows


def _stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="checkpoint folder")
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="adapter of the first, second, … model"
    )
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    # One process, because the point is arithmetic and not transport. Before torch or vLLM is imported.
    for name, value in (server_environment(cpu_build()) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
        os.environ.setdefault(name, value)
    tables: dict[str, list[Row]] = {}
    for model, adapter in itertools.zip_longest(args.models, args.adapter):
        if model is None:
            parser.error("more adapters than models")
        tables[str(model)] = rows = run_parity(model, adapter, args.tokens, args.seed)
        print(f"{str(model)[-40:]:<42}{'same ids':>10}{'max |Δ log p|':>16}")
        for row in rows:
            print(f"  {row.name:<40}{f'{row.same_ids}/{row.prompts}':>10}{row.max_difference:>16.1e}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({name: [asdict(row) for row in rows] for name, rows in tables.items()}))
    everything = itertools.chain.from_iterable(tables.values())
    return int(any(row.same_ids != row.prompts or row.max_difference > BOUND for row in everything))


if __name__ == "__main__":
    sys.exit(main())
