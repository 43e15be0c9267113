"""Labels, loss, decoding and scores of localisation in time, against arrays of the reference and by definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from audio_llm import audio
from audio_llm.datasets import dcase_seld, seld_tables
from audio_llm.encoders import seld_head
from audio_llm.errors import AudioLLMError, ShardError
from audio_llm.model.encoder import build_encoder
from audio_llm.shards.schema import Event
from audio_llm.tasks.seld import tracks
from audio_llm.tasks.seld.scores import Criteria, file_counts, scores_of, tune_thresholds
from eval.tasks.seld_metric import (
    Evaluation,
    jackknife,
    jackknife_interval,
    read_folder,
    recording_of,
    score_tables,
    write_submission,
)
from tests.encoders.pseld_tools import excerpt, whole


def shaped(output: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(output).unflatten(-1, (3, 3, 13))


# -------------------------------------------------------------------------------------------------- labels and loss


def test_labels_of_the_excerpt():
    np.testing.assert_array_equal(tracks.adpit_labels(excerpt()["rows"]), excerpt()["adpit"])


@pytest.mark.parametrize("number", range(6))
def test_labels_of_the_reference(number):
    rows = whole()[f"labels/{number}/rows"]
    np.testing.assert_array_equal(tracks.adpit_labels(rows), whole()[f"labels/{number}/adpit"])


@pytest.mark.parametrize("frames", ["T50", "T49"])
def test_loss_and_gradient_of_the_reference(frames):
    output = shaped(whole()[f"adpit/{frames}/output"]).requires_grad_()
    loss = tracks.adpit_loss(output, torch.from_numpy(whole()["adpit/target"]))
    loss.backward()
    assert abs(float(loss.detach()) - float(whole()[f"adpit/{frames}/loss"])) <= 3e-8
    np.testing.assert_allclose(output.grad.flatten(2).numpy(), whole()[f"adpit/{frames}/grad"], rtol=0, atol=1e-9)


def test_gradient_of_the_excerpt():
    output = shaped(excerpt()["loss/output"][None]).requires_grad_()
    tracks.adpit_loss(output, torch.from_numpy(excerpt()["loss/target"][None])).backward()
    # the excerpt's gradient is that of a mean over 6 x 50 frames, scaled to 12
    np.testing.assert_allclose(output.grad.flatten(2).numpy()[0], excerpt()["loss/grad"], rtol=1e-4, atol=1e-8)


def loss_by_definition(output: np.ndarray, target: np.ndarray) -> float:
    """All assignments tried one by one for every cell: tracks may share an event, every event must have a track."""
    frames, _, elements, classes = output.shape
    total = 0.0
    for frame, label in itertools.product(range(frames), range(classes)):
        active = [slot for slot in range(6) if target[frame, slot, 0, label] > 0]
        wanted = [target[frame, slot, 1 : 1 + elements, label] for slot in active] or [np.zeros(elements)]
        choices = [
            choice
            for choice in itertools.product(range(len(wanted)), repeat=3)
            if set(choice) == set(range(len(wanted)))
        ]
        errors = [
            np.mean([(output[frame, track, :, label] - wanted[index]) ** 2 for track, index in enumerate(choice)])
            for choice in choices
        ]
        total += min(errors)
    return total / (frames * classes)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_loss_is_the_best_assignment(seed, count):
    rng = np.random.default_rng(seed)
    rows = np.stack(
        [rng.integers(0, 3, count), rng.integers(0, 2, count), np.zeros(count), rng.integers(-90, 91, count),
         rng.integers(20, 800, count), np.zeros(count)], axis=1)  # fmt: skip
    target = tracks.adpit_labels(rows, 3, 2).astype(np.float64)
    output = rng.standard_normal((3, 3, 3, 2))
    loss = tracks.adpit_loss(torch.from_numpy(output)[None], torch.from_numpy(target)[None])
    assert float(loss) == pytest.approx(loss_by_definition(output, target), abs=1e-12)


def test_loss_refuses_more_frames_than_labels():
    with pytest.raises(ValueError, match="at most 50"):
        tracks.adpit_loss(torch.zeros(1, 51, 3, 3, 13), torch.zeros(1, 50, 6, 4, 13))


def test_distance_weight_scales_the_distance_alone():
    target = torch.from_numpy(tracks.adpit_labels(np.array([[0, 0, 0, 30, 200, 0]]), 1, 1))[None]
    output = torch.tensor([math.cos(math.pi / 6), 0.5, 1.0]).view(1, 1, 1, 3, 1).expand(1, 1, 3, 3, 1)
    assert float(tracks.adpit_loss(output, target)) == pytest.approx(1 / 3, abs=1e-6)  # one metre off, direction right
    assert float(tracks.adpit_loss(output, target, distance_weight=0.1)) == pytest.approx(0.1 / 3, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- decoding


def test_csv_of_the_excerpt():
    output = excerpt()["logits"].reshape(-1, 3, 3, 13)
    assert seld_tables.format_rows(tracks.decode(output).rows()) == str(excerpt()["csv"])


@pytest.mark.parametrize("number", range(4))
def test_csv_of_the_reference(number):
    output = whole()["decode/logits"][number].reshape(-1, 3, 3, 13)
    assert seld_tables.format_rows(tracks.decode(output).rows()) == str(whole()[f"decode/csv{number}"])


def as_output(target: np.ndarray) -> np.ndarray:
    """What a perfect network would say of labels ``(frames, 6, 5, classes)``: one event on all tracks, or each its."""
    active, values = target[:, :, :1], target[:, :, 1:4]
    one = (active * values)[:, [0, 0, 0]]
    two = (active * values)[:, [1, 2, 2]]
    three = (active * values)[:, [3, 4, 5]]
    return one + two + three


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_decoding_turns_labels_back(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for frame, label in itertools.product(range(4), range(3)):
        azimuths = rng.choice(np.arange(-90, 91, 20), size=rng.integers(0, 4), replace=False)
        rows += [(frame, label, 0, azimuth, int(rng.integers(10, 900)), 0) for azimuth in azimuths]
    table = np.array(rows, dtype=float).reshape(-1, 6)
    found = tracks.decode(as_output(tracks.adpit_labels(table, 4, 3))).rows()
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, table.tolist()))
    np.testing.assert_array_equal(seld_tables.parse_rows(seld_tables.format_rows(table)), table)


def test_thresholds_are_per_class():
    output = np.zeros((1, 3, 3, 2), dtype=np.float32)
    output[0, 0, 0] = [0.4, 0.4]
    assert tracks.decode(output, [0.3, 0.5]).label.tolist() == [0]


def test_a_model_of_the_sphere_decodes_elevation():
    output = np.zeros((1, 3, 3, 1), dtype=np.float32)
    output[0, :, :, 0] = [0.0, 0.6, 0.6]
    found = tracks.decode(output, elements=("x", "y", "z"))
    assert found.azimuth.tolist() == [90.0] and found.elevation[0] == pytest.approx(45)
    assert np.isnan(found.distance).all()


def test_events_of_consecutive_frames_are_joined():
    rows = [(f, 0, 0, 10 + f, 100, 0) for f in range(5)] + [(f, 0, 1, -80, 300, 0) for f in range(2, 4)]
    rows += [(f, 0, 0, 14, 100, 0) for f in range(7, 9)] + [(3, 1, 0, 0, 50, 0)]
    found = tracks.decode(as_output(tracks.adpit_labels(np.array(rows, dtype=float), 10, 2)))
    events = tracks.join_events(found, ["a", "b"])
    times = [(event["label"], event["onset"], event["offset"]) for event in events]
    assert times == [("a", 0.0, 0.5), ("a", 0.2, 0.4), ("b", 0.3, 0.4), ("a", 0.7, 0.9)]
    assert [event["azimuth"] for event in events] == [12.0, -80.0, 0.0, 14.0]
    assert [event["distance"] for event in events] == [1.0, 3.0, 0.5, 1.0]
    assert all(event["activity"] == pytest.approx(1, abs=1e-3) for event in events)  # labels are unit vectors


def test_rows_of_events_are_what_two_channels_tell():
    events = [
        Event("dog", 0.04, 0.31, azimuth=150.0, elevation=0.0, distance=1.234),
        Event("cat", 0.2, 0.22, azimuth=-20.0, elevation=0.0, distance=2.0),
        Event("cat", 0.0, 1.0),  # without a place: no row
    ]
    rows = tracks.event_rows(events, {"cat": 0, "dog": 1}, 10)
    assert rows.tolist() == [
        [0, 1, 0, 30, 123, 0],
        [1, 1, 0, 30, 123, 0],
        [2, 0, 1, -20, 200, 0],
        [2, 1, 0, 30, 123, 0],
    ]
    labels = tracks.event_labels(events[:1], {"dog": 0}, 3)
    np.testing.assert_allclose(labels[0, 0, :, 0], [1, math.cos(math.radians(150)), 0.5, 0], atol=1e-6)
    assert tracks.event_labels([], {"dog": 0}, 3).shape == (3, 6, 4, 1)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("frame,class,source,azimuth,distance,onscreen\n1,2,3,4,5\n", "line 2"),
        ("frame,class,source,azimuth,distance,onscreen\n1,2,0,4,5,0\n1,x,3,4,5,6\n", "line 3"),
        ("frame,class,source,azimuth,distance,onscreen\n-1,2,0,4,5,0\n", "line 2"),
        ("1,2,3,4,5,0\n", "line 1"),
        ("frame,class,source,azimuth,elevation\n1,0,0,30,10\n", "line 1: expected the header"),
        ("frame,class,source,azimuth,distance,loudness\n1,0,0,30,10,0\n", "line 1: expected the header"),
        (
            "frame,class,source,azimuth,distance,onscreen\n1.5,0,0,30,200,0\n",
            "line 2: expected a whole number as frame",
        ),
        ("frame,class,source,azimuth,distance,onscreen\n1,0.7,0,30,200,0\n", "a whole number as class"),
        ("frame,class,source,azimuth,distance,onscreen\n1,0,0,999,200,0\n", "azimuth of -360 to 360, found 999"),
        ("frame,class,source,azimuth,distance,onscreen\n1,0,0,30,-200,0\n", "distance of 0 to 100000"),
        ("frame,class,source,azimuth,distance,onscreen\n1,0,0,30,200,7\n", "onscreen of 0 to 1"),
        ("frame,class,source,azimuth,distance,onscreen\n1,0,0,30,nan,0\n", "line 2"),
    ],
)
def test_a_broken_table_names_its_line(text, line):
    with pytest.raises(ShardError, match=line):
        seld_tables.parse_rows(text, "table.csv")


@pytest.mark.parametrize(
    "text",
    [
        "frame,class,source,azimuth,elevation,distance\n1,2,3,30,-15,200\n",  # STARSS23
        "frame,azimuth,distance,class,source,onscreen\n1,30,200,2,3,0\n",
        "\ufeffFrame; Class; Source; Azimuth; Distance; Onscreen\r\n1; 2; 3; 30; 200; 0\r\n",
        ",frame,class,source,azimuth,distance,onscreen\n0,1,2,3,30,200,0\n",
    ],
)
def test_columns_are_read_by_their_names(text):
    assert seld_tables.parse_rows(text).tolist() == [[1, 2, 3, 30, 200, 0]]


def test_a_table_that_does_not_fit_its_clip(tmp_path):
    name = "fold3_room1_mix001_deg000_start0000"
    sound, table = tmp_path / "stereo_dev/dev-train-tau", tmp_path / "metadata_dev/dev-train-tau"
    for folder in (sound, table):
        folder.mkdir(parents=True)
    waveform = audio.Waveform(np.zeros((2, 24000), np.float32), 24000, "stereo")
    (sound / f"{name}.flac").write_bytes(audio.encode(waveform))
    rows = np.array([[9, 0, 0, 30, 250, 0], [9, 0, 0, 30, 250, 0]], float)
    seld_tables.write_rows(table / f"{name}.csv", rows)
    source = dcase_seld.find(tmp_path)
    assert [event.distance for event in source.load_sample(0).events] == [2.5]  # said twice, one event
    for column, value, told in ((0, 60, "frames within 1 s"), (4, 3, "looks like metres"), (1, 13, "classes 0 to 12")):
        wrong = rows[:1].copy()
        wrong[0, column] = value
        seld_tables.write_rows(table / f"{name}.csv", wrong)
        with pytest.raises(AudioLLMError, match=told):
            dcase_seld.find(tmp_path).load_sample(0)


def test_a_sound_close_by_is_no_table_in_metres(tmp_path):
    sound, table = tmp_path / "stereo_dev/dev-train-tau", tmp_path / "metadata_dev/dev-train-tau"
    for folder in (sound, table):
        folder.mkdir(parents=True)
    for number, distance in enumerate((3, 2, 150)):
        name = f"fold3_room1_mix00{number}_deg000_start0000"
        (sound / f"{name}.flac").write_bytes(
            audio.encode(audio.Waveform(np.zeros((2, 24000), np.float32), 24000, "stereo"))
        )
        seld_tables.write_rows(table / f"{name}.csv", np.array([[9, 0, 0, 30, distance, 0]], float))
    source = dcase_seld.find(tmp_path)
    assert [source.rows(number)[0, 4] for number in range(3)] == [3, 2, 150]
    (table / f"{name}.csv").write_text("frame,class,source,azimuth,distance,onscreen\n9,0,0,30,nowhere,0\n")
    with pytest.raises(AudioLLMError, match="mix000.*looks like metres"):
        dcase_seld.find(tmp_path).rows(0)


# -------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("name", ["cnn14", "htsat"])
def test_head_gives_a_frame_for_every_100_ms(name):
    encoder = build_encoder({"name": name, "preset": "tiny"}).eval()
    network = seld_head.SELDNetwork(encoder, seld_head.SELDHead(encoder, 4)).eval()
    with torch.inference_mode():
        output = network(torch.randn(2, 2, 40000), torch.tensor([40000, 32000]))
    assert output.shape == (2, 25, 3, 3, 4)
    assert output[:, :, :, :2].abs().max() <= 1 and output[:, :, :, 2].min() >= 0


def test_columns_are_resampled_as_published():
    """Repeating 31 steps 8 times, and taking means of 5; interpolating 32 steps to 1024 frames, and taking means."""
    columns = torch.randn(1, 4, 31)
    repeated = columns.repeat_interleave(8, dim=2)[..., :245].unflatten(2, (49, 5)).mean(dim=3)
    weights = seld_head.column_weights(31, 0.16, 50, "repeat")
    torch.testing.assert_close((columns @ weights.T)[..., :49], repeated)
    torch.testing.assert_close((columns @ weights.T)[..., 49], columns[..., 30])
    columns = torch.randn(1, 4, 32)
    stretched = torch.nn.functional.interpolate(columns, 1024, mode="linear")[..., :250].unflatten(2, (50, 5)).mean(3)
    torch.testing.assert_close(columns @ seld_head.column_weights(32, 0.64, 50, "linear").T, stretched)


def test_a_recording_of_any_length_is_covered_without_seams():
    torch.manual_seed(0)
    encoder = build_encoder({"name": "cnn14", "preset": "tiny", "peak_normalize": False})
    network = seld_head.SELDNetwork(encoder, seld_head.SELDHead(encoder, 2)).eval()
    noise = np.random.default_rng(0).standard_normal((2, 16000 * 9)).astype(np.float32)
    assert [tracks.locate(network, noise[:, :n]).shape[0] for n in (1, 1600, 40000, 40001, 144000)] == [
        1,
        1,
        25,
        26,
        90,
    ]
    whole_run = tracks.locate(network, noise)
    alone = network(torch.from_numpy(noise[:, 19200 : 19200 + 40000])[None], torch.tensor([40000]))[0].detach().numpy()
    np.testing.assert_allclose(whole_run[20:24], alone[8:12], atol=1e-5)  # the second window, around its middle
    np.testing.assert_allclose(tracks.locate(network, noise, batch_size=1), whole_run, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.integers(2, 60))
def test_windows_cover_every_frame_and_lie_inside(frames, window):
    starts = tracks.window_starts(frames, window)
    covered = {start + offset for start in starts for offset in range(window)}
    assert set(range(frames)) <= covered
    assert starts == [0] or max(starts) + window == frames


# ------------------------------------------------------------------------------------------------------------ metric

SETTINGS = {
    "macro": (Criteria(), "macro"),
    "micro": (Criteria(), "micro"),
    "macro_inf": (Criteria(relative_distance=math.inf), "macro"),
    "macro_dist": (Criteria(centimetres=0.5), "macro"),
    "macro_on": (Criteria(onscreen=True), "macro"),
}


def tables(kind: str) -> dict[str, np.ndarray]:
    return {key.split("/")[-1]: value for key, value in excerpt().items() if key.startswith(f"metrics/{kind}/")}


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_of_the_reference(name):
    criteria, average = SETTINGS[name]
    scores = score_tables(tables("gt"), tables("pred"), criteria).scores(average)
    np.testing.assert_allclose(scores.values, excerpt()[f"metrics/pseld/{name}/scores"], rtol=0, atol=1e-12)
    classwise = excerpt()[f"metrics/pseld/{name}/classwise"]
    if classwise.size:
        np.testing.assert_allclose(scores.classwise, classwise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_of_the_official_baseline(name):
    """Its own arrays, beside those of the first reference."""
    criteria, average = SETTINGS[name]
    scores = score_tables(tables("gt"), tables("pred"), criteria).scores(average)
    np.testing.assert_allclose(scores.values, whole()[f"metrics/baseline/{name}/scores"], rtol=0, atol=1e-12)


def test_jackknife_of_the_reference():
    for system in ("pseld", "baseline"):
        left_out, expected = whole()[f"metrics/{system}/jk_in"], whole()[f"metrics/{system}/jk_out"]
        whole_value = expected[0] + expected[1]  # estimate and bias
        np.testing.assert_allclose(jackknife_interval(np.array(whole_value), left_out), expected, rtol=0, atol=1e-12)


def test_strict_mode_scores_what_the_official_one_skips():
    right, wrong = [49, 0, 0, 10, 100, 0], [49, 0, 0, 80, 100, 0]
    reference = {"a": np.array([right]), "b": np.zeros((0, 6)), "c": np.array([[0, 0, 0, 0, 100, 0], right])}
    predicted = {"a": np.array([wrong]), "b": np.array([right])}
    official, strict = score_tables(reference, predicted), score_tables(reference, predicted, strict=True)
    assert official.sums.sum() == 0 and official.missing == ["c"]
    counts = dict(zip(("right", "extra", "missed", "misplaced"), strict.sums.sum(axis=0)[:4, 0], strict=True))
    assert counts == {"right": 0, "extra": 1, "missed": 2, "misplaced": 1}


def test_perfect_predictions_score_one_and_mirrored_ones_their_angle():
    rows = np.array([[frame, label, 0, 20, 150, 1] for frame in range(10) for label in range(13)], dtype=float)
    mirrored = rows.copy()
    mirrored[:, 3] *= -1
    perfect = scores_of(file_counts(rows, rows, strict=True)).values
    np.testing.assert_allclose(perfect, [1, 0, 0, 0, 1], atol=1e-12)
    swapped = scores_of(file_counts(rows, mirrored, strict=True)).values
    np.testing.assert_allclose(swapped, [0, 40, 0, 0, 1], atol=1e-12)


def random_sums(seed: int, files: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sums = rng.integers(0, 9, (files, 9, 13)).astype(float)
    sums[:, 4:] *= rng.random((files, 5, 13))
    return sums


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_jackknife_is_leaving_out_each_file(average):
    sums, count = random_sums(1), 7
    whole_values = scores_of(sums.sum(axis=0), average).values
    left = np.stack([scores_of(np.delete(sums, index, 0).sum(axis=0), average).values for index in range(count)])
    bias = (count - 1) * (left.mean(axis=0) - whole_values)
    error = np.sqrt((count - 1) / count * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
    interval, classwise = jackknife(sums, average=average)
    np.testing.assert_allclose(interval.estimate, whole_values - bias, atol=1e-9)
    np.testing.assert_allclose(interval.standard_error, error, atol=1e-9)
    np.testing.assert_allclose(interval.high, whole_values - bias + student.ppf(0.975, count - 1) * error, atol=1e-9)
    assert classwise.low.shape == (5, 13)


def test_windows_of_one_recording_are_left_out_together():
    sums = random_sums(2, 4)
    doubled = np.concatenate((sums, sums))  # every recording cut into two equal windows
    names = [f"fold4_room1_mix00{n}_deg0{side}_start0001.wav" for side in range(2) for n in range(4)]
    grouped, _ = jackknife(doubled, [recording_of(name) for name in names])
    alone, _ = jackknife(sums)
    np.testing.assert_allclose(grouped.standard_error, alone.standard_error, rtol=1e-9)
    assert jackknife(doubled)[0].standard_error[0] < grouped.standard_error[0]


def test_scenes_made_one_by_one_are_left_out_by_room():
    """Every simulated clip has a number of its own; what its score is not independent of is its room."""
    made = [f"fold4_room{1 + n % 3}_mix{n:05d}_deg000_start0000.csv" for n in range(12)]
    cut = [f"fold4_room1_mix00{n // 2}_deg{n}_start0001.csv" for n in range(12)]
    for names, over, count in (
        (made, "rooms", 3),
        (cut, "recordings", 6),
        ([f"sample{n}.csv" for n in range(12)], "clips", 12),
    ):
        result = Evaluation(names, random_sums(5, 12), [])
        assert result.independent == over and len(set(result.groups(over))) == count
        pooled, _ = jackknife(result.sums, result.groups(over))
        np.testing.assert_array_equal(result.intervals()[0].low, pooled.low)
    by_room, by_clip = (Evaluation(made, random_sums(5, 12), []).intervals(over=over)[0] for over in ("rooms", "clips"))
    assert not np.array_equal(by_room.low, by_clip.low)


def test_thresholds_are_tuned_class_by_class():
    rng = np.random.default_rng(0)
    outputs, reference = {}, {}
    for name in "ab":
        rows = np.array([[f, c, 0, int(rng.integers(-80, 80)), 100, 0] for f in range(20) for c in (0, 1)], dtype=float)
        output = as_output(tracks.adpit_labels(rows, 20, 3))
        output[:, :, :2, 1] *= 0.3  # a timid class
        output[:, :, :2, 0] += 0.25 * (np.abs(output[:, :, :2, 0]).sum(axis=2, keepdims=True) == 0)
        outputs[name], reference[name] = output, rows
    thresholds, f_scores = tune_thresholds(outputs, reference, strict=True)
    assert thresholds[1] <= 0.3 and thresholds[2] == 0.5 and f_scores[1] == pytest.approx(1)
    default = {name: tracks.decode(output).rows() for name, output in outputs.items()}
    assert score_tables(reference, default, num_classes=3).scores().classwise[0, 1] == 0


def random_case(seed: int, elements: int, number: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """An output with ties, and events of which up to four of a class stand in one frame, some behind its end."""
    rng = np.random.default_rng(seed)
    frames, events = int(rng.integers(1, 12)), int(rng.integers(0, 25))
    output = rng.normal(0, 0.5, (frames, number, elements, classes)).round(1).astype(np.float32)
    place = [np.sort(rng.integers(0, frames + 2, events)), rng.integers(0, classes, events), np.zeros(events)]
    rows = [*place, rng.integers(-180, 181, events), rng.integers(1, 400, events), rng.integers(0, 2, events)]
    return output, np.stack(rows, axis=1).astype(float)


def decode_by_definition(output: np.ndarray, threshold: float) -> list[tuple[int, int, float, float, float]]:
    """(frame, class, x, y, metres) of three tracks, frame by frame and pair by pair."""
    found = []
    for frame, label in itertools.product(range(output.shape[0]), range(output.shape[3])):
        vectors, metres = output[frame, :, :2, label], np.maximum(output[frame, :, 2, label], 0)
        active = [track for track in range(3) if np.hypot(*vectors[track]) > threshold]
        unit = [vector / max(float(np.hypot(*vector)), 1e-9) for vector in vectors]
        pairs = [
            (a, b)
            for a, b in ((0, 1), (1, 2), (2, 0))
            if a in active and b in active and math.degrees(math.acos(np.clip(unit[a] @ unit[b], -1, 1))) < 15
        ]
        alone = [[track] for track in active if not any(track in pair for pair in pairs)]
        groups = [*alone, *([sorted(set(itertools.chain(*pairs)))] if pairs else [])]
        found += [(frame, label, *vectors[group].mean(axis=0), metres[group].mean()) for group in groups]
    return found


@given(st.integers(0, 2**32), st.floats(0.15, 0.95))
@settings(max_examples=40, deadline=None)
def test_decoding_is_its_definition(seed, threshold):
    output, _ = random_case(seed, 3, 3)
    output[:, 1, :2] = np.where(seed % 2, output[:, 0, :2] * 1.05, output[:, 1, :2])  # tracks that agree
    wanted, found = decode_by_definition(output, threshold), tracks.decode(output, threshold)
    assert [(a, b) for a, b, *_ in wanted] == list(zip(found.frame.tolist(), found.label.tolist(), strict=True))
    values = np.array([rest for _, _, *rest in wanted]).reshape(-1, 3)
    np.testing.assert_allclose(np.column_stack((found.vector, found.distance)), values, atol=1e-5)


def counts_by_definition(reference: np.ndarray, predicted: np.ndarray, strict: bool, classes: int) -> np.ndarray:
    """Right, extra, missed, misplaced and degrees per class; all matchings of a cell are tried."""
    sums = np.zeros((5, classes))
    end = math.inf if strict else max(reference[:, 0], default=0)
    for frame, label in {(row[0], int(row[1])) for row in (*reference, *predicted) if row[0] < end}:
        truth, guess = (rows[(rows[:, 0] == frame) & (rows[:, 1] == label)] for rows in (reference, predicted))
        few, many = sorted((truth, guess), key=len)
        fold = seld_tables.fold_azimuth
        cost = np.abs(fold(few[:, None, 3]) - fold(many[None, :, 3])).reshape(len(few), len(many))
        best = min(cost[range(len(few)), chosen].sum() for chosen in itertools.permutations(range(len(many)), len(few)))
        sums[1:3, label] += max(0, len(guess) - len(truth)), max(0, len(truth) - len(guess))
        sums[4, label] += best
        sums[3, label] += len(few)  # right and misplaced together: equal totals may differ in which are right
    return sums


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=40, deadline=None)
def test_counts_are_their_definition(seed, strict):
    output, reference = random_case(seed, 3, 3)
    predicted = tracks.decode(output, 0.3).rows()
    sums = file_counts(reference, predicted, strict=strict, num_classes=3)
    wanted = counts_by_definition(reference, predicted, strict, 3)
    np.testing.assert_array_equal(sums[[1, 2, 4]], wanted[[1, 2, 4]])
    np.testing.assert_array_equal(sums[0] + sums[3], wanted[3])
    np.testing.assert_array_equal(sums[8], wanted[3])


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([("x", "y", "distance"), ("x", "y"), ("x", "y", "z")]))
@settings(max_examples=15, deadline=None)
def test_all_thresholds_at_once_are_one_after_the_other(seed, strict, elements):
    count = 1 if seed % 5 == 0 else 3
    cases = [random_case(seed + number, len(elements), count) for number in range(4)]
    outputs, reference = ({str(n): case[part] for n, case in enumerate(cases)} for part in (0, 1))
    grid = (0.5, 0.3, 0.9, 0.1)
    found, f_scores = tune_thresholds(outputs, reference, grid, strict=strict, elements=elements)
    table = []
    for threshold in grid:
        rows = {name: tracks.decode(output, threshold, elements=elements).rows() for name, output in outputs.items()}
        table.append(score_tables(reference, rows, strict=strict, num_classes=3).scores().classwise[0])
    best = np.max(table, axis=0)
    np.testing.assert_array_equal(f_scores, best)
    np.testing.assert_array_equal(found, np.where(best > 0, np.array(grid)[np.argmax(table, axis=0)], 0.5))


def test_submission_has_a_file_for_every_clip(tmp_path):
    found = tracks.decode(as_output(tracks.adpit_labels(np.array([[3, 2, 0, 40, 210, 0]], dtype=float))))
    nothing = tracks.decode(np.zeros((50, 3, 3, 13), dtype=np.float32))
    tables = {"sample1.wav": found.rows(), "sample2.wav": nothing.rows()}
    count = write_submission(tmp_path, tables, ["sample1.wav", "sample2.wav"])
    written = read_folder(tmp_path)
    assert count == 1 and list(written) == ["sample1.csv", "sample2.csv"]
    assert written["sample1.csv"].tolist() == [[3, 2, 0, 40, 210, 0]] and not len(written["sample2.csv"])
    with pytest.raises(AudioLLMError, match=r"sample3\.wav"):
        write_submission(tmp_path, {}, ["sample3.wav"])


def test_unknown_predictions_and_classes_are_named():
    rows = np.array([[0, 13, 0, 0, 100, 0]], dtype=float)
    with pytest.raises(ShardError, match="fold4_b"):
        score_tables({"fold4_a.csv": rows}, {"fold4_b.csv": rows})
    with pytest.raises(ShardError, match="class 13"):
        score_tables({"a": rows}, {"a": rows})
