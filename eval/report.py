"""One self-contained HTML file about one or several runs: numbers with intervals, curves, directions, and sounds to
hear beside what the model said about them. Nothing in it is fetched from anywhere."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import Waveform, encode, limit_peak
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import read_lines
from audio_llm.prompts import read_reply
from eval import charts
from eval.benchmarks import open_benchmark
from eval.expectations import Finding
from eval.predictions import Prediction, read, read_manifest
from eval.scorers.base import Score, Scorer
from eval.scoring import HEADLINE, Cell, compare
from eval.statistics import Estimate
from eval.tables import RunSummary, headline_of, summarise_run

CLIPS, FAILURES, KINDS = 12, 40, 24
DIRECTIONS = ("front", "left", "behind", "right")
# Which logged quantities become curves, in this order; a name that matches none of them is left to metrics.jsonl.
CURVES = (
    r"^loss$",
    r"^(train|eval|validation)[_/]loss$",
    r"^reward$",
    r"^rewards/.*mean$",
    r"^(eval|validation)[_/](.*accuracy|mean_ap|exact|left_right|front_back|direction_mae|frame_f1)$",
    r"^.*(accuracy|parity|delta_logp|max_abs).*$",
    r"^(kl|entropy)$",
    r"^completions/mean_length$",
    r"^groups/zero_variance_share$",
)
MAX_CURVES = 12


@dataclass
class Run:
    """A run folder as the report needs it."""

    folder: Path
    summary: RunSummary
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.summary.name

    def score(self, row: Prediction) -> Score | None:
        """The headline score of one of its answers."""
        return self.summary.scorer.score(row)

    @property
    def main_rows(self) -> list[Prediction]:
        return self.summary.rows.get("greedy") or self.summary.rows.get("sampled") or []


def load_runs(arguments: Sequence[str]) -> list[Run]:
    """``RUN`` or ``NAME=RUN`` folders. Raises for a folder without predictions and for a name used twice."""
    runs: list[Run] = []
    for argument in arguments:
        name, path = split_name(argument)
        folder = Path(path)
        manifest = read_manifest(folder) if folder.is_dir() else {}
        runs.append(Run(folder, summarise_run(name, read(folder), scorer=headline_of(manifest)), manifest))
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(describe(f"run '{name}'", "a name of its own", "several", "Name them: NAME=FOLDER."))
    return runs


def split_name(argument: str) -> tuple[str, str]:
    """``NAME=FOLDER`` → both; a bare folder gives its own name."""
    name, separator, path = argument.partition("=")
    if separator and not Path(argument).exists():
        return name, path
    return Path(argument).resolve().name, argument


def build(runs: Sequence[Run], training: Sequence[str] = (), findings: Sequence[Finding] = (), *, title: str) -> str:
    """The whole page. The last run is the one whose directions, sounds and failures are shown."""
    last = runs[-1]
    sections = [
        ("Results", headline(runs) + expectations(findings)),
        ("Differences on the same questions", differences(runs)),
        ("By kind of question", by_kind(runs)),
        ("Controls", controls(runs)),
        ("Learning", learning(training)),
        (f"Directions: {last.name}", directions(last)),
        (f"Listen: {last.name}", listen(last)),
        (f"What went wrong: {last.name}", failures(last)),
        ("How these numbers were made", manifests(runs)),
    ]
    body = "".join(f"<section><h2>{_e(name)}</h2>{text}</section>" for name, text in sections if text)
    style = files("eval").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{_e(title)}</title><style>{style}</style></head><body><main>'
        f"<header><h1>{_e(title)}</h1><p>{_e(_subtitle(runs))}</p></header>{tiles(runs)}{body}</main></body></html>\n"
    )


def _subtitle(runs: Sequence[Run]) -> str:
    main = runs[-1].summary.main
    count = main.accuracy.n if main else 0
    data = ", ".join(dict.fromkeys(Path(folder).name for folder in runs[-1].manifest.get("data", [])))
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {count} held-out questions" + (
        f" from {data}" if data else ""
    )


# --------------------------------------------------------------------------------------------------------- numbers


def tiles(runs: Sequence[Run]) -> str:
    """The four numbers to take away, of the last run."""
    last = runs[-1].summary
    if last.main is None:
        return ""
    accuracy, chance = last.main.accuracy, last.main.chance
    above = f"95 % interval {100 * (accuracy.low - chance):+.1f} – {100 * (accuracy.high - chance):+.1f}"
    entries = [
        (_percent(accuracy.value), f"{last.name}: right answers", f"chance {_percent(chance)}"),
        (f"{100 * (accuracy.value - chance):+.1f}", "points above chance", above),
    ]
    if "silence" in last.controls:
        entries.append((_percent(last.controls["silence"].accuracy.value), "right in silence", "should be chance"))
    if last.flips is not None and last.flips.share.n:
        entries.append(
            (
                _percent(last.flips.share.value),
                "follow swapped ears",
                f"of {last.flips.share.n} right left/right answers",
            )
        )
    cards = "".join(
        f'<div class="tile"><b>{_e(value)}</b><span>{_e(label)}</span><small>{_e(note)}</small></div>'
        for value, label, note in entries
    )
    return f'<div class="tiles">{cards}</div>'


def headline(runs: Sequence[Run]) -> str:
    """One row a run: greedy and sampled accuracy, chance, silence, swapped channels, unreadable replies."""
    warm = max((run.summary.sampled_temperature for run in runs), default=0.0)
    head = [
        "run",
        "greedy",
        f"one sample, T={warm:g}",
        "chance",
        "silence",
        "swap follows",
        "unread",
        "cut",
        "tokens",
        "questions",
    ]
    rows = []
    for index, run in enumerate(runs):
        found, main = run.summary, run.summary.main
        if main is None:
            continue
        flips = found.flips.share if found.flips is not None and found.flips.share.n else None
        silence = found.controls.get("silence")
        errors = f" <small>+ {main.errors} not asked</small>" if main.errors else ""
        rows.append(
            [
                f'<i class="dot" style="background:{charts.colour(index)}"></i>{_e(run.name)}',
                _cell(found.greedy),
                _cell(found.sampled),
                _percent(main.chance),
                _cell(silence),
                _estimate(flips) if flips else "–",
                str(main.parse_failures),
                str(main.truncated),
                f"{main.mean_completion_tokens:.0f}",
                f"{main.accuracy.n}{errors}",
            ]
        )
    note = (
        "Accuracy in percent with its 95 % interval. <b>Chance</b>: one over the number of choices, and for open "
        "questions the best constant answer. <b>Silence</b>: the same questions with the sound taken away. <b>Swap "
        "follows</b>: of the right left/right answers, how many turn round when the channels are exchanged. "
        "<b>Unread</b>: replies without a readable answer, counted as wrong. <b>Cut</b>: replies that reached the "
        "token limit. "
        "<b>Questions</b> is the denominator; those that could not be asked are not in it."
    )
    return charts.table(head, rows) + f'<p class="note">{note}</p>'


def expectations(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    rows = [
        [
            '<b class="good">met</b>' if finding.passed else '<b class="bad">not met</b>',
            _e(finding.name),
            _e(finding.found),
            _e(finding.wanted),
        ]
        for finding in findings
    ]
    return "<h3>Expectations</h3>" + charts.table(["", "what", "found", "wanted"], rows)


def differences(runs: Sequence[Run]) -> str:
    """Every later run minus every earlier one, on the questions both answered."""
    rows = []
    for later in range(1, len(runs)):
        for earlier in range(later - 1, -1, -1):
            a, b = runs[earlier], runs[later]
            cells = [_e(f"{b.name} − {a.name}")]
            for way in ("greedy", "sampled"):
                if way not in a.summary.rows or way not in b.summary.rows:
                    cells += ["–", "–"]
                    continue
                found = compare(a.summary.rows[way], b.summary.rows[way], scorer=b.summary.scorer)
                if found.difference.n == 0:
                    cells += ["no common questions", "–"]
                    continue
                css = "good" if found.difference.low > 0 else "bad" if found.difference.high < 0 else ""
                test = found.mcnemar
                cells.append(f'<span class="{css}">{_signed(found.difference)}</span>')
                cells.append(f"{test.only_second} : {test.only_first}, p {_p(test.p_value)}" if test else "–")
            rows.append(cells)
    if not rows:
        return ""
    note = (
        "Difference in points with a paired bootstrap 95 % interval (whole clips are drawn); then questions that only "
        "the one : only the other run got right, with the exact McNemar test."
    )
    head = ["difference", "greedy", "won : lost", "one sample", "won : lost"]
    return charts.table(head, rows) + f'<p class="note">{note}</p>'


def by_kind(runs: Sequence[Run]) -> str:
    kinds = list(runs[-1].summary.by_type)
    kinds += [kind for run in runs for kind in run.summary.by_type if kind not in kinds]
    groups = []
    for kind in dict.fromkeys(kinds[:KINDS]):
        cells = [(run.name, run.summary.by_type.get(kind)) for run in runs]
        entries = [
            charts.Bar(name, cell.accuracy.value, cell.accuracy.low, cell.accuracy.high, cell.accuracy.n)
            if cell
            else charts.Bar(name, math.nan, 0, 0, 0)
            for name, cell in cells
        ]
        groups.append((kind, next(cell.chance for _, cell in cells if cell), entries))
    chart = charts.legend([run.name for run in runs]) + charts.bars(groups)
    return chart + _parts_table(runs[-1]) + _format_table(runs)


def _parts_table(run: Run) -> str:
    """Direction axes and distance of composite answers."""
    rows = [
        [_e(kind), _e(part), _estimate(value), str(value.n)]
        for kind, cell in run.summary.by_type.items()
        for part, value in cell.parts.items()
    ]
    if not rows:
        return ""
    return f"<h3>Parts of an answer: {_e(run.name)}</h3>" + charts.table(["kind", "part", "right", "questions"], rows)


def _format_table(runs: Sequence[Run]) -> str:
    formats = list(dict.fromkeys(name for run in runs for name in run.summary.by_format))
    if len(formats) < 2:
        return ""
    rows = [
        [_e(name), *(_cell(run.summary.by_format.get(name)) for run in runs), _percent(_first_chance(runs, name))]
        for name in formats
    ]
    return "<h3>By format</h3>" + charts.table(["format", *(run.name for run in runs), "chance"], rows)


def _first_chance(runs: Sequence[Run], name: str) -> float:
    return next(run.summary.by_format[name].chance for run in runs if name in run.summary.by_format)


def controls(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.summary.controls))
    if not names:
        return ""
    rows = []
    for name in names:
        for run in runs:
            cell = run.summary.controls.get(name)
            if cell is None or run.summary.main is None:
                continue
            rows.append(
                [_e(name.replace("_", " ")), _e(run.name), _cell(cell), _percent(cell.chance), str(cell.accuracy.n)]
            )
    gaps = [f"{_e(run.name)} {_signed(run.summary.silence_gap)}" for run in runs if run.summary.silence_gap is not None]
    gap = (
        f'<p class="note">What the sound adds (accuracy minus accuracy in silence, points): {"; ".join(gaps)}.</p>'
        if gaps
        else ""
    )
    note = (
        '<p class="note"><b>Silence</b>: zeros of the same length. <b>Swap</b>: left and right exchanged, scored '
        "against the mirrored truth, on questions whose answer turns on the side. <b>Other audio</b>: the sound of "
        "another question. <b>Shuffled options</b>: the same sound, the choices in another order.</p>"
    )
    return charts.table(["control", "run", "right", "chance", "questions"], rows) + gap + note


# -------------------------------------------------------------------------------------------------------- learning


def learning(training: Sequence[str]) -> str:
    """Curves of every training run that has a ``metrics.jsonl``."""
    blocks = []
    for argument in training:
        name, path = split_name(argument)
        records = read_metrics(Path(path))
        drawn = [charts.lines(key, [(key, *_series(records, key))]) for key in curve_names(records)]
        text = "".join(chart for chart in drawn if chart)
        where = _e(name) if records else f"{_e(name)} <small>no metrics.jsonl found</small>"
        blocks.append(f'<h3>{where}</h3><div class="curves">{text}</div>')
    return "".join(blocks)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Complete lines of ``metrics.jsonl`` (a running training may be writing the last one)."""
    return read_lines(folder / "metrics.jsonl" if folder.is_dir() else folder)


