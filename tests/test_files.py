"""What a killed process, a full disk or an odd character may do to files: nothing."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from audio_llm import cli, files
from audio_llm.errors import ConfigError
from tests.paths import ROOT

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(st.characters()))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(st.characters()), VALUES), max_size=4))
def test_lines_read_back_as_they_were_written(tmp_path, records):
    """Any text, so line separators of Unicode and lone surrogates among it."""
    files.write_lines(tmp_path / "whole.jsonl", records)
    (tmp_path / "grown.jsonl").write_text("")
    for record in records:
        files.append_line(tmp_path / "grown.jsonl", record)
    assert files.read_lines(tmp_path / "whole.jsonl") == files.read_lines(tmp_path / "grown.jsonl") == records


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, {"step": 1, "text": "é"})
    files.append_line(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:-4])
    assert files.read_lines(path) == [{"step": 1, "text": "é"}]
    assert files.read_lines(tmp_path / "none.jsonl") == []
    files.append_line(path, {"step": 3})  # begins a line of its own
    assert [record["step"] for record in files.read_lines(path)] == [1, 3]


def test_damaged_lines_are_told_of_where_that_is_wanted(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\n7\n\xff{"step"\n{"step": 4}\n{"ste')
    for tell in (False, True):
        assert files.read_lines(path, tell=tell) == [{"step": 1}, {"step": 4}]
        told = capsys.readouterr().err
        assert (f"note: {path}: 2 of 5 lines are no JSON objects, line 3 first" in told) == tell


def test_an_error_names_the_folder_that_a_person_knows(tmp_path):
    with pytest.raises(OSError, match="target/part") as failed, files.atomic_folder(tmp_path / "target") as temporary:
        (temporary / "part" / "x").read_bytes()
    assert failed.value.filename == str(tmp_path / "target" / "part" / "x")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    target = tmp_path / "thing"
    whole = target if kind == "file" else target / "part"
    whole.parent.mkdir(exist_ok=True)
    whole.write_text("old")
    make = files.atomic_file if kind == "file" else files.atomic_folder
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), make(target) as temporary:
            (temporary if kind == "file" else temporary / "part").write_text("half")
            raise error
    assert whole.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_full_disk_is_named_by_what_did_not_fit(tmp_path) -> None:
    """A write knows no name, and one of several disks is full."""
    with pytest.raises(OSError) as error, files.atomic_file(tmp_path / "thing"), open("/dev/full", "w") as stream:
        stream.write("x")
    assert str(tmp_path / "thing") == error.value.filename
    told = f"{tmp_path / 'thing'}: No space left on device. Finished work is kept"
    assert str(cli._message(error.value)).startswith(told)
    assert "Disk quota exceeded. Finished work" in str(cli._message(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))))


@pytest.mark.parametrize("by", ["name", "link"])
def test_a_pipe_or_a_device_stays_what_it_is(tmp_path, by):
    """As /dev/null and /dev/stdout: a file in their place would take them away from every program."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    target = pipe if by == "name" else tmp_path / "link"
    if by == "link":
        target.symlink_to(pipe)
    told = []
    reader = threading.Thread(target=lambda: told.append(pipe.read_bytes()))
    reader.start()
    files.write_json(target, {"é": 1})
    reader.join(60)
    assert told == ['{\n  "é": 1\n}\n'.encode()]
    assert pipe.is_fifo() and target.is_fifo() and target.is_symlink() == (by == "link")
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", target.name}


