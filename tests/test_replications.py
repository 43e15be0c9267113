"""The pages of published figures: their commands are read by the command line itself, their intervals computed."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, ConfigError
from eval.benchmarks import get_benchmark
from eval.cli.options import key_values, scorer_settings
from eval.figures.estimates import wilson
from eval.scorers import get_scorers
from tests.paths import ROOT

FOLDER = ROOT / "docs" / "replications"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
ROWS = ["published", "by", "model", "data", "prompt", "decoding", "scorer", "interval"]


def rows_of(page: str) -> dict[str, str]:
    text = (FOLDER / f"{page}.md").read_text()
    return {row[1]: row[2] for row in re.finditer(r"^\| (\w[\w ]*) \| (.*) \|$", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_the_command_of_a_page_is_one_that_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", (FOLDER / f"{page}.md").read_text(), re.DOTALL)
    verb, *words = shlex.split(block.replace("\\\n", " "))
    assert verb == "audio-llm" and block.count("audio-llm") == 1
    read: list[argparse.Namespace] = []
    monkeypatch.setattr("eval.cli.eval.run", lambda args: read.append(args) or 0)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    (args,) = read
    assert args.out == f"runs/replications/{page}"
    benchmark = get_benchmark(args.benchmark)
    (data,) = args.data
    with pytest.raises(AudioLLMError) as error:  # the data is not here, and that is all that is wrong
        benchmark.open(Path(data), **key_values(args.option))
    assert not isinstance(error.value, ConfigError), error.value
    named = re.match(r"`([\w-]+)`", rows_of(page)["scorer"])
    assert named is not None and named[1] in benchmark.scorers
    settings = scorer_settings(args)
    assert set(settings) <= set(benchmark.scorers)
    offline = {name: {key: told for key, told in keys.items() if key in ("model",)} for name, keys in settings.items()}
    get_scorers(list(offline), offline)


@pytest.mark.parametrize("page", PAGES)
def test_the_rows_of_a_page_are_whole_and_its_interval_is_right(page: str) -> None:
    rows = rows_of(page)
    assert list(rows) == ROWS and all(rows.values())
    stated = re.match(r"([0-9.]+) % of ([0-9,]+) questions", rows["published"])
    if stated is None:
        assert rows["interval"].startswith("none: ")
        return
    share, count = float(stated[1]) / 100, int(stated[2].replace(",", ""))
    found = wilson(share * count, count)
    assert rows["interval"] == f"{100 * found.low:.1f} to {100 * found.high:.1f} %"


def test_every_page_is_in_the_list() -> None:
    listed = re.findall(r"\]\(([\w.]+)\.md\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == PAGES
