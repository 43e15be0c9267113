"""``audio-llm filter``: k of K with the sound and in silence as a stranger's endpoint answered, copies, going on."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from audio_llm.audio import Waveform, sha256
from audio_llm.cli import main
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import AudioInfo, Sample
from audio_llm.shards.tags import Tags
from audio_llm.shards.writer import ShardWriter, pack
from eval.cli.filter import short_names
from eval.filter import band, joined
from tests.conftest import make_shards
from tests.servers import Listener, serving


class Doubting(Listener):
    """Hears which side is louder and, by its seed, says so in two of three requests; never in silence."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in ("listener", "one", "two")]})

    def chat(self, body):
        self.seed = body["seed"]
        super().chat(body)

    def heard(self, text, samples):
        side = super().heard(text, samples)
        return (
            side
            if samples is None or not np.abs(samples).max() or self.seed % 3
            else {"left": "right"}.get(side, "left")
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_shards(tmp_path_factory.mktemp("filter") / "shards", count=16)
    with serving(Doubting) as one, serving(Listener) as other:
        assert main(command(folder, one)) == 0
        assert main([*command(folder, other), "--out", str(folder.parent / "sure")]) == 0
    return folder


def command(folder, address, *models, tries=5):
    more = ["--engine", f"{address}/v1", "--tries", str(tries), "--quiet"]
    return ["filter", *(models or ["listener"]), str(folder), *more]


def test_shares_are_those_of_the_answers(made):
    """Counted anew from the stored replies, by the words in the tag alone."""
    tags, dataset = Tags.read(made / "tags"), ShardDataset(made)
    right: Counter[tuple[str, str]] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    for line in (made / "tags" / "answers" / "listener" / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked[row["id"], row["control"]] += 1
        right[row["id"], row["control"]] += row["raw"].endswith(f"<answer>{row['gold']}</answer>")
    assert set(asked.values()) == {5} and len(asked) == 32
    for i in range(len(dataset)):
        sample = dataset.load_sample(i)
        row = tags.rows[sample.id]
        assert row["with_sound"] == right[sample.id, ""] / 5 and row["in_silence"] == (sample.answer == "left")
        assert row["gain"] == pytest.approx(row["with_sound"] - row["in_silence"])
        assert row["band"] == band(row["with_sound"])
    assert 0 < sum(right[key] for key in right if not key[1]) < 80  # it was right at times alone
    sure = Tags.read(made.parent / "sure")
    assert {row["with_sound"] for row in sure.rows.values()} == {1.0}
    most = {key for key, row in sure.rows.items() if row["rank"] <= 0.5}
    gains = [row["gain"] for row in sure.rows.values()]
    assert len(most) == 8 and sum(gains[list(sure.rows).index(key)] for key in most) == min(8, sum(gains))


def test_a_stopped_filter_goes_on_to_the_same_tags(made, tmp_path, capsys):
    whole = (made / "tags" / "tags.jsonl").read_bytes()
    answers = made / "tags" / "answers" / "listener" / "predictions.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    cut = random.Random(3).randrange(20, 140)
    answers.write_bytes(b"".join(lines[:cut]) + lines[cut][:17])
    (made / "tags" / "tags.jsonl").unlink()
    (made / "tags" / "sounds.jsonl").write_text("".join((made / "tags" / "sounds.jsonl").read_text()[:5000]))
    with serving(Doubting) as address:
        assert main(command(made, address)) == 0
    assert (made / "tags" / "tags.jsonl").read_bytes() == whole
    assert b"".join(sorted(answers.read_bytes().splitlines())).count(b'"control"') == len(lines)
    with serving(Doubting, broken_until=10**9) as address:  # asked again is nothing
        assert main(command(made, address)) == 0
        assert main(command(made, address, tries=6)) == 2
    assert "another run" in capsys.readouterr().err


def test_a_damaged_answer_is_asked_again_by_the_cure_that_is_named(made, capsys):
    whole = (made / "tags" / "tags.jsonl").read_bytes()
    answers = made / "tags" / "answers" / "listener" / "predictions.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    for damage in (b"\0" * 40 + b"\n", b"\xff\xfe\n", b'{"id": "tiny"}\n', lines[3]):
        answers.write_bytes(b"".join([*lines[:7], damage, *lines[8:]]))
        with serving(Doubting) as address:
            assert main(command(made, address)) == 2
            assert "predictions.jsonl line 8: expected" in (told := capsys.readouterr().err)
            assert "Delete that line and repeat the command of its run" in told
            answers.write_bytes(b"".join([*lines[:7], *lines[8:]]))
            assert main(command(made, address)) == 0
        assert (made / "tags" / "tags.jsonl").read_bytes() == whole


def test_several_models_are_all_kept(made, tmp_path):
    with serving(Doubting) as address:
        assert main([*command(made, address, "one", "two", tries=2), "--out", str(tmp_path), "--no-copies"]) == 0
    tags = Tags.read(tmp_path)
    assert tags.about["models"] == ["one", "two"] and "copies" not in tags.names
    for row in tags.rows.values():
        assert row["with_sound"] == pytest.approx((row["with_sound@one"] + row["with_sound@two"]) / 2)
    assert (
        main(["filter", "one", "one", str(made), "--engine", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "x")])
        == 2
    )


def test_a_model_is_called_by_what_tells_it_from_others(tmp_path):
    for name in ("a/sft/merged", "b/sft/merged", "b/grpo/merged"):
        (tmp_path / name).mkdir(parents=True)
    found = [str(tmp_path / name) for name in ("a/sft/merged", "b/sft/merged", "b/grpo/merged")]
    assert short_names(found[1:]) == ["sft", "grpo"] and short_names(found) == ["a-sft", "b-sft", "b-grpo"]
    assert short_names(["org/model"]) == ["model"]


def test_samples_without_an_answer_are_done_without_where_they_are_allowed(tmp_path, capsys):
    whole = ShardDataset(make_shards(tmp_path / "whole", count=16))
    with ShardWriter(tmp_path / "some") as writer:
        for place in range(16):
            sample = whole.load_sample(place)
            sample = replace(sample, answer=None, choices=[]) if place % 4 == 0 else sample
            writer.add(pack(sample, whole.load_waveforms(place)))
    with serving(Listener) as address:
        assert main(command(tmp_path / "some", address)) == 2
        assert "or repeat it with --max-errors SHARE" in capsys.readouterr().err
        assert main([*command(tmp_path / "some", address), "--max-errors", "0.3"]) == 0
    assert "4 samples could not be asked and have no gain" in capsys.readouterr().out
    rows = Tags.read(tmp_path / "some" / "tags").rows
    assert sum("gain" in row for row in rows.values()) == 12


def test_shards_that_are_not_there_leave_no_folder_behind(tmp_path, capsys):
    (tmp_path / "file.tar").write_bytes(b"")
    for name, found in (("nope", "found no such folder"), ("file.tar", "file.tar: expected")):
        assert main(["filter", "model", str(tmp_path / name)]) == 2
        assert found in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file.tar"]


def test_orders_are_of_all_and_ties_are_drawn():
    ids = [f"s{number}" for number in range(10)]
    found = {"m": {key: (1.0, 0.0 if number < 3 else 1.0) for number, key in enumerate(ids[:8])}}
    rows = joined(ids, found, seed=0)
    assert sorted(row["draw"] for row in rows.values()) == [pytest.approx((n + 0.5) / 10, abs=1e-6) for n in range(10)]
    assert {key for key, row in rows.items() if row.get("rank", 1) < 3 / 8} == set(ids[:3])
    assert "gain" not in rows["s9"] and "rank" not in rows["s9"]
    assert [row["draw"] for row in joined(ids, found, 1).values()] != [row["draw"] for row in rows.values()]
    assert [band(rate) for rate in (0, 0.1, 1 / 3, 0.5, 0.75, 1)] == [
        "never",
        "hard",
        "hard",
        "medium",
        "easy",
        "always",
    ]


def test_copies_are_counted_by_sound_and_by_words(tmp_path):
    draw = np.random.default_rng(0)
    one, other = (draw.normal(0, 0.1, (2, 3 * 16000)) * np.repeat(draw.uniform(0.1, 1, 30), 1600) for _ in range(2))
    asked = [(one, "a?"), (one * 0.3, "a?"), (one, "b?"), (other, "a?"), (one, "a?")]
    with ShardWriter(tmp_path / "shards") as writer:
        for number, (samples, question) in enumerate(asked):
            wave = Waveform((np.round(samples * 32768) / 32768).astype(np.float32), 16000, "stereo")
            info = AudioInfo(16000, 2, "stereo", 3.0, sha256(wave))
            sample = Sample(f"s{number}", "t", question, ["x", "y"], "x", audio=[info])
            writer.write(sample, wave)
    with serving(Listener) as address:
        assert main(command(tmp_path / "shards", address, tries=1)) == 0
    rows = Tags.read(tmp_path / "shards" / "tags").rows
    assert [(row["copies"], row["sound_copies"]) for row in rows.values()] == [(0, 0), (1, 1), (0, 2), (0, 0), (2, 3)]
