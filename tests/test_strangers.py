"""What others bring, and what other processes do: folders with one writer, files that claim to be larger or deeper than
they are, indexes of other shards, replies without an end, texts that steer a terminal."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_llm import files
from audio_llm.answering.server import KEY_VARIABLE, Endpoint, EngineError, sent_key
from audio_llm.cli import main
from audio_llm.errors import ConfigError, DataError, ShardError, one_line, visible
from audio_llm.shards.index import CACHE, ShardIndex
from audio_llm.shards.reader import ShardDataset
from tests.paths import ROOT
from tests.servers import ChatServer, serving
from tests.tasks.test_echotwin import make_questions

# ------------------------------------------------------------------------------------------------------- writers


def held(folder: Path) -> subprocess.Popen[str]:
    """A process that writes into `folder` until its standard input ends."""
    program = (
        "import sys; from audio_llm.files import only_writer\n"
        "with only_writer(sys.argv[1]): print('mine', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    return process


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = held(folder)
    with pytest.raises(files.FolderInUse, match=f"process {process.pid} on"), files.only_writer(folder):
        pass
    process.kill()  # the kernel gives the lock back, whatever the process left
    process.wait()
    (folder / "kept").touch()
    with files.only_writer(folder):
        assert (folder / ".lock").read_text().startswith(f"{os.getpid()} on")
        with pytest.raises(files.FolderInUse), files.only_writer(folder):
            pass
    assert os.listdir(folder) == ["kept"]
    with files.only_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_lock_is_no_way_to_other_files(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), files.only_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("verb", ["sft", "grpo", "train", "encoder", "echotwin", "folds", "eval", "prep"])
def test_every_verb_leaves_another_run_s_folder_alone(
    tmp_path: Path, checkpoint, shards, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """The other process holds the folder; what the verb would have done there does not begin."""
    out, data, model = tmp_path / "out", shards(), checkpoint()
    short = ["steps=1", f"output={out}"]
    words = {
        "sft": ["sft", recipe("quickstart/sft"), f"data.train=[{data}]", f"model={{path: {model}}}", *short],
        "grpo": ["grpo", recipe("quickstart/grpo"), f"data.train=[{data}]", f"model={{path: {model}}}", *short],
        "train": ["train", recipe("quickstart/language_model"), f"text={data}", *short],
        "encoder": ["train", recipe("quickstart/encoder"), f"train=[{data}]", f"validation={data}", *short],
        "echotwin": ["train", recipe("echotwin/letters"), "encoder={name: beats, preset: tiny}", "cache=", *short],
        "folds": [],
        "eval": ["eval", str(model), str(data), "--out", str(out), "--engine", "transformers"],
        "prep": ["prep", recipe("quickstart/scenes"), str(out)],
    }[verb]
    if verb == "echotwin":
        words.append(f"train=[{make_questions(tmp_path / 'questions', 4)}]")
    if verb == "folds":
        from eval.tasks import classification_folds

        run = classification_folds.CrossValidation.__new__(classification_folds.CrossValidation)
        run.recipe = type("Recipe", (), {"output": out})()  # type: ignore[assignment]
        other = held(out)
        with pytest.raises(files.FolderInUse):
            run.run()
    else:
        other = held(out)
        assert main(words) == 2
        assert f"process {other.pid} on" in capsys.readouterr().err
    assert os.listdir(out) == [".lock"]
    other.communicate()


def recipe(name: str) -> str:
    return str(ROOT / "recipes" / f"{name}.yaml")


def test_temporary_files_follow_no_link_and_honour_the_umask(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".report.html.tmp").symlink_to(tmp_path / "victim")
    (tmp_path / "report.html").symlink_to(tmp_path / "victim")
    files.write_atomically(tmp_path / "report.html", "ours")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "report.html").is_symlink()
    before = os.umask(0o077)
    try:
        files.write_json(tmp_path / "private.json", {})
        with files.atomic_folder(tmp_path / "private") as folder:
            (folder / "a").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="other files"), files.atomic_folder(tmp_path / "mine") as folder:
        (folder / "model.safetensors").touch()
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"] and os.listdir(tmp_path) == ["mine"]
    for _ in range(2):
        with files.atomic_folder(tmp_path / "model") as folder:
            (folder / "model.safetensors").touch()
    assert sorted(os.listdir(tmp_path)) == ["mine", "model"]


def test_two_writers_of_one_name_leave_one_of_both(tmp_path: Path) -> None:
    """Whole files and folders, no error in either, nothing left over."""

    def write(text: str) -> None:
        for _ in range(40):
            files.write_atomically(tmp_path / "same.txt", text * 20_000)
            with files.atomic_folder(tmp_path / "same") as folder:
                (folder / "a").write_text(text)

    failed: list[BaseException] = []

    def safely(text: str) -> None:
        try:
            write(text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=safely, args=(text,)) for text in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "same.txt").exists():
            text = (tmp_path / "same.txt").read_text()
            assert len(text) == 20_000 and len(set(text)) == 1
    assert not failed
    assert sorted(os.listdir(tmp_path)) == ["same", "same.txt"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\..\\..\\x", "a\0b"])
def test_names_in_lists_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        files.within(tmp_path, name)
    assert files.within(tmp_path, "./a/b.wav") == tmp_path / "a" / "b.wav"


def test_a_benchmark_sends_no_file_of_another_folder(tmp_path: Path) -> None:
    from eval.benchmarks import get_benchmark

    sound = (ROOT / "tests" / "data" / "previous" / "beep.wav").read_bytes()
    for folder in ("audio", "secret"):
        (tmp_path / folder).mkdir()
    (tmp_path / "audio" / "in.wav").write_bytes(sound)
    (tmp_path / "secret" / "s.wav").write_bytes(sound)
    rows = [
        {"id": str(number), "audio_id": name, "question": "q?", "choices": ["x", "y"], "answer": "x", "task": "sound"}
        | {"difficulty": "easy"}
        for number, name in enumerate(("./in.wav", "../secret/s.wav", str(tmp_path / "secret" / "s.wav")))
    ]
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    opened = get_benchmark("mmau").open(tmp_path / "mmau.json", audio=str(tmp_path / "audio"))
    assert sorted(opened.errors) == ["1", "2"]


# -------------------------------------------------------------------------------------------------- files and size


def limited(memory: int = 2**30) -> Callable[[], None]:
    """Of a child process: no more than `memory` bytes on top of what Python and its libraries map."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


