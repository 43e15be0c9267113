"""What is listed twice: samples that would count twice, and a validation on what is learnt from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from audio_llm.errors import ShardError
from audio_llm.shards.index import ShardIndex
from audio_llm.shards.reader import ShardDataset
from audio_llm.tasks.base import check_paths
from audio_llm.tasks.spatial import SpatialRecipe


def test_samples_are_not_counted_twice(shards, tmp_path):
    """A folder that is listed twice, under whatever name, or one that shares a shard with another."""
    one, other = shards(8), shards(8, seed=1)
    link = tmp_path / "link"
    link.symlink_to(one)
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    part = tmp_path / "part"
    part.mkdir()
    (part / "other-name.tar").symlink_to(sorted(one.glob("*.tar"))[0])
    assert len(ShardDataset([one, other])) == 16
    for twin, found in ((one, "it a second time"), (link, "which"), (copy, "which"), (part, "other-name.tar, which")):
        with pytest.raises(
            ShardError, match=f"{twin}: expected samples of no other folder in the list, found.*{found}"
        ):
            ShardDataset([one, other, twin])


def test_parts_by_tags_may_overlap(shards):
    """Hard samples may be learnt more often than the rest of their folder, not twice by the same condition."""
    index = ShardIndex.load(shards(8))
    hard = index.part(np.arange(len(index)) < 3, "the hard ones")
    assert len(ShardDataset([index, hard])) == 11
    with pytest.raises(ShardError, match="it a second time.*weight"):
        ShardDataset([index, hard, hard])


def test_an_encoder_validated_on_what_it_learns_from_is_told(shards, tmp_path):
    one, other = shards(8), shards(8, seed=1)
    link = tmp_path / "link"
    link.symlink_to(one)
    recipe = SpatialRecipe(train=[other, one], output=tmp_path / "run", validation=link, steps=1)
    with pytest.warns(
        UserWarning, match="validation: expected a folder that nothing is learnt from, found .*link, which"
    ):
        check_paths(recipe)
