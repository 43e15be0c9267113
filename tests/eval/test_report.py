"""The report: numbers in the page are those of the predictions, the page is whole in itself, limits are held to."""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_llm.cli import main
from audio_llm.errors import ConfigError
from audio_llm.files import write_json
from audio_llm.language.mirroring import mirror_text
from audio_llm.shards.reader import ShardDataset
from eval.figures import charts
from eval.figures import runs as stored
from eval.figures.expectations import read_expectations, verify
from eval.predictions import Prediction, PredictionWriter
from eval.report import results
from eval.report.learning import learning
from eval.report.sounds import CLIPS, side_of
from tests.paths import ROOT
from tests.servers import serving


def make_run(folder: Path, shards: Path, skill: float, seed: int) -> Path:
    """Answers of somebody who knows the side with probability `skill` and guesses otherwise, in silence always."""
    dataset, rng = ShardDataset(shards), np.random.default_rng(seed)
    with PredictionWriter(folder / "predictions.jsonl") as writer:
        for number in range(len(dataset)):
            sample = dataset.load_sample(number)
            gold = str(sample.answer)

            def said(truth: str, skill: float) -> str:
                answer = truth if rng.random() < skill else ("left", "right")[int(rng.integers(2))]
                return f"<think>a <b>loud</b> noise</think>\n<answer>{answer}</answer>"

            fields = dict(
                id=sample.id, question_type="side", format="mmau", question=sample.question, finish_reason="stop"
            )
            fields |= dict(
                choices=sample.choices, events=[{"label": "noise", "azimuth": 90.0 if gold == "left" else -90.0}]
            )
            writer.write(
                [
                    Prediction(**fields, gold=gold, raw=said(gold, skill)),
                    Prediction(**fields, gold=gold, raw=said(gold, skill), temperature=1.0),
                    Prediction(**fields, gold=gold, raw=said(gold, 0), control="silence"),
                    Prediction(**fields, gold=mirror_text(gold), raw=said(mirror_text(gold), skill), control="swap"),
                ]
            )
    write_json(folder / "run.json", {"model": folder.name, "data": [str(shards)], "settings": {"seed": seed}})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards) -> dict[str, Path]:
    folder, data = tmp_path_factory.mktemp("runs"), shards(count=60)
    return {
        name: make_run(folder / name, data, skill, n)
        for n, (name, skill) in enumerate({"weak": 0.1, "good": 1.0}.items())
    }


class Page(HTMLParser):
    """Links out of the page, sources inside it, text, and whether every element was closed."""

    VOID = {"meta", "link", "br", "img", "i", "line", "rect", "circle", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    training = tmp_path_factory.mktemp("training")
    lines = [json.dumps({"step": step, "loss": 3 / (step + 1), "reward": step / 50}) for step in range(50)]
    (training / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
    out = training / "report.html"
    arguments = ["report", f"before SFT={runs['weak']}", f"after SFT={runs['good']}", "--out", str(out)]
    assert main([*arguments, "--training", f"SFT={training}"]) == 0
    return out, Page(out.read_text(encoding="utf-8"))


def test_a_log_of_training_with_damaged_lines_is_told_of(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], "junk", *lines[2:]]) + "\n")
    command = ["report", str(runs["good"]), "--out", str(tmp_path / "r.html"), "--training", str(tmp_path)]
    assert main(command) == 0
    assert "metrics.jsonl: 1 of 6 lines are no JSON objects, line 3 first" in capsys.readouterr().err


def test_page_is_whole_in_itself(page: tuple[Path, Page]) -> None:
    path, parsed = page
    assert parsed.open == []
    links = [source for source in parsed.sources if source.startswith("#")]
    assert len(links) > 5 and all(f'<section id="{link[1:]}">' in path.read_text(encoding="utf-8") for link in links)
    outside = set(parsed.sources) - set(links)
    assert outside and all(source.startswith("data:") for source in outside)
    assert not re.search(r"https?://|@import|<script", path.read_text(encoding="utf-8"))
    assert "<b>loud</b>" not in path.read_text(encoding="utf-8")  # what a model says is text, never markup


