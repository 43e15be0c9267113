"""Captions by the measures of their literature: METEOR, CIDEr-D, ROUGE-L and BLEU, by the public package pycocoevalcap.

Its words are those of Stanford's tokenizer and its METEOR is the authors' program, which both run in Java.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.errors import AudioLLMError, PrerequisiteError, describe, require
from eval.embedders import TextEmbedder
from eval.figures.estimates import Estimate, average
from eval.predictions import Prediction
from eval.scorers.base import Score, unscored
from eval.scorers.mmau_pro import check_names, embedder_of
from eval.scorers.text import references

HIGHEST = 10  # of CIDEr-D
KEPT = 16  # passes whose figures are kept
CIDER, ROUGE, SIMILARITY = "CIDEr-D", "ROUGE-L", "sentence similarity"
CIDER_SHARE = "CIDEr-D / 10"  # of one caption: as a share, which all of its parts are
Key = tuple[str, str, float, int]


class CaptionError(AudioLLMError):
    """The programs that score captions failed."""


@dataclass(frozen=True)
class Measured:
    """What a pass of captions comes to. By caption, ``(n,)``: METEOR, CIDEr-D, ROUGE-L. Of all of them together: METEOR
    (weighed by their words) and BLEU of up to four words, as these are published."""

    meteor: np.ndarray
    cider: np.ndarray
    rouge: np.ndarray
    whole: dict[str, float]


class CaptionMeasures:
    """METEOR of each caption; CIDEr-D, ROUGE-L, and METEOR and BLEU of the whole set beside it.

    How much a word counts in CIDEr-D depends on how many other sounds of the set have it, so it is a figure of a set:
    of one sound there is none. All captions of a sound count as often as its file has them. SPICE is not among the
    measures: its program fetches another one from the network. Setting: ``embedder``, a local sentence encoder's
    folder, adds the mean cosine to the references, the larger part of FENSE (Zhou et al. 2022).
    """

    name = "captions"
    version = "1"
    ranked_by = CIDER
    SETTINGS = ("embedder",)

    def __init__(self, embedder: TextEmbedder | None = None) -> None:
        self.title = "METEOR of captions (pycocoevalcap" + (f", {embedder.name})" if embedder else ")")
        self.problems: dict[Key, str] = {}
        self._embed = embedder
        self._scores: dict[Key, Score] = {}
        self._measured: dict[str, Measured] = {}
        self._words: dict[str, str] = {}

    def configured(self, options: Mapping[str, str]) -> CaptionMeasures:
        check_names(self.name, options, self.SETTINGS)
        return CaptionMeasures(embedder_of(options))

    def prepare(self, rows: Sequence[Prediction]) -> None:
        """Score `rows`, each pass and sample by itself. Raises :class:`PrerequisiteError` for what is not installed."""
        sets = _sets(rows)
        for several, found in zip(sets, self._measure(sets), strict=True):
            near = self._similar(several)
            for place, row in enumerate(several):
                said, parts = row.reply().said, {ROUGE: float(found.rouge[place])}
                if len(several) > 1:
                    parts[CIDER_SHARE] = float(found.cider[place]) / HIGHEST
                if near is not None:
                    parts[SIMILARITY] = float(near[place])
                told = ", ".join(f"{name} {100 * part:.1f}" for name, part in parts.items())
                why, value = f"{told}; reference '{row.gold}'", float(found.meteor[place])
                self._scores[row.key] = Score(row.id, row.question_type, value, said or None, why, bool(said), parts)

    def score(self, row: Prediction) -> Score | None:
        """METEOR of the caption; None for a question with choices, and where there is nothing to score."""
        if not _applies(row):
            return None
        if row.key not in self._scores:
            self.prepare([row])
        return self._scores[row.key]

    def aggregate(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, float]:
        """The measures of the whole set, the mean over samples where there are several."""
        sets = [found.whole for found in self._measure(_sets(rows))]
        figures = {name: float(np.mean([one[name] for one in sets])) for name in sets[0]}
        return figures | {name: estimate.value for name, estimate in self.intervals(rows, scores).items()}

    def intervals(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, Estimate]:
        """Of the measures that are means of captions."""
        clusters = np.array([row.cluster for row in rows])
        found = {ROUGE: average(np.array([score.parts[ROUGE] for score in scores]), clusters, 1.0)}
        for name, part, highest in ((CIDER, CIDER_SHARE, HIGHEST), (SIMILARITY, SIMILARITY, 1)):
            if all(part in score.parts for score in scores):
                values = highest * np.array([score.parts[part] for score in scores])
                found[name] = average(values, clusters, float(highest))
        return found

    def _measure(self, sets: Sequence[Sequence[Prediction]]) -> list[Measured]:
        """The measures of each set, from those that are kept or by one run of the programs."""
        texts = [([row.reply().said for row in rows], [_references(row) for row in rows]) for rows in sets]
        keys = [hashlib.sha256(json.dumps(pair).encode()).hexdigest() for pair in texts]
        new = {key: pair for key, pair in zip(keys, texts, strict=True) if key not in self._measured}
        if new:
            check_installed()
            self._tokenise([text for said, known in new.values() for part in (said, *known) for text in part])
            found = {
                key: measure(
                    [self._words[text] for text in said], [[self._words[text] for text in part] for part in known]
                )
                for key, (said, known) in new.items()
            }
            if len(self._measured) + len(new) > KEPT:
                self._measured = {key: self._measured[key] for key in keys if key in self._measured}
            self._measured |= found
        return [self._measured[key] for key in keys]

    def _tokenise(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._words]
        self._words |= dict(zip(new, tokenised(new), strict=True))

    def _similar(self, rows: Sequence[Prediction]) -> np.ndarray | None:
        """(n,) the mean cosine of each caption to its references, at least 0."""
        if self._embed is None:
            return None
        said, known = [row.reply().said for row in rows], [_references(row) for row in rows]
        texts = list(dict.fromkeys([*said, *(text for one in known for text in one)]))
        vectors = dict(zip(texts, self._embed(texts), strict=True))
        means = [
            np.mean([vectors[text] @ vectors[mine] for text in one]) for mine, one in zip(said, known, strict=True)
        ]
        return np.array([max(0.0, float(mean)) if mine else 0.0 for mean, mine in zip(means, said, strict=True)])


def measure(candidates: Sequence[str], known: Sequence[Sequence[str]]) -> Measured:
    """The measures of tokenised `candidates` against the tokenised references of each. Raises :class:`CaptionError`
    where METEOR's program fails."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = {place: [text] for place, text in enumerate(candidates)}
    right = {place: list(texts) for place, texts in enumerate(known)}
    bleu, _ = Bleu(4).compute_score(right, said, verbose=0)
    _, cider = Cider().compute_score(right, said)
    _, rouge = Rouge().compute_score(right, said)
    program = meteor()
    try:
        of_all, of_each = program.compute_score(right, said)
    except (OSError, ValueError) as error:  # its pipe is closed, or empty where a number is due
        program.lock.release()  # held by the call that failed, and waited for when the program is thrown away
        with contextlib.suppress(OSError):
            program.meteor_p.stdin.close()
        meteor.cache_clear()
        raise CaptionError(describe("METEOR's program", "a score a caption", str(error))) from error
    whole = {"METEOR of the set": float(of_all), **{f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}}
    return Measured(np.array(of_each), np.asarray(cider), np.asarray(rouge), whole)


