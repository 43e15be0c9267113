"""Replies on which public scorers disagree, with what each deserves: a table that is computed whenever it is shown."""

from __future__ import annotations

from dataclasses import dataclass

from eval.predictions import Prediction
from eval.scorers import SCORERS

CHOICES = ("A cat meowing", "A dog barking", "A dog growling", "Rain")
GOLD = "A dog barking"
# What each reply deserves; "cut" is a reply that ended at the token limit, before any answer.
REPLIES = (
    ("A dog barking", 1),
    ("B", 1),
    ("B. A dog barking", 1),
    ("The sound is a dog barking.", 1),
    ("It is a dog barking, not a cat meowing.", 1),
    ("<think>Could be rain, but no.</think><answer>A dog barking</answer>", 1),
    ("", 0),
    ("<think>First, I listen to the spectral", 0),
    ("A dog growling", 0),
)
PUBLIC = ("mmau-official", "letter-or-random", "tag-exact")
OURS = ("option-resolution", "mmau-official-resolved")


@dataclass(frozen=True)
class Row:
    """One reply: what it deserves and its value under each scorer."""

    reply: str
    deserved: int
    values: dict[str, float]


def rows() -> list[Row]:
    """The table, scored now."""
    found = []
    for number, (reply, deserved) in enumerate(REPLIES):
        prediction = Prediction(str(number), "sound", "mmau", "Which sound?", list(CHOICES), GOLD, reply)
        scores = {name: SCORERS[name].score(prediction) for name in (*PUBLIC, *OURS)}
        found.append(Row(reply, deserved, {name: score.value for name, score in scores.items() if score is not None}))
    return found


def wrong(table: list[Row]) -> list[str]:
    """Replies that one of our scorers does not give what they deserve."""
    return [row.reply for row in table if any(row.values[name] != row.deserved for name in OURS)]


def markdown(table: list[Row]) -> str:
    """The table in Markdown; a value that the reply does not deserve is bold."""
    names = (*PUBLIC, *OURS)
    lines = [f'gold "{GOLD}"; choices: {" / ".join(CHOICES)}', ""]
    lines += [f"| reply | {' | '.join(names)} | deserved |", "|---|" + "---|" * (len(names) + 1)]
    for row in table:
        cells = [f"{row.values[name]:g}" for name in names]
        marked = [cell if float(cell) == row.deserved else f"**{cell}**" for cell in cells]
        lines.append(f"| {row.reply or '(empty)'} | {' | '.join(marked)} | {row.deserved} |")
    return "\n".join(lines)
