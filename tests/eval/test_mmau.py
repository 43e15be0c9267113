"""MMAU: the official rule case by case, its totals of every way of answering, whole files, rules that disagree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import ascii_uppercase

import pytest

from audio_llm.cli import main
from eval.figures import disagreement
from eval.scorers.mmau import KEY, MatchError, official_report, string_match
from tests.paths import SHARED

CASES = SHARED / "fixtures" / "mmau_cases.json"
MINI = SHARED / "data" / "mmau" / "mmau-test-mini.json"
needs_cases = pytest.mark.shared("fixtures/mmau_cases.json", "data/mmau/mmau-test-mini.json")


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads(CASES.read_text())


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return json.loads(MINI.read_text())


@needs_cases
@pytest.mark.parametrize("kind", ["unit", "fuzz"])
def test_every_case_has_the_originals_verdict(cases: dict, kind: str) -> None:
    for case in cases[kind]:
        arguments = case["answer"], case["prediction"], case["choices"]
        if "error" in case:
            with pytest.raises(MatchError) as caught:
                string_match(*arguments)
            assert caught.value.reference.startswith(case["error"])
        else:
            assert string_match(*arguments) is case["match"], case


def letter(item: dict) -> str:
    return ascii_uppercase[item["choices"].index(item["answer"])]


# Ways of answering that need nothing but the item; the others drew at random.
WAYS = {
    "all_choices": lambda item: "; ".join(item["choices"]),
    "answer_colon": lambda item: f"Answer: {item['answer']}",
    "answer_tags": lambda item: f"<answer>{item['answer']}</answer>",
    "empty": lambda item: "",
    "first_choice": lambda item: item["choices"][0],
    "gold": lambda item: item["answer"],
    "gold_last_word_dropped": lambda item: " ".join(item["answer"].split()[:-1]),
    "gold_period": lambda item: item["answer"] + ".",
    "gold_upper": lambda item: item["answer"].upper(),
    "gold_words_shuffled": lambda item: " ".join(reversed(item["answer"].split())),  # any order has the same words
    "last_choice": lambda item: item["choices"][-1],
    "letter_dot_gold": lambda item: f"{letter(item)}. {item['answer']}",
    "letter_only": letter,
    "letter_paren_gold": lambda item: f"({letter(item)}) {item['answer']}",
    "letter_paren_only": lambda item: f"({letter(item)})",
    "letter_rparen_gold": lambda item: f"{letter(item).lower()}) {item['answer']}",
    "longest_choice": lambda item: max(item["choices"], key=lambda text: (len(text), text)),
    "negated_gold": lambda item: f"not {item['answer']}",
    "option_sentence": lambda item: f"The correct option is {letter(item)}: {item['answer']}",
    "question_echo_gold": lambda item: f"{item['question']} {item['answer']}",
    "tags_letter": lambda item: f"<answer>{letter(item)}. {item['answer']}</answer>",
    "the_answer_is": lambda item: f"The answer is {item['answer']}",
}


def verdicts(items: list[dict], way) -> str:
    return "".join(str(int(string_match(item["answer"], way(item), item["choices"]))) for item in items)


@needs_cases
@pytest.mark.parametrize("name", WAYS)
def test_totals_and_every_bit_are_the_originals(cases: dict, items: list[dict], name: str) -> None:
    wanted, way = cases["transforms"][name], WAYS[name]
    for sample, item in zip(cases["samples"][name], items, strict=False):
        assert sample["id"] == item["id"] and (name == "gold_words_shuffled" or sample["prediction"] == way(item))
    assert verdicts(items, way) == wanted["bits"]
    report = official_report([item | {KEY: way(item)} for item in items])
    assert [report.right, report.total] == wanted["total"]
    assert report.groups == wanted["task"] | wanted["difficulty"] | wanted["subcat"]


# Ways that name a wrong option drawn at random: one and the same per item in all of them.
DRAWN = {
    "wrong": lambda item, wrong: wrong,
    "gold_letter_wrong_text": lambda item, wrong: f"{letter(item)}. {wrong}",
    "letter_dot_wrong": lambda item, wrong: f"{ascii_uppercase[item['choices'].index(wrong)]}. {wrong}",
    "gold_not_wrong": lambda item, wrong: f"{item['answer']}, not {wrong}",
    "think_then_gold": lambda item, wrong: f"<think>It could be {wrong}.</think><answer>{item['answer']}</answer>",
}


@needs_cases
def test_answers_that_name_a_wrong_option_have_the_originals_bits(cases: dict, items: list[dict]) -> None:
    """One wrong option explains all five bits of an item; where the drawn one is known, or all agree, it is exact."""
    decided = 0
    for index, item in enumerate(items):
        bits = {name: cases["transforms"][name]["bits"][index] == "1" for name in DRAWN}
        options = [choice for choice in item["choices"] if choice != item["answer"]]
        if index < len(cases["samples"]["wrong"]):
            options = [cases["samples"]["wrong"][index]["prediction"]]
        found = [
            {name: string_match(item["answer"], way(item, wrong), item["choices"]) for name, way in DRAWN.items()}
            for wrong in options
        ]
        assert bits in found, item
        decided += all(each == found[0] for each in found)
    assert decided >= 950


MIXED = [
    lambda item: item["answer"],
    letter,
    lambda item: f"{letter(item)}. {item['answer']}",
    *(lambda item, place=place: item["choices"][place % len(item["choices"])] for place in range(8)),
]


@needs_cases
@pytest.mark.parametrize("name", ["mixed", "random_choice"])
def test_random_ways_agree_where_they_are_known_and_add_up(cases: dict, items: list[dict], name: str) -> None:
    wanted = cases["transforms"][name]
    answered = []
    for index, item in enumerate(items):
        bit = wanted["bits"][index] == "1"
        if index < len(cases["samples"][name]):
            ways = [cases["samples"][name][index]["prediction"]]
        else:
            ways = [way(item) for way in MIXED]
        right = [text for text in ways if string_match(item["answer"], text, item["choices"]) is bit]
        assert right, item
        answered.append(item | {KEY: right[0]})
    report = official_report(answered)
    assert [report.right, report.total] == wanted["total"]
    assert report.groups == wanted["task"] | wanted["difficulty"] | wanted["subcat"]
    if name == "mixed":
        check_figures(report, next(case for case in cases["cli"] if case["name"] == "mixed")["numbers"])


def check_figures(report, numbers: dict) -> None:
    assert {name: list(pair) for name, pair in report.figures().items()} == {
        name: pair for name, pair in numbers.items() if name != "No prediction count"
    }


def whole_file(name: str, items: list[dict]) -> list[dict]:
    """The file that each whole-file run of the original was given."""
    gold = [item | {KEY: item["answer"]} for item in items]
    one = {key: value for key, value in gold[0].items() if key != "sub-category"}
    half = [gold[index] if index % 2 == 0 else item for index, item in enumerate(items)]
    return {
        "half_the_items_lack_the_key": half,
        "readme_key_model_prediction": [item | {"model_prediction": item["answer"]} for item in items],
        "empty_strings": [item | {KEY: ""} for item in items],
        "null_prediction": [items[0] | {KEY: None}],
        "unknown_task": [gold[0] | {"task": "noise"}],
        "no_sub_category": [one],
        "empty_list": [],
    }[name]


# How ours ends without --strict-reference: 1, it ran and says what it left out; 2, there is nothing to score.
ENDS = {
    "half_the_items_lack_the_key": (1, "500 of 1000 items are left out"),
    "readme_key_model_prediction": (2, "--option key=model_prediction"),
    "empty_strings": (0, ""),
    "null_prediction": (1, "is None, not text"),
    "unknown_task": (2, "expected one of sound, music, speech, found 'noise'"),
    "no_sub_category": (0, ""),
    "empty_list": (2, "expected at least one question"),
}
REASONS = [reason for _, reason in ENDS.values() if reason]


@needs_cases
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("strict", [True, False])
def test_whole_files_end_as_the_original_does(
    cases: dict, items: list[dict], name: str, strict: bool, tmp_path: Path, capsys
) -> None:
    case = next(case for case in cases["cli"] if case["name"] == name)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(whole_file(name, items)))
    code = main(["rescore", str(path), *(["--strict-reference"] if strict else [])])
    shown = capsys.readouterr()
    if strict:
        assert code == case["rc"]
        assert printed(shown.out) == {k: pair for k, pair in case["numbers"].items() if k != "No prediction count"}
        assert shown.err.splitlines()[-1:] == case["stderr_tail"]
    else:
        assert "Traceback" not in shown.err
        reason = next((text for text in REASONS if text in shown.err), "")
        assert (code, reason) == ENDS[name]


@needs_cases
def test_json_lines_are_an_error_with_a_cure(cases: dict, items: list[dict], tmp_path: Path, capsys) -> None:
    path = tmp_path / "answers.json"
    first = json.dumps(items[0] | {KEY: "Man"})
    path.write_text(first + "\n" + first)
    assert main(["rescore", str(path), "--strict-reference"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("json.decoder.JSONDecodeError: Extra data: line 2")
    assert main(["rescore", str(path)]) == 2
    assert "a file that ends in .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("5", "TypeError: 'int' object is not iterable"),
        ("[null]", "TypeError: argument of type 'NoneType' is not iterable"),
        ("[" * 100_000, "RecursionError: "),
        ('[{"model_output": "a", "answer": "a", "task": "sound", "difficulty": "easy", "choices": 5}]', "TypeError: "),
        ("\ufeff[]".encode("utf-16").decode("latin-1"), "UnicodeDecodeError: "),
    ],
)
def test_what_is_no_array_of_items_ends_as_the_original_does(tmp_path: Path, capsys, text: str, last: str) -> None:
    path = tmp_path / "answers.json"
    path.write_bytes(text.encode("latin-1"))
    assert main(["rescore", str(path), "--strict-reference"]) == 1
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith(last) and "Traceback" not in shown
    assert main(["rescore", str(path)]) == 2


def test_an_item_that_occurs_twice_is_scored_by_nobody_of_ours(tmp_path: Path, capsys) -> None:
    item = {"id": "a", "audio_id": "a.wav", "question": "Which?", "choices": ["x", "y"], "answer": "x", "task": "sound"}
    item |= {"difficulty": "easy", KEY: "x"}
    (tmp_path / "answers.json").write_text(json.dumps([item, item]))
    assert main(["rescore", str(tmp_path / "answers.json")]) == 2
    assert "item 'a': expected an id that occurs once" in capsys.readouterr().err


def printed(text: str) -> dict:
    """``name : 12.34% over 56 samples`` lines as the fixture has them."""
    found = re.findall(r"^(.+?) : ([\d.]+)% over (\d+) samples$", text, re.MULTILINE)
    return {name: [float(percent), int(count)] for name, percent, count in found}


def test_public_rules_disagree_and_ours_give_every_reply_what_it_deserves(capsys) -> None:
    """The public columns as they were measured with the rules' own code (a draw among four is 0.25)."""
    measured = {
        "mmau-official": [1, 0, 1, 1, 0, 0, 0, 0, 0],
        "letter-or-random": [0, 1, 0, 0.25, 0.25, 0.25, 0.25, 0.25, 0],
        "tag-exact": [1, 0, 0, 0, 0, 1, 0, 0, 0],
    }
    table = disagreement.rows()
    for name, values in measured.items():
        assert [row.values[name] for row in table] == values, name
    assert disagreement.wrong(table) == []
    assert main(["rescore", "--disagreement"]) == 0
    assert capsys.readouterr().out.count("\n| ") == len(table) + 1


def test_the_published_rule_stands_beside_ours_on_the_first_line(tmp_path: Path, capsys) -> None:
    """ "2.5 s" has all words of "5 s" and none of another choice: MMAU's rule takes it, ours does not."""
    item = {"audio_id": "a.wav", "question": "Which?", "choices": ["5 s", "7 s"], "answer": "5 s", "task": "sound"}
    items = [item | {"id": str(n), "difficulty": "easy", KEY: said} for n, said in enumerate(("5 s", "2.5 s", "(A)"))]
    (tmp_path / "answers.json").write_text(json.dumps(items))
    assert main(["rescore", str(tmp_path / "answers.json"), "--scorers", "option-resolution"]) == 0
    head, first = [line for line in capsys.readouterr().out.splitlines() if line.strip()][:2]
    assert head.endswith("scorer option-resolution 5")
    ours, published = first.split("; mmau-official ")
    assert ours.split()[:2] == ["greedy", "66.7"] and published.split()[0] == "66.7"
    assert main(["rescore", str(tmp_path / "answers.json"), "--scorers", "mmau-official"]) == 0
    assert "; mmau-official" not in capsys.readouterr().out.splitlines()[2]
