"""``audio-llm claim``: one set of replies in the files of five harnesses, and numbers that are claimed for it."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from audio_llm.cli import main
from audio_llm.errors import AudioLLMError
from eval.figures.claims import rules_of, scored_by_rules, shapes_of
from eval.harnesses import lettered_lines, option_of, read

CHOICES = ["A dog barking", "Rain", "A car horn", "Wind"]
REPLIES = [  # (right option, reply): shapes on which public rules disagree
    (0, "A dog barking"),
    (1, "B"),
    (2, "(C) A car horn"),
    (3, "<think>Not rain.</think><answer>Wind</answer>"),
    (1, "It is rain, not wind."),
    (0, ""),
    (2, "The sound is a car horn."),
    (3, "D. Wind"),
    (0, "Rain"),
    (1, "I cannot tell."),
]
ASKED = "What is heard?"
PROMPT = ASKED + "\nChoices:\n" + "\n".join(f"({'ABCD'[n]}) {choice}" for n, choice in enumerate(CHOICES))


def official(path: Path) -> Path:
    rows = [
        {"id": f"q{n}", "question": ASKED, "choices": CHOICES, "answer": CHOICES[gold], "model_output": said}
        for n, (gold, said) in enumerate(REPLIES)
    ]
    path.write_text(json.dumps(rows))
    return path


def lmms(path: Path) -> Path:
    rows = [
        {"doc_id": n, "doc": {"question": ASKED, "choices": CHOICES, "answer": CHOICES[gold]}, "target": CHOICES[gold]}
        | {"resps": [[said]], "filtered_resps": [said.upper()], "input": PROMPT}
        for n, (gold, said) in enumerate(REPLIES)
    ]
    return lines(path, rows)


def swift(path: Path) -> Path:
    rows = [
        {"response": said, "labels": "ABCD"[gold], "audios": ["x.wav"]}
        | {"messages": [{"role": "user", "content": "<audio>" + PROMPT}, {"role": "assistant", "content": said}]}
        for gold, said in REPLIES
    ]
    return lines(path, rows)


def ultraeval(path: Path) -> Path:
    rows = []
    for n, (gold, said) in enumerate(REPLIES):
        asked = [{"role": "user", "contents": [{"type": "audio", "value": "x.wav"}, {"type": "text", "value": PROMPT}]}]
        rows += [
            {"type": "prompt", "id": n, "data": {"content": asked}},
            {"type": "inference", "id": n, "data": {"content": said}},
            {"type": "post_process", "id": n, "data": {"content": said.strip()}},
            {"type": "eval", "id": n, "data": {"match": 0, "pred": said, "ref": "ABCD"[gold]}},
        ]
    return lines(path, rows)


def mmsu(path: Path) -> Path:
    rows = [
        {"id": n, "question": ASKED, "answer_gt": CHOICES[gold], "response": said}
        | {f"choice_{'abcd'[k]}": choice for k, choice in enumerate(CHOICES)}
        for n, (gold, said) in enumerate(REPLIES)
    ]
    return lines(path, rows)


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FILES = {
    "a benchmark's own form": (official, ".json"),
    "lmms-eval": (lmms, ".jsonl"),
    "ms-swift": (swift, ".jsonl"),
    "UltraEval-Audio": (ultraeval, ".jsonl"),
    "a benchmark's own form, letters": (mmsu, ".jsonl"),
}


def test_the_files_of_five_harnesses_say_the_same(tmp_path, capsys) -> None:
    found = {}
    for name, (write, suffix) in FILES.items():
        path = write(tmp_path / f"{len(found)}{suffix}")
        harness, rows = read(path)
        assert harness == name.partition(",")[0]
        assert [(row.choices, row.gold, row.raw, row.error) for row in rows] == [
            (CHOICES, CHOICES[gold], said, "") for gold, said in REPLIES
        ]
        assert main(["claim", str(path), "--json", str(tmp_path / "out.json")]) == 0
        tree = json.loads((tmp_path / "out.json").read_text())
        found[name] = {rule["name"]: (rule["accuracy"]["value"], rule["unread"]) for rule in tree["rules"]}
    assert len({json.dumps(rules, sort_keys=True) for rules in found.values()}) == 1
    rules = found["lmms-eval"]
    # by hand: an option's words with its letter or without, a letter, a tag, "rain, not wind", the sentence
    assert rules["option-resolution"] == (0.7, 2)
    assert rules["tag-exact"][0] == 0.2  # the first reply and the tag
    # the article A and the letters B, (C), D. are read and right; the six others are drawn, a quarter of them rightly
    assert rules["letter-or-random"][0] == pytest.approx((4 + 6 / 4) / 10)


@pytest.mark.parametrize(
    ("claimed", "code", "told"),
    [
        ("70", 0, "70.0 % is what mmau-official-resolved, option-resolution gives"),
        ("64", 0, "within the interval of"),
        ("99.9", 1, "99.9 % is not reproduced: no rule's interval holds it; the nearest is"),
    ],
)
def test_a_claim_is_reproduced_or_not(tmp_path, capsys, claimed, code, told) -> None:
    path = official(tmp_path / "answers.json")
    assert main(["claim", str(path), "--claimed", claimed]) == code
    out = capsys.readouterr().out
    assert told in out and "chance 25.0 %" in out
    assert "a letter alone, such as 'B'" in out and "an option word for word, beginning with A" in out
    assert main(["claim", str(path), "--claimed", "70", "--rule", "tag-exact"]) in (0, 1)
    assert "option-resolution gives" not in capsys.readouterr().out


def test_what_cannot_be_scored_is_said(tmp_path, capsys) -> None:
    rows = json.loads(official(tmp_path / "answers.json").read_text())
    rows[0]["answer"] = "A cat"
    rows[1]["model_output"] = None
    rows[2]["choices"] = []
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    assert main(["claim", str(tmp_path / "answers.json")]) == 0
    assert (
        "3 cannot be scored; the first, 'q0': its right answer 'A cat' is none of its choices"
        in capsys.readouterr().out
    )
    for content, told in (
        ("[]", "expected a file of answers"),
        ('[{"audio": "x.wav"}]', "expected a file of answers"),
        (json.dumps(rows[:1]), "expected questions that can be scored"),
        (json.dumps([rows[3], rows[3]]), "expected one answer, found several"),
        ('{"torn', "answers.json"),
    ):
        (tmp_path / "answers.json").write_text(content)
        assert main(["claim", str(tmp_path / "answers.json")]) == 2
        assert told in capsys.readouterr().err
    assert main(["claim", str(official(tmp_path / "answers.json")), "--claimed", "700"]) == 2
    assert main(["claim", str(tmp_path / "answers.json"), "--rule", "letters"]) == 2
    assert "'letters'" in capsys.readouterr().err


def test_options_are_read_from_the_last_list_of_a_prompt() -> None:
    assert lettered_lines(PROMPT) == CHOICES
    assert lettered_lines("Answer A. or B. in one letter.\nA. yes\nB. no\nC. both\nAnswer:") == ["yes", "no", "both"]
    assert lettered_lines("Is it (A) a dog (B) a cat?") == ["a dog", "a cat?"]
    assert lettered_lines("What is heard?") == []
    assert option_of("(b)", CHOICES, CHOICES) == 1 and option_of("E", CHOICES, CHOICES) is None
    assert option_of("A", ["C", "A", "G"], ["C", "A", "G"]) == 1  # a chord, not a letter
    assert option_of("B. Wind", CHOICES, CHOICES) is None


ODD: list[Any] = [None, "", 0, 1.5, True, [], {}, "\ud800", ["a"], [["a"]], {"content": 5}, [{"role": 3}], "A", ["B"]]
ODD += [[None], {"a": None}, -1, "9" * 400, {"A": "x", "B": "y"}, "x" * 3000]


def test_broken_files_end_in_figures_or_in_a_sentence(tmp_path: Path) -> None:
    """One to four values of a file are others or gone: what is left is scored, or one sentence says what is wrong."""
    draw, ended = random.Random(5), Counter[bool]()
    for _ in range(150):
        write, suffix = draw.choice(list(FILES.values()))
        path = write(tmp_path / f"file{suffix}")
        text = path.read_text()
        rows = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for _ in range(draw.randrange(1, 5)):
            holder, key = draw.choice(list(places(rows)))
            if isinstance(holder, dict) and draw.random() < 0.25:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(draw.choice(ODD))
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
        try:
            _, found = read(path)
        except AudioLLMError as error:
            assert "expected" in str(error)
            ended[False] += 1
            continue
        asked = [row for row in found if not row.error]
        assert asked and all(row.gold in row.choices for row in asked)
        rules = rules_of(scored_by_rules(asked), len(asked))
        assert all(0 <= rule.accuracy.value <= 1 for rule in rules) and shapes_of(scored_by_rules(asked), asked)
        ended[True] += 1
    assert ended[True] > 50 and ended[False] > 20


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def test_the_figures_do_not_take_the_place_of_the_answers(tmp_path: Path, capsys) -> None:
    path = official(tmp_path / "answers.json")
    before = path.read_bytes()
    assert main(["claim", str(path), "--json", str(path)]) == 2
    assert "answers.json: expected a new file, or one of this command's, found another file" in capsys.readouterr().err
    assert path.read_bytes() == before
    for _ in range(2):
        assert main(["claim", str(path), "--json", str(tmp_path / "figures.json")]) == 0
