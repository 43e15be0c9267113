"""A checkpoint's folder that is damaged, or whose files are not of one model: a sentence that names what is wrong, and
never an answer by weights that nobody trained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, CheckpointError
from audio_llm.model.build import load_language_model, load_model, load_processor
from audio_llm.model.loading import reading, whole_model
from audio_llm.model.validate import check_adapter, check_checkpoint, check_finite, end_ids
from tests.serving.vllm_tools import make_adapter

Damage = Callable[[Path], object]


def said(file: str, *keys: str, value: Any) -> Damage:
    """Another `value` under `keys` in a file of JSON."""

    def change(folder: Path) -> None:
        tree = node = json.loads((folder / file).read_text())
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        (folder / file).write_text(json.dumps(tree))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return apply


def without(part: str) -> Damage:
    return weights(lambda state: state.pop(next(key for key in state if part in key)))


def bytes_of(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def torn(file: str) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-9])


TEXT, CONFIG, EXTRACTOR = "text_config", "config.json", ("processor_config.json", "feature_extractor")
ELSEWHERE = {"metadata": {}, "weight_map": {"model.projector.linear.weight": "model-00001-of-00002.safetensors"}}
NAN, ONES = float("nan"), torch.ones(2)
DAMAGED: dict[str, tuple[Damage, str]] = {
    "vocabulary": (said(CONFIG, TEXT, "vocab_size", value=4096), "embed_tokens.weight of [4096, 128]"),
    "width": (said(CONFIG, TEXT, "hidden_size", value=64), "as config.json says, found [357, 128]"),
    "a layer less": (said(CONFIG, TEXT, "num_hidden_layers", value=1), "1 layers of the language model"),
    "a layer more": (said(CONFIG, TEXT, "num_hidden_layers", value=3), "3 layers of the language model"),
    "no heads": (said(CONFIG, TEXT, "num_attention_heads", value=0), "a model that can be loaded"),
    "other heads": (said(CONFIG, TEXT, "num_attention_heads", value=5), "where config.json says"),
    "a word for a number": (said(CONFIG, TEXT, "rms_norm_eps", value="x"), "rms_norm_eps"),
    "no language model": (said(CONFIG, TEXT, value=None), "text_config in config.json: expected a mapping"),
    "another encoder": (said(CONFIG, "encoder", "hidden_size", value=96), "where config.json says"),
    "a shallower encoder": (said(CONFIG, "encoder", "depth", value=1), "of which config.json knows nothing"),
    "another projector": (said(CONFIG, "projector", "num_query_tokens", value=9), "(1, 9, 48)"),
    "a list for a projector": (said(CONFIG, "projector", value=[1]), "can be loaded"),
    "marks": (said(CONFIG, "audio_marks", value=7), "audio_marks in config.json: expected a list"),
    "orders": (said(CONFIG, "orders", value=5), "orders in config.json: expected a list"),
    "a layer's weight is missing": (without("layers.0.mlp"), "no weights model.language_model.layers.0.mlp"),
    "the projector's": (without("projector"), "no weights model.projector"),
    "the encoder's": (without("audio_encoder"), "no weights model.audio_encoder"),
    "more weights": (weights(lambda state: state.update({"model.projector.more": ONES})), "model.projector.more"),
    "diverged": (weights(lambda state: state.update({k: v * NAN for k, v in state.items() if "norm" in k})), "NaN"),
    "torn weights": (torn("model.safetensors"), "a safetensors file"),
    "no shard": (
        lambda folder: (
            bytes_of("model.safetensors.index.json", json.dumps(ELSEWHERE).encode())(folder),
            (folder / "model.safetensors").unlink(),
        ),
        "weights in model-00001-of-00002.safetensors, found no such file",
    ),
    "torn words": (torn("tokenizer.json"), "tokenizer.json: expected valid JSON"),
    "no words": (said("tokenizer.json", "model", value=None), "can be loaded"),
    "no tokens": (said("tokenizer.json", "added_tokens", value={"a": 1}), "added_tokens as a list"),
    "a list for settings": (bytes_of("tokenizer_config.json", b"[]"), "can be loaded"),
    "a torn processor": (torn("processor_config.json"), "processor_config.json"),
    "another rate": (said(*EXTRACTOR, "sampling_rate", value=8000), "expected 16000, as its encoder hears, found 8000"),
    "no rate": (said(*EXTRACTOR, "sampling_rate", value="x"), "sampling_rate in processor_config.json"),
    "other channels": (said(*EXTRACTOR, "num_channels", value=5), "num_channels in processor_config.json"),
    "another layout": (said(*EXTRACTOR, "layouts", value=["foa"]), "layouts in processor_config.json"),
    "another window": (said(*EXTRACTOR, "window_seconds", value=2.0), "window_seconds in processor_config.json"),
    "torn settings of replies": (torn("generation_config.json"), "generation_config.json"),
    "an end that is no token": (said("generation_config.json", "eos_token_id", value=10**6), "eos_token_id"),
    "an end that is a word": (said("generation_config.json", "eos_token_id", value="x"), "eos_token_id"),
}


def sharded(change: Callable[[dict[str, str], dict[str, torch.Tensor]], object] = lambda *_: None) -> Damage:
    """The weights in two files with an index, of which `change` gets the places and what is added to the second one."""

    def apply(folder: Path) -> None:
        state, more = load_file(folder / "model.safetensors"), {}
        places = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(sorted(state))}
        index = dict(places)
        change(index, more)
        for name in set(places.values()):
            part = {key: value for key, value in state.items() if places[key] == name}
            save_file(part | (more if "00002-" in name else {}), folder / name, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "model.safetensors").unlink()

    return apply


def twice(index: dict[str, str], more: dict[str, torch.Tensor]) -> None:
    more["model.projector.query"] = torch.zeros(1, 8, 48)
    index["model.projector.query"] = "model-00001-of-00002.safetensors"


def both(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    sharded()(folder)
    (folder / "model.safetensors").write_bytes(whole)


DAMAGED |= {
    "a whole save and a sharded one": (both, "or the files of model.safetensors.index.json, found both"),
    "a tensor in two shards": (sharded(twice), "the tensors that the index names for it, found model.projector.query"),
    "a shard without its tensor": (
        sharded(lambda index, _: index.update({"model.projector.none": min(index.values())})),
        "the tensors that the index names for it, found no model.projector.none",
    ),
    "an index that leaves one out": (sharded(lambda index, _: index.pop(min(index))), "as well, which is of none"),
    "a shard that is a link to itself": (
        lambda folder: (sharded()(folder), _loop(folder / "model-00001-of-00002.safetensors")),
        "weights in model-00001-of-00002.safetensors, found no such file",
    ),
    "an index of no model": (
        lambda folder: (sharded()(folder), json_of(folder / INDEX, lambda tree: tree.pop("metadata"))),
        "model.safetensors.index.json: expected a mapping 'metadata', found none. Write",
    ),
    "weights of another save": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"),
        "weights in model.safetensors alone, found model-00001-of-00002.safetensors. Move it away",
    ),
}


INDEX = "model.safetensors.index.json"


def json_of(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def another_tokenizer(folder: Path) -> None:
    """That of a model with a larger vocabulary."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    last = tree["added_tokens"][-1]
    tree["added_tokens"].append(last | {"id": last["id"] + 500, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


DAMAGED["another model's tokenizer"] = (another_tokenizer, "a tokenizer with ids below 357")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (6000, 2)).astype(np.float32), 16000)
    return path


