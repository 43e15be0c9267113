"""The scene simulator against physics, and the dataset it makes against its promises."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.errors import AudioError, ConfigError
from audio_llm.shards.reader import ShardDataset
from data_prep import procedural, sounds
from data_prep.scenes import receivers, render, rooms, simulate
from data_prep.scenes.world import Placed, cut
from tests.paths import ROOT, SHARED

RATE = 16_000


def free_field(azimuth: float, elevation: float = 0.0, distance: float = 1.0) -> rooms.Images:
    vector = receivers.unit_vectors(np.array([azimuth]), np.array([elevation])) * distance
    return rooms.Images(vector, np.ones((1, 1)))


def response(
    azimuth: float, layout: str = "binaural", elevation: float = 0.0, distance: float = 1.0, **kwargs
) -> np.ndarray:
    return rooms.impulse_response(
        free_field(azimuth, elevation, distance), receivers.build(layout), RATE, 0.05, **kwargs
    )


def arrival(channel: np.ndarray) -> float:
    """Centre of the energy envelope in samples: a delay estimate that knows nothing of the model."""
    power = np.square(channel)
    return float((np.arange(len(power)) * power).sum() / power.sum())


def lag(late: np.ndarray, early: np.ndarray) -> int:
    correlation = np.correlate(late, early, "full")
    return int(np.argmax(correlation)) - (len(early) - 1)


# ------------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("azimuth", [30, 60, 90, 120, 150])
def test_source_on_the_left_is_earlier_and_louder_in_the_left_ear(azimuth):
    left, right = response(azimuth)
    assert lag(right, left) > 0
    assert np.square(left).sum() > 2 * np.square(right).sum()


def test_interaural_delay_follows_woodworth():
    """ITD of a sphere is (a/c)(θ + sin θ) for ears at ±90° (Woodworth 1938); ours are at ±100°, hence the tolerance."""
    for azimuth in (20, 45, 70):
        pair = receivers.StructuralHead().transfer(
            receivers.unit_vectors(np.array([azimuth]), np.array([0.0])), np.array([200.0, 250.0])
        )
        slope = -np.diff(np.unwrap(np.angle(pair[0, 1] / pair[0, 0])))[0] / (2 * np.pi * 50)  # group delay, seconds
        expected = 0.0875 / 343 * (np.radians(azimuth) + np.sin(np.radians(azimuth)))
        # the head-shadow filters add a low-frequency delay of up to half the ray formula (Brown & Duda, fig. 4)
        assert 0.85 * expected < slope < 1.6 * expected


@pytest.mark.parametrize("azimuth", [0, 17, 45, 90, 133, 180])
@pytest.mark.parametrize("elevation", [-30, 0, 25])
def test_mirrored_source_swaps_the_ears_exactly(azimuth, elevation):
    here, there = response(azimuth, elevation=elevation), response(-azimuth, elevation=elevation)
    np.testing.assert_allclose(here, there[::-1], atol=1e-12)


def test_front_and_back_and_elevation_differ_on_the_cone_of_confusion():
    """Same lateral angle, so nearly the same ITD: what differs is the spectrum of the pinna."""
    spectrum = {
        name: 20 * np.log10(np.abs(np.fft.rfft(response(*direction)[0], 1024)) + 1e-9)[64:448]  # 1 to 7 kHz
        for name, direction in {
            "front": (0, "binaural", 0),
            "back": (180, "binaural", 0),
            "up": (0, "binaural", 40),
        }.items()
    }
    assert np.abs(spectrum["front"] - spectrum["back"]).mean() > 3
    assert np.abs(spectrum["front"] - spectrum["up"]).mean() > 1


@pytest.mark.parametrize("azimuth,elevation", [(0, 0), (90, 0), (-90, 0), (180, 0), (37, 20), (-140, -35)])
def test_ambisonics_intensity_points_at_the_source(azimuth, elevation):
    w, y, z, x = response(azimuth, "foa", elevation)
    vector = np.array([(w * x).sum(), (w * y).sum(), (w * z).sum()])
    found = receivers.angles(vector)
    assert abs((found[0] - azimuth + 180) % 360 - 180) < 0.1
    assert abs(found[1] - elevation) < 0.1
    np.testing.assert_allclose(np.square([x, y, z]).sum(), np.square(w).sum(), rtol=1e-6)  # SN3D, one plane wave


def test_stereo_is_the_mid_side_decoding_of_ambisonics():
    foa, stereo = response(50, "foa", 10), response(50, "stereo", 10)
    np.testing.assert_allclose(stereo, [foa[0] + foa[1], foa[0] - foa[1]], atol=1e-12)


@pytest.mark.parametrize("layout", receivers.LAYOUTS)
def test_direct_sound_falls_six_decibels_per_doubling_of_distance(layout):
    energies = [np.square(response(30, layout, distance=distance)).sum() for distance in (1.0, 2.0, 4.0)]
    np.testing.assert_allclose(
        10 * np.log10(energies), 10 * np.log10(energies[0]) - np.array([0, 6.0206, 12.0412]), atol=1e-6
    )


def test_direct_delay_is_removed_or_kept_as_asked():
    head = receivers.build("mono")
    lead = rooms.pre_delay(head, RATE)
    assert abs(arrival(response(0, "mono", distance=5.0)[0]) - lead) < 0.01
    kept = arrival(response(0, "mono", distance=5.0, keep_delay=True)[0])
    assert abs(kept - lead - 5.0 / 343 * RATE) < 0.01


AZIMUTHS = np.arange(0.0, 360, 30)


def sofa_head(path, delayed=False, swapped=False, turned=0.0, cartesian=False, wrong=False):
    """A head with 0.4 ms and 10 dB between the ears for a sound from the side."""
    sofar = pytest.importorskip("sofar")
    side = np.sin(np.radians(AZIMUTHS + turned))
    late = np.stack([20 - 0.0002 * RATE * side, 20 + 0.0002 * RATE * side], axis=1)
    gain = np.stack([1 + 0.5 * side, 1 - 0.5 * side], axis=1)
    impulse = np.zeros((12, 2, 128))
    whole = np.full((12, 2), 20) if delayed else np.rint(late).astype(int)
    np.put_along_axis(impulse, whole[..., None], gain[..., None], axis=2)
    order = [1, 0] if swapped != wrong else [0, 1]
    sofa = sofar.Sofa("SimpleFreeFieldHRIR")
    sofa.Data_IR, sofa.Data_SamplingRate = impulse[:, order], float(RATE)
    if delayed:
        sofa.Data_Delay = (late - late.min())[:, order]
    sofa.ReceiverPosition = np.array([[0, -0.09, 0], [0, 0.09, 0]] if swapped else [[0, 0.09, 0], [0, -0.09, 0]])
    if cartesian:
        sofa.SourcePosition = 1.2 * receivers.unit_vectors(AZIMUTHS, 0 * AZIMUTHS)
        sofa.SourcePosition_Type, sofa.SourcePosition_Units = "cartesian", "metre"
    else:
        sofa.SourcePosition = np.stack([AZIMUTHS, 0 * AZIMUTHS, 1.2 + 0 * AZIMUTHS], axis=1)
    sofa.ListenerView = np.array([[np.cos(np.radians(-turned)), np.sin(np.radians(-turned)), 0]])
    sofar.write_sofa(str(path), sofa)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delayed": True},
        {"swapped": True},
        {"turned": -90.0},
        {"cartesian": True},
        {"cartesian": True, "turned": 180.0, "swapped": True, "delayed": True},
    ],
    ids=str,
)
def test_a_sofa_heads_left_is_left(options, tmp_path):
    """Delays, receivers, the listener's view and both types of coordinates: a sound of the left comes 0.4 ms earlier
    and 9.5 dB louder to the left ear, whatever the file's way to say it."""
    head = receivers.build("binaural", sofa=str(sofa_head(tmp_path / "head.sofa", **options)))
    frequency = np.array([400.0])
    for azimuth, sign in ((90.0, 1), (270.0, -1), (0.0, 0)):
        direction = receivers.unit_vectors(np.array([azimuth]), np.array([0.0]))
        left, right = head.transfer(direction, frequency)[0, :, 0]
        assert -np.angle(right / left) / (2 * np.pi * 400) == pytest.approx(0.0004 * sign, abs=0.7 / RATE)
        assert 20 * np.log10(abs(left) / abs(right)) == pytest.approx(9.54 * sign, abs=0.1)


