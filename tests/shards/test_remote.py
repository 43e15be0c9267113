"""Shards behind an address: the same samples, a bounded cache, broken connections, and a run that goes on exactly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from audio_llm import config
from audio_llm.cli import main
from audio_llm.errors import ConfigError, ShardError
from audio_llm.shards import remote
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import sft
from tests.servers import serving

pytest.importorskip("aiohttp")


class Store(SimpleHTTPRequestHandler):
    """A folder over HTTP. `broken` requests of shards fail: by a status, or in the middle of their bytes."""

    folder = ""
    broken: list[str] = []
    asked: list[str] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=self.folder)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.endswith(".tar") and self.broken:
            if (how := self.broken.pop(0)) == "status":
                return self.send_error(503)
            data = (Path(self.folder) / self.path.strip("/")).read_bytes()
            self.send_response(200)
            if how in ("slow", "endless", "silent"):
                self.end_headers()
                return self.trickle(how, data)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1000])
            return self.connection.close() if how == "cut" else None
        return super().do_GET()

    def trickle(self, how: str, data: bytes) -> None:
        """A shard in ten parts over a second; one that has no end; one that stops after its first part."""
        part, count = len(data) // 10 + 1, 0
        with contextlib.suppress(OSError):  # whoever asked may have gone
            while how == "endless" or count < 10:
                self.wfile.write(data[count * part : (count + 1) * part] if count < 10 else data)
                self.wfile.flush()
                if how != "endless":
                    time.sleep(0.1)
                if how == "silent":
                    return time.sleep(1.0)
                count += 1

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch, shards) -> Iterator[tuple[str, Path, dict[str, list[str]]]]:
    """The address of a folder of three shards, the folder, and what its server was asked and will break."""
    folder = tmp_path / "store"
    shutil.copytree(shards(), folder / "train", ignore=shutil.ignore_patterns("index*"))
    monkeypatch.setenv("AUDIO_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02))
    facts: dict[str, list[str]] = {"broken": [], "asked": []}
    with serving(Store, folder=str(folder), **facts) as url:
        yield f"{url}/train", folder / "train", facts


def fetched(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))


def test_an_address_is_one_however_it_was_kept() -> None:
    assert remote.address(Path("s3://bucket/a b/train/")) == "s3://bucket/a b/train"
    assert remote.address("https://host:80/x") == "https://host:80/x" == remote.address(Path("https://host:80/x"))
    assert remote.address("runs/s3:/x") is None and remote.address(Path("/data/train")) is None


def test_the_same_samples_are_read(store, tmp_path: Path, capsys) -> None:
    url, folder, facts = store
    here, there = ShardDataset(folder), ShardDataset(Path(url))
    assert len(there) == len(here) == 24 and fetched(tmp_path) == [f"shard-00000{n}.tar" for n in range(3)]
    for number in (0, 9, 23):
        assert there.load_sample(number) == here.load_sample(number)
        assert there.load_audio_bytes(number) == here.load_audio_bytes(number)
    asked = len(facts["asked"])
    again = ShardDataset(url)  # the index and the shards are here: sizes.json alone is asked for
    assert again.load_sample(5) == here.load_sample(5) and again.fingerprint == there.fingerprint
    assert all(path.endswith("sizes.json") for path in facts["asked"][asked:])
    assert main(["inspect", url]) == 0 and f"{url}/" in capsys.readouterr().out


def test_the_cache_is_bounded(store, tmp_path: Path, monkeypatch) -> None:
    url, folder, facts = store
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    monkeypatch.setenv("AUDIO_LLM_CACHE_GB", str(2.2 * size / 1e9))
    dataset = ShardDataset(url)
    assert len(fetched(tmp_path)) == 2
    for number in (0, 8, 16, 0, 8, 16, 23):
        assert dataset.load_sample(number).id.startswith("tiny")
        assert len(fetched(tmp_path)) <= 2
    monkeypatch.setenv("AUDIO_LLM_CACHE_GB", "none")
    with pytest.raises(ConfigError, match="AUDIO_LLM_CACHE_GB: expected gigabytes"):
        ShardDataset(url)


@pytest.mark.parametrize("how", ["status", "cut", "short"])
def test_a_broken_connection_is_tried_again_then_told(how: str, store, tmp_path: Path, capsys) -> None:
    url, _, facts = store
    facts["broken"] += [how, how]
    assert len(ShardDataset(url)) == 24 and "next try in" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    facts["broken"] += [how] * 3
    with pytest.raises(remote.StoreError, match=r"shard-000000\.tar: expected the bytes .*Mend the connection"):
        ShardDataset(url)
    assert not fetched(tmp_path) and not list((tmp_path / "cache").rglob("*.tmp"))
    facts["broken"].clear()
    assert len(ShardDataset(url)) == 24


def test_a_shard_may_take_its_time_and_no_more_than_its_bytes(store, tmp_path: Path, monkeypatch, capsys) -> None:
    """aiohttp ends a reply after five minutes, here a third of a second; a silent server is given up, one that sends
    more than the shard has is not let fill the disk."""
    import aiohttp

    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
    url, _, facts = store
    facts["broken"] += ["slow"]
    assert len(ShardDataset(url)) == 24 and "next try" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(remote, "SILENCE", 0.4)
    facts["broken"] += ["endless", "silent"]
    assert len(ShardDataset(url)) == 24
    told = capsys.readouterr().err
    assert "more than" in told and told.count("next try in") == 2
    (size,) = {len(path.read_bytes()) for path in (tmp_path / "cache").rglob("shard-000000.tar")}
    assert f"more than {size} bytes" in told and not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_no_broken_connection(reason: int, monkeypatch) -> None:
    """Nothing passes by itself there, and the cure is another."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))

    def write(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason), "shard.tar")

    with pytest.raises(OSError, match=os.strerror(reason)):
        remote._tried("memory://x", write)