def tokenised(texts: Sequence[str]) -> list[str]:
    """Words of Stanford's tokenizer in lower case, without the punctuation that pycocoevalcap leaves out.

    Its own call of this program writes beside its code, in the machine's encoding, and takes some characters for the
    end of a line. Raises :class:`CaptionError` where it fails."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    lines = [" ".join(text.split()) for text in texts]
    if not any(lines):
        return lines
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    said = "".join(f"{line}\n" for line in lines).encode()
    done = subprocess.run([*command, "-encoding", "UTF-8"], input=said, capture_output=True, check=False)
    found = done.stdout.decode("utf-8", errors="replace").split("\n")
    if done.returncode or len(found) != len(lines) + 1:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"{len(found) - 1} lines"]
        raise CaptionError(describe("Stanford's tokenizer", f"{len(lines)} lines of words", why[0]))
    left_out = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split(" ") if word not in left_out).strip() for line in found[:-1]]


def check_installed() -> None:
    """Raise :class:`PrerequisiteError` where captions cannot be scored here."""
    require("pycocoevalcap", "scoring captions", "captions")
    if shutil.which("java") is None:
        cure = "Install it, for instance Debian's default-jre-headless."
        raise PrerequisiteError(describe("scoring captions", "Java, for METEOR and its tokenizer", "no 'java'", cure))


@cache
def meteor() -> Any:
    """METEOR's program, started once: it takes seconds to read its paraphrases. It reads and writes UTF-8 whatever the
    machine's encoding is, and ends with this process."""
    from pycocoevalcap.meteor.meteor import Meteor

    name = "JAVA_TOOL_OPTIONS"
    before = os.environ.get(name)
    os.environ[name] = f"{before or ''} -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8".strip()
    try:
        return Meteor()
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _applies(row: Prediction) -> bool:
    return not unscored(row) and not row.choices


def _references(row: Prediction) -> list[str]:
    """All of them, those that are equal as well: CIDEr-D counts each."""
    more = row.meta.get("references")
    return [str(text) for text in more] if isinstance(more, list) and more else references(row)


def _sets(rows: Sequence[Prediction]) -> list[list[Prediction]]:
    """The rows that have captions, by pass and sample: each question once."""
    found: dict[tuple[str, float, int], list[Prediction]] = defaultdict(list)
    for row in rows:
        if _applies(row):
            found[row.control, row.temperature, row.sample].append(row)
    return list(found.values())


SCORERS = (CaptionMeasures(),)