def test_numbers_are_those_of_the_predictions(page: tuple[Path, Page], runs: dict[str, Path]) -> None:
    text = re.sub(r"\s+", " ", " ".join(page[1].text))
    summary = stored.load_named([str(runs["weak"])])[0].summary
    assert summary.greedy is not None and summary.greedy.accuracy.n == 60
    lines = (runs["weak"] / "predictions.jsonl").read_text().splitlines()
    greedy = [row for row in map(json.loads, lines) if not row["control"] and row["temperature"] == 0]
    right = sum(f"<answer>{row['gold']}</answer>" in row["raw"] for row in greedy)
    assert summary.greedy.accuracy.value == right / 60
    assert f"{100 * right / 60:.1f}" in text
    for heading in (
        "Differences on the same questions",
        "Controls",
        "Learning",
        "Directions",
        "Listen",
        "What went wrong",
    ):
        assert heading in text or heading == "What went wrong"
    assert "after SFT − before SFT" in text
    assert "reward" in text and "loss" in text


def test_clips_play_what_the_shards_hold(page: tuple[Path, Page], shards) -> None:
    sounds = [source for source in page[1].sources if source.startswith("data:audio/wav;base64,")]
    assert len(sounds) == CLIPS
    dataset = ShardDataset(shards(count=60))
    stored = {dataset.load_waveform(i).samples.tobytes() for i in range(len(dataset))}
    for source in sounds:
        samples, _ = soundfile.read(io.BytesIO(base64.b64decode(source.split(",")[1])), dtype="float32", always_2d=True)
        assert np.ascontiguousarray(samples.T).tobytes() in stored


# Plays every clip of a page, and tells the server what became of each: seconds, or -1 where it cannot be played.
PLAY_ALL = """<script>
const heard = [...document.querySelectorAll("audio")].map((audio) => new Promise((done) => {
  audio.addEventListener("timeupdate", () => { if (audio.currentTime > 0) done(audio.duration); });
  audio.addEventListener("error", () => done(-1));
  audio.muted = true;
  audio.play().catch(() => done(-1));
}));
Promise.all(heard).then((seconds) => fetch("/heard", {method: "POST", body: JSON.stringify(seconds)}));
</script></body>"""


