"""Pictures of a sound and of what is said about it: PNG of each channel, SVG of directions and times.

Waveforms and spectrograms are taken at as many places as the picture has columns, so that ten minutes cost as much as
ten seconds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from audio_llm.answering.page.statements import Statement
from audio_llm.audio import CHANNEL_NAMES, Waveform
from audio_llm.errors import require, visible
from audio_llm.shards.schema import Event

COLUMNS, BANDS, FFT = 600, 96, 1024
LOWEST_HZ, RANGE_DB = 50.0, 70.0
# Colours that can be told apart in black on white, white on black, and by the colour-blind (Okabe and Ito 2008).
COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
WEDGE = 30.0  # degrees to each side of a direction that is said in words, as it is drawn
_GREY = "#808080"


def words(text: str) -> str:
    """A stranger's text as HTML and SVG may hold it: escaped, and without marks that turn the direction of writing."""
    return escape(visible(text))


def envelope(samples: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """Lowest and highest sample of each of `columns` stretches of `samples` (time,): (2, columns), or fewer columns."""
    edges = np.unique(np.linspace(0, len(samples), min(columns, len(samples)), endpoint=False, dtype=np.int64))
    return np.stack([np.minimum.reduceat(samples, edges), np.maximum.reduceat(samples, edges)])


def spectrogram(samples: np.ndarray, sample_rate: int, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Power in dB below the loudest, (BANDS, columns), of `samples` (time,), and the bands' centres in Hz, rising.

    Each column is one Hann window of ``FFT`` samples in the middle of its stretch; bands are even in log frequency, and
    a band narrower than the FFT's bins has the power of the nearest bin.
    """
    padded = np.pad(samples.astype(np.float32), FFT // 2)
    count = max(1, min(columns, len(samples) // (FFT // 4)))
    starts = ((np.arange(count) + 0.5) * len(samples) / count).astype(np.int64)
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[starts]  # (columns, FFT)
    power = np.abs(np.fft.rfft(frames * np.hanning(FFT).astype(np.float32), axis=1)) ** 2  # (columns, bins)
    edges = np.geomspace(LOWEST_HZ, sample_rate / 2, BANDS + 1)
    bins = edges / (sample_rate / FFT)
    first = np.minimum(np.round(bins[:-1]).astype(np.int64), FFT // 2)
    last = np.maximum(np.minimum(np.round(bins[1:]).astype(np.int64), FFT // 2 + 1), first + 1)
    bands = np.stack([power[:, a:b].max(axis=1) for a, b in zip(first, last, strict=True)])  # (BANDS, columns)
    decibels = 10 * np.log10(np.maximum(bands, 1e-12))
    return np.maximum(decibels - decibels.max(), -RANGE_DB), np.sqrt(edges[:-1] * edges[1:])


def draw_channels(waveform: Waveform) -> bytes:
    """PNG of the waveform and the spectrogram of each channel, one below the other, on one axis of time."""
    require("matplotlib", "the page", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, seconds = CHANNEL_NAMES[waveform.layout], waveform.seconds
    figure = Figure(figsize=(6.6, 0.4 + 1.75 * len(names)), dpi=110, layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasAgg(figure)
    rows = figure.subplots(2 * len(names), 1, sharex=True, squeeze=False, height_ratios=[2, 3] * len(names))[:, 0]
    peak = float(np.abs(waveform.samples).max(initial=0.0)) or 1.0
    for place, (name, samples) in enumerate(zip(names, waveform.samples, strict=True)):
        _draw_waveform(rows[2 * place], samples, seconds, peak, name)
        _draw_spectrogram(rows[2 * place + 1], samples, waveform.sample_rate, seconds)
    rows[-1].set_xlabel("seconds", color=_GREY, fontsize=8)
    for axes in rows:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=_GREY, labelsize=7, length=2)
        if axes is not rows[-1]:
            axes.tick_params(axis="x", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_waveform(axes: Any, samples: np.ndarray, seconds: float, peak: float, name: str) -> None:
    low, high = envelope(samples)
    axes.fill_between(np.linspace(0, seconds, len(low)), low, high, color=COLOURS[1], linewidth=0.6)
    axes.set(xlim=(0, seconds), ylim=(-peak, peak), yticks=[])  # one scale for all channels: their levels compare
    axes.set_ylabel(name, color=_GREY, fontsize=9, rotation=0, ha="right", va="center")


def _draw_spectrogram(axes: Any, samples: np.ndarray, sample_rate: int, seconds: float) -> None:
    decibels, _ = spectrogram(samples, sample_rate)
    axes.imshow(
        decibels, origin="lower", aspect="auto", extent=(0, seconds, 0, BANDS), cmap="magma", interpolation="nearest"
    )
    span = math.log(sample_rate / 2 / LOWEST_HZ)
    shown = [hertz for hertz in (100, 1000, 10000) if hertz < sample_rate / 2]
    labels = [f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz" for hertz in shown]
    axes.set_yticks([BANDS * math.log(hertz / LOWEST_HZ) / span for hertz in shown], labels)


def dial(statements: Sequence[Statement], scene: Sequence[Event] = ()) -> str:
    """SVG seen from above, the listener in the middle and 0 degrees at the top: a numbered dot for each statement with
    an azimuth, in a wedge where only words like "left" say it, and a ring where a source of the `scene` really is."""
    marks = [
        _ring(*_point(event.azimuth, 70), f"really: {event.label}, {event.azimuth:.0f}°")
        for event in scene
        if event.azimuth is not None
    ]
    for number, one in enumerate(statements):
        if one.azimuth is not None:
            x, y = _point(one.azimuth, 70)
            if one.sides:
                (x1, y1), (x2, y2) = (_point(one.azimuth + turn, 80) for turn in (-WEDGE, WEDGE))
                path = f"M0 0L{x1:.1f} {y1:.1f}A80 80 0 0 0 {x2:.1f} {y2:.1f}Z"
                marks.append(f'<path d="{path}" fill="{_colour(number)}" opacity="0.22"/>')
            marks.append(
                f'<line x1="0" y1="0" x2="{x:.1f}" y2="{y:.1f}" stroke="{_colour(number)}" stroke-width="3"/>'
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="{_colour(number)}"><title>{words(one.words)}</title>'
                f'</circle><text x="{x:.1f}" y="{y + 4:.1f}" class="number">{number + 1}</text>'
            )
    names = (("front", 0, -88), ("left", -90, 4), ("right", 90, 4), ("behind", 0, 97))
    sides = "".join(
        f'<text x="{x}" y="{y}" class="side" text-anchor="{_anchor(x)}">{name}</text>' for name, x, y in names
    )
    return (
        '<svg viewBox="-125 -104 250 208" role="img" aria-label="directions, seen from above" class="dial">'
        '<circle r="80" class="rim"/><path d="M-80 0H80M0 -80V80" class="axis"/>'
        '<path d="M0 -11L7 8H-7Z" class="listener"/>'
        f"{sides}{''.join(marks)}</svg>"
    )


def _point(azimuth: float, radius: float) -> tuple[float, float]:
    """Right and down of the middle: counter-clockwise degrees from the top."""
    angle = math.radians(azimuth)
    return -radius * math.sin(angle), -radius * math.cos(angle)


def _anchor(x: int) -> str:
    return "end" if x < 0 else "start" if x > 0 else "middle"


def _ring(x: float, y: float, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="14" class="real"><title>{words(title)}</title></circle>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def timeline(statements: Sequence[Statement], seconds: float) -> str:
    """SVG of the statements with a time, a bar each, over the `seconds` of the sound; "" where none states a time."""
    timed = [(number, one) for number, one in enumerate(statements) if one.seconds is not None]
    if not timed or seconds <= 0:
        return ""
    rows = []
    for row, (number, one) in enumerate(timed):
        assert one.seconds is not None
        begin, end = (max(0.0, min(1.0, second / seconds)) * 400 for second in one.seconds)
        y = 6 + 22 * row
        rows.append(
            f'<rect x="{begin:.1f}" y="{y}" width="{max(3.0, end - begin):.1f}" height="16" rx="3" '
            f'fill="{_colour(number)}"><title>{words(one.words)}</title></rect>'
            f'<text x="{min(begin + 8, 392):.1f}" y="{y + 12}" class="number">{number + 1}</text>'
        )
    height = 6 + 22 * len(timed)
    ticks = "".join(
        f'<path d="M{400 * part} 0V{height}" class="axis"/>'
        f'<text x="{400 * part}" y="{height + 14}" class="side" text-anchor="middle">{seconds * part:.3g} s</text>'
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    head = f'<svg viewBox="-20 0 440 {height + 20}" role="img" aria-label="times" class="times">'
    return f"{head}{ticks}{''.join(rows)}</svg>"
