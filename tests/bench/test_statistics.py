import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.bench.statistics import Interval, mean_interval, paired_difference, pareto

FLOATS = st.floats(-100, 100)
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def test_the_mean_lies_in_its_interval() -> None:
    mean, low, high = mean_interval([0.0, 1.0, 1.0, 3.0, 5.0])
    assert mean == 2.0
    assert low is not None
    assert high is not None
    assert 0.0 <= low < 2.0 < high <= 5.0


def test_the_interval_is_the_same_in_every_report() -> None:
    assert mean_interval([0.3, 0.1, 2.0, 0.7]) == mean_interval([0.3, 0.1, 2.0, 0.7])


@pytest.mark.parametrize("values", [[3.0], [0.1] * 7, [0.1 + 0.2, 0.3, 0.3]])
def test_one_example_or_equal_ones_give_no_interval(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values[0])
    assert low is None
    assert high is None


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize(
    ("draw", "truth"),
    [(lambda rng: rng.normal(2.0, 1.0, 30), 2.0), (lambda rng: rng.exponential(1.0, 30), 1.0)],
    ids=["normal", "skewed"],
)
def test_about_95_in_100_intervals_cover_the_true_mean(draw, truth) -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(draw(rng).tolist()) for _ in range(200)]
    covered = sum(low <= truth <= high for _, low, high in intervals)
    assert 0.87 <= covered / 200 <= 0.99


def test_values_of_one_example_count_as_one() -> None:
    """Sixty values that are three examples repeated are as sure as three, and much less sure than sixty."""
    values, examples = [1.0, 2.0, 4.0] * 20, [0, 1, 2] * 20
    clustered, alone = mean_interval(values, examples), mean_interval(values)
    assert clustered == mean_interval([1.0, 2.0, 4.0])
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_examples_may_have_unequal_numbers_of_values() -> None:
    assert mean_interval([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]).mean == 2.0


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_a_mean_is_a_mean_and_its_interval_is_within_the_values(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(math.fsum(values) / len(values))
    assert (low is None) == (high is None)
    if low is not None and high is not None:
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_differences_are_taken_on_the_same_cases_only() -> None:
    ours = {"a": 0.5, "b": 1.0, "only ours": 100.0}
    theirs = {"a": 1.0, "b": 1.0, "only theirs": -100.0}
    assert paired_difference(ours, theirs).mean == -0.25
    assert paired_difference(ours, {}) is None


def test_pairing_takes_out_what_differs_between_examples() -> None:
    """Examples differ by hundreds, the two subjects by about one in each."""
    rng = np.random.default_rng(0)
    theirs = dict(enumerate(rng.normal(0, 100, 20).tolist()))
    ours = {key: value + 1 + noise for (key, value), noise in zip(theirs.items(), rng.normal(0, 0.1, 20), strict=True)}
    difference = paired_difference(ours, theirs)
    assert difference.mean == pytest.approx(1.0, abs=0.1)
    assert difference.high - difference.low < 0.2


def test_differences_of_one_example_count_as_one() -> None:
    ours = {("a", 1): 1.0, ("a", 2): 0.0}
    theirs = dict.fromkeys(ours, 0.0)
    assert paired_difference(ours, theirs, cluster=lambda key: key[0]) == Interval(0.5, None, None)


def test_pareto_keeps_what_is_best_for_its_cost() -> None:
    assert pareto([(1, 5), (2, 3), (3, 4), (4, 1), (2, 3)]) == [0, 1, 4, 3]
    assert pareto([]) == []


@given(POINTS)
def test_pareto_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    assert sorted(pareto(points)) == [number for number, point in enumerate(points) if not beaten(point)]