def test_what_was_asked_for_takes_no_other_files_place(tmp_path):
    path = tmp_path / "new" / "found.json"
    files.write_asked(path, {"scorer": "a"})
    files.write_asked(path, {"scorer": "b"})
    assert files.read_json(path) == {"scorer": "b"}
    for content in ('{"model": 1}', "<!doctype html>", "{", "x" * 99):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"output .*found\.json: expected a new file, .* found another file"):
            files.write_asked(path, {"scorer": "b"})
        assert path.read_text() == content
    path.write_text("")  # as a shell makes it
    files.write_asked(path, "a table\n")
    assert path.read_text() == "a table\n"


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(OSError) as caught:
            files.write_atomically(target, "text")
        assert caught.value.filename == str(target)


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '["\\udc00\\ud800"]', '{"\\ud83dx": 1}', "[" * 100_000, "{", "'"])
def test_json_of_others_is_refused_where_it_is_none(text):
    with pytest.raises(json.JSONDecodeError):
        files.parse_json(text)
    with pytest.raises(ValueError):
        files.parse_json(text.encode())


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_json_of_any_text_is_read(tree):
    for text in (json.dumps(tree), json.dumps(tree, ensure_ascii=False)):
        assert files.parse_json(text) == files.parse_json(text.encode()) == tree
    assert files.parse_json(json.dumps("C:\\ud800\\x")) == "C:\\ud800\\x"  # a backslash before letters, no escape


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    target = tmp_path / "model"
    (tmp_path / ".model-old").mkdir()
    (tmp_path / ".model-old" / "left").write_text("by a killed process")
    for text in ("first", "second"):
        with files.atomic_folder(target) as folder:
            (folder / "weights").write_text(text)
    assert (target / "weights").read_text() == "second" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_in_a_folders_place_stays(tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(NotADirectoryError), files.atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "keep"


def test_a_reader_never_sees_half_of_a_file(tmp_path):
    """A process that rewrites a file without end is killed at some moment; what is there then is one whole version."""
    path = tmp_path / "state.json"
    code = "import sys\nfrom audio_llm.files import write_json\nn = 0\nwhile True:\n    n += 1\n"
    code += "    write_json(sys.argv[1], [n] * 20000)\n    print(n, flush=True)\n"
    root = ROOT
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
        assert len(set(json.loads(path.read_text()))) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    values = json.loads(path.read_text())
    assert len(values) == 20000 and len(set(values)) == 1


def test_a_glance_tells_sounds_of_one_length_apart_and_knows_copies(tmp_path):
    one, other, copy = (tmp_path / name for name in ("one", "other", "copy"))
    one.write_bytes(bytes(100_000))
    copy.write_bytes(bytes(100_000))
    assert files.glance(one) == files.glance(copy)
    for start in (0, 50_000, 87_500):  # pieces of it are read, not all of it
        other.write_bytes(bytes(start) + b"\1" * 1000 + bytes(99_000 - start))
        assert files.glance(other) != files.glance(one)
    other.write_bytes(bytes(100_001))
    assert len({files.glance(one), files.glance(other), files.glance(tmp_path / "none")}) == 3


def test_the_content_of_a_folder_is_that_of_its_files(tmp_path):
    folder = tmp_path / "whisper"
    folder.mkdir()
    assert files.content_hash(folder) == files.content_hash(tmp_path / "none") == ""
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    before = files.content_hash(folder)
    (folder / ".index.tmp").write_text("hidden")
    assert files.content_hash(folder) == before
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert files.content_hash(folder) != before
    assert files.content_hash(folder / "config.json") == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_rights_that_the_umask_gives(tmp_path, umask, expected):
    """safetensors makes a file for its owner alone; a container's server is another user."""
    before = os.umask(umask)
    try:
        with files.atomic_folder(tmp_path / "model") as folder:
            (folder / "more").mkdir()
            for name in ("model.safetensors", "more/model.safetensors"):
                save_file({"a": torch.zeros(2)}, folder / name)
            (folder / "config.json").write_text("{}")
            (folder / "run.sh").touch(0o700)
        with files.atomic_file(tmp_path / "one.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    names = ("model/model.safetensors", "model/more/model.safetensors", "model/config.json", "one.safetensors")
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in names} == {expected}
    assert (tmp_path / "model/run.sh").stat().st_mode & 0o100
