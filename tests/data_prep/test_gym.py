"""Scenes drawn one at a time: the same whoever draws them, of training recordings alone, and true."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from audio_llm import config as recipes
from audio_llm.errors import AudioError, AudioLLMError, ConfigError
from data_prep import procedural, sounds
from data_prep.scenes import gym, pool, render, rooms, simulate
from tests.data_prep.test_questions import truth
from tests.data_prep.test_scenes import sofa_head

RECIPE: dict[str, Any] = {
    "verb": "prep",
    "seed": 3,
    "audio": {"seconds": 1.5, "snr_db": [20, 40]},
    "sounds": {"recordings": 12, "seconds": [0.5, 1.5], "classes": ["bell", "bird", "drum", "rain", "siren", "wind"]},
    "rooms": {"train": 3, "validation": 1, "test": 2, "positions": 16, "listeners": 2, "max_order": 2, "seconds": 0.1},
    "events": {"seconds": [0.4, 1.0]},
    "questions": {"metres": [1.0, 2.5, 6.5], "second_event": 0.3},
    "subsets": {
        "rl": {"split": "train", "count": 4, "formats": {"mmau": 0.8, "dcase_aqa": 0.1, "spatialsoundqa": 0.1}},
        "test": {"split": "test", "count": 4},
    },
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


def opened(path: Path, workers: int = 0, seed: int = 5, subset: str | None = None) -> gym.SceneSource:
    assert gym.recognises(path)
    return gym.open_source(path, subset=subset, folder=path.parent / "kept", seed=seed, workers=workers)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gym") / "scenes.yaml")


@pytest.fixture(scope="module")
def source(recipe) -> gym.SceneSource:
    return opened(recipe)


@pytest.fixture(scope="module")
def draws(source) -> list[Any]:
    return [source.submit(kind, number).result() for kind in source.kinds for number in range(16)]


def test_a_draw_is_the_same_whoever_makes_it_and_in_whatever_order(recipe, source):
    others = opened(recipe, workers=1)
    jobs = [(kind, number) for number in (7, 0) for kind in source.kinds]
    made = {job: others.submit(*job) for job in reversed(jobs)}
    for job in jobs:
        (one, heard), (two, same) = source.submit(*job).result(), made[job].result()
        assert one.to_json() == two.to_json() and heard.samples.tobytes() == same.samples.tobytes()
    others.close()
    assert others.digest == source.digest != opened(write(recipe.parent / "b.yaml", seed=4)).digest


def test_seeds_kinds_and_numbers_tell_draws_apart(recipe, source, draws):
    assert len({heard.samples.tobytes() for _, heard in draws}) == len(draws)
    assert len({sample.meta["room"] for sample, _ in draws}) == len(draws)
    assert len({sample.id for sample, _ in draws}) == len(draws)
    other = opened(recipe, seed=6).submit("side-easy", 0).result()[1]
    assert other.samples.tobytes() != source.submit("side-easy", 0).result()[1].samples.tobytes()


def test_no_recording_and_no_room_of_another_split_is_drawn(recipe, source, draws):
    """Against the split as ``audio-llm prep`` makes it, and against the shards that it writes."""
    config = recipes.load(simulate.SceneConfig, recipe)
    groups, _ = sounds.split(simulate.find_sounds(config), config.split, config.recordings_seed, config.folds)
    held_out = {clip.recording for split in ("validation", "test") for clip in groups[split]}
    drawn = {recording for sample, _ in draws for recording in sample.meta["recordings"]}
    assert drawn <= {clip.recording for clip in groups["train"]} == source.recordings
    assert held_out and not (drawn | source.recordings) & held_out
    known = {rooms.draw_room(config.rooms, split, n, 3).size for split in ("train", "test") for n in range(4)}
    assert all(sample.meta["room"].startswith("gym-") and sample.source.split == "train" for sample, _ in draws)
    fresh = {rooms.draw_room(config.rooms, f"gym-{kind}-0", 0, 5).size for kind in source.kinds}
    assert len(fresh) == len(source.kinds) and not fresh & known


def test_nothing_is_stored(recipe, draws):
    kept = [path for path in (recipe.parent / "kept").rglob("*") if path.is_file() and path.stat().st_size]
    assert not kept


def test_answers_follow_from_the_events(draws):
    assert {sample.meta["question_type"] for sample, _ in draws} == set(RECIPE["questions"].get("choice", ())) | {
        *("identity", "presence", "side", "direction", "distance")
    }
    for sample, heard in draws:
        sample.validate()
        assert truth(sample) == sample.answer and sample.answer in sample.choices
        assert heard.samples.shape == (2, 24_000) and heard.layout == "binaural" and np.abs(heard.samples).max() > 0


def test_every_answer_in_every_place_is_asked_equally_often(source):
    """Whatever the weights of kinds: within a kind no answer is likelier than another."""
    for kind in ("side-easy", "distance-hard"):
        deck, _ = source._drawer.decks[kind.rpartition("-")[0]]
        made = [source.submit(kind, number).result()[0] for number in range(2 * len(deck))]
        assert set(Counter((sample.answer, sample.choices.index(sample.answer)) for sample in made).values()) == {2}


def test_a_draw_sounds_as_prep_renders_it(source, tmp_path):
    """From the room's whole bank of responses on disk, as for a subset's scenes."""
    drawer = source._drawer
    for kind, number in (("side-hard", 1), ("distance-easy", 2), ("presence-hard", 4)):
        sample, heard = source.submit(kind, number).result()
        questions, audio = drawer.levels[kind.rpartition("-")[2]]
        world, draft, _ = drawer.scene(drawer.ask(kind, number), questions, kind)
        [room] = world.rooms
        assert room.name == sample.meta["room"] and world.events_of(draft.placed) == sample.events
        render.render_room(tmp_path, room, drawer.config.rooms, drawer.head, 16_000)
        mixed, done = render.render_scene(draft.placed, world, tmp_path, drawer.head, audio, "gym", 5, kind, number)
        np.testing.assert_allclose(heard.samples, mixed.samples, atol=1e-6)
        assert done["snr_db"] == sample.meta["snr_db"]


def test_easy_and_hard_scenes_together_are_the_recipes(source):
    questions, audio = source._drawer.config.questions, source._drawer.config.audio
    for share in (0.0, 0.3, 0.5, 0.9, 1.0):
        of = [gym.level_of(gym.replace(questions, second_event=share), audio, level) for level in gym.LEVELS]
        assert np.mean([asked.second_event for asked, _ in of]) == pytest.approx(share)
        assert of[0][0].second_event <= of[1][0].second_event
    assert of[1][1].snr_db == (20, 30) and of[0][1].snr_db == (30, 40)
    assert sum(source.kinds.values()) == pytest.approx(1)


def test_levels_are_heard(draws):
    for sample, _ in draws:
        hard = sample.meta["gym"]["level"] == "hard"
        assert (sample.meta["snr_db"] <= 30) == hard or sample.meta["snr_db"] == 30
        assert hard or len(sample.events) == 1  # 0.3 of the recipe's scenes have another sound: 0.6 of the hard ones
    assert any(len(sample.events) == 2 for sample, _ in draws)


def test_the_folder_that_prep_made_is_drawn_from_with_its_own_seed(recipe, tmp_path):
    """A seed given to ``audio-llm prep`` splits the recordings otherwise than the recipe says."""
    config = recipes.load(simulate.SceneConfig, recipe, ["seed=8", "split_seed=9"])
    simulate.prepare(config, tmp_path / "data", workers=1, quiet=True)
    made = opened(tmp_path / "data", subset="rl")
    groups, _ = sounds.split(simulate.find_sounds(config), config.split, 9)
    assert made.recordings == {clip.recording for clip in groups["train"]}
    assert set(made.kinds) > {"CLASSIFICATION-easy", "DOA-hard"}
    assert made.kinds["DOA-easy"] == pytest.approx(0.1 / 2 / 2)
    shutil.rmtree(tmp_path / "data" / "rl")  # its shards are not read
    assert opened(tmp_path / "data").digest != made.digest


def test_a_folder_of_sounds_is_scanned_once_wherever_it_lies(tmp_path):
    make_sounds(tmp_path / "here" / "sounds")
    first = opened(write(tmp_path / "a.yaml", sounds={"folder": str(tmp_path / "here" / "sounds")}))
    scanned = (tmp_path / "kept" / "sounds.json").stat().st_mtime_ns
    one = first.submit("side-hard", 3).result()[1]
    (tmp_path / "here").rename(tmp_path / "there")
    second = opened(write(tmp_path / "b.yaml", sounds={"folder": str(tmp_path / "there" / "sounds")}))
    assert second.digest == first.digest
    assert second.submit("side-hard", 3).result()[1].samples.tobytes() == one.samples.tobytes()
    assert (tmp_path / "kept" / "sounds.json").stat().st_mtime_ns == scanned


def make_sounds(folder: Path) -> Path:
    """Eight files of each class."""
    for label in RECIPE["sounds"]["classes"]:
        (folder / label).mkdir(parents=True)
        for number in range(8):
            heard = 0.3 * procedural.synthesise(label, number, 1.0, 16_000)
            soundfile.write(folder / label / f"{label}{number}.wav", heard, 16_000)
    return folder


def test_sounds_that_were_replaced_are_scanned_again(tmp_path):
    """Under their names and at their lengths: where the old one was audible says nothing about the new one."""
    folder = make_sounds(tmp_path / "sounds")
    path = write(tmp_path / "a.yaml", sounds={"folder": str(folder)})
    first = opened(path)
    heard, rate = soundfile.read(folder / "bell" / "bell0.wav")
    late = np.concatenate([np.zeros(rate * 6 // 10), heard[: rate * 4 // 10]])  # 0.6 s later
    soundfile.write(folder / "bell" / "bell0.wav", late, rate)
    second = opened(path)
    assert second.digest != first.digest
    scanned = yaml.safe_load((tmp_path / "kept" / "sounds.json").read_text())["clips"]
    assert next(clip["start"] for clip in scanned if clip["name"] == "bell/bell0.wav") == pytest.approx(0.6, abs=0.03)


def test_a_sound_that_became_shorter_since_is_named(tmp_path):
    """While a run draws: a scene would hold nothing of it."""
    heard = 0.3 * procedural.synthesise("bell", 0, 1.0, 16_000)
    soundfile.write(tmp_path / "a.wav", heard, 16_000)
    clip = sounds.Clip("bell", "a", "a", start=0.2, seconds=0.7, path=str(tmp_path / "a.wav"))
    assert len(sounds.load(clip, 16_000)) == round(0.7 * 16_000)
    sounds.load.cache_clear()
    soundfile.write(tmp_path / "a.wav", heard[:8000], 16_000)
    with pytest.raises(AudioError, match=r"a\.wav: expected 0\.9 s, as when it was scanned, found 0\.5 s"):
        sounds.load(clip, 16_000)


def test_another_measured_head_is_another_gym(tmp_path):
    """Under the same name."""
    path = write(tmp_path / "a.yaml", head={"sofa": str(sofa_head(tmp_path / "head.sofa"))})
    first = opened(path).digest
    assert opened(path).digest == first
    sofa_head(tmp_path / "head.sofa", turned=10.0)
    assert opened(path).digest != first


def test_copies_of_a_sound_are_on_no_two_sides(tmp_path):
    """Also in another format, or of another class, of which a warning tells."""
    folder = make_sounds(tmp_path / "sounds")

    def sides(name: str) -> dict[bytes, set[str]]:
        config = recipes.load(simulate.SceneConfig, write(tmp_path / "a.yaml", sounds={"folder": str(folder)}))
        (tmp_path / name).mkdir()
        found = simulate.find_sounds(config)
        library, groups, _ = simulate.split_sounds(config, tmp_path / name, found, 1, True)
        assert not library.rejects and len(library.clips) == len(list(folder.rglob("*.*")))
        placed: dict[bytes, set[str]] = {}
        for side, clips in groups.items():
            for clip in clips:
                placed.setdefault(soundfile.read(clip.path)[0].tobytes(), set()).add(side)
        return placed

    for number in range(8):
        shutil.copy(folder / "bell" / f"bell{number}.wav", folder / "bell" / f"copy{number}.wav")
    heard, rate = soundfile.read(folder / "drum" / "drum0.wav")
    soundfile.write(folder / "drum" / "again.flac", heard, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = sides("after")
    assert len(after) > 24 and all(len(side) == 1 for side in after.values())
    for number in range(8):
        shutil.copy(folder / "rain" / f"rain{number}.wav", folder / "wind" / f"rain{number}.wav")
    with pytest.warns(UserWarning, match=r"wind/rain0\.wav is the same sound as rain/rain0\.wav.*\(8 such files\)"):
        both = sides("both")
    assert len(both) > 24 and all(len(side) == 1 for side in both.values())


class Mortal:
    """Work in which a process dies, as of too little memory."""

    def die(self, job: int) -> None:
        os._exit(9)


def test_a_worker_that_dies_is_told_of_by_all_pools():
    with pytest.raises(AudioLLMError, match="a worker process died"), pool.open_pool(1, Mortal, (), apart=True) as jobs:
        list(jobs.run("die", [0]))
    with pytest.raises(AudioLLMError, match="a worker process died"), pool.plain_pool(1) as executor:
        list(executor.map(os._exit, [9]))


def test_what_is_no_recipe_of_scenes_is_not_recognised(tmp_path):
    for number, text in enumerate(["verb: grpo", "verb: prep\nkind: manifest", "a: 1"]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert not gym.recognises(path)
    (tmp_path / "dataset.json").write_text("[]")
    assert not gym.recognises(tmp_path)


@pytest.mark.parametrize("subset", ["test", "none"])
def test_a_subset_of_another_split_is_refused(recipe, subset):
    with pytest.raises(ConfigError, match=r"data\.gym\.subset: expected a subset of split train .*\(rl\)"):
        opened(recipe, subset=subset)
