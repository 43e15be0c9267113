"""Charts as inline SVG: pure functions from numbers to text, coloured by the CSS variables of the page they stand in.

Text inherits the page's font and colours, so that one drawing is readable on a light and on a dark page. A ``<title>``
on every mark is its tooltip.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from eval.figures.estimates import Estimate

# Dark to bright, evenly brighter by the step, readable in print and by colour-blind eyes.
SPECTROGRAM_COLOURS = ((8, 8, 24), (58, 15, 98), (142, 36, 104), (221, 81, 58), (250, 167, 53), (252, 250, 190))


@dataclass(frozen=True)
class Bar:
    """One bar of a group: shares in [0, 1]."""

    label: str
    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, label: str, found: Estimate | None) -> Bar:
        """The bar of an estimate; nothing is drawn where there is none."""
        return cls(label, found.value, found.low, found.high, found.n) if found else cls(label, math.nan, 0, 0, 0)


def colour(index: int) -> str:
    """The page's colour of series `index`."""
    return f"var(--series-{index % 6})"


def bars(groups: Sequence[tuple[str, float, Sequence[Bar]]], *, label: str, width: int = 980, left: int = 210) -> str:
    """Horizontal bars in groups ``(name, chance, bars)``: one bar a run with its interval, one mark for chance."""
    right, thick, gap, pad = 60, 13, 3, 16
    left = max(left, *(round(6.4 * len(name)) + 18 for name, _, _ in groups), 0)
    scale = float(width - left - right)
    parts, y = [], 8.0
    height = sum(len(entries) * (thick + gap) + pad for _, _, entries in groups) + 34
    for tick in range(0, 101, 25):
        x = left + scale * tick / 100
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height - 26}"/>')
        parts.append(_text(x, height - 10, f"{tick} %", "axis", "middle"))
    for name, chance, entries in groups:
        block = len(entries) * (thick + gap)
        parts.append(_text(left - 12, y + block / 2 + 3, name, "label", "end"))
        if math.isfinite(chance):  # below the bars' labels, which have a background
            x = left + scale * chance
            parts.append(
                f'<line class="chance" x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x:.1f}" y2="{y + block + 1:.1f}">'
                f"<title>chance {100 * chance:.1f} %</title></line>"
            )
        for index, bar in enumerate(entries):
            parts.append(_one_bar(bar, index, left, y + index * (thick + gap), scale, thick))
        y += block + pad
    return _svg(width, int(height), "".join(parts), label)


def _one_bar(bar: Bar, index: int, left: float, y: float, scale: float, thick: int) -> str:
    if not math.isfinite(bar.value):
        return ""
    middle = y + thick / 2
    tip = f"{bar.label}: {100 * bar.value:.1f} % [{100 * bar.low:.1f}, {100 * bar.high:.1f}], {bar.n} questions"
    ends = f'x1="{left + scale * bar.low:.1f}" y1="{middle:.1f}" x2="{left + scale * bar.high:.1f}" y2="{middle:.1f}"'
    where = left + scale * max(bar.value, bar.high) + 27  # two digits and a gap beyond the whisker's end
    return (
        f'<g><title>{escape(tip)}</title><rect x="{left}" y="{y:.1f}" width="{max(1.0, scale * bar.value):.1f}" '
        f'height="{thick}" rx="2" fill="{colour(index)}"/>'
        f'<line class="halo" {ends}/><line class="whisker" {ends}/>'
        + _text(where, middle + 4, f"{100 * bar.value:.0f}", "value", "end")
        + "</g>"
    )