def curve_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Logged numbers worth a curve: those of ``CURVES`` with at least three values, best known first."""
    counts: dict[str, int] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                counts[key] = counts.get(key, 0) + 1
    chosen: list[str] = []
    for pattern in CURVES:
        chosen += [key for key, n in counts.items() if n >= 3 and key not in chosen and re.match(pattern, key)]
    return chosen[:MAX_CURVES]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [
        (float(record.get("step", index)), float(record[key]))
        for index, record in enumerate(records)
        if isinstance(record.get(key), (int, float))
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


# ------------------------------------------------------------------------------------------------------ directions


def directions(run: Run) -> str:
    """A confusion map of direction words, and accuracy by the true azimuth of single sounds."""
    labels = [*DIRECTIONS, "none"]
    counts = np.zeros((len(DIRECTIONS), len(labels)))
    sectors: dict[int, list[float]] = {}
    for row in run.main_rows:
        found = run.score(row)
        gold = row.gold.casefold()
        if found is None or gold not in DIRECTIONS:
            continue
        answer = (found.answer or "none").casefold()
        counts[DIRECTIONS.index(gold), labels.index(answer) if answer in labels else -1] += 1
        azimuths = [event["azimuth"] for event in row.events if event.get("azimuth") is not None]
        if len(azimuths) == 1:
            sectors.setdefault(round(azimuths[0] / 30) % 12, []).append(found.value)
    if not counts.sum():
        return ""
    present = [index for index in range(len(DIRECTIONS)) if counts[index].sum() or counts[:, index].sum()]
    unread = [len(DIRECTIONS)] if counts[:, -1].sum() else []
    order = present + unread
    square = charts.confusion([labels[index] for index in order], counts[np.ix_(present, order)])
    wedges = [(30.0 * index, 28.0, float(np.mean(values)), len(values)) for index, values in sorted(sectors.items())]
    compass = charts.compass(wedges) if wedges else ""
    note = f"Left: percent of each true direction ({int(counts.sum())} questions that have one word for an answer)." + (
        " Right: the share of right answers by where a single sound truly was, seen from above." if wedges else ""
    )
    return f'<div class="pair">{square}{compass}</div><p class="note">{note}</p>'


# --------------------------------------------------------------------------------------------------- sounds, failures


def listen(run: Run) -> str:
    """A dozen clips with spectrogram, question, reasoning and answer: two right ones for each wrong one."""
    chosen = choose_clips(run.main_rows, run.summary.scorer)
    sounds = _waveforms(run, [row.id for row in chosen])
    if not sounds:
        return '<p class="note">The shards of this run are not where they were; their sounds cannot be shown.</p>'
    scored = [(row, run.score(row)) for row in chosen if row.id in sounds]
    cards = [_clip_card(row, found, sounds[row.id]) for row, found in scored if found is not None]
    return f'<div class="clips">{"".join(cards)}</div>'


def choose_clips(rows: Sequence[Prediction], scorer: Scorer = HEADLINE) -> list[Prediction]:
    """Up to ``CLIPS`` rows, kinds of question in turn, every third one wrong where there are such."""
    piles: dict[bool, list[Prediction]] = {True: [], False: []}
    turns: dict[tuple[bool, str], int] = {}
    ranked: list[tuple[int, int, bool, Prediction]] = []
    for index, row in enumerate(rows):
        found = scorer.score(row)
        if found is None:
            continue
        right = found.value == 1.0
        turn = turns.setdefault((right, row.question_type), 0)
        turns[right, row.question_type] += 1
        ranked.append((turn, index, right, row))
    for _, _, right, row in sorted(ranked, key=lambda entry: entry[:2]):
        piles[right].append(row)
    wrong = piles[False][: max(CLIPS // 3, CLIPS - len(piles[True]))]
    chosen = piles[True][: CLIPS - len(wrong)] + wrong
    order = {id(row): index for index, row in enumerate(rows)}
    return sorted(chosen, key=lambda row: order[id(row)])


def _waveforms(run: Run, wanted: Sequence[str]) -> dict[str, Waveform]:
    """The clips of `wanted` from the run's data, as far as they are still there."""
    data = run.manifest.get("data", [])
    if not wanted or not data:
        return {}
    sounds: dict[str, Waveform] = {}
    try:
        collection = open_benchmark(run.manifest.get("benchmark", "scenes"), data, **run.manifest.get("options", {}))
        places = {item.id: index for index, item in enumerate(collection.items)}
        for name in wanted:
            sounds[name] = collection.waveform(places[name])
    except (AudioLLMError, KeyError):  # the report is about stored answers; data that changed costs only its sounds
        return sounds
    return sounds