@pytest.mark.parametrize("text", ["[" * 150 + "]" * 150, "[" * 200_000, "1" + "0" * 400, '{"a": -' + "9" * 5000 + "}"])
def test_json_has_a_depth_and_numbers_an_end(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.parse_json(text)
    assert files.parse_json('{"a": "' + "1" * 400 + '", "b": [' + "[0]," * 300 + "0]}")["a"] == "1" * 400


def test_json_files_are_plain_and_of_a_size(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path, tmp_path / "none"):
        with pytest.raises(OSError):
            files.read_json(path)
    with open(tmp_path / "large.json", "wb") as stream:
        stream.truncate(60 * 2**30)  # sparse
    with pytest.raises(ValueError, match="bytes"):
        files.read_json(tmp_path / "large.json")


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def parts(shards) -> tuple[dict[str, Any], bytes]:
    """The JSON and the sound of one sample."""
    dataset = ShardDataset(shards())
    return json.loads(dataset.load_sample(0).to_json()), dataset.load_audio_bytes(0)[0]


def folder_of(path: Path, fill: Callable[[tarfile.TarFile], None]) -> Path:
    path.mkdir()
    with tarfile.open(path / "shard-000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        fill(tar)
    return path


@pytest.mark.parametrize("size", [60 << 30, 6 << 30, 2**24 + 1])
def test_a_sparse_shard_is_not_read_into_memory(tmp_path: Path, parts, size: int) -> None:
    sample, sound = parts
    folder = folder_of(tmp_path / "s", lambda tar: None)
    member, beside = tarfile.TarInfo("b.json"), tarfile.TarInfo("b.flac")
    member.size, beside.size = size, len(sound)
    with open(folder / "shard-000000.tar", "wb") as stream:
        stream.write(member.tobuf(tarfile.GNU_FORMAT))
        stream.seek(512 + -(-size // 512) * 512)
        stream.write(beside.tobuf() + sound.ljust(-(-len(sound) // 512) * 512, b"\0") + bytes(1024))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ShardError, match=f"{size} bytes"):
        ShardIndex.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("deep", lambda tar: add(tar, "k.json", b"[" * 200_000 + b"]" * 200_000)),
        ("deep meta", lambda tar: add(tar, "k.json", b'{"meta": ' + b"[" * 900 + b"]" * 900 + b"}")),
        ("long number", lambda tar: add(tar, "k.json", b'{"meta": {"a": 1' + b"0" * 4000 + b"}}")),
        ("header", lambda tar: add(tar, "k.json", b"{}", pax_headers={"comment": "x" * 2**24})),
    ],
)
def test_samples_that_are_bombs_are_rejects(tmp_path: Path, parts, name: str, fill: Any) -> None:
    folder = folder_of(tmp_path / "s", lambda tar: (fill(tar), add(tar, "k.flac", parts[1])))  # type: ignore[arg-type]
    with pytest.raises(ShardError, match=r"1 of 1|cut in the middle"):
        ShardIndex.load(folder)


def good(tar: tarfile.TarFile, parts: tuple[dict[str, Any], bytes], **fields: Any) -> None:
    add(tar, "k0.json", json.dumps(parts[0] | {"id": "k0"} | fields).encode())
    add(tar, "k0.flac", parts[1])


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "another file": lambda z: z.update(head=changed(z["head"], shards=["../private.txt"])),
    "beyond its end": lambda z: z.update(ranges=np.array([[0, 1 << 40, 0, 10]])),
    "beyond a number": lambda z: z.update(ranges=np.array([[2**63 - 1, 100, 0, 10]])),
    "before its start": lambda z: z.update(ranges=np.array([[-5, 9, -4, 2]])),
    "another shard": lambda z: z.update(shard_of=np.array([7], np.int32)),
    "a shard before": lambda z: z.update(shard_of=np.array([-1], np.int32)),
    "more rows": lambda z: z.update(ranges=np.zeros((5, 4), np.int64)),
    "no layout": lambda z: z.update(layouts=np.array([100], np.int8)),
}


def changed(head: np.ndarray, **fields: Any) -> np.ndarray:
    return np.array(json.dumps(json.loads(str(head)) | fields))


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_is_believed_about_its_own_shards(tmp_path: Path, parts, change: str) -> None:
    folder = folder_of(tmp_path / "s", lambda tar: good(tar, parts))
    (tmp_path / "private.txt").write_bytes(json.dumps(parts[0] | {"id": "k0", "question": "PRIVATE?"}).encode() * 3)
    rows = ShardIndex.load(folder).rows
    columns = dict(np.load(folder / CACHE))
    CHANGES[change](columns)
    np.savez(folder / CACHE, **columns)
    assert ShardIndex.load(folder).rows == rows
    assert ShardDataset(folder).load_sample(0).question == parts[0]["question"]


def test_an_index_that_came_with_its_shards_is_made_again(tmp_path: Path, parts) -> None:
    folder = folder_of(tmp_path / "s", lambda tar: good(tar, parts))
    os.utime(folder / "shard-000000.tar", ns=(10**18, 10**18))
    ShardIndex.load(folder)
    (tmp_path / "moved").mkdir()
    packed = subprocess.run(["tar", "-C", str(folder), "-cf", "-", "."], stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-C", str(tmp_path / "moved"), "-xf", "-"], input=packed, check=True)
    before = (tmp_path / "moved" / CACHE).stat().st_ino
    ShardIndex.load(tmp_path / "moved")
    assert (tmp_path / "moved" / CACHE).stat().st_ino != before
    with zipfile.ZipFile(folder / CACHE) as archive, zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as deep:
        for name in archive.namelist():
            deep.writestr(name, archive.read(name))
    os.replace(tmp_path / "z", folder / CACHE)  # packed, it could be of any size
    before = (folder / CACHE).stat().st_ino
    ShardIndex.load(folder)
    assert (folder / CACHE).stat().st_ino != before


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% for a in messages %}{% for b in range(9)|list %}{% for c in range(9) %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in messages %}",
    "x" * 2**21,
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end_is_refused(tmp_path: Path, template: str) -> None:
    from audio_llm.errors import CheckpointError
    from audio_llm.model.validate import check_template

    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError):
        check_template(tmp_path)
    plain = "{% for m in messages %}{% generation %}{{ m.content * 2 }}{% endgeneration %}{% break %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(plain + "{% for a in range(3) %}{{ 2 * a }}{% endfor %}")
    check_template(tmp_path)


# --------------------------------------------------------------------------------------------------------- replies


class Odd(ChatServer):
    """Redirects, or replies without an end."""

    target = ""
    seen: list[str | None]

    def do_GET(self) -> None:
        if self.target:
            self.send_response(302)
            self.send_header("Location", self.target)
            self.end_headers()
            return
        self.seen.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(200):
                self.wfile.write(bytes(2**20))
        except OSError:
            return


def test_a_key_follows_no_redirect(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "KEY-1")
    seen: list[str | None] = []
    with (
        serving(Odd, seen=seen) as other,
        serving(Odd, target=f"{other}/stolen", seen=[]) as address,
        pytest.raises(EngineError, match="HTTP 302"),
    ):
        Endpoint(address).call("/models", retries=0)
    assert not seen


@pytest.mark.parametrize(("key", "sent"), [("KEY-1\n", "KEY-1"), ("", ""), ("a b", None), ("sch\u00fcssel", None)])
def test_a_key_that_no_request_can_hold_is_named(monkeypatch, key: str, sent: str | None) -> None:
    """A file that it was read from may end with a line break, in which `http.client` raises what nobody understands."""
    monkeypatch.setenv(KEY_VARIABLE, key)
    if sent is None:
        with pytest.raises(ConfigError, match=r"environment variable OPENAI_API_KEY: expected printable ASCII"):
            sent_key()
    else:
        assert sent_key() == sent


def test_a_reply_without_an_end_is_none() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(Odd, seen=[]) as address, pytest.raises(EngineError, match="at most 67108864 bytes"):
        Endpoint(address).call("/models", retries=0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


# -------------------------------------------------------------------------------------------------------- terminals

STEERING = "\x1b]0;PWNED\x07\x1b[2J\x9b31m\u202eEVIL\u2066\r\x7f\ufeff"


def test_what_steers_a_terminal_is_shown() -> None:
    assert visible("a\n\tb é 🎧 שלום") == "a\n\tb é 🎧 שלום"
    assert visible("\x1b[31m\x9b\u202e") == "\\u001b[31m\\u009b\\u202e"
    assert json.loads(visible(json.dumps(STEERING, ensure_ascii=False))) == STEERING
    assert one_line("a\nb\r\x1b") == "a\\nb\\r\\u001b"


class Steering(ChatServer):
    def chat(self, body: dict[str, Any]) -> None:
        self.answer(STEERING + "hello")


def test_verbs_print_strangers_texts_visibly(tmp_path: Path, parts, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "s", lambda tar: good(tar, parts, question=STEERING + "?", meta={STEERING: STEERING}))
    main(["inspect", str(folder)])
    with serving(Steering) as address:
        main(["ask", str(ROOT / "tests" / "data" / "previous" / "beep.wav"), "q", "--url", address])
        main(["ask", str(ROOT / "tests" / "data" / "previous" / "beep.wav"), "q", "--url", address, "--json"])
    main(["inspect", str(tmp_path / STEERING)])
    said = capsys.readouterr()
    assert "EVIL" in said.out and "hello" in said.out and "EVIL" in said.err
    assert not set(STEERING) & set("\x1b\x07\x9b\u202e\u2066\x7f\ufeff") & set(said.out + said.err.replace("\r", ""))
    last = said.out.strip().splitlines()[-1]
    assert json.loads(last)["answer"].endswith("hello")


# ------------------------------------------------------------------------------------------------- what was left


def test_memory_that_killed_processes_left_is_swept(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from audio_llm.serving.scratch import sweep

    old = time.time() - 3600
    kept = {"audio-llm-engine-held", "audio-llm-engine-new", "other"}
    for name in (*kept, "audio-llm-engine-dead"):
        (tmp_path / name / "model").mkdir(parents=True)
    process = held(tmp_path / "audio-llm-engine-held")
    (tmp_path / "audio-llm-engine-link").symlink_to(tmp_path / "other")
    for name in ("audio-llm-engine-held", "audio-llm-engine-dead", "other"):
        os.utime(tmp_path / name, (old, old))
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept | {"audio-llm-engine-link"}
    process.communicate()


def test_pickles_from_elsewhere_are_not_resumed(tmp_path: Path) -> None:
    from audio_llm.errors import ConfigError
    from audio_llm.training.callbacks import COMPLETE, pickles
    from audio_llm.training.run import find_resume

    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    (checkpoint / "global_step4" / "mp_rank_00_model_states.pt").write_bytes(b"pickle")
    files.write_json(checkpoint / COMPLETE, {"step": 4, "seed": 1, "pickles": pickles(checkpoint)})
    assert find_resume(tmp_path, "auto", {"seed": 1}) == checkpoint
    subprocess.run(["cp", "-a", str(tmp_path), str(tmp_path.with_name("elsewhere"))], check=True)
    shipped = tmp_path.with_name("elsewhere")
    with pytest.raises(ConfigError, match="runs code"):
        find_resume(shipped, "auto", {"seed": 1})
    named = shipped / "checkpoint-4"
    assert find_resume(shipped, str(named), {"seed": 1}) == named