def lines(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    series: int = 0,
    log: bool = False,
    limit: float | None = None,
    unit: str = "step",
    width: int = 330,
    height: int = 190,
) -> str:
    """A curve over steps (or another `unit`): the values as measured, faint, and a running mean, strong, in the colour
    of `series`; with `log` on an axis of powers of ten (values of 0 and less are left out), with `limit` and its line.
    """
    xs, ys = _finite(xs, ys, positive=log)
    if not xs:
        return ""
    left, right, top, bottom = 46, 12, 26, 24
    x_low, x_high = min(xs), max(xs) or 1
    height_of = math.log10 if log else float
    shown = [height_of(y) for y in (*ys, *([limit] if limit else []))]
    ticks = [float(e) for e in range(math.floor(min(shown)), math.ceil(max(shown)) + 1)] if log else []
    ticks = ticks if len(ticks) > 1 else nice_ticks(min(shown), max(shown))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (height_of(y) - ticks[0]) / (ticks[-1] - ticks[0])
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    def across(css: str, y: float) -> str:
        return f'<line class="{css}" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>'

    parts = [_text(4, 15, title, "chart-title", "start")]
    for tick in ticks:
        value = 10**tick if log else tick
        _, y = place(x_low, value)
        parts += [across("grid", y), _text(left - 6, y + 4, f"{value:g}", "axis", "end")]
    parts.append(_text(left, height - 8, f"{x_low:g}", "axis", "start"))
    parts.append(_text(width - right, height - 8, f"{unit} {x_high:g}", "axis", "end"))
    if limit:
        _, y = place(x_low, limit)
        parts += [across("limit", y), _text(width - right, y + 13, f"limit {limit:g}", "axis", "end")]
    smooth = running_mean(ys)
    tip = f"{title}: last {ys[-1]:.4g}, mean of the last steps {smooth[-1]:.4g}"
    for css, values in (("raw", ys), ("curve", smooth)):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*pair) for pair in zip(xs, values, strict=True)))
        stroke = f'class="{css}" stroke="{colour(series)}"'
        parts.append(f'<polyline {stroke} points="{points}"><title>{escape(tip)}</title></polyline>')
    return _svg(width, height, "".join(parts), title)


def confusion(labels: Sequence[str], counts: np.ndarray, *, cell: int = 58) -> str:
    """`counts` (true, answered) as a map: a row holds the shares of one true answer, with its count beside it; the
    diagonal is right."""
    left, top = 136, 46
    columns, rows = counts.shape[1], counts.shape[0]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    parts = [_text(left + columns * cell / 2, 16, "answered", "axis", "middle")]
    for index, name in enumerate(labels):
        parts.append(_text(left + (index + 0.5) * cell, 36, name, "label", "middle"))
        if index < rows:
            parts.append(_text(left - 10, top + (index + 0.5) * cell + 4, name, "label", "end"))
            count = f"{int(counts[index].sum())} asked"
            parts.append(_text(left - 10, top + (index + 0.5) * cell + 18, count, "axis", "end"))
    for row in range(rows):
        for column in range(columns):
            share, x, y = float(shares[row, column]), left + column * cell, top + row * cell
            tip = f"true {labels[row]}, answered {labels[column]}: {int(counts[row, column])}"
            parts.append(
                f'<g><title>{escape(tip)}</title><rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" rx="3" '
                f'fill="{colour(0)}" fill-opacity="{0.06 + 0.94 * share:.3f}"/>'
                + _text(
                    x + cell / 2 - 1, y + cell / 2 + 4, f"{100 * share:.0f}", "on" if share > 0.6 else "cell", "middle"
                )
                + "</g>"
            )
    return _svg(left + columns * cell + 6, top + rows * cell + 6, "".join(parts), "True and answered direction")


def compass(sectors: Sequence[tuple[float, float, float, int]], *, size: int = 330) -> str:
    """Accuracy by true azimuth, seen from above: ``(centre, width, accuracy, n)`` in degrees, 0 up, 90 to the left."""
    middle, radius = size / 2, size / 2 - 34
    parts = [f'<circle class="ring" cx="{middle}" cy="{middle}" r="{radius * share:.1f}"/>' for share in (0.5, 1.0)]
    for centre, width, accuracy, n in sectors:
        if n == 0:
            continue
        tip = f"azimuth {centre:.0f}°: {100 * accuracy:.1f} % of {n} right"
        outline = _wedge(middle, radius * accuracy, centre, width)
        parts.append(
            f'<path fill="{colour(0)}" fill-opacity="0.8" stroke="var(--page)" d="{outline}">'
            f"<title>{escape(tip)}</title></path>"
        )
    for name, x, y, anchor in (
        ("front", middle, 20, "middle"),
        ("behind", middle, size - 10, "middle"),
        ("left", 4, middle + 4, "start"),
        ("right", size - 4, middle + 4, "end"),
    ):
        parts.append(_text(x, y, name, "axis", anchor))
    parts.append(_text(middle + 4, middle - radius + 12, "100 %", "axis", "start"))
    return _svg(size, size, "".join(parts), "Accuracy by true azimuth")