@pytest.mark.parametrize("cartesian", [False, True])
def test_a_sofa_head_with_its_left_on_the_right_is_refused(cartesian, tmp_path):
    with pytest.raises(AudioError, match="sounds of the left louder and earlier in the left ear"):
        receivers.build("binaural", sofa=str(sofa_head(tmp_path / "h.sofa", wrong=True, cartesian=cartesian)))


def test_sofa_head_takes_the_nearest_measured_direction(tmp_path):
    sofar = pytest.importorskip("sofar")
    sofa = sofar.Sofa("SimpleFreeFieldHRIR")
    rng = np.random.default_rng(0)
    impulse = np.zeros((4, 2, 64))
    impulse[:, :, 20] = rng.uniform(0.2, 1.0, (4, 2))
    impulse[1, 0], impulse[3, 1] = impulse[1, 1] * 2, impulse[3, 0] * 2  # the near ear hears more
    sofa.Data_IR, sofa.Data_SamplingRate = impulse, float(RATE)
    sofa.SourcePosition = np.array([[0, 0, 1.5], [90, 0, 1.5], [180, 0, 1.5], [270, 0, 1.5]], dtype=float)
    path = tmp_path / "head.sofa"
    sofar.write_sofa(str(path), sofa)
    head = receivers.build("binaural", sofa=str(path))
    found = rooms.impulse_response(free_field(80.0), head, RATE, 0.05)  # nearest: 90°
    low = np.abs(np.fft.rfft(found, axis=1))[:, 20]
    np.testing.assert_allclose(low, impulse[1, :, 20], rtol=1e-3)
    with pytest.raises(AudioError, match="SOFA file"):
        receivers.build("binaural", sofa=str(Path(__file__)))