def _clip_card(row: Prediction, found: Score, waveform: Waveform) -> str:
    picture = charts.spectrogram(waveform.samples, waveform.sample_rate)
    player = charts.data_url("audio/wav", _playable(waveform))
    ears = {"binaural": "left ear above, right ear below", "stereo": "left above, right below", "foa": "W, Y, Z, X"}
    label = ears.get(waveform.layout, "mono")
    verdict = "right" if found.value == 1 else "wrong"
    return (
        f'<article class="clip {verdict}"><img src="{picture}" alt="spectrogram, {label}" '
        f'title="{label}"><audio controls preload="none" src="{player}"></audio>'
        f'<p class="kind">{_e(row.question_type)}{_truth(row)}</p>{_exchange(row, found)}</article>'
    )


def _exchange(row: Prediction, found: Score) -> str:
    """Question, reasoning and answer, right or wrong."""
    reply = read_reply(row.raw, row.choices)
    marks = {found.answer: "said", row.gold: "gold"}
    options = "".join(f'<li class="{marks.get(choice, "")}">{_e(choice)}</li>' for choice in row.choices)
    thinking = f'<p class="think">{_e(reply.thinking)}</p>' if reply.thinking else ""
    answer = found.answer if found.answer is not None else (reply.answer or "nothing readable")
    gold = "" if found.value == 1 else f" <span>truth: {_e(row.gold)}</span>"
    mark = "✓" if found.value == 1 else "✗"
    return (
        f'<p class="question">{_e(row.question)}</p><ol class="options">{options}</ol>{thinking}'
        f'<p class="answer"><b>{mark}</b> {_e(answer)}{gold}</p>'
    )


