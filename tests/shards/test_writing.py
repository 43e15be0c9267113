"""What a writer leaves: the tars of webdataset's own writer, an index, and a journal by which it is taken up again."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from webdataset.writer import TarWriter

from audio_llm.errors import ShardError
from audio_llm.shards.index import CACHE, COLUMNS, ShardIndex
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.writer import ShardWriter, _header, _members
from tests.shards.test_shards import clip, contents, make, sample


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("aZ9_äß音"), min_size=1, max_size=25), st.sampled_from(["flac", "wav"]), st.data())
def test_members_are_those_of_webdatasets_writer(name: list[str], format: str, data: st.DataObject) -> None:
    """To the byte, up to the two zero blocks and the padding at the end, which the writer adds itself."""
    contents = {format: data.draw(st.binary(max_size=1500)), "json": data.draw(st.binary(max_size=600))}
    blocks, spans = _members("".join(name), contents)
    theirs = io.BytesIO()
    with TarWriter(theirs, encoder=False, mtime=0) as tar:
        tar.write({"__key__": "".join(name), **contents})
    assert theirs.getvalue().startswith(blocks) and not theirs.getvalue()[len(blocks) :].strip(b"\0")
    assert {suffix: blocks[start : start + size] for suffix, (start, size) in spans.items()} == contents


@pytest.mark.parametrize(("count", "per_shard"), [(9, 4), (8, 4), (1, 4), (60, 30)])
def test_a_shard_is_the_file_that_webdatasets_writer_makes(count: int, per_shard: int, tmp_path: Path) -> None:
    make(tmp_path, count, per_shard)
    for path in tmp_path.glob("*.tar"):
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as ours, open(tmp_path / "theirs", "wb") as stream:
            for member in ours:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = ours.extractfile(member).read()  # type: ignore[union-attr]
            with TarWriter(stream, encoder=False, mtime=0) as tar:
                for key, members in found.items():
                    tar.write({"__key__": key, **members})
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_writer_leaves_the_index_that_a_scan_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 30, per_shard=4)
    with monkeypatch.context() as without:
        without.setattr("audio_llm.shards.index.scan_shard", None)
        left = ShardIndex.load(tmp_path)
    (tmp_path / CACHE).unlink()
    scanned = ShardIndex.load(tmp_path)
    assert left.rows == scanned.rows and left.shards == scanned.shards
    for name in COLUMNS:
        one, other = getattr(left, name), getattr(scanned, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert [part.rows for part in left.parts()] == [
        [row for row in scanned.rows if row.shard == shard] for shard in scanned.shards
    ]


def stopped(folder: Path, after: int) -> Path:
    with pytest.raises(KeyboardInterrupt), ShardWriter(folder, samples_per_shard=4) as writer:
        for i in range(after):
            writer.write(sample(i), clip(i))
        raise KeyboardInterrupt
    return folder


def test_a_stopped_writer_is_taken_up_without_reading_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(tmp_path / "whole", 22, per_shard=4))
    for name, finished in (("stopped", 13), ("finished", 12)):
        folder = stopped(tmp_path / name, 13) if name == "stopped" else make(tmp_path / name, 12, per_shard=4)
        with monkeypatch.context() as unread:
            unread.setattr("audio_llm.shards.writer.scan_shard", None)
            unread.setattr("audio_llm.shards.writer.describe_shard", None)
            with ShardWriter(folder, samples_per_shard=4) as writer:
                assert [item.id for item in writer.stored()] == [sample(i).id for i in range(12)]
                for i in range(12, 22):
                    writer.write(sample(i), clip(i))
            assert ShardIndex.load(folder, verify=True).rows == ShardIndex.load(tmp_path / "whole").rows
        assert contents(folder) == whole, finished


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_samples(path: Path) -> None:
    """As many bytes, at the same time, in the same place: another folder's."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    where = data.find(b"Question 1?")
    data[where : where + 11] = b"Question 7?"
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def copied(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(("change", "told"), [(torn, "finished shard, found"), (other_samples, ""), (copied, "")])
def test_a_description_is_not_believed_of_another_file(change: Any, told: str, tmp_path: Path) -> None:
    stopped(tmp_path, 13)
    change(tmp_path / "shard-000000.tar")
    if told:
        with pytest.raises(ShardError, match=told):
            ShardWriter(tmp_path, samples_per_shard=4)
        return
    with ShardWriter(tmp_path, samples_per_shard=4) as writer:
        for i in range(12, 16):
            writer.write(sample(i), clip(i))
    assert len(ShardIndex.load(tmp_path, verify=True)) == 16  # with the checksum of what is there
    question = ShardDataset(tmp_path).load_sample(1).question
    assert question == ("Question 7?" if change is other_samples else "Question 1?")


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "null", '{"shard": 3}', '{"shard": "shard-000000.tar", "known": []}', "é"]
)
def test_a_marker_of_any_content_is_only_a_marker(line: str, tmp_path: Path) -> None:
    whole = contents(make(tmp_path / "whole", 22, per_shard=4))
    stopped(tmp_path / "parts", 13)
    (tmp_path / "parts" / ".writing").write_text(line + "\n" + line, encoding="latin-1")
    with ShardWriter(tmp_path / "parts", samples_per_shard=4) as writer:
        for i in range(12, 22):
            writer.write(sample(i), clip(i))
    assert contents(tmp_path / "parts") == whole


def test_a_sample_that_no_reader_takes_is_refused(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    with ShardWriter(tmp_path) as writer:
        for meta in ({"deep": deep}, {"long": 10**400}):
            with pytest.raises(ShardError, match="JSON that can be read back"):
                writer.write(sample(0, meta=meta), clip(0))
        writer.write(sample(0), clip(0))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), max_size=110), st.integers(0, 2**35))
def test_heads_of_members_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    assert _header(name, size) == member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
