"""What ``audio-llm inspect`` shows: tables, checks over whole folders, and one sample as text or as a web page."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from audio_llm.audio import CHANNEL_NAMES, Waveform, encode, limit_peak
from audio_llm.errors import ShardError, describe
from audio_llm.files import write_asked
from audio_llm.shards.index import LAYOUTS, ShardIndex
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Event, Sample

MAX_SHOWN = 5  # examples per problem, lines per distribution × 4
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Pieces = list[tuple[str, bool]]  # texts of a rendered conversation, and whether their tokens carry loss


def shard_table(dataset: ShardDataset) -> str:
    """One line per shard: samples, seconds, layouts, sample rates; rejects and totals per folder."""
    lines = [f"{'shard':<32}{'samples':>9}{'seconds':>11}  layouts, sample rates"]
    for index in dataset.indexes:
        lines.append(f"{index.remote.url if index.remote else index.folder}/")
        for name, part in [*((part.shards[0], part) for part in index.parts()), ("total", index)]:
            lines.append(f"  {name:<30}{len(part):>9}{part.seconds.sum():>11.1f}  {_formats(part)}")
        if index.rejects:
            lines.append(f"  {index.told()}")
    return "\n".join(lines)


def _formats(index: ShardIndex) -> str:
    samples, places, rates = index.formats
    layouts = [LAYOUTS[i] if i >= 0 else "not stated" for i in np.unique(places)]
    several = "" if len(samples) == len(index) else f", {len(samples)} sounds"
    return f"{' '.join(layouts)}, {' '.join(f'{rate} Hz' for rate in np.unique(rates))}{several}"


@dataclass
class Survey:
    """Counts and problems over all samples of a dataset."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: ShardDataset) -> Survey:
        """Read every JSON once. The folders of the dataset are taken as splits that must not share recordings."""
        survey = cls()
        seen: dict[str, str] = {}
        homes: dict[str, set[str]] = {}
        names = [str(index.folder) for index in dataset.indexes for _ in range(len(index))]
        for i in tqdm(range(len(dataset)), desc="reading", unit=" samples", disable=None, leave=False):
            sample = dataset.load_sample(i)
            survey._count(sample)
            if sample.id in seen:
                survey._problem("duplicate ids", f"{sample.id} in {seen[sample.id]} and {names[i]}")
            seen[sample.id] = names[i]
            for recording in sample.recordings:
                homes.setdefault(recording, set()).add(names[i])
        for recording, folders in sorted(homes.items()):
            if len(folders) > 1:
                survey._problem("source recordings in several folders", f"{recording} in {', '.join(sorted(folders))}")
        return survey

    def _count(self, sample: Sample) -> None:
        self._add("task", [sample.task])
        self._add("question type", [str(sample.meta["question_type"])] if "question_type" in sample.meta else [])
        self._add("choices", [str(len(sample.choices))] if sample.choices else [])
        self._add("event label", [event.label for event in sample.events])
        self._add("events per sample", [str(len(sample.events))] if sample.events else [])
        self._add("source", [sample.source.dataset] if sample.source else [])
        self._add("sounds per sample", [str(len(sample.audio))] if len(sample.audio) > 1 else [])
        if not sample.choices or sample.answer is None:
            return
        if len(set(sample.choices)) < len(sample.choices):
            self._problem("repeated choices", sample.id)
        if sample.answer not in sample.choices:
            self._problem("answers that are not among the choices", f"{sample.id}: {sample.answer!r}")
            return
        name = f"answer position of {len(sample.choices)} choices"  # by number: with all in one, A is always ahead
        self._add(name, [LETTERS[sample.choices.index(sample.answer) % len(LETTERS)]])

    def _add(self, name: str, values: Iterable[str]) -> None:
        self.counts.setdefault(name, Counter()).update(values)

    def _problem(self, kind: str, item: str) -> None:
        self.problems.setdefault(kind, []).append(item)

    def text(self) -> str:
        """Distributions, then the checks."""
        lines = []
        place = "answer position"
        for name, counts in sorted(self.counts.items(), key=lambda entry: entry[0] if place in entry[0] else ""):
            if not counts:
                continue
            numbers = name in ("choices", "events per sample", "sounds per sample") or place in name
            pairs = sorted(counts.items()) if numbers else counts.most_common(4 * MAX_SHOWN)
            more = f"  ... and {len(counts) - len(pairs)} more" if len(counts) > len(pairs) else ""
            total = counts.total()
            lines.append(f"{name}: " + "  ".join(f"{v} {n} ({n / total:.0%})" for v, n in pairs) + more)
        checks = ("duplicate ids", "answers that are not among the choices", "repeated choices")
        for kind in (*checks, "source recordings in several folders"):
            items = self.problems.get(kind, [])
            shown = "; ".join(items[:MAX_SHOWN]) + (" ..." if len(items) > MAX_SHOWN else "")
            lines.append(f"check: {kind}: {len(items)}" + (f" ({shown})" if items else ""))
        return "\n".join(lines)