def test_what_is_no_folder_of_shards_is_one_sentence(store, tmp_path: Path, capsys) -> None:
    url, folder, _ = store
    assert main(["inspect", f"{url}/gone"]) == 2
    assert "sizes.json: expected a file, found none of that name" in capsys.readouterr().err
    (folder / "sizes.json").write_text(json.dumps({"shards": {"../x.tar": {"bytes": 1, "sha256": "0" * 64}}}))
    with pytest.raises(ShardError, match="names and checksums of shards"):
        ShardDataset(url)


def test_a_run_whose_connection_breaks_goes_on_exactly(store, tmp_path: Path, checkpoint, monkeypatch) -> None:
    """From an address, with a cache that is too small; cut in mid-epoch, then resumed: the losses of a whole run."""
    url, folder, facts = store
    monkeypatch.setenv("AUDIO_LLM_CACHE_GB", str(1.5 * max(p.stat().st_size for p in folder.glob("*.tar")) / 1e9))
    model = checkpoint()

    def recipe(name: str) -> sft.SFTRecipe:
        keys = {"output": str(tmp_path / name), "model": {"path": str(model)}, "data": {"train": [url]}, "steps": 6}
        keys |= {"batch_size": 4, "precision": "fp32", "export": [], "save_steps": 2, "lora": {"rank": 4, "alpha": 8}}
        return config.build(sft.SFTRecipe, keys)

    def losses(name: str) -> list[Any]:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    sft.run(recipe("whole"))
    real, count = remote.Remote.fetch, 0

    def fetch(self: remote.Remote, name: str) -> Path:
        nonlocal count
        count += 1
        if count == 14:
            facts["broken"] += ["cut"] * 3
            shutil.rmtree(self.folder)
        return real(self, name)

    monkeypatch.setattr(remote.Remote, "fetch", fetch)
    with pytest.raises(remote.StoreError, match="Mend the connection"):
        sft.run(recipe("cut"))
    facts["broken"].clear()
    sft.run(recipe("cut"))
    assert losses("cut") == losses("whole") and len(losses("whole")) == 6


@pytest.mark.slow
def test_an_object_store_is_read_and_its_loss_told(shards, tmp_path: Path, monkeypatch) -> None:
    """S3's protocol, by a server of it on this machine: pip install 'moto[s3,server]' s3fs."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AUDIO_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    try:
        files = S3FileSystem(skip_instance_cache=True)
        files.mkdir("sounds")
        files.put(str(shards()), "sounds/train", recursive=True)
        here, there = ShardDataset(shards()), ShardDataset(Path("s3://sounds/train"))
        assert [there.load_sample(n) for n in range(24)] == [here.load_sample(n) for n in range(24)]
        assert there.load_audio_bytes(7) == here.load_audio_bytes(7)
        with pytest.raises(remote.StoreError, match=r"s3://sounds/test/sizes\.json: expected a file"):
            ShardDataset("s3://sounds/test")
    finally:
        server.stop()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(remote.StoreError, match=r"s3://sounds/train/.*Mend the connection"):
        there.load_sample(0)