class PageServer(BaseHTTPRequestHandler):
    """Serves one page, and keeps what the page posts."""

    page = b""
    told: queue.Queue[list[float]]

    def do_GET(self) -> None:
        found = self.path == "/page.html"
        self.send_response(200 if found else 204)  # nothing to say of a favicon
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        if found:
            self.wfile.write(self.page)

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def browse(text: str, folder: Path) -> tuple[list[float], list[str]]:
    """What headless Chromium makes of a page: seconds of each clip that it played, and its console's lines."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    flags = "--headless --no-sandbox --disable-gpu --mute-audio --autoplay-policy=no-user-gesture-required".split()
    flags += ["--enable-logging=stderr", "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"]
    told: queue.Queue[list[float]] = queue.Queue()
    page = text.replace("</body>", PLAY_ALL).encode()
    with serving(PageServer, page=page, told=told) as address, (folder / "log").open("w") as log:
        process = subprocess.Popen([browser, *flags, f"{address}/page.html"], stderr=log, start_new_session=True)
        try:
            seconds = told.get(timeout=120)
            time.sleep(0.5)  # the console's lines come by another way
        except queue.Empty:
            pytest.fail((folder / "log").read_text()[-2000:])
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return seconds, [line for line in (folder / "log").read_text().splitlines() if "CONSOLE" in line]


def test_chromium_loads_the_page_without_a_complaint_and_plays_its_clips(
    page: tuple[Path, Page], shards, tmp_path: Path
) -> None:
    seconds, console = browse(page[0].read_text(encoding="utf-8"), tmp_path)
    assert console == []
    assert len(seconds) == CLIPS
    dataset = ShardDataset(shards(count=60))
    stored = [wave.samples.shape[1] / wave.sample_rate for wave in map(dataset.load_waveform, range(len(dataset)))]
    assert all(min(abs(second - length) for length in stored) < 1e-3 for second in seconds)


def test_chromium_would_tell_a_broken_clip_and_a_complaint(page: tuple[Path, Page], tmp_path: Path) -> None:
    text = page[0].read_text(encoding="utf-8")
    text = text.replace("data:audio/wav;base64,", "data:audio/wav;base64,AAAA", 1)
    seconds, console = browse(text.replace("</body>", "<script>console.error('odd')</script></body>"), tmp_path)
    assert seconds.count(-1) == 1
    assert len(console) == 1 and "odd" in console[0]


def test_report_without_its_shards_keeps_its_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(runs["good"], moved)
    write_json(moved / "run.json", {"data": [str(tmp_path / "gone")]})
    assert main(["report", str(moved), "--out", str(tmp_path / "r.html")]) == 0
    assert "cannot be shown" in (tmp_path / "r.html").read_text()


LIMITS = """
checks:
  - {name: it learns, measure: above_chance, run: good, at_least: 0.30}
  - {name: better, measure: difference, run: good, minus: weak, answers: sampled, at_least: 0.04, interval_above: 0}
  - {name: deaf in silence, measure: above_chance, run: good, answers: silence, within: 0.25}
  - {name: follows, measure: flips, run: good, at_least: 0.9}
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": [1]}, "'data': expected a value of type list[str], found [1]"),
        ({"options": {"audio": ["x"]}}, "'options': expected a value of type dict[str, str]"),
        ({"scorer": "letter"}, "'scorer': expected a value of type dict"),
    ],
)
def test_a_manifest_of_another_kind_is_named(
    runs: dict[str, Path], tmp_path: Path, capsys, change: dict, words: str
) -> None:
    shutil.copytree(runs["good"], tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text()) | change
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 2
    assert words in capsys.readouterr().err


def test_a_training_folder_that_is_not_there_is_named(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "r.html"
    assert main(["report", str(runs["good"]), "--training", str(tmp_path / "sft"), "--out", str(out)]) == 2
    assert "a training folder with metrics.jsonl, found nothing there" in capsys.readouterr().err and not out.exists()


def test_limits_are_met_or_not(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    (tmp_path / "met.yaml").write_text(LIMITS)
    common = ["report", str(runs["weak"]), str(runs["good"]), "--out", str(tmp_path / "r.html"), "--check"]
    assert main([*common, str(tmp_path / "met.yaml")]) == 0
    assert "4 of 4 expectations met" in capsys.readouterr().out
    (tmp_path / "not.yaml").write_text(LIMITS.replace("run: good", "run: weak").replace("minus: weak", "minus: good"))
    assert main([*common, str(tmp_path / "not.yaml")]) == 1
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:5]] == ["FAIL", "FAIL", "PASS", "FAIL"]
    assert "not met" in (tmp_path / "r.html").read_text()