# ------------------------------------------------------------------------------------------------ rooms


@pytest.mark.parametrize("banded", [False, True])
def test_images_agree_with_the_labels_and_with_image_source_theory(banded):
    config = rooms.RoomsConfig(banded=banded, positions=6, listeners=2, max_order=2)
    room = rooms.draw_room(config, "train", 3, seed=1)
    for listener in room.listeners:
        for k, images in enumerate(rooms.image_sources(room, listener, config)):
            label = (listener.azimuth[k], listener.elevation[k], listener.distance[k])
            nearest = images.vectors[np.argmin(np.linalg.norm(images.vectors, axis=1))]  # the source itself
            np.testing.assert_allclose(receivers.angles(nearest), label, atol=1e-3)
            # the floor's image: mirrored at z = 0, reflected once
            height, sine = listener.position[2], np.sin(np.radians(label[1]))
            mirror = -(height + label[2] * sine) - height
            flat = np.radians(label[0]), label[2] * np.cos(np.radians(label[1]))
            expected = np.array([np.cos(flat[0]) * flat[1], np.sin(flat[0]) * flat[1], mirror])
            nearest = np.argmin(np.linalg.norm(images.vectors - expected, axis=1))
            np.testing.assert_allclose(images.vectors[nearest], expected, atol=1e-3)
            if not banded:
                np.testing.assert_allclose(images.gains[0, nearest], np.sqrt(1 - room.absorption[0]), rtol=1e-4)


def test_response_matches_pyroomacoustics_own_for_one_microphone():
    """The energy decay of our mono response against the library's own, below the band where both filters differ."""
    pyroomacoustics = pytest.importorskip("pyroomacoustics")
    config = rooms.RoomsConfig(positions=1, listeners=1, max_order=5, tail=False, seconds=0.15, keep_delay=True)
    room = rooms.draw_room(config, "train", 0, seed=5)
    listener = room.listeners[0]
    ours = rooms.impulse_response(
        rooms.image_sources(room, listener, config)[0], receivers.build("mono"), RATE, 0.15, keep_delay=True
    )[0]
    box = pyroomacoustics.ShoeBox(
        list(room.size), fs=RATE, materials=pyroomacoustics.Material(float(room.absorption[0])), max_order=5
    )
    box.add_microphone(np.array(listener.position))
    offset = receivers.unit_vectors(listener.azimuth + listener.heading, listener.elevation)[0] * listener.distance[0]
    box.add_source(np.array(listener.position) + offset)
    box.compute_rir()
    theirs = box.rir[0][0]
    ours_band, theirs_band = (np.fft.rfft(r[: len(ours)], 8192)[100:2500] for r in (ours, theirs))
    lead = 2 * np.pi * np.arange(100, 2500) / 8192
    shifts = [np.abs(np.vdot(ours_band * np.exp(1j * lead * s), theirs_band)) for s in np.arange(-80, 80, 0.25)]
    coherence = max(shifts) / np.linalg.norm(ours_band) / np.linalg.norm(theirs_band)
    assert coherence > 0.99
    np.testing.assert_allclose(np.linalg.norm(ours_band), np.linalg.norm(theirs_band), rtol=0.03)


