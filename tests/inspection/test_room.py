"""A run that its machine cannot hold is refused before anything is loaded, by the sum that the doctor prints."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from audio_llm import config
from audio_llm.cli import main
from audio_llm.errors import ConfigError
from audio_llm.inspection import fit, room
from audio_llm.training.recipes import SFTRecipe
from tests.paths import ROOT

GIB = fit.GIB


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_is_known_from_inside_as_from_its_file(path, monkeypatch):
    """By the environment that Accelerate's own launcher makes for its processes."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    args = launch_command_parser().parse_args(["--config_file", str(path), "none.py"])
    args, defaults, _ = _validate_launch_command(args)
    made: dict[str, str] = {}
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, made = prepare_deepspeed_cmd_env(args)
    elif args.multi_gpu or args.use_fsdp:
        made = prepare_multi_gpu_env(args)
    file = fit.launch_of(path, None)
    assert room.launch_here(made | {"WORLD_SIZE": str(file.processes)}) == file


def test_a_launch_without_a_file_of_deepspeed_is_known_by_accelerates_words():
    plain = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "4", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    offloaded = {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}
    found = room.launch_here(plain)
    assert (found.way, found.processes, found.offload, found.optimiser_offload) == ("zero3", 4, False, False)
    assert room.launch_here(plain | offloaded).offload
    assert room.launch_here({}) == fit.Launch()
    offload = ROOT / "recipes" / "deepspeed" / "zero3_offload.json"
    found = room.launch_here(plain | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(offload)})
    assert found.offload and found.optimiser_offload


def recipe_tree(model: Path, **changes: Any) -> dict[str, Any]:
    return {"output": "runs/none", "model": {"path": str(model)}, "data": {"train": ["runs/none"]}} | changes


def test_optimisers_are_named_as_transformers_names_them():
    from transformers.training_args import OptimizerNames

    assert set(fit.STATES) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("optim", [name for name in fit.STATES if "8bit" not in name and "4bit" not in name])
def test_states_of_optimisers_are_those_that_they_keep(optim):
    """One step of each that is installed, on a matrix."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(optim=optim, use_cpu=True, report_to=[])
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        assert "install" in str(error)  # nothing but a package that is not there
        pytest.skip(f"{optim} is not installed")
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], **settings)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    held = sum(value.numel() * value.element_size() for value in tensors)
    assert held / weight.numel() == pytest.approx(fit.STATES[optim], abs=0.2)


def told(text: str) -> dict[str, float]:
    return {item: float(size) for item, size in re.findall(r"(weights|gradients|optimiser|engine) ([\d.]+)", text)}


def test_grpo_of_a_model_that_does_not_fit_beside_its_engine_is_refused_with_the_sum(
    checkpoint, shards, tmp_path, monkeypatch, capsys
):
    """A model of 8 B parameters, whose folder has no weights: nothing of it is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tree = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    tree["text_config"] |= sizes | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(tree))
    recipe = tmp_path / "grpo.yaml"
    own = {"verb": "grpo", "output": str(tmp_path / "run"), "train": {"language_model": "full"}, "precision": "bf16"}
    data = {"data": {"train": [str(shards())]}, "engine": {"backend": "vllm", "gpu_memory_utilization": 0.3}}
    recipe.write_text(yaml.safe_dump(recipe_tree(folder) | own | data | {"steps": 1}))
    monkeypatch.setattr(room, "room_for", lambda output: fit.Room(80 * GIB, None, None, None))
    assert main(["grpo", str(recipe)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    rows = told(line)
    billions = 8.03e9 / GIB  # Llama-3-8B's parameters, and the little that is added
    assert rows["weights"] == pytest.approx(4 * billions, rel=0.01)
    assert rows["gradients"] == pytest.approx(4 * billions, rel=0.01)
    assert rows["optimiser"] == pytest.approx(8 * billions, rel=0.01)
    assert rows["engine"] == pytest.approx(24.0)
    assert (
        "no more than the 80.0 GiB of its GPU" in line and "language_model: lora" in line and "--ignore-memory" in line
    )
    assert not (tmp_path / "run").exists()
    # Adapters of the same model fit, in which case the run itself says what its folder lacks.
    assert main(["grpo", str(recipe), "train={language_model: lora}"]) == 2
    assert "memory of" not in capsys.readouterr().err


def test_a_run_may_go_on_all_the_same(checkpoint, shards, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "sft.yaml"
    own = {"verb": "sft", "output": str(tmp_path / "run"), "data": {"train": [str(shards())]}, "steps": 1}
    recipe.write_text(yaml.safe_dump(recipe_tree(checkpoint()) | own | {"export": [], "precision": "fp32"}))
    monkeypatch.setattr(room, "room_for", lambda output: fit.Room(None, 2**20, None, None))
    assert main(["sft", str(recipe)]) == 2
    assert "that are free, found one of at least" in capsys.readouterr().err
    assert main(["sft", str(recipe), "--ignore-memory"]) == 0
    assert main(["sft", str(recipe)]) == 0  # it is finished
    assert "was finished before" in capsys.readouterr().out


def test_a_tenth_too_much_refuses_nothing(checkpoint, monkeypatch):
    recipe = config.build(SFTRecipe, recipe_tree(checkpoint(), precision="fp32"))
    least = fit.least_need(recipe, fit.Launch(), None).total
    for memory, fits in ((least, True), (round(least / 1.09), True), (round(least / 1.11), False)):
        monkeypatch.setattr(room, "room_for", lambda output, size=memory: fit.Room(None, size, None, None))
        if fits:
            room.check_memory(recipe)
        else:
            with pytest.raises(ConfigError, match="memory of runs/none"):
                room.check_memory(recipe)
