"""Rewards: a table of cases for each, and the promises every reward keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.errors import ConfigError
from audio_llm.language import prompts
from audio_llm.training import rewards

CHOICES = ["rain", "dog barking", "dog growling", "3 bells"]


def score(reward, completion, **columns):
    """One row through a reward, as TRL calls it."""
    given = {key: [value] for key, value in columns.items() if key not in ("zero_at", "target")}
    options = {key: value for key, value in columns.items() if key in ("zero_at", "target")}
    (value,) = reward(["prompt"], [completion], **given, **options)
    return value


def answer(text: str, thinking: str | None = "it is so") -> str:
    return (f"<think>{thinking}</think>\n" if thinking else "") + f"<answer>{text}</answer>"


# --- answer accuracy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("(B) dog barking", 1.0),
        ("B", 1.0),
        ("(b)", 1.0),
        ("dog barking", 1.0),
        ("Dog barking.", 1.0),
        ("(A) dog barking", 0.0),  # letter and text contradict each other
        ("(B) rain", 0.0),
        ("(A) rain", 0.0),
        ("(B) or (C)", 0.0),
        ("dog barking or dog growling", 0.0),
        ("not dog barking", 0.0),
        ("", 0.0),
        ("a dog", 0.0),
    ],
)
def test_accuracy_resolves_options(reply, expected):
    assert score(rewards.answer_accuracy, answer(reply), answer="dog barking", choices=CHOICES) == expected


def test_accuracy_does_not_look_into_the_thinking():
    """The number 3 in the reasoning is not the option '3 bells'; the right words in it are not an answer."""
    assert score(rewards.answer_accuracy, answer("(A) rain", "3 bells"), answer="3 bells", choices=CHOICES) == 0.0
    unfinished = "<think>it must be (B) dog barking"
    assert score(rewards.answer_accuracy, unfinished, answer="dog barking", choices=CHOICES) == 0.0


def test_accuracy_of_several_answers():
    both = "<answer>rain</answer> <answer>dog barking</answer>"
    same = "<answer>(B)</answer> <answer>dog barking</answer>"
    assert score(rewards.answer_accuracy, both, answer="dog barking", choices=CHOICES) == 0.0
    assert score(rewards.answer_accuracy, same, answer="dog barking", choices=CHOICES) == 1.0
    assert score(rewards.answer_accuracy, both, answer="dog barking") == 0.0


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ("Yes", "yes", 1.0),
        ("yes.", "Yes", 1.0),
        ("no", "yes", 0.0),
        ("yes and no", "yes", 0.0),
        ("two  dogs", "Two dogs", 1.0),
        ("1.5m", "15m", 0.0),
        ("-5", "5", 0.0),
    ],
)
def test_accuracy_without_choices_compares_words(reply, reference, expected):
    assert score(rewards.answer_accuracy, answer(reply), answer=reference) == expected
    assert score(rewards.answer_accuracy, answer(reply), answer=reference, choices=None) == expected


def test_accuracy_does_not_apply_without_a_truth():
    assert score(rewards.answer_accuracy, answer("rain"), answer=None, choices=CHOICES) is None
    assert score(rewards.answer_accuracy, answer("rain"), answer="wind", choices=CHOICES) is None
    assert rewards.answer_accuracy(["p"], [answer("rain")]) == [None]


# --- format --------------------------------------------------------------------------------------------------------

THINK, ELEMENTS, ANSWER = "<think>a\nb</think>", "<semantic_elements>dog</semantic_elements>", "<answer>rain</answer>"


@pytest.mark.parametrize(
    ("text", "answer_style", "think_style", "semantic_style"),
    [
        (ANSWER, 1, 0, 0),
        (f"{THINK}\n{ANSWER}", 0, 1, 0),
        (f"{THINK}{ANSWER}", 0, 1, 0),
        (f"{THINK}\n{ELEMENTS}\n{ANSWER}", 0, 0, 1),
        (f"{ELEMENTS}{THINK}{ANSWER}", 0, 0, 0),
        (f"{ANSWER}{THINK}", 0, 0, 0),
        (f"{THINK}{ANSWER}{ANSWER}", 0, 0, 0),
        (f"{THINK}{THINK}{ANSWER}", 0, 0, 0),
        (f"{THINK}{ANSWER} and more", 0, 0, 0),
        (f"well, {THINK}{ANSWER}", 0, 0, 0),
        (f"{THINK} so {ANSWER}", 0, 0, 0),
        (f"<think></think>{ANSWER}", 0, 0, 0),
        (f"{THINK}<answer> </answer>", 0, 0, 0),
        (f"<think>a<answer>rain</answer></think>{ANSWER}", 0, 0, 0),
        (f"{THINK}<answer>rain", 0, 0, 0),
        ("<Think>a</Think><answer>rain</answer>", 0, 0, 0),
        ("rain", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_format(text, answer_style, think_style, semantic_style):
    plain = text == "rain"  # words, and no tag
    for style, expected in zip(prompts.STYLES, (answer_style, think_style, semantic_style, plain), strict=True):
        assert score(rewards.format, text, style=style) == expected, style
        assert rewards.format(["p"], [text], style=style) == [expected], style


class Item:
    question, choices, answer = "Which sound?", ["rain", "dog"], "dog"
    thinking, semantic_elements = "I hear a dog", {"sources": ["dog"], "place": "yard"}


@pytest.mark.parametrize("style", prompts.STYLES)
def test_what_the_model_is_taught_gets_the_full_reward(style):
    """The target of SFT, read by the rewards of GRPO: right in format and answer."""
    text = prompts.target_text(Item, style)
    assert score(rewards.format, text, style=style) == 1.0
    assert score(rewards.answer_accuracy, text, answer=Item.answer, choices=Item.choices) == 1.0


# --- length --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0), (5, 0.2), (20, 0.8), (25, 1), (30, 0.8), (45, 0.2), (50, 0), (500, 0)]
)
def test_length_is_symmetric_and_only_for_right_answers(words, expected):
    thinking = " ".join(["so"] * words)
    right = score(rewards.length, answer("rain", thinking), answer="rain", choices=CHOICES, target=25)
    assert right == pytest.approx(expected)
    assert score(rewards.length, answer("dog barking", thinking), answer="rain", choices=CHOICES, target=25) == 0
    assert score(rewards.length, answer("rain", thinking), answer=None, target=25) is None


# --- directions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("left", 1.0),
        ("90 degrees", 1.0),
        ("front left", 0.75),
        ("front", 0.5),
        ("front right", 0.25),
        ("right", 0.0),
        ("left and right", 0.0),
        ("somewhere", 0.0),
        ("", 0.0),
    ],
)
def test_direction_is_graded(reply, expected):
    assert score(rewards.direction, answer(reply), answer="left") == pytest.approx(expected)


def test_direction_through_a_letter():
    sides = ["front left", "front right", "behind"]
    assert score(rewards.direction, answer("(A)"), answer="front left", choices=sides) == 1.0
    assert score(rewards.direction, answer("(B)"), answer="front left", choices=sides) == pytest.approx(0.5)
    assert score(rewards.direction, answer("(A) behind"), answer="front left", choices=sides) == 0.0


# --- quantities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "reply", "reference", "expected"),
    [
        (rewards.distance, "2m", "2.5m", 0.75),
        (rewards.distance, "3 metres", "2.5m", 0.75),
        (rewards.distance, "right, front, above; 2.5m", "left, front, below; 2.5m", 1.0),
        (rewards.distance, "9m", "2.5m", 0.0),
        (rewards.distance, "far", "2.5m", 0.0),
        (rewards.distance, "2m", "left", None),
        (rewards.onset, "1.25 s", "1.5 s", 0.75),
        (rewards.onset, "1750 ms", "1.5 seconds", 0.75),
        (rewards.onset, "5 s", "1.5 s", 0.0),
        (rewards.onset, "1.5", "1.5 s", 1.0),
        (rewards.onset, "1.5 s", "rain", None),
        (rewards.direction, "left", "rain", None),
    ],
)
def test_graded_rewards(reward, reply, reference, expected):
    assert score(reward, answer(reply), answer=reference) == (None if expected is None else pytest.approx(expected))


# --- what every reward keeps ---------------------------------------------------------------------------------------

COLUMNS = {"answer": ["left, front, below; 2m", None, "rain", "at 2 s"], "choices": [None, None, ["rain", "dog"], None]}


@pytest.mark.parametrize("name", rewards.REWARDS)
@given(texts=st.lists(st.text(max_size=60) | st.from_regex(r"<(think|answer)>.{0,9}</answer>"), min_size=4, max_size=4))
def test_rewards_are_pure_bounded_and_read_any_text(name, texts):
    function = rewards.REWARDS[name]
    columns = {**COLUMNS, "style": ["think"] * 4}
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    first = function(["p"] * 4, texts, **columns)
    assert first == function(["p"] * 4, messages, **columns, completion_ids=[[1]] * 4, trainer_state=None)
    assert len(first) == 4 and all(value is None or 0.0 <= value <= 1.0 for value in first)


@pytest.mark.parametrize("name", [name for name in rewards.REWARDS if name != "format"])
def test_what_applies_does_not_depend_on_the_reply(name):
    function = rewards.REWARDS[name]
    applies = [
        [value is None for value in function(["p"] * 4, [text] * 4, **COLUMNS)]
        for text in ("", "nonsense", answer("left; 2m"), answer("at 2 s"), answer("rain"))
    ]
    assert all(row == applies[0] for row in applies)


# --- recipes -------------------------------------------------------------------------------------------------------


def test_default_rewards_are_dyadic():
    functions, weights = rewards.build_rewards(None)
    assert [function.__name__ for function in functions] == ["answer_accuracy", "format"]
    assert weights == [1.0, 0.25] and all(float(weight).hex().count("0x1.0") == 1 for weight in weights)


def test_recipe_options_reach_the_reward():
    (function,), weights = rewards.build_rewards({"distance": {"weight": 0.5, "zero_at": 4}})
    assert function.__name__ == "distance" and weights == [0.5]
    assert function(["p"], [answer("2m")], answer=["4m"]) == [0.5]
    (function,), _ = rewards.build_rewards({"format": {"style": "answer"}})
    assert function(["p"], [ANSWER], style=["think"]) == [1.0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"anser_accuracy": 1}, r"reward: .*'anser_accuracy' \(did you mean 'answer_accuracy'\?\)"),
        ({"distance": {"zero": 1}}, r"unknown option 'zero' \(did you mean 'zero_at'\?\)"),
        ({"distance": {"zero_at": 0}}, "a number above 0"),
        ({"format": {"style": "thinking"}}, r"unknown style 'thinking' \(did you mean 'think'\?\)"),
        ({"format": "much"}, "a number as weight"),
        ({"format": float("nan")}, "a number as weight"),
        ({"no_such_module_here:f": 1}, "No module named"),
        ({"math:no_such_function": 1}, "has no attribute"),
        ({"math:pi": 1}, "has no '__call__'"),
        ({".x:y": 1}, "reward: expected one of"),
    ],
)
def test_wrong_recipes_name_the_nearest(recipe, message):
    with pytest.raises(ConfigError, match=message):
        rewards.build_rewards(recipe)


def test_a_reward_from_elsewhere():
    (function,), _ = rewards.build_rewards({"tests.training.test_rewards:score": 1.0})
    assert function is score


DOG = {"label": "dog", "azimuth": 90.0, "elevation": 0.0, "distance": 2.5, "onset": 0.0}
RAIN = {"label": "rain", "azimuth": 180.0, "elevation": 0.0, "distance": 1.0, "onset": 0.5}


@pytest.mark.parametrize(
    "thinking, events, expected",
    [
        ("dog on the left, 2.5 m.", [DOG], 1.0),
        ("dog on the left, 2.5 m; rain behind, 1 m.", [RAIN, DOG], 1.0),  # order of onset, however they are listed
        ("rain on the left, 2.5 m.", [DOG], 2 / 3),
        ("dog in front, 2.5 m.", [DOG], 2 / 3),  # 90 degrees off is worth nothing
        ("dog on the left, 5 m.", [DOG], 2 / 3),  # twice as far is worth nothing
        ("dog on the left, 3.5355339 m.", [DOG], 5 / 6),  # half of that, in octaves
        ("the dog on the left, 2.5 m. So the rain not there.", [DOG], 1.0),  # a conclusion is no description
        ("dog.", [DOG], 1 / 3),
        ("hotdog.", [DOG], 0.0),
        ("dog on the left, 2.5 m; rain behind, 1 m.", [DOG], 0.5),  # naming more than there is costs
        ("dog on the left, 2.5 m.", [DOG, RAIN], 0.5),
        (None, [DOG], 0.0),
        ("dog on the left, 2.5 m.", [], None),
        ("dog on the left, 2.5 m.", [{**DOG, "azimuth": None}], None),
    ],
)
def test_evidence_pays_what_the_thinking_gets_right(thinking, events, expected) -> None:
    text = f"<think>{thinking}</think>\n<answer>dog</answer>" if thinking else "<answer>dog</answer>"
    (score,) = rewards.evidence([None], [text], events=[events])
    assert score == (expected if expected is None else pytest.approx(expected))
