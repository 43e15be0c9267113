"""Spatial-AST's data: the published renderer to the sample, its folders and their defects, manifests, shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from audio_llm import audio, config
from audio_llm.cli import main
from audio_llm.datasets import reverberation
from audio_llm.errors import AudioError, ConfigError, ShardError
from audio_llm.shards import rendering as rendered
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.rendering import Rendering
from audio_llm.shards.writer import ShardWriter
from audio_llm.tasks.spatial import heads
from data_prep.tasks import audioset_reverb
from tests.paths import ROOT, SHARED

FIXTURES = SHARED / "fixtures" / "bat_ref.npz"
MIDS = {"/m/dog": "dog", "/m/bell": "bell, chime", "/m/rain": "rain"}
RATE = 8_000


@pytest.fixture(scope="module")
def reference():
    return np.load(FIXTURES)


def waveform(samples: np.ndarray, rate: int) -> audio.Waveform:
    return audio.Waveform(np.atleast_2d(samples), rate, "mono")


# ------------------------------------------------------------------------------------------------ the renderer


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_renders_the_reference_exactly(reference) -> None:
    rendering = Rendering()
    first = rendered.dry(waveform(reference["loader_a"], 32_000), rendering)
    second = rendered.dry(waveform(reference["loader_b"], 32_000), rendering)
    other_rate = rendered.dry(waveform(reference["loader_44k_in"], 44_100), rendering)
    wet = rendered.render(first, reference["loader_r1"], rendering)
    assert np.array_equal(wet, reference["loader_single"])
    dual = rendered.mix(wet, rendered.render(second, reference["loader_r2"], rendering))
    assert np.array_equal(dual, reference["loader_dual"])
    assert np.array_equal(rendered.render(other_rate, reference["loader_r1"], rendering), reference["loader_44k"])


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_labels_of_the_reference_geometry(reference) -> None:
    for row in reference["geometry"]:
        azimuth, elevation, distance = reverberation.place_of(tuple(row[:3]), tuple(row[3:6]))
        if distance <= 10.25:
            found = heads.distance_class(distance), heads.azimuth_class(azimuth), heads.elevation_class(elevation)
            assert found == tuple(row[6:].astype(int))


@settings(deadline=None, max_examples=30)
@given(st.integers(40, 900), st.integers(1, 700), st.integers(0, 2**31))
def test_rendering_is_a_filter_of_the_levelled_clip(length: int, taps: int, seed: int) -> None:
    """A finite response is a finite impulse response filter, which scipy.signal.lfilter computes without any FFT."""
    rng = np.random.default_rng(seed)
    clip, response = rng.standard_normal(length), rng.standard_normal((2, taps))
    rendering = Rendering(sample_rate=1000, seconds=1.0)
    dry = rendered.dry(waveform(clip, 1000), rendering)
    assert 20 * math.log10(math.sqrt(np.mean(dry**2))) == pytest.approx(-14, abs=1e-6)
    padded = np.concatenate([dry, np.zeros(1000)])[:1000]
    expected = np.stack([lfilter(row, [1.0], padded) for row in response])
    assert np.allclose(rendered.render(dry, response, rendering), expected, atol=2e-5)


def test_response_seconds_is_a_shorter_response_and_the_default_is_all_of_it() -> None:
    rng = np.random.default_rng(0)
    clip, response = rng.standard_normal(300), rng.standard_normal((2, 500))
    short = Rendering(sample_rate=1000, seconds=1.0, response_seconds=0.2)
    whole = rendered.render(clip, response, Rendering(sample_rate=1000, seconds=1.0))
    cut = rendered.render(clip, response, short)
    assert np.array_equal(cut, rendered.render(clip, response[:, :200], Rendering(sample_rate=1000, seconds=1.0)))
    assert not np.allclose(cut, whole)


def test_silence_is_refused_unless_it_is_asked_for() -> None:
    silence = waveform(np.zeros(100), 1000)
    with pytest.raises(AudioError, match="clip-7: expected sound, found silence"):
        rendered.dry(silence, Rendering(sample_rate=1000), "clip-7")
    assert not rendered.dry(silence, Rendering(sample_rate=1000, silent="keep")).any()


def test_several_channels_need_a_rule_and_the_published_one_takes_the_first() -> None:
    stereo = audio.Waveform(np.random.default_rng(0).standard_normal((2, 200)).astype(np.float32), 1000, "stereo")
    first = waveform(stereo.samples[0], 1000)
    rendering = Rendering(sample_rate=1000)
    assert np.array_equal(rendered.dry(stereo, rendering), rendered.dry(first, rendering))
    with pytest.raises(AudioError, match="found stereo.*--hearing left"):
        rendered.dry(stereo, Rendering(sample_rate=1000, hearing="refuse"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((0, 0, -2), (0, 0)),  # ahead
        ((2, 0, 0), (-90, 0)),  # right
        ((-2, 0, 0), (90, 0)),
        ((0, 0, 2), (180, 0)),  # behind is 180, never −180
        ((0, 2, 0), (0, 90)),  # straight above, where the published code divides by zero
        ((0, -2, 0), (0, -90)),
        ((-1, math.sqrt(2), -1), (45, 45)),
    ],
)
def test_places_as_the_listener_sees_them(source, expected) -> None:
    azimuth, elevation, distance = reverberation.place_of((1.0, 1.5, 3.0), tuple(np.add((1.0, 1.5, 3.0), source)))
    assert azimuth == pytest.approx(expected[0])
    assert elevation == pytest.approx(expected[1]) and distance == pytest.approx(2)


# ------------------------------------------------------------------------------------------------ folders


def write_world(root: Path, clips: int = 6, houses: tuple[str, ...] = ("roomA", "roomB")) -> dict:
    """The published folders in small: dry clips with metadata and classes, responses of `houses` and of roomC."""
    rng = np.random.default_rng(5)
    rows = {"train": [], "eval": []}
    for split, scenes in (("train", houses), ("eval", ("roomC",))):
        for scene in scenes:
            (root / "mp3d" / "binaural" / scene).mkdir(parents=True)
            for number in range(3):
                response = rng.standard_normal((2, 400)) * np.exp(-np.arange(400) / 60) * 0.2
                np.save(root / "mp3d" / "binaural" / scene / f"{number}.npy", response)
                x, z = 2 * math.cos(number), -2 * math.sin(number + 1)
                position = {"sensor_position": "1.0,1.5,2.0", "source_position": f"{1 + x},{1.5},{2 + z}"}
                rows[split].append({"fname": f"{scene}/{number}.npy", "agent_position": "1,0,2", **position})
        (root / "mp3d" / f"{split}_reverberation.json").write_text(json.dumps({"data": rows[split]}))
    lines = ["index,mid,display_name", *(f"{7 * row},{mid},{name}" for row, (mid, name) in enumerate(MIDS.items()))]
    (root / "classes.csv").write_text("\n".join(lines) + "\n")
    for split in ("train", "eval"):
        (root / split).mkdir()
        data = []
        for number in range(clips):
            name = f"Y{split}{number}"
            tone = np.sin(np.arange(RATE) * (0.05 + 0.02 * number)) * 0.3
            soundfile.write(root / split / f"{name}.wav", tone, RATE, subtype="PCM_16")
            labels = list(MIDS)[number % 3 : number % 3 + 1 + (number == 3)]
            data.append({"id": name, "folder": split, "label": labels})
        (root / f"{split}.json").write_text(json.dumps({"data": data}))
    return rows


def recipe(root: Path, **changes) -> audioset_reverb.ReverbConfig:
    tree = {
        "kind": "audioset_reverb",
        "root": str(root),
        "classes": str(root / "classes.csv"),
        "responses": str(root / "mp3d"),
        "rendering": {"sample_rate": RATE, "seconds": 1.5, "gain_db": -12.0},
        "samples_per_shard": 4,
        "subsets": {
            "train": {"metadata": str(root / "train.json"), "responses": "train", "count": 20, "pairs": 0.5},
            "test": {"metadata": str(root / "eval.json"), "responses": "eval", "split": "test"},
        },
        **changes,
    }
    return config.build(audioset_reverb.ReverbConfig, tree)


def test_shards_say_what_is_heard_and_where(tmp_path: Path) -> None:
    write_world(tmp_path)
    made = recipe(tmp_path)
    summary = audioset_reverb.prepare(made, tmp_path / "out", workers=1, quiet=True)
    assert summary.fresh and summary.manifest["labels"] == list(MIDS.values())
    assert summary.manifest["subsets"]["train"]["samples"] == 20
    assert not audioset_reverb.prepare(made, tmp_path / "out", workers=1, quiet=True).fresh
    places = {r.name: r for r in reverberation.read_responses(tmp_path / "mp3d", "train")}
    dataset, pairs = ShardDataset(tmp_path / "out" / "train"), 0
    for item in (dataset[index] for index in range(len(dataset))):
        sample, sound = item["sample"], item["waveforms"][0]
        assert (sound.layout, sound.sample_rate, sound.samples.shape) == ("binaural", RATE, (2, 1.5 * RATE))
        wet = []
        for source in sample.meta["sources"]:
            clip = audio.decode(tmp_path / "train" / f"{source['clip']}.wav")
            response = np.load(tmp_path / "mp3d" / "binaural" / source["response"])
            wet.append(rendered.render(rendered.dry(clip, made.rendering), response, made.rendering))
            where = places[source["response"]]
            assert any(
                np.allclose((event.azimuth, event.elevation, event.distance), where.place, atol=1e-3)
                for event in sample.events
            )
        assert np.abs(np.mean(wet, axis=0) * 10 ** (-12 / 20) - sound.samples).max() < 1 / 32768
        if len(wet) == 2:
            pairs += 1
            (first, a), (second, b) = (source.values() for source in sample.meta["sources"])
            assert a != b and a.partition("/")[0] == b.partition("/")[0] and first != second
            assert len({event.azimuth for event in sample.events}) == 2
    assert 5 <= pairs <= 15
    test = ShardDataset(tmp_path / "out" / "test")
    assert [test.load_sample(i).meta["sources"][0]["clip"] for i in range(6)] == [f"Yeval{i}" for i in range(6)]
    assert [event.label for event in test.load_sample(3).events] == ["dog", "bell, chime"]


def test_shared_places_are_one_response_and_one_place(tmp_path: Path) -> None:
    write_world(tmp_path)
    made = recipe(tmp_path, rendering={"sample_rate": RATE, "seconds": 1.0, "gain_db": -12.0, "places": "shared"})
    audioset_reverb.prepare(made, tmp_path / "out", workers=1, quiet=True)
    dataset = ShardDataset(tmp_path / "out" / "train")
    pairs = [sample for sample in map(dataset.load_sample, range(20)) if len(sample.meta["sources"]) == 2]
    assert pairs
    for sample in pairs:
        assert len({source["response"] for source in sample.meta["sources"]}) == 1
        assert len({event.azimuth for event in sample.events}) == 1
        assert len({event.label for event in sample.events}) == len(sample.events)
        assert 0 < sample.meta["share"] < 1
    number = dataset.find(pairs[0].id)
    clips = [
        rendered.dry(audio.decode(tmp_path / "train" / f"{source['clip']}.wav"), made.rendering)
        for source in pairs[0].meta["sources"]
    ]
    response = np.load(tmp_path / "mp3d" / "binaural" / pairs[0].meta["sources"][0]["response"])
    mixed = pairs[0].meta["share"] * clips[0] + (1 - pairs[0].meta["share"]) * clips[1]
    expected = np.stack([lfilter(row, [1.0], mixed) for row in response])
    assert np.abs(expected * 10 ** (-12 / 20) - dataset.load_waveform(number).samples).max() < 2 / 32768


def test_scenes_beyond_full_scale_keep_their_level(tmp_path: Path) -> None:
    write_world(tmp_path)
    made = recipe(tmp_path, rendering={"sample_rate": RATE, "seconds": 1.0, "gain_db": 9.0})
    audioset_reverb.prepare(made, tmp_path / "out", workers=1, quiet=True)
    dataset, peaks = ShardDataset(tmp_path / "out" / "test"), []
    for number in range(len(dataset)):
        (source,) = dataset.load_sample(number).meta["sources"]
        clip = rendered.dry(audio.decode(tmp_path / "eval" / f"{source['clip']}.wav"), made.rendering)
        response = np.load(tmp_path / "mp3d" / "binaural" / source["response"])
        expected = np.stack([lfilter(row, [1.0], clip) for row in response]) * 10 ** (9 / 20)
        found = dataset.load_waveform(number).samples
        assert np.abs(expected - found).max() < 1e-4
        peaks.append(np.abs(found).max())
    assert max(peaks) > 1.2 and len({round(float(peak), 3) for peak in peaks}) > 1  # near ones are louder than far ones


def test_a_manifest_renders_the_same_bytes_elsewhere_and_detects_changes(tmp_path: Path) -> None:
    write_world(tmp_path)
    audioset_reverb.prepare(recipe(tmp_path), tmp_path / "one", workers=1, quiet=True)
    manifest = tmp_path / "one" / "manifests" / "train.jsonl"
    subset = {"metadata": str(tmp_path / "train.json"), "responses": "train", "manifest": str(manifest)}
    again = recipe(tmp_path, seed=99, subsets={"train": subset})
    audioset_reverb.prepare(again, tmp_path / "two", workers=2, quiet=True)
    sizes = [json.loads((tmp_path / name / "train" / "sizes.json").read_text()) for name in ("one", "two")]
    assert sizes[0]["shards"] == sizes[1]["shards"]  # SHA-256 of every shard

    text = manifest.read_text()
    manifest.write_text(text.replace("Ytrain1", "Ytrain2", 1))
    with pytest.raises(ConfigError, match="rows of SHA-256"):
        audioset_reverb.prepare(again, tmp_path / "three", workers=1, quiet=True)
    manifest.write_text(text)
    moved = tmp_path / "mp3d" / "train_reverberation.json"
    moved.write_text(moved.read_text().replace('"1.0,1.5,2.0"', '"1.0,1.6,2.0"'))
    with pytest.raises(ConfigError, match="train-000000: expected"):
        audioset_reverb.prepare(again, tmp_path / "three", workers=1, quiet=True)


def test_a_longer_plan_begins_like_a_shorter_one_and_seeds_differ(tmp_path: Path) -> None:
    write_world(tmp_path)
    clips, _ = reverberation.read_audioset(
        tmp_path / "train.json", reverberation.read_classes(tmp_path / "classes.csv"), tmp_path
    )
    responses, made = reverberation.read_responses(tmp_path / "mp3d", "train"), recipe(tmp_path)

    def rows(count: int, made: audioset_reverb.ReverbConfig = made) -> list[dict]:
        part = audioset_reverb.SubsetConfig("train", count=count, pairs=0.5)
        return [item.row() for item in audioset_reverb.plan("a", part, clips, responses, made)]

    assert rows(40)[:15] == rows(15)
    assert rows(15, recipe(tmp_path, seed=1)) != rows(15)
    firsts = [row["sources"][0]["clip"] for row in rows(12)]
    assert sorted(firsts[:6]) == sorted(firsts[6:]) == sorted(clip.name for clip in clips)


def test_a_run_that_was_stopped_gives_the_same_shards(tmp_path: Path, monkeypatch) -> None:
    write_world(tmp_path)
    audioset_reverb.prepare(recipe(tmp_path), tmp_path / "whole", workers=1, quiet=True)
    written = ShardWriter.add

    def stop(writer, packed):
        if packed.sample.id == "train-000009":
            raise KeyboardInterrupt
        return written(writer, packed)

    monkeypatch.setattr(ShardWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        audioset_reverb.prepare(recipe(tmp_path), tmp_path / "stopped", workers=1, quiet=True)
    monkeypatch.undo()
    assert len(list((tmp_path / "stopped" / "train").glob("*.tar"))) == 2
    audioset_reverb.prepare(recipe(tmp_path), tmp_path / "stopped", workers=1, quiet=True)
    for name in ("train", "test"):
        sizes = [json.loads((tmp_path / run / name / "sizes.json").read_text()) for run in ("whole", "stopped")]
        assert sizes[0] == sizes[1]


# ------------------------------------------------------------------------------------------------ defects


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_position": "1,2"}, r"data\[1\] \(roomA/1.npy\): source_position: expected a text 'x,y,z'"),
        ({"source_position": "nan,0,0"}, "finite metres"),
        ({"source_position": "1.0,1.5,2.0"}, "both at one point"),
        ({"sensor_position": [1, 2, 3]}, "a text 'x,y,z' in metres"),
        ({"fname": "../../etc.npy"}, "scene/number.npy"),
        ({"fname": "roomA/0.npy"}, "the same one again"),
        ({"fname": "roomA/77.npy"}, "expected a file"),
        ({"fname": None}, "'fname'"),
    ],
)
def test_metadata_that_cannot_be_names_its_entry(tmp_path: Path, change, message) -> None:
    rows = write_world(tmp_path)["train"]
    rows[1] |= change
    (tmp_path / "mp3d" / "train_reverberation.json").write_text(json.dumps({"data": rows}))
    with pytest.raises(AudioError, match=message):
        reverberation.read_responses(tmp_path / "mp3d", "train")


@pytest.mark.parametrize("text", ["", "[]", '{"data": 3}', '{"data": []}', "{"])
def test_metadata_files_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval_reverberation.json").write_text(text)
    with pytest.raises(AudioError, match="eval_reverberation.json"):
        reverberation.read_responses(tmp_path, "eval")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 50)), "shape"),
        (np.ones(50), "shape"),
        (np.ones((2, 0)), "shape"),
        (np.ones((2, 50), dtype=np.int16), "int16"),
        (np.full((2, 50), np.nan), "NaN"),
        (np.zeros((2, 50)), "silence"),
        (np.array([[None, 1]], dtype=object), "numbers"),
    ],
)
def test_responses_that_cannot_be_used_name_the_file(tmp_path: Path, array, message) -> None:
    np.save(tmp_path / "3.npy", array, allow_pickle=True)
    with pytest.raises(AudioError, match=message) as error:
        reverberation.load_response(reverberation.Response("r/3.npy", str(tmp_path / "3.npy"), 0.0, 0.0, 1.0))
    assert "3.npy" in str(error.value)


def test_a_truncated_response_and_a_broken_clip_are_rejected_items(tmp_path: Path) -> None:
    write_world(tmp_path)
    path = tmp_path / "eval" / "Yeval2.wav"
    path.write_bytes(path.read_bytes()[:60])
    made = recipe(tmp_path, subsets={"test": {"metadata": str(tmp_path / "eval.json"), "responses": "eval"}})
    with pytest.raises(ShardError, match="cut short"):
        audioset_reverb.prepare(made, tmp_path / "strict", workers=1, quiet=True)
    lenient = recipe(tmp_path, subsets=made.subsets, max_reject_share=0.2)
    summary = audioset_reverb.prepare(lenient, tmp_path / "lenient", workers=1, quiet=True)
    assert summary.manifest["subsets"]["test"]["samples"] == 5
    (line,) = [json.loads(line) for line in (tmp_path / "lenient" / "rejects.jsonl").read_text().splitlines()]
    assert line["item"] == "test-000002" and "Yeval2.wav" in line["reason"]


def test_classes_with_commas_are_whole_and_numbered_by_row(tmp_path: Path) -> None:
    write_world(tmp_path)
    assert list(reverberation.read_classes(tmp_path / "classes.csv").items()) == list(MIDS.items())
    (tmp_path / "bad.csv").write_text("index,mid,display_name\n0,/m/dog\n")
    with pytest.raises(AudioError, match="line 2"):
        reverberation.read_classes(tmp_path / "bad.csv")


def test_clips_without_file_or_class_are_left_out_with_their_reason(tmp_path: Path) -> None:
    write_world(tmp_path)
    data = json.loads((tmp_path / "train.json").read_text())["data"]
    data += [{"id": "Ygone", "folder": "train", "label": ["/m/dog"]}, {**data[0], "id": "Yodd", "label": ["/m/odd"]}]
    (tmp_path / "train.json").write_text(json.dumps({"data": [*data, data[0]]}))
    classes = reverberation.read_classes(tmp_path / "classes.csv")
    clips, rejects = reverberation.read_audioset(tmp_path / "train.json", classes, tmp_path)
    assert len(clips) == 6
    assert [reject["item"] for reject in rejects] == ["Ygone", "Yodd", "Ytrain0"]
    with pytest.raises(ConfigError, match="unusable clips.*Ygone: no file"):
        audioset_reverb.prepare(recipe(tmp_path), tmp_path / "out", quiet=True)


def test_a_recording_on_both_sides_is_refused(tmp_path: Path) -> None:
    write_world(tmp_path)
    subsets = {
        name: {"metadata": str(tmp_path / "train.json"), "responses": "train", "split": name}
        for name in ("train", "test")
    }
    with pytest.raises(ConfigError, match="Ytrain0 in test, train"):
        audioset_reverb.prepare(recipe(tmp_path, subsets=subsets), tmp_path / "out", quiet=True)


def test_validation_holds_recordings_and_scenes_of_the_training_part_back(tmp_path: Path) -> None:
    write_world(tmp_path, clips=10)
    common = {"metadata": str(tmp_path / "train.json"), "responses": "train"}
    train = {**common, "recordings": [0, 0.7], "scenes": [0, 0.5], "count": 30, "pairs": 0.5}
    subsets = {
        "train": train,
        "validation": {**common, "recordings": [0.7, 1], "scenes": [0.5, 1], "split": "validation"},
    }
    heard = {}
    for seed in (0, 1, 2):
        made = recipe(tmp_path, subsets=subsets, seed=seed)
        made.check()
        plans, _, _, shared = audioset_reverb._plans(made)
        found = [
            {(one.clip.recording, one.response.scene) for item in plans[name] for one in item.heard} for name in subsets
        ]
        recordings, scenes = ([{pair[k] for pair in side} for side in found] for k in (0, 1))
        assert [len(side) for side in recordings] == [7, 3] and not recordings[0] & recordings[1]
        assert [len(side) for side in scenes] == [1, 1] and not scenes[0] & scenes[1] and shared == []
        heard[seed] = frozenset(recordings[1])
    assert len(set(heard.values())) > 1  # drawn by the seed
    for wrong in ([0.5], [0.9, 0.2], [0, 1.5]):
        with pytest.raises(ConfigError, match=r"subsets\.train\.recordings: expected two shares"):
            recipe(tmp_path, subsets={"train": {**train, "recordings": wrong}}).check()
    for key, said in (("scenes", "at least one scene"), ("recordings", "expected clips, found none")):
        with pytest.raises(ConfigError, match=said):
            audioset_reverb._plans(recipe(tmp_path, subsets={"train": {**train, key: [0, 0.01]}}))


def test_the_spatial_recipes_keep_weights_by_a_validation_that_is_not_the_test() -> None:
    from audio_llm.tasks.spatial import SpatialRecipe

    folder = ROOT / "recipes" / "spatial"
    parts = config.load(audioset_reverb.ReverbConfig, folder / "audioset.yaml").parts
    made = config.load(SpatialRecipe, folder / "encoder.yaml")
    assert parts["validation"].metadata == parts["train"].metadata != parts["test"].metadata
    for key in ("recordings", "scenes"):
        assert getattr(parts["train"], key)[1] == getattr(parts["validation"], key)[0]
    assert made.validation is not None and made.validation.name == "validation" and made.eval_steps
    assert [path.name for path in made.train] == ["train"]


def test_the_documented_line_runs_on_the_published_folders(tmp_path: Path, monkeypatch, capsys) -> None:
    repository = ROOT
    lines = (repository / "docs" / "spatial.md").read_text().splitlines()
    command = next(line for line in lines if line.startswith("audio-llm prep recipes/spatial/")).split()[1:]
    root = tmp_path / "AudioSet"
    (root / "metadata").mkdir(parents=True)
    write_world(root, clips=12, houses=("one", "two", "three", "four", "five"))
    (root / "mp3d").rename(tmp_path / "mp3d_reverb")
    names = {"train.json": "balanced.json", "eval.json": "eval.json", "classes.csv": "class_labels_indices_subset.csv"}
    for old, new in names.items():
        (root / old).rename(root / "metadata" / new)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(repository / "recipes")
    small = ["subsets.train.count=4", "rendering.seconds=0.5", "rendering.gain_db=-12"]
    assert main([*command, *small, "--workers", "1", "--quiet"]) == 0
    assert "train 4, validation 1, test 12; rejects 0" in capsys.readouterr().out
    assert (tmp_path / "runs" / "spatial" / "data" / "manifests" / "test.jsonl").is_file()


def test_metadata_is_found_in_root_then_where_the_command_runs(tmp_path: Path, monkeypatch) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = recipe(tmp_path / "absent", subsets={"test": {"metadata": "eval.json", "responses": "eval"}})
    assert made.file("eval.json") == Path("eval.json")
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "eval.json").write_text("{}")
    assert made.file("eval.json") == tmp_path / "absent" / "eval.json"
    assert made.file(str(tmp_path / "eval.json")) == tmp_path / "eval.json"
    absent = recipe(tmp_path, subsets={"test": {"metadata": "none.json", "responses": "eval"}})
    with pytest.raises(AudioError, match=r"/none\.json: expected a metadata file, found"):
        audioset_reverb._plans(absent)


def test_the_command_line_makes_it_from_a_recipe(tmp_path: Path, capsys) -> None:
    import yaml

    write_world(tmp_path)
    tree = {
        "kind": "audioset_reverb",
        "responses": str(tmp_path / "mp3d"),
        "rendering": {"sample_rate": RATE, "seconds": 1.0, "gain_db": -12.0},
        "subsets": {"test": {"sounds": str(tmp_path / "sounds"), "responses": "eval", "split": "test"}},
    }
    for label in ("bell", "dog"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        (tmp_path / "eval" / f"Yeval{len(label) - 3}.wav").rename(tmp_path / "sounds" / label / "one.wav")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    command = ["prep", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main(command) == 0
    assert "test 2; rejects 0" in capsys.readouterr().out
    assert main([*command, "kind=audioset_echo"]) == 2
    assert main([*command, "--sounds", str(tmp_path / "sounds")]) == 2
    assert "Traceback" not in capsys.readouterr().err
