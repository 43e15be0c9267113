"""Pictures of a dataset: where its sources are, and what a few of its scenes look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.errors import require

ITEMS = 6  # scenes on the sheet: fits a page


def draw(out: Path) -> list[Path]:
    """Write ``figures/map_<subset>.png`` and ``figures/scenes_<subset>.png`` for every subset of `out`."""
    require("matplotlib", "audio-llm prep --plot", "demo")
    import json

    import matplotlib

    matplotlib.use("Agg")
    from audio_llm.shards.reader import ShardDataset

    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    made = []
    for name in json.loads((out / "dataset.json").read_text(encoding="utf-8"))["subsets"]:
        dataset = ShardDataset(out / name)
        made.append(_draw_map(dataset, folder / f"map_{name}.png", name))
        made.append(_draw_scenes(dataset, folder / f"scenes_{name}.png"))
    return made


def _draw_map(dataset: Any, path: Path, name: str) -> Path:
    """Sources seen from above (front up, left on the left, radius in metres), and how often each elevation occurs."""
    from matplotlib import pyplot

    events = [event for i in range(min(len(dataset), 2000)) for event in dataset.load_sample(i).events]
    figure = pyplot.figure(figsize=(9, 4.5), layout="constrained")
    polar = figure.add_subplot(1, 2, 1, projection="polar")
    polar.set_theta_zero_location("N")  # type: ignore[attr-defined]
    angles = np.radians([event.azimuth for event in events])
    polar.scatter(angles, [event.distance for event in events], s=4, alpha=0.4)
    polar.set_title(f"{name}: {len(events)} events, from above (m)")
    polar.set_thetagrids([0, 90, 180, 270], ["front", "left", "behind", "right"])  # type: ignore[attr-defined]
    plain = figure.add_subplot(1, 2, 2)
    plain.hist([event.elevation for event in events], bins=30)
    plain.set(xlabel="elevation (degrees)", ylabel="events")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_scenes(dataset: Any, path: Path) -> Path:
    """Spectrograms of the first and last channel of some scenes with their events and questions."""
    from matplotlib import pyplot

    chosen = np.linspace(0, len(dataset) - 1, min(ITEMS, len(dataset))).astype(int)
    figure, axes = pyplot.subplots(len(chosen), 2, figsize=(11, 2.1 * len(chosen)), layout="constrained", squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        item = dataset[int(index)]
        sample, (waveform, *_) = item["sample"], item["waveforms"]
        for axis, channel in zip(row, (0, -1), strict=True):
            samples = waveform.samples[channel] + 1e-7 * np.sin(np.arange(waveform.num_samples))
            axis.specgram(samples, NFFT=512, noverlap=384, Fs=waveform.sample_rate, vmin=-150, vmax=-60)
            for event in sample.events:
                axis.axvspan(event.onset, event.offset, ymin=0.96, color="tab:red")
        events = "; ".join(f"{e.label} {e.azimuth:.0f}° {e.distance:.1f} m" for e in sample.events)
        row[0].set_title(f"{sample.question} → {sample.answer}", fontsize=8)
        row[1].set_title(events, fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
