"""Intervals and tests of every figure that evaluation prints.

The unit of all of them is a cluster: answers about one clip, about clips of one recording or about scenes in one room
are not independent, and neither are several samples or seeds of one clip. Variances are those of a ratio of sums over
clusters (Cochran 1977, ch. 9), quantiles Student's with one degree of freedom fewer than there are clusters. A test
and its interval are one calculation: p is below 0.05 exactly where the 95 % interval leaves out zero.

``tests/eval/test_estimates.py`` simulates clips with one to eight questions, alike or not: from ten clusters on, 93 to
97 % of the intervals hold the truth and 3 to 7 % of the tests raise a false alarm. With fewer the intervals are wide,
hold it more often, and say how few there were; one cluster tells nothing but the range of the figure.

Everything is a pure function of arrays: recomputing a report gives the same digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEW = 10  # clusters below which a figure says how many it has
_LEVEL = 0.975  # of the quantiles: two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided 95 % interval; `n` items are behind it, in `clusters` that are independent.

    The bounds are NaN where nothing bounds them: a single cluster, or values without any spread, of a figure that has
    no range of its own (metres).
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int = 0

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "–"
        bounds = f"{100 * self.low:.1f}, {100 * self.high:.1f}" if math.isfinite(self.low) else "–"
        return f"{100 * self.value:.1f} [{bounds}]" + self.few

    @property
    def few(self) -> str:
        """A note on how few clusters there are; "" where there are enough."""
        if not 0 < self.clusters < FEW:
            return ""
        return f" ({self.clusters} cluster{'s' if self.clusters > 1 else ''})"


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same items: mean of second − first, p of no difference, and items that only one does better on
    (of right and wrong answers: that only one got right)."""

    difference: Estimate
    p_value: float
    only_first: int
    only_second: int


def wilson(successes: float, n: float) -> Estimate:
    """Wilson score interval of a proportion (Wilson 1927). With n = 0 the interval is the whole of [0, 1]."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    from scipy.special import ndtri

    return Estimate(successes / n, *_wilson(successes / n, n, float(ndtri(_LEVEL))), int(n), int(n))


def proportion(values: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """Mean of `values` (n,) from 0 to 1, by default each a cluster of its own: Wilson's interval where every cluster is
    one right or wrong answer, else :func:`share`."""
    values = np.asarray(values, dtype=np.float64)
    names = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if np.unique(names).size == values.size and np.isin(values, (0.0, 1.0)).all():
        return wilson(values.sum(), values.size)
    return share(values, np.ones_like(values), names)


def share(numerators: np.ndarray, denominators: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Sum of `numerators` (n,) over that of `denominators` (n,), from 0 to 1: accuracy, or F1 as twice the hits over
    what was said and asked.

    Wilson's interval of the effective number of answers: as many independent ones as would vary like these clusters
    (Korn and Graubard 1998), with Student's quantile. Where clusters show no spread, each counts as one answer.
    """
    sums = _Sums.of(numerators, denominators, clusters)
    if not sums.clusters:
        return Estimate(math.nan, 0.0, 1.0, 0)
    value = sums.value
    if sums.clusters == 1:
        return Estimate(value, 0.0, 1.0, sums.items, 1)
    variance = sums.variance
    effective = value * (1 - value) / variance if variance > 0 and 0 < value < 1 else sums.clusters
    return Estimate(value, *_wilson(value, effective, sums.quantile), sums.items, sums.clusters)


def average(values: np.ndarray, clusters: np.ndarray | None = None, highest: float = math.inf) -> Estimate:
    """Mean of `values` (n,) of 0 to `highest` in any unit, with Student's interval over `clusters`."""
    values = np.asarray(values, dtype=np.float64)
    names = np.arange(values.size) if clusters is None else np.asarray(clusters)
    sums = _Sums.of(values, np.ones_like(values), names)
    if sums.clusters < 2 or not sums.variance:
        bounds = (0.0, highest) if math.isfinite(highest) else (math.nan, math.nan)
        return Estimate(sums.value, *bounds, sums.items, sums.clusters)
    half = sums.quantile * math.sqrt(sums.variance)
    return Estimate(sums.value, max(0.0, sums.value - half), min(highest, sums.value + half), sums.items, sums.clusters)


