"""An adapter knows its base: everything that takes both refuses another one, and says which is meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402

from audio_llm.answering.ask import ask  # noqa: E402
from audio_llm.cli import main  # noqa: E402
from audio_llm.errors import CheckpointError  # noqa: E402
from audio_llm.model.build import load_model, load_processor  # noqa: E402
from audio_llm.model.export import export_weights  # noqa: E402
from audio_llm.model.validate import DIGEST_FILE, check_adapter, weights_digest  # noqa: E402
from audio_llm.training.policy import make_trainable  # noqa: E402
from audio_llm.training.recipes import TrainedParts  # noqa: E402


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def exported(request, checkpoint, made_once) -> Path:
    """A folder with merged/, base/ and adapter/ of a model that has learnt something."""

    def make(folder: Path) -> None:
        start = checkpoint("qwen2", 2, request.param)
        model = make_trainable(load_model(start), TrainedParts(encoder="frozen"))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        export_weights(model, model.state_dict(), load_processor(start), folder)

    return made_once(f"exported-{request.param}", make)


def test_the_digest_is_of_the_weights_alone(exported: Path, tmp_path: Path) -> None:
    base = exported / "base"
    digest = weights_digest(base)
    copy = tmp_path / "copy"
    load_model(base).save_pretrained(copy, max_shard_size="100KB")
    load_processor(base).save_pretrained(copy)
    assert len(list(copy.glob("model-*.safetensors"))) > 2 and not (copy / DIGEST_FILE).exists()
    assert weights_digest(copy) == digest, "over several files"
    assert json.loads((copy / DIGEST_FILE).read_text())["sha256"] == digest == weights_digest(copy)
    assert weights_digest(exported / "merged") != digest
    shutil.copytree(base, tmp_path / "touched")
    state = load_file(base / "model.safetensors")
    name = next(key for key in state if key.startswith("model.projector"))
    state[name].view(-1)[0] += 1
    save_file(state, tmp_path / "touched" / "model.safetensors", {"format": "pt"})
    assert weights_digest(tmp_path / "touched") != digest, "one value, and the file remembered for the old ones"
    load_model(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert weights_digest(tmp_path / "half") != digest


def test_what_is_remembered_is_not_believed_of_other_files(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported / "merged", copy)
    shutil.copy2(exported / "base" / DIGEST_FILE, copy / DIGEST_FILE)
    assert weights_digest(copy) == weights_digest(exported / "merged") != weights_digest(exported / "base")
    for spoilt in ("{", "[]", '{"files": 3}', "null"):
        (copy / DIGEST_FILE).write_text(spoilt)
        assert weights_digest(copy) == weights_digest(exported / "merged"), spoilt


def test_every_verb_refuses_another_base(exported: Path, tmp_path: Path, capsys, shards) -> None:
    adapter, base, other = exported / "adapter", exported / "base", exported / "merged"
    with pytest.raises(CheckpointError) as refusal:
        check_adapter(adapter, other)
    for word in (str(adapter), str(base), str(other), weights_digest(base)[:16], weights_digest(other)[:16], "Give"):
        assert word in str(refusal.value)
    with pytest.raises(CheckpointError, match="on which it was trained"):
        ask(str(other), "what?", adapter=str(adapter))
    given = ["--adapter", str(adapter)]
    for command in (
        ["ask", "what?", "--model", str(other), *given],
        ["convert", "merge", str(other), str(adapter), str(tmp_path / "out")],
        ["eval", str(other), str(shards()), "--out", str(tmp_path / "eval"), "--engine", "transformers", *given],
    ):
        assert main(command) == 2, command
        assert "on which it was trained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_its_own_base_is_taken_without_a_word(exported: Path, tmp_path: Path, capsys) -> None:
    assert check_adapter(exported / "adapter", exported / "base").rank > 0
    shutil.copytree(exported / "base", tmp_path / "elsewhere")  # by its weights, not by its name
    assert check_adapter(exported / "adapter", tmp_path / "elsewhere")
    assert capsys.readouterr().err == ""
    merged = tmp_path / "merged"
    assert main(["convert", "merge", str(exported / "base"), str(exported / "adapter"), str(merged)]) == 0
    assert weights_digest(merged) == weights_digest(exported / "merged")


def test_an_adapter_that_does_not_say_its_base_is_taken_with_a_note(exported: Path, tmp_path: Path, capsys) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(exported / "adapter", foreign)
    weights = foreign / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    assert check_adapter(foreign, exported / "merged").folder == foreign
    assert f"{exported / 'merged'} is taken for its base" in capsys.readouterr().err


def test_the_server_refuses_before_it_starts_and_while_it_runs(exported: Path, monkeypatch) -> None:
    from audio_llm.serving import launcher
    from audio_llm.serving.checks import check_load

    monkeypatch.setattr(launcher, "cpu_build", lambda: True)  # the check needs no vLLM
    options = launcher.ServeOptions(exported / "merged", adapters={"step": exported / "adapter"})
    with pytest.raises(CheckpointError, match="on which it was trained"):
        launcher.serve(options)
    options = launcher.ServeOptions(exported / "merged", allow_adapter_updates=True)
    facts = launcher.guard_facts(options, {}, {"audio_token_id": 1}, [])
    request = {"lora_name": "step", "lora_path": str(exported / "adapter")}
    with pytest.raises(CheckpointError, match="on which it was trained"):
        check_load(request, facts)
    check_load(request, facts | {"checkpoint": str(exported / "base")})
