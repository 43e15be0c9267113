"""Whether a model listens: controls, what the sound adds, options in other orders, places of options, directions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from audio_llm.language.directions import AXES, read_directions
from eval.controls import GUESSED, named
from eval.figures import charts
from eval.figures.estimates import Estimate, proportion
from eval.figures.runs import Run
from eval.figures.scores import Cell, by, summarise
from eval.report.markup import accuracy, escape, estimate, kind_of, note, percent, signed, table, won_and_lost
from eval.scorers.open_answers import answer_kind

DIRECTIONS = ("front", "left", "behind", "right")
UNREAD = "none"
MOST_CHOICES = 6  # options of a question, for the plot of their places
SECTOR = 30  # degrees of a wedge of the compass
Pair = tuple[str, str, str]  # a true and an answered word, and the cluster of the question


def controls(runs: Sequence[Run]) -> str:
    """Accuracy under every control beside that with the true sound, and what the sound adds."""
    names = list(dict.fromkeys(name for run in runs for name in run.summary.controls))
    if not names:
        return ""
    rows = []
    for run in runs:
        main = run.summary.main
        if main is not None:
            rows.append(_control_row(run, "the true sound", main.accuracy.n, accuracy(main), main.chance))
        for name in sorted(set(run.summary.beside.values()) - {run.answers}):
            other = summarise(run.scored(name))
            label = f"the true sound, T={run.passes[name][0].temperature:g}"
            rows.append(_control_row(run, label, other.accuracy.n, accuracy(other), other.chance))
        for name in names:
            cell = run.summary.controls.get(name)
            if cell is not None and main is not None:
                label = named(name).replace("_", " ")
                if run.summary.beside.get(name, run.answers) != run.answers:
                    label += f", T={run.passes[name][0].temperature:g}"
                rows.append(_control_row(run, label, cell.accuracy.n, accuracy(cell), cell.chance, name))
    head = ["asked with", "run", "right", "chance", "questions", "the sound adds", "won : lost"]
    text = (
        "<b>Silence</b>: zeros of the same length. <b>Swap</b>: left and right exchanged, scored against the mirrored "
        "truth, on questions whose answer turns on the side. <b>Other audio</b>: the sound of another question. "
        "<b>Shuffled options</b>: the same sound, the choices in other orders. <b>Text only</b>: no sound in the "
        "prompt. <b>Sound 1 alone silent</b>: zeros in place of this one of several sounds; what it adds tells whether "
        "it was needed. <b>The sound adds</b>: accuracy with the true sound minus that without it on the same "
        "questions, in points, with its 95 % interval; then questions done better only with : only without the sound, "
        "and the paired "
        "test. A control is compared with the true sound at its own temperature."
    )
    return table(head, rows) + note(text) + _guessed_bars(runs[-1]) + permutations(runs)


def _control_row(run: Run, label: str, count: int, right: str, chance: float, name: str = "") -> list[str]:
    found = run.summary.contributions.get(name)
    added = [signed(found.difference), won_and_lost(found)] if found else ["–", "–"]
    return [escape(label), escape(run.name), right, percent(chance), str(count), *added]


def _guessed_bars(run: Run) -> str:
    """By kind of question: with the sound, and with each control that takes it away."""
    controls = [name for name in GUESSED if name in run.summary.beside]
    if not controls:
        return ""
    ways = {"true sound": run.scored(run.summary.beside[controls[0]])}
    ways |= {name.replace("_", " "): run.scored(name) for name in controls}
    cells = {label: by(scored, "question_type") for label, scored in ways.items()}
    groups = [
        (kind_of(kind), cell.chance, [charts.Bar.of(label, _accuracy_of(cells[label].get(kind))) for label in ways])
        for kind, cell in cells["true sound"].items()
        if cell.accuracy.n
    ]
    heading = f"<h3>With and without the sound, by kind of question: {escape(run.name)}</h3>"
    return heading + charts.legend(list(ways)) + charts.bars(groups, label="Accuracy with and without the sound")


def _accuracy_of(cell: Cell | None) -> Estimate | None:
    return cell.accuracy if cell is not None else None


def permutations(runs: Sequence[Run]) -> str:
    """Options in K other orders: mean and spread over orders, the worst one, right in all, the same answer in all."""
    rows = []
    for run in runs:
        found = run.summary.permutations
        if found is None:
            continue
        asked = {row.id for row in run.passes["shuffled_options"]}
        own = summarise(entry for entry in run.scored(run.summary.beside["shuffled_options"]) if entry.row.id in asked)
        cells = [accuracy(own), estimate(found.mean), f"{100 * found.std:.1f}", estimate(found.worst)]
        cells += [estimate(found.all_k), estimate(found.consistency)]
        rows.append([escape(run.name), str(found.k), *cells, str(found.all_k.n)])
    if not rows:
        return ""
    head = ["run", "orders", "own order", "mean of the others", "std of them", "worst of them", "right in every one"]
    head += ["consistent", "questions"]
    text = (
        "Questions with choices, asked again with the choices in other orders (each question in as many as there are, "
        "at most as many as the table says). <b>Std</b>: of the other orders' accuracies, in points. "
        "<b>Consistent</b>: the same option in every order, their own included, right or wrong. An answer that comes "
        "from the sound does not depend on the order."
    )
    return "<h3>Options in other orders</h3>" + table(head, rows) + note(text)


# --------------------------------------------------------------------------------------------------- places of options


def positions(run: Run) -> str:
    """Which places of the list of options a model prefers: share of answers against share of gold answers."""
    rows = [*run.passes.get(run.answers, []), *run.passes.get("shuffled_options", [])]
    read: dict[int, list[tuple[int, int, str]]] = defaultdict(list)  # by number of options: answered, right, cluster
    for row in rows:
        size = len(row.choices)
        if row.error or row.gold not in row.choices or not 2 <= size <= MOST_CHOICES:
            continue
        choice = row.reply().choice
        if choice is not None:  # both shares are over the same questions: those with an answer
            read[size].append((choice, row.choices.index(row.gold), row.cluster))
    groups, worst = [], 0.0
    for size, found in sorted(read.items()):
        answered, right, clusters = map(np.array, zip(*found, strict=True))
        for place in range(size):
            shares = [proportion(places == place, clusters) for places in (answered, right)]
            worst = max(worst, abs(shares[0].value - shares[1].value))
            bars = [charts.Bar.of(*pair) for pair in zip(("answered", "right option"), shares, strict=True)]
            groups.append((f"{'ABCDEF'[place]} of {size}", 1 / size, bars))
    if not groups:
        return ""
    shuffled = " (options in other orders included)" if "shuffled_options" in run.passes else ""
    text = (
        "How often each place of the list was answered, and how often the right option stood there, over "
        f"{sum(map(len, read.values()))} answers{shuffled}. The largest gap is {100 * worst:.1f} "
        "points; a model without a habit of place has none beyond the intervals."
    )
    names = ["answered", "right option"]
    return charts.legend(names, "1 / options") + charts.bars(groups, label="Places of options") + note(text)


# ----------------------------------------------------------------------------------------------------------- directions


def directions(run: Run) -> str:
    """Confusion maps of direction words, one a kind of question and one an axis, and accuracy by true azimuth."""
    maps = [*_word_maps(run), *_axis_maps(run)]
    wedges = _wedges(run)
    if not maps:
        return ""
    compass = f"<figure><figcaption>right answers by azimuth</figcaption>{charts.compass(wedges)}</figure>"
    text = (
        "Percent of each true direction (a row is a true one, with how often it was asked; a column an answered one). "
        "<b>Chance</b>: one over the number of choices, and without choices the most frequent direction said always."
    ) + (
        " The compass: the share of right answers by where a single sound truly was, seen from above." if wedges else ""
    )
    return f'<div class="pair">{"".join(maps)}{compass if wedges else ""}</div>{note(text)}'


def _word_maps(run: Run) -> list[str]:
    """Questions whose answer is one word of ``DIRECTIONS``, kinds with other choices apart."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    chance: dict[str, list[float]] = defaultdict(list)
    for entry in run.main:
        gold = entry.row.gold.casefold()
        if entry.score is not None and gold in DIRECTIONS:
            pairs[entry.row.question_type].append((gold, (entry.score.answer or UNREAD).casefold(), entry.row.cluster))
            chance[entry.row.question_type].append(1 / max(len(entry.row.choices), 1))
    return [_map(kind_of(kind), DIRECTIONS, found, float(np.mean(chance[kind]))) for kind, found in pairs.items()]


