"""SpatialSoundQA in shards: packed in 32 bits, or rendered when read, it is the published sound to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_llm.cli import main
from audio_llm.errors import AudioError
from audio_llm.files import write_json
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.rendering import ROOTS, Recipe, Rendering
from tests.paths import ROOT, SHARED

RECIPE = str(ROOT / "recipes" / "manifest" / "spatial_sound_qa.yaml")


def question(number: int, second: bool, asked: str = "What is heard?") -> dict[str, Any]:
    return {
        "audio_id": "eval/audio/Ya",
        "reverb_id": "room/0.npy",
        "audio_id2": "eval/audio/Yb" if second else None,
        "reverb_id2": "room/1.npy" if second else None,
        "question_id": number,
        "question_type": "MIXUP_DIRECTION" if second else "DOA",
        "question": asked,
        "answer": "Yes" if second else "left, front, below; 1m",
    }


def lay(folder: Path, dry: list[np.ndarray], rooms: list[np.ndarray]) -> None:
    (folder / "AudioSet" / "eval" / "audio").mkdir(parents=True)
    (folder / "mp3d" / "binaural" / "room").mkdir(parents=True)
    for name, samples in zip(("Ya", "Yb"), dry, strict=True):
        soundfile.write(folder / "AudioSet" / "eval" / "audio" / f"{name}.wav", samples, 32_000, "DOUBLE")
    for number, response in enumerate(rooms):
        np.save(folder / "mp3d" / "binaural" / "room" / f"{number}.npy", response)
    rows = [question(0, False), question(1, True), question(2, False, "Where?")]
    (folder / "train.json").write_text(json.dumps({"data": rows}))


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lay(tmp_path, list(rng.normal(0, 0.1, (2, 8000))), list(rng.normal(0, 0.4, (2, 2, 300))))
    return tmp_path


def prep(folder: Path, store: str, *more: str) -> Path:
    out = folder / store
    given = [f"path={folder}/train.json", f"root={folder}/AudioSet", f"options.responses={folder}/mp3d"]
    assert main(["prep", RECIPE, str(out), *given, "splits={train: 1.0}", f"audio.store={store}", *more]) == 0
    return out / "train"


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_read_packed_and_published_are_one(tmp_path: Path) -> None:
    known = np.load(SHARED / "fixtures" / "bat_ref.npz")
    lay(tmp_path, [known["loader_a"], known["loader_b"]], [known["loader_r1"], known["loader_r2"]])
    for store in ("recipe", "float"):
        found = ShardDataset(prep(tmp_path, store), layouts=("binaural",), sample_rate=32_000)
        sounds = {found.load_sample(n).meta["question_type"]: found[n]["waveforms"][0] for n in range(2)}
        assert np.array_equal(sounds["DOA"].samples, known["loader_single"])
        assert np.array_equal(sounds["MIXUP_DIRECTION"].samples, known["loader_dual"])
    assert sum(path.stat().st_size for path in (tmp_path / "recipe" / "train").glob("*.tar")) < 20_000


def test_recipes_are_samples_like_others(noise: Path) -> None:
    read, packed = (ShardDataset(prep(noise, store)) for store in ("recipe", "float"))
    assert len(read) == len(packed) == 3, "equal words about another sound are no repetition"
    for n in range(3):
        one, two = read.load_sample(n), packed.load_sample(n)
        assert (one.id, one.question, one.answer, one.recordings) == (two.id, two.question, two.answer, two.recordings)
        info = one.audio[0]
        assert (info.sample_rate, info.layout, info.seconds, info.sha256) == (32_000, "binaural", 10.0, None)
        assert np.array_equal(read.load_waveform(n).samples, packed.load_waveform(n).samples)
    loud = max(float(np.abs(packed.load_waveform(n).samples).max()) for n in range(3))
    assert loud > 1, "what 16 bits do not hold is kept"
    out = noise / "table"
    assert main(["convert", "shards", str(noise / "recipe" / "train"), str(out)]) == 0
    written = sorted((out / "audio").iterdir())
    samples, _ = soundfile.read(written[0], dtype="float32")
    assert np.array_equal(samples.T, read.load_waveform(0).samples)


def test_files_that_moved_changed_or_are_gone_are_named(noise: Path, tmp_path: Path) -> None:
    folder = prep(noise, "recipe")
    whole = ShardDataset(folder).load_waveform(0).samples
    moved = tmp_path / "moved"
    (noise / "AudioSet").rename(moved)
    with pytest.raises(AudioError, match=r"Ya\.wav.*a file.*roots\.json"):
        ShardDataset(folder).load_waveform(0)
    roots = json.loads((folder / ROOTS).read_text())
    other = folder.parent / "other"
    folder.rename(other)
    write_json(other / ROOTS, roots | {"clips": str(moved)})
    assert np.array_equal(ShardDataset(other).load_waveform(0).samples, whole)
    with open(moved / "eval" / "audio" / "Ya.wav", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(AudioError, match="another file"):
        ShardDataset(other).load_waveform(0)
    (other / ROOTS).unlink()
    (third := other.parent / "third").mkdir()
    for path in other.iterdir():
        path.rename(third / path.name)
    with pytest.raises(AudioError, match=r"roots\.json: expected the folders of 'clips' and 'responses'"):
        ShardDataset(third).load_waveform(0)


def test_a_missing_file_is_a_reject_and_sounds_that_are_files_cannot_be_rendered(noise: Path, capsys: Any) -> None:
    (noise / "mp3d" / "binaural" / "room" / "1.npy").unlink()
    assert len(ShardDataset(prep(noise, "recipe", "max_rejects=1"))) == 2
    (reject,) = map(json.loads, (noise / "recipe" / "rejects.jsonl").read_text().splitlines())
    assert reject["reason"] == "no_such_file" and "1.npy" in reject["detail"]
    csv = str(ROOT / "recipes" / "manifest" / "csv.yaml")
    assert main(["prep", csv, str(noise / "out"), "audio.store=recipe"]) == 2
    assert "a format whose sounds are rendered" in capsys.readouterr().err
    given = [f"path={noise}/train.json", "audio.store=recipe", "audio.sample_rate=16000"]
    assert main(["prep", RECIPE, str(noise / "out"), *given]) == 2
    assert "audio.sample_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        '{"render": {"clips": ["../../etc/passwd"], "responses": ["a.npy"]}}',
        '{"render": {"clips": [], "responses": []}}',
        '{"render": {"clips": ["a", "b"], "responses": ["a"]}}',
        '{"render": {"clips": ["a"], "responses": ["b"], "rendering": {"loudness": 3}}}',
        '{"render": {"clips": ["a"], "responses": ["b"], "rendering": {"seconds": -1}}}',
        '{"render": 3',
    ],
)
def test_recipes_of_strangers_are_errors(text: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="sample 3"):
        Recipe.read(text.encode(), "sample 3").render({"clips": str(tmp_path), "responses": str(tmp_path)}, "sample 3")


def test_a_recipe_says_what_is_not_usual() -> None:
    recipe = Recipe(("a",), ("r/0.npy",), Rendering(silent="keep", sample_rate=16_000), (3, 4))
    assert Recipe.read(recipe.to_bytes(), "it") == recipe
    assert b"level_db" not in recipe.to_bytes()
