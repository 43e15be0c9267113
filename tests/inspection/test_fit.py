"""``audio-llm doctor --recipe``: the sum against what runs really held, and its words where something does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from audio_llm import config
from audio_llm.errors import AudioLLMError
from audio_llm.inspection import fit
from audio_llm.model.build import load_model
from audio_llm.shards.reader import ShardDataset
from audio_llm.training.recipes import GRPORecipe, SFTRecipe
from tests.conftest import tiny_corpus
from tests.paths import ROOT


def make_model(folder: Path, family: str, hidden: int, layers: int, vocabulary: int) -> Path:
    """A checkpoint of a size that counts beside Python's own memory; random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from audio_llm.model.build import build_checkpoint
    from audio_llm.model.encoder import build_encoder
    from audio_llm.tasks.language_model.task import train_tokenizer

    tokenizer = train_tokenizer(tiny_corpus(), vocabulary=400)
    text = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = build_encoder({"name": "spatial_ast", "preset": "tiny", "window_seconds": 0.64, "target_frames": 32})
    sizes = dict(num_query_tokens=4, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192)
    model = AutoModelForCausalLM.from_config(text)
    return build_checkpoint(folder, encoder=encoder, language_model=model, tokenizer=tokenizer, projector=sizes)


def row_lengths(model: Path, shards: Path) -> tuple[int, int]:
    """(tokens of the longest row, tokens of its prompt) in SFT's style ``think``."""
    from audio_llm.model.build import load_processor
    from audio_llm.training.examples import IGNORED, encode

    processor, data = load_processor(model), ShardDataset(shards)
    rows = [encode(processor, data[number], "think") for number in range(len(data))]
    longest = max(rows, key=lambda row: len(row.ids))
    return len(longest.ids), int((longest.labels == IGNORED).sum())


