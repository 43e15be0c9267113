"""Subtitles in four formats against a table made by hand, the matcher of marks, and the reader of the long dump."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.errors import DataError
from data_prep.corpus import cues
from data_prep.corpus.cues import Broken, Cue, Rule, caption, judge, marks, overlapping, read_dump, read_file

GOLDEN = Path(__file__).parents[2] / "data" / "corpus"
with open(GOLDEN / "golden.tsv", newline="", encoding="utf-8") as stream:
    TABLE = list(csv.DictReader(stream, delimiter="\t"))
RULE = Rule()


def read(name: str) -> list[tuple[Cue | Broken, bool]]:
    if name.endswith("dump.json"):
        with open(GOLDEN / name, encoding="utf-8") as stream:
            return list(overlapping(read_dump(stream)))
    return list(overlapping(read_file(GOLDEN / name)))


def row(name: str, cue: Cue | Broken, overlaps: bool) -> dict[str, str]:
    about = {"file": name, "video": cue.video, "number": str(cue.number)}
    if isinstance(cue, Broken):
        return about | dict.fromkeys(("start", "end", "marks", "caption", "overlaps"), "") | {"reason": cue.reason}
    reason, found = judge(cue, RULE)
    return about | {
        "start": f"{cue.start:g}",
        "end": f"{cue.end:g}",
        "reason": reason,
        "marks": "+".join(mark.kind for mark in found),
        "caption": caption(found, RULE.kinds),
        "overlaps": "yes" if overlaps else "",
    }


@pytest.mark.parametrize("name", sorted({entry["file"] for entry in TABLE}))
def test_cues_are_those_of_the_table(name: str) -> None:
    assert len(TABLE) == 60
    assert [row(name, *found) for found in read(name)] == [entry for entry in TABLE if entry["file"] == name]


def test_every_reason_and_every_kind_of_mark_is_in_the_table() -> None:
    assert {entry["reason"] for entry in TABLE} == {"", *cues.REASONS}
    assert {kind for entry in TABLE for kind in entry["marks"].split("+")} == {"", *cues.KINDS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a] (b) {c}", ["square:a", "round:b", "curly:c"]),
        ("[a (b [c])]", ["square:a (b [c])"]),
        ("[a) (b]", []),
        ("(a [b)", []),
        ("a] [b]", ["square:b"]),
        ("♪ la ♪ and ♫ lo", ["notes:la", "notes:lo"]),
        ("♪♪ la ♪♪", ["notes:la"]),
        ("*whoosh* 2 * 3 * 4 **loud**", ["stars:whoosh"]),
        ("BOB: (coughs)\nTV 2: [static]", ["speaker:BOB", "round:coughs", "speaker:TV 2", "square:static"]),
        ("Note: it is 10:30", []),
        ("[[door]]", ["square:[door]"]),
    ],
)
def test_marks(text: str, expected: list[str]) -> None:
    assert [f"{mark.kind}:{mark.words}" for mark in marks(text)] == expected


@given(st.text(alphabet="ab[](){}♪*: \nA", max_size=30))
def test_marks_stand_where_they_say_and_do_not_overlap(text: str) -> None:
    last = 0
    for mark in marks(text):
        assert last <= mark.start < mark.end <= len(text) and mark.words in text[mark.start : mark.end]
        if mark.kind in ("square", "round", "curly"):
            assert text[mark.start] in "[({" and text[mark.end - 1] in "])}"
        last = mark.end


def dump(count: int, words: str = "[rain]") -> str:
    lines = [{"t": words, "-start": f"{n}.0", "-dur": "2.0"} for n in range(3)]
    return "".join(
        json.dumps(
            {
                "video": {"videoid": f"v{n}"},
                "captions": [{"lang": "en", "subtitles": {"transcript": {"text": lines}}}],
            },
            indent=n % 3 or None,
        )
        + "\n" * (n % 2)
        for n in range(count)
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 5000])
def test_the_dump_reads_the_same_however_it_is_cut(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cues, "CHUNK", chunk)
    text = dump(4) + '{"video": {"videoid": 7, broken}}\n' + dump(3, "(wind)")
    found = list(read_dump(io.StringIO(text)))
    assert [cue.text for cue in found if isinstance(cue, Cue)] == ["[rain]"] * 12 + ["(wind)"] * 9
    assert [cue.reason for cue in found if isinstance(cue, Broken)] == ["broken"]


class Endless(io.TextIOBase):
    """Objects of the dump without end, up to so many characters; never more in memory than is asked for."""

    def __init__(self, characters: int) -> None:
        self.block, self.left = dump(30), characters

    def read(self, size: int | None = -1) -> str:
        assert size and size > 0
        if self.left <= 0:
            return ""
        self.left -= len(self.block)
        return self.block


def test_memory_holds_one_object_of_the_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cues, "CHUNK", 2**14)
    stream = Endless(1_500_000)
    tracemalloc.start()
    count = sum(isinstance(cue, Cue) for cue in read_dump(stream))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 8000 and peak < 500_000


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.srt", b"", []),
        ("a.vtt", b"no head\n\n00:01.000 --> 00:02.000\n[a]", ["broken"]),
        ("a.json3", b"{", ["broken"]),
        ("a.json3", b'{"events": [{"tStartMs": NaN, "dDurationMs": 1, "segs": []}]}', ["bad_time"]),
        ("a.json", b"[]", ["broken"]),
        ("a.json3", rb'{"events": [{"tStartMs": 1, "aAppend": 1, "segs": [{"utf8": "\n"}]}]}', []),
        (
            "a.json3",
            b'{"events": [{"tStartMs": 1, "dDurationMs": 9, "aAppend": 1, "segs": [{"utf8": "[b]"}]}]}',
            ["[b]"],
        ),
        ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:03.000\n" + "<v " * 60_000, ["<v " * 59_999 + "<v"]),  # not for minutes
        ("a.srt", "1\n00:00:01,000 --> 00:00:03,000\n[caf\xe9 noise]".encode("cp1252"), ["[café noise]"]),
        ("a.srt", "1\n00:00:01,000 --> 00:00:03,000\n[rain]".encode("utf-16"), ["[rain]"]),
        ("a.srt", b"\xff\xfe\x00", ["broken"]),
        ("a.srt", "1\n00:00:01,000 --> 00:00:03,000\n[\u72ac\u306e\u9cf4\u304d\u58f0]".encode("shift_jis"), ["broken"]),
        ("a.json3", json.dumps({"events": [{"tStartMs": 0, "dDurationMs": 9, "segs": [{"utf8": "\ud800"}]}]}), None),
    ],
)
def test_files_that_are_no_subtitles_are_counted(name: str, data: Any, expected: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    found = [cue.reason if isinstance(cue, Broken) else cue.text for cue in read_file(tmp_path / name)]
    assert expected is None or found == expected


@pytest.mark.parametrize("encoding", ["cp1251", "shift_jis", "utf-16-le"])
def test_the_encoding_of_old_files_can_be_said(encoding: str, tmp_path: Path) -> None:
    words = {"cp1251": "[\u043b\u0430\u0439]", "shift_jis": "[\u72ac]", "utf-16-le": "[caf\xe9]"}[encoding]
    (tmp_path / "a.srt").write_bytes(f"1\n00:00:01,000 --> 00:00:03,000\n{words}\n".encode(encoding))
    (cue,) = read_file(tmp_path / "a.srt", encoding=encoding)
    assert isinstance(cue, Cue) and cue.text == words


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("words", ["[rain]", "[\u72ac\u304c\u5420\u3048\u308b]"])
def test_two_bytes_a_character_are_known_without_their_mark(encoding: str, words: str, tmp_path: Path) -> None:
    """Latin letters of UTF-16 are valid UTF-8 with a zero behind each, in which no line of times is found."""
    (tmp_path / "a.srt").write_bytes(f"1\n00:00:01,000 --> 00:00:03,000\n{words}\n".encode(encoding))
    assert [(cue.start, cue.text) for cue in read_file(tmp_path / "a.srt") if isinstance(cue, Cue)] == [(1.0, words)]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_utf8_is_never_taken_for_it(text: str) -> None:
    assert cues.halved(text.encode()) == ""


def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one of \.srt, \.vtt"):
        list(read_file(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="expected a file"):
        list(read_file(tmp_path / "a.srt"))


ROLLING = """WEBVTT
Kind: captions

