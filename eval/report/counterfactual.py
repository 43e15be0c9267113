"""Pairs of scenes that differ by one cause: figures, and pairs to hear: before, after, what should change, what did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from audio_llm.audio import Waveform
from audio_llm.language.clauses import follow
from eval.figures.counterfactual import ALL, COLUMNS, Pair, faithfulness, pairs_of
from eval.figures.runs import Run
from eval.report.markup import escape, estimate, note, table
from eval.report.sounds import player, side_of, waveforms

SHOWN = 2  # pairs of each kind that can be heard

_NOTE = (
    "Each pair is a scene and the same scene with one cause changed; all else is the same. <b>Answer changes</b>: "
    "where the right answer is another one after it, the share answered right and otherwise than before. "
    "<b>Answer stays</b>: where it must, the share with the same answer. <b>Reasoning</b>: the same over what it says "
    "of single events: label, side, height, distance, onset, order. <b>Decoration</b>: of pairs with both answers "
    "right, the share whose reasoning did not follow what changed. Silence and text only: what comes out without "
    "listening."
)


def pairs(runs: Sequence[Run]) -> str:
    """The whole section; "" where no run has pairs."""
    rows = []
    for run in runs:
        for name, kinds in faithfulness(run).items():
            shown = kinds if name == run.answers else {ALL: kinds[ALL]}
            for kind, found in shown.items():
                cells = [getattr(found, attribute) for _, attribute in COLUMNS]
                figures = [estimate(value) if value.n else "–" for value in cells]
                sound = "the true sound" if name == run.answers else name.replace("_", " ")
                rows.append([escape(run.name), escape(sound), escape(kind), str(found.pairs), *figures])
    if not rows:
        return ""
    head = ["run", "asked with", "what was changed", "pairs", *(title for title, _ in COLUMNS)]
    return table(head, rows) + note(_NOTE) + _listen(runs[-1])


def _listen(run: Run) -> str:
    """Some pairs of every kind of the last run, those whose reasoning or answer did not follow first."""
    ranked: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs_of(run.main), key=lambda pair: pair.answer_follows and pair.reasoning.whole):
        kind = ranked[pair.told["kind"]]
        if len(kind) < SHOWN - 1 or (len(kind) < SHOWN and pair.answer_follows and pair.reasoning.whole):
            kind.append(pair)
    chosen = [pair for _, found in sorted(ranked.items()) for pair in found]
    sounds = waveforms(run, list(dict.fromkeys(one.row.id for pair in chosen for one in (pair.before, pair.after))))
    cards = "".join(_card(pair, sounds) for pair in chosen)
    return f'<h3>Pairs to hear: {escape(run.name)}</h3><div class="clips">{cards}</div>' if cards else ""


def _card(pair: Pair, sounds: Mapping[str, Sequence[Waveform]]) -> str:
    row = pair.after.row
    follows = pair.answer_follows and pair.reasoning.whole
    parts = []
    for title, entry, score in zip(("before", "after"), (pair.before, pair.after), pair.scores, strict=True):
        heard = "".join(map(player, sounds.get(entry.row.id, ())))
        thinking = entry.row.reply().thinking or ""
        answer = score.answer if score.answer is not None else "nothing readable"
        mark = "✓" if score.value == 1 else f"✗ <span>truth: {escape(entry.row.gold)}</span>"
        parts.append(
            f'<p class="kind">{title}</p>{heard}<p class="think">{escape(thinking)}</p>'
            f'<p class="answer">{escape(answer)} {mark}</p>'
        )
    verdict = "right" if follows else "wrong"
    return (
        f'<article class="clip {verdict}"><p class="kind">{escape(pair.told["kind"])}</p>'
        f'<p class="question">{escape(row.question)}</p>{"".join(parts)}{_clauses(pair)}</article>'
    )


def _clauses(pair: Pair) -> str:
    """What must change, and whether it did; what must stay and did not."""
    told = pair.told
    answer = "the answer must change" if pair.must_change else "the answer must stay"
    lines = [f"{answer}: {'it does' if pair.answer_follows else 'did not follow'}"]
    texts = [entry.row.reply().thinking or "" for entry in (pair.before, pair.after)]
    for name, verb in (("changes", "must change"), ("keeps", "must stay")):
        for clause in told[name]:
            one = {"changes": told["changes"], "keeps": told["keeps"]}
            other = "keeps" if name == "changes" else "changes"
            found = follow(one | {name: [clause], other: []}, *texts)
            values = found.caused if name == "changes" else found.others
            verdict = "not said" if not values else "it does" if values[0] else "did not follow"
            if name == "changes" or verdict == "did not follow":
                lines.append(f"{_in_words(clause)} {verb}: {verdict}")
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _in_words(clause: Mapping[str, Any]) -> str:
    kind, was, now = clause["clause"], clause["was"], clause["is"]
    if kind == "label":
        return f"{was}" + (f" → {now or 'not there'}" if was != now else "")
    name = f"{kind} of the {clause['labels'][0]}"
    if kind == "order":
        first, second = ("before" if value > 0 else "after" for value in (was, now))
        return f"{name} ({first} the {clause['beside'][0]}" + (f" → {second})" if first != second else ")")
    unit = {"side": "°", "height": "°", "distance": " m", "onset": " s"}[kind]
    words = [f"{value:.3g}{unit}" + (side_of(value) if kind == "side" else "") for value in (was, now)]
    return f"{name}, {' → '.join(dict.fromkeys(words))}"
