"""What became of the items of a corpus, stage by stage: ``funnel.json`` of its folder, as a table and as a picture.

The file holds ``stages``, a list of ``{"stage", "in", "out", "rejects": {reason: number}}`` in their order, beginning
with the source. Of each, in = out + rejects, and in is the out of the stage before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm.errors import DataError, describe, require
from audio_llm.files import read_json

FILE = "funnel.json"
_SHOWN = 3  # reasons of a stage beside its bar


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The stages of a corpus folder. Raises :class:`DataError` for numbers that do not add up."""
    path = Path(folder) / FILE
    try:
        stages: list[dict[str, Any]] = read_json(path)["stages"]
        before = None
        for stage in stages:
            lost = sum(stage["rejects"].values())
            if stage["in"] != stage["out"] + lost or before not in (None, stage["in"]):
                found = f"{stage['in']} in, {stage['out']} out, {lost} rejects after {before} of the stage before"
                raise DataError(describe(f"{path}: {stage['stage']}", "in = out + rejects", found, "Run prep again."))
            before = stage["out"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(describe(str(path), "a funnel that audio-llm prep wrote", f"another file ({error})")) from error
    return stages


def table(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a stage, and one for each reason of its rejects, the most frequent first."""
    width = max(len(stage["stage"]) for stage in stages)
    yield f"{'stage':<{width}}{'in':>10}{'out':>10}{'rejects':>10}"
    for stage in stages:
        yield f"{stage['stage']:<{width}}{stage['in']:>10}{stage['out']:>10}{stage['in'] - stage['out']:>10}"
        for reason, number in _sorted(stage["rejects"]):
            yield f"{'':<{width}}{'':>20}{number:>10}  {reason}"


def _sorted(rejects: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(rejects.items(), key=lambda pair: (-pair[1], pair[0]))


def draw(folder: str | Path) -> Path:
    """Write ``figures/funnel.svg``: a bar a stage for what came out of it, and what it rejected behind it."""
    require("matplotlib", "drawing the funnel", "demo")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = read(folder)
    path = Path(folder) / "figures" / "funnel.svg"
    path.parent.mkdir(exist_ok=True)
    names = [stage["stage"] for stage in stages]
    with pyplot.rc_context({"svg.hashsalt": "funnel"}):
        figure, axis = pyplot.subplots(figsize=(9, 0.9 + 0.5 * len(stages)), layout="constrained")
        axis.barh(names, [stage["in"] for stage in stages], color="#d9d9d9", label="rejected")
        axis.barh(names, [stage["out"] for stage in stages], color="#3b6ea5", label="went on")
        widest = max(stage["in"] for stage in stages) or 1
        for place, stage in enumerate(stages):
            reasons = _sorted(stage["rejects"])
            told = ", ".join(f"{reason} {number}" for reason, number in reasons[:_SHOWN])
            told += f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            axis.text(
                stage["in"] + widest / 100,
                place,
                f"{stage['out']}" + (f"   − {told}" if told else ""),
                va="center",
                fontsize=8,
            )
        axis.invert_yaxis()
        axis.set_xlim(0, widest * 1.6)
        axis.set_xlabel("items")
        axis.legend(loc="lower right", frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return path