def _truth(row: Prediction) -> str:
    places = [
        f"{event['label']} at {event['azimuth']:.0f}°"
        + (f", {event['distance']:.1f} m" if event.get("distance") else "")
        for event in row.events
        if event.get("label") and event.get("azimuth") is not None
    ]
    return f" <small>{_e('; '.join(places))}</small>" if places else ""


def _playable(waveform: Waveform) -> bytes:
    """WAV bytes that any browser plays: four-channel audio as the two channels of a pair of opposite cardioids."""
    if waveform.layout == "foa":
        w, y = waveform.samples[0], waveform.samples[1]
        waveform = Waveform(np.stack([(w + y) / 2, (w - y) / 2]), waveform.sample_rate, "stereo")
    return encode(limit_peak(waveform), "wav")


def failures(run: Run) -> str:
    """Wrong answers and unreadable replies, kinds in turn, with the raw reply."""
    wrong = [(row, found) for row in run.main_rows if (found := run.score(row)) is not None and found.value < 1]
    refused = [row for row in run.main_rows if row.error]
    turns: dict[str, int] = {}
    ranked = []
    for index, (row, found) in enumerate(wrong):
        turn = turns.get(row.question_type, 0)
        turns[row.question_type] = turn + 1
        ranked.append((found.parsed, turn, index, row, found))
    ranked.sort(key=lambda entry: entry[:3])
    rows = [
        [
            f"<code>{_e(row.id)}</code><br><small>{_e(row.question_type)}</small>",
            _e(row.question) + (f"<br><small>{_e(' · '.join(row.choices))}</small>" if row.choices else ""),
            _e(row.gold),
            _e(found.answer or "–"),
            f"<details><summary>{_e(found.explanation)}</summary><pre>{_e(row.raw)}</pre></details>",
        ]
        for _, _, _, row, found in ranked[:FAILURES]
    ]
    rows += [
        [f"<code>{_e(row.id)}</code>", _e(row.question), _e(row.gold), "not asked", _e(row.error)]
        for row in refused[:10]
    ]
    if not rows:
        return ""
    counts = f"{len(wrong)} wrong, {len(refused)} not asked; {len(rows)} shown, unreadable replies first."
    note = f'<p class="note">{counts}</p>'
    head = ["item", "question", "truth", "answer", "why; open it for the whole reply"]
    return note + charts.table(head, rows, classes={4: "wide"})


