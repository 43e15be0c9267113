"""Passes of GRPO: groups stay together, columns of padding go, losses and gradients stay."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from audio_llm.training import grpo_trainer  # noqa: E402
from audio_llm.training.passes import gather_groups, trimmed  # noqa: E402
from tests.training.test_grpo import make_recipe, make_trainer, rows_of  # noqa: E402


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
