"""The parts of ``scripts/gpu.sh`` that this package and PyTorch can do alone; each gives its rows.

`tiny` shapes are for a CPU, where every part has to run and no speed is asked for.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from audio_llm.encoders.mamba import chunked_scan, sequential_scan
from audio_llm.model.configuration import AudioLLMConfig
from audio_llm.model.encoder import ENCODERS, build_encoder
from audio_llm.model.modeling import AudioLLMForConditionalGeneration
from audio_llm.training.parity import FIRST_ERROR, NOISE_FACTOR
from audio_llm.training.policy import make_trainable
from audio_llm.training.recipes import LoRARecipe
from audio_llm.training.rollouts import PolicyWeights, Sampling
from audio_llm.training.transformers_rollouts import TransformersRollouts
from benchmarks.gpu import Row

# Published language models: width, layers, heads, key-value heads, feed-forward, vocabulary, tied (Qwen 2.5 and 3).
SHAPES = {
    "0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151936, True),
    "1.7B": ("qwen3", 2048, 28, 16, 8, 6144, 151936, True),
    "8B": ("qwen3", 4096, 36, 32, 8, 12288, 151936, False),
}
TINY = {"tiny": ("qwen3", 64, 2, 4, 2, 128, 512, True)}
# Dense bfloat16 operations and bytes from memory a second, by the makers' sheets (H200, H100 SXM; A100 80 GB).
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12)}
MFU = 0.2  # share of the peak that a LoRA step of the largest shape has to reach
ENCODER_BOUND = 2e-2  # largest |Δ| of a token, as a share of the largest token
LOSS_BOUND = 2e-2  # |bf16 − fp32| of a loss, as a share of it


def peaks() -> tuple[float, float] | None:
    """(operations, bytes) a second of this GPU, where its sheet is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((values for key, values in PEAKS.items() if key in name), None)