def peak_of(verb: str, recipe: Path) -> int:
    """Most bytes that ``audio-llm VERB`` held (VmRSS, looked at every 5 ms), which must succeed.

    The C library gives blocks above 64 KiB back at once; by itself it keeps what was freed, for later.
    """
    command = [sys.executable, "-m", "audio_llm", verb, str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    most, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
        most = max(most, *(int(line.split()[1]) * 1024 for line in lines), 0)
        time.sleep(0.005)
    assert process.returncode == 0, process.stdout.read().decode()[-2000:]
    return most


CASES = {
    "sft, adapters": ("sft", {"batch_size": 12}, ("qwen3", 512, 10, 16384)),
    "sft, all weights": ("sft", {"batch_size": 8, "train": {"language_model": "full"}}, ("llama", 640, 12, 8192)),
    "grpo": (
        "grpo",
        {"prompts_per_step": 2, "group_size": 8, "micro_batch_size": 16, "max_completion_length": 96},
        ("llama", 640, 12, 8192),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_sum_agrees_with_the_peak_of_a_run(case, made_once, shards, tmp_path):
    """Within 15 % of the whole, and of what comes on top of Python and its libraries."""
    verb, changes, shape = CASES[case]
    model = made_once("fit-" + "-".join(map(str, shape)), lambda folder: make_model(folder, *shape))
    length, prompt = row_lengths(model, shards())
    tree = {
        "verb": verb,
        "output": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "data": {"train": [str(shards())]} | ({"max_length": length} if verb == "sft" else {"style": "answer"}),
        "lora": {"rank": 8, "alpha": 16},
        "precision": "fp32",
        "steps": 2,
        "export": [],
        **changes,
    }
    if verb == "grpo":
        tree |= {"engine": {"backend": "transformers"}, "temperature": 2.0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    measured = peak_of(verb, recipe)
    command = [sys.executable, "-m", "audio_llm", "doctor", "--recipe", str(recipe), "--json", "--prompt", str(prompt)]
    told = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    total, runtime = told["need"]["total"], told["need"]["rows"]["runtime"]
    print(
        case,
        f"told {total / 2**20:.0f} MiB, measured {measured / 2**20:.0f}, runtime {runtime / 2**20:.0f}",
        told["need"]["rows"],
    )
    assert total == pytest.approx(measured, rel=0.15)
    assert total - runtime == pytest.approx(measured - runtime, rel=0.15)


# ------------------------------------------------------------------------------------ without a process of its own

WAYS = {
    "cpu_1": ("one", 1),
    "cpu_2": ("ddp", 1),
    "fsdp2": ("fsdp", 8),
    "fsdp2_cpu": ("fsdp", 2),
    "multi_gpu": ("ddp", 1),
    "single_gpu": ("one", 1),
    "zero2": ("zero2", 8),
    "zero2_cpu": ("zero2", 2),
    "zero3": ("zero3", 8),
    "zero3_cpu": ("zero3", 2),
}


def test_every_launch_that_is_shipped_is_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
    assert {file.stem: (found.way, found.shards) for file in files if (found := fit.launch_of(file, None))} == WAYS
    assert fit.launch_of(files[-1], 16).shards == 16


def sft_recipe(model: Path, **changes) -> SFTRecipe:
    tree = {"output": "runs/fit", "model": {"path": str(model)}, "data": {"train": ["runs/none"], "max_length": 96}}
    return config.build(SFTRecipe, tree | {"precision": "fp32", "batch_size": 3} | changes)


@pytest.mark.parametrize("train", [{}, {"language_model": "full"}, {"encoder": "full", "language_model": "lora"}])
def test_weights_gradients_and_states_are_those_of_the_model(checkpoint, train):
    from audio_llm.model.build import load_model
    from audio_llm.training.policy import make_trainable

    recipe = sft_recipe(checkpoint(), train=train)
    shapes = fit.build(fit.model_config(recipe.model), recipe, torch.float32)
    model = make_trainable(load_model(checkpoint()), recipe.trained(), recipe.lora)
    of_real, of_shapes = (fit.Parameters.of(m) for m in (model, shapes))
    assert of_real == of_shapes
    rows = fit.trained_rows(of_shapes, fit.Launch(), half=False, states=8)
    grown = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = fit.size_of(p.grad for p in model.parameters() if p.grad is not None)
    grown.step()
    moments = fit.size_of(value for state in grown.state.values() for value in state.values() if value.ndim)
    found = {item: size for item, (size, _) in rows.items()}
    assert found == {"weights": of_real.weights, "gradients": gradients, "optimiser": moments}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_what_is_told_without_data_is_what_a_step_with_data_makes(checkpoint, way, checkpointing):
    """The same count over a real step: every shape that depends on values was told rightly."""
    from audio_llm.inspection import trace
    from audio_llm.model.build import load_model, load_processor
    from audio_llm.training.policy import make_trainable
    from benchmarks.sft_step import make_batch

    recipe = sft_recipe(checkpoint(), train={"language_model": way}, gradient_checkpointing=checkpointing)
    processor = load_processor(checkpoint())
    data = make_batch(processor, batch=3, words=20, reply=40, seconds=0.64)
    data["attention_mask"][0, 0] = 0  # a row that is padded
    length = data["input_ids"].shape[1]
    batch = trace.Batch(rows=3, prompt=length - 40, reply=40, windows=3, prompts=3)
    shapes = fit.build(fit.model_config(recipe.model), recipe, torch.float32)
    told = trace.policy_step(shapes, batch, half=False)

    model = make_trainable(load_model(checkpoint()), recipe.trained(), recipe.lora).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with trace.LiveBytes() as live:
        model(**data).loss.backward()
    assert told == pytest.approx(live.peak, rel=0.1)


def test_layers_are_alike(checkpoint):
    """What is told of eight layers by two and four is what eight make."""
    from audio_llm.inspection.trace import policy_step

    recipe = sft_recipe(checkpoint())
    whole = fit.with_layers(fit.model_config(recipe.model), 8)
    step = fit._sft_step(recipe, whole, fit.Rows())
    told = fit._peak(recipe, whole, torch.float32, step, half=False)
    assert told == pytest.approx(policy_step(fit.build(whole, recipe, torch.float32), step.rows, False), rel=0.01)


def test_grpo_shares_prompts_and_splits_over_processes(checkpoint):
    tree = {"output": "runs/fit", "model": {"path": str(checkpoint())}, "data": {"train": ["runs/none"]}}
    more = {"prompts_per_step": 4, "group_size": 4, "max_completion_length": 32, "engine": {"backend": "transformers"}}
    recipe = config.build(GRPORecipe, tree | more)
    alone, apart = (
        fit.policy_need(r, fit.Launch(n, "ddp"), None, fit.Rows(prompt=64)).rows["activations"]
        for r, n in ((recipe, 2), (config.build(GRPORecipe, tree | more | {"share_prompts": False}), 2))
    )
    assert alone < 0.7 * apart
    with pytest.raises(AudioLLMError, match="max_model_len"):
        fit.policy_need(recipe, fit.Launch(), None, fit.Rows(prompt=2000))


def test_of_an_engine_that_sleeps_and_a_step_the_larger_counts(checkpoint):
    tree = {"output": "runs/fit", "model": {"path": str(checkpoint())}, "data": {"train": ["runs/none"]}}
    device = 8 * fit.GIB
    model = load_model(checkpoint())
    parts = (model.model.language_model, model.lm_head)
    numbers = sum({id(p): p.numel() for part in parts for p in part.parameters()}.values())  # a tied head is one
    for share, larger in ((0.5, "engine"), (0.0001, "step")):
        awake, asleep = (
            fit.policy_need(
                config.build(
                    GRPORecipe,
                    tree | {"engine": {"backend": "vllm", "gpu_memory_utilization": share, "sleep": sleep}},
                ),
                fit.Launch(),
                device,
                fit.Rows(prompt=64),
            )
            for sleep in (False, True)
        )
        assert awake.rows == asleep.rows and awake.total == sum(awake.rows.values())
        step = asleep.rows["gradients"] + asleep.rows["activations"]
        assert ("engine" if asleep.rows["engine"] > step else "step") == larger
        assert awake.total - asleep.total == min(asleep.rows["engine"], step)
        assert asleep.host - awake.host == 2 * numbers


@pytest.mark.parametrize("way", ["zero2", "zero3", "fsdp"])
def test_shards_need_less_and_more_processes_less_still(way):
    parts = fit.Parameters(weights=1000, trained=200, adapted=0, plain=1000, text=800, layer=10)
    two, four = (fit.trained_rows(parts, fit.Launch(n, way, bucket=10), half=True, states=8) for n in (2, 4))
    assert four["optimiser"][0] == two["optimiser"][0] / 2
    assert (four["weights"][0] < two["weights"][0]) == (way != "zero2")
    assert sum(size for size, _ in two.values()) < sum(
        size for size, _ in fit.trained_rows(parts, fit.Launch(), False, 8).values()
    )


@pytest.mark.parametrize(
    ("launch", "device", "train"),
    [
        (fit.Launch(), None, "lora"),
        (fit.Launch(4, "zero3", bucket=10), 8 * fit.GIB, "full"),
        (fit.Launch(2, "fsdp"), None, "full"),
    ],
    ids=["one", "zero3", "fsdp"],
)
def test_the_least_is_part_of_the_whole_sum(checkpoint, launch, device, train):
    tree = {"output": "runs/none", "model": {"path": str(checkpoint())}, "data": {"train": ["runs/none"]}}
    recipes: list[Any] = [
        config.build(SFTRecipe, tree | dict(train={"language_model": train})),
        config.build(GRPORecipe, tree | dict(train={"language_model": train}, grpo={"beta": 0.1})),
    ]
    for recipe in recipes:
        least, whole = fit.least_need(recipe, launch, device), fit.policy_need(recipe, launch, device, fit.Rows())
        assert set(least.rows) <= set(whole.rows) - {"activations", "runtime", "buffers"}
        assert all(size == whole.rows[item] for item, size in least.rows.items())
        assert {"weights", "gradients", "optimiser"} <= set(least.rows)
        assert ("reference" in least.rows) == (recipe.verb == "grpo" and train == "full")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"weights": 4, "activations": 8}, "set batch_size to 4 or less"),
        ({"weights": 6, "activations": 40, "optimiser": 1}, "gradient_checkpointing"),
        ({"weights": 9, "activations": 1}, "zero3.yaml"),
        ({"weights": 2, "optimiser": 9}, "language_model: lora"),
        ({"engine": 9, "weights": 2}, "gpu_memory_utilization"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(rows, words):
    need = fit.Need("SFT", {item: size * fit.GIB for item, size in rows.items()}, batch=("batch_size", 8))
    room = fit.Room(device=8 * fit.GIB, memory=None, disk=None, shm=None)
    [sentence] = fit.problems(need, fit.Launch(), room)
    assert words in sentence and f"{need.total / fit.GIB:.2f} of 8.00 GiB" in sentence
    assert not fit.problems(need, fit.Launch(), fit.Room(64 * fit.GIB, None, None, None))


def test_disk_shm_and_host_are_judged():
    need = fit.Need("GRPO", {"weights": 1}, host=4 * fit.GIB, disk=2 * fit.GIB, shm=3 * fit.GIB)
    found = fit.problems(need, fit.Launch(8, "ddp"), fit.Room(fit.GIB, 16 * fit.GIB, fit.GIB, fit.GIB))
    assert [sentence.split()[0] for sentence in found] == ["8", "disk", "/dev/shm"]


def doctor(*arguments: str, capsys) -> tuple[int, str]:
    from audio_llm.cli import main

    code = main(["doctor", *map(str, arguments)])
    return code, "".join(capsys.readouterr())


def test_the_batch_that_is_named_fits(checkpoint, tmp_path, capsys):
    recipe = tmp_path / "sft.yaml"
    tree = {"verb": "sft", "output": str(tmp_path), "model": {"path": str(checkpoint())}}
    recipe.write_text(yaml.safe_dump(tree | {"batch_size": 64, "data": {"train": ["x"], "max_length": 512}}))
    code, text = doctor("--recipe", recipe, "--gpu-memory", "1.0", capsys=capsys)
    assert code == 1 and "set batch_size to " in text
    fitting = text.split("set batch_size to ")[1].split()[0]
    code, text = doctor("--recipe", recipe, "--gpu-memory", "1.0", f"batch_size={fitting}", capsys=capsys)
    assert code == 0 and text.endswith("It fits.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "recipes/quickstart/scenes.yaml"], "sft, grpo or train"),
        (["--recipe", "recipes/quickstart/language_model.yaml"], "one of an encoder"),
        (["--recipe", "recipes/standard/grpo.yaml", "model.path=nowhere"], "model.encoder.name"),
        (["--recipe", "recipes/standard/grpo.yaml", "--processes", "0"], "--processes: expected more than 0"),
        (["--processes", "2"], "--recipe"),
    ],
)
def test_wrong_questions_are_answered(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, text = doctor(*arguments, capsys=capsys)
    assert code == 2 and message in text


def test_an_encoder_of_its_own(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, text = doctor("--recipe", "recipes/quickstart/encoder.yaml", "--json", capsys=capsys)
    rows = json.loads(text)["need"]["rows"]
    assert code == 0 and rows["optimiser"] == 2 * rows["gradients"] and rows["activations"] > rows["weights"]
