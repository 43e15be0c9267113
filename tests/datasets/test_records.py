"""Rows of published data sets: three containers, lazily read sound, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.datasets.records import Cell, Record, each_line, read_records
from audio_llm.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), min_size=1, max_size=4))
def test_what_is_written_is_read_in_every_text_container(rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "a.json").write_text(json.dumps(rows))
        (path / "b.json").write_text(json.dumps({"data": rows, "version": 1}))
        (path / "c.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
        for name in ("a.json", "b.json", "c.jsonl"):
            assert [dict(record.values) for record in read_records(path / name)] == rows


@given(st.binary(max_size=40) | JSON.map(lambda tree: json.dumps(tree).encode()), st.sampled_from(["json", "jsonl"]))
def test_anything_else_is_one_sentence_with_the_files_name(data: bytes, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{kind}"
        path.write_bytes(data)
        try:
            for record in read_records(path):
                assert isinstance(record.values, dict)
                record.text("question")
        except DataError as error:
            assert f"x.{kind}" in str(error) and "expected" in str(error)


def test_parquet_keeps_sound_in_the_file_until_it_is_asked_for(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sounds = [bytes([number]) * 1000 for number in range(7)]
    rows = [{"n": n, "wrapped": {"bytes": data, "path": "x"}, "plain": data} for n, data in enumerate(sounds)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=3)
    records = read_records(tmp_path / "x.parquet")
    assert [record.values["n"] for record in records] == list(range(7))
    for number in (6, 0, 3, 2):
        for column in ("wrapped", "plain"):
            cell = records[number].values[column]
            assert isinstance(cell, Cell) and cell.data() == sounds[number]
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet: expected a Parquet file"):
        read_records(tmp_path / "cut.parquet")
    with pytest.raises(DataError, match="expected the bytes of a file, found int"):
        Cell(tmp_path / "x.parquet", "n", 0).data()
    bad = arrow.Array.from_buffers(
        arrow.string(), 1, [None, *arrow.array(["ab"]).buffers()[1:2], arrow.py_buffer(b"\xffb")]
    )
    parquet.write_table(arrow.table({"question": bad}), tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match=r"bytes\.parquet: expected a Parquet file"):
        read_records(tmp_path / "bytes.parquet")


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"question": "which \\ud800?"}]')
    with pytest.raises(
        DataError, match=r"x\.json: expected valid JSON, found Half of a surrogate pair at line 1, column 22"
    ):
        read_records(tmp_path / "x.json")


def test_a_text_of_two_bytes_a_character_is_named(tmp_path: Path) -> None:
    """Without its mark it is valid UTF-8, whose columns would be called a\\0u\\0d\\0i\\0o."""
    path = tmp_path / "rows.csv"
    path.write_bytes("audio,question\na.wav,?\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"rows.csv: expected UTF-8 text, found a byte of zero at character 1"):
        list(each_line(path))


def test_dates_beyond_pythons_are_one_sentence(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    column = arrow.array([2**62], arrow.int64()).cast(arrow.timestamp("us"))
    parquet.write_table(arrow.table({"question": ["?"], "when": column}), path)
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read_records(path)


def test_getters_name_row_and_key() -> None:
    record = Record({"question": " ", "answer": 3, "choises": ["a"], "more": ["a", ""]}, "f.json: data[2]")
    for keys, words in (
        (("question",), "'question': expected a text, found ' '"),
        (("answer",), "'answer': expected a text, found 3"),
    ):
        with pytest.raises(DataError, match=r"f\.json: data\[2\]") as caught:
            record.text(*keys)
        assert words in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'choises'"):
        record.texts("choices")
    with pytest.raises(DataError, match=r"expected a value of 'id' or 'name', found 'name': None\.$"):
        Record({"name": None, "more": 1}, "f.json").text("id", "name")
    with pytest.raises(DataError, match="a list of texts"):
        record.texts("more")
    assert record.text("question", default="") == " "
    with pytest.raises(DataError, match="expected a file"):
        read_records("nowhere.txt")
    with pytest.raises(DataError, match="no such file"):
        read_records("nowhere.json")
