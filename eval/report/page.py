"""The page: its sections in order, and how the numbers in it were made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from audio_llm.files import write_asked
from eval.figures.expectations import Finding
from eval.figures.runs import Run
from eval.report import counterfactual, hearing, results
from eval.report.learning import learning
from eval.report.markup import escape, percent, plain, table
from eval.report.sounds import listening

FILE_NAME = "report.html"  # in a run folder
TITLE = "Evaluation"


def build(
    runs: Sequence[Run], training: Sequence[str] = (), findings: Sequence[Finding] = (), *, title: str = TITLE
) -> str:
    """The whole page. The last run is the one whose habits, directions, sounds and failures are shown."""
    last = runs[-1]
    heard, failed = listening(last)
    sections = [
        ("Results", results.headline(runs) + results.expectations(findings)),
        ("Differences on the same questions", results.differences(runs)),
        ("By kind of question", results.by_kind(runs)),
        ("The same replies under every scorer", results.spectrum(runs)),
        ("Does it listen? Controls", hearing.controls(runs)),
        ("Is it caused by the sound?", counterfactual.pairs(runs)),
        (f"Places of the options: {last.name}", hearing.positions(last)),
        (f"Directions: {last.name}", hearing.directions(last)),
        ("Learning", learning(training, [run.name for run in runs])),
        (f"Listen: {last.name}", heard),
        (f"What went wrong: {last.name}", failed),
        ("How these numbers were made", manifests(runs)),
    ]
    shown = [(f"part-{number}", name, text) for number, (name, text) in enumerate(sections, start=1) if text]
    links = "".join(f'<a href="#{place}">{escape(name)}</a>' for place, name, _ in shown)
    body = "".join(f'<section id="{place}"><h2>{escape(name)}</h2>{text}</section>' for place, name, text in shown)
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>'
        f'<body><nav aria-label="Contents">{links}</nav><main>'
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(runs))}</p></header>"
        f"{results.tiles(runs)}{results.more_sft(runs)}{body}"
        "</main></body></html>\n"
    )


def write(
    out: Path,
    runs: Sequence[Run],
    training: Sequence[str] = (),
    findings: Sequence[Finding] = (),
    *,
    title: str = TITLE,
) -> None:
    """Write the page to `out`, and say so."""
    page = build(runs, training, findings, title=title)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_asked(out, page)
    print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page) / 1e6:.1f} MB")


def _subtitle(runs: Sequence[Run]) -> str:
    main = runs[-1].summary.main
    count = main.accuracy.n if main else 0
    data = ", ".join(dict.fromkeys(Path(folder).name for folder in runs[-1].manifest.get("data", [])))
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {count} held-out questions" + (
        f" from {data}" if data else ""
    )


def manifests(runs: Sequence[Run]) -> str:
    """What a reader needs to repeat each run, that of the last run opened."""
    blocks = []
    for run in runs:
        facts = dict(run.manifest)
        settings = facts.pop("settings", {})
        facts |= {f"setting {name}": value for name, value in settings.items()}
        facts["scorer"] = f"{run.headline.name} {run.headline.version}"
        facts["macro average over kinds"] = percent(run.summary.macro_by_type)
        rows = [
            [escape(name.replace("_", " ")), f"<code>{escape(plain(value))}</code>"] for name, value in facts.items()
        ]
        opened = " open" if run is runs[-1] else ""
        blocks.append(
            f"<details{opened}><summary>{escape(run.name)}</summary>{table(['what', 'value'], rows)}</details>"
        )
    return "".join(blocks)