def test_tail_brings_the_decay_to_eyrings_reverberation_time():
    config = rooms.RoomsConfig(
        absorption=(0.25, 0.25), length=(8, 8), width=(6, 6), height=(3, 3), positions=2, listeners=1, seconds=0.8
    )
    room = rooms.draw_room(config, "train", 0, seed=0)
    listener, head = room.listeners[0], receivers.build("mono")
    images = rooms.image_sources(room, listener, config)[0]
    found = rooms.response_of(room, listener, images, 0, config, head, RATE)[0].astype(float)
    decay = 10 * np.log10(np.cumsum(np.square(found)[::-1])[::-1] / np.square(found).sum())
    at = [int(np.argmax(decay < level)) for level in (-10, -30)]
    measured = 3 * (at[1] - at[0]) / RATE
    surface = 2 * (8 * 6 + 6 * 3 + 8 * 3)
    expected = 0.161 * 144 / (-surface * np.log(0.75))
    assert 0.7 * expected < measured < 1.3 * expected


@pytest.mark.parametrize("layout", receivers.LAYOUTS)
@pytest.mark.parametrize("distance", [1.0, 8.0])
@pytest.mark.parametrize("keep_delay", [False, True])
def test_late_reverberation_is_the_statistical_field_counted_from_the_emission(layout, distance, keep_delay):
    """Within a decibel of theory from near and from far, in every layout, wherever the response begins."""
    config = rooms.RoomsConfig(seconds=0.5, keep_delay=keep_delay)
    listener = rooms.Listener((3.0, 4.0, 1.5), 0.0, np.array([20.0]), np.array([0.0]), np.array([distance]))
    room = rooms.Room("room", (12.0, 8.0, 3.0), np.array([0.35]), (listener,))
    head = receivers.build(layout)
    images = rooms.image_sources(room, listener, config)[0]
    found = rooms.response_of(room, listener, images, 0, config, head, RATE).astype(float)
    since = np.arange(found.shape[1]) / RATE - rooms.pre_delay(head, RATE) / RATE
    since += 0.0 if keep_delay else distance / receivers.SPEED_OF_SOUND
    volume, surface = 12 * 8 * 3, 2 * (12 * 8 + 12 * 3 + 8 * 3)
    decay = 0.161 * volume / (-surface * np.log(0.65))
    heard = {"binaural": 1.0, "mono": 1.0, "foa": 0.5, "stereo": 4 / 3}[layout]  # of a diffuse field, mean of channels
    field = heard * 4 * np.pi * receivers.SPEED_OF_SOUND / volume / RATE * np.exp(-13.8 * since / decay)
    arrived = since - distance / receivers.SPEED_OF_SOUND
    late = (arrived > 0.15) & (arrived < 0.3)  # before, single reflections of this flat room stand above the field
    level = 10 * np.log10(np.square(found).mean(axis=0)[late].sum() / field[late].sum())
    assert abs(level) < 1
    assert np.abs(found[:, arrived < -0.002]).max(initial=0) < 0.05 / distance  # nothing comes before the direct sound


def test_rooms_of_different_splits_are_different():
    config = rooms.RoomsConfig(positions=2)
    sizes = {rooms.draw_room(config, split, i, seed=0).size for split in sounds.SPLITS for i in range(5)}
    assert len(sizes) == 15


# ------------------------------------------------------------------------------------------------ sounds


