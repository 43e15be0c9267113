"""AudSemThinker's recipes on tiny native models: trained by the published settings, and written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from audio_llm import config  # noqa: E402
from audio_llm.answering.base import Request  # noqa: E402
from audio_llm.answering.engines import open_engine  # noqa: E402
from audio_llm.audio import Waveform  # noqa: E402
from audio_llm.errors import ConfigError  # noqa: E402
from audio_llm.language.templates import instruct  # noqa: E402
from audio_llm.model.build import load_model, load_processor  # noqa: E402
from audio_llm.model.native import write_native  # noqa: E402
from audio_llm.model.validate import check_adapter, check_checkpoint  # noqa: E402
from audio_llm.training import grpo, sft  # noqa: E402
from eval.benchmarks.base import Item  # noqa: E402
from tests.native_models import OMNI, ONE_FORM, Stock, make_native, sound  # noqa: E402
from tests.paths import ROOT  # noqa: E402
from tests.training.test_grpo import metrics, needs_vllm, transformers_engine  # noqa: E402
from tests.training.test_sft import losses  # noqa: E402

RECIPES = ROOT / "recipes" / "audsem"
INSTRUCTION = "Think in about 25 words."


@pytest.fixture(scope="module")
def native(made_once) -> Callable[[str], Path]:
    return lambda kind: made_once(f"native-{kind}", lambda folder: make_native(kind, folder))


def sft_recipe(model: Path, shards: Path, output: Path, *overrides: str) -> sft.SFTRecipe:
    own = [f"model.path={model}", f"data.train=[{shards}]", "data.validation=[]", "data.workers=0", f"output={output}"]
    own += ["steps=3", "precision=fp32", "learning_rate=1e-2", "save_steps=null", "eval_steps=null", "lora.dropout=0"]
    return config.load(sft.SFTRecipe, RECIPES / "sft.yaml", [*own, *overrides])


def grpo_recipe(model: Path, shards: Path, output: Path, *overrides: str) -> grpo.GRPORecipe:
    own = [f"model.path={model}", f"data.train=[{shards}]", f"output={output}", "steps=2", "precision=fp32"]
    own += ["learning_rate=1e-2", "prompts_per_step=2", "max_completion_length=8", "save_steps=null"]
    own += ["engine.max_model_len=512"]
    return config.load(grpo.GRPORecipe, RECIPES / "grpo.yaml", [*own, *overrides])


@pytest.fixture(scope="module")
def trained(native, shards, tmp_path_factory) -> Callable[[str], Path]:
    """``trained(kind)`` → the run folder of three steps of SFT from the native folder itself."""
    done: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in done:
            output = tmp_path_factory.mktemp(kind) / "sft"
            sft.run(sft_recipe(native(kind), shards(channels=1), output))
            done[kind] = output
        return done[kind]

    return get


def prompt_of(folder: Path, question: str = "On which side is the noise?") -> tuple[Any, Any]:
    """The processor of a checkpoint, and what it makes of one prompt with a sound of 1.3 s."""
    processor = load_processor(folder)
    parts = [{"type": "audio"}, {"type": "text", "text": question}]
    text = processor.render([{"role": "user", "content": parts}], generate=True)
    return processor, processor(text=[text], audio=[[sound(1.3)]])


def greedy(folder: Path, tokens: int = 12) -> list[int]:
    processor, inputs = prompt_of(folder)
    found = load_model(folder).generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", ONE_FORM)
def test_sft_by_the_published_recipe_and_back(kind, native, trained, tmp_path):
    run = trained(kind)
    names = json.loads((run / "trainable.json").read_text())["trained_names"]
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    assert layers == {"q_proj", "v_proj"} and all("language_model.layers" in name for name in names)
    targets = json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == r"model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q_proj|v_proj)"
    assert check_adapter(run / "adapter", run / "base").rank == 8
    assert check_checkpoint(run / "merged")["native"] == check_checkpoint(run / "start")["native"]

    out = write_native(run / "merged", tmp_path / "native", form="thinker" if kind in OMNI else None)
    before, after = load_file(native(kind) / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    text = "model.layers." if kind in OMNI else "language_model.model.layers."
    assert moved == {key for key in before if key.startswith(text) and key.endswith(("q_proj.weight", "v_proj.weight"))}
    processor, inputs = prompt_of(run / "merged")
    never = processor.config.forbidden_token_ids
    assert Stock(out).greedy(inputs["input_ids"], [sound(1.3)], 12, never) == greedy(run / "merged")
    assert greedy(run / "merged") != greedy(run / "start")


def test_the_adapter_answers_what_the_merged_model_does(trained):
    run = trained("qwen2_audio")
    item = Item("0", "On which side is the noise?", ["left", "right"], "left", "side", "test", "c")
    request = Request(item, (Waveform(sound(1.3), 16000, "mono"),), max_tokens=8)
    merged = open_engine("transformers", str(run / "merged"))
    adapted = open_engine("transformers", str(run / "base"), str(run / "adapter"))
    assert next(iter(merged.generate([request]))).raw == next(iter(adapted.generate([request]))).raw


@pytest.mark.parametrize("kind", ["qwen2_audio", "thinker"])
def test_accumulation_gives_one_curve(kind, native, shards, tmp_path):
    """The stock classes take the mean of each pass's mean; here a step's loss is one mean over its tokens."""
    for name, layout in (("one", (8, 1)), ("four", (2, 4))):
        overrides = (f"batch_size={layout[0]}", f"gradient_accumulation={layout[1]}", "export=[]")
        sft.run(sft_recipe(native(kind), shards(channels=1), tmp_path / name, *overrides))
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert max(abs(one[step] - four[step]) for step in one) <= 1e-4 and len(one) == 3
    assert one[1] != one[3]


def test_the_tower_learns_by_the_same_names_where_it_is_asked_to(native, shards, tmp_path):
    overrides = ("train.encoder=lora", "export=[]", "steps=1")
    sft.run(sft_recipe(native("qwen2_audio"), shards(channels=1), tmp_path / "run", *overrides))
    names = json.loads((tmp_path / "run" / "trainable.json").read_text())["trained_names"]
    tower = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if "audio_encoder" in name}
    assert tower == {"q_proj", "v_proj"}


def test_grpo_states_its_target_in_the_checkpoint_from_then_on(trained, shards, tmp_path):
    run = tmp_path / "grpo"
    recipe = grpo_recipe(trained("qwen2_audio") / "merged", shards(channels=1), run)
    result = grpo.run(recipe, transformers_engine)
    assert result["steps"] == 2
    assert max(line["parity/max_abs_logp_difference"] for line in metrics(run) if "reward" in line) <= 1e-3
    processor, _ = prompt_of(run / "merged")
    text = processor.render([{"role": "user", "content": [{"type": "text", "text": "Which?"}]}], generate=True)
    assert text.endswith(f"user\nWhich?\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    item = Item("0", "Which?", [], "left", "side", "test", "c")
    asked = Request(item).render(open_engine("transformers", str(run / "merged"))._tokenizer)  # as evaluation renders
    assert asked == text
    assert processor.tokenizer.chat_template == processor.chat_template
    again = grpo_recipe(run / "merged", shards(channels=1), run / "again")
    assert again.instruction == INSTRUCTION
    instruct(processor, again.instruction)  # once, however often it is said
    assert processor.render([{"role": "user", "content": "a"}]).count(INSTRUCTION) == 1
    instruct(processor, "")
    assert INSTRUCTION not in processor.chat_template


def test_a_target_without_a_reward_for_it_is_refused(native, shards, tmp_path):
    recipe = grpo_recipe(native("thinker"), shards(channels=1), tmp_path, "rewards={answer_accuracy: 1.0}")
    with pytest.raises(ConfigError, match=r"data\.instruction: .target.: expected the reward length"):
        recipe.check()
    recipe = grpo_recipe(native("thinker"), shards(channels=1), tmp_path, "rewards={length: {weight: 1, target: 40}}")
    assert recipe.instruction == "Think in about 40 words."


@pytest.mark.slow
@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("kind", ONE_FORM)
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_vllm_follows_a_native_policy(sync, kind, trained, shards, tmp_path):
    from audio_llm.serving.rollout_engines import build_engine

    overrides = (f"engine.sync={sync}", "steps=20", "epochs=null", "export=[]", "parity_bound=1e-3")
    recipe = grpo_recipe(trained(kind) / "merged", shards(channels=1), tmp_path / "run", *overrides)
    assert grpo.run(recipe, build_engine)["steps"] == 20
    found = [line["parity/max_abs_logp_difference"] for line in metrics(tmp_path / "run") if "reward" in line]
    assert len(found) == 20 and max(found) <= 1e-3
