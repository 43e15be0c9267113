"""Directions, distances and times in words; SciPy as the oracle of angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from audio_llm.language.directions import great_circle, read_direction, read_directions
from audio_llm.language.quantities import read_distance, read_time


def angles(azimuth: float, elevation: float) -> tuple[float, ...]:
    """SciPy's rotation of the front vector: counter-clockwise azimuth about up, then elevation upwards."""
    return tuple(Rotation.from_euler("ZY", [azimuth, -elevation], degrees=True).apply([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("text", "azimuth", "elevation"),
    [
        ("front", 0, 0),
        ("left", 90, 0),
        ("on the right side", -90, 0),
        ("behind you", 180, 0),
        ("above", 0, 90),
        ("below", 0, -90),
        ("front left", 45, 0),
        ("left, behind", 135, 0),
        ("left, front, above; 2.5m", 45, math.degrees(math.asin(1 / math.sqrt(3)))),
        ("right, behind, below; 1m", -135, -math.degrees(math.asin(1 / math.sqrt(3)))),
        ("35 degrees to the left", 35, 0),
        ("35° to the right", -35, 0),
        ("-35 degrees", -35, 0),
        ("\u221235°", -35, 0),
        ("azimuth 120°, elevation -10°", 120, -10),
        ("20° left and 15° above", 20, 15),
        ("left 35°", 35, 0),
        ("30 degrees below", 0, -30),
        ("behind, 170° to the left", 170, 0),
        ("190 degrees", -170, 0),
    ],
)
def test_directions_are_read(text, azimuth, elevation):
    np.testing.assert_allclose(read_direction(text), angles(azimuth, elevation), atol=1e-9)


@pytest.mark.parametrize(
    "text", ["", "a dog", "left or right", "front and behind", "not left", "it isn't behind", "2.5m"]
)
def test_texts_without_one_direction_have_none(text):
    assert read_direction(text) is None


angle = st.floats(-180, 180, allow_nan=False)
height = st.floats(-90, 90, allow_nan=False)


@given(angle, height, angle, height)
def test_great_circle_agrees_with_scipy(a, b, c, d):
    first, second = np.array(angles(a, b)), np.array(angles(c, d))
    between = Rotation.align_vectors(second[None], first[None])[0].magnitude()
    assert great_circle(tuple(first), tuple(second)) == pytest.approx(math.degrees(between), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "metres"),
    [("2.5m", 2.5), ("2.5 metres", 2.5), ("about 3 meters away", 3.0), ("80 cm", 0.8), ("left, front, below; 4m", 4.0)]
    + [("2 m, that is 2 metres", 2.0), ("1m or 2m", None), ("2 minutes", None), ("far", None), ("300 ms", None)],
)
def test_distances_are_read(text, metres):
    assert read_distance(text) == (None if metres is None else pytest.approx(metres))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("at 1.5 s", 1.5), ("1.5 seconds", 1.5), ("after 1.5sec", 1.5), ("300 ms", 0.3), ("0.0 s", 0.0)]
    + [("2.5m", None), ("soon", None), ("from 1 s to 2 s", None)],
)
def test_times_are_read(text, seconds):
    assert read_time(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("text", "directions", "distance"),
    [
        ("It is not on the left", [], None),
        ("not left, not front, not below; 1m", [], 1.0),
        ("right rather than left; 2m", ["right"], 2.0),
        ("on the left, not the right; not 2m", ["left"], None),
        ("neither left nor right", [], None),
        ("left, behind; -2m", ["left", "behind"], None),
        ("left; 1-2m", ["left"], None),
        ("No, it is to the left", ["left"], None),
    ],
)
def test_what_is_denied_is_not_said(text: str, directions: list[str], distance: float | None) -> None:
    assert [*read_directions(text).values()] == directions
    assert read_distance(text) == distance