@pytest.mark.parametrize("label", sorted(procedural.CLASSES))
def test_builtin_sounds_are_finite_loud_and_vary_with_the_seed(label):
    first, again, other = (procedural.synthesise(label, seed, 1.0, RATE) for seed in (1, 1, 2))
    assert first.shape == (RATE,) and np.isfinite(first).all()
    assert 0.01 < first.std() < 0.9
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.corrcoef(first, other)[0, 1]) < 0.95


def write_sound(path: Path, seconds: float = 1.0, seed: int = 0, padding: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    silence = np.zeros(int(padding * 8000))
    soundfile.write(
        path, np.concatenate([silence, 0.3 * rng.standard_normal(int(seconds * 8000)).clip(-3, 3), silence]), 8000
    )


def class_folder(root: Path, classes: int = 6, files: int = 12) -> Path:
    for c in range(classes):
        for k in range(files):
            write_sound(root / f"class_{c}" / f"take {k}.wav", seed=100 * c + k, padding=0.2)
    return root


def tiny(**changes: object) -> simulate.SceneConfig:
    tree = {
        "audio": {"seconds": 1.5},
        "sounds": {"recordings": 12, "classes": ["bell", "siren", "rain", "drum", "bird"], "seconds": [0.5, 1.2]},
        "rooms": {"train": 3, "validation": 1, "test": 2, "positions": 24, "seconds": 0.1, "max_order": 2},
        "events": {"seconds": [0.5, 1.0], "gap": 0.1, "overlap": 0.2},
        "questions": {"metres": [1.0, 2.5], "steps": [1, 2]},
        "subsets": {
            "sft": {"split": "train", "count": 40, "formats": {"mmau": 0.5, "dcase_aqa": 0.25, "spatialsoundqa": 0.25}},
            "test": {"split": "test", "count": 20, "formats": {"mmau": 0.5, "dcase_aqa": 0.25, "spatialsoundqa": 0.25}},
        },
        "text": {"count": 30},
        "samples_per_shard": 8,
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return recipes.build(simulate.SceneConfig, tree)


def test_the_text_corpus_may_have_a_mix_of_its_own():
    config = tiny(text={"count": 30, "formats": {"mmau": 1.0}, "choice": {"presence": 2, "side": 1}})
    assert set(config.text_questions.choice) == {"presence", "side"}
    assert set(config.questions.choice) > {"presence", "side"}
    with pytest.raises(ConfigError, match="did you mean 'presence'"):
        tiny(text={"count": 30, "choice": {"presense": 1}}).check()


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".tar", ".npy", ".jsonl") or path.name == "sizes.json"
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    simulate.prepare(tiny(), out, workers=1, quiet=True)
    return out


def samples_of(folder: Path) -> list:
    found = ShardDataset(folder)
    return [found[index] for index in range(len(found))]


def test_recordings_and_rooms_are_on_one_side_only(dataset):
    sides = {name: [item["sample"] for item in samples_of(dataset / name)] for name in ("sft", "test")}
    for key in (lambda s: set(s.meta["recordings"]), lambda s: {s.meta["room"]}):
        train, test = (set().union(*(key(sample) for sample in sides[name])) for name in ("sft", "test"))
        assert train and test and not train & test


def test_samples_hold_what_their_json_says(dataset):
    for item in samples_of(dataset / "test"):
        sample, waveform = item["sample"], item["waveforms"][0]
        assert (waveform.sample_rate, waveform.layout, waveform.num_samples) == (16_000, "binaural", 24_000)
        for event in sample.events:
            inside = waveform.samples[:, int(event.onset * RATE) : int(event.offset * RATE)]
            assert np.square(inside).mean() > 4 * np.square(waveform.samples[:, :1]).mean()


def test_silence_before_the_onset_and_sound_after_it(dataset):
    """Single events: level in the 80 ms after the onset against everything before it."""
    checked = 0
    for item in samples_of(dataset / "sft"):
        sample, samples = item["sample"], item["waveforms"][0].samples
        start = int(sample.events[0].onset * RATE)
        if start > 2000:
            checked += 1
            assert np.square(samples[:, start : start + 2400]).mean() > 3 * np.square(samples[:, : start - 200]).mean()
    assert checked >= 5


def test_bytes_do_not_depend_on_the_number_of_processes(dataset, tmp_path):
    simulate.prepare(tiny(), tmp_path / "two", workers=2, quiet=True)
    assert digest(tmp_path / "two") == digest(dataset)


def test_interrupted_run_goes_on_to_the_same_bytes(dataset, tmp_path, monkeypatch):
    out, calls, original = tmp_path / "out", [], simulate.Renderer.scenes

    def failing(self, job):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, job)

    monkeypatch.setattr(simulate.Renderer, "scenes", failing)
    with pytest.raises(KeyboardInterrupt):
        simulate.prepare(tiny(), out, workers=1, quiet=True)
    kept = sorted(path.name for path in (out / "sft").glob("*.tar"))
    assert kept and not json.loads((out / "dataset.json").read_text())["complete"]
    before = {name: (out / "sft" / name).stat().st_mtime_ns for name in kept}
    monkeypatch.setattr(simulate.Renderer, "scenes", original)
    simulate.prepare(tiny(), out, workers=1, quiet=True)
    assert digest(out) == digest(dataset)
    assert {name: (out / "sft" / name).stat().st_mtime_ns for name in kept} == before