@pytest.mark.parametrize("what", DAMAGED)
def test_it_is_named_before_it_answers(checkpoint, sound: Path, tmp_path: Path, capsys, what: str) -> None:
    damage, words = DAMAGED[what]
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    damage(folder)
    code = main(["ask", str(sound), "Which side?", "--model", str(folder), "--max-tokens", "1"])
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and "LOAD REPORT" not in told, told
    assert words in errors[0] and str(folder) in errors[0]


@pytest.mark.parametrize("what", ["vocabulary", "a layer's weight is missing", "another window", "diverged"])
def test_training_and_converting_say_the_same(checkpoint, shards, tmp_path: Path, capsys, what: str) -> None:
    damage, words = DAMAGED[what]
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    damage(folder)
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"verb: sft\noutput: {tmp_path / 'run'}\nmodel: {{path: {folder}}}\ndata: {{train: [{shards()}]}}"
    )
    for arguments in (["sft", str(recipe), "steps=1"], ["convert", "lm", str(folder), str(tmp_path / "lm")]):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "lm").exists()


def spoilt(weight: str, how: float) -> Damage:
    """One number of a weight is none."""

    def change(state: dict[str, torch.Tensor]) -> None:
        state[weight].view(-1)[-1] = how

    return weights(change)


@pytest.mark.vllm
def test_vllm_is_given_no_weights_that_are_no_numbers(checkpoint, tmp_path: Path, capsys, monkeypatch) -> None:
    """It loads them and answers, with anything."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from audio_llm.serving.offline import OfflineEngine

    folder = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    spoilt("model.projector.linear.weight", float("inf"))(folder)
    words = "expected finite weights, found NaN or infinity in model.projector.linear.weight"
    with pytest.raises(CheckpointError, match=words):
        OfflineEngine(folder)
    monkeypatch.setattr(os, "execve", lambda *command: pytest.fail("it became the server"))
    assert main(["serve", str(folder)]) == 2
    assert words in capsys.readouterr().err


@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.lists(st.floats(), min_size=1, max_size=9),
)
@example(torch.bfloat16, [float("-inf")])
@example(torch.float16, [65536.0])  # one that this dtype has no number for
@example(torch.float32, [3.4028235e38, -1e-45, -0.0])
def test_torch_finds_the_same_weights_finite(tmp_path_factory, dtype: torch.dtype, values: list[float]) -> None:
    folder = tmp_path_factory.mktemp("weights")
    held = torch.tensor(values, dtype=torch.float64).to(dtype)
    save_file({"a": torch.ones(3), "b": held, "ids": torch.full((5,), -1)}, folder / "model.safetensors")
    if held.isfinite().all():
        check_finite(folder)
    else:
        with pytest.raises(CheckpointError, match="NaN or infinity in b"):
            check_finite(folder)


def test_an_adapter_that_diverged_is_refused(checkpoint, tmp_path: Path) -> None:
    adapter = make_adapter(checkpoint(), tmp_path / "adapter")
    check_adapter(adapter, checkpoint())
    state = load_file(adapter / "adapter_model.safetensors")
    key = sorted(state)[-1]
    state[key][0, 0] = float("nan")
    save_file(state, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"adapter .*expected finite weights, found NaN or infinity in {key}"):
        check_adapter(adapter, checkpoint())


def test_one_in_shards_is_whole(checkpoint, sound: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    ask = ["ask", str(sound), "Which side?", "--model", str(folder), "--max-tokens", "3", "--engine", "transformers"]
    answers = []
    for change in (lambda folder: None, sharded()):
        change(folder)
        assert main(ask) == 0
        answers += [line for line in capsys.readouterr().out.splitlines() if line.startswith("answer:")]
    assert len(answers) == 2 and answers[0] == answers[1]


def test_a_whole_one_is_read_as_transformers_reads_it(checkpoint) -> None:
    """Names, values and the ends of replies; strictness changes nothing about a folder that is as it should be."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = checkpoint(tie=True)
    check_checkpoint(folder)
    mine, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    assert list(end_ids(folder)) == np.ravel(GenerationConfig.from_pretrained(folder).eos_token_id).tolist()
    assert load_processor(folder).feature_extractor.sampling_rate == 16000


