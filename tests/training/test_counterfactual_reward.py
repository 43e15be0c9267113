"""The reward of pairs, by replies of which it is known what they are worth; and the order that keeps pairs together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from audio_llm.audio import Waveform
from audio_llm.errors import ConfigError, ShardError
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample
from audio_llm.shards.writer import ShardWriter, pack
from audio_llm.training.counterfactual import counterfactual
from audio_llm.training.pairs import PairedOrder
from audio_llm.training.rewards import build_rewards
from eval.benchmarks.scenes import item_of

SIDE = {"clause": "side", "labels": ["dog", "dog"], "was": 90.0, "is": -90.0}
TOLD = {
    "of": "a",
    "kind": "azimuth",
    "changes": [SIDE],
    "keeps": [{"clause": "label", "labels": ["dog", "dog"], "was": "dog", "is": "dog"}],
}
SAY = "<think>the dog on the {}, 1 m.</think><answer>{}</answer>"


def rewards(before: list[str], after: list[str], **options) -> list[float | None]:
    """Of replies to the scene `a` and to the same one with the dog on the other side."""
    count, other = len(before), len(after)
    columns = {
        "sample_id": ["a"] * count + ["b"] * other,
        "answer": ["left"] * count + ["right"] * other,
        "choices": [["left", "right"]] * (count + other),
        "counterfactual": [None] * count + [TOLD] * other,
    }
    return counterfactual([""] * (count + other), [*before, *after], **columns, **options)


def test_the_truth_about_both_is_worth_all_and_one_reply_for_both_little():
    left, right = SAY.format("left", "left"), SAY.format("right", "right")
    assert rewards([left], [right]) == [1.0, 1.0]
    assert rewards([left], [left]) == [pytest.approx(1 / 3)] * 2  # the label stays, that is all
    assert rewards([right], [right]) == [pytest.approx(1 / 3)] * 2  # it says what is true after, and always did
    assert rewards([right], [left]) == [pytest.approx(1 / 3)] * 2  # differs, but not to the truth


def test_a_reply_earns_the_mean_over_the_replies_to_the_other_scene():
    left, right = SAY.format("left", "left"), SAY.format("right", "right")
    found = rewards([left, right], [right, left])
    assert found == [pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert rewards([left, left], [right]) == [1.0, 1.0, 1.0]


def test_answer_and_reasoning_are_paid_apart():
    left, right = SAY.format("left", "left"), SAY.format("right", "right")
    decorated = SAY.format("left", "right")  # the answer follows, the reasoning does not
    assert rewards([left], [decorated]) == [pytest.approx(2 / 3)] * 2
    assert rewards([left], [SAY.format("right", "left")]) == [pytest.approx(2 / 3)] * 2
    assert rewards([left], ["<answer>right</answer>"]) == [pytest.approx(1 / 3)] * 2  # no reasoning pays nothing
    assert rewards([left], ["hm"]) == [0.0, 0.0]
    assert rewards([left], [right], clauses=["distance"]) == [1.0, 1.0]  # the answer alone is left to count


def test_without_the_other_scene_there_is_no_reward():
    assert rewards([], [SAY.format("right", "right")]) == [None]
    assert rewards([SAY.format("left", "left")], []) == [None]
    assert counterfactual([""], ["x"], answer=["left"]) == [None]


def test_samples_of_one_id_in_two_folders_are_two():
    """Recipes of two seeds give the same ids: a reply is paid beside those to its own scene alone."""
    left, right = SAY.format("left", "left"), SAY.format("right", "right")
    found = counterfactual(
        [""] * 4,
        [left, right, right, left],
        folder=["one", "one", "two", "two"],
        sample_id=["a", "b", "a", "b"],
        answer=["left", "right", "right", "left"],
        choices=[["left", "right"]] * 4,
        counterfactual=[None, TOLD, None, TOLD | {"changes": [SIDE | {"was": -90.0, "is": 90.0}]}],
    )
    assert found == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "about",
    [
        *("a", 7, [], {}, {"of": 1}),
        *({**TOLD, "of": "s002-0"}, {**TOLD, "kind": None}, {**TOLD, "changes": None}, {**TOLD, "keeps": [7]}),
        *({**TOLD, "changes": [SIDE | change]} for change in ({"clause": "smell"}, {"was": "x"}, {"is": float("nan")})),
        *({**TOLD, "changes": [SIDE | change]} for change in ({"labels": ["dog"]}, {"clause": "order"})),
        {**TOLD, "changes": [SIDE | {"clause": "distance", "was": 0.0}]},
    ],
    ids=repr,
)
def test_what_says_nothing_of_a_change_is_named_before_anything_is_asked(tmp_path, about):
    """In training when its order is made, in evaluation as that question's defect."""
    data = shards(tmp_path / "data", alone=1, pairs=2)
    read = ShardDataset.load_sample

    class Damaged(ShardDataset):
        def load_sample(self, i: int) -> Sample:
            sample = read(self, i)
            return sample if sample.id != "s002-0" else dataclasses.replace(sample, meta={"counterfactual": about})

    message = r"meta\.counterfactual of sample 's002-0': expected another sample under `of`"
    with pytest.raises(ShardError, match=message):
        PairedOrder(Damaged([tmp_path / "data"]), seed=0, samples=4)
    samples = [data.load_sample(place) for place in range(len(data))]
    broken = dataclasses.replace(samples[-1], id="s002-0", meta={"counterfactual": about})
    with pytest.raises(ShardError, match=message):
        item_of(broken)
    assert [item_of(sample).id for sample in samples] == [sample.id for sample in samples]


