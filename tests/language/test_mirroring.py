"""A mirrored sample is true of the mirrored sound, word for word."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm import audio
from audio_llm.language.mirroring import mirror_sample, mirror_text
from audio_llm.model.build import load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Event, Sample


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("The dog is on the left.", "The dog is on the right."),
        ("Left-hand side, LEFT or rightmost", "Right-hand side, RIGHT or leftmost"),
        ("azimuth 30°, azimuth: -45, Azimuth of 12.5°", "azimuth -30°, azimuth: 45, Azimuth of -12.5°"),
        ("azimuth 0°, azimuth 180°", "azimuth 0°, azimuth 180°"),
        ("the right answer, all right, right now", "the right answer, all right, right now"),
        ("bright copyright leftover", "bright copyright leftover"),
        ("At 45 degrees to the left", "At 45 degrees to the right"),
        ("Direction: 45°", "Direction: -45°"),
        ("the azimuth angle is about 40°, elevation 20°", "the azimuth angle is about -40°, elevation 20°"),
        ("DoA 40°", "DoA -40°"),
        ("at 3 o'clock", "at 9 o'clock"),
        ("Ten o'clock, then 1:30 o'clock", "Two o'clock, then 10:30 o'clock"),
        ("at 3 o'clock in the afternoon", "at 3 o'clock in the afternoon"),
        ("counter-clockwise, 60°", "clockwise, 60°"),
        ("It moves clockwise", "It moves counter-clockwise"),
        ("L", "R"),
        ("The L channel, L/R", "The R channel, R/L"),
        ("Music in R&B style", "Music in R&B style"),
        ("turn right", "turn left"),
        ("2 m, left, above", "2 m, right, above"),
        ("Left: a dog; to your right, behind: a cat", "Right: a dog; to your left, behind: a cat"),
        ("The right channel is louder than the left.", "The left channel is louder than the right."),
        ("human rights, a right-handed man at the right time", "human rights, a right-handed man at the right time"),
        ("You are right", "You are right"),
        ("the lyrics say 'you left me'", "the lyrics say 'you left me'"),
        ("The dog has left the room, nothing left", "The dog has left the room, nothing left"),
        ("left over noise right before the sunrise", "left over noise right before the sunrise"),
    ],
)
def test_words_that_are_sides_change_and_others_stay(text: str, mirrored: str) -> None:
    assert mirror_text(text) == mirrored and mirror_text(mirrored) == text


@pytest.mark.parametrize(
    "text",
    [
        "At an angle of 30 degrees",
        "60 degrees",
        "west",
        "starboard",
        "channel 1 is louder than channel 2",
        "The bus left.",
    ]
    + ["right behind you", "What is right?", "It is on the left, right?", "the left one", "The agent R speaks"],
)
def test_what_has_no_certain_mirror_image_has_none(text: str) -> None:
    assert mirror_text(text) is None
    sample = Sample("a", "qa", question="Where is it?", choices=["on the left", text], answer="on the left")
    assert mirror_sample(sample) is None and mirror_sample(dataclasses.replace(sample, thinking=text)) is None


@given(st.lists(st.sampled_from(["left", "right", "Right", "in front", "azimuth -3°", "azimuth 7°", "2 m", "a dog,"])))
def test_a_mirror_of_a_mirror_is_the_scene(words: list[str]) -> None:
    mirrored = mirror_text(" ".join(words))
    assert mirrored is None or mirror_text(mirrored) == " ".join(words)


def test_every_part_of_a_sample_is_mirrored() -> None:
    sample = Sample("a", "qa", question="Is the dog left of the cat?", choices=["yes, left", "no"], answer="yes, left")
    sample.thinking, sample.semantic_elements = "dog, left", {"who": ["dog on the left"], "n": 2}
    sample.events = [Event("dog", 0.0, 1.0, azimuth=40.0), Event("cat", 0.0, 1.0)]
    found = mirror_sample(sample)
    assert found is not None
    assert (found.question, found.choices) == ("Is the dog right of the cat?", ["yes, right", "no"])
    assert (found.answer, found.thinking) == ("yes, right", "dog, right")
    assert found.semantic_elements == {"who": ["dog on the right"], "n": 2}
    assert [event.azimuth for event in found.events] == [-40.0, None]
    assert mirror_sample(found) == sample


def test_sft_mirrors_a_share_of_the_samples_sound_and_words(shards, checkpoint) -> None:
    from audio_llm.training import examples

    dataset, processor = ShardDataset(shards()), load_processor(checkpoint())
    some = examples.Examples(dataset, processor, swap_share=0.5, seed=3)
    assert 0 < some.swapped.sum() < len(dataset)
    for i in range(len(dataset)):
        item = dataset[i]
        if some.swapped[i]:
            item |= {"sample": mirror_sample(item["sample"]), "waveforms": [audio.swap_channels(item["waveforms"][0])]}
        expected = examples.encode(processor, item)
        assert np.array_equal(some[i].ids, expected.ids)
        assert np.array_equal(some[i].input_audio, expected.input_audio)
    answers = [examples.encode(processor, dataset[i]).ids.tolist() for i in np.flatnonzero(some.swapped)]
    assert any(some[i].ids.tolist() != ids for i, ids in zip(np.flatnonzero(some.swapped), answers, strict=True))
