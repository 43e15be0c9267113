"""Every key of Trainer's and TRL's arguments is taken by a recipe and acts, or is refused by name with the reason.

The walk goes through the fields of the installed versions, so that a new one with another key fails here until somebody
has looked at what it does.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, SFTConfig

from audio_llm import files
from audio_llm.cli import main
from audio_llm.errors import ConfigError
from audio_llm.training import callbacks, grpo, parity, settings, sft
from audio_llm.training.rewards import build_rewards
from audio_llm.training.rollouts import Completion
from audio_llm.training.transformers_rollouts import TransformersRollouts
from tests.training.test_grpo import make_recipe, rows_of
from tests.training.test_sft import losses, recipe_of

KINDS: dict[str, tuple[type, dict[str, str], dict[str, str]]] = {
    "trainer": (TrainingArguments, settings.OWN_WORDS, settings.NO_USE),
    "grpo": (
        GRPOConfig,
        settings.OWN_WORDS | settings.GRPO_WORDS,
        settings.NO_USE | settings.GRPO_NO_USE,
    ),
}
# What a recipe may say of Trainer, with a value that is not the default; the tests below show that each one acts.
TAKEN: dict[str, Any] = {
    "optim": "adafactor",
    "optim_args": "momentum=0.5",
    "adam_beta1": 0.7,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "tf32": True,
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "logging_first_step": False,
    "log_on_each_node": False,
    "include_num_input_tokens_seen": "non_padding",
    "log_level": "error",
    "log_level_replica": "info",
    "disable_tqdm": True,
    "full_determinism": True,
    "dataloader_pin_memory": False,
    "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "fork",
    "ddp_bucket_cap_mb": 7,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_timeout": 77,
}
# What is needed beside them.
WITH: dict[str, dict[str, Any]] = {"optim_args": {"optim": "sgd"}}
# The same of TRL, with what has to stand beside the setting.
TAKEN_BY_TRL: dict[str, tuple[Any, dict[str, Any]]] = {
    "loss_type": ("dr_grpo", {}),
    "beta": (0.3, {}),
    "use_bias_correction_kl": (False, {"beta": 0.3}),
    "epsilon": (0.01, {}),
    "epsilon_high": (0.01, {}),
    "delta": (1.01, {}),
    "sapo_temperature_neg": (3.0, {"loss_type": "sapo"}),
    "sapo_temperature_pos": (3.0, {"loss_type": "sapo"}),
    "vespo_k_pos": (4.0, {"loss_type": "vespo"}),
    "vespo_lambda_pos": (6.0, {"loss_type": "vespo"}),
    "vespo_k_neg": (6.0, {"loss_type": "vespo"}),
    "vespo_lambda_neg": (4.0, {"loss_type": "vespo"}),
    "importance_sampling_level": ("sequence", {}),
    "multi_objective_aggregation": ("normalize_then_sum", {}),
    "scale_rewards": ("none", {}),
    "mask_truncated_completions": (True, {}),
    "top_entropy_quantile": (0.3, {}),
    "entropy_coef": (0.5, {}),
    "use_adaptive_entropy": (True, {"entropy_coef": 0.5}),
    "entropy_coef_min": (0.45, {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_coef_delta": 0.2}),
    "entropy_coef_max": (
        0.55,
        {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_coef_delta": 0.2, "entropy_target": 90.0},
    ),
    "entropy_coef_delta": (0.1, {"use_adaptive_entropy": True, "entropy_coef": 0.5}),
    "entropy_target": (90.0, {"use_adaptive_entropy": True, "entropy_coef": 0.5}),
    "vllm_importance_sampling_correction": (False, {}),
    "vllm_importance_sampling_mode": ("token_truncate", {"vllm_importance_sampling_clip_max": 1.01}),
    "vllm_importance_sampling_clip_max": (0.9, {}),
    "vllm_importance_sampling_clip_min": (1.0, {}),
    "vllm_importance_sampling_cap": (0.9, {}),
    "off_policy_mask_threshold": (1e-9, {}),
    "steps_per_generation": (4, {}),
    "num_iterations": (2, {}),
    "disable_dropout": (False, {}),
    "cast_lm_head_to_fp32": (True, {}),
    "top_p": (0.5, {}),
    "top_k": (3, {}),
    "min_p": (0.2, {}),
    "repetition_penalty": (1.5, {}),
}


def names(group: str) -> set[str]:
    return {field.name for field in dataclasses.fields(KINDS[group][0])}


@pytest.mark.parametrize("group", KINDS)
def test_every_key_has_a_class(group):
    _, own, refused = KINDS[group]
    taken = set(TAKEN) if group == "trainer" else (set(TAKEN) | set(TAKEN_BY_TRL)) - set(refused)
    assert names(group) == taken | set(own) | set(refused)
    assert not taken & (set(own) | set(refused))
    assert not set(settings.OWN_WORDS) & set(settings.NO_USE)
    assert set(settings.VALUES) | set(parity.RESTRICTIONS) <= set(TAKEN_BY_TRL)
    assert set(settings.BESIDE) <= set(TAKEN) | set(TAKEN_BY_TRL)


def test_what_the_sft_of_trl_has_beside_is_answered_by_name():
    """All of it, as installed: what is said in other words, and why the rest is not there."""
    theirs = {field.name for field in dataclasses.fields(SFTConfig)} - names("trainer")
    assert {"packing", "padding_free"} <= theirs == set(settings.SFT_WORDS) | set(settings.SFT_NO_USE)
    for group in KINDS:
        for name in theirs if group == "trainer" else ("packing", "padding_free"):
            with pytest.raises(ConfigError) as error:
                settings.check_settings(KINDS[group][0], group, {name: True})
            reason = settings.SFT_NO_USE.get(name) or f"own key {settings.SFT_WORDS[name]}"
            assert name in str(error.value) and reason in str(error.value)
    with pytest.raises(ConfigError, match=r"unknown setting 'paddingfree' .did you mean 'padding_free'"):
        settings.check_settings(TrainingArguments, "trainer", {"paddingfree": True})


def test_the_optimisers_of_bitsandbytes_are_those_that_transformers_makes_with_it():
    theirs = {
        name for name, handler in _OPTIMIZER_HANDLERS.items() if handler.__name__ == "_get_bitsandbytes_optimizer"
    }
    assert {str(name.value) for name in theirs} == set(settings.BITSANDBYTES)


@pytest.mark.parametrize("group", KINDS)
def test_every_refused_key_is_refused_with_its_reason(group):
    known, own, refused = KINDS[group]
    for name in set(own) | set(refused):
        with pytest.raises(ConfigError) as error:
            settings.check_settings(known, group, {name: 1})
        message = str(error.value)
        assert message.startswith(f"{group}: ") and name in message and len(message.splitlines()) == 1
        assert (refused[name] if name in refused else f"own key {own[name]}") in message


def test_each_reason_is_one_sentence_over_the_command_line(checkpoint, shards, tmp_path, capsys):
    """By both trainers that have such a group, before anything is made: of each reason its first key."""
    model, data = {"path": str(checkpoint())}, {"train": [str(shards())]}
    trees: dict[str, dict[str, Any]] = {
        "trainer": {"verb": "sft", "batch_size": 1},
        "grpo": {"verb": "grpo", "engine": {"backend": "transformers"}},
    }
    for group, refused in (("trainer", settings.NO_USE), ("grpo", settings.GRPO_NO_USE)):
        tree = trees[group] | {"output": str(tmp_path / "run"), "model": model, "data": data, "steps": 1}
        recipe = tmp_path / f"{group}.yaml"
        recipe.write_text(yaml.safe_dump(tree | {"precision": "fp32"}))
        firsts = {reason: name for name, reason in reversed(refused.items())}
        for name in [*firsts.values(), "output_dir"]:
            capsys.readouterr()
            assert main([tree["verb"], str(recipe), f"{group}.{name}=1"]) == 2, name
            printed = capsys.readouterr().err.splitlines()
            assert len(printed) == 1 and name in printed[0] and "error:" in printed[0], printed
    assert not (tmp_path / "run").exists()


def test_an_encoder_has_no_such_group(tmp_path, capsys):
    """Its loop is not Trainer's, so that there is nothing to hand its settings to."""
    for group in KINDS:
        recipe = tmp_path / "encoder.yaml"
        recipe.write_text(yaml.safe_dump({"verb": "train", "task": "spatial", "train": ["x"], "output": "y"}))
        assert main(["train", str(recipe), f"{group}.optim=sgd"]) == 2
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 1 and f"unknown key '{group}'" in printed[0]