def test_pairs_that_lost_a_scene_are_told_of(tmp_path):
    wave = Waveform(np.full((2, 400), 0.1, np.float32), 16_000, "binaural")
    with ShardWriter(tmp_path / "data") as writer:
        for name, of in (("a", None), ("a-1", "a"), ("b-1", "b"), ("b-2", "b")):
            meta = {"counterfactual": TOLD | {"of": of}} if of else {}
            writer.add(pack(Sample(name, "choice", "where?", ["left", "right"], "left", meta=meta), wave))
    data = ShardDataset([tmp_path / "data"])
    with pytest.warns(UserWarning, match="2 counterfactuals lack the scene that they were made of .* 'b-1' of 'b' in"):
        order = PairedOrder(data, seed=0, samples=4)
    assert sorted(data.load_sample(place).id for place in order) == ["a", "a-1", "b-1", "b-2"]


def test_a_recipe_names_it():
    functions, weights = build_rewards({"counterfactual": {"weight": 0.5, "clauses": ["side"]}})
    assert [function.__name__ for function in functions] == ["counterfactual"] and weights == [0.5]
    with pytest.raises(ConfigError, match="clause"):
        build_rewards({"counterfactual": {"clause": ["side"]}})


def shards(folder, alone: int, pairs: int, twins: int = 2) -> ShardDataset:
    wave = Waveform(np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32) / 20, 16_000, "binaural")
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for number in range(alone + pairs):
            names = [f"s{number:03d}"] + [f"s{number:03d}-{k}" for k in range(twins if number >= alone else 0)]
            for name in names:
                meta = {"counterfactual": TOLD | {"of": names[0]}} if name != names[0] else {}
                sample = Sample(name, "choice", "where?", ["left", "right"], "left", meta=meta)
                writer.add(pack(sample, wave))
    return ShardDataset([folder])


def test_pairs_stand_side_by_side_in_every_step_of_even_size(tmp_path):
    data = shards(tmp_path / "data", alone=7, pairs=9)
    order = PairedOrder(data, seed=3, samples=200)
    ids = [data.load_sample(place).id for place in order]
    assert len(ids) == 200 == len(order)
    for start in range(0, 200, 4):
        step = ids[start : start + 4]
        for name in step:
            if int(name[1:4]) >= 7:  # its partner is in the same step
                assert sum(other[:4] == name[:4] for other in step) == 2
    epoch = int(order.epoch_size)
    assert epoch == 2 * 9 + 6
    first, second = ids[:epoch], ids[epoch : 2 * epoch]
    assert {name[:4] for name in first if "-" in name} == {f"s{number:03d}" for number in range(7, 16)}
    assert {name for name in first if "-" in name}.isdisjoint(name for name in second if "-" in name)  # in turn


def test_a_place_in_the_run_is_where_the_order_comes_to_it(tmp_path):
    data = shards(tmp_path / "data", alone=5, pairs=4)
    order = PairedOrder(data, seed=1, samples=60)
    run = list(order)
    for position in range(60):
        epoch, place = order.place(position)
        assert order.epoch(epoch)[place] == run[position]
    assert run[:20] == list(PairedOrder(data, seed=1, samples=20))
    assert run != list(PairedOrder(data, seed=2, samples=60))


def test_data_without_pairs_and_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="counterfactuals of a subset"):
        PairedOrder(shards(tmp_path / "alone", alone=4, pairs=0), 0, 8)
    with pytest.raises(ConfigError, match="without weights"):
        PairedOrder(shards(tmp_path / "pairs", alone=0, pairs=2), 0, 8, [0.5])