def build(shape: tuple[Any, ...], device: str, dtype: torch.dtype, rank: int = 16) -> Any:
    """An audio language model of `shape` with LoRA: random weights, made where they are used."""
    family, width, layers, heads, kv_heads, inner, vocabulary, tied = shape
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    small = dict(num_query_tokens=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    config = AudioLLMConfig(
        text_config=text.to_dict(),
        encoder={"name": "spatial_ast", "preset": "tiny"},
        projector=small if vocabulary < 1000 else {},
        audio_token_id=vocabulary - 1,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device(device):
        model = AudioLLMForConditionalGeneration(config).to(dtype)
    return make_trainable(model, lora=LoRARecipe(rank=rank, alpha=2 * rank)).to(device)


def batch_of(model: Any, rows: int, length: int, reply: int, device: str) -> dict[str, Tensor]:
    """Rows of one length: a window of sound, text and a reply of random ids."""
    config, encoder = model.config, model.get_base_model().model.audio_encoder
    sound = config.window_tokens(encoder.window_samples)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, config.audio_token_id, (rows, length), generator=generator)
    ids[:, :sound] = config.audio_token_id
    labels = ids.clone()
    labels[:, :-reply] = -100
    waveform = 0.1 * torch.randn(rows, encoder.num_channels, encoder.window_samples, generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "input_audio": waveform,
        "audio_lengths": torch.full((rows,), encoder.window_samples),
    }
    return {name: value.to(device) for name, value in batch.items()}


def timed(work: Callable[[], Any], device: str, rounds: int) -> float:
    """Median seconds of `work`, the device's own included; the first round warms up."""
    times = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextlib.contextmanager
def room(device: str) -> Iterator[None]:
    """Give the device's memory back behind the block."""
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def sft(device: str, tiny: bool) -> list[Row]:
    """Tokens a second of an SFT step (LoRA, bfloat16), and the share of the peak that its operations are."""
    rows, known = [], peaks()
    count, length = (2, 48) if tiny else (8, 1024)
    shapes = TINY if tiny else SHAPES
    for name, shape in shapes.items():
        with room(device):
            try:
                model = build(shape, device, torch.bfloat16).train()
                batch = batch_of(model, count, length, length // 2, device)
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

                def step(model: Any = model, batch: Any = batch, optimizer: Any = optimizer) -> None:
                    with torch.autocast(device, torch.bfloat16):
                        model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                seconds = timed(step, device, 1 if tiny else 3)
            except torch.cuda.OutOfMemoryError:
                rows.append(Row(f"SFT {name}: does not fit", 0.0))
                continue
            speed = count * length / seconds
            rows.append(Row(f"SFT {name}, {count} rows of {length}", speed, "tokens/s"))
            if known:
                # 2 operations a weight forward, 2 backward for what comes before; a frozen weight has no gradient.
                frozen = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and ".lora_" not in n)
                share, last = 4 * frozen * speed / known[0], name == list(shapes)[-1]
                met = share >= MFU if last else None
                rows.append(Row(f"SFT {name}: share of the peak", share, "", f"at least {MFU}" if last else "", met))
            del model, batch, optimizer, step
    return rows


def replies(policy: PolicyWeights, prompts: int, group: int, tokens: int, prompt: int) -> tuple[Tensor, Any]:
    """Prompts (prompts, prompt) of ids, and groups of replies to them sampled in the policy's own precision."""
    table = policy.base.get_input_embeddings()
    ids = torch.randint(1, policy.base.config.audio_token_id, (prompts, prompt), device=table.weight.device)
    engine = TransformersRollouts()
    engine.sync(policy, 0)
    marks = (policy.base.config.audio_token_id,)
    groups = engine.generate(
        list(table(ids).detach()), [group] * prompts, Sampling(max_tokens=tokens, forbidden_token_ids=marks)
    )
    return ids, groups


def scored(model: Any, ids: Tensor, start: int) -> Tensor:
    """log p (rows, tokens) of what follows position `start` in `ids`."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, start - 1 : -1].float()
    logits[..., model.config.audio_token_id] = float("-inf")
    return torch.gather(logits.log_softmax(-1), -1, ids[:, start:, None])[..., 0]


def grpo(device: str, tiny: bool) -> list[Row]:
    """Where a step of 8 prompts × 8 replies × 256 tokens goes, and how far sampler and scorer are apart in bfloat16."""
    prompts, group, tokens, prompt = (2, 2, 8, 16) if tiny else (8, 8, 256, 128)
    shape = (TINY if tiny else SHAPES)["tiny" if tiny else "0.5B"]
    policy = PolicyWeights(build(shape, device, torch.bfloat16).eval())
    clock: dict[str, float] = {}

    def measure(name: str, work: Callable[[], Any]) -> Any:
        found: list[Any] = []
        clock[name] = timed(lambda: found.append(work()), device, 1)
        return found[-1]

    with torch.autocast(device, torch.bfloat16):
        ids, groups = measure("rollout", lambda: replies(policy, prompts, group, tokens, prompt))
        flat = [reply for replies_ in groups for reply in replies_]
        said = torch.tensor([reply.token_ids for reply in flat], device=device)
        whole = torch.cat([ids.repeat_interleave(group, 0), said], dim=1)

        def score() -> Tensor:
            return torch.cat([scored(policy.model, rows, prompt) for rows in whole.split(group)])

        with torch.no_grad():
            ours = measure("log-prob", score)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)

        def update() -> None:
            for rows in whole.split(group):
                (-scored(policy.model, rows, prompt).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

        measure("update", update)
    with torch.no_grad():

        def merge() -> None:
            with policy.merged() as tensors:
                for _ in tensors:
                    pass

        measure("sync, merged", merge)
    theirs = torch.tensor([reply.logprobs for reply in flat], device=device)
    apart = (ours - theirs).abs().flatten()
    unsure = (1 - theirs.exp()).sum()  # as audio_llm.training.parity weighs them: the error of a logit
    noise = float(apart.sum() / unsure)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):  # what the gate is there for: a sync that was missed
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        missed = float((score() - theirs).abs().sum() / unsure)
    rows = [Row(f"GRPO {prompts}×{group}×{tokens}: {name}", seconds, "s") for name, seconds in clock.items()]
    if known := peaks():
        size = sum(p.numel() * p.element_size() for n, p in policy.base.named_parameters() if "language_model" in n)
        least = tokens * size / known[1]
        rows.append(Row("GRPO rollout: times the reading of its weights", clock["rollout"] / least, "×"))
    for name, value in (("p50", apart.median()), ("p99", apart.quantile(0.99)), ("max", apart.max())):
        rows.append(Row(f"gate in bf16: |Δ log p| {name}", float(value)))
    above = NOISE_FACTOR * noise
    rows += [
        Row("gate in bf16: error of a logit", noise, "", f"at most {FIRST_ERROR:g}", noise <= FIRST_ERROR),
        Row("gate in bf16: the same of other weights", missed, "", f"above {above:.3g}", missed > above),
    ]
    return rows


def precision(device: str, tiny: bool) -> list[Row]:
    """Losses of SFT and of a policy gradient in bfloat16 against float32, over a few steps from the same weights."""
    shape = (TINY if tiny else SHAPES)["tiny" if tiny else "0.5B"]
    steps, rows, length = (2, 2, 32) if tiny else (8, 4, 256)
    curves: dict[str, dict[str, list[float]]] = {"SFT": {}, "GRPO": {}}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for kind, found in curves.items():
            with room(device):
                model = build(shape, device, dtype).train()
                batch = batch_of(model, rows, length, length // 2, device)
                advantages = torch.linspace(-1, 1, rows, device=device)[:, None]
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
                context = torch.autocast(device, torch.bfloat16) if name == "bf16" else contextlib.nullcontext()
                found[name] = []
                for _ in range(steps):
                    with context:
                        if kind == "SFT":
                            loss = model(**batch).loss
                        else:
                            text = batch["input_ids"].clamp(max=model.config.audio_token_id - 1)
                            loss = -(advantages * scored(model, text, length // 2)).mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    found[name].append(float(loss))
    result = []
    for kind, found in curves.items():
        scale = max(1.0, *map(abs, found["fp32"]))
        worst = max(abs(a - b) for a, b in zip(found["fp32"], found["bf16"], strict=True)) / scale
        limit = f"at most {LOSS_BOUND:g}"
        result.append(Row(f"{kind} loss, {steps} steps: bf16 against fp32", worst, "", limit, worst <= LOSS_BOUND))
    return result


@torch.inference_mode()
def encoders(device: str, tiny: bool) -> list[Row]:
    """Every encoder on the device against the CPU: largest difference, and milliseconds of 8 windows."""
    rows = []
    for name, kind in ENCODERS.items():
        if tiny and "tiny" not in kind.presets:
            continue
        torch.manual_seed(0)
        encoder = build_encoder({"name": name, "preset": "tiny"} if "tiny" in kind.presets else {"name": name}).eval()
        samples, count = encoder.window_samples, 1 if tiny else 8
        waveform, lengths = 0.1 * torch.randn(count, encoder.num_channels, samples), torch.full((count,), samples)
        expected, _ = encoder(waveform, lengths)
        encoder, waveform, lengths = encoder.to(device), waveform.to(device), lengths.to(device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found, _ = encoder(waveform, lengths)
        apart = float((found.cpu() - expected).abs().max() / expected.abs().max())
        limit = f"at most {ENCODER_BOUND:g}"
        rows.append(Row(f"{name}: |Δ| against the CPU", apart, "", limit, apart <= ENCODER_BOUND))
        if not tiny:
            seconds = timed(lambda e=encoder, w=waveform, n=lengths: e(w, n), device, 5)  # type: ignore[misc]
            rows.append(Row(f"{name}: {count} windows", 1000 * seconds, "ms"))
    return rows


@torch.inference_mode()
def front_ends(device: str, tiny: bool) -> list[Row]:
    """Front ends on the device against the CPU, in the units of each (decibels, directions)."""
    from benchmarks.features import FRONT_ENDS, clips

    rows = []
    for make in FRONT_ENDS:
        end = make()
        waveform = torch.from_numpy(clips(end)[: 1 if tiny else 8])
        apart = (end.ours(waveform.to(device)).cpu() - end.ours(waveform)).abs()
        met = float(apart.median()) <= 1e-4
        rows.append(Row(f"{end.name}: median |Δ| against the CPU", float(apart.median()), "", "at most 1e-4", met))
    return rows


@torch.inference_mode()
def mamba(device: str, tiny: bool) -> list[Row]:
    """Mamba-2 in chunks on the device against the recurrence, step by step, on the CPU."""
    from benchmarks.mamba import inputs

    values = inputs(64 if tiny else 1000)
    expected = sequential_scan(*values)
    moved = [value.to(device) for value in values]
    apart = float((chunked_scan(*moved).cpu() - expected).abs().max() / expected.abs().max())
    return [Row("Mamba-2: |Δ| against the recurrence", apart, "", "at most 0.01", apart <= 1e-2)]
