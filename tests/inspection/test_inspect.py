"""``audio-llm inspect`` through the command line."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_llm.audio import LAYOUT_CHANNELS, Waveform
from audio_llm.cli import main
from audio_llm.language import prompts
from audio_llm.model.build import load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Event, Sample, Source
from audio_llm.shards.writer import ShardWriter


def make(folder: Path, answers: list[str], layout: str = "binaural", clip: str = "rec-{i}", **fields: Any) -> Path:
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for i, answer in enumerate(answers):
            shape = (LAYOUT_CHANNELS[layout], 8000)
            samples = np.random.default_rng(i).uniform(-0.5, 0.5, shape).astype(np.float32)
            base: dict[str, Any] = {
                "question": "What is <heard>?",
                "choices": ["rain", "dog", "bell"],
                "thinking": "It sounds wet.",
                "events": [Event("rain", 0.1, 0.4, azimuth=-30.0)],
                "source": Source("made", clip=clip.format(i=i)),
                "meta": {"question_type": "identity" if i % 4 else "side"},
            }
            sample = Sample(f"{folder.name}-{i}", "scene_qa", answer=answer, **{**base, **fields})
            writer.write(sample, Waveform(samples, 16000, layout))
    return folder


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_tables_and_distributions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "train", ["rain", "rain", "dog", "rain", "bell", "rain"])
    code, out, _ = inspect(capsys, folder)
    assert code == 0
    assert re.search(r"shard-000000\.tar +4 +2\.0  binaural, 16000 Hz", out)
    assert re.search(r"shard-000001\.tar +2 +1\.0", out) and re.search(r"total +6 +3\.0", out)
    assert "answer position of 3 choices: A 4 (67%)  B 1 (17%)  C 1 (17%)" in out
    assert "question type: identity 4 (67%)  side 2 (33%)" in out
    assert "event label: rain 6 (100%)" in out
    assert "event: rain, onset 0.1 s, offset 0.4 s, azimuth -30° (right)" in out
    assert re.search(r"level left -\d+\.\d, right -", out) and "meta:\n  question_type: side" in out
    assert "(A) rain  (B) dog  (C) bell" in out


def test_problems_are_named_and_change_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = make(tmp_path / "train", ["rain", "cat", "dog"])
    test = make(tmp_path / "test", ["rain"] * 2, clip="rec-{i}", choices=["rain", "rain"])
    code, out, _ = inspect(capsys, train, test)
    assert code == 1
    assert "answers that are not among the choices: 1 (train-1: 'cat')" in out
    assert "repeated choices: 2 (test-0; test-1)" in out
    assert re.search(r"source recordings in several folders: 2 \(made/rec-0 in .*test, .*train;", out)
    assert "duplicate ids: 0" in out
    other = make(tmp_path / "other", ["rain"], clip="elsewhere")
    assert inspect(capsys, train, other, "--sample", "other-0")[1].count("several folders: 0") == 1


def test_duplicate_ids_across_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make(tmp_path / "a" / "x", ["rain"], clip="one"), make(tmp_path / "b" / "x", ["rain"], clip="two")
    code, out, _ = inspect(capsys, first, second)
    assert code == 1 and "duplicate ids: 1 (x-0 in" in out


@pytest.mark.parametrize("chosen", ["9", "nobody", "-9"])
def test_a_sample_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], chosen: str) -> None:
    folder = make(tmp_path / "train", ["rain", "dog"])
    code, _, error = inspect(capsys, folder, f"--sample={chosen}")
    assert code == 2 and chosen in error and "Traceback" not in error


def test_bad_folders_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = inspect(capsys, tmp_path / "missing")
    assert code == 2 and "missing: expected a folder of shards, found no such folder" in error
    folder = make(tmp_path / "train", ["rain"])
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"scene_qa", b"scene_qb"))
    code, _, error = inspect(capsys, folder, "--verify")
    assert code == 2 and "changed or damaged" in error


def test_the_loss_mask_covers_the_reply_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Callable[..., Path]
) -> None:
    folder = make(tmp_path / "train", ["dog", "rain"])
    code, out, error = inspect(capsys, folder, "--sample", "train-1", "--model", checkpoint())
    assert code == 0, error
    sample = ShardDataset(folder).load_sample(1)
    shown = out.partition("carries loss):")[2]
    supervised = re.findall("⟦(.*?)⟧", shown, flags=re.DOTALL)
    eos = load_processor(checkpoint()).tokenizer.eos_token
    assert supervised == [prompts.target_text(sample, "think") + eos]
    unsupervised = re.sub("⟦.*?⟧", "", shown, flags=re.DOTALL)
    assert re.search(r"<\|audio\|>×4\D", unsupervised)  # one window of 0.64 s, four queries
    assert prompts.question_text("What is <heard>?", sample.choices) in unsupervised


@pytest.mark.parametrize("layout", ["mono", "binaural", "foa"])
def test_the_page_plays_and_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    folder = make(tmp_path / "train", ["rain"], layout)
    page = tmp_path / "sample.html"
    assert inspect(capsys, folder, "--html", page)[0] == 0
    text = page.read_text()
    assert "What is &lt;heard&gt;?" in text and "<heard>" not in text
    found = re.search(r"data:audio/wav;base64,([^\"]+)", text)
    assert found
    data, rate = soundfile.read(io.BytesIO(base64.b64decode(found[1])), always_2d=True, dtype="float32")
    stored = ShardDataset(folder).load_waveform(0).samples
    assert rate == 16000
    if layout == "foa":
        left = (stored[0] + stored[1]) / 2  # a cardioid towards +90°, ACN/SN3D
        np.testing.assert_allclose(data[:, 0], left, atol=1 / 32768)
    else:
        np.testing.assert_array_equal(data.T, stored)
    image = re.search(r"data:image/png;base64,([^\"]+)", text)
    if image:
        assert base64.b64decode(image[1]).startswith(b"\x89PNG")
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_unwritable_page_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "train", ["rain"])
    (tmp_path / "a file").write_text("")
    code, _, error = inspect(capsys, folder, "--html", tmp_path / "a file" / "page.html")
    assert code == 2 and "a file" in error and "Traceback" not in error
    assert inspect(capsys, folder, "--html", tmp_path / "new" / "page.html")[0] == 0  # as every output
    assert (tmp_path / "new" / "page.html").is_file()
