"""SFT on one process: what is learnt, from which samples, by which weights, and what comes out."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from audio_llm import config, files
from audio_llm.errors import AudioLLMError, ConfigError, PrerequisiteError, TrainingError
from audio_llm.language import prompts
from audio_llm.model.build import load_model, load_processor
from audio_llm.model.export import export_weights, merge, scale_of, split_state
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import callbacks, examples, launch, policy, run, sft
from audio_llm.training.order import RunSampler
from tests.paths import ROOT


def recipe_of(folder: Path, model: Path, samples: Path, **changes) -> sft.SFTRecipe:
    tree = {
        "output": str(folder),
        "model": {"path": str(model)},
        "data": {"train": [str(samples)], **changes.pop("data", {})},
        "lora": {"rank": 4, "alpha": 8},
        "batch_size": 4,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "export": [],
        "record_order": True,
        **changes,
    }
    return config.build(sft.SFTRecipe, tree)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in files.read_lines(folder / "metrics.jsonl") if "loss" in line}


def order(folder: Path, rank: int = 0) -> list[tuple[int, str]]:
    return [(line["step"], i) for line in files.read_lines(folder / f"order-{rank}.jsonl") for i in line["ids"]]


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_processor(checkpoint())


@pytest.fixture(scope="module")
def items(shards):
    dataset = ShardDataset(shards())
    return [dataset[i] for i in range(6)]


def batch_of(processor, items, **settings):
    return examples.collate([examples.encode(processor, item, **settings) for item in items], processor.tokenizer)


# ------------------------------------------------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("style", prompts.STYLES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_supervised_tokens_are_the_target_text(checkpoint, items, style, family):
    processor = load_processor(checkpoint(family))
    item = items[0]
    item["sample"].thinking = "noise, ünïcode <b> & \n two lines"
    encoded = examples.encode(processor, item, style)
    supervised = encoded.labels != examples.IGNORED
    start = int(supervised.nonzero()[0])
    assert supervised[start:].all() and not supervised[:start].any()
    assert torch.equal(encoded.ids[start:], encoded.labels[start:])
    text = processor.tokenizer.decode(encoded.labels[start:-1])
    assert text == prompts.target_text(item["sample"], style)
    assert int(encoded.labels[-1]) == load_model(checkpoint(family)).generation_config.eos_token_id
    # what precedes is exactly what the model is asked with at inference
    asked = processor(
        text=[processor.render(prompts.conversation(item["sample"]), generate=True)],
        audio=[[item["waveforms"][0].samples]],
    )
    assert torch.equal(asked["input_ids"][0], encoded.ids[:start])


def test_batch_is_padded_right_with_windows_in_prompt_order(processor, items):
    batch = batch_of(processor, items)
    lengths = batch["attention_mask"].sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert batch["attention_mask"][row, :length].all()
        assert (batch["labels"][row, length:] == examples.IGNORED).all()
    assert batch["ids"] == [item["sample"].id for item in items]
    assert batch["audio_lengths"].tolist() == [item["waveforms"][0].num_samples for item in items]
    for row, item in enumerate(items):
        samples = item["waveforms"][0].samples
        assert np.array_equal(batch["input_audio"][row, :, : samples.shape[1]].numpy(), samples)


def test_batch_of_one_and_of_many_have_the_same_logits(checkpoint, processor, items):
    model = load_model(checkpoint())
    keys = ("input_ids", "attention_mask", "input_audio", "audio_lengths")
    with torch.no_grad():
        many = batch_of(processor, items)
        together = model(**{key: many[key] for key in keys}).logits
        for row, item in enumerate(items):
            one = batch_of(processor, [item])
            alone = model(**{key: one[key] for key in keys}).logits[0]
            assert torch.allclose(together[row, : len(alone)], alone, atol=2e-4)


def test_the_head_runs_where_something_is_learnt_and_gives_the_same_loss(checkpoint, processor, items):
    """Loss and gradients are those of all logits with the rest masked out."""
    model, batch = load_model(checkpoint()), batch_of(processor, items)
    inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = inputs.pop("labels")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    logits = model(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
    gradients = torch.autograd.grad(expected, list(model.model.projector.parameters()), allow_unused=True)
    found = model(**inputs, labels=labels)
    supervised = labels[:, 1:] != examples.IGNORED
    assert rows == [labels.numel(), int(supervised.sum())] and rows[1] < rows[0] / 2
    torch.testing.assert_close(found.loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.logits, logits[:, :-1][supervised], atol=1e-5, rtol=1e-4)
    again = torch.autograd.grad(found.loss, list(model.model.projector.parameters()), allow_unused=True)
    for one, other in zip(gradients, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_the_end_of_a_turn_is_what_the_template_writes(checkpoint, items):
    """Also where it opens the next turn at once, and where the tokenizer calls another token its end."""
    processor = load_processor(checkpoint())
    tokenizer, end = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.turn_end == end
    before = examples.encode(processor, items[0])
    assert "'<|im_end|>\\n'" in processor.chat_template
    processor.chat_template = processor.chat_template.replace("'<|im_end|>\\n'", "'<|im_end|>\\n<|im_start|>'")
    tokenizer.eos_token = "<|endoftext|>"
    after = examples.encode(processor, items[0])
    assert processor.turn_end == end and int(after.labels[-1]) == end
    assert torch.equal(after.labels[after.labels >= 0], before.labels[before.labels >= 0])


def test_loss_depends_on_the_audio(checkpoint, processor, items):
    model, batch = load_model(checkpoint()), batch_of(processor, items)
    inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        heard = model(**inputs).loss
        swapped = model(**{**inputs, "input_audio": inputs["input_audio"].flip(1)}).loss
        silent = model(**{**inputs, "input_audio": torch.zeros_like(inputs["input_audio"])}).loss
    assert abs(heard - swapped) > 1e-4 and abs(heard - silent) > 1e-4


def test_deaf_batch_is_an_error(checkpoint, items):
    processor = load_processor(checkpoint())
    batch = batch_of(processor, items[:2])
    model = load_model(checkpoint())
    deaf = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(ValueError, match="no audio reached the model"):
        model(**deaf)
    with pytest.raises(TrainingError, match="without listening"):
        # a sample with audio whose waveform did not arrive
        examples.encode(processor, {key: value for key, value in items[0].items() if key != "waveforms"})
    processor.chat_template = processor.chat_template.replace(prompts.AUDIO_TOKEN, "")
    with pytest.raises(AudioLLMError):
        examples.encode(processor, items[0])


# ------------------------------------------------------------------------------------------------------- which samples


def test_global_order_is_the_same_in_every_layout(shards):
    dataset = ShardDataset(shards())
    sampler = RunSampler(dataset, seed=3, samples=64)
    whole = list(sampler)
    assert len(whole) == len(sampler) == 64
    assert sorted(whole[: len(dataset)]) == list(range(len(dataset)))
    assert sorted(whole[len(dataset) : 2 * len(dataset)]) == list(range(len(dataset)))
    assert whole[: len(dataset)] != whole[len(dataset) : 2 * len(dataset)]
    for world, batch in ((1, 4), (2, 2), (2, 1), (4, 1)):
        ranks = [
            list(BatchSamplerShard(BatchSampler(sampler, batch, False), num_processes=world, process_index=rank))
            for rank in range(world)
        ]
        accumulation = 4 // (world * batch)
        for step in range(64 // 4):
            micro = range(step * accumulation, (step + 1) * accumulation)
            assert {i for rank in ranks for m in micro for i in rank[m]} == set(whole[step * 4 : step * 4 + 4])


def test_long_samples_are_rejected_by_name_and_share(checkpoint, shards, tmp_path, processor):
    dataset = ShardDataset(shards())
    of = [len(examples.encode(processor, dataset[i]).ids) for i in range(len(dataset))]
    limit = sorted(of)[len(of) // 2] - 1  # some fit, some do not
    limited = examples.Examples(dataset, processor, max_length=limit)
    rows = [limited[i] for i in range(len(dataset))]
    too_long = [i for i in range(len(dataset)) if of[i] > limit]
    assert too_long and all(len(row.ids) <= limit for row in rows)
    named = {name.rpartition(": ")[2] for row in rows for name, _ in row.rejects}
    assert named == {dataset.load_sample(i).id for i in too_long}
    recipe = recipe_of(tmp_path / "run", checkpoint(), shards(), steps=12, data={"max_length": limit})
    with pytest.raises(TrainingError, match="rejected samples.*max_reject_share"):
        sft.run(recipe)
    assert {line["sample"] for line in files.read_lines(tmp_path / "run" / "rejects.jsonl")}


def test_a_share_of_the_samples_is_heard_as_silence(shards, processor):
    dataset = ShardDataset(shards())
    heard = examples.Examples(dataset, processor)
    some = examples.Examples(dataset, processor, silent_share=0.5, seed=3)
    again = examples.Examples(dataset, processor, silent_share=0.5, seed=3)
    silent = [i for i in range(len(dataset)) if not some[i].input_audio.any()]
    assert 0 < len(silent) < len(dataset) and list(np.flatnonzero(again.silent)) == silent
    for i in range(len(dataset)):
        assert torch.equal(some[i].ids, heard[i].ids) and torch.equal(some[i].labels, heard[i].labels)
        assert i in silent or torch.equal(some[i].input_audio, heard[i].input_audio)


def test_all_bad_stops_at_once(shards, processor):
    with pytest.raises(TrainingError, match="in a row"):
        examples.Examples(ShardDataset(shards()), processor, max_length=5)[0]


def test_template_must_keep_the_prompt_as_prefix(checkpoint, items):
    processor = load_processor(checkpoint())
    processor.chat_template = "{{ messages|length }}" + processor.chat_template
    with pytest.raises(TrainingError, match="prefix"):
        examples.encode(processor, items[0])


# ------------------------------------------------------------------------------------------------------- which weights


@pytest.mark.parametrize("encoder", ["frozen", "lora", "full"])
def test_only_what_is_asked_for_is_trained(checkpoint, encoder):
    model = policy.make_trainable(
        load_model(checkpoint()), policy.TrainedParts(encoder=encoder), policy.LoRARecipe(rank=4)
    )
    found = policy.trainable_map(model)
    parts = found["parts"]
    assert parts["projector"]["trained"] == parts["projector"]["parameters"]
    assert (parts["audio_encoder"]["trained"] > 0) == (encoder != "frozen")
    assert parts["lm_head"]["trained"] == 0
    language = [name for name in found["trained_names"] if "language_model" in name]
    assert len(language) == 2 * 7 * model.config.text_config.num_hidden_layers
    assert all(".lora_" in name for name in language)
    if encoder == "lora":
        assert all(".lora_" in name for name in found["trained_names"] if "audio_encoder" in name)
    model.train()
    assert model.get_submodule("base_model.model.model.audio_encoder").training == (encoder != "frozen")


def test_frozen_encoder_has_no_gradient_and_does_not_move(checkpoint, shards, tmp_path):
    start = load_model(checkpoint()).model.audio_encoder.state_dict()
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), steps=3, export=["merged"]))
    end = load_model(tmp_path / "merged").model.audio_encoder.state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_the_whole_language_model_is_trained_where_the_recipe_says_so(checkpoint, shards, tmp_path):
    train = {"language_model": "full"}
    result = sft.run(recipe_of(tmp_path, checkpoint(), shards(), steps=2, train=train, export=["merged", "adapter"]))
    assert set(result["exported"]) == {"merged"}
    before, after = load_model(checkpoint()), load_model(tmp_path / "merged")
    moved = [
        not torch.equal(a, b)
        for a, b in zip(before.model.language_model.parameters(), after.model.language_model.parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize("encoder", ["frozen", "lora"])
def test_a_frozen_language_model_does_not_move(checkpoint, shards, tmp_path, encoder):
    train = {"language_model": "frozen", "encoder": encoder}
    result = sft.run(recipe_of(tmp_path, checkpoint(), shards(), steps=2, train=train, export=["merged", "adapter"]))
    assert set(result["exported"]) == {"merged"}  # there is no adapter of the language model to export
    before, after = load_model(checkpoint()), load_model(tmp_path / "merged")
    others = dict(after.named_parameters())
    moved = {name.split(".")[1] for name, value in before.named_parameters() if not torch.equal(value, others[name])}
    assert moved == {"projector"} | ({"audio_encoder"} if encoder == "lora" else set())


def test_parts_that_cannot_be_trained_together_are_refused(checkpoint):
    for parts in ({"projector": "frozen", "language_model": "frozen"}, {"encoder": "lora", "language_model": "full"}):
        with pytest.raises(ConfigError, match="train: expected"):
            policy.make_trainable(load_model(checkpoint()), policy.TrainedParts(**parts))


# ------------------------------------------------------------------------------------------------------------- export


def perturbed(checkpoint, encoder: str, rank_stabilized: bool = False, tie: bool = False):
    torch.manual_seed(1)
    lora = policy.LoRARecipe(rank=4, alpha=8, rank_stabilized=rank_stabilized)
    model = policy.make_trainable(load_model(checkpoint("qwen2", 2, tie)), policy.TrainedParts(encoder=encoder), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize(
    ("encoder", "stabilized", "tie"), [("frozen", False, False), ("lora", True, False), ("full", False, True)]
)
def test_live_merged_and_adapter_agree(checkpoint, processor, items, tmp_path, encoder, stabilized, tie):
    from peft import PeftModel

    model = perturbed(checkpoint, encoder, stabilized, tie)
    batch = batch_of(processor, items)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "input_audio", "audio_lengths")}
    with torch.no_grad():
        live = model(**inputs).logits
        folders = export_weights(model, model.state_dict(), processor, tmp_path)
        merged = load_model(folders["merged"])(**inputs).logits
        served = PeftModel.from_pretrained(load_model(folders["base"]), folders["adapter"]).eval()
        adapted = served(**inputs).logits
        untrained = load_model(checkpoint("qwen2", 2, tie))(**inputs).logits
        oracle = model.merge_and_unload()(**inputs).logits
    for name, found in (("merged", merged), ("adapter", adapted), ("peft", oracle)):
        assert (found - live).abs().max() < 2e-4, name
    assert (untrained - live).abs().max() > 1e-2
    names = [name for name, _ in served.named_modules() if hasattr(_, "lora_A")]
    assert names and all("language_model.layers" in name for name in names)
    adapter = json.loads((folders["adapter"] / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] is None


def test_export_does_not_touch_the_live_model(checkpoint, processor, tmp_path):
    model = perturbed(checkpoint, "lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_weights(model, model.state_dict(), processor, tmp_path, ["merged"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_was_trained_is_float32_in_the_export_of_a_bfloat16_model(checkpoint, processor, tmp_path):
    torch.manual_seed(1)
    start = load_model(checkpoint(), dtype=torch.bfloat16)
    model = policy.make_trainable(start, policy.TrainedParts(), policy.LoRARecipe(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 1e-4)  # what bfloat16 cannot tell from nothing
    folders = export_weights(model, model.state_dict(), processor, tmp_path)
    trained = dict(model.base_model.model.model.projector.modules_to_save["default"].named_parameters())
    for form in ("merged", "base"):
        state = load_file(folders[form] / "model.safetensors")
        found = {name.removeprefix("model.projector."): tensor for name, tensor in state.items() if "projector" in name}
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
        frozen = {tensor.dtype for name, tensor in state.items() if "language_model.layers" in name}
        assert frozen == {torch.bfloat16}
        assert all(p.dtype == torch.float32 for p in load_model(folders[form]).parameters())


def test_merge_is_peft_arithmetic(checkpoint):
    model = perturbed(checkpoint, "frozen", rank_stabilized=True)
    merged = merge(split_state(model.state_dict()), scale_of(model.peft_config["default"]))
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-5), name


# -------------------------------------------------------------------------------------------------------------- the run


def test_layouts_of_a_batch_have_one_learning_curve(checkpoint, shards, tmp_path):
    model, data = checkpoint(), shards()
    sft.run(recipe_of(tmp_path / "4x1", model, data, steps=5, batch_size=4))
    sft.run(recipe_of(tmp_path / "1x4", model, data, steps=5, batch_size=1, gradient_accumulation=4))
    whole, split = losses(tmp_path / "4x1"), losses(tmp_path / "1x4")
    assert whole.keys() == split.keys() and max(abs(whole[s] - split[s]) for s in whole) < 1e-4
    assert sorted(order(tmp_path / "4x1")) == sorted(order(tmp_path / "1x4"))  # in a step, dealt out by length
    assert whole[5] < whole[1]


def test_workers_do_not_change_the_run(checkpoint, shards, tmp_path):
    model, data = checkpoint(), shards()
    sft.run(recipe_of(tmp_path / "none", model, data, steps=3))
    sft.run(recipe_of(tmp_path / "two", model, data, steps=3, data={"workers": 2}))
    assert losses(tmp_path / "none") == losses(tmp_path / "two")
    assert order(tmp_path / "none") == order(tmp_path / "two")


def test_gradient_checkpointing_and_bf16_run(checkpoint, shards, tmp_path):
    model, data = checkpoint(), shards()
    plain = sft.run(recipe_of(tmp_path / "plain", model, data, steps=2))
    spared = sft.run(recipe_of(tmp_path / "spared", model, data, steps=2, gradient_checkpointing=True))
    half = sft.run(recipe_of(tmp_path / "bf16", model, data, steps=2, precision="bf16", export=["merged"]))
    assert spared["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-5)
    assert half["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)


def test_prompts_and_examples_of_one_sample_agree(processor, items):
    """GRPO asks with the ids that SFT learns replies to, and both see the same windows."""
    for item in items:
        prompt, whole = (examples.encode(processor, item, reply=reply) for reply in (False, True))
        assert torch.equal(whole.ids[: len(prompt.ids)], prompt.ids) and (prompt.labels == examples.IGNORED).all()
        assert torch.equal(whole.input_audio, prompt.input_audio) and whole.row == prompt.row
        assert prompt.row["sample_id"] == item["sample"].id and prompt.row["answer"] == item["sample"].answer


def test_finished_run_is_not_repeated(checkpoint, shards, tmp_path, capsys):
    recipe = recipe_of(tmp_path, checkpoint(), shards(), steps=2, export=["merged"])
    first = sft.run(recipe)
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert sft.run(recipe) == json.loads(json.dumps(first))
    assert "this run was finished before" in capsys.readouterr().out
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp
    recipe.steps = 3
    with pytest.raises(ConfigError, match="another run: steps is 3 here and 2 there.*resume=never to start over"):
        sft.run(recipe)
    recipe.resume = "never"
    assert sft.run(recipe)["steps"] == 3


def test_resume_refuses_another_data_stream(checkpoint, shards, tmp_path):
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), steps=2, save_steps=1))
    with pytest.raises(ConfigError, match="seed is 7 here and 0 there"):
        sft.run(recipe_of(tmp_path, checkpoint(), shards(), steps=2, save_steps=1, seed=7))


def test_incomplete_checkpoint_is_passed_over(tmp_path):
    position = {"seed": 0}
    for step, whole in ((2, True), (4, True), (6, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if whole:
            files.write_json(folder / callbacks.COMPLETE, {"step": step, **position})
    assert run.find_resume(tmp_path, "auto", position) == tmp_path / "checkpoint-4"
    assert run.find_resume(tmp_path, "never", position) is None


def test_time_budget_ends_the_run_and_the_schedule(checkpoint, shards, tmp_path, capsys):
    result = sft.run(recipe_of(tmp_path, checkpoint(), shards(), seconds=1.0, save_steps=1000))
    assert 1 <= result["steps"] < 10**6 and 0.9 < result["seconds"] < 10
    rates = [line["learning_rate"] for line in files.read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < rates[0]
    assert callbacks.complete_checkpoints(tmp_path)  # what the budget bought is kept
    assert re.search(rf"100%.* 1/1 s, .*step={result['steps']}\b", bar := capsys.readouterr().err), bar


def test_a_resumed_run_has_the_rest_of_its_time(checkpoint, shards, tmp_path, capsys):
    recipe = recipe_of(tmp_path, checkpoint(), shards(), seconds=1.0, save_steps=1, keep_checkpoints=99)
    first = sft.run(recipe)["steps"]
    (tmp_path / "result.json").unlink()
    assert sft.run(recipe)["steps"] <= first + 2  # its time is over: it makes the step in which it notices that
    assert " 1/1 s" in capsys.readouterr().err


def test_evaluation_is_the_mean_over_tokens(checkpoint, shards, tmp_path, processor):
    data, held_out = shards(), shards(10, 2, 1)
    result = sft.run(
        recipe_of(tmp_path, checkpoint(), data, steps=2, data={"validation": [str(held_out)]}, export=["merged"])
    )
    model, dataset = load_model(tmp_path / "merged"), ShardDataset(held_out)
    total, tokens = 0.0, 0
    for i in range(len(dataset)):
        batch = batch_of(processor, [dataset[i]])
        count = int((batch["labels"] != examples.IGNORED).sum())
        inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        with torch.no_grad():
            total += float(model(**inputs).loss) * count
        tokens += count
    assert result["eval_tokens"] == tokens
    assert result["eval_loss"] == pytest.approx(total / tokens, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ launching


@pytest.mark.parametrize(
    ("world", "expected", "environment", "fails"),
    [
        (1, None, {}, False),
        (1, 1, {}, False),
        (2, 2, {"WORLD_SIZE": "2"}, False),
        (1, 2, {}, True),
        (2, 4, {"WORLD_SIZE": "2"}, True),
        (1, None, {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (1, None, {"SLURM_STEP_NUM_TASKS": "8"}, True),
        (1, None, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, False),
        (1, None, {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, True),
    ],
)
def test_launch_check(world, expected, environment, fails):
    if fails:
        with pytest.raises(TrainingError, match="--multi_gpu"):
            launch.check_launch(world, expected, environment)
    else:
        launch.check_launch(world, expected, environment)


def test_lock_of_a_killed_build_is_named(tmp_path):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    launch.check_build_locks(env)
    old = time.time() - 3600
    os.utime(lock, (old, old))
    with pytest.raises(PrerequisiteError, match=str(lock)):
        launch.check_build_locks(env)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_configurations_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.num_processes >= 1
    deepspeed = getattr(found, "deepspeed_config", None) or {}
    if deepspeed:
        assert (ROOT / deepspeed["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_deepspeed_configurations_are_accepted(path):
    from deepspeed.runtime.zero.config import get_zero_config

    tree = json.loads(path.read_text())
    zero = tree["zero_optimization"]
    found = get_zero_config({"zero_optimization": {k: v for k, v in zero.items() if v != "auto"}})
    assert int(found.stage) == int(path.stem.removeprefix("zero")[0])


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"encoder": "full", "projector": "frozen"}, ("full", "frozen", "lora")),
        ({"lora": None}, ("frozen", "full", "full")),
        ({"model": {"encoder": {"name": "beats", "train": "lora"}}}, ("lora", "full", "lora")),
    ],
)
def test_old_keys_of_what_is_trained_are_read(changes, trained, capsys):
    config.note.cache_clear()
    tree = {"output": "run", "model": {}, "data": {"train": []}, **changes}
    recipe = config.build(sft.SFTRecipe, tree)
    assert tuple(vars(recipe.train).values()) == trained and recipe.lora is not None
    assert not recipe.model.encoder or "train" not in recipe.model.encoder
    assert "train" in capsys.readouterr().err
    if "encoder" in changes:
        with pytest.raises(ConfigError, match="found both"):
            config.build(sft.SFTRecipe, tree | {"train": changes})


@pytest.mark.parametrize(
    "path", [ROOT / "recipes" / folder / "sft.yaml" for folder in ("quickstart", "standard")], ids=str
)
def test_recipes_load(path):
    recipe = config.load(sft.SFTRecipe, path)
    assert run.planned_steps(recipe, 1000, recipe.batch_size) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam_beta": 0.9}, "unknown setting 'adam_beta'.*TrainingArguments lists them all"),
        ({"bf16": True}, "trainer: 'bf16' is set by the recipe's own key precision"),
        ({"push_to_hub": True}, "nothing is uploaded"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"train_sampling_strategy": "group_by_length"}, "the order of samples is the run's own"),
        ({"optim": "galore_adamw"}, "trainer: optim: expected an optimiser of parameters"),
    ],
)
def test_settings_of_sft_that_do_nothing_are_refused(settings, message, checkpoint, shards, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sft.training_arguments(recipe_of(tmp_path, checkpoint(), shards(), steps=1, trainer=settings))


def test_settings_of_sft_are_the_trainers(checkpoint, shards, tmp_path):
    usual = sft.training_arguments(recipe_of(tmp_path, checkpoint(), shards(), steps=1))
    assert (usual.adam_beta2, usual.optim) == (0.999, "adamw_torch_fused")
    own = {"adam_beta2": 0.95, "optim": "adamw_torch"}
    recipe = recipe_of(tmp_path, checkpoint(), shards(), steps=1, trainer=own)
    with sft.PolicyRun(recipe, sft.training_arguments(recipe), 4, {}) as run:
        trainer = sft.build_trainer(run, recipe, run.load_model())
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW and not optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
