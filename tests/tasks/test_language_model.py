"""The small language model learns to answer from a description, and its folder is a Transformers folder."""

from __future__ import annotations

import json

import pytest

from audio_llm.errors import CheckpointError, ConfigError
from audio_llm.language.replies import read_reply
from audio_llm.model.build import check_reloaded
from audio_llm.tasks.base import load_recipe
from audio_llm.tasks.language_model.task import (
    LanguageModelRecipe,
    ModelSize,
    described,
    read_text,
    train,
    train_tokenizer,
)


def write_text(path, count: int = 400):
    from audio_llm.shards.schema import Sample

    lines = []
    for number in range(count):
        side = ("left", "right")[number % 2]
        choices = ["left", "right"] if number % 4 < 2 else ["right", "left"]
        sample = Sample(
            id=f"text-{number}", task="spatial", question="On which side?", choices=choices, answer=side,
            thinking=f"noise on the {side}",
        )  # fmt: skip
        lines.append(sample.to_json())
    path.write_text("\n".join(lines))
    return path


def test_it_learns_to_answer_what_the_words_say(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = write_text(tmp_path / "text.jsonl")
    size = ModelSize(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    recipe = LanguageModelRecipe(
        text=text,
        output=tmp_path / "lm",
        vocabulary=320,
        model=size,
        steps=120,
        batch_size=16,
        validation=64,
        warmup_steps=10,
        learning_rate=3e-3,
    )
    folder = train(recipe)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["validation/exact"] > 0.9 > metrics[-1]["loss"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    samples = read_text(text)[-40:]
    for sample in samples:
        prompt, _ = described(sample, "think")
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        reply = tokenizer.decode(
            model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
        )
        choice = read_reply(reply, sample.choices).choice
        right += choice is not None and sample.choices[choice] == sample.answer
    assert right >= 36


def test_a_text_that_is_missing_or_too_short_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        train(LanguageModelRecipe(text=tmp_path / "none.jsonl", output=tmp_path / "lm"))
    with pytest.raises(ConfigError, match="more than 288 lines, found 20"):
        train(LanguageModelRecipe(text=write_text(tmp_path / "short.jsonl", 20), output=tmp_path / "lm"))
    (tmp_path / "recipe.yaml").write_text(
        f"task: language_model\ntext: {tmp_path}/short.jsonl\noutput: {tmp_path}/lm\nstepz: 3\n"
    )
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_tokenizer_that_changes_when_it_is_read_back_is_refused(tmp_path) -> None:
    from transformers import AutoTokenizer, Qwen2Config

    texts = ["dog on the left, 2.5 m; rain behind, 10 m.", "It's 6 m away!"]
    tokenizer = train_tokenizer(texts * 20, vocabulary=320)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check_reloaded(tmp_path, tokenizer, texts)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again.decode(again(text, add_special_tokens=False)["input_ids"]) for text in texts] == texts
    other = train_tokenizer(["entirely different words"] * 20, vocabulary=300)
    with pytest.raises(CheckpointError, match="read back"):
        check_reloaded(tmp_path, other, texts)
