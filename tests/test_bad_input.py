"""Bad input through the command line: one clear message, exit code 2, no traceback, finished work intact."""

from __future__ import annotations

import io
import os
import pwd
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_llm import cli
from audio_llm.cli import main
from audio_llm.shards.index import INDEX_REJECTS
from tests.paths import ROOT

RATE = 16000


def noise(channels: int, samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (samples, channels)).astype(np.float32)


def wav(path: Path, data: np.ndarray, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, data, RATE, subtype=subtype)
    return path


def bad_audio(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "corrupt":
        path.write_bytes(np.random.default_rng(0).bytes(4000))
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "no samples":
        wav(path, noise(2, 0))
    elif kind == "not a number":
        data = noise(2, RATE)
        data[100, 1] = np.nan
        wav(path, data)
    elif kind == "infinite":
        data = noise(2, RATE)
        data[-1, 0] = np.inf
        wav(path, data)
    elif kind == "three channels":
        wav(path, noise(3, RATE))
    elif kind == "ten minutes":
        wav(path, np.zeros((600 * RATE, 2), np.float32), "PCM_16")
    elif kind == "eleven minutes":
        wav(path, np.zeros((660 * RATE, 2), np.float32), "PCM_16")
    elif kind == "cut flac":
        path = path.with_suffix(".flac")
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(2, RATE), RATE, format="FLAC")
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    elif kind == "text":
        path.write_text("this is no sound")
    elif kind == "folder":
        path.mkdir()
    return path


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the command line, expect exit code 2, return its one message."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1, error
    return lines[0]


# What the message has to say besides the file's name.
AUDIO = {
    "corrupt": "",
    "empty file": "",
    "no samples": "",
    "not a number": "",
    "infinite": "",
    "three channels": "3",
    "ten minutes": "window",
    "eleven minutes": "660",
    "cut flac": "",
    "text": "",
    "folder": "",
    "absent": "no such file",
}


@pytest.mark.parametrize("kind", AUDIO)
def test_ask_refuses_bad_audio(checkpoint, tmp_path: Path, capsys, kind: str) -> None:
    path = bad_audio(kind, tmp_path)
    message = complaint(capsys, ["ask", path, "What is heard?", "--model", checkpoint()])
    assert path.name in message
    assert AUDIO[kind] in message


def test_one_sample_is_short_but_audio(checkpoint, tmp_path: Path, capsys) -> None:
    """One sample either gives an answer or is refused by name; it never breaks."""
    path = wav(tmp_path / "short.wav", noise(2, 1))
    code = main(["ask", str(path), "What is heard?", "--model", str(checkpoint()), "--max-tokens", "4"])
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert "Traceback" not in error and (code == 0 or path.name in error)


def test_a_wrong_layout_names_both_sides(checkpoint, tmp_path: Path, capsys) -> None:
    path = wav(tmp_path / "mono.wav", noise(1, RATE))
    message = complaint(capsys, ["ask", path, "What is heard?", "--model", checkpoint(channels=2)])
    assert "mono" in message and "binaural" in message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["ask", "What?"], "--url"),
        (["ask", "What?", "--model", "/absent/model"], "/absent/model"),
        (["ask", "What?", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["sft", "/absent/recipe.yaml"], "/absent/recipe.yaml"),
        (["train", "/absent/recipe.yaml"], "/absent/recipe.yaml"),
    ],
)
def test_missing_things_are_named(capsys, arguments: list[str], word: str) -> None:
    assert word in complaint(capsys, arguments)


def test_a_text_that_is_none_is_named(capsys, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(b"\xf4 is no UTF-8")
    recipe = [
        ROOT / "recipes/quickstart/language_model.yaml",
        f"text={tmp_path / 'text.jsonl'}",
        f"output={tmp_path / 'lm'}",
    ]
    assert "it is not UTF-8" in complaint(capsys, ["train", *recipe])
    assert not (tmp_path / "lm").exists()


def sft(folder: Path, model: Path, data: Path, *more: str) -> list[str]:
    recipe = folder / "sft.yaml"
    recipe.write_text(
        f"output: {folder / 'run'}\nmodel: {{path: {model}}}\ndata: {{train: [{data}]}}\n"
        "steps: 2\nbatch_size: 2\nexport: [merged]\nprecision: fp32\n"
    )
    return ["sft", str(recipe), *more]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rat=1", ["learning_rat", "did you mean 'learning_rate'"]),
        ("data.trian=[x]", ["trian", "did you mean 'train'"]),
        ("batch_size=many", ["batch_size", "expected int"]),
        ("schedule=cosin", ["schedule", "did you mean 'cosine'"]),
    ],
)
def test_a_misspelt_key_names_the_nearest(
    checkpoint, shards, tmp_path, capsys, override: str, words: list[str]
) -> None:
    message = complaint(capsys, sft(tmp_path, checkpoint(), shards(), override))
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_unwritable_output(checkpoint, shards, tmp_path: Path, capsys) -> None:
    """A file where a folder should be cannot be written below, not even by root."""
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    for arguments in (
        ["convert", "lm", checkpoint(), blocker / "lm"],
        sft(tmp_path, checkpoint(), shards(), f"output={blocker / 'run'}"),
        ["eval", checkpoint(), shards(), "--out", blocker / "eval", "--engine", "transformers"],
    ):
        assert "file" in complaint(capsys, arguments)
    assert blocker.read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ shards


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewrite(tar: Path, change) -> None:
    """Pass the members of a tar, as (name, bytes), through `change` and write them back."""
    with tarfile.open(tar) as archive:
        members = [(item.name, archive.extractfile(item).read()) for item in archive]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as archive:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def first_tar(folder: Path) -> Path:
    return sorted(folder.glob("*.tar"))[0]


