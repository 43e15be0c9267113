"""Intervals and tests for evaluation scores: Wilson, percentile bootstrap, paired bootstrap, exact McNemar.

Everything is a pure function of arrays and a seed, so that recomputing a report gives the same digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000  # the Monte Carlo error of a 95 % bound is then about 0.05 of the standard error


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided interval; `n` is the number of items behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class McNemar:
    """Items that only the first (`only_first`) or only the second run answered correctly, and the exact p-value."""

    only_first: int
    only_second: int
    p_value: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson score interval of a proportion (Wilson 1927). With n = 0 the interval is the whole of [0, 1]."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    z = _normal_quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = centre - half if successes > 0 else 0.0
    high = centre + half if successes < n else 1.0  # exactly: rounding must not leave 0.9999999999999998
    return Estimate(share, low, high, n)


def bootstrap_mean(values: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Percentile bootstrap over items of the mean of `values` (n,); for per-item means that are not 0 or 1."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    low, high = np.quantile(_resampled_means(values, seed), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values.mean()), float(low), float(high), values.size)


def proportion(values: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean with a 95 % interval: Wilson where every value is 0 or 1, the bootstrap where items carry fractions."""
    values = np.asarray(values, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(int(values.sum()), values.size)
    return bootstrap_mean(values, seed=seed)


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> Estimate:
    """Mean of ``second - first`` over the same items (n,), percentile bootstrap over items.

    `clusters` (n,) names the unit that is resampled where items are not independent (several questions about one
    clip): whole clusters are drawn, which widens the interval as it must.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired_difference: {first.shape} and {second.shape} are not the same items")
    difference = second - first
    if clusters is None or difference.size == 0:
        return bootstrap_mean(difference, confidence=confidence, seed=seed)
    _, unit = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(unit, weights=difference), np.bincount(unit)
    drawn = np.random.default_rng(seed).integers(0, sums.size, size=(RESAMPLES, sums.size))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(difference.mean()), float(low), float(high), difference.size)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Exact McNemar test of two runs' right/wrong on the same items (McNemar 1947, binomial form, two-sided)."""
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return McNemar(0, 0, 1.0)
    tail = math.fsum(math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(k + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // values.size)  # bounds the index array to 16 MB whatever the number of items
    parts = [
        values[generator.integers(0, values.size, size=(min(block, RESAMPLES - start), values.size))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(parts)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)
