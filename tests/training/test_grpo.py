"""GRPO: TRL's private methods guarded, a policy that hears, groups that are groups, an engine that is in step."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer.utils import RepeatSampler  # noqa: E402

from audio_llm import config, files  # noqa: E402
from audio_llm.errors import ConfigError, TrainingError  # noqa: E402
from audio_llm.model.build import load_model  # noqa: E402
from audio_llm.training import grpo, parity, settings  # noqa: E402
from audio_llm.training.engine_recipe import EngineRecipe  # noqa: E402
from audio_llm.training.examples import Example, join_audio  # noqa: E402
from audio_llm.training.grpo_trainer import AudioGRPOTrainer, GroupSampler  # noqa: E402
from audio_llm.training.launch import batch_layout  # noqa: E402
from audio_llm.training.passes import gather_groups  # noqa: E402
from audio_llm.training.rewards import build_rewards  # noqa: E402
from audio_llm.training.rollouts import PolicyWeights  # noqa: E402
from audio_llm.training.transformers_rollouts import TransformersRollouts  # noqa: E402
from tests.paths import ROOT  # noqa: E402

TIMES = {"load", "rollout", "reward", "logprob", "sync", "update", "step"}
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def even_ids(prompts, completions, completion_ids, **columns):
    """A reward that even a random policy varies in: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def always(prompts, completions, **columns):
    return [1.0] * len(completions)


def always_too(prompts, completions, **columns):
    return [1.0] * len(completions)


def transformers_engine(recipe: EngineRecipe, policy: PolicyWeights, tokenizer: Any, seed: int) -> Any:
    return TransformersRollouts()


def make_recipe(checkpoint, shards, output: Path, **changes: Any) -> grpo.GRPORecipe:
    tree: dict[str, Any] = {
        "output": str(output),
        "model": {"path": str(checkpoint())},
        "data": {"train": [str(shards())]},
        "rewards": {"tests.training.test_grpo:even_ids": 1.0},
        "lora": {"rank": 4, "alpha": 8},
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "export": [],
        "record_order": True,
    }
    return config.build(grpo.GRPORecipe, tree | changes)


def make_trainer(recipe: grpo.GRPORecipe) -> AudioGRPOTrainer:
    """What ``grpo.run`` builds, without running it."""
    functions, weights = build_rewards(recipe.rewards)
    run = grpo.open_run(recipe, weights)
    return grpo.build_trainer(run, recipe, run.load_model(), TransformersRollouts(), functions)


def rows_of(trainer: AudioGRPOTrainer, indices: list[int]) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": ""}], "index": i} for i in indices for _ in range(4)]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def prompts_seen(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "order.jsonl").read_text().splitlines()]


# --- what we rely on in TRL ----------------------------------------------------------------------------------------


def test_trl_is_the_version_whose_private_methods_we_override():
    assert importlib.metadata.version("trl").startswith("1.16.")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["inputs"]),
        ("_tokenize_prompts", ["prompts"]),
        (
            "_generate_single_turn",
            ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (
            "_get_per_token_logps_and_entropies",
            [
                "model",
                "input_ids",
                "attention_mask",
                "logits_to_keep",
                "batch_size",
                "compute_entropy",
                "compute_aux_loss",
            ],
        ),
        ("_compute_loss", ["model", "inputs"]),
        ("_prepare_inputs", ["generation_batch"]),
        ("_get_train_sampler", ["dataset"]),
    ],
)
def test_trl_methods_have_the_signatures_we_override(method, parameters):
    theirs = list(inspect.signature(getattr(GRPOTrainer, method)).parameters)[1:]
    ours = inspect.signature(getattr(AudioGRPOTrainer, method)).parameters
    assert theirs[: len(parameters)] == parameters
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert all(name in ours for name in parameters)
    assert takes_rest or theirs == parameters