def cut_in_the_middle(folder: Path) -> None:
    tar = first_tar(folder)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])


def twice_the_same_key(folder: Path) -> None:
    rewrite(first_tar(folder), lambda members: members + members[:2])


def broken_sizes(folder: Path) -> None:
    (folder / "sizes.json").write_text('{"version": 1, "samples"')


def gone_tar(folder: Path) -> None:
    first_tar(folder).unlink()


def test_shards_without_counts_are_known_by_their_files(checkpoint, shards, tmp_path, capsys) -> None:
    """A folder that was packed by hand trains; the run is another one once its shards are others."""
    data = copy(shards(), tmp_path / "data")
    (data / "sizes.json").unlink()
    command = [str(word) for word in sft(tmp_path, checkpoint(), data)]
    assert main(command) == 0 and main(command) == 0
    assert "this run was finished before" in capsys.readouterr().out
    rewrite(first_tar(data), lambda members: members[:-2])
    assert main(command) == 2
    assert "data.train (its shards)" in capsys.readouterr().err


BROKEN = {
    "sft": [cut_in_the_middle, twice_the_same_key, broken_sizes, gone_tar],
    "eval": [cut_in_the_middle, twice_the_same_key, broken_sizes, gone_tar],
}


@pytest.mark.parametrize(("verb", "damage"), [(verb, damage) for verb in BROKEN for damage in BROKEN[verb]])
def test_a_broken_shard_folder_is_one_message(checkpoint, shards, tmp_path, capsys, damage, verb: str) -> None:
    data = copy(shards(), tmp_path / "data")
    damage(data)
    command = {
        "sft": sft(tmp_path, checkpoint(), data),
        "eval": ["eval", checkpoint(), data, "--out", tmp_path / "eval", "--engine", "transformers"],
    }[verb]
    assert "data" in complaint(capsys, command)


def wrong_json(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    name, data = members[0]
    assert name.endswith(".json") or members[1][0].endswith(".json")
    return [(n, b'{"id": 3' if n.endswith(".json") and i < 2 else d) for i, (n, d) in enumerate(members)]


def wrong_audio(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(n, b"no sound" if n.endswith(".flac") and i < 2 else d) for i, (n, d) in enumerate(members)]


@pytest.mark.parametrize(
    ("change", "listed"), [(wrong_json, f"data/{INDEX_REJECTS}"), (wrong_audio, "run/rejects.jsonl")]
)
def test_one_bad_sample_is_left_out_and_listed(checkpoint, shards, tmp_path, capsys, change, listed: str) -> None:
    data = copy(shards(), tmp_path / "data")
    rewrite(first_tar(data), change)
    arguments = sft(tmp_path, checkpoint(), data, "steps=12", "data.max_reject_share=0.2")
    assert main(arguments) == 0, capsys.readouterr().err
    assert len({line for line in (tmp_path / listed).read_text().splitlines() if "tiny-0-0000" in line}) >= 1
    # The same data with a stated share of none: the run stops and says so.
    shutil.rmtree(tmp_path / "run")
    message = complaint(capsys, sft(tmp_path, checkpoint(), data, "steps=12", "data.max_reject_share=0"))
    assert "max_reject_share" in message


# ------------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB; needs root."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small tmpfs")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch) -> None:
    """Of a container that runs as any number."""
    from audio_llm.inspection import doctor
    from eval.scorers.kept_replies import default_cache

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert doctor._accelerate_config() == {}
    with pytest.raises(RuntimeError) as error:
        default_cache()
    assert "set HOME to a folder" in str(cli._message(error.value))


def test_an_interrupt_before_a_verb_has_begun_is_no_defect(monkeypatch, capsys) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "entry_points", interrupted)
    assert cli.main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "audio-llm: interrupted.\n"


@pytest.mark.parametrize("verb", ["convert", "sft"])
def test_full_disk(checkpoint, shards, small_disk: Path, tmp_path: Path, capsys, verb: str) -> None:
    (small_disk / "finished.txt").write_text("finished work")
    command = {
        "convert": ["convert", "lm", checkpoint(), small_disk / "lm"],
        "sft": sft(tmp_path, checkpoint(), shards(), f"output={small_disk / 'run'}"),
    }[verb]
    assert "No space left" in complaint(capsys, command)
    assert (small_disk / "finished.txt").read_text() == "finished work"
    assert not (small_disk / "lm").exists() and not (small_disk / "run" / "merged").exists()
    left = [path for path in small_disk.rglob("*.safetensors") if "checkpoint" not in str(path)]
    assert left == [], "half-written weights were left behind"


def test_torchs_words_for_a_full_disk_are_known(small_disk: Path) -> None:
    import torch

    from audio_llm.cli import _message

    with pytest.raises(RuntimeError) as caught:
        for number in range(30):  # with entries of several sizes it is the end or the middle of one that has no room
            torch.save({"weights": torch.zeros(5000 + number), "step": number}, small_disk / f"{number}.pt")
    assert "free some space" in str(_message(caught.value))