# ------------------------------------------------------------------------------------------------------- manifests


def manifests(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        facts = dict(run.manifest)
        settings = facts.pop("settings", {})
        packages = facts.pop("packages", {})
        facts |= {f"setting {name}": value for name, value in settings.items()}
        facts |= {
            "scorer": f"{run.summary.scorer.name} {run.summary.scorer.version}",
            "packages": ", ".join(f"{k} {v}" for k, v in packages.items()),
        }
        facts["macro average over kinds"] = _percent(run.summary.macro_by_type)
        rows = [[_e(name.replace("_", " ")), f"<code>{_e(_plain(value))}</code>"] for name, value in facts.items()]
        blocks.append(f"<details><summary>{_e(run.name)}</summary>{charts.table(['what', 'value'], rows)}</details>")
    return "".join(blocks)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "", {}) else str(value)


def _cell(cell: Cell | None) -> str:
    return _estimate(cell.accuracy) if cell is not None and cell.accuracy.n else "–"


def _estimate(value: Estimate) -> str:
    return f"<b>{100 * value.value:.1f}</b> <small>{_interval(value)}</small>"


def _interval(value: Estimate) -> str:
    return f"{100 * value.low:.1f} – {100 * value.high:.1f}"


def _signed(value: Estimate) -> str:
    return f"<b>{100 * value.value:+.1f}</b> <small>{100 * value.low:+.1f} – {100 * value.high:+.1f}</small>"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.4f}"


def _e(text: Any) -> str:
    return html.escape(str(text))
