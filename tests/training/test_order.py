"""Which samples a run draws from folders of stated weights, and how those of a step are dealt out to its passes."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm import config
from audio_llm.errors import ConfigError
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import sft
from audio_llm.training.examples import Example
from audio_llm.training.order import RunSampler
from audio_llm.training.passes import dealt_by_length
from audio_llm.training.recipes import SFTData
from audio_llm.training.resampling import Reserve
from tests.conftest import make_shards
from tests.training.test_sft import losses, order, recipe_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    return [make_shards(root / name, seed=seed) for seed, name in enumerate(("one", "two"))]


def test_a_weight_is_passes_over_a_folder(folders):
    data = ShardDataset(folders)
    sizes = [len(index) for index in data.indexes]
    sampler = RunSampler(data, 3, 10**6, weights=[0.5, 2])
    assert sampler.epoch_size == 0.5 * sizes[0] + 2 * sizes[1]
    both = np.concatenate([sampler.epoch(0), sampler.epoch(1)])
    drawn = Counter(both.tolist())
    # two epochs are one pass over the first folder and four over the second, none of whose samples is left out
    assert {drawn[i] for i in range(sizes[0])} == {1} and {drawn[i] for i in range(sizes[0], sum(sizes))} == {4}
    assert not np.array_equal(both, np.concatenate([sampler.epoch(2), sampler.epoch(3)]))
    assert list(RunSampler(data, 3, 200, weights=[1, 1])) != list(RunSampler(data, 4, 200, weights=[1, 1]))


@pytest.mark.parametrize("weights", [None, [0.3, 1.7], [0.01, 0.01]])
def test_what_stands_by_goes_on_where_a_weighted_run_ends(folders, weights):
    data = ShardDataset(folders)
    order = list(RunSampler(data, 3, 200, weights))
    assert len(order) == 200
    reserve = Reserve(RunSampler(data, 3, 30, weights))
    assert [reserve[position] for position in range(170)] == order[30:]


def test_weights_are_read_from_the_folders_or_beside_them(tmp_path):
    def data(**keys):
        return config.build(SFTData, keys)

    stated = data(train=["a", {"path": "b", "weight": 0.25}])
    assert stated == data(train=["a", "b"], weights=[1, 0.25]) and [str(path) for path in stated.folders] == ["a", "b"]
    assert data(train=["a", {"path": "b", "weight": 1}]) == data(train=["a", "b"])  # the same run
    for keys, told in (
        ({"train": ["a"], "weights": [1, 2]}, "one for each of the 1 folders of data.train, found 2"),
        ({"train": [{"path": "a", "weight": 0}]}, "passes in an epoch, above 0"),
        ({"train": [{"path": "a", "weight": 2}], "weights": [2]}, "found both"),
        ({"train": [{"path": "a"}]}, "weight or where beside it, found neither"),
    ):
        with pytest.raises(ConfigError, match=told):
            data(**keys)


def test_a_weighted_run_resumes_exactly_and_is_another_run(checkpoint, folders, tmp_path):
    data = {"train": [str(folders[0]), {"path": str(folders[1]), "weight": 0.25}]}
    changes = {"data": data, "epochs": 1, "save_steps": 2, "batch_size": 4}
    whole = sft.run(recipe_of(tmp_path / "whole", checkpoint(), folders[0], **changes))
    sizes = [len(index) for index in ShardDataset(folders).indexes]
    assert whole["steps"] == -(-(sizes[0] + sizes[1] // 4) // 4) and whole["epochs"] == pytest.approx(1, abs=0.2)
    result = tmp_path / "whole" / "result.json"
    for later in sorted((tmp_path / "whole").glob("checkpoint-*"))[1:]:
        (later / "complete.json").unlink(missing_ok=True)
    before, before_losses = order(tmp_path / "whole"), losses(tmp_path / "whole")
    assert len(before) == 4 * whole["steps"]
    result.unlink()
    again = sft.run(recipe_of(tmp_path / "whole", checkpoint(), folders[0], **changes))
    assert again["steps"] == whole["steps"] and losses(tmp_path / "whole") == before_losses
    assert set(order(tmp_path / "whole")) == set(before)  # the steps that were made again saw the same samples
    changes["data"] = {"train": [str(folders[0]), {"path": str(folders[1]), "weight": 0.5}]}
    with pytest.raises(ConfigError, match=r"another run: .*data.weights is \[1.0, 0.5\] here and \[1.0, 0.25\] there"):
        sft.run(recipe_of(tmp_path / "whole", checkpoint(), folders[0], **changes))


def example(length: int) -> Example:
    ids = torch.arange(length)
    return Example(ids=ids, labels=ids.clone(), row={"sample_id": str(length)})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=24), st.integers(1, 6))
def test_dealing_keeps_the_samples_and_never_adds_padding(lengths, size):
    batches = [[example(n) for n in lengths[i : i + size]] for i in range(0, len(lengths), size)]
    dealt = dealt_by_length(batches)
    assert [len(batch) for batch in dealt] == [len(batch) for batch in batches]
    assert sorted(len(one.ids) for batch in dealt for one in batch) == sorted(lengths)
    if len({len(batch) for batch in batches}) == 1:
        assert cost(dealt) <= cost(batches)


def cost(batches: list[list[Example]]) -> int:
    """Tokens that passes compute."""
    return sum(len(batch) * max(len(one.ids) for one in batch) for batch in batches)


def test_little_of_a_mixed_step_is_padding():
    """Short questions and long reasoning in one step of eight passes: what is computed for nothing falls by
    three quarters."""
    lengths = np.random.default_rng(0).lognormal(4.6, 0.7, (20, 64)).astype(int) + 20
    padding = {"as drawn": 0, "dealt": 0}
    for step in lengths:
        batches = [[example(n) for n in step[i : i + 8]] for i in range(0, 64, 8)]
        padding["as drawn"] += cost(batches) - int(step.sum())
        padding["dealt"] += cost(dealt_by_length(batches)) - int(step.sum())
    assert padding["dealt"] < 0.25 * padding["as drawn"]
