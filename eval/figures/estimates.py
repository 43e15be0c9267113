"""Intervals and tests for evaluation scores: Wilson, percentile bootstrap over items or clips, paired bootstrap, exact
McNemar.

Everything is a pure function of arrays and a seed, so that recomputing a report gives the same digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

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


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson score interval of a proportion (Wilson 1927). With n = 0 the interval is the whole of [0, 1]."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
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


def ratio(
    numerators: np.ndarray, denominators: np.ndarray, clusters: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Sum of `numerators` (n,) over that of `denominators` (n,), percentile bootstrap over the units that `clusters`
    (n,) names: whole clusters are drawn, for the items of one are not independent (Field and Welsh 2007). A mean has
    ones as denominators; F1 over pairs twice the hits over what was said and asked."""
    numerators, denominators = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not denominators.sum():
        return Estimate(math.nan, 0.0, 1.0, 0)
    _, unit = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.stack([np.bincount(unit, weights=numerators), np.bincount(unit, weights=denominators)])
    # Clusters of equal sums are one and the same: how often each kind is drawn is a draw from the multinomial.
    kinds, counts = np.unique(sums, axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    above, below = drawn @ kinds[0], drawn @ kinds[1]
    low, high = np.quantile(above[below > 0] / below[below > 0], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(
        float(numerators.sum() / denominators.sum()), float(low), float(high), int(np.count_nonzero(denominators))
    )


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates, with the interval that theirs make (MOVER: Zou and Donner 2008).

    A part whose answers are all alike keeps the width of its own interval, where a bootstrap would see none.
    """
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    return Estimate(value, value - below, value + above, sum(part.n for part in parts))


def proportion(values: np.ndarray, *, seed: int = 0, clusters: np.ndarray | None = None) -> Estimate:
    """Mean of `values` (n,) between 0 and 1 with a 95 % interval: Wilson where every value is 0 or 1, the bootstrap
    where items carry fractions, and that over `clusters` (n,) where several items share one (see :func:`ratio`).

    Where all clusters have one and the same mean, resampling shows no spread: Wilson's then, of so many clusters.
    """
    values = np.asarray(values, dtype=np.float64)
    if clusters is not None and (units := np.unique(np.asarray(clusters)).size) < values.size:
        found = ratio(values, np.ones_like(values), clusters, seed=seed)
        if found.high - found.low > 1e-12:
            return found
        return replace(wilson(found.value * units, units), value=found.value, n=values.size)
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
    names, places = np.unique(np.asarray(clusters), return_index=True)
    if names.size == difference.size:  # every item a unit of its own; by name, so that their order decides nothing
        return bootstrap_mean(difference[places], confidence=confidence, seed=seed)
    return ratio(difference, np.ones_like(difference), clusters, confidence=confidence, seed=seed)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Exact McNemar test of two runs' right/wrong on the same items (McNemar 1947, binomial form, two-sided)."""
    from scipy.stats import binomtest

    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // values.size)  # bounds the index array to 16 MB whatever the number of items
    parts = [
        values[generator.integers(0, values.size, size=(min(block, RESAMPLES - start), values.size))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(parts)