def _wedge(middle: float, radius: float, centre: float, width: float) -> str:
    first, second = (_polar(middle, radius, centre + turn * width / 2) for turn in (1, -1))
    return f"M{middle:.1f},{middle:.1f} L{first} A{radius:.1f},{radius:.1f} 0 0 1 {second} Z"


def _polar(middle: float, radius: float, azimuth: float) -> str:
    angle = math.radians(azimuth)
    return f"{middle - radius * math.sin(angle):.1f},{middle - radius * math.cos(angle):.1f}"


def spectrogram(samples: np.ndarray, sample_rate: int, *, width: int = 360, height: int = 72) -> str:
    """``data:`` URL of a PNG: power in dB (80 dB deep) of each channel of `samples` (channels, time), one above the
    other, left channel first, frequency upwards to half the rate."""
    from scipy.signal import stft

    window = 512
    hop = max(1, samples.shape[1] // width)
    padded = np.pad(samples, ((0, 0), (0, max(0, window - samples.shape[1]))))
    _, _, spectrum = stft(padded, nperseg=window, noverlap=max(0, window - min(hop, window)), padded=False)
    decibels = 20 * np.log10(np.abs(spectrum) + 1e-7)  # (channels, frequencies, frames)
    decibels = np.clip((decibels - decibels.max() + 80) / 80, 0, 1)
    rows = np.linspace(decibels.shape[1] - 1, 0, height).astype(int)
    columns = np.linspace(0, decibels.shape[2] - 1, width).astype(int)
    panels = [channel[np.ix_(rows, columns)] for channel in decibels]
    line = np.full((2, width), 0.5)
    stacked = panels[0]
    for panel in panels[1:]:
        stacked = np.concatenate([stacked, line, panel])
    return data_url("image/png", png(_colours(stacked)))


def spectrogram_with_axes(samples: np.ndarray, sample_rate: int, channels: Sequence[str], *, width: int = 360) -> str:
    """:func:`spectrogram` with seconds along it, and for each of `channels` its name and its frequencies in Hz."""
    panel, left, bottom = 84, 62, 18
    height, seconds = panel * len(channels), samples.shape[1] / sample_rate
    url = spectrogram(samples, sample_rate, width=width, height=panel)
    parts = [f'<image x="{left}" y="4" width="{width}" height="{height}" preserveAspectRatio="none" href="{url}"/>']
    for index, name in enumerate(channels):
        top = 4 + index * panel
        for y, text in ((top + 10, f"{sample_rate // 2} Hz"), (top + panel / 2 + 4, name), (top + panel - 3, "0 Hz")):
            parts.append(_text(left - 5, y, text, "label" if text == name else "axis", "end"))
    for x, text, anchor in ((left, "0 s", "start"), (left + width, f"{seconds:.1f} s", "end")):
        parts.append(_text(x, height + bottom, text, "axis", anchor))
    return _svg(left + width + 4, height + bottom + 6, "".join(parts), f"spectrogram: {', '.join(channels)}")


def _colours(levels: np.ndarray) -> np.ndarray:
    """(rows, columns) in [0, 1] → (rows, columns, 3) uint8 along ``SPECTROGRAM_COLOURS``."""
    stops = np.linspace(0, 1, len(SPECTROGRAM_COLOURS))
    table = np.array(SPECTROGRAM_COLOURS, dtype=np.float64)
    return np.stack([np.interp(levels, stops, table[:, band]) for band in range(3)], axis=-1).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file (8 bit RGB, no filter) of `pixels` (rows, columns, 3) uint8; PNG specification, third edition."""
    rows, columns, _ = pixels.shape
    body = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that enclose [low, high]."""
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(tick * step, 12) for tick in range(first, last + 1)]


def running_mean(values: Sequence[float], share: float = 0.08) -> list[float]:
    """Centred mean over `share` of the curve, shorter at the ends."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return list((sums[last] - sums[first]) / (last - first))


def legend(names: Sequence[str], tick: str = "chance") -> str:
    """Names beside their colours, and what the tick of a group of bars stands for."""
    entries = (
        f'<span class="key"><i style="background:{colour(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(entries)}<span class="key"><i class="tick"></i>{escape(tick)}</span></div>'


def _finite(xs: Sequence[float], ys: Sequence[float], *, positive: bool) -> tuple[list[float], list[float]]:
    pairs = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    pairs = [(x, y) for x, y in pairs if y > 0 or not positive]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, body: str, label: str) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label, quote=True)}" viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px;--natural:{width}px">{body}</svg>'
    )
