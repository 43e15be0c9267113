"""The reward ``counterfactual``: a scene beside the same scene with one cause changed.

Of the data of a run some samples have ``meta.counterfactual`` (see :mod:`audio_llm.language.clauses`): one cause of
another sample's scene is changed in theirs. Both stand in one step (:mod:`audio_llm.training.pairs`), each with its own
group of replies, and a reply is paid for what it makes beside the replies of the other group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from audio_llm.language.clauses import Clause, Read, compare, read
from audio_llm.language.parts import completion_text
from audio_llm.language.replies import Reply, normalise, read_reply

NAME = "counterfactual"
CLAUSES = ("label", "side", "distance", "order")  # what captions of scenes say


def counterfactual(
    prompts: Sequence[Any], completions: Sequence[Any], *, clauses: Sequence[str] = CLAUSES, **columns: Any
) -> list[float | None]:
    """Do answer and reasoning differ where the two scenes of a pair differ, and only there?

    A reply to one scene beside a reply to the other is worth the mean of up to three parts: the answer (changed to the
    right one where it must, the same where it must stay), the share of clauses that followed what was changed, the
    share of the others that stayed. Of the kinds in `clauses` one that is not said is worth 0; others do not count.
    A reply earns the mean over all replies to the other scene. Rows whose other scene is not in the batch get None.
    """
    told = columns.get(NAME) or [None] * len(completions)
    options = columns.get("choices") or [None] * len(completions)
    names = columns.get("sample_id") or ()
    folders = columns.get("folder") or [""] * len(names)
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)  # ids are of one folder: recipes of two seeds share them
    for place, name in enumerate(zip(folders, names, strict=True)):
        rows[name].append(place)
    replies = [
        read_reply(completion_text(completion), choices or ())
        for completion, choices in zip(completions, options, strict=True)
    ]
    answers = [_answer(reply, choices) for reply, choices in zip(replies, options, strict=True)]
    earned: dict[int, list[float]] = defaultdict(list)
    for (folder, _), after in rows.items():
        about = told[after[0]]
        before = rows.get((folder, about["of"]), []) if about else []
        if not before:
            continue
        pair = _Pair(about, clauses, *(normalise(columns["answer"][places[0]]) for places in (before, after)))
        first = {place: pair.read(replies[place], 0) for place in before}
        second = {place: pair.read(replies[place], 1) for place in after}
        for one in before:
            for other in after:
                value = pair.worth(answers[one], answers[other], first[one], second[other])
                earned[one].append(value)
                earned[other].append(value)
    return [fmean(earned[place]) if place in earned else None for place in range(len(completions))]


def _answer(reply: Reply, choices: Sequence[str] | None) -> str | None:
    """What a reply answers, in normal form; None where nothing can be read."""
    if choices:
        return None if reply.choice is None else normalise(choices[reply.choice])
    return normalise(reply.said) or None


class _Pair:
    """Two scenes: what must change and what must stay, of the kinds of clauses that count, and both right answers."""

    def __init__(self, about: Mapping[str, Any], kinds: Sequence[str], was: str, now: str) -> None:
        self.was, self.now = was, now
        self.about: dict[str, list[Clause]] = {
            name: [clause for clause in about[name] if clause["clause"] in kinds] for name in ("changes", "keeps")
        }

    def read(self, reply: Reply, scene: int) -> Read:
        return read(self.about, reply.thinking or "", scene)

    def worth(self, before: str | None, after: str | None, first: Read, second: Read) -> float:
        """Of a reply to either scene, from 0 to 1."""
        said = before is not None and after is not None
        follows = before != after and after == self.now if self.was != self.now else before == after
        parts = [float(said and follows)]
        followed = compare(self.about, first, second)
        for values, wanted in ((followed.caused, "changes"), (followed.others, "keeps")):
            if self.about[wanted]:
                parts.append(sum(values) / len(self.about[wanted]))
        return fmean(parts)