def _axis_maps(run: Run) -> list[str]:
    """Answers of several direction words ("left, front, above; 2m"), axis by axis."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for row in run.passes.get(run.answers, []):
        if row.choices or row.error or answer_kind(row) not in ("place", "direction"):
            continue
        gold, said = read_directions(row.gold), read_directions(row.reply().said)
        if len(gold) > 1:
            for axis, word in gold.items():
                pairs[axis].append((word, said.get(axis, UNREAD), row.cluster))
    words = {"/".join(axis): axis for axis in AXES}
    return [_map(axis, words[axis], pairs[axis]) for axis in words if pairs[axis]]


def _map(title: str, words: Sequence[str], pairs: Sequence[Pair], chance: float | None = None) -> str:
    """The confusion map of `pairs`; words that neither occur nor are answered are left out. `chance`:
    by default that of the most frequent true word."""
    labels = [*words, UNREAD]
    counts = np.zeros((len(words), len(labels)))
    for gold, said, _ in pairs:
        counts[words.index(gold), labels.index(said) if said in labels else -1] += 1
    chance = counts.sum(axis=1).max() / len(pairs) if chance is None else chance
    right = proportion(
        np.array([gold == said for gold, said, _ in pairs]), np.array([cluster for _, _, cluster in pairs])
    )
    verdict = "" if right.low > chance else ", not beyond chance"
    present = [index for index in range(len(words)) if counts[index].sum() or counts[:, index].sum()]
    unread = [len(words)] if counts[:, -1].sum() else []
    order = present + unread
    drawing = charts.confusion([labels[index] for index in order], counts[np.ix_(present, order)])
    figures = f"{len(pairs)} questions, {percent(right.value)} right, chance {percent(chance)}{verdict}"
    return f"<figure><figcaption>{escape(title)} <small>{figures}</small></figcaption>{drawing}</figure>"


def _wedges(run: Run) -> list[tuple[float, float, float, int]]:
    """Centre, width, accuracy and count of each sector of azimuths, from direction questions about one sound."""
    sectors: dict[int, list[float]] = defaultdict(list)
    for entry in run.main:
        azimuths = [event["azimuth"] for event in entry.row.events if event.get("azimuth") is not None]
        if entry.score is not None and entry.row.gold.casefold() in DIRECTIONS and len(azimuths) == 1:
            sectors[round(azimuths[0] / SECTOR) % (360 // SECTOR)].append(entry.score.value)
    return [
        (float(SECTOR * index), SECTOR - 2.0, math.fsum(values) / len(values), len(values))
        for index, values in sorted(sectors.items())
    ]
