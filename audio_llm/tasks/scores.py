"""Angles and figures that several tasks share."""

from __future__ import annotations

import math

import numpy as np


def unit_vector(azimuth: float, elevation: float) -> tuple[float, float, float]:
    """(x front, y left, z up) of a direction in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall steps of one class, equal scores taken together (as scikit-learn computes it)."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # the last of every run of equal scores
    precision = hits[last] / (last + 1)
    gained = np.diff(np.append(0, hits[last]))
    return float((gained * precision).sum() / hits[-1])


def great_circle(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Degrees between unit vectors ``(..., 3)``; accurate also for tiny angles."""
    cross = np.linalg.norm(np.cross(first, second), axis=-1)
    return np.degrees(np.arctan2(cross, (first * second).sum(axis=-1)))