def test_second_run_does_nothing_and_another_recipe_is_refused(dataset):
    assert not simulate.prepare(tiny(), dataset, workers=1, quiet=True).fresh
    with pytest.raises(ConfigError, match="another run: seed is 1 here and 0 there.*--overwrite"):
        simulate.prepare(tiny(seed=1), dataset, workers=1, quiet=True)


def test_overwrite_replaces_only_what_prep_made(tmp_path):
    out = tmp_path / "out"
    subsets = {"sft": {"split": "train", "count": 8}}
    simulate.prepare(dataclasses.replace(tiny(), subsets=subsets), out, workers=1, quiet=True)
    (out / "notes.txt").write_text("mine")
    changed = dataclasses.replace(tiny(seed=3), subsets=subsets)
    assert simulate.prepare(changed, out, workers=1, overwrite=True, quiet=True).fresh
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="a folder with"):
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "thesis.txt").touch()
        simulate.prepare(tiny(), foreign, workers=1, quiet=True)


def test_bank_has_the_published_layout_and_labels(dataset):
    entries = json.loads((dataset / "responses" / "train_reverberation.json").read_text())["data"]
    assert len(entries) == 3 * 2 * 24
    for entry in entries[::17]:
        found = np.load(dataset / "responses" / "binaural" / entry["fname"])
        assert found.shape == (2, 1600) and found.dtype == np.float32
        dx, dy, dz = np.subtract(
            *(np.array(entry[k].split(","), dtype=float) for k in ("source_position", "sensor_position"))
        )
        # the published label: 0 right, 90 front, 180 left, 270 behind (azimuth class of SpatialSoundQA)
        published = np.degrees(np.arctan2(-dz, dx))
        assert abs((published - 90 - entry["azimuth"] + 180) % 360 - 180) < 0.1
        assert abs(np.degrees(np.arctan2(dy, np.hypot(dx, dz))) - entry["elevation"]) < 0.1


def test_a_scene_that_would_clip_is_scaled_and_says_so(tmp_path):
    config = tiny(audio={"level_db": -3})
    library = simulate.find_sounds(config)
    groups, _ = sounds.split(library, config.split, 0)
    world = simulate.build_world(config, "train", groups["train"])
    head, made = receivers.build("binaural"), []
    near = int(np.argmin(world.distance[:24]))
    bank = tmp_path
    render.render_room(bank, world.rooms[0], config.rooms, head, RATE)
    for level in (-3.0, -30.0):
        audio = dataclasses.replace(config.audio, level_db=level)
        clip = groups["train"][0]
        made.append(render.render_scene([Placed(clip, near, 0.1, 0.5, 0.0)], world, bank, head, audio, 0))
    (loud, meta_loud), (soft, meta_soft) = made
    assert np.abs(loud.samples).max() <= 1.0 and meta_loud["clip_gain_db"] < 0
    assert "clip_gain_db" not in meta_soft and np.abs(soft.samples).max() < np.abs(loud.samples).max()


# ------------------------------------------------------------------------------------------------ folders


