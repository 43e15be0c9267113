"""Trials as HTML. Replies, questions, labels and file names are strangers' texts: everything is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from audio_llm.answering.page.drawing import COLOURS, dial, draw_channels, timeline, words
from audio_llm.answering.page.statements import Statement, read_statements
from audio_llm.answering.page.trial import Trial, verdict
from audio_llm.audio import Waveform
from audio_llm.language.prompts import lettered
from audio_llm.shards.schema import Event

STYLE = """
.trial { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 16px; margin: 0 !important;
  overflow-wrap: anywhere; }
.trial h3 { margin: 0 0 4px; font-size: 0.85em; font-weight: 600; opacity: 0.75; }
.trial .answer { font-size: 1.35em; font-weight: 600; margin: 4px 0; white-space: pre-wrap; }
.trial .thinking { border-left: 3px solid var(--border-color-primary); padding-left: 10px; margin: 8px 0;
  opacity: 0.75; white-space: pre-wrap; }
.note { font-size: 0.85em; opacity: 0.75; margin: 4px 0; }
.trial ol { list-style: none; margin: 6px 0; padding: 0; font-size: 0.9em; }
.trial li b { display: inline-block; min-width: 1.5em; text-align: center; border-radius: 1em; color: #fff;
  margin-right: 6px; }
.question { white-space: pre-wrap; margin: 0 0 8px; overflow-wrap: anywhere; }
.trials { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 215px), 1fr)); gap: 12px; }
.error { border-left: 4px solid #d55e00; padding: 8px 12px; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid #7d8590; padding: 6px 12px; margin: 0 0 12px; }
.verdict.for { border-color: #009e73; } .verdict.against { border-color: #e69f00; }
#head h1 { font-size: clamp(1.3em, 5vw, 2em); overflow-wrap: anywhere; }
#earlier hr { margin: 16px 0; }
#examples td { text-align: left; white-space: normal; }
.channels { width: 100%; max-width: 730px; height: auto; display: block; }
.dial { width: 100%; max-width: 210px; display: block; margin: 4px auto; }
.times { width: 100%; display: block; }
svg .rim { fill: none; stroke: currentColor; opacity: 0.5; } svg .axis { stroke: currentColor; opacity: 0.15; }
svg .listener { fill: currentColor; opacity: 0.5; } svg .side { font-size: 11px; fill: currentColor; opacity: 0.75; }
svg .number { font-size: 12px; fill: #fff; text-anchor: middle; font-weight: 700; }
svg .real { fill: none; stroke: currentColor; stroke-width: 2; stroke-dasharray: 4 3; }
"""


@dataclass(frozen=True)
class Scene:
    """What an example clip really holds: its events, the right answer, its caption in words."""

    events: tuple[Event, ...] = ()
    answer: str = ""
    caption: str = ""


def error_card(message: str) -> str:
    return f'<div class="error" role="alert">{words(message)}</div>'


def sound_card(waveform: Waveform, name: str) -> str:
    """The channels of a sound as a picture, with its name and what it is."""
    picture = base64.b64encode(draw_channels(waveform)).decode("ascii")
    channels = f"{waveform.num_channels} channel{'s' if waveform.num_channels > 1 else ''}"
    about = f"{name}: {channels}, {waveform.sample_rate} Hz, {waveform.seconds:.2f} s"
    return (
        f'<img class="channels" alt="waveform and spectrogram of each channel" src="data:image/png;base64,{picture}">'
        f'<div class="note">{words(about)}</div>'
    )


def trials_html(trials: Sequence[Trial], seconds: float, scene: Scene | None = None) -> str:
    """The trials of one question side by side, and what their comparison says. The `scene` is drawn on the dial of the
    sound as it is; `seconds` is the sound's length."""
    if not trials:
        return ""
    cards = "".join(_card(one, seconds, scene if one.sound == "as it is" else None) for one in trials)
    heard = next((one for one in trials if one.sound == "as it is" and one.reply), None)
    verdicts = [
        f'<p class="verdict {_KINDS[found.listens]}"><b>{words(_HEADS[one.sound])}.</b> {words(found.words)}</p>'
        for one in trials
        if heard and one.sound != "as it is" and one.reply and (found := verdict(heard, one))
    ]
    offered = " ".join(lettered(trials[0].choices)) if any(one.reply for one in trials) else ""
    asked = f'<p class="question"><b>{words(trials[0].question)}</b> {words(offered)}</p>'
    return f'{asked}{"".join(verdicts)}<div class="trials">{cards}</div>'


_KINDS = {True: "for", False: "against", None: "neither"}
_HEADS = {"as it is": "The sound as it is", "in silence": "In silence", "mirrored": "Left and right exchanged"}


def _card(trial: Trial, seconds: float, scene: Scene | None) -> str:
    head = f"<h3>{words(_HEADS[trial.sound])}</h3>"
    if trial.reply is None:
        return f'<div class="trial">{head}{error_card(trial.error)}</div>'
    reply = trial.reply
    parts = [head, f'<div class="answer">{words(reply.answer or "(no words)")}</div>']
    if trial.choices and reply.choice is None:
        parts.append(f'<p class="note">No choice: {words(reply.problem or "none is named")}.</p>')
    elif trial.choices:
        parts.append(f'<p class="note">Read as {words(lettered(trial.choices)[reply.choice or 0])}.</p>')
    if reply.thinking:
        parts.append(f'<div class="thinking">{words(reply.thinking)}</div>')
    if reply.semantic_elements:
        parts.append(f'<p class="note">{words(reply.semantic_elements)}</p>')
    statements = read_statements(reply.thinking or "") or read_statements(reply.answer)
    events = scene.events if scene else ()
    azimuths = [one.azimuth for one in statements] + [event.azimuth for event in events]
    if any(azimuth is not None for azimuth in azimuths):
        parts.append(dial(statements, events))
        if events:
            parts.append('<p class="note">Dashed: where it really was.</p>')
    parts += [timeline(statements, seconds), _listed(statements)]
    if scene and (scene.answer or scene.caption):
        really = " ".join(
            filter(None, [scene.caption, f"The right answer is: {scene.answer}." if scene.answer else ""])
        )
        summary = '<summary class="note">What was really rendered</summary>'
        parts.append(f'<details>{summary}<p class="note">{words(really)}</p></details>')
    parts.append(f'<p class="note">{trial.seconds:.1f} s</p>')
    return f'<div class="trial">{"".join(parts)}</div>'


def _listed(statements: Sequence[Statement]) -> str:
    rows = []
    for number, one in enumerate(statements):
        facts = []
        if one.seconds is not None:
            begin, end = one.seconds
            facts.append(f"{begin:g} s" if begin == end else f"{begin:g} to {end:g} s")
        if one.sides:
            facts.append(" ".join(one.sides))
        elif one.azimuth is not None:
            facts.append(f"azimuth {one.azimuth:g}°")
        if one.elevation and not one.sides:
            facts.append(f"elevation {one.elevation:g}°")
        if one.metres is not None:
            facts.append(f"{one.metres:g} m")
        mark = f'<b style="background:{COLOURS[number % len(COLOURS)]}">{number + 1}</b>'
        rows.append(f"<li>{mark}{words(', '.join(facts))}</li>")
    return f"<ol>{''.join(rows)}</ol>" if rows else ""
