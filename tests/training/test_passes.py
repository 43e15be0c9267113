"""Passes of GRPO: groups stay together, columns of padding go, losses and gradients stay."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from audio_llm.training import grpo_trainer  # noqa: E402
from audio_llm.training.passes import gather_groups, idle_passes, trimmed  # noqa: E402
from tests.training.test_grpo import even_ids, make_recipe, make_trainer, metrics, rows_of  # noqa: E402


def batch_of(prompts: list[Any], lengths: list[int], left: list[int]) -> dict[str, Any]:
    """Rows with replies of `lengths` of at most 9 tokens and `left` columns of padding before prompts of 5."""
    places = torch.arange(9)[None]
    mask = (places < torch.tensor(lengths)[:, None]).long()
    shown = (torch.arange(5)[None] >= torch.tensor(left)[:, None]).long()
    ids = torch.arange(1, 10)[None] + 100 * torch.arange(len(prompts))[:, None]
    return {
        "prompts": prompts,
        "prompt_ids": torch.arange(5)[None] + ids[:, :1],
        "prompt_mask": shown,
        "completion_ids": ids,
        "completion_mask": mask,
        "sampling_per_token_logps": -ids.float(),
        "importance_sampling_ratio": torch.ones(len(prompts), 1),
        "advantages": torch.arange(len(prompts)),
        "num_items_in_batch": mask.sum(),
    }


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=6))
def test_no_column_is_padding_alone_and_nothing_else_is_lost(rows: list[tuple[int, int]]) -> None:
    lengths, left = [length for length, _ in rows], [start for _, start in rows]
    whole = batch_of(list(range(len(rows))), lengths, left)
    cut = trimmed(whole)
    assert cut["completion_ids"].shape == cut["completion_mask"].shape == cut["sampling_per_token_logps"].shape
    assert cut["completion_ids"].shape[1] == max(*lengths, 1) and cut["prompt_ids"].shape[1] == 5 - min(left)
    for ids, mask in (("completion_ids", "completion_mask"), ("prompt_ids", "prompt_mask")):
        assert cut[ids][cut[mask].bool()].tolist() == whole[ids][whole[mask].bool()].tolist()
    for name in ("importance_sampling_ratio", "advantages", "num_items_in_batch", "prompts"):
        assert cut[name] is whole[name]


@given(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=4, max_size=4), st.randoms())
def test_groups_of_like_lengths_share_a_pass(lengths: list[list[int]], random: Any) -> None:
    rows = [(name, length) for name, group in zip("abcd", lengths, strict=True) for length in group]
    random.shuffle(rows)
    parts = [rows[start : start + 4] for start in (0, 4)]
    batches = [batch_of([name for name, _ in part], [length for _, length in part], [0] * 4) for part in parts]
    dealt = gather_groups(batches, by_length=True)
    seen = [name for batch in dealt for name in batch["prompts"]]
    assert all(seen[start] == seen[start + 1] for start in range(0, 8, 2))
    longest = [max(lengths["abcd".index(name)]) for name in seen]
    assert longest == sorted(longest)
    found = [
        (n, int(m.sum())) for batch in dealt for n, m in zip(batch["prompts"], batch["completion_mask"], strict=True)
    ]
    assert sorted(found) == sorted(rows)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=4, max_size=4), st.randoms())
def test_groups_without_an_advantage_come_first_and_are_idle(groups: list[tuple[bool, int]], random: Any) -> None:
    rows = [(name, *group) for name, group in zip("abcd", groups, strict=True) for _ in range(2)]
    random.shuffle(rows)
    batches = []
    for part in (rows[at : at + 2] for at in (0, 2, 4, 6)):
        batch = batch_of([name for name, _, _ in part], [length for _, _, length in part], [0] * 2)
        batches.append(batch | {"advantages": torch.tensor([0.5 * teaches for _, teaches, _ in part])})
    dealt = gather_groups(batches, by_length=True, idle_first=True)
    seen = [groups["abcd".index(batch["prompts"][0])] for batch in dealt]
    assert seen == sorted(groups)
    assert idle_passes(dealt) == min(sum(not teaches for teaches, _ in groups), 3)


def even_ids_of_some(prompts, completions, completion_ids, sample_id, **columns):
    """`even_ids` where the number of a sample is odd; all replies to the others earn the same."""
    shares = even_ids(prompts, completions, completion_ids)
    return [share * (zlib.crc32(name.encode()) % 2) for share, name in zip(shares, sample_id, strict=True)]


@pytest.mark.parametrize("correction", [True, False])
def test_passes_that_teach_nothing_are_left_out_and_nothing_else_changes(
    checkpoint, shards, tmp_path, monkeypatch, correction
) -> None:
    learnt, computed = {}, {}
    for skips in (True, False):
        changes: dict[str, Any] = {"prompts_per_step": 4, "micro_batch_size": 4, "steps": 3, "warmup_steps": 0}
        rewards = {"tests.training.test_passes:even_ids_of_some": 1.0}
        settings = {"beta": 0.0, "vllm_importance_sampling_correction": correction}
        recipe = make_recipe(checkpoint, shards, tmp_path / str(skips), **changes, rewards=rewards, grpo=settings)
        trainer = make_trainer(recipe)
        if not skips:
            monkeypatch.setattr(grpo_trainer.AudioGRPOTrainer, "_may_skip_passes", False)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        passes: list[int] = []
        score = trainer._get_per_token_logps_and_entropies

        def counted(*args: Any, score: Any = score, passes: list[int] = passes, **kwargs: Any) -> Any:
            passes.append(torch.is_grad_enabled())
            return score(*args, **kwargs)

        trainer._get_per_token_logps_and_entropies = counted
        trainer.train()
        learnt[skips] = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        computed[skips] = sum(passes)
        assert any((learnt[skips][name] != before[name]).any() for name in before)
    flat = [round(line["groups/zero_variance_share"] * 4) for line in metrics(tmp_path / "True")]
    assert any(flat) and computed == {True: sum(max(1, 4 - groups) for groups in flat), False: 12}
    for name, weight in learnt[True].items():
        torch.testing.assert_close(weight, learnt[False][name], atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"loss_type": "bnpo", "beta": 0.0}])
def test_no_pass_is_left_out_where_rows_without_an_advantage_have_a_say(checkpoint, shards, tmp_path, settings) -> None:
    rewards = {"tests.training.test_grpo:always": 1.0}
    changes: dict[str, Any] = {"prompts_per_step": 4, "micro_batch_size": 4, "steps": 1, "rewards": rewards}
    trainer = make_trainer(make_recipe(checkpoint, shards, tmp_path / "run", **changes, grpo=settings))
    trainer.train()
    assert trainer._idle == 0


def one_pass(trainer: Any, inputs: dict[str, Any]) -> tuple[float, list[Any]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_and_its_gradients_are_those_of_padded_rows(checkpoint, shards, tmp_path, monkeypatch, share) -> None:
    recipe = make_recipe(checkpoint, shards, tmp_path / "run", share_prompts=share, grpo={"beta": 0.1})
    trainer = make_trainer(recipe)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # Trainer's loop sets it
    inputs = trainer._generate_and_score_completions(rows_of(trainer, [3, 4]))
    for row, length in enumerate((1, 3, 2, 2, 4, 1, 3, 5)):  # of 8 that a random policy says
        inputs["completion_mask"][row, length:] = 0
    wide = {**inputs, "prompt_ids": torch.nn.functional.pad(inputs["prompt_ids"], (3, 0))}
    wide["prompt_mask"] = torch.nn.functional.pad(inputs["prompt_mask"], (3, 0))
    assert trimmed(wide)["completion_ids"].shape[1] == 5 < inputs["completion_ids"].shape[1]
    loss, gradients = one_pass(trainer, wide)
    monkeypatch.setattr(grpo_trainer, "trimmed", lambda batch: batch)
    expected, padded = one_pass(trainer, inputs)
    assert loss == pytest.approx(expected, abs=1e-6) and gradients
    for ours, theirs in zip(gradients, padded, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"loss_type": "bnpo"}, {"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5}])
def test_where_a_loss_is_a_mean_of_a_pass_the_rows_stay_shuffled(checkpoint, shards, tmp_path, settings) -> None:
    recipe = make_recipe(checkpoint, shards, tmp_path / "run", grpo=settings)
    assert make_trainer(recipe)._means_of_passes
