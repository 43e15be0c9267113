"""Samples of one, two and three sounds in one batch: what is masked, what is heard, what SFT and GRPO make of them."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_llm import files
from audio_llm.audio import silence, swap_channels
from audio_llm.errors import AudioError, TrainingError
from audio_llm.language import prompts
from audio_llm.model.build import load_model, load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import examples, grpo, sft
from audio_llm.training.examples import IGNORED
from tests.training.test_grpo import make_recipe, make_trainer
from tests.training.test_sft import recipe_of


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_processor(checkpoint())


@pytest.fixture(scope="module")
def items(several):
    dataset = ShardDataset(several())
    return [dataset[i] for i in range(6)]


def test_the_prompt_holds_the_sounds_where_they_stand(processor, items) -> None:
    """Placeholders are counted sound by sound, in the places of the words that were written."""
    mark = prompts.AUDIO_TOKEN
    for item in items:
        sample, waves = item["sample"], item["waveforms"]
        example = examples.encode(processor, item, "answer")
        text = processor.tokenizer.decode(example.ids)
        counts = [processor.audio_tokens(wave.num_samples) for wave in waves]
        asked = [sample.question[a:b] for a, b in zip([0, *sample.places], [*sample.places, None], strict=True)]
        parts = asked if sample.places else [""] * len(waves) + [sample.question]
        expected = parts[0] + "".join(mark * n + rest for n, rest in zip(counts, parts[1:], strict=True))
        assert expected in text and int((example.ids == processor.audio_token_id).sum()) == sum(counts)
        windows = sum(-(-wave.num_samples // processor.feature_extractor.window_samples) for wave in waves)
        assert example.windows == windows == len(example.audio_lengths)
        assert int(example.audio_lengths.sum()) == sum(wave.num_samples for wave in waves)
        learnt = processor.tokenizer.decode(example.labels[example.labels != IGNORED])
        assert learnt.startswith(f"<answer>{sample.answer}</answer>")


def test_a_mixed_batch_gives_the_logits_of_each_alone(checkpoint, processor, items) -> None:
    """Padded beside others, with the sounds of others in the same tensor, a sample is heard as by itself; and each of
    its sounds is heard."""
    model = load_model(checkpoint()).eval()
    encoded = [examples.encode(processor, item, "answer") for item in items]

    def logits(rows):
        batch = examples.collate(rows, processor.tokenizer)
        names = ("input_ids", "attention_mask", "input_audio", "audio_lengths")
        with torch.no_grad():
            return model(**{name: batch[name] for name in names}).logits

    together = logits(encoded)
    for row, (example, item) in enumerate(zip(encoded, items, strict=True)):
        alone = logits([example])[0]
        assert torch.allclose(together[row, : len(example.ids)], alone, atol=2e-4)
        for number in range(len(item["waveforms"])):
            waves = [silence(wave) if n == number else wave for n, wave in enumerate(item["waveforms"])]
            silent = logits([examples.encode(processor, item | {"waveforms": waves}, "answer")])[0]
            assert (silent[-1] - alone[-1]).abs().max() > 1e-3


def test_a_part_of_the_sounds_is_refused(processor, items) -> None:
    item = items[1]
    with pytest.raises(TrainingError, match="expected 2 sounds.*found 1, with"):
        sample = dataclasses.replace(item["sample"], places=[])
        examples.encode(processor, item | {"sample": sample, "waveforms": item["waveforms"][:1]})
    with pytest.raises(TrainingError, match="without listening"):
        examples.encode(processor, {name: value for name, value in items[2].items() if name != "waveforms"})
    mono = dataclasses.replace(item["waveforms"][1], samples=item["waveforms"][1].samples[:1], layout="mono")
    with pytest.raises(AudioError, match="several-0-001, sound 2: expected layout binaural or stereo, found mono"):
        examples.encode(processor, item | {"waveforms": [item["waveforms"][0], mono]})
    heard = examples.encode(processor, item | {"waveforms": [item["waveforms"][0], mono]}, hearing="duplicate")
    assert heard.input_audio is not None and torch.equal(heard.input_audio[-1, 0], heard.input_audio[-1, 1])


def test_silence_and_mirrors_are_of_all_sounds(several, processor) -> None:
    dataset = ShardDataset(several())
    silent = examples.Examples(dataset, processor, "answer", silent_share=1.0)
    mirrored = examples.Examples(dataset, processor, "answer", swap_share=1.0)
    for i in range(6):
        assert not silent[i].input_audio.any()
        swapped = [swap_channels(wave) for wave in dataset.load_waveforms(i)]
        expected = examples.encode(processor, dataset[i] | {"waveforms": swapped}, "answer")
        assert torch.equal(mirrored[i].input_audio, expected.input_audio)


def test_sft_learns_from_them_with_and_without_a_cache(several, checkpoint, tmp_path: Path) -> None:
    """The loss falls, and is the same where a frozen encoder's tokens come from disk."""

    def run(name: str, **changes) -> list[float]:
        how = {"steps": 4, "log_steps": 1, "train": {"encoder": "frozen"}, **changes}
        sft.run(recipe_of(tmp_path / name, checkpoint(), several(), **how))
        lines = files.read_lines(tmp_path / name / "metrics.jsonl")
        return [line["loss"] for line in lines if "loss" in line]

    losses = run("frozen")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert np.allclose(run("cached", encoder_cache=str(tmp_path / "cache")), losses, rtol=1e-5)
    (store,) = (tmp_path / "cache").glob("*.sqlite")
    with closing(sqlite3.connect(store)) as table:
        ((windows,),) = table.execute("select count(*) from windows").fetchall()
    assert windows > 4 * 4  # more than samples: those of every sound


def test_grpo_samples_and_scores_them(several, checkpoint, tmp_path: Path) -> None:
    """Rollouts hear what is trained: engine and trainer agree on every token of every mixed batch."""
    trainer = make_trainer(make_recipe(checkpoint, several, tmp_path / "run", steps=2, prompts_per_step=3))
    trainer.train()
    log = [line for line in trainer.state.log_history if "parity/max_abs_logp_difference" in line]
    assert len(log) == 2 and all(line["parity/max_abs_logp_difference"] < 1e-3 for line in log)
    assert all(np.isfinite(line["loss"]) for line in log)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_grpo_with_vllm_in_process(several, checkpoint, tmp_path: Path) -> None:
    from audio_llm.serving.rollout_engines import build_engine

    grpo.run(make_recipe(checkpoint, several, tmp_path / "run", steps=2, prompts_per_step=3), build_engine)
    log = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    apart = [line["parity/max_abs_logp_difference"] for line in log if "parity/max_abs_logp_difference" in line]
    assert len(apart) == 2 and max(apart) < 1e-3
