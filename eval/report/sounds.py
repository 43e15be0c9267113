"""Clips to hear beside what the model said about them, and what went wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from audio_llm.audio import Waveform
from audio_llm.errors import AudioLLMError
from audio_llm.inspection.shards import playable
from eval.benchmarks import open_benchmark
from eval.figures import charts
from eval.figures.runs import Run
from eval.figures.scores import Scored
from eval.predictions import Prediction
from eval.report.markup import escape, kind_of, note, table
from eval.scorers.base import Score

CLIPS, FAILURES = 12, 40
HEARD = 8  # of the failures, how many can be listened to in their table (a clip is a few hundred kilobytes of the page)
NOT_ASKED = 10  # questions without an answer that are listed

CHANNELS = {"binaural": ("left", "right"), "stereo": ("left", "right"), "foa": ("W", "Y", "Z", "X")}


def listening(run: Run) -> tuple[str, str]:
    """Both sections: clips with their exchange, and failures. The data is opened once for both."""
    chosen = choose_clips(run.main)
    failed = worst_answers(run)
    shown = {entry.row.id for entry in chosen}
    heard = [row.id for row, _ in failed if row.id not in shown][:HEARD]
    sounds = waveforms(run, [*shown, *heard])
    return listen(chosen, sounds), failures(run, failed, shown & set(sounds), sounds)


def waveforms(run: Run, wanted: Sequence[str]) -> dict[str, list[Waveform]]:
    """The sounds of the items `wanted`, as far as the data is still where it was."""
    data = run.manifest.get("data", [])
    sounds: dict[str, list[Waveform]] = {}
    if not wanted or not data:
        return sounds
    try:
        collection = open_benchmark(run.benchmark or "scenes", data, **run.manifest.get("options", {}))
    except AudioLLMError:  # the report is about stored answers: data that is gone costs only its sounds
        return sounds
    places = {item.id: index for index, item in enumerate(collection.items)}
    for name in wanted:
        try:
            sounds[name] = collection.waveforms(places[name])
        except (AudioLLMError, KeyError):
            continue
    return sounds


def listen(chosen: Sequence[Scored], sounds: Mapping[str, Sequence[Waveform]]) -> str:
    """A dozen clips with spectrogram, question, reasoning and answer: two right ones for each wrong one."""
    if not sounds:
        return note("The data of this run is not where it was; its sounds cannot be shown.")
    cards = [
        _clip_card(entry.row, entry.score, sounds[entry.row.id])
        for entry in chosen
        if entry.score is not None and entry.row.id in sounds
    ]
    return f'<div class="clips">{"".join(cards)}</div>'


def choose_clips(scored: Sequence[Scored]) -> list[Scored]:
    """Up to ``CLIPS`` replies, kinds of question in turn, every third one wrong where there are such."""
    turns: dict[tuple[bool, str], int] = defaultdict(int)
    ranked: list[tuple[int, int, bool]] = []
    for index, entry in enumerate(scored):
        if entry.score is None:
            continue
        right = entry.score.value == 1.0
        ranked.append((turns[right, entry.row.question_type], index, right))
        turns[right, entry.row.question_type] += 1
    ranked.sort()
    good, bad = ([index for _, index, right in ranked if right is wanted] for wanted in (True, False))
    wrong = bad[: max(CLIPS // 3, CLIPS - len(good))]
    return [scored[index] for index in sorted(good[: CLIPS - len(wrong)] + wrong)]


def _clip_card(row: Prediction, found: Score, waveforms: Sequence[Waveform]) -> str:
    heard = ""
    for wave in waveforms:
        channels = CHANNELS.get(wave.layout, ("mono",))
        heard += charts.spectrogram_with_axes(wave.samples, wave.sample_rate, channels) + player(wave)
    verdict = "right" if found.value == 1 else "wrong"
    return (
        f'<article class="clip {verdict}">{heard}'
        f'<p class="kind">{escape(kind_of(row.question_type))}{_truth(row)}</p>{_exchange(row, found)}</article>'
    )


def _exchange(row: Prediction, found: Score) -> str:
    """Question, reasoning and answer, right or wrong."""
    reply = row.reply()
    marks = {found.answer: "said", row.gold: "gold"}
    options = "".join(f'<li class="{marks.get(choice, "")}">{escape(choice)}</li>' for choice in row.choices)
    thinking = f'<p class="think">{escape(reply.thinking)}</p>' if reply.thinking else ""
    answer = found.answer if found.answer is not None else (reply.answer or "nothing readable")
    gold = "" if found.value == 1 else f" <span>truth: {escape(row.gold)}</span>"
    mark = "✓" if found.value == 1 else "✗"
    return (
        f'<p class="question">{escape(row.question)}</p><ol class="options">{options}</ol>{thinking}'
        f'<p class="answer"><b>{mark}</b> {escape(answer)}{gold}</p>'
    )


def _truth(row: Prediction) -> str:
    places = [
        f"{event['label']} at {event['azimuth']:.0f}°{side_of(event['azimuth'])}"
        + (f", {event['distance']:.1f} m" if event.get("distance") else "")
        for event in row.events
        if event.get("label") and event.get("azimuth") is not None
    ]
    return f" <small>{escape('; '.join(places))}</small>" if places else ""


def side_of(azimuth: float) -> str:
    """Where an azimuth (degrees, 90 to the left) is, in words in parentheses."""
    turned = (round(azimuth) + 180) % 360 - 180
    words = ["left" if turned > 0 else "right"] if turned % 180 else []
    words += ["behind"] if abs(turned) > 90 else ["front"] if not turned else []
    return f" ({', '.join(words)})"


def player(waveform: Waveform) -> str:
    """A sound to be heard in the page."""
    return f'<audio controls preload="metadata" src="{charts.data_url("audio/wav", playable(waveform))}"></audio>'


# ------------------------------------------------------------------------------------------------------------ failures


def worst_answers(run: Run) -> list[tuple[Prediction, Score]]:
    """Wrong answers: unreadable replies first, then kinds of question in turn."""
    wrong = [(entry.row, entry.score) for entry in run.main if entry.score is not None and entry.score.value < 1]
    turns: dict[str, int] = {}
    ranked = []
    for index, (row, found) in enumerate(wrong):
        turn = turns.get(row.question_type, 0)
        turns[row.question_type] = turn + 1
        ranked.append((found.parsed, turn, index, row, found))
    ranked.sort(key=lambda entry: entry[:3])
    return [(row, found) for *_, row, found in ranked]


def failures(
    run: Run, failed: Sequence[tuple[Prediction, Score]], above: set[str], sounds: Mapping[str, Sequence[Waveform]]
) -> str:
    """Wrong answers and unreadable replies with the raw reply, the first of them to hear; questions not asked."""
    refused = [entry.row for entry in run.main if entry.row.error]
    rows = [_failure(row, found, above, sounds) for row, found in failed[:FAILURES]]
    rows += [
        [f"<code>{escape(row.id)}</code>", escape(row.question), escape(row.gold), "not asked", escape(row.error), ""]
        for row in refused[:NOT_ASKED]
    ]
    if not rows:
        return ""
    counts = f"{len(failed)} wrong, {len(refused)} not asked; {len(rows)} shown, unreadable replies first."
    head = ["item", "question", "truth", "answer", "why; open it for the whole reply", "sound"]
    return note(counts) + table(head, rows, classes={4: "wide"})


def _failure(row: Prediction, found: Score, above: set[str], sounds: Mapping[str, Sequence[Waveform]]) -> list[str]:
    heard = "heard above" if row.id in above else "".join(map(player, sounds.get(row.id, ())))
    return [
        f"<code>{escape(row.id)}</code><br><small>{escape(row.question_type)}</small>",
        escape(row.question) + (f"<br><small>{escape(' · '.join(row.choices))}</small>" if row.choices else ""),
        escape(row.gold),
        escape(found.answer or "–"),
        f"<details><summary>{escape(found.explanation)}</summary><pre>{escape(row.raw)}</pre></details>",
        heard,
    ]
