"""The orders in which clients put text, audio and a system message: taught by a share, written down, told by serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from audio_llm.errors import ConfigError  # noqa: E402
from audio_llm.language.prompts import AUDIO_TOKEN, SYSTEM  # noqa: E402
from audio_llm.model.build import load_processor  # noqa: E402
from audio_llm.serving.launcher import taught_orders  # noqa: E402
from audio_llm.shards.reader import ShardDataset  # noqa: E402
from audio_llm.training import sft  # noqa: E402
from audio_llm.training.examples import IGNORED, Examples  # noqa: E402
from tests.training.test_sft import recipe_of  # noqa: E402


def seen_orders(examples: Examples, processor) -> list[str]:
    orders = []
    for number in range(len(examples)):
        text = processor.tokenizer.decode(examples[number].ids)
        text_first = text.index("On which side") < text.index(AUDIO_TOKEN)
        orders.append("system" if SYSTEM in text else "text" if text_first else "audio")
    return orders


def test_a_share_of_the_samples_stands_in_the_other_orders(checkpoint, shards) -> None:
    processor, dataset = load_processor(checkpoint()), ShardDataset(shards())
    mixed = Examples(dataset, processor, order_share=0.8, seed=1)
    orders = seen_orders(mixed, processor)
    assert orders == list(mixed.orders) == seen_orders(Examples(dataset, processor, order_share=0.8, seed=1), processor)
    assert all(orders.count(order) >= 2 for order in ("audio", "text", "system"))
    assert list(Examples(dataset, processor, order_share=0.8, seed=2).orders) != orders
    plain = Examples(dataset, processor, seed=1)
    assert set(seen_orders(plain, processor)) == {"audio"}
    for number in range(len(dataset)):  # the reply that is learnt, and what is heard, are the same in every order
        one, other = mixed[number], plain[number]
        assert torch.equal(one.labels[one.labels != IGNORED], other.labels[other.labels != IGNORED])
        assert torch.equal(one.input_audio, other.input_audio)


def test_the_checkpoint_says_what_it_was_taught(checkpoint, shards, tmp_path: Path) -> None:
    for name, start, share, expected in (
        ("plain", checkpoint(), 0.0, ["audio"]),
        ("mixed", checkpoint(), 0.5, ["audio", "text", "system"]),
        ("again", tmp_path / "mixed" / "merged", 0.0, ["audio", "text", "system"]),
    ):
        recipe = recipe_of(
            tmp_path / name, start, shards(), steps=1, export=["merged"], data={"order_share": share, "workers": 0}
        )
        sft.run(recipe)
        config = json.loads((tmp_path / name / "merged" / "config.json").read_text())
        assert config["orders"] == expected
        assert ("with a system message" in taught_orders(config)) == (len(expected) > 1)
    assert "ask in that order" in taught_orders({})
    with pytest.raises(ConfigError, match="order_share"):
        recipe_of(tmp_path / "bad", checkpoint(), shards(), data={"order_share": 1.5})
