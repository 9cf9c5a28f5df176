"""How sure a mean is, differences on the same cases, and the Pareto front."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """A mean with its 95 % interval; None where the data cannot give one."""

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval:
    """The mean of ``values`` with a bootstrap interval (BCa, seeded, so that a report can be made again).

    What is resampled are whole clusters: ``clusters[i]`` names the example that ``values[i]`` was measured on; None:
    each value is an example. Positions or settings of one example depend on each other, and resampling them one by
    one would make the interval too narrow. There is no interval for one example, nor where all examples agree: there
    resampling has nothing to vary. With fewer than about ten examples an interval is a rough guide. Raises ValueError
    where there are no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / len(values)
    which = _numbered(range(len(values)) if clusters is None else clusters)
    sums, counts = np.bincount(which, values), np.bincount(which)
    if len(sums) == 1 or np.allclose(sums / counts, mean, rtol=1e-9, atol=1e-12):
        return Interval(mean, None, None)
    result = bootstrap(
        (sums, counts),
        _ratio_of_sums,
        paired=True,
        n_resamples=RESAMPLES,
        batch=256,
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high))


def paired_difference(
    ours: Mapping[Key, float], theirs: Mapping[Key, float], cluster: Callable[[Key], Hashable] = lambda key: key
) -> Interval | None:
    """The mean of ``ours - theirs`` over the cases that both have, as ``mean_interval`` gives it; None where they
    share no case. ``cluster`` names the example of a case."""
    shared = [key for key in ours if key in theirs]
    if not shared:
        return None
    return mean_interval([ours[key] - theirs[key] for key in shared], [cluster(key) for key in shared])


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other point beats, by their first coordinate. Lower is better in both; a point
    is beaten by one that is no worse in both and better in one, so equal points stay together."""
    order = sorted(range(len(points)), key=lambda number: points[number])
    front: list[int] = []
    for number in order:
        if not front or points[number][1] < points[front[-1]][1] or points[number] == points[front[-1]]:
            front.append(number)
    return front


def _numbered(clusters: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis) / counts.sum(axis)