def test_sampler_gives_rows_in_trls_order():
    """TRL's own sampler, unshuffled, is the oracle; the last incomplete batch is left out by both."""
    order = list(range(11))
    theirs = RepeatSampler(order, mini_repeat_count=3, batch_size=4, repeat_count=2, shuffle=False)
    ours = GroupSampler(order, 4, 3, 2)
    assert list(ours) == list(theirs)
    assert len(ours) == len(list(theirs))


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"los_type": "grpo"}, r"unknown setting 'los_type' \(did you mean 'loss_type'\?\)"),
        ({"learning_rate": 1e-5}, "recipe's own key learning_rate"),
        ({"num_generations": 8}, "recipe's own key group_size"),
        ({"top_p": 0.9}, "parity_bound: off"),
        ({"repetition_penalty": 1.1}, "parity_bound: off"),
        ({"report_to": "tensorboard"}, "recipe's own key report_to"),
        ({"generation_kwargs": {"top_p": 0.5}}, "grpo: generation_kwargs: .*the engine is the recipe's own"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "model_init_kwargs"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"optim": "adamm"}, "grpo: expected settings that GRPOConfig takes, found .*adamm"),
        ({"beta": "much"}, "grpo: beta: expected float, found 'much'"),
    ],
)
def test_wrong_settings_are_refused_with_a_cure(settings, message, checkpoint, shards, tmp_path):
    with pytest.raises(ConfigError, match=message):
        grpo.training_arguments(make_recipe(checkpoint, shards, tmp_path, grpo=settings), [1.0])


@pytest.mark.parametrize(
    ("changes", "world", "expected"),
    [
        ({}, 1, (8, 1)),
        ({"micro_batch_size": 2}, 1, (2, 4)),
        ({"micro_batch_size": 2}, 2, (2, 2)),
        ({"micro_batch_size": 3}, 1, "divisor of 8"),
        ({}, 3, "multiple of 3 processes"),
        ({"group_size": 1}, 1, "at least 2 replies"),
    ],
)
def test_batch_layout(checkpoint, shards, tmp_path, changes, world, expected):
    recipe = make_recipe(checkpoint, shards, tmp_path, **changes)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            batch_layout(recipe, world)
    else:
        assert batch_layout(recipe, world) == expected


def test_a_checkpoint_inside_a_generation_batch_is_refused(checkpoint, shards, tmp_path):
    recipe = make_recipe(checkpoint, shards, tmp_path, save_steps=3, grpo={"num_iterations": 2})
    with pytest.raises(ConfigError, match="multiple of 2"):
        grpo.training_arguments(recipe, [1.0])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/grpo.yaml")), ids=lambda path: path.parent.name)
def test_recipes_load_and_name_known_settings(path):
    recipe = config.load(grpo.GRPORecipe, path)
    settings.check_settings(GRPOConfig, "grpo", recipe.grpo)
    parity.check_distribution(recipe.grpo)
    build_rewards(recipe.rewards)
    batch_layout(recipe, 1)


# --- hearing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(checkpoint, shards, tmp_path_factory) -> AudioGRPOTrainer:
    trainer = make_trainer(make_recipe(checkpoint, shards, tmp_path_factory.mktemp("grpo"), micro_batch_size=4))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    trainer.engine.sync(trainer.policy, 0)
    return trainer


def scored(trainer: AudioGRPOTrainer, rows: list[Example], seed: int = 0) -> tuple[Any, Any, Any]:
    """Ids, mask and completion length of prompts (left padded) followed by the same random completion."""
    longest = max(len(prompt.ids) for prompt in rows)
    pad = trainer._tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + prompt.ids.tolist() for prompt in rows])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in rows])
    tail = torch.randint(10, 100, (1, 6), generator=torch.Generator().manual_seed(seed)).expand(len(rows), 6)
    return torch.cat([ids, tail], 1), torch.cat([mask, torch.ones_like(tail)], 1), 6


def gradient_of(trainer: AudioGRPOTrainer) -> Any:
    parameters = [p for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat([p.grad.flatten() for p in parameters])


def test_audio_changes_rollout_training_and_gradient(trainer):
    """Same prompt ids, other sound: everything that is computed from the prompt must differ."""
    a, b = trainer.prompts[0], trainer.prompts[1]
    b.ids = a.ids  # the fixture's questions have the same words; the order of the choices may differ
    outcomes = []
    for prompt in (a, b):
        trainer._encode([prompt])
        embedded = trainer._embed([prompt])[0]
        greedy = trainer.engine.generate([embedded], [1], trainer.sampling)[0][0]
        trainer._prompts = [prompt] * 4
        trainer.model.zero_grad()
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *scored(trainer, trainer._prompts))
        logps.sum().backward()
        outcomes.append((embedded, logps.detach(), gradient_of(trainer), greedy))
        trainer._prompts = None
    (embedded_a, logps_a, gradient_a, _), (embedded_b, logps_b, gradient_b, _) = outcomes
    assert embedded_a.shape == embedded_b.shape and (embedded_a - embedded_b).abs().max() > 1e-3
    assert (logps_a - logps_b).abs().max() > 1e-3
    assert (gradient_a - gradient_b).norm() / gradient_a.norm() > 1e-2


