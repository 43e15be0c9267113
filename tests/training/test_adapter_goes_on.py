"""A run that begins with another one's base and adapter: the same LoRA and projector go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audio_llm.errors import ConfigError
from audio_llm.training import sft
from audio_llm.training.grpo import GRPORecipe
from tests.training.test_sft import losses, recipe_of

LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


def weights(run: Path) -> dict[str, torch.Tensor]:
    parts = load_file(run / "base" / "model.safetensors") | load_file(run / "adapter" / "adapter_model.safetensors")
    return {name: value for name, value in parts.items() if "projector" in name or ".lora_" in name}


@pytest.fixture(scope="module")
def first(checkpoint, shards, made_once) -> Path:
    def make(folder: Path) -> None:
        sft.run(recipe_of(folder, checkpoint(), shards(), steps=3, lora=LORA, export=["adapter"]))

    return made_once("adapter-first", make)


def stage(folder: Path, first: Path, shards, **changes) -> sft.SFTRecipe:
    recipe = recipe_of(folder, first / "base", shards(), export=["adapter"], **{"lora": LORA, **changes})
    recipe.model.adapter = first / "adapter"
    return recipe


def test_it_begins_where_the_other_ended(first: Path, shards, tmp_path: Path) -> None:
    sft.run(stage(tmp_path / "still", first, shards, steps=1, learning_rate=1e-30, max_grad_norm=1e-30))
    before, after = weights(first), weights(tmp_path / "still")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in before.items())
    sft.run(stage(tmp_path / "on", first, shards, steps=3))
    later = weights(tmp_path / "on")
    assert any(not torch.equal(before[name], later[name]) for name in before if "projector" in name)
    assert any(not torch.equal(before[name], later[name]) for name in before if ".lora_" in name)
    merged = recipe_of(tmp_path / "anew", first / "base", shards(), steps=1, lora=LORA, export=[])
    sft.run(merged)
    assert losses(tmp_path / "on")[1] != losses(tmp_path / "anew")[1], "the base alone is another model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": LORA | {"rank": 8}}, "lora.rank 8, as in the recipe, found 4"),
        ({"lora": LORA | {"alpha": 32}}, "lora.alpha 32, as in the recipe, found 8"),
        ({"lora": LORA | {"targets": ["q_proj", "k_proj"]}}, "k_proj.lora_A.default.weight in the recipe's LoRA"),
        ({"lora": LORA | {"targets": ["q_proj"]}}, "v_proj.lora_A.default.weight in the adapter alone"),
    ],
)
def test_another_adapter_is_refused(first: Path, shards, tmp_path: Path, changes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sft.run(stage(tmp_path, first, shards, steps=1, **changes))


def test_an_adapter_needs_its_base_and_lora(first: Path, shards, tmp_path: Path) -> None:
    recipe = stage(tmp_path, first, shards, steps=1, train={"language_model": "frozen"})
    with pytest.raises(ConfigError, match="train.language_model: lora"):
        recipe.check()
    recipe.model.path = None
    with pytest.raises(ConfigError, match="model.path as well"):
        recipe.model.check()
    from audio_llm import config

    tree = {"output": str(tmp_path), "data": {"train": [str(shards())]}}
    grpo = config.build(GRPORecipe, tree | {"model": {"path": str(first), "adapter": str(first)}})
    with pytest.raises(ConfigError, match="convert merge"):
        grpo.check()
