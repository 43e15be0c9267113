"""A question about each recording: code decides what is asked and answered, a language model may word it."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.shards.schema import MOST_CHOICES
from data_prep.corpus import endpoint, slots, wording
from data_prep.corpus import facts as known
from data_prep.corpus.asked import FORMS, REASONS, Asked, Rules
from data_prep.corpus.endpoint import Asking, Model, Unusable, together
from data_prep.corpus.facts import Fact
from data_prep.corpus.slots import LABELS, SKILLS, Wish
from data_prep.corpus.stage import Item, Reject, Stage, Step
from data_prep.corpus.wording import Wording
from data_prep.scenes.rooms import seeded

TEXTS = ("question", "choices", "answer", "thinking", "semantic_elements")  # of a question
ALL_SKILLS = tuple(dict.fromkeys(name for skills in SKILLS.values() for name in skills))


@dataclass
class Generate(Step):
    """Gives ``questions``: each with its ``form``, ``question``, ``choices``, ``answer``, ``thinking``,
    ``semantic_elements``, the ``skill`` that it asks for, the ``evidence`` (ids of facts), who wrote each of these
    texts (``written_by``: ``templates``, or the model's name), its ``type`` (form and skill) and the ``events``, what
    sounds. Where there are fewer than `count`, ``generate_dropped`` counts what could not be made, by reason.

    With `mode` ``slots``, code chooses form, skill, answer, options and evidence, and words them by templates; a model
    behind `url` may word them again. A text that loses a slot, or that the ``verify`` which follows would refuse, is
    asked for anew. With ``free``, the model writes it all.
    """

    name: ClassVar[str] = "generate"
    version: ClassVar[int] = 4
    needs: ClassVar[tuple[str, ...]] = ("facts",)
    gives: ClassVar[tuple[str, ...]] = ("questions", "generate_dropped")
    retryable = (*wording.REASONS, *REASONS, *endpoint.REASONS)
    reasons = ("no_facts", *retryable)
    free: ClassVar[tuple[str, ...]] = ("url", "retries", "retry")

    mode: Literal["slots", "free"] = "slots"  # who decides what is asked
    count: int = 1  # questions of a recording, no two alike; fewer where its facts give no more
    # Shares of captions, open questions and questions with options.
    forms: dict[str, float] = field(default_factory=lambda: {"choice": 1.0})
    skills: dict[str, float] = field(default_factory=dict)  # shares of skills; all alike where none is named
    options: int = 4  # options of a question with options
    labels: list[str] = field(default_factory=lambda: list(LABELS))  # what wrong options are drawn from
    least: float = 0.5  # confidence that a fact needs to be asked about
    words: tuple[int, int] = (15, 120)  # words of thinking that a model is asked for
    fallback: bool = False  # whether our own words stay where a model's cannot be used; `written_by` tells
    url: str = ""  # of the server with the model; in mode slots there need be none
    model: str = ""  # its name there
    temperature: float = 0.7  # of its replies
    max_tokens: int = 768  # tokens of a reply
    tries: int = 3  # requests with a seed each until a reply can be used
    retries: int = 3  # of a request that meets a busy server
    seed: int = 0  # of everything that is drawn
    retry: bool = False  # whether a model is asked with further seeds where its kept replies were of no use

    def __post_init__(self) -> None:
        self._rules: Rules | None = None  # of the `verify` that follows

    def before(self, stages: Sequence[Stage]) -> None:
        found = (getattr(stage, "rules", None) for stage in stages)
        self._rules = next((rules for rules in found if isinstance(rules, Rules)), None)

    def check(self) -> None:
        for key, known_names, named in (("forms", FORMS, self.forms), ("skills", ALL_SKILLS, self.skills)):
            for name, share in named.items():
                if name not in known_names:
                    found = f"'{name}'{nearest(str(name), known_names)}"
                    raise ConfigError(describe(f"generate.{key}", f"names among {', '.join(known_names)}", found))
                if share < 0:
                    raise ConfigError(describe(f"generate.{key}.{name}", "a share from 0 on", f"{share:g}"))
        if not sum(self.forms.values()) > 0:
            raise ConfigError(describe("generate.forms", "shares that are not all 0", f"{self.forms}"))
        if self.count < 1:
            raise ConfigError(describe("generate.count", "1 or more", f"{self.count}"))
        if not 2 <= self.options <= MOST_CHOICES:
            raise ConfigError(describe("generate.options", f"2 to {MOST_CHOICES}", f"{self.options}"))
        if not 0 <= self.words[0] <= self.words[1]:
            raise ConfigError(describe("generate.words", "the fewest and the most", f"{self.words}"))
        if self.mode == "free" and not self.url:
            raise ConfigError(describe("generate.url", "a server for the mode free", "none"))
        if self.url:
            self._asking.check("generate")

    def digests(self) -> Mapping[str, str]:
        if not self.url:
            return {}
        return {"prompts": wording.digest()} | ({"rules": repr(self._rules)} if self.mode == "slots" else {})

    @property
    def _asking(self) -> Asking:
        where = (self.url, self.model, self.temperature, self.max_tokens)
        return Asking(*where, tries=self.tries, retries=self.retries, again=self.retry)

    def open(self, folder: Path) -> None:
        self._wish = Wish(self.forms, self.skills, self.options, tuple(self.labels), self.least)
        self._model = Model(self._asking, folder, "generate") if self.url else None

    def close(self) -> None:
        if self._model is not None:
            self._model.close()

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return together(self._one, items) if self._model is not None else [self._one(item) for item in items]

    def _one(self, item: Item) -> Item | Reject:
        facts = known.read(item.fields.get("facts"))
        make = self._slots if self.mode == "slots" else self._free
        found: dict[tuple[str, str], dict[str, Any]] = {}
        events = slots.events(facts, self.least)
        rejects: list[Reject] = []
        for number in range(self.count if self.count == 1 else 4 * self.count):
            made = make(item, facts, number, [key[1] for key in found])
            if isinstance(made, Reject):
                rejects.append(made)
                if made.reason in ("no_facts", "no_reply", "refused"):
                    break
                continue
            asked, by_model = made
            about = {
                "written_by": self._written(asked, by_model),
                "type": f"{asked.form}, {asked.skill}",
                "events": events,
            }
            found.setdefault((asked.form, f"{asked.skill} {asked.answer}"), asked.plain() | about)
            if len(found) == self.count:
                break
        if not found:
            return rejects[0]
        # Whoever has enough lost nothing.
        dropped = Counter(one.reason for one in rejects) if len(found) < self.count else {}
        return item.adding(questions=list(found.values()), generate_dropped=dict(sorted(dropped.items())))

    def _slots(
        self, item: Item, facts: Sequence[Fact], number: int, there: Sequence[str]
    ) -> tuple[Asked, Sequence[str]] | Reject:
        """A question, and the names of the texts that a model wrote."""
        plan = slots.plan(facts, self._wish, self.seed, item.id, number)
        if plan is None:
            kinds = ", ".join(dict.fromkeys(fact.kind for fact in facts)) or "none"
            return Reject(item.id, "no_facts", f"nothing to ask about; facts: {kinds}")
        asked = slots.asked(plan, facts, self.seed, item.id, number)
        # What is there already is not worded again.
        if self._model is None or f"{asked.skill} {asked.answer}" in there:
            return asked, ()
        made = Wording(plan, asked, facts, self._rules, self.words)
        if made.hopeless:  # `verify` says why
            return asked, ()
        last = self._model.trees(made.request, self._seed_of(item, number), item.id, made.take)
        if isinstance(last, Unusable) and not self.fallback:
            return Reject(item.id, *last)
        return made.asked, made.worded

    def _free(
        self, item: Item, facts: Sequence[Fact], number: int, there: Sequence[str]
    ) -> tuple[Asked, Sequence[str]] | Reject:
        assert self._model is not None
        told = [fact for fact in facts if fact.confidence >= self.least and fact.kind != "seen"]
        if not told:
            return Reject(item.id, "no_facts", f"no fact is sure to {self.least:g}")
        forms = [form for form in FORMS if self.forms.get(form, 0) > 0]
        total = sum(self.forms[form] for form in forms)
        shares = [self.forms[form] / total for form in forms]
        form = forms[int(seeded("form", self.seed, item.id, number).choice(len(forms), p=shares))]
        messages, schema = wording.free(told, form, self.options, self.words)
        evidence = [fact.id for fact in told]

        def readable(reply: dict[str, Any]) -> tuple[str, str]:
            made = wording.freely(reply, form, evidence)
            return ("schema", made) if isinstance(made, str) else ("", "")

        tree = self._model.tree(messages, schema, self._seed_of(item, number), item.id, readable)
        if isinstance(tree, Unusable):
            return Reject(item.id, *tree)
        made = wording.freely(tree, form, evidence)
        assert isinstance(made, Asked)
        return made, TEXTS

    def _seed_of(self, item: Item, number: int) -> int:
        """A seed of the question's own, far from its neighbours': tries count on from it."""
        return zlib.crc32(f"{self.seed} {item.id} {number}".encode()) % 2**31

    def _written(self, asked: Asked, by_model: Sequence[str]) -> dict[str, str]:
        """Who wrote which text of a question."""
        return {name: self.model if name in by_model else "templates" for name in TEXTS if getattr(asked, name)}


STAGE = Generate