# ------------------------------------------------------------------------------------------------------------- Trainer


def arguments_of(checkpoint, shards, folder: Path, own: dict[str, Any], **changes: Any) -> TrainingArguments:
    return sft.training_arguments(recipe_of(folder, checkpoint(), shards(), steps=2, trainer=own, **changes))


def trainer_of(checkpoint, shards, folder: Path, own: dict[str, Any], **changes: Any) -> sft.SFTTrainer:
    recipe = recipe_of(folder, checkpoint(), shards(), steps=2, trainer=own, **changes)
    with sft.PolicyRun(recipe, sft.training_arguments(recipe), 4, {}) as run:
        trainer = sft.build_trainer(run, recipe, run.load_model())
        callbacks.quiet(trainer)
    return trainer


@pytest.fixture
def restored() -> Iterator[None]:
    """What some settings change of the whole process."""
    level, cap = transformers_logging.get_verbosity(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
            patch.setenv(name, "")
        yield
    transformers_logging.set_verbosity(level)
    torch.use_deterministic_algorithms(cap)


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_reaches_trainer(name, checkpoint, shards, tmp_path, monkeypatch, restored):
    monkeypatch.setattr(settings, "_has_tf32", lambda found: True)
    own = {name: TAKEN[name]} | WITH.get(name, {})
    if name == "tf32":  # a machine without refuses it, and says so
        with pytest.raises(ConfigError, match="tf32"):
            arguments_of(checkpoint, shards, tmp_path, own)
        return
    found = getattr(arguments_of(checkpoint, shards, tmp_path, own, data={"workers": 1}), name)
    assert getattr(found, "value", found) == TAKEN[name]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize(
    ("name", "value", "works"),
    [
        ("adam_beta1", 0.7, {"adamw_torch"}),
        ("adam_beta2", 0.95, {"adamw_torch"}),
        ("adam_epsilon", 1e-6, {"adamw_torch"}),
        ("optim_args", "momentum=0.5", {"sgd"}),
        ("optim_args", "momentum=0.5,momentun=0.6", set()),
    ],
)
def test_a_setting_of_another_optimiser_is_refused(name, value, works, optim, checkpoint, shards, tmp_path):
    own = {name: value, "optim": optim}
    if optim not in works:
        with pytest.raises(ConfigError, match=f"trainer: {name}: expected an optim that has it beside it"):
            arguments_of(checkpoint, shards, tmp_path, own)
        return
    group = trainer_of(checkpoint, shards, tmp_path, own).create_optimizer().param_groups[0]
    expected = {"adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "optim_args": 0.5}[name]
    found = {"adam_beta1": ("betas", 0), "adam_beta2": ("betas", 1), "adam_epsilon": ("eps",)}.get(name, ("momentum",))
    held = group[found[0]]
    assert (held[found[1]] if len(found) == 2 else held) == expected


def test_settings_of_loaders_processes_and_words_act(checkpoint, shards, tmp_path, restored):
    chosen = ("dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
    chosen += ("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout", "disable_tqdm")
    chosen += ("full_determinism", "log_level", "log_level_replica", "log_on_each_node")
    own = {name: TAKEN[name] for name in chosen}
    plain = trainer_of(checkpoint, shards, tmp_path / "plain", {}, data={"workers": 1})
    assert not torch.are_deterministic_algorithms_enabled()
    trainer = trainer_of(checkpoint, shards, tmp_path / "own", own, data={"workers": 1})
    assert torch.are_deterministic_algorithms_enabled()
    assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    loader = trainer.get_train_dataloader()
    assert (loader.pin_memory, loader.prefetch_factor) == (False, 3)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    handed: Any = trainer.accelerator.ddp_handler
    assert (handed.bucket_cap_mb, handed.broadcast_buffers, handed.static_graph) == (7, False, True)
    bars = [sum(isinstance(one, callbacks.Progress) for one in t.callback_handler.callbacks) for t in (plain, trainer)]
    assert bars == [1, 0]
    assert trainer.args.ddp_timeout_delta.total_seconds() == 77
    # On the first process of another machine, and on a second one.
    trainer.args.distributed_state.local_process_index, trainer.args.distributed_state.process_index = 0, 8
    assert (plain.args.log_on_each_node, plain.args.should_log) == (True, True)
    assert trainer.args.should_log is False
    assert trainer.args.get_process_log_level() == transformers_logging.INFO
    trainer.args.distributed_state.process_index = 0


def test_settings_of_learning_and_logging_act(checkpoint, shards, tmp_path, monkeypatch):
    """Two steps as they are, with noise on the embeddings, and with all that is logged otherwise."""
    from transformers import trainer as theirs

    emptied: list[int] = []
    monkeypatch.setattr(theirs, "clear_device_cache", lambda *args, **kwargs: emptied.append(1))
    found, logs = {}, {}
    for name, own in {
        "plain": {},
        "noise": {"neftune_noise_alpha": 5.0},
        "logs": {"include_num_input_tokens_seen": "non_padding", "torch_empty_cache_steps": 1},
        "later": {"logging_first_step": False},
    }.items():
        folder = tmp_path / name
        recipe = recipe_of(folder, checkpoint(), shards(), steps=2, trainer=own, log_steps=2 if name == "later" else 1)
        sft.run(recipe)
        found[name], logs[name] = losses(folder), files.read_lines(folder / "metrics.jsonl")
        assert emptied == ([1, 1] if name == "logs" else [])
        emptied.clear()
    assert found["plain"] == found["logs"] and found["plain"][1] != found["noise"][1]
    assert list(found["later"]) == [2]
    tokens = [line["num_input_tokens_seen"] for line in logs["logs"]]
    assert len(tokens) == 2 and 0 < tokens[0] < tokens[1]
    assert logs["logs"][1]["train_tokens_per_second"] > 0


# ----------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize("name", TAKEN_BY_TRL)
def test_what_is_taken_reaches_trl(name, checkpoint, shards, tmp_path):
    value, beside = TAKEN_BY_TRL[name]
    changes = {"precision": "bf16"} if name == "cast_lm_head_to_fp32" else {}
    recipe = make_recipe(
        checkpoint, shards, tmp_path, grpo={name: value} | beside, parity_bound="off", micro_batch_size=4, **changes
    )
    assert getattr(grpo.training_arguments(recipe, [1.0]), name) == value


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"loss_type": "ppo"}, "grpo: loss_type: expected one of dapo, .*, found 'ppo'"),
        ({"importance_sampling_level": "word"}, "grpo: importance_sampling_level: expected one of token, sequence"),
        ({"scale_rewards": "all"}, "grpo: scale_rewards: expected one of group, batch, none"),
        ({"multi_objective_aggregation": "max"}, "grpo: multi_objective_aggregation: expected one of"),
        ({"vllm_importance_sampling_mode": "clip"}, "grpo: vllm_importance_sampling_mode: expected one of"),
        (
            {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"},
            "expected token_mask or token_truncate beside loss_type: vespo, found sequence_mask",
        ),
        ({"sapo_temperature_neg": 2.0}, "expected loss_type sapo beside it"),
        ({"vespo_k_pos": 2.0, "loss_type": "cispo"}, "expected loss_type vespo beside it"),
        ({"epsilon": 0.1, "loss_type": "cispo"}, "grpo: epsilon: expected loss_type grpo or .* beside it"),
        ({"delta": 2.0, "loss_type": "sapo"}, "grpo: delta: expected loss_type"),
        ({"importance_sampling_level": "sequence", "loss_type": "vespo"}, "expected loss_type other than vespo"),
        ({"entropy_target": 0.5}, "expected use_adaptive_entropy: true beside it"),
        ({"use_bias_correction_kl": False}, "expected beta above 0 beside it"),
        (
            {"vllm_importance_sampling_clip_max": 2.0, "vllm_importance_sampling_correction": False},
            "expected vllm_importance_sampling_correction: true beside it",
        ),
        ({"cast_lm_head_to_fp32": True}, "expected precision: bf16 beside it"),
    ],
)
def test_a_value_or_a_company_without_effect_is_refused(own, message, checkpoint, shards, tmp_path):
    with pytest.raises(ConfigError, match=message):
        grpo.training_arguments(make_recipe(checkpoint, shards, tmp_path, grpo=own), [1.0])