def find_sample(dataset: ShardDataset, chosen: str) -> int:
    """A position from a number or a key. :class:`ShardError` if there is no such sample."""
    if not re.fullmatch(r"-?\d+", chosen):
        return dataset.find(chosen)
    number = int(chosen)
    if not -len(dataset) <= number < len(dataset):
        raise ShardError(describe("--sample", f"a position from 0 to {len(dataset) - 1}, or a key", chosen))
    return number % len(dataset)


def sample_text(dataset: ShardDataset, position: int, shown: Pieces | None) -> str:
    """One sample for the terminal; supervised text stands in ⟦double brackets⟧."""
    lines = [f"{name}: {value}" for name, value in _facts(dataset, position)]
    if meta := _meta(dataset, position):
        lines += ["meta:", *(f"  {name}: {value}" for name, value in meta)]
    if shown is not None:
        lines += ["", "prompt (what stands in ⟦ ⟧ carries loss):"]
        lines.append("".join(f"⟦{text}⟧" if supervised else text for text, supervised in shown))
    return "\n".join(lines)


def _facts(dataset: ShardDataset, position: int) -> list[tuple[str, str]]:
    sample, waveforms = dataset.load_sample(position), dataset.load_waveforms(position)
    folder, row = dataset.locate(position)
    audio = "audio" if len(waveforms) == 1 else "audio {}"
    facts: list[tuple[str, Any]] = [
        ("sample", f"{sample.id} (number {position}, {folder / row.shard})"),
        *((audio.format(number), _audio_text(waveform)) for number, waveform in enumerate(waveforms, 1)),
        ("task", sample.task),
        ("question", sample.question),
        ("sounds before characters", ", ".join(map(str, sample.places))),
        ("choices", "  ".join(f"({LETTERS[i % 26]}) {choice}" for i, choice in enumerate(sample.choices))),
        ("answer", sample.answer),
        ("thinking", sample.thinking),
        *((f"semantic element {name}", _plain(value)) for name, value in sample.semantic_elements.items()),
        *(("event", _event_text(event)) for event in sample.events),
        ("source", sample.source and "/".join(filter(None, vars(sample.source).values()))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _audio_text(waveform: Waveform) -> str:
    levels = ", ".join(
        f"{name} {20 * np.log10(max(_rms(channel), 1e-9)):.1f}"
        for name, channel in zip(CHANNEL_NAMES[waveform.layout], waveform.samples, strict=True)
    )
    return f"{waveform.layout}, {waveform.sample_rate} Hz, {waveform.seconds:.2f} s, level {levels} dBFS"


def _meta(dataset: ShardDataset, position: int) -> list[tuple[str, str]]:
    meta = dataset.load_sample(position).meta
    return [(name, _plain(value)) for name, value in meta.items() if value not in (None, "")]


def _plain(value: Any) -> str:
    """A value of JSON in words: lists with commas, objects as ``key value``."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _event_text(event: Event) -> str:
    units = {"onset": " s", "offset": " s", "azimuth": "°", "elevation": "°", "distance": " m"}
    parts = {name: f"{name} {value:g}{units[name]}" for name in units if (value := getattr(event, name)) is not None}
    if event.azimuth is not None and event.azimuth % 180:
        parts["azimuth"] += " (left)" if event.azimuth > 0 else " (right)"
    return ", ".join([event.label, *parts.values()])


def _rms(channel: np.ndarray) -> float:
    return float(np.sqrt(np.mean(channel.astype(np.float64) ** 2)))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2430 }}
th {{ text-align: left; vertical-align: top; padding-right: 1rem; white-space: nowrap; color: #5a6172 }}
td {{ border-bottom: 1px solid #eceef2 }} table {{ border-collapse: collapse }}
pre {{ white-space: pre-wrap; background: #f5f6f8; padding: 1rem; border-radius: 6px }}
mark {{ background: #b7e4c7 }} img {{ max-width: 100% }} audio {{ width: 100% }}
</style>
<h1>{folders}</h1>
<pre>{survey}</pre>
<h2>{title}</h2>
{sounds}
<table>{facts}</table>
{meta}{prompt}
</html>
"""


def write_page(path: Path, dataset: ShardDataset, survey: Survey, position: int, shown: Pieces | None) -> None:
    """One self-contained HTML page: the folder, then one sample to listen to and to read."""
    meta = _meta(dataset, position)
    marked = ""
    if shown is not None:
        parts = (f"<mark>{html.escape(text)}</mark>" if loss else html.escape(text) for text, loss in shown)
        marked = f"<h3>Prompt and reply</h3><p>Marked text carries loss.</p><pre>{''.join(parts)}</pre>"
    page = PAGE.format(
        title=html.escape(dataset.load_sample(position).id),
        sounds="\n".join(map(_sound_html, dataset.load_waveforms(position))),
        facts=_table_rows(_facts(dataset, position)),
        meta=f"<h3>Metadata</h3><table>{_table_rows(meta)}</table>\n" if meta else "",
        folders=html.escape(", ".join(index.folder.name for index in dataset.indexes)),
        prompt=marked,
        survey=html.escape(shard_table(dataset) + "\n\n" + survey.text()),
    )
    write_asked(path, page)


def _sound_html(waveform: Waveform) -> str:
    """A player, and a spectrogram where one can be drawn."""
    heard = "<p>Played as cardioids to the left and the right.</p>" if waveform.layout == "foa" else ""
    image, sound = spectrogram_png(waveform), base64.b64encode(playable(waveform)).decode()
    picture = base64.b64encode(image).decode() if image else ""
    figure = f'<img alt="spectrogram" src="data:image/png;base64,{picture}">' if image else ""
    return f'<audio controls src="data:audio/wav;base64,{sound}"></audio>\n{heard}{figure}'


def _table_rows(facts: list[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts)


def playable(waveform: Waveform) -> bytes:
    """A WAV file that any browser plays: FOA as two cardioids that look to the left and to the right, (W ± Y) / 2."""
    if waveform.layout == "foa":
        omni, left_right = waveform.samples[0], waveform.samples[1]
        pair = np.stack([omni + left_right, omni - left_right]) / 2
        waveform = Waveform(pair, waveform.sample_rate, "stereo")
    return encode(limit_peak(waveform), "wav")


def spectrogram_png(waveform: Waveform) -> bytes | None:
    """Power spectrograms, one per channel, dB; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        waveform.num_channels, 1, figsize=(9, 1 + 1.6 * waveform.num_channels), sharex=True, squeeze=False
    )
    size = min(512, waveform.num_samples)
    drawn = {"NFFT": size, "noverlap": size // 2, "Fs": waveform.sample_rate, "vmin": -140, "vmax": -30}
    for name, samples, axis in zip(CHANNEL_NAMES[waveform.layout], waveform.samples, axes[:, 0], strict=True):
        axis.specgram(samples + 1e-9, cmap="inferno", **drawn)  # silence has no logarithm
        axis.set_ylabel(f"{name}, Hz")
    axes[-1, 0].set_xlabel("s")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
