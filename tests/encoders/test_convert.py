"""``audio-llm convert``: what is written loads as a stranger would load it, and computes the same."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from audio_llm.cli import main
from audio_llm.errors import CheckpointError
from audio_llm.files import content_hash
from audio_llm.model.build import load_language_model
from audio_llm.model.validate import LORA_TARGETS, check_language_model


def inputs(folder: Path, with_audio: bool) -> dict[str, torch.Tensor]:
    from audio_llm.language.prompts import AUDIO_TOKEN
    from audio_llm.model.build import load_processor

    noise = torch.randn(2, 8000, generator=torch.Generator().manual_seed(1)).numpy() * 0.1
    text = "Which sound is heard?"
    batch = load_processor(folder)(
        text=[AUDIO_TOKEN + text if with_audio else text], audio=[[noise]] if with_audio else None
    )
    return {name: value for name, value in batch.items() if name != "audio_windows"}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_exported_language_model_is_the_one_inside(checkpoint, tmp_path: Path, tie: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from audio_llm.model.build import load_model

    folder, out = checkpoint(tie=tie), tmp_path / "lm"
    assert main(["convert", "lm", str(folder), str(out)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert plain.config.model_type == "qwen2"
    ids = AutoTokenizer.from_pretrained(out)("Which sound is heard?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = load_model(folder)(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_merged_checkpoint_computes_what_peft_computes(checkpoint, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from audio_llm.model.build import load_model

    folder = checkpoint()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=LORA_TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(folder), config).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged"
    assert main(["convert", "merge", str(folder), str(tmp_path / "adapter"), str(out)]) == 0
    batch = inputs(folder, with_audio=True)
    with torch.no_grad():
        base = load_model(folder)(**batch).logits
        expected = PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter").eval()(**batch).logits
        found = load_model(out)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (base - expected).abs().max() > 0.01  # the adapter does something
    assert inputs(out, with_audio=True)["input_ids"].tolist() == batch["input_ids"].tolist()


def test_building_keeps_both_parts(checkpoint, tmp_path: Path, capsys) -> None:
    """An encoder folder and a plain language model become a checkpoint whose parts are theirs, bit for bit."""
    from transformers import AutoModelForCausalLM

    from audio_llm.encoders.heads import SpatialHeads
    from audio_llm.model.build import load_model
    from audio_llm.model.folder import save_parts
    from audio_llm.tasks.spatial.heads import EventHead

    encoder = load_model(checkpoint()).model.audio_encoder
    width = encoder.hidden_size
    heads = {"spatial": SpatialHeads(width, 2), "events": EventHead(width, 2)}
    save_parts(tmp_path / "encoder", encoder, heads, {"labels": ["bell", "dog"]})
    assert main(["convert", "lm", str(checkpoint()), str(tmp_path / "lm")]) == 0
    out = tmp_path / "model"
    parts = ["--encoder", str(tmp_path / "encoder"), "--language-model", str(tmp_path / "lm")]
    assert main(["convert", "build", *parts, "--queries", "6", "--max-windows", "2", str(out)]) == 0
    parts[-1] = parts[1]  # an encoder is no language model, whatever files lie beside it
    (tmp_path / "encoder" / "tokenizer_config.json").write_text("{}")
    capsys.readouterr()
    assert main(["convert", "build", *parts, str(tmp_path / "none")]) == 2
    assert "language model that Transformers can load" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    model = load_model(out)
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.model.audio_encoder.state_dict()[name], value), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    for name, value in plain.get_decoder().state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], value), name
    assert len(model.get_audio_features(*(inputs(out, True)[key] for key in ("input_audio", "audio_lengths")))) == 6


def test_wrong_parts_are_named_and_nothing_is_written(checkpoint, tmp_path: Path, capsys) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    cases = [
        (["lm", str(tmp_path / "absent"), str(out)], "absent"),
        (["merge", str(folder), str(tmp_path / "empty"), str(out)], "adapter_config.json"),
        (["merge", str(tmp_path / "empty"), str(folder), str(out)], "config.json"),
        (["build", "--encoder", str(folder), "--language-model", str(folder), str(out)], "encoder.safetensors"),
    ]
    capsys.readouterr()  # making the fixture shows progress bars
    for arguments, word in cases:
        assert main(["convert", *arguments]) == 2
        message = capsys.readouterr().err
        assert word in message and len(message.strip().splitlines()) == 1
        assert not out.exists()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (
            "Owner/no-such-model",
            "'Owner/no-such-model', which is not in the cache .* hf download Owner/no-such-model, or",
        ),
        ("plain-name", "'plain-name', which is not in the cache"),
        ("./none", r"\./none, where nothing is"),
        ("EMPTY", "EMPTY, which has no config.json"),
    ],
)
def test_a_language_model_that_is_not_there_is_said_before_anything_is_loaded(path, found, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(CheckpointError, match=rf"^model\.language_model\.path: expected a folder .*, found {found}"):
        check_language_model(path)


def test_a_gguf_file_is_read_or_refused_in_one_sentence(tmp_path, monkeypatch):
    """Without the package that reads it; several in a folder; one that is none."""
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "small-q4.gguf"
    file.write_bytes(b"GGUF but no more")
    if find_spec("gguf") is None:
        for path in (file, file.parent):
            with pytest.raises(CheckpointError, match=r"small-q4\.gguf: expected the package gguf.*pip install gguf"):
                check_language_model(path)
    monkeypatch.setattr("audio_llm.model.validate.find_spec", lambda _: True)
    assert check_language_model(file) == check_language_model(file.parent) == file
    with pytest.raises(
        CheckpointError, match=r"^model\.language_model\.path .*: expected a language model that"
    ) as error:
        load_language_model(file)
    assert len(str(error.value).splitlines()) == 1
    (file.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected one GGUF file, found 2. Name one"):
        check_language_model(file.parent)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"notes\.txt, which is another file"):
        check_language_model(tmp_path / "notes.txt")


def test_a_language_model_that_cannot_be_loaded_is_one_sentence_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    expected = r"^model\.language_model\.path .*: expected a language model that .*, found "
    with pytest.raises(CheckpointError, match=expected) as error:
        load_language_model(tmp_path)
    assert "\\n" not in str(error.value) and ".." not in str(error.value)


def test_an_existing_folder_is_not_replaced_unasked(checkpoint, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert main(["convert", "lm", str(checkpoint()), str(tmp_path / "mine")]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert main(["convert", "lm", str(checkpoint()), str(tmp_path / "mine"), "--force"]) == 2
    assert "holds other files, which would be lost" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "mine" / "notes.txt").unlink()
    for _ in range(2):  # an empty folder, then a model
        assert main(["convert", "lm", str(checkpoint()), str(tmp_path / "mine"), "--force"]) == 0
        assert (tmp_path / "mine" / "config.json").exists()
    file = tmp_path / "file.txt"
    file.write_text("keep")
    capsys.readouterr()
    assert main(["convert", "lm", str(checkpoint()), str(file), "--force"]) == 2
    assert "expected a new folder, found a file" in capsys.readouterr().err and file.read_text() == "keep"


def test_what_is_converted_is_not_replaced(checkpoint, tmp_path: Path, capsys) -> None:
    """With --force, by whatever name it is given; nor is a folder that holds it."""
    model = Path(shutil.copytree(checkpoint(), tmp_path / "runs" / "model"))
    (tmp_path / "link").symlink_to(model)
    before = content_hash(model)
    for out in (model, tmp_path / "runs", tmp_path / "link", tmp_path / "runs" / ".." / "runs" / "model"):
        assert main(["convert", "lm", str(model), str(out), "--force"]) == 2
        assert "expected a new folder, found" in capsys.readouterr().err
    assert content_hash(model) == before