class OutOfStep(TransformersRollouts):
    """An engine whose log-probabilities are not quite the trainer's, as vLLM's are not; every other token is surer."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return [
            [Completion(one.token_ids, [p + 0.05 * (-1) ** i for i, p in enumerate(one.logprobs)]) for one in group]
            for group in super().generate(*args, **kwargs)
        ]


def short_ids(prompts, completions, completion_ids, **columns):
    """Another reward than even ids, on another scale."""
    return [sum(token < 50 for token in ids) * 3.0 for ids in completion_ids]


def learnt(checkpoint, shards, folder: Path, own: dict[str, Any]) -> dict[str, float]:
    """Losses and gradients of the two passes of a step, of the same replies in every call, by a policy that has moved
    a little since they were drawn; and what the trainer is left with."""
    rewards = {"tests.training.test_grpo:even_ids": 1.0, "tests.training.test_settings:short_ids": 1.0}
    changes: dict[str, Any] = {"micro_batch_size": 4, "parity_bound": "off", "rewards": rewards}
    changes["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.5}
    if own.get("cast_lm_head_to_fp32") is not None:
        changes["precision"] = "bf16"
    recipe = make_recipe(checkpoint, shards, folder, grpo=own, **changes)
    functions, weights = build_rewards(recipe.rewards)
    run = grpo.open_run(recipe, weights)
    trainer = grpo.build_trainer(run, recipe, run.load_model(), OutOfStep(), functions)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    generator = torch.Generator().manual_seed(1)
    adapted = [p for name, p in trainer.model.named_parameters() if ".lora_" in name]
    with torch.no_grad():
        for parameter in adapted:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    torch.manual_seed(3)
    trainer.model.train()
    indices = [0, 1]
    batch = trainer._generate_and_score_completions(rows_of(trainer, indices))
    with torch.no_grad():
        for parameter in adapted:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    torch.manual_seed(4)
    total = 0.0
    for _ in range(2):
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        total += float(loss)
    norm = nn.utils.clip_grad_norm_(adapted, math.inf)
    sampler: Any = trainer._get_train_sampler()
    ids = batch["completion_ids"]
    return {
        "loss": total,
        "gradient": float(norm),
        "entropy_coef": trainer.entropy_coef,
        "repeats": sampler.repeats * sampler.prompts_per_batch,
        "drawn": float((ids * torch.arange(1, ids.numel() + 1).view(ids.shape)).sum()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN_BY_TRL)
def test_what_is_taken_by_trl_acts(name, checkpoint, shards, tmp_path):
    """The replies or what is learnt from them are others than without the setting, and the same twice without."""
    value, beside = TAKEN_BY_TRL[name]
    usual = {name: False} if name == "cast_lm_head_to_fp32" else {}  # in bf16 as well
    first = learnt(checkpoint, shards, tmp_path / "a", beside | usual)
    again = learnt(checkpoint, shards, tmp_path / "b", beside | usual)
    other = learnt(checkpoint, shards, tmp_path / "c", beside | {name: value})
    assert first == again
    assert first != other, json.dumps(first)
    assert all(math.isfinite(number) for number in other.values())


def test_a_mixture_of_experts_learns(checkpoint, shards, tmp_path):
    """Its configuration asks TRL for a loss of its routers, which the audio model does not hand out."""
    recipe = make_recipe(
        lambda: checkpoint("qwen3_moe"), shards, tmp_path, steps=1, rewards={"tests.training.test_grpo:even_ids": 1.0}
    )
    grpo.run(recipe, lambda *parts: TransformersRollouts())
    [line] = files.read_lines(tmp_path / "metrics.jsonl")
    assert line["grad_norm"] > 0 and "aux_loss" not in line