LANGUAGE_MODELS: dict[str, tuple[Damage, str]] = {
    "a weight is missing": (without("layers.1.mlp"), "no weights model.layers.1.mlp"),
    "a layer less": (said(CONFIG, "num_hidden_layers", value=1), "layers.1."),
    "other heads": (said(CONFIG, "num_attention_heads", value=8), "where config.json says"),
    "another model's tokenizer": (another_tokenizer, "a tokenizer of its own"),
    "torn words": (torn("tokenizer.json"), "a language model that Transformers can load"),
    "an index of shards alone": (
        lambda folder: (sharded()(folder), json_of(folder / INDEX, lambda tree: tree.pop("metadata"))),
        "model.safetensors.index.json: expected a mapping 'metadata'",
    ),
    "another's index": (
        lambda folder: (
            (folder / "model.safetensors")
            .rename(folder / "pytorch_model.bin.index.json")
            .write_text('{"metadata": {}, "weight_map": []}')
        ),
        "pytorch_model.bin.index.json: expected a mapping 'weight_map', found []",
    ),
}


@pytest.mark.parametrize("what", LANGUAGE_MODELS)
def test_a_language_model_is_held_to_the_same(checkpoint, made_once, tmp_path: Path, what: str) -> None:
    made = made_once("lm-alone", lambda out: main(["convert", "lm", str(checkpoint("llama")), str(out)]))
    folder = Path(shutil.copytree(made, tmp_path / "lm"))
    load_language_model(folder)
    damage, words = LANGUAGE_MODELS[what]
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        load_language_model(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


def test_a_plain_encoder_of_text_is_no_classifier(tmp_path: Path) -> None:
    """Transformers would give it a head of random numbers, and its probabilities would look like any others."""
    from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

    sizes = dict(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path)
    whole_model(AutoModel, tmp_path, "text encoder", "one")  # of which nothing reads the pooler
    with pytest.raises(CheckpointError, match="no weights classifier"):
        whole_model(AutoModelForSequenceClassification, tmp_path, "classifier", "one")


def test_the_machines_own_errors_stay_what_they_are() -> None:
    for error in (MemoryError(), PermissionError(13, "no"), OSError(28, "full"), CheckpointError("mine")):
        with pytest.raises(type(error)) as found, reading("model", "one"):
            raise error
        assert found.value is error
    with (
        pytest.raises(AudioLLMError, match=r"model: expected one, found no 3 in one of its files\."),
        reading("model", "one"),
    ):
        raise KeyError(3)