def test_class_folder_is_split_by_file_and_bad_files_are_listed(tmp_path):
    folder = class_folder(tmp_path / "sounds")
    (folder / "class_0" / "broken.wav").write_bytes(b"RIFFnonsense")
    write_sound(folder / "class_1" / "short.wav", seconds=0.05)
    write_sound(folder / "lonely" / "one.wav")
    config = tiny(
        sounds={"folder": str(folder), "classes": None},
        questions={"choice": {"identity": 1}, "spatialsoundqa": {"CLASSIFICATION": 1}},
    )
    out = tmp_path / "out"
    manifest = simulate.prepare(config, out, workers=1, quiet=True).manifest
    reasons = {
        line["item"]: line["reason"] for line in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    }
    assert set(reasons) == {"class_0/broken.wav", "class_1/short.wav", "class lonely"}
    assert "1 recording" in reasons["class lonely"]
    assert manifest["labels"] == [f"class {c}" for c in range(6)]


def test_audible_part_skips_padding():
    samples = np.zeros(8000, dtype=np.float32)
    samples[3200:5600] = np.random.default_rng(0).standard_normal(2400)
    start, seconds, loud = sounds.audible(samples, 8000)
    assert set(loud) == {"1"} and len(loud) == round(seconds / sounds.FRAME)
    assert abs(start - 0.4) <= 0.02 and abs(seconds - 0.3) <= 0.04
    with pytest.raises(AudioError, match="silent"):
        sounds.audible(np.zeros(8000, dtype=np.float32), 8000)


def test_an_event_starts_and_ends_where_its_recording_is_loud():
    """Two bursts of 0.2 s in two seconds: whatever is cut, onset and offset are those of a burst."""
    loud = "".join("1" if 10 <= n < 20 or 70 <= n < 80 else "0" for n in range(100))
    clip = sounds.Clip("dog", "r", "r", seconds=2.0, loud=loud)
    assert sounds.trimmed(clip, 0.0, 2.0) == pytest.approx((0.2, 1.4))
    assert sounds.trimmed(clip, 0.3, 0.5) == pytest.approx((0.3, 0.1)) and sounds.trimmed(clip, 0.5, 0.5)[1] == 0
    assert sounds.trimmed(dataclasses.replace(clip, loud=""), 0.5, 0.5) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    for _ in range(50):
        skip, seconds = cut(rng, clip, 1.0)
        first, last = round(skip / sounds.FRAME), round((skip + seconds) / sounds.FRAME) - 1
        assert loud[first] == loud[last] == "1"


def test_urbansound8k_layout_keeps_slices_of_a_recording_together(tmp_path):
    folder = tmp_path / "us8k"
    rows = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for c, name in enumerate(["siren", "drilling", "dog_bark", "car_horn"]):
        for recording in range(8):
            for part in range(2):
                file, fold = f"{1000 * c + recording}-{c}-0-{part}.wav", recording % 4 + 1
                write_sound(folder / "audio" / f"fold{fold}" / file, seed=recording)
                rows.append(f"{file},{1000 * c + recording},0,1,1,{fold},{c},{name}")
    (folder / "metadata").mkdir()
    (folder / "metadata" / "UrbanSound8K.csv").write_text("\n".join(rows))
    library = sounds.find(folder)
    assert library.dataset == "urbansound8k" and library.labels == ["car horn", "dog bark", "drilling", "siren"]
    folds = sounds.parse_folds(["train=1,2,3", "test=4"])
    groups, left_out = sounds.split(library, {"train": 0.8, "validation": 0.1, "test": 0.1}, 0, folds)
    assert not left_out and {clip.fold for clip in groups["test"]} == {"4"}
    owners = [{clip.recording for clip in clips} for clips in groups.values()]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 32