def test_a_missing_run_or_pass_is_a_failed_check(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(
        "checks:\n- {name: a, measure: accuracy, run: nobody, at_least: 0}\n"
        "- {name: b, measure: accuracy, run: good, answers: other_audio, at_least: 0}\n"
    )
    loaded = {run.name: run for run in stored.load_named([str(runs["good"])])}
    findings = verify(read_expectations(path), loaded)
    assert [finding.passed for finding in findings] == [False, False]
    assert "no run named 'nobody' among good" in findings[0].found


def test_bad_limits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    for text, message in [
        ("checks: [{name: a, measure: accuracy, run: x}]", "expected at_least"),
        ("checks: [{name: a, measure: difference, run: x, at_least: 0}]", "'minus' belongs to"),
        ("checks: []", "expected at least one check"),
        ("checks: [{name: a, measure: acuracy, run: x, at_least: 0}]", "did you mean 'accuracy'"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_expectations(path)


def test_our_recipe_of_limits_is_valid() -> None:
    checks = read_expectations(ROOT / "recipes" / "quickstart" / "expect.yaml").checks
    assert {check.run for check in checks} == {"SFT", "GRPO"}


def test_the_page_says_what_more_sft_reached(runs: dict[str, Path]) -> None:
    def said(*arguments: str) -> str:
        return re.sub(r"<[^>]+>", "", results.more_sft(stored.load_named(arguments)))

    weak, good = runs["weak"], runs["good"]
    right = stored.load(weak).summary.main.accuracy.value
    assert f"More SFT for the same time reached 100.0 %, GRPO {100 * right:.1f} %" in said(
        f"more SFT={good}", f"GRPO={weak}"
    )
    assert "more SFT is ahead (+" in said(f"more SFT={good}", f"GRPO={weak}")
    assert "more SFT is behind (-" in said(f"more_sft={weak}", f"grpo={good}")
    assert "neither ahead nor behind (+0.0 points" in said(f"more SFT={good}", f"GRPO={good}")
    assert said(str(weak), f"GRPO={good}") == ""


@pytest.mark.parametrize(
    ("azimuth", "words"),
    [
        (-31, "right"),
        (31, "left"),
        (0, "front"),
        (180, "behind"),
        (-180, "behind"),
        (100, "left, behind"),
        (270, "right"),
    ],
)
def test_an_azimuth_has_its_side_in_words(azimuth: float, words: str) -> None:
    assert side_of(azimuth) == f" ({words})"


def test_parity_has_an_axis_of_powers_of_ten_and_its_limit(runs: dict[str, Path], tmp_path: Path) -> None:
    values = [1e-6, 3e-5, 2e-6]
    lines = [json.dumps({"step": n, "parity/max_abs_logp_difference": value}) for n, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text("parity_bound: 0.001\n")
    drawn = learning([f"GRPO={tmp_path}"])
    assert "limit 0.001" in drawn and "GRPO: largest |Δ log p|" in drawn
    assert re.findall(r'class="axis"[^>]*>([^<]*e-0\d|0\.0+1)<', drawn) == ["1e-06", "1e-05", "0.0001", "0.001"]


def test_a_value_stands_beyond_the_whisker_and_the_chance_line() -> None:
    bar = charts.Bar("run", 0.26, 0.2, 0.33, 100)
    drawn = charts.bars([("distance", 0.34, [bar])], label="x")
    end = float(re.search(r'class="whisker"[^>]* x2="([\d.]+)"', drawn)[1])
    value = re.search(r'class="value" x="([\d.]+)"[^>]*text-anchor="end">26<', drawn)
    assert float(value[1]) - 14 > end and drawn.index('class="chance"') < drawn.index('class="value"')


def test_png_is_a_png() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    import matplotlib.image

    read = matplotlib.image.imread(io.BytesIO(charts.png(pixels)), format="png")
    assert np.array_equal(np.round(read[..., :3] * 255).astype(np.uint8), pixels)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (1e-7, 5e-7), (2.0, 2.0), (0, 0), (-0.4, -0.1)])
def test_ticks_enclose_the_curve(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 7


def test_spectrogram_shows_the_tone_in_its_channel() -> None:
    rate = 16000
    tone = np.sin(2 * np.pi * 4000 * np.arange(rate) / rate)
    url = charts.spectrogram(np.stack([tone, 0 * tone]).astype(np.float32), rate, width=100, height=40)
    import matplotlib.image

    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(url.split(",")[1])), format="png")[..., :3].sum(axis=2)
    rows = image.mean(axis=1)
    assert abs(int(np.argmax(rows[:40])) - 20) <= 1  # half of 8 kHz is half-way up the first panel
    assert rows[42:].max() < 0.3  # the silent channel is dark
