"""Native audio models as they are asked: by their own folder, like any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_llm.answering.base import Request
from audio_llm.answering.engines import TransformersEngine, open_engine
from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.errors import AudioError, CheckpointError
from audio_llm.model.native import BESIDE
from eval import predictions
from eval.benchmarks.base import Item
from tests.native_models import KINDS, make_native, sound


@pytest.fixture(scope="module", params=["qwen2_audio", "thinker"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_native(request.param, tmp_path_factory.mktemp("native") / request.param)


def ask(seconds: float, seed: int = 0, heard: bool = True, question: str = "Which side?") -> Request:
    item = Item(str(seed), question, ["left", "right"], "left", "side", "test", "c")
    return Request(item, (Waveform(sound(seconds, seed), 16000, "mono"),) if heard else (), max_tokens=6)


def test_a_batch_answers_what_each_request_alone_does_and_hears(native: Path) -> None:
    engine = open_engine("transformers", str(native), batch_size=4)
    assert isinstance(engine, TransformersEngine)
    requests = [ask(1.0, 0), ask(2.5, 1), ask(1.0, 2, heard=False), ask(4.0, 3)]
    together = list(engine.generate(requests))
    alone = [next(iter(engine.generate([request]))) for request in requests]
    assert [answer.raw for answer in together] == [answer.raw for answer in alone]
    assert [answer.prompt_tokens for answer in together] == [answer.prompt_tokens for answer in alone]
    marks = len(engine._tokenizer("Audio 1: <|audio_bos|><|audio_eos|>\n")["input_ids"])
    assert together[0].prompt_tokens - together[2].prompt_tokens == 25 + marks  # 25 audio tokens a second
    typed = next(iter(engine.generate([ask(1.0, question="<|AUDIO|>Which side?")])))
    assert typed.raw == "" and "'<|AUDIO|>'" in typed.error


def test_what_it_cannot_hear_is_refused_by_name(native: Path) -> None:
    engine = open_engine("transformers", str(native))
    two = Waveform(np.zeros((2, 16000), np.float32), 16000, "stereo")
    with pytest.raises(AudioError, match=r"item 'x': expected layout mono, found stereo.*--hearing left"):
        engine.prepare(two, "item 'x'")
    assert engine.prepare(Waveform(np.zeros((1, 8000), np.float32), 8000, "mono"), "x").sample_rate == 16000


def test_the_checkpoint_beside_it_is_made_once_and_anew_for_other_weights(native: Path) -> None:
    open_engine("transformers", str(native))
    made = (native / BESIDE / "config.json").stat().st_mtime_ns
    open_engine("transformers", str(native))
    assert (native / BESIDE / "config.json").stat().st_mtime_ns == made
    content = bytearray((native / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (native / "model.safetensors").write_bytes(bytes(content))
    open_engine("transformers", str(native))
    assert (native / BESIDE / "config.json").stat().st_mtime_ns != made


def test_a_folder_that_cannot_be_written_is_told_with_the_way_around(
    native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("audio_llm.model.native.weights_digest", lambda folder: "other")
    monkeypatch.setattr("audio_llm.model.native.absorb", refuse)
    with pytest.raises(CheckpointError, match="audio-llm convert native .* OUT"):
        open_engine("transformers", str(native))


@pytest.mark.skipif("voxtral" not in KINDS, reason="needs mistral-common")
def test_messages_that_the_template_refuses_are_told(
    shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_native("voxtral", tmp_path / "voxtral")
    command = ["eval", str(model), str(shards(channels=1)), "--out", str(tmp_path / "run"), "--engine", "transformers"]
    assert main([*command, "--quiet", "--order", "system"]) == 2
    assert "chat template: expected one that writes these messages, found a refusal: Sound" in capsys.readouterr().err


def test_a_whole_run_by_one_of_two_channels(native: Path, shards: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["eval", str(native), str(shards(count=12)), "--out", str(out), "--engine", "transformers", "--quiet"]
    command += ["--max-tokens", "4", "--controls", "silence,text_only", "--hearing", "left"]
    assert main(command) == 0
    rows = predictions.read(out)
    assert len(rows) == 36 and not any(row.error for row in rows)
    tokens = {row.control: row.prompt_tokens for row in rows}  # of the last item
    assert tokens[""] == tokens["silence"] > tokens["text_only"]
    assert json.loads((out / "run.json").read_text())["settings"]["hearing"] == "left"
