"""Which engine answers for a model: each says itself what it recognises."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from audio_llm.answering.base import Engine
from audio_llm.answering.engines import ENGINES, find_engine
from audio_llm.errors import CheckpointError, ConfigError

FOLDERS = {
    "echotwin": {"echotwin": {}},
    "native": {"model_type": "qwen2_audio"},
    "vllm": {"model_type": "audio_llm"},
}


def folder(path: Path, config: dict) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", FOLDERS)
def test_auto_opens_the_one_that_recognises_the_folder(tmp_path: Path, name: str) -> None:
    expected = "echotwin" if name == "echotwin" else "vllm" if find_spec("vllm") else "transformers"
    assert find_engine("auto", folder(tmp_path / "m", FOLDERS[name])) is ENGINES[expected]
    assert find_engine("https://somewhere:1/v1", str(tmp_path / "m")) is ENGINES["http"]


@pytest.mark.parametrize(
    ("kind", "name", "cure"),
    [
        ("echotwin", "native", "--engine transformers or vllm"),
        ("vllm", "echotwin", "--engine echotwin"),
        ("http", "vllm", "or the address of a server"),
    ],
)
def test_an_engine_that_cannot_is_refused_with_those_that_can(tmp_path: Path, kind: str, name: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=f"engine {kind}, model .*{cure}"):
        find_engine(kind, folder(tmp_path / "m", FOLDERS[name]))


@pytest.mark.parametrize("kind", ["auto", "http"])
def test_an_address_in_the_place_of_a_model_is_told_where_it_belongs(kind: str) -> None:
    with pytest.raises(ConfigError, match="found an address.*model's name at that server, and --engine http://h:1/v1"):
        find_engine(kind, "http://h:1/v1")


def test_what_nobody_recognises_is_told_as_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected model_type audio_llm, found qwen3"):
        find_engine("auto", folder(tmp_path / "m", {"model_type": "qwen3"}))


class Parrot(Engine):
    """An engine of somebody else's package."""

    name = "parrot"

    @classmethod
    def recognises(cls, where: str) -> bool:
        return "parrot" in where


def test_an_engine_is_found_by_its_module_and_name() -> None:
    assert find_engine(f"{__name__}:Parrot", "a parrot") is Parrot
