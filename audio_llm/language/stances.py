"""What a text does with the things that it mentions: says them, or denies, asks, supposes, reports or takes them back.

Mentions are ranges of tokens. Those side by side ("rain, wind or a dog") are one group and share a fate. The words
before a group in its clause, those right after it and the end of its sentence decide; where that is unclear, the thing
is not said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from audio_llm.language.words import CHECK, CROSS, Text, phrases

Span = tuple[int, int]  # first token of a mention, and the one after its last


_BE = r"(?:is|was|are|were|be|seems?|sounds?|appears?|looks?)(?: to be)?"
_NOT = r"(?:not|never|no longer)(?! only)"
# Words with a negation in them that deny nothing of what follows.
_NEUTRAL = phrases(
    r"no doubt(?: about it| that)? | no question | without (?:a |any )?doubt | not only | not just",
    r"nothing (?:but|other than) | none other than | (?:can't|cannot|couldn't|can not) be anything (?:but|other than)",
    r"(?:nothing|no) less than | more or less",
    r"not (?:too |that |so )?far | (?:cannot|can't) be denied | by (?:process of )?elimination",
    r"(?:no way(?: that)?|(?:surprised|amazed|shocked) if) (?:it|this|that) (?:(?:is|was|were)n't|(?:is|was|were) not)",
)
_DENIES = phrases(
    r"not | no | never | neither | nor | none | nothing | nobody | without | except | excluding | ~n't | cannot | than",
    r"exclud~ | eliminat~ | reject~ | rul(?:e|es|ed|ing) out | doubt~ | unlikely | improbable | impossible | wrong",
    r"incorrect | false | far from | hardly | lack~ | absen~ | fail(?:s|ed)? to | refuse[sd]? to | instead of",
    r"ignor~ | disregard~ | dismiss~ | discard~ | forget | opposite of | opposed to | least | hard to believe | unlike",
    r"less (?:a|an|the) | (?:anything|everything|all) but",
    r"missing (?:here )?(?:is|was)",
    r"isnt | wasnt | arent | dont | doesnt | didnt | cant | unclear | unsure",
)
_SUPPOSES = phrases(
    r"if | unless | whether | suppos(?:e|ing) | assum(?:e|ing) | imagin(?:e|ing) | wonder~ | pretend~ | wish~",
    r"hop(?:e|ing)",
    r"expect(?:s|ed|ing)? | were it | thought | at first | initially | (?:could|should|might|would) have(?: been)?",
    r"first (?:instinct|impression|guess) | as (?:if|though)",
    r"as (?!far|long|soon|well|likely|much|good)\S+ as(?: (?:an?|the))?$",
    r"please | needs? | to tell | maybe not | do you | would you | (?:had|was|were) (?:it|there)",
    r"(?:questions?|users?|prompts?|you|someone|somebody|they|people|others|some|one) (?:~ ){0,2}?"
    r"(?:asks?|asked|asking|mentions?|mentioned|says?|said|claims?|claimed|thinks?|thought|believes?|wants?|"
    r"might|may|could|would|chooses?|chose)",
    r"(?:options|choices|answers|candidates) (?:are|were|include) | (?:possible|given) (?:options|choices|answers)",
)
_VERB = r"(?:is|was|are|were|be|do|does|did|has|have|had|can|could|will|would|should|may|might|must|seems?|sounds?)"
_WRONG = (
    r"(?:incorrect|wrong|false|impossible|implausible|improbable|unlikely|doubtful|questionable|out|absent|missing"
    r"|inaudible|excluded|rejected|ruled out|eliminated|least|an? (?:red herring|decoy|distractor|mistake|trap))"
)
_DENIED_AFTER = re.compile(
    rf"(?:(?:which|that|it) )?(?:{_VERB} (?:\S+ly )?{_NOT}(?!\S)|(?:\S+n't|cannot|isnt|wasnt|arent|doesnt)(?!\S)"
    rf"|(?:(?:can|could|may|might|must|would|should|to) )?(?:{_BE} )?(?:\S+ly )?(?:the )?{_WRONG}(?!\S)"
    rf"|(?:{_BE} )(?:an? |the )?(?:\S+ )?(?:second|runner-up|alternative)(?!\S)"
    rf"|{_BE} (?:(?:the|what|something|one|only|thing|sound|option|that|which) )+(?:i|we|you) "
    r"(?:\S+n't|cannot|\S+ not)(?!\S)"
    r"|not (?:present|audible|heard|there|correct|right|it|the answer|an option)(?!\S))"
)
_NOUNS = re.compile(r"(?:(?:sounds?|noises?|options?|choices?|answers?|ones?|alternative|itself|here|both|all) )+")
_SUPPOSED_AFTER = re.compile(
    r"(?:\S+ )*?(?:(?:if|unless)(?! (?:i|forced|pressed|asked)\b)|(?:appears|occurs) in)(?!\S)"
    r"|would (?:\S+ly )?(?!be|have|fit|match|make|seem|explain|work|say|suit)\S"
)
_DECLARES = phrases(
    r"answers? | choices? | choose | chose | pick | select | selected | selection | go(?:ing)? (?:with|for) | vote",
    r"(?:that|which|what) (?:best )?fits? | (?:i'd|i would|i will|i'll) say",
    r"conclu~ | final | option | leav(?:e|es|ing) | left with | remains? | so | thus",
    r"therefore | hence | must be | guess~ | match~ | correspond~ | prediction | best described | points? to",
)
_DECLARED_AFTER = re.compile(
    rf"(?:\S+ )?(?:{_BE} )(?:\S+ly )?(?:(?:the|my) )?(?:only )?(?:correct|right|best|better|answer|final|true)(?!\S)"
    r"|(?:remains?|fits?|match(?:es)?|yes|correct|right)(?!\S)"
)
_HEDGES = phrases(
    r"could | may | might | seem~ | sounds? (?:\S+ )*?like | sounded | plausible | tempting | possible | close",
    r"similar | while | although | though | despite | a bit | looks? like | appears? | appeared",
)
_CONTRAST = phrases(r"but | however | yet | still | though | instead | nevertheless | actually")
_CONCEDING = ("while", "whereas", "although", "though", "despite")
_CORRECTS = re.compile(
    r"(?:no )?(?:wait|actually|sorry|oops|hmm|correction|i mean|i meant|or rather|then again|scratch that"
    r"|on (?:a )?(?:second|closer) (?:thoughts?|listen|look|hearing)"
    r"|on reflection|let me correct|my mistake|(?:oh )?i made a mistake|i was wrong"
    r"|rather(?! than))(?!\S)"
)
_BOUNDARIES = frozenset(
    "but however so because therefore hence thus actually yet though although while whereas which".split()
)
_SUBJECTS = frozenset("it it's its there there's i i'm i'd the this that that's we so you they".split())
_HEADINGS = frozenset("answer choice option selection prediction match fit overall verdict conclusion decision".split())
_REQUESTS = ("upload", "provide", "share", "send", "attach", "give")
_JOINING = frozenset("and or nor a an the".split())
NO, YES = frozenset(("no", "nope", "nah")), frozenset(("yes", "yeah", "yep", "correct", "right", "exactly", "true"))
_VERBS = frozenset("is are was were be hear heard hears it it's i there sounds seems".split()) | _SUBJECTS


@dataclass
class _Item:
    """A word, or a mention (`span` is its number); `stop` is what divides it from the one before: one of "?.,:-()"."""

    key: str
    span: int | None
    stop: str


def stances(text: Text, spans: Sequence[Span], closings: Sequence[str] = ()) -> list[str]:
    """What `text` does with each of its mentions (in order, not overlapping): ``said``, ``declared`` (said as the
    answer), ``denied``, ``asked``, ``supposed``, or ``dropped`` (corrected, or conceded to another).

    `closings` are the marks that belong to the mentions and end no sentence: the option "It rains." brings a full stop.
    """
    items = _items(text, spans, closings)
    end = _stop(text.gap(len(text.tokens)))
    groups = _groups(items)
    found = [_stance(items, group, end) for group in groups]
    _take_back(items, groups, found)
    by_span = {
        items[place].span: stance
        for group, stance in zip(groups, found, strict=True)
        for place in range(*group)
        if items[place].span is not None
    }
    return [by_span[number] for number in range(len(spans))]


def said(text: Text, spans: Sequence[Span]) -> list[int]:
    """The places in `spans` of the mentions that the text says, or only those that it declares where there are any."""
    found = stances(text, spans)
    declared = [place for place, stance in enumerate(found) if stance == "declared"]
    return declared or [place for place, stance in enumerate(found) if stance == "said"]


def _stop(gap: str) -> str:
    if "?" in gap:
        return "?"
    if re.search(r"[.!;](?=\W|$)|\n", gap):
        return "."
    for mark, pattern in ((":", r"[:=>→]"), (",", ","), ("-", r"[\s*]-[\s*]"), ("(", r"[(\[]"), (")", r"[)\]]")):
        if re.search(pattern, gap):
            return mark
    return ""


def _items(text: Text, spans: Sequence[Span], closings: Sequence[str]) -> list[_Item]:
    starts = {start: number for number, (start, _) in enumerate(spans)}
    items: list[_Item] = []
    place, pending = 0, ""
    while place < len(text.tokens):
        gap = text.gap(place)
        closing = closings[items[-1].span or 0] if closings and items and items[-1].span is not None else ""
        if closing and gap.startswith(closing) and not text.tokens[place].text[:1].isupper():
            gap = gap[len(closing) :]
        stop = _stop(gap) or pending
        pending = ""
        number = starts.get(place)
        if number is None and text.tokens[place].key == "…":
            pending, place = ".", place + 1
            continue
        items.append(_Item("\0" if number is not None else text.tokens[place].key, number, stop))
        place = spans[number][1] if number is not None else place + 1
    return items


def _groups(items: Sequence[_Item]) -> list[Span]:
    """Runs of mentions with only "and", "or", articles and commas between them."""
    groups: list[Span] = []
    for place, item in enumerate(items):
        if item.span is None:
            continue
        if groups:
            between = items[groups[-1][1] : place + 1]
            if all(
                one.stop in ("", ",", ")", "(") and (one.key in _JOINING or one.span is not None) for one in between
            ):
                groups[-1] = groups[-1][0], place + 1
                continue
        groups.append((place, place + 1))
    return groups


def _before(items: Sequence[_Item], start: int) -> list[_Item]:
    """The words of the clause before item `start`."""
    place = start
    while place > 0:
        stop, word = items[place].stop, items[place - 1]
        if stop in ("?", ".", ":", "-") or (stop == "(" and word.span is not None):
            break
        if stop == "," and not _lists_on(items[place:start]):
            break
        if word.key in _BOUNDARIES and not (
            word.key == "but" and place > 1 and items[place - 2].key in ("anything", "everything", "nothing", "all")
        ):
            break
        if word.key == "and" and items[place].key in _SUBJECTS and items[place].key != "the":
            break
        place -= 1
    return list(items[place:start])


def _lists_on(items: Sequence[_Item]) -> bool:
    """Whether words after a comma go on with a list ("cats, birds or …") and begin nothing new."""
    words = [item.key for item in items if item.span is None]
    return (
        bool(words)
        and words[-1] not in _VERBS - {"the"}
        and any(w in ("or", "nor") for w in words)
        and not (set(words) & (_VERBS - {"the"}))
    )


def _stance(items: Sequence[_Item], group: Span, end: str) -> str:
    start, stop = group
    words = _before(items, start)
    opening = items[start - len(words) - 1].key if start > len(words) else ""
    before = _NEUTRAL.sub("_", " ".join(item.key for item in words))
    rest, closing = _after(items, stop, end)
    following = items[stop].key if stop < len(items) else ""
    divided = items[stop].stop if stop < len(items) else end
    marked = [following if divided == "" else "", items[start - 1].key if start and items[start].stop == "" else ""]
    if CROSS in marked[:1] or (marked[1] == CROSS and not (start > 1 and items[start - 2].span is not None)):
        return "denied"
    alone = stop + 1 >= len(items) or items[stop + 1].stop != "" or items[stop + 1].key == "wait"
    if following in NO and divided and alone:
        return "denied"
    confirmed = (following in YES and divided and alone) or CHECK in marked
    after = _NOUNS.sub("", rest, count=1) if _NOUNS.match(rest) else rest
    first = start - len(words)
    if first and items[first].stop == ":" and all(item.key in _JOINING for item in words):  # "wrong answer: rain"
        told = [*_before(items, first - 1), items[first - 1]]
        denying = _DENIES.search(_NEUTRAL.sub("_", " ".join(item.key for item in told)))
        if denying and not any(item.span is not None for item in told):
            return "denied"
    if _all_but(items, start):  # "every option but rain is wrong"
        return "declared" if _denied_after(divided, after) else "denied"
    if _DENIES.search(before) or _denied_after(divided, after):
        return "denied"
    if divided in (":", "(", "-", ".") and following in ("wrong", "incorrect", "false", "never") and alone:
        return "denied"
    if _second_of_two(items, start):
        return "denied"
    if closing == "?" and not (confirmed or _answered_yes(items, stop)):
        return "asked"
    weighed = opening in ("if", "unless") or (opening == "whereas" and after.startswith("would "))
    if _SUPPOSES.search(before) or weighed or _SUPPOSED_AFTER.match(after) or _requested(items, start):
        return "supposed"
    declared = _DECLARES.search(before) or confirmed or (divided in ("", ")", ",") and _DECLARED_AFTER.match(after))
    if not words and start and items[start].stop in (":", "-"):
        declared = declared or items[start - 1].key in _HEADINGS
    return "declared" if declared or opening in ("so", "therefore", "thus", "hence") else "said"


def _all_but(items: Sequence[_Item], start: int) -> bool:
    """Whether "every … but", "all … except" stands before item `start`, with a noun at most between."""
    before = [item.key for item in items[max(0, start - 6) : start] if item.key not in _JOINING]
    words = " ".join(key for key in before if key not in ("of", "these", "those"))
    return re.search(r"(?:^| )(?:every|all|each|any) \S+ (?:but|except|save)(?: for)?$", words) is not None


def _denied_after(divided: str, after: str) -> bool:
    if divided == "," and not after.startswith(("which ", "that ")):
        return False
    return divided in ("", ")", ",", "-", "(") and _DENIED_AFTER.match(after) is not None


def _after(items: Sequence[_Item], start: int, end: str) -> tuple[str, str]:
    """The words of the sentence from `start` on up to a comma or the like, and the mark that ends the sentence."""
    words: list[str] = []
    cut = False
    for place in range(start, len(items)):
        item = items[place]
        if item.stop in ("?", "."):
            return " ".join(words), item.stop
        cut = cut or (place > start and item.stop in (",", ":", "-") or item.key in _BOUNDARIES - {"which"})
        if not cut:
            words.append(item.key)
    return " ".join(words), end


def _answered_yes(items: Sequence[_Item], start: int) -> bool:
    """Whether the sentence after the one that goes on at `start` says yes to it."""
    for place in range(start, len(items)):
        if items[place].stop in ("?", "."):
            return items[place].key in YES
    return False


def _requested(items: Sequence[_Item], start: int) -> bool:
    """Whether the sentence asks the reader for something: "Please upload a sound, for example of a dog"."""
    while start > 0 and items[start].stop not in ("?", "."):
        start -= 1
    return [item.key for item in items[start : start + 2]] in [["please", verb] for verb in _REQUESTS]


def _second_of_two(items: Sequence[_Item], start: int) -> bool:
    """ "B over A", "I prefer B to A"."""
    before = [item for item in items[max(0, start - 3) : start] if item.key not in _JOINING]
    if len(before) < 2 or before[-2].span is None:
        return False
    return before[-1].key == "over" or (
        before[-1].key == "to" and any(i.key.startswith("prefer") for i in items[:start])
    )


def _take_back(items: Sequence[_Item], groups: Sequence[Span], found: list[str]) -> None:
    """Drop what a correction takes back ("A. No, wait, B") and what is conceded ("it could be A, but B")."""
    for number in range(len(groups)):
        later = [k for k in range(number + 1, len(groups)) if found[k] in ("said", "declared")]
        if found[number] not in ("said", "declared") or not later:
            continue
        stop = groups[number][1]
        reach = groups[later[-1]][0]
        if any(
            items[place].stop and _CORRECTS.match(" ".join(item.key for item in items[place : place + 5]))
            for place in range(stop, reach)
        ):
            found[number] = "dropped"
            continue
        clause = _before(items, groups[number][0])
        first = groups[number][0] - len(clause)
        words = " ".join(item.key for item in items[max(0, first - 1) : stop]) + " " + _after(items, stop, "")[0]
        between = " ".join(item.key for item in items[stop : groups[later[0]][0]])
        conceding = first > 0 and items[first - 1].key in _CONCEDING or any(i.key in _CONCEDING for i in clause)
        if _HEDGES.search(words) and (conceding or _CONTRAST.search(between)):
            found[number] = "dropped"
