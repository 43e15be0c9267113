"""Samples are chosen by tags, as plain Python would choose them; tags of other shards are refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm import config
from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, ConfigError, ShardError
from audio_llm.shards.index import ShardIndex, data_hash
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.tags import FOLDER, Tags, choose
from audio_llm.training import sft
from audio_llm.training.recipes import GRPORecipe, SFTData
from tests.conftest import make_several, make_shards
from tests.training.test_sft import losses, order, recipe_of

BANDS = ("never", "hard", "always")


def tagged(folder, rows=None):
    """`folder` with tags beside its shards: the number of each sample as its gain, its band by turns."""
    index = ShardIndex.load(folder)
    rows = rows or {key.decode(): {"gain": n, "band": BANDS[n % 3]} for n, key in enumerate(index.keys)}
    Tags(data_hash([folder]), len(index), {"tries": 4}, rows).write(folder / FOLDER)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tagged(make_shards(tmp_path_factory.mktemp("tags") / "shards"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=24, max_size=24), st.integers(-3, 3), st.booleans())
def test_conditions_choose_what_plain_python_chooses(folder, gains, limit, listed):
    index = ShardIndex.load(folder)
    keys = [key.decode() for key in index.keys]
    rows = {
        k: ({} if g is None else {"gain": g}) | {"band": BANDS[n % 3]}
        for n, (k, g) in enumerate(zip(keys, gains, strict=True))
    }
    there = folder.parent / "elsewhere"
    Tags(data_hash([folder]), len(index), {}, rows).write(there)
    where = {"tags": str(there), "gain": {"min": limit}, "band": ["hard", "always"] if listed else "hard"}
    bands = ("hard", "always") if listed else ("hard",)
    wanted = [k for k in keys if rows[k].get("gain", -9) >= limit and rows[k]["band"] in bands]
    if not wanted or not any(g is not None for g in gains):
        with pytest.raises(
            ConfigError, match=r"samples that meet it, found 0 of 24|a tag of .*, found none of that name"
        ):
            choose(index, where, folder)
    else:
        part = choose(index, where, folder)
        assert [key.decode() for key in part.keys] == wanted
        assert f"{len(wanted)} of 24 samples are chosen" in part.told()


@pytest.mark.parametrize("make", [make_shards, make_several])
def test_a_chosen_sample_is_the_sample_it_was(tmp_path, make):
    folder = tagged(make(tmp_path / "shards"))
    whole = ShardDataset(folder)
    part = ShardDataset([choose(whole.indexes[0], {"gain": {"min": 3, "max": 9}, "band": ["hard", "never"]}, folder)])
    assert [part.row(i) for i in range(len(part))] == [whole.row(whole.find(part.row(i).key)) for i in range(len(part))]
    assert len(part) == sum(3 <= n <= 9 and n % 3 < 2 for n in range(len(whole)))
    for i in range(len(part)):
        there = whole.find(part.row(i).key)
        assert part.load_sample(i) == whole.load_sample(there)
        for one, other in zip(part.load_waveforms(i), whole.load_waveforms(there), strict=True):
            assert np.array_equal(one.samples, other.samples)


def test_what_is_no_choice_is_one_sentence(folder, tmp_path):
    index = ShardIndex.load(folder)
    for where, told in (
        ({"gian": 1}, "where: gian: expected a tag of .*did you mean 'gain'"),
        ({"gain": "hard"}, "where: gain: expected numbers, as this tag has, found = hard"),
        ({"band": {"min": 1}}, "where: band: expected words, as this tag has"),
        ({"1": 2}, "where: 1: expected a tag of"),  # a key 1 of a recipe is this name
        ({"gain": {"min": 99}}, "samples that meet it, found 0 of 24"),
    ):
        with pytest.raises(ConfigError, match=told):
            choose(index, where, folder)
    for where, told in (
        ({}, "expected a condition on a tag"),
        ({"tags": "x"}, "expected a condition on a tag"),
        ({"gain": {"least": 1}}, "where of a.gain: expected a number, a word"),
        ({"gain": True}, "where of a.gain: expected a number"),
        ({"gain": []}, "where of a.gain: expected a number"),
        ({True: 2}, "where: key: expected str, found True"),
    ):
        with pytest.raises(ConfigError, match=told):
            config.build(SFTData, {"train": [{"path": "a", "where": where}]})
    with pytest.raises(ConfigError, match="weight or where beside it, found neither"):
        config.build(SFTData, {"train": [{"path": "a"}]})
    with pytest.raises(ConfigError, match="where in data.train or in data.where, found both"):
        config.build(SFTData, {"train": [{"path": "a", "where": {"gain": 1}}], "where": [None]})
    with pytest.raises(ConfigError, match="one for each of the 1 folders of data.train, found 2"):
        config.build(SFTData, {"train": ["a"], "where": [{"gain": 1}, None]})
    with pytest.raises(ShardError, match=r"tags.jsonl: expected tags of samples, found no such file\. Make them"):
        Tags.read(tmp_path)


def test_tags_of_other_shards_are_refused_by_what_is_missing(folder, tmp_path):
    others = make_shards(tmp_path / "others", seed=1)
    shutil.copytree(folder / FOLDER, others / FOLDER)
    with pytest.raises(ShardError, match=r"tags for all 24 samples, found none for 24, the first 'tiny-1-0000'"):
        choose(ShardIndex.load(others), {"gain": 1}, others)
    fewer = make_shards(tmp_path / "fewer", count=16)
    shutil.copytree(folder / FOLDER, fewer / FOLDER)
    with pytest.raises(ShardError, match="expected tags for 16 samples, found tags for 24"):
        choose(ShardIndex.load(fewer), {"gain": 1}, fewer)
    again = make_shards(tmp_path / "again", sample_rate=8000)  # the same ids
    shutil.copytree(folder / FOLDER, again / FOLDER)
    with pytest.raises(ShardError, match=f"tags of shards of the hash {data_hash([again])}, found of"):
        choose(ShardIndex.load(again), {"gain": 1}, again)
    torn = (folder / FOLDER / "tags.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tags.jsonl").write_text("".join(torn[:-1]))
    with pytest.raises(ShardError, match="found version 1 with 23 of 24 samples"):
        Tags.read(tmp_path)
    (tmp_path / "tags.jsonl").write_text("".join([*torn, torn[-1]]))
    with pytest.raises(ShardError, match="found version 1 with 25 of 24 samples, 1 of them twice"):
        Tags.read(tmp_path)
    changed = [torn[-1].replace('"gain": 23', f'"gain": {value}') for value in ("[1]", "true", "NaN")]
    for last in (torn[-1][:-9], *changed):
        (tmp_path / "tags.jsonl").write_text("".join([*torn[:-1], last]))
        with pytest.raises(ShardError, match="a line about the tags and one a sample"):
            Tags.read(tmp_path)


def test_what_other_programs_write_for_nothing_is_no_tag_and_a_misspelt_word_is_told(folder, tmp_path):
    lines = (folder / FOLDER / "tags.jsonl").read_text().replace('"gain": 5,', '"gain": null,')
    (tmp_path / "tags.jsonl").write_text(lines + "\n")
    where = {"tags": str(tmp_path), "gain": {"min": 4}, "band": ["hard", "allways"]}
    told = choose(ShardIndex.load(folder), where, folder).told()
    assert "7 of 24 samples are chosen" in told and "(none is allways), 1 have no such tag" in told


def test_inspect_shows_how_often_a_tag_has_which_value(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "tags of 24 samples (tries 4)" in shown and "band: never 8 (33%)  hard 8 (33%)  always 8 (33%)" in shown
    assert "gain: 0…2.3 3 (12%)" in shown


def test_a_run_sees_the_chosen_samples_alone_and_resumes_exactly(checkpoint, folder, tmp_path, capsys):
    data = {"train": [{"path": str(folder), "where": {"gain": {"min": 12}}}]}
    changes = {"data": data, "epochs": 2, "save_steps": 2, "batch_size": 4}
    whole = sft.run(recipe_of(tmp_path / "run", checkpoint(), folder, **changes))
    assert f"{folder}: 12 of 24 samples are chosen (gain ≥ 12)" in capsys.readouterr().out
    before, before_losses = order(tmp_path / "run"), losses(tmp_path / "run")
    assert whole["steps"] == 6 and sorted(name for _, name in before) == sorted(
        f"tiny-0-{number:04d}" for number in (*range(12, 24), *range(12, 24))
    )
    for later in sorted((tmp_path / "run").glob("checkpoint-*"))[1:]:
        (later / "complete.json").unlink(missing_ok=True)
    (tmp_path / "run" / "result.json").unlink()
    sft.run(recipe_of(tmp_path / "run", checkpoint(), folder, **changes))
    assert losses(tmp_path / "run") == before_losses and set(order(tmp_path / "run")) == set(before)
    with pytest.raises(ConfigError, match="another run: .*data.where is"):
        sft.run(recipe_of(tmp_path / "run", checkpoint(), folder, **changes | {"data": {"train": [str(folder)]}}))
    rows = [json.loads(line) for line in (folder / FOLDER / "tags.jsonl").read_text().splitlines()[1:]]
    other = tmp_path / "copy"
    shutil.copytree(folder, other)
    tagged(other, {row.pop("id"): row | {"gain": -row["gain"] + 23} for row in rows})
    shutil.copytree(other / FOLDER, folder / FOLDER, dirs_exist_ok=True)  # other tags of the same name, of as many
    try:
        with pytest.raises(AudioLLMError, match="another run: .*tags of its samples"):
            sft.run(recipe_of(tmp_path / "run", checkpoint(), folder, **changes))
    finally:
        tagged(folder)


def test_grpo_takes_them_too_and_refuses_to_part_pairs(checkpoint, folder, tmp_path):
    tree = {"output": str(tmp_path), "steps": 1, "model": {"path": str(checkpoint())}}
    tree["data"] = {"train": [{"path": str(folder), "where": {"band": "hard"}}, str(folder)]}
    recipe = config.build(GRPORecipe, tree)
    assert [len(ShardDataset([one])) for one in recipe.data.chosen()] == [8, 24]
    assert list(recipe.tags_digest()) == ["data.train (tags of its samples)"] and recipe.data.weights is None
    shutil.rmtree(folder / FOLDER)
    try:
        with pytest.raises(ShardError, match="expected tags of samples, found no such file"):
            recipe.check_paths()
    finally:
        tagged(folder)
    paired = config.build(GRPORecipe, tree | {"rewards": {"counterfactual": 1.0}})
    with pytest.raises(ConfigError, match="folders of data.train as they are, found where"):
        paired.order(ShardDataset(recipe.data.chosen()), paired.data)