00:00.000 --> 00:02.000 align:start position:0%
\x20
[Music]

00:02.000 --> 00:04.000 align:start position:0%
[Music]
\x20

00:04.000 --> 00:07.000
[Music]
welcome<00:05.000><c> back</c>
"""
CROWDED = """1
00:00:01,000 --> 00:00:03,000
[rain]
2
00:00:04,000 --> 00:00:06,000
[wind]
00:00:07,000 --> 00:00:09,000
7
[a line that is a number]
"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.vtt", ROLLING, [(0, "[Music]"), (2, "[Music]"), (4, "[Music]\nwelcome back")]),
        ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:03.000\n[a]\n00:04.000 --> 00:06.000\n[b]", [(1, "[a]"), (4, "[b]")]),
        ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:03.000\n<ruby>[鐘<rt>kane</rt>]</ruby>", [(1, "[鐘]")]),
        ("a.srt", CROWDED, [(1, "[rain]"), (4, "[wind]"), (7, "7\n[a line that is a number]")]),
        ("a.srt", CROWDED.replace("\n", "\r\n"), [(1, "[rain]"), (4, "[wind]"), (7, "7\n[a line that is a number]")]),
    ],
)
def test_a_cue_ends_where_the_next_begins(name: str, text: str, expected: Any, tmp_path: Path) -> None:
    """WebVTT's own rule: an empty line, or a line of times. Players take SubRip so as well."""
    (tmp_path / name).write_bytes(text.encode())
    assert [(cue.start, cue.text) for cue in read_file(tmp_path / name) if isinstance(cue, Cue)] == expected


def test_bytes_of_the_dump_that_are_no_words_are_counted() -> None:
    found = list(read_dump(io.StringIO(dump(1, "[caf\ufffd]"))))
    assert [cue.reason for cue in found if isinstance(cue, Broken)] == ["broken"] * 3 == ["broken"] * len(found)
