"""BAT's published files as a checkpoint and back, against LLaMA, PEFT and BLIP-2's Q-Former put together by hand."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from audio_llm.cli import main
from audio_llm.encoders import bat
from audio_llm.errors import AudioLLMError
from audio_llm.language import prompts
from audio_llm.language.templates import ALPACA, rendered
from audio_llm.model.build import load_model, load_processor
from audio_llm.model.projector import QFormerConfig, QFormerProjector
from tests.bat_tools import PIECES, QUESTION, SIZES, forge, llama_tokenizer, make_encoder, make_llama
from tests.paths import SHARED

SET = [f"{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def parts(made_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        make_encoder(folder / "encoder")
        make_llama(folder / "llama")

    return made_once("bat-parts", make)


def convert(source: Path, out: Path, parts: Path, llama: str = "llama") -> int:
    flags = ["--encoder", str(parts / "encoder"), "--language-model", str(parts / llama), "--set", *SET]
    return main(["convert", "bat", str(source), str(out), *flags])


def sound(seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 0.1, (2, round(16000 * seconds))).astype(np.float32)


def asked(processor: Any, question: str = QUESTION) -> str:
    item = type("Item", (), {"question": question, "choices": ()})()
    return str(rendered(processor.tokenizer, prompts.conversation(item), generate=True))


@pytest.mark.parametrize("layers", [2, 32])
def test_it_answers_as_its_parts_put_together_by_hand(parts: Path, tmp_path: Path, layers: int) -> None:
    from peft import PeftModel

    llama = make_llama(tmp_path / "llama", layers, 32 if layers == 2 else 16)
    adapted, projector = forge(tmp_path / "bat", llama, encoder=48)
    out = tmp_path / "out"
    assert convert(tmp_path / "bat" / "model.pt", out, parts, str(llama)) == 0
    processor, plain = load_processor(out / "base"), load_model(out / "base")
    model: Any = PeftModel.from_pretrained(plain, str(out / "adapter")).eval()
    batch = processor(text=[asked(processor)], audio=[sound()])
    batch.pop("audio_windows")
    ids = llama_tokenizer()(ALPACA[0] + QUESTION + ALPACA[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tokens, _ = plain.model.encode_audio(batch["input_audio"], batch["audio_lengths"])
        heard = torch.cat([projector(tokens), adapted.get_input_embeddings()(ids)], dim=1)
        expected = adapted(inputs_embeds=heard).logits
        found = model(**batch).logits[..., : expected.shape[-1]]
        said = adapted.generate(inputs_embeds=heard, max_new_tokens=8, do_sample=False)
        ours = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
        with model.disable_adapter():
            mute = model(**batch).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert ours.tolist() == said.tolist()
    assert (mute - expected).abs().max() > 0.1, "the adapter does nothing"
    back = tmp_path / "back"
    assert main(["convert", "bat", str(out), str(back)]) == 0
    one, two = torch.load(tmp_path / "bat" / "model.pt"), torch.load(back / "model.pt", weights_only=True)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_with_llama_2_these_are_the_303_published_tensors() -> None:
    with torch.device("meta"):
        projector = QFormerProjector(QFormerConfig(), 768, 4096).state_dict()
    layers = {(layer, name): (4096, 4096) for layer in range(32) for name in ("q_proj", "v_proj")}
    shapes = bat.shapes_of(layers, projector)
    # The numbers of the published file: 294,336,257 bytes are these parameters and a container of 89,857.
    assert len(projector) == 175 and len(shapes) == 303
    assert sum(map(int, (np.prod(shape) for shape in shapes.values()))) == 73_561_600


@pytest.mark.shared("fixtures/bat_ref_keys.json")
def test_the_projectors_keys_are_the_references() -> None:
    tables = json.loads((SHARED / "fixtures" / "bat_ref_keys.json").read_text())
    name = next(name for name in tables if "projector" in name.lower())
    known = {key.removeprefix("encoder_projector."): tuple(value[0]) for key, value in tables[name].items()}
    with torch.device("meta"):
        ours = QFormerProjector(QFormerConfig(), 768, 4096).state_dict()
    assert {key: tuple(value.shape) for key, value in ours.items()} == known


@pytest.mark.parametrize("scheme", ["metaspace", "legacy"])
def test_the_prompt_has_the_published_ids_behind_the_sound(parts: Path, scheme: str) -> None:
    from audio_llm.model.build import prepare_tokenizer

    tokenizer = llama_tokenizer(scheme)
    ids = [number for number, _ in PIECES]
    assert tokenizer(ALPACA[0] + QUESTION + ALPACA[1])["input_ids"] == ids and len(ids) == 37
    prepare_tokenizer(tokenizer, "alpaca")
    item = type("Item", (), {"question": QUESTION, "choices": (), "answer": "left, front"})()
    text = rendered(tokenizer, prompts.conversation(item), generate=True)
    mark = tokenizer.convert_tokens_to_ids(prompts.AUDIO_TOKEN)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [mark, *ids]
    whole = rendered(tokenizer, prompts.conversation(item, style="plain"), generate=False)
    # The answer stands behind the colon without a blank, and the text ends.
    known = llama_tokenizer(scheme)(ALPACA[0] + QUESTION + ALPACA[1] + "left, front")["input_ids"]
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] == [mark, *known, 2]
    assert tokenizer.convert_ids_to_tokens(known[37:]) == ["left", ",", "▁front"]
    item.question = f"{prompts.AUDIO_TOKEN}hm"
    with pytest.raises(AudioLLMError, match="no special token of the model"):
        rendered(tokenizer, prompts.conversation(item), generate=True)


def test_no_system_message_stands_in_it(parts: Path) -> None:
    from audio_llm.model.build import prepare_tokenizer

    prepare_tokenizer(tokenizer := llama_tokenizer(), "alpaca")
    item = type("Item", (), {"question": QUESTION, "choices": ()})()
    with pytest.raises(AudioLLMError, match="no system message"):
        rendered(tokenizer, prompts.conversation(item, order="system"), generate=True)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


KEY = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an optimizer's state": (lambda s: {"state": {}, "param_groups": []}, "an optimizer's state ('param_groups')"),
    "a training state": (lambda s: {"model": s, "optimizer": {}, "epoch": 3}, "with its optimizer ('optimizer')"),
    "a wrapper": (lambda s: {"model": s}, "weights under the key 'model'"),
    "options beside": (lambda s: {**s, "args": {"lr": 1}}, "something else under args"),
    "one missing": (lambda s: without(s, KEY), f"missing {KEY} (8, 32)"),
    "one too many": (lambda s: {**s, "encoder.bn.bias": torch.ones(2)}, "unexpected encoder.bn.bias (2,)"),
    "another shape": (lambda s: {**s, "encoder_projector.query": torch.ones(1, 4, 24)}, "query: expected (1, 5, 24)"),
    "half precision": (lambda s: {**s, KEY: s[KEY].half()}, f"{KEY}: expected dense torch.float32"),
    "not a number": (lambda s: {**s, KEY: s[KEY] * torch.nan}, f"{KEY}: expected finite values"),
    "distributed names": (lambda s: {f"module.{k}": v for k, v in s.items()}, "within DistributedDataParallel"),
    "an adapter of the first kind": (
        lambda s: {k.replace("lora_A.default.weight", "adaption_prompt"): v for k, v in s.items()},
        "trained with LLaMA-Adapter",
    ),
    "another depth": (
        lambda s: {**s, **{k.replace("layers.0", "layers.2"): v for k, v in s.items()}},
        "a language model of 3 layers; this one has 2",
    ),
    "another width": (
        lambda s: {k: (torch.ones(64) if k == "encoder_projector.linear.bias" else v) for k, v in s.items()},
        "a language model of width 64; this one has 32",
    ),
    "code": (lambda s: Evil(), "system, which could run code"),
    "a list": (lambda s: list(s.values()), "a single list"),
    "cut": (lambda s: None, "damaged or cut"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_by_name(name: str, parts: Path, tmp_path: Path, capsys: Any) -> None:
    forge(tmp_path, parts / "llama", encoder=48)
    path = tmp_path / "model.pt"
    change, words = MALFORMED[name]
    state = torch.load(path)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    elif name == "code":
        torch.save(change(state), path, pickle_module=pickle)
    else:
        torch.save(change(state), path)
    assert convert(path, tmp_path / "out", parts) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_the_same_weights_as_safetensors_are_read(parts: Path, tmp_path: Path) -> None:
    forge(tmp_path, parts / "llama", encoder=48)
    state = torch.load(tmp_path / "model.pt")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    found = bat.read_model(tmp_path / "model.safetensors", shapes)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    save_file({key: value.contiguous() for key, value in without(state, KEY).items()}, tmp_path / "model.safetensors")
    with pytest.raises(AudioLLMError, match=f"missing {re.escape(KEY)}"):
        bat.read_model(tmp_path / "model.safetensors", shapes)


def test_parts_that_do_not_belong_are_named(parts: Path, tmp_path: Path, capsys: Any) -> None:
    from tests.conftest import make_checkpoint

    forge(tmp_path, parts / "llama", encoder=48)
    path, flag = tmp_path / "model.pt", "--language-model"
    assert main(["convert", "bat", str(path), str(tmp_path / "out")]) == 2
    assert "--encoder" in capsys.readouterr().err
    assert main(["convert", "bat", str(path), str(tmp_path / "out"), "--encoder", str(path), flag, str(parts)]) == 2
    assert "which has no config.json" in capsys.readouterr().err
    given = ["--encoder", str(path), flag, str(parts / "llama")]
    assert main(["convert", "bat", str(path), str(tmp_path / "out"), *given]) == 2
    assert "entries do not fit SpatialAST: missing" in capsys.readouterr().err
    assert main(["convert", "bat", str(tmp_path / "none.pt"), str(tmp_path / "out"), *given]) == 2
    assert "none.pt: expected BAT's model.pt, found no such file" in capsys.readouterr().err
    make_checkpoint(tmp_path / "other")
    assert main(["convert", "bat", str(tmp_path / "other"), str(tmp_path / "out")]) == 2
    assert "folders base/ and adapter/" in capsys.readouterr().err


def byte_tokenizer() -> Any:
    """The fixture's: begin 1, end and padding 2, byte b is 3 + b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of bytes: these are their own
    hidden = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {names[byte]: 3 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_samples_are_the_references_collated_ones(parts: Path, tmp_path: Path) -> None:
    """The reference pads prompts on the left and answers on the right; between, the ids and labels are ours."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from audio_llm.audio import Waveform
    from audio_llm.model.build import build_checkpoint
    from audio_llm.model.folder import load_encoder
    from audio_llm.shards.schema import Sample
    from audio_llm.training.examples import encode

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    words = Qwen2ForCausalLM(Qwen2Config(vocab_size=259, num_key_value_heads=2, **sizes))
    projector = SIZES | {"num_query_tokens": 64}
    how = {"encoder": load_encoder(parts / "encoder"), "language_model": words, "tokenizer": byte_tokenizer()}
    processor = load_processor(build_checkpoint(tmp_path / "model", **how, projector=projector, prompt="alpaca"))
    assert processor.tokenizer.pad_token_id == 2
    known = np.load(SHARED / "fixtures" / "bat_ref.npz")
    asked = [("Q one?", "left, front, below; 1m"), ("A longer question here?", "Yes")]
    for row, (question, answer) in enumerate(asked):
        sample = Sample(id=f"s{row}", task="open", question=question, answer=answer)
        item = {"sample": sample, "waveforms": [Waveform(sound(), 16000, "binaural")]}
        item["coordinates"] = {"shard": "here/a.tar", "index": row}
        for kind, reply in (("train", True), ("infer", False)):
            example = encode(processor, item, "plain", reply=reply)
            ids = known[f"collate_{kind}_input_ids"][row]
            mask = known[f"collate_{kind}_attention_mask"][row]
            slots = known[f"collate_{kind}_modality_mask"][row]
            ours = example.ids.numpy().copy()
            assert np.array_equal(ours == processor.audio_token_id, slots[mask]) and slots.sum() == 64
            ours[ours == processor.audio_token_id] = -1
            assert np.array_equal(ours, np.where(slots, -1, ids)[mask])
            if reply:
                assert np.array_equal(example.labels.numpy(), known["collate_train_labels"][row][mask])