def test_rollout_probabilities_change_with_the_audio(trainer):
    """The engine's own log-probabilities of the same tokens: force the choice by sampling until both drew it."""
    a, b = trainer.prompts[0], trainer.prompts[1]
    b.ids = a.ids
    trainer._encode([a, b])
    embedded = trainer._embed([a, b])
    torch.manual_seed(0)
    import dataclasses

    first = dataclasses.replace(trainer.sampling, max_tokens=1)
    groups = trainer.engine.generate(embedded, [64, 64], first)
    of_a, of_b = ({c.token_ids[0]: c.logprobs[0] for c in group} for group in groups)
    common_tokens = of_a.keys() & of_b.keys()
    assert common_tokens
    assert max(abs(of_a[token] - of_b[token]) for token in common_tokens) > 1e-3


def test_rows_that_share_a_clip_score_as_if_each_had_its_own(trainer):
    """One encoding per distinct prompt, spread by index, against the model called with the audio of every row."""
    prompts = [trainer.prompts[i] for i in (0, 1, 2)]
    rows = [prompts[0], prompts[2], prompts[0], prompts[1], prompts[1]]
    ids, mask, keep = scored(trainer, rows)
    trainer._encode(prompts)
    trainer._prompts = rows
    with torch.no_grad():
        ours, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep, batch_size=2)
        trainer._prompts = None
        longest = max(prompt.input_audio.shape[-1] for prompt in rows)
        audio = torch.cat(
            [torch.nn.functional.pad(c.input_audio, (0, longest - c.input_audio.shape[-1])) for c in rows]
        )
        logits = trainer.model(
            input_ids=ids,
            attention_mask=mask,
            input_audio=audio,
            audio_lengths=torch.cat([c.audio_lengths for c in rows]),
        ).logits
    logps = logits[:, -keep - 1 : -1].log_softmax(-1).gather(-1, ids[:, -keep:, None])[..., 0]
    torch.testing.assert_close(ours, logps, rtol=0, atol=1e-4)


def test_rows_that_share_a_prompt_score_and_learn_as_if_each_had_its_own(trainer):
    """Keys and values of a prompt computed once per group: the same log-probabilities, entropies and gradient."""
    prompts = [trainer.prompts[i] for i in (0, 1, 2)]
    prompts[2].ids = torch.cat(
        [torch.tensor([20, 21, 22]), prompts[2].ids]
    )  # prompts of several lengths, so that there is padding
    rows = [prompts[1], prompts[0], prompts[1], prompts[2], prompts[0], prompts[1]]
    ids, mask, keep = scored(trainer, rows)
    ids[:, -keep:] = torch.randint(10, 100, (len(rows), keep), generator=torch.Generator().manual_seed(1))
    mask[2, -3:] = 0  # a shorter reply
    trainer._encode(prompts)
    results = []
    for shared in (True, False):
        trainer.__dict__["_shares_prompts"] = shared
        trainer.model.zero_grad()
        trainer._prompts = rows
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, keep, compute_entropy=True
        )
        valid = mask[:, -keep:].bool()
        (logps[valid] * torch.linspace(-1, 1, int(valid.sum()))).sum().backward()
        results.append((logps.detach()[valid], entropy.detach()[valid], gradient_of(trainer).clone()))
    trainer._prompts = None
    del trainer.__dict__["_shares_prompts"]
    trainer.model.zero_grad()
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_the_head_sees_the_tokens_of_replies_alone(trainer, shared):
    """Replies of 0 to 3 tokens in columns for more: scores and entropies of the model's own logits, zero elsewhere."""
    rows = [trainer.prompts[i] for i in (0, 1, 0, 2)]
    ids, mask, keep = scored(trainer, rows)
    lengths = torch.tensor([3, 1, 0, 2])
    said = torch.arange(keep) < lengths[:, None]
    mask[:, -keep:] = said
    seen = []
    handle = trainer.policy.base.model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.shape[:2])
    )
    trainer.__dict__["_shares_prompts"], trainer._prompts = shared, rows
    try:
        ours, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, keep, compute_entropy=True
        )
        none, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask.clone().index_fill_(1, torch.arange(ids.shape[1] - keep, ids.shape[1]), 0), keep
        )
    finally:
        handle.remove()
        trainer._prompts = None
        del trainer.__dict__["_shares_prompts"]
    assert seen == [(1, int(lengths.sum())), (1, 0)] and ours.shape == entropy.shape == none.shape == said.shape
    with torch.no_grad():
        audio = join_audio(rows)
        logits = trainer.model(input_ids=ids, attention_mask=mask, **audio).logits[:, -keep - 1 : -1]
    expected = logits.log_softmax(-1)
    of_tokens = expected.gather(-1, ids[:, -keep:, None])[..., 0]
    torch.testing.assert_close(ours.detach(), of_tokens * said, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy.detach(), -(expected.exp() * expected).sum(-1) * said, rtol=0, atol=1e-3)
    none.sum().backward()  # a pass of cut replies, all of them masked, is a zero that can be learnt from
    assert not none.any()
    trainer.model.zero_grad()