@pytest.mark.shared("data/esc10")
def test_esc_folds_are_kept(tmp_path):
    library = sounds.find(SHARED / "data" / "esc10")
    assert len(library.clips) == 320 and len(library.labels) == 10
    groups, left_out = sounds.split(
        library, {"train": 0.9, "validation": 0.1, "test": 0.2}, 0, sounds.parse_folds(["train=1,2,3", "test=4"])
    )
    assert not left_out
    assert {clip.fold for clip in groups["train"]} == {"1", "2", "3"} and len(groups["test"]) == 80
    start, seconds, *_ = sounds._scan_one(groups["test"][0].path)
    assert start >= 0 and 0.1 < seconds <= 5.0


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--sounds", "nowhere"], "no such folder"),
        (["rooms.trian=3"], "did you mean 'train'"),
        (["questions.choice={idenity: 1}"], "did you mean 'identity'"),
        (["audio.layout=quad"], "binaural, stereo, foa, mono"),
        (["subsets.x={split: train, count: 5, format: {mmau: 1}}"], "did you mean 'formats'"),
        (["subsets.x={split: dev, count: 5}"], "train, validation, test"),
        (["rooms.distance=[5, 1]"], r"lowest, highest"),
        (["sounds.classes=[bell, siern]"], "did you mean 'siren'"),
        (["sounds.classes=[bell, siren]"], "at least 4 classes"),
        (["head.sofa=missing.sofa", "audio.layout=foa"], "needs audio.layout=binaural"),
        (["--folds", "train=1", "test=2"], "no folds"),
        (["events.seconds=[1, 9]"], "at most the scene's 2.56 s"),
    ],
)
def test_mistakes_end_in_one_message(tmp_path, capsys, arguments, message):
    import re

    recipe = ROOT / "recipes" / "quickstart" / "scenes.yaml"
    code = main(["prep", str(recipe), str(tmp_path / "out"), "--quiet", "--workers", "1", *arguments])
    error = capsys.readouterr().err
    assert code == 2 and re.search(message, error) and "Traceback" not in error


def test_folder_without_sounds_and_unwritable_out(tmp_path, capsys):
    recipe = ROOT / "recipes" / "quickstart" / "scenes.yaml"
    (tmp_path / "empty").mkdir()
    assert main(["prep", str(recipe), str(tmp_path / "out"), "--sounds", str(tmp_path / "empty"), "--quiet"]) == 2
    assert "class/file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["prep", str(recipe), str(tmp_path / "file" / "out"), "--quiet"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quickstart", "standard"])
def test_shipped_recipes_are_valid(name):
    config = recipes.load(simulate.SceneConfig, ROOT / "recipes" / name / "scenes.yaml")
    config.check()
    assert set(config.parts) == {"encoder", "sft", "rl", "validation", "test"}


def test_questions_of_a_subset_in_its_own_mix_and_their_sounds_are_rendered_again(tmp_path: Path) -> None:
    """What ``prep`` writes for a test subset is a SpatialSoundQA of its own: its questions open with their sounds."""
    from eval.benchmarks import open_benchmark

    mix = {"DOA": 1, "MIXUP_DIRECTION": 1}
    subsets = {
        "train": {"split": "train", "count": 4, "formats": {"spatialsoundqa": 1}, "spatialsoundqa": mix},
        "test": {"split": "test", "count": 6, "formats": {"spatialsoundqa": 1}, "spatialsoundqa": {"DOA": 1}},
    }
    config = dataclasses.replace(tiny(text={"count": 0}), subsets=subsets)
    simulate.prepare(config, tmp_path / "out", workers=1, quiet=True)
    asked = {item["sample"].meta["question_type"] for item in samples_of(tmp_path / "out" / "train")}
    assert asked == set(mix)
    data = tmp_path / "out" / "test" / "spatialsoundqa.json"
    options = {"responses": str(tmp_path / "out" / "responses"), "sample_rate": "16000"}
    found = open_benchmark("spatial_sound_qa", data, **options)
    stored = [item["sample"] for item in samples_of(tmp_path / "out" / "test")]
    assert not found.errors and [item.gold for item in found.items] == [sample.answer for sample in stored]
    for number, sample in enumerate(stored):
        wave = found.waveform(number)
        assert wave.num_channels == 2 and wave.sample_rate == 16_000
        azimuth = sample.events[0].azimuth
        if 30 < abs(azimuth) < 150:  # the ear on its side hears it louder
            left, right = np.square(wave.samples).sum(axis=1)
            assert (left > right) == (azimuth > 0)
    with pytest.raises(ConfigError, match="did you mean 'DOA'"):
        dataclasses.replace(config, subsets={"test": subsets["test"] | {"spatialsoundqa": {"DOAA": 1}}}).check()
