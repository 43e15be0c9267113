"""Intervals and tests of evaluation: against scipy, against what they promise by simulation, and at their edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.figures import estimates

# ------------------------------------------------------------------------------------------- what they promise
# A clip has a skill of its own, which its questions share: `alike` is the correlation of two answers about one clip.


def draw(rng: np.random.Generator, skill: float, clips: int, questions: int, alike: float) -> np.ndarray:
    """Right and wrong answers, (clips, questions)."""
    if not alike:
        return rng.random((clips, questions)) < skill
    spread = (1 - alike) / alike
    own = rng.beta(skill * spread, (1 - skill) * spread, clips)
    return rng.random((clips, questions)) < own[:, None]


def coverage(clips: int, questions: int, alike: float, trials: int, samples: int = 1) -> float:
    """Share of intervals of the accuracy that hold the true one, which is drawn anew each time: with one question a
    clip, the interval of a single true value covers in steps. Several samples of a question are averaged."""
    rng, held = np.random.default_rng([clips, questions, round(10 * alike), samples]), 0
    names = np.repeat(np.arange(clips), questions)
    for _ in range(trials):
        skill = rng.uniform(0.3, 0.8)
        answers = draw(rng, skill, clips, questions * samples, alike).reshape(clips, questions, samples)
        found = estimates.proportion(answers.mean(axis=2).ravel(), names)
        held += found.low <= skill <= found.high
    return held / trials


def false_alarms(clips: int, questions: int, alike: float, trials: int) -> tuple[float, float]:
    """Share of comparisons of two equally good runs with p < 0.05, and of those whose interval leaves out zero."""
    rng, hits, outside = np.random.default_rng([clips, questions, round(10 * alike), 7]), 0, 0
    names = np.repeat(np.arange(clips), questions)
    for _ in range(trials):
        skill = rng.uniform(0.5, 0.7)
        first, second = (draw(rng, skill, clips, questions, alike).ravel() for _ in range(2))
        found = estimates.paired(first, second, names)
        hits += found.p_value < 0.05
        outside += not found.difference.low <= 0 <= found.difference.high
    return hits / trials, outside / trials


FAST = [(10, 1, 0.0), (10, 4, 0.5), (20, 8, 0.5), (60, 4, 0.0)]
ALL = [
    (clips, questions, alike)
    for clips, questions in itertools.product((10, 20, 40, 60), (1, 4, 8))
    for alike in ((0.0,) if questions == 1 else (0.0, 0.3, 0.7))
]


def at_level(share: float, trials: int, level: float) -> bool:
    """Whether `share` is within two points of `level`, but for what so few trials leave open (3 standard errors)."""
    return abs(share - level) <= 0.02 + 3 * math.sqrt(level * (1 - level) / trials)


@pytest.mark.parametrize(("clips", "questions", "alike"), FAST)
def test_intervals_and_tests_keep_their_level(clips: int, questions: int, alike: float) -> None:
    trials = 800
    assert at_level(coverage(clips, questions, alike, trials), trials, 0.95)
    hits, outside = false_alarms(clips, questions, alike, trials)
    assert hits == outside and at_level(hits, trials, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("clips", "questions", "alike"), ALL)
def test_intervals_hold_the_truth_93_to_97_times_in_100(clips: int, questions: int, alike: float) -> None:
    trials = 6000
    found, (hits, outside) = coverage(clips, questions, alike, trials), false_alarms(clips, questions, alike, trials)
    print(f"{clips} clips, {questions} questions, alike {alike}: held {100 * found:.1f} %, alarms {100 * hits:.1f} %")
    assert 0.93 <= found <= 0.97
    assert hits == outside and 0.03 <= hits <= 0.07


@pytest.mark.parametrize(("clips", "questions"), [(10, 1), (30, 4)])
def test_several_samples_of_a_question_keep_the_level_too(clips: int, questions: int) -> None:
    assert at_level(coverage(clips, questions, 0.5, 800, samples=4), 800, 0.95)


@pytest.mark.parametrize("clips", [2, 3, 5])
def test_few_clusters_are_on_the_safe_side_and_named(clips: int) -> None:
    assert coverage(clips, 4, 0.5, 500) > 0.93
    assert false_alarms(clips, 4, 0.5, 500)[0] < 0.08
    found = estimates.proportion(np.tile([1.0, 0.0], clips), np.repeat(np.arange(clips), 2))
    assert str(found).endswith(f"] ({clips} clusters)")


def test_mcnemar_of_items_alarms_falsely_where_clips_repeat_and_this_does_not() -> None:
    """What is mended: eight questions a clip that rise and fall together were taken for independent."""
    rng, item, cluster, trials = np.random.default_rng(0), 0, 0, 200
    names = np.repeat(np.arange(60), 8)
    for _ in range(trials):
        first, second = (draw(rng, 0.6, 60, 8, 0.5).ravel() for _ in range(2))
        only = int((first & ~second).sum()), int((second & ~first).sum())
        item += stats.binomtest(only[0], sum(only)).pvalue < 0.05
        cluster += estimates.paired(first, second, names).p_value < 0.05
    assert item > 0.2 * trials and cluster < 0.1 * trials


# ------------------------------------------------------------------------------------------- against others


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    wanted = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = estimates.wilson(k, n)
    assert found.value == k / n
    assert found.low == pytest.approx(wanted.low, abs=1e-9)
    assert found.high == pytest.approx(wanted.high, abs=1e-9)


def test_a_mean_has_students_interval() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=40)
    wanted = stats.ttest_1samp(values, 0).confidence_interval()
    found = estimates.average(values)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_of_paired_items_it_is_students_test() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random((2, 50)) < [[0.5], [0.7]]
    found = estimates.paired(first, second)
    wanted = stats.ttest_rel(second.astype(float), first.astype(float))
    assert found.p_value == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert (found.only_first, found.only_second) == ((first & ~second).sum(), (second & ~first).sum())


def test_over_clips_it_is_scipys_bootstrap() -> None:
    """Clips of one to four questions; F1 and accuracy are both a ratio of sums over clips."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 5, 80)
    hits = np.array([rng.binomial(size, rng.random()) for size in sizes])
    found = estimates.share(hits, sizes, np.arange(80))
    draws = stats.bootstrap(
        (hits, sizes),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = draws.high - draws.low
    assert abs(found.low - draws.low) < 0.1 * width and abs(found.high - draws.high) < 0.1 * width


def test_the_mean_of_parts_has_the_interval_of_a_bootstrap_within_parts() -> None:
    rng = np.random.default_rng(3)
    parts = [(rng.random(size) < rate).astype(float) for size, rate in ((224, 0.4), (609, 0.5), (1633, 0.6))]
    found = estimates.mean_of([estimates.proportion(part) for part in parts])
    draws = np.mean([rng.choice(part, (4000, part.size)).mean(axis=1) for part in parts], axis=0)
    low, high = np.quantile(draws, (0.025, 0.975))
    assert found.value == pytest.approx(np.mean([part.mean() for part in parts])) and found.n == 2466
    assert abs(found.low - low) < 0.1 * (high - low) and abs(found.high - high) < 0.1 * (high - low)
    certain = estimates.mean_of([estimates.wilson(10, 10)] * 3)
    assert certain.value == certain.high == 1.0 and 0.7 < certain.low < 0.9  # 30 answers, all right


# ------------------------------------------------------------------------------------------- clusters and edges


def test_an_interval_counts_clips_where_questions_share_them() -> None:
    """Eight questions about a clip that are right or wrong together say no more than one."""
    rng = np.random.default_rng(1)
    clip, right = np.repeat(np.arange(60), 8), np.repeat((rng.random(60) < 0.6).astype(float), 8)
    found, alone = estimates.proportion(right, clip), estimates.proportion(right)
    assert (found.value, found.n, found.clusters) == (alone.value, 480, 60)
    assert found.high - found.low == pytest.approx(math.sqrt(8) * (alone.high - alone.low), rel=0.1)
    assert estimates.proportion(right[::8], np.arange(60)) == estimates.wilson(right[::8].sum(), 60)
    better = np.repeat(rng.random(60) < 0.9, 8).astype(float)
    together, apart = estimates.paired(right, better, clip), estimates.paired(right, better)
    assert together.difference.value == apart.difference.value and together.p_value > apart.p_value
    shuffled = rng.permutation(480)
    again = estimates.paired(right[shuffled], better[shuffled], clip[shuffled])
    assert again.p_value == pytest.approx(together.p_value) and again.only_second == together.only_second


@pytest.mark.parametrize("clips", [2, 3, 10, 40])
@pytest.mark.parametrize("gain", [-1.0, -0.25, 0.0, 0.25, 1.0])
def test_clips_that_are_all_alike_are_no_certainty(clips: int, gain: float) -> None:
    """No interval has a width of zero because what was asked happened to come out alike."""
    share = abs(gain)
    for questions in (1, 4):
        names = np.repeat(np.arange(clips), questions)
        mean = estimates.proportion(np.full(clips * questions, share), names)
        assert mean.value == share and mean.high - mean.low > 0.5 / clips
        first, second = np.full(len(names), max(0.0, -gain)), np.full(len(names), max(0.0, gain))
        found = estimates.paired(first, second, names)
        assert found.difference.value == gain and found.difference.high - found.difference.low > 0.1 / clips
        assert -1 <= found.difference.low <= gain <= found.difference.high <= 1
        assert (found.p_value < 0.05) == (not found.difference.low <= 0 <= found.difference.high)
        assert gain or found.p_value == 1


@pytest.mark.parametrize("clips", [4, 5, 6, 8])
def test_clips_that_all_gain_are_as_certain_as_the_sign_test(clips: int) -> None:
    found = estimates.paired(np.zeros(clips), np.ones(clips))
    assert (found.p_value < 0.05) == (2 * 0.5**clips < 0.05)


def test_one_cluster_and_none_tell_nothing() -> None:
    one = estimates.paired(np.zeros(4), np.ones(4), np.zeros(4))
    assert (one.difference.low, one.difference.high, one.p_value) == (-1, 1, 1)
    found = estimates.proportion(np.ones(4), np.zeros(4))
    assert (found.low, found.high) == (0, 1) and str(found) == "100.0 [0.0, 100.0] (1 cluster)"
    nothing = estimates.paired(np.array([]), np.array([]), np.array([]))
    assert math.isnan(nothing.difference.value) and nothing.p_value == 1
    assert math.isnan(estimates.proportion(np.array([]), np.array([])).value)
    for values in ([0.5], [0.5, 0.5, 0.5]):  # metres have no bound, degrees have one
        found = estimates.average(np.array(values))
        assert found.value == 0.5 and math.isnan(found.low) and "[–]" in str(found)
        assert estimates.average(np.array(values), highest=180.0).high == 180
    with pytest.raises(ValueError, match="not the same items"):
        estimates.paired(np.zeros(3), np.zeros(4))