def paired(first: np.ndarray, second: np.ndarray, clusters: np.ndarray | None = None) -> Comparison:
    """`second` against `first`, values (n,) from 0 to 1 of the same items.

    For right and wrong answers this is McNemar's asymptotic test, which keeps its level better than the exact one in
    small samples (Fagerland et al. 2013), carried over to clusters as Obuchowski (1998) does. Where every cluster gains
    or loses alike, two more are put in, one all gained and one all lost (after Bonett and Price 2012).
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired: {first.shape} and {second.shape} are not the same items")
    gains = second - first
    counts = int((gains < 0).sum()), int((gains > 0).sum())
    names = np.arange(gains.size) if clusters is None else np.asarray(clusters)
    sums = _Sums.of(gains, np.ones_like(gains), names)
    if sums.clusters < 2:
        return Comparison(Estimate(sums.value, -1.0, 1.0, sums.items, sums.clusters), 1.0, *counts)
    from scipy.special import stdtr

    spread = sums if sums.variance else sums.opened()
    error = math.sqrt(spread.variance)
    low, high = spread.value - sums.quantile * error, spread.value + sums.quantile * error
    bounds = max(-1.0, min(low, sums.value)), min(1.0, max(high, sums.value))
    p_value = 2 * float(stdtr(sums.clusters - 1, -abs(spread.value) / error))
    return Comparison(Estimate(sums.value, *bounds, sums.items, sums.clusters), p_value, *counts)


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates, with the interval that theirs make (MOVER: Zou and Donner 2008)."""
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    items, clusters = sum(part.n for part in parts), sum(part.clusters for part in parts)
    return Estimate(value, value - below, value + above, items, clusters)


@dataclass(frozen=True)
class _Sums:
    """Sums over each cluster, ``(clusters,)``, of what is counted and of what it is a share of; `items` are behind."""

    above: np.ndarray
    below: np.ndarray
    items: int

    @classmethod
    def of(cls, numerators: np.ndarray, denominators: np.ndarray, clusters: np.ndarray) -> _Sums:
        numerators, denominators = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
        _, unit = np.unique(np.asarray(clusters), return_inverse=True)
        above, below = np.bincount(unit, weights=numerators), np.bincount(unit, weights=denominators)
        told = below > 0  # the others have no part in the figure
        return cls(above[told], below[told], int(np.count_nonzero(denominators)))

    @property
    def clusters(self) -> int:
        return len(self.below)

    @property
    def value(self) -> float:
        return float(self.above.sum() / self.below.sum()) if self.clusters else math.nan

    @property
    def variance(self) -> float:
        """Of the value; 0 where all clusters have one and the same, but for rounding."""
        residuals = self.above - self.value * self.below
        found = self.clusters / (self.clusters - 1) * float(np.square(residuals).sum()) / float(self.below.sum()) ** 2
        return found if found > 1e-24 else 0.0

    @property
    def quantile(self) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.clusters - 1, _LEVEL))

    def opened(self) -> _Sums:
        """With a cluster that gains all it can and one that loses all, each of mean size."""
        size = float(self.below.mean())
        return _Sums(np.append(self.above, [size, -size]), np.append(self.below, [size, size]), self.items)


def _wilson(value: float, n: float, quantile: float) -> tuple[float, float]:
    """Bounds of Wilson's interval; none and all lie exactly on them."""
    square = quantile * quantile
    centre = (value + square / (2 * n)) / (1 + square / n)
    half = quantile / (1 + square / n) * math.sqrt(value * (1 - value) / n + square / (4 * n * n))
    return (centre - half if value > 0 else 0.0), (centre + half if value < 1 else 1.0)
