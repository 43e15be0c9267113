"""A language model in 4 or 8 bits: refused where it cannot be, else trained, resumed, sampled from and exported.

bitsandbytes computes on a CPU too, slowly, so that all but its GPU kernels is run here."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from audio_llm.cli import main
from audio_llm.errors import ConfigError, PrerequisiteError
from audio_llm.model import quantization
from audio_llm.model.build import load_model
from audio_llm.training import grpo, policy, settings, sft
from audio_llm.training.recipes import ModelRecipe
from audio_llm.training.transformers_rollouts import TransformersRollouts
from tests.training.test_grpo import make_recipe, metrics, needs_vllm
from tests.training.test_sft import losses, recipe_of


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    """bitsandbytes with its refusal away, and with a GPU's arithmetic: for inference on a CPU alone it packs weights
    anew, to compute in bfloat16."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(settings, "check_bitsandbytes", lambda item: None)
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("sft", ["model.quantization=4bit"], "model.quantization: 4bit: expected a CUDA GPU"),
        ("grpo", ["model.quantization=4bit"], "model.quantization: 4bit: expected a CUDA GPU"),
        ("grpo", ["model.quantization=8bit"], "expected 4bit, for int8 rounds activations"),
        ("sft", ["model.quantization=8bit", "train={language_model: full}"], "expected train.language_model: lora"),
        ("sft", ["model.quantization=4bit", "train={language_model: frozen}"], "expected train.language_model: lora"),
        ("sft", ["model.quantization=3bit"], "expected one of 4bit, 8bit"),
        ("sft", ["trainer.optim=adamw_8bit"], "trainer: optim: adamw_8bit: expected a CUDA GPU"),
        ("grpo", ["grpo.optim=paged_adamw_8bit"], "grpo: optim: paged_adamw_8bit: expected a CUDA GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_is_refused_in_one_sentence(verb, words, message, checkpoint, shards, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    model, data = {"path": str(checkpoint())}, {"train": [str(shards())]}
    tree = {"verb": verb, "output": str(tmp_path / "run"), "model": model, "data": data, "steps": 1}
    recipe.write_text(yaml.safe_dump(tree))
    capsys.readouterr()
    assert main([verb, str(recipe), *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not [path for path in (tmp_path / "run").glob("*") if path.name != ".lock"]


def test_a_missing_package_and_sharded_weights_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PrerequisiteError, match=r"optim: lion_8bit needs the package 'bitsandbytes'.*\[bitsandbytes\]"):
        settings.check_bitsandbytes("trainer: optim: lion_8bit")
    monkeypatch.setattr(settings, "check_bitsandbytes", lambda item: None)
    for stage, fsdp, found in ((3, None, "ZeRO-3"), (None, True, "FSDP"), (2, None, None), (None, None, None)):
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        arguments = SimpleNamespace(deepspeed_plugin=plugin, fsdp=fsdp)
        if found is None:
            settings.check_quantization("4bit", arguments)
            continue
        with pytest.raises(ConfigError, match=f"weights that are not shared out, found {found}"):
            settings.check_quantization("4bit", arguments)
        settings.check_quantization(None, arguments)


def test_transformers_is_told_of_the_usual_nf4():
    how = quantization.loading("4bit", torch.bfloat16, "cuda:3")
    told = how["quantization_config"].to_dict()
    assert (told["load_in_4bit"], told["load_in_8bit"], told["bnb_4bit_quant_type"]) == (True, False, "nf4")
    assert told["bnb_4bit_use_double_quant"] and told["bnb_4bit_compute_dtype"] == "bfloat16"
    assert how["device_map"] == {"": "cuda:3"}
    assert quantization.loading("8bit", torch.bfloat16, "cuda")["quantization_config"].load_in_8bit


# ------------------------------------------------------------------------------------------------------------ what runs


def quantised(checkpoint, kind: str) -> Any:
    return policy.load_model(checkpoint(), ModelRecipe(path=checkpoint(), quantization=kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_the_linears_of_the_language_model_are_quantised_and_are_as_large_as_told(kind, checkpoint, on_a_cpu):
    plain, model = load_model(checkpoint()), quantised(checkpoint, kind)
    names = [name for name, module in model.named_modules() if quantization.is_quantised(module)]
    linears = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and ".language_model." in n]
    assert names == linears
    assert sum(map(quantization.numbers_of, model.parameters())) == sum(p.numel() for p in plain.parameters())
    state = model.state_dict()
    held = [
        value.numel() * value.element_size()
        for key, value in state.items()
        for name in names
        # The tables of NF4's and of its scales' 272 values come with every layer, and are no matter of size.
        if key.startswith(name) and "bias" not in key and "quant_map" not in key and "quant_state" not in key
    ]
    before = sum(4 * plain.get_parameter(f"{name}.weight").numel() for name in names)
    assert before - quantization.bytes_saved(plain, kind) == pytest.approx(sum(held), rel=0.01)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_what_is_exported_is_what_was_trained(kind, checkpoint, shards, tmp_path, on_a_cpu):
    """Trained in float32, resumed to the same losses, and written as plain weights with the same logits."""
    recipe = recipe_of(
        tmp_path / "run",
        checkpoint(),
        shards(),
        steps=4,
        save_steps=2,
        export=["merged", "adapter"],
        gradient_checkpointing=kind == "4bit",
    )
    recipe.model.quantization = kind
    position = {"samples_per_step": 4, "style": recipe.data.style, "max_length": recipe.data.max_length}
    with sft.PolicyRun(recipe, sft.training_arguments(recipe), 4, position) as run:
        trainer = sft.build_trainer(run, recipe, run.load_model())
        run.train(trainer)
        run.finish(trainer, {})
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    whole = losses(tmp_path / "run")
    assert whole[4] < whole[1]

    plain = load_model(tmp_path / "run" / "merged")
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.arange(10, 60).view(2, 25)
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits
    # int8 rounds activations as well, which the plain weights do not.
    assert float((theirs - ours).std() / ours.std()) < (1e-5 if kind == "4bit" else 0.05)
    assert float((load_model(checkpoint())(input_ids=ids).logits - ours).detach().abs().max()) > 0.05
    files = ("base/model.safetensors", "adapter/adapter_model.safetensors")
    base, adapter = (load_file(tmp_path / "run" / name) for name in files)
    assert base.keys() == load_file(checkpoint() / "model.safetensors").keys()
    assert adapter and all(".lora_" in key for key in adapter)

    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "result.json").unlink()
    sft.run(recipe)
    again = losses(tmp_path / "run")
    assert again.keys() == whole.keys() and max(abs(again[step] - whole[step]) for step in whole) < 1e-6
    told = json.loads((tmp_path / "run" / "trainable.json").read_text())["total"]["parameters"]
    assert told == sum(p.numel() for p in plain.parameters()) + sum(value.numel() for value in adapter.values())


def test_grpo_learns_in_float32_on_four_bits(checkpoint, shards, tmp_path, on_a_cpu):
    """The reference is the policy at first to the last digit, which it is not where TRL has rounded the adapters."""
    model = {"path": str(checkpoint()), "quantization": "4bit"}
    recipe = make_recipe(checkpoint, shards, tmp_path, model=model, grpo={"beta": 0.1}, micro_batch_size=4)
    grpo.run(recipe, lambda *parts: TransformersRollouts())
    logs = metrics(tmp_path)
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-7) and logs[1]["kl"] > 0
    assert all(log["parity/max_abs_logp_difference"] < 1e-4 for log in logs)


@pytest.mark.slow
@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_vllm_follows_a_policy_in_four_bits(sync, checkpoint, shards, tmp_path, on_a_cpu):
    from audio_llm.serving.rollout_engines import build_engine

    engine = {"backend": "vllm", "max_model_len": 128, "max_num_seqs": 16, "sync": sync}
    model = {"path": str(checkpoint()), "quantization": "4bit"}
    recipe = make_recipe(checkpoint, shards, tmp_path, model=model, engine=engine, learning_rate=1e-2, steps=4)
    grpo.run(recipe, build_engine)
    apart = [log["parity/max_abs_logp_difference"] for log in metrics(tmp_path)]
    assert len(apart) == 4 and max(apart) < 1e-4