def test_groups_stay_together_in_micro_batches(trainer):
    prompts = [Example({}, torch.tensor([number]), torch.tensor([-100])) for number in range(4)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=generator)
    rows = [prompts[row // 4] for row in order]
    batches = [
        {"prompts": rows[k : k + 4], "row": order[k : k + 4], "total": torch.tensor(16), "none": None}
        for k in range(0, 16, 4)
    ]
    dealt = gather_groups(batches)
    assert all(len(set(batch["prompts"])) == 1 for batch in dealt)
    assert [batch["prompts"][0] for batch in dealt] == list(dict.fromkeys(rows))
    assert sorted(torch.cat([batch["row"] for batch in dealt]).tolist()) == list(range(16))
    for batch in dealt:
        assert [prompts[row // 4] for row in batch["row"]] == batch["prompts"]
        assert batch["total"] == 16 and batch["none"] is None


def test_scoring_without_clips_is_an_error(trainer):
    rows = [trainer.prompts[0]] * 2
    with pytest.raises(TrainingError, match="a prompt for every row, found none"):
        trainer._get_per_token_logps_and_entropies(trainer.model, *scored(trainer, rows))
    trainer._prompts = rows[:1]
    with pytest.raises(TrainingError, match="a prompt for every row, found 1"):
        trainer._get_per_token_logps_and_entropies(trainer.model, *scored(trainer, rows))
    deaf = Example(rows[0].row, rows[0].ids, rows[0].labels)
    trainer._prompts = [deaf, deaf]
    try:
        with pytest.raises(ValueError, match="no audio reached the model"):
            trainer._get_per_token_logps_and_entropies(trainer.model, *scored(trainer, [deaf, deaf]))
    finally:
        trainer._prompts = None


def test_a_generation_batch_decodes_every_clip_once_and_carries_it(trainer, monkeypatch):
    read = []
    encode = trainer.prompts.encode
    monkeypatch.setattr(
        trainer.prompts, "encode", lambda item, **k: read.append(item["sample"].id) or encode(item, **k)
    )
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows_of(trainer, [3, 4]))
    assert len(read) == 2 and trainer._metrics["train"]["audio/decoded_clips"][-1] == 2
    assert len({id(prompt) for prompt in output["prompts"]}) == 2
    assert [prompt.row["index"] for prompt in output["prompts"]] == [3] * 4 + [4] * 4
    for prompt, ids, mask in zip(output["prompts"], output["prompt_ids"], output["prompt_mask"], strict=True):
        assert ids[mask.bool()].tolist() == prompt.ids.tolist()
    assert trainer._prompts is None


def test_a_broken_group_is_an_error(trainer):
    trainer.model.train()
    rows = rows_of(trainer, [3, 4])
    rows[2], rows[5] = rows[5], rows[2]
    with pytest.raises(TrainingError, match="rows of one prompt"):
        trainer._generate_and_score_completions(rows)


def test_groups_without_signal_are_counted_exactly(checkpoint, shards, tmp_path):
    """1.0 + 0.2 is not exact in float32: so eight equal sums have a standard deviation above zero."""
    weighted = torch.tensor([1.0, 0.2])
    sums = (torch.ones(8, 2) * weighted).nansum(dim=1)
    assert not torch.isclose(sums.std(), torch.zeros(())), "TRL's test would do; ours is not needed any more"
    rewards = {"tests.training.test_grpo:always": 1.0, "tests.training.test_grpo:always_too": 0.2}
    trainer = make_trainer(make_recipe(checkpoint, shards, tmp_path, rewards=rewards, group_size=8))
    trainer.model.train()
    rows = [{"prompt": [{"role": "user", "content": ""}], "index": i} for i in (0, 1) for _ in range(8)]
    trainer._generate_and_score_completions(rows)
    assert trainer._metrics["train"]["groups/zero_variance_share"] == [1.0]
    assert "frac_reward_zero_std" not in trainer._metrics["train"]


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(checkpoint, shards, tmp_path):
    """Metrics, completions, order, result and checkpoints; the exported model is the policy, and it has moved."""
    recipe = make_recipe(
        checkpoint, shards, tmp_path / "run", steps=3, micro_batch_size=4, export=["merged", "adapter"]
    )
    result = grpo.run(recipe, transformers_engine)
    logs = metrics(tmp_path / "run")
    assert [log["step"] for log in logs] == [1, 2, 3] and result["steps"] == 3
    assert result["engine"] == "transformers"
    for log in logs:
        assert {name.removeprefix("time/") for name in log if name.startswith("time/")} == TIMES
        parts = sum(log[f"time/{name}"] for name in TIMES - {"step"})
        assert parts == pytest.approx(log["time/step"], rel=1e-6) and log["time/update"] > 0
        assert log["parity/max_abs_logp_difference"] < 1e-4
        assert log["audio/decoded_clips"] == recipe.prompts_per_step
        assert 0 <= log["groups/zero_variance_share"] <= 1
        assert log["rewards/even_ids/mean"] == pytest.approx(log["reward"])
        assert math.isfinite(log["entropy"]) and log["grad_norm"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 2, 3} and all(line["sample_id"] for line in lines)
    assert all(len(set(entry["ids"])) == 2 for entry in prompts_seen(tmp_path / "run"))
    start, merged = load_model(checkpoint()), load_model(tmp_path / "run" / "merged")
    moved = {
        n for (n, p), q in zip(start.named_parameters(), merged.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert any("language_model" in n for n in moved) and any("projector" in n for n in moved)
    assert not any("audio_encoder" in n or "lm_head" in n for n in moved)


def test_a_resumed_run_repeats_the_uninterrupted_one(checkpoint, shards, tmp_path):
    """Same prompts, same samples, same losses, over the end of an epoch (24 samples, 7 prompts a step)."""
    changes = {"steps": 6, "save_steps": 2, "prompts_per_step": 7, "keep_checkpoints": 9, "group_size": 2}
    whole = make_recipe(checkpoint, shards, tmp_path / "whole", **changes)
    grpo.run(whole, transformers_engine)
    resumed = make_recipe(checkpoint, shards, tmp_path / "resumed", **changes)
    resumed.output.mkdir()
    os.symlink(tmp_path / "whole" / "checkpoint-2", resumed.output / "checkpoint-2")
    for name in ("metrics.jsonl", "order.jsonl", "completions.jsonl"):
        (resumed.output / name).write_text((whole.output / name).read_text())
    grpo.run(resumed, transformers_engine)
    assert prompts_seen(whole.output) == prompts_seen(resumed.output)
    for one, two in zip(metrics(whole.output), metrics(resumed.output), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
        assert one["reward"] == two["reward"]
    texts = [
        [json.loads(line)["text"] for line in (folder / "completions.jsonl").read_text().splitlines()]
        for folder in (whole.output, resumed.output)
    ]
    assert texts[0] == texts[1]


LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "cispo": {"loss_type": "cispo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "num_iterations": 2},
    "beta": {"beta": 0.04},
    "uncorrected": {"vllm_importance_sampling_correction": False},
}
MORE_LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "dr_grpo", "bnpo", "sapo")},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "reuse": {"num_iterations": 2, "steps_per_generation": 2},
    "ahead": {"steps_per_generation": 4},
    **{f"scale_{name}": {"scale_rewards": name} for name in ("batch", "none")},
    "normalize": {"multi_objective_aggregation": "normalize_then_sum"},
    "truncated": {"mask_truncated_completions": True},
    "top_entropy": {"top_entropy_quantile": 0.2},
    "entropy": {"entropy_coef": 0.01},
    "adaptive_entropy": {"use_adaptive_entropy": True},
    "delta": {"delta": 2.0},
    "off_policy": {"off_policy_mask_threshold": 0.5},
    **{mode: {"vllm_importance_sampling_mode": mode} for mode in ("sequence_truncate", "token_mask", "token_truncate")},
}


def run_loss(
    checkpoint, shards, tmp_path: Path, settings: dict[str, Any], bound: float = 1e-3, **changes: Any
) -> list[dict[str, Any]]:
    recipe = make_recipe(checkpoint, shards, tmp_path / "run", grpo=settings, micro_batch_size=4, **changes)
    grpo.run(recipe, transformers_engine)
    logs = metrics(tmp_path / "run")
    assert len(logs) == 2 and all(math.isfinite(log["loss"]) for log in logs)
    assert all(log["parity/max_abs_logp_difference"] < bound for log in logs if "parity/max_abs_logp_difference" in log)
    assert any("parity/max_abs_logp_difference" in log for log in logs)
    return logs


@pytest.mark.parametrize("name", LOSSES)
def test_losses(checkpoint, shards, tmp_path, name):
    logs = run_loss(checkpoint, shards, tmp_path, LOSSES[name])
    assert any(log["grad_norm"] > 0 for log in logs)
    if name == "beta":
        assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[1]["kl"] > 0


@pytest.mark.parametrize("parts", [{"language_model": "full"}, {"language_model": "frozen"}], ids=str)
def test_a_policy_without_adapters_has_a_reference_of_its_own(checkpoint, shards, tmp_path, parts):
    logs = run_loss(checkpoint, shards, tmp_path, {"beta": 0.04}, train=parts)
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[1]["kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LOSSES)
def test_all_losses_and_knobs(checkpoint, shards, tmp_path, name):
    run_loss(checkpoint, shards, tmp_path, MORE_LOSSES[name])


@pytest.mark.slow
def test_a_head_in_float32(checkpoint, shards, tmp_path):
    run_loss(checkpoint, shards, tmp_path, {"cast_lm_head_to_fp32": True}, bound=0.2, precision="bf16")


@pytest.mark.slow
def test_gradient_checkpointing_and_a_trained_encoder(checkpoint, shards, tmp_path):
    run_loss(checkpoint, shards, tmp_path / "a", {}, gradient_checkpointing=True)
    run_loss(checkpoint, shards, tmp_path / "b", {}, train={"encoder": "full"})
    run_loss(checkpoint, shards, tmp_path / "c", {}, train={"language_model": "full"})
    run_loss(checkpoint, shards, tmp_path / "d", {}, train={"language_model": "frozen"})


# --- vLLM ----------------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.vllm
def test_vllm_is_in_step_after_each_of_20_updates_and_the_gate_sees_when_it_is_not(checkpoint, shards, tmp_path):
    from audio_llm.serving.rollout_engines import build_engine

    def stuck(recipe: EngineRecipe, policy: PolicyWeights, tokenizer: Any, seed: int) -> Any:
        """The recipe's engine, which loses every update from the 21st on."""
        engine: Any = build_engine(recipe, policy, tokenizer, seed)
        fill = engine.sync

        def sync(policy: PolicyWeights, version: int) -> float:
            if version <= 20:
                return fill(policy, version)
            engine.version = version
            return 0.0

        engine.sync = sync
        return engine

    engine = {"backend": "vllm", "max_model_len": 128, "max_num_seqs": 16}
    changes = {"engine": engine, "learning_rate": 1e-2, "schedule": "constant"}
    recipe = make_recipe(checkpoint, shards, tmp_path / "run", steps=40, **changes)
    with pytest.raises(TrainingError, match=r"engine 'vllm'.*within 0.001 of the trainer's"):
        grpo.run(recipe, stuck)
    apart = [log["parity/max_abs_logp_difference"] for log in metrics(tmp_path / "run")]
    assert 21 <= len(apart) <= 23 and max(apart[:21]) < 1e-4


def engine_in_step(checkpoint, shards, tmp_path, family: str, tie: bool, sync: str, precision: str, bound: float):
    """20 updates with the engine compared at every one; how far apart the two were at most."""
    from audio_llm.serving.rollout_engines import build_engine

    engine = {"backend": "vllm", "max_model_len": 128, "max_num_seqs": 16, "sync": sync}
    changes = {"engine": engine, "learning_rate": 1e-2, "schedule": "constant", "precision": precision}
    changes["model"] = {"path": str(checkpoint(family, tie=tie))}
    grpo.run(make_recipe(checkpoint, shards, tmp_path / "run", steps=21, parity_bound=bound, **changes), build_engine)
    logs = metrics(tmp_path / "run")
    assert len(logs) == 21
    return max(log["parity/max_abs_logp_difference"] for log in logs)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-4), ("bf16", 0.2)])
@pytest.mark.parametrize("sync", ["merged", "adapter"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_family_head_and_sync_stays_in_step(
    checkpoint, shards, tmp_path, family: str, tie: bool, sync: str, precision: str, bound: float
):
    apart = engine_in_step(checkpoint, shards, tmp_path, family, tie, sync, precision, bound)
    print(f"{family} {'tied' if tie else 'untied'} {sync} {precision}: {apart:.1e}")


# --- processes -----------------------------------------------------------------------------------------------------


def write_recipe(recipe: grpo.GRPORecipe, path: Path) -> Path:
    config.dump(recipe, path)
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_sigkill_and_resume(checkpoint, shards, tmp_path):
    """A run killed at any moment and started again gives the order, the samples and the losses of an unbroken one."""
    changes = {"steps": 12, "save_steps": 3, "engine": {"backend": "vllm" if find_spec("vllm") else "transformers"}}
    changes["engine"] |= {"max_model_len": 128, "max_num_seqs": 16}
    whole = make_recipe(checkpoint, shards, tmp_path / "whole", **changes)
    killed = make_recipe(checkpoint, shards, tmp_path / "killed", **changes)
    command = [sys.executable, "-m", "audio_llm", "grpo"]
    subprocess.run([*command, write_recipe(whole, tmp_path / "w.yaml")], env=environment(), check=True, timeout=600)
    victim = subprocess.Popen([*command, write_recipe(killed, tmp_path / "k.yaml")], env=environment())
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(files.read_lines(killed.output / "metrics.jsonl")) < 5:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 5 <= len(files.read_lines(killed.output / "metrics.jsonl")) < 12
    subprocess.run([*command, tmp_path / "k.yaml"], env=environment(), check=True, timeout=600)
    assert prompts_seen(whole.output) == prompts_seen(killed.output)
    for one, two in zip(metrics(whole.output), metrics(killed.output), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6) and one["reward"] == two["reward"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["cpu_2", "zero2_cpu", "zero3_cpu"])
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_two_processes(checkpoint, shards, tmp_path, layout, backend):
    """DDP, ZeRO-2 and ZeRO-3 with an engine per rank: in step, groups whole, both ranks at work."""
    if backend == "vllm" and not find_spec("vllm"):
        pytest.skip("vLLM is not installed")
    engine = {"backend": backend, "max_model_len": 128, "max_num_seqs": 16}
    recipe = make_recipe(
        checkpoint, shards, tmp_path / "run", steps=3, engine=engine, processes=2, export=["merged"], parity_bound=1e-4
    )
    launch = ["accelerate", "launch", "--config_file", f"recipes/accelerate/{layout}.yaml", "-m", "audio_llm", "grpo"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            *launch[1:],
            write_recipe(recipe, tmp_path / "r.yaml"),
        ],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    logs = metrics(tmp_path / "run")
    assert len(logs) == 3 and all(log["parity/max_abs_logp_difference"] < 1e-4 for log in logs)
    assert all(len(entry["ids"]) == 2 for entry in prompts_seen(tmp_path / "run"))
    load_model(tmp_path / "run" / "merged")
