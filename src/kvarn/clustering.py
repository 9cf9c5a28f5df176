"""K-means with k-means++ seeds, for some hundreds of vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """``centres`` fp32 [k, d], the means of their members; ``of`` int64 [n], the cluster of each point; ``spread``: the
    sum of squared distances to them."""

    centres: Tensor
    of: Tensor
    spread: float


def kmeans(points: Tensor, count: int, tries: int = 10, seed: int = 42, steps: int = 300) -> Clusters:
    """The best of ``tries`` clusterings of ``points`` ([n, d]) into ``count`` clusters, or as many as there are points
    that differ. Seeds are drawn in proportion to squared distances (k-means++); Lloyd's steps until nothing moves."""
    points = points.float().cpu()
    count = min(count, points.unique(dim=0).shape[0])
    generator = torch.Generator().manual_seed(seed)
    return min((_clustered(points, count, generator, steps) for _ in range(tries)), key=lambda found: found.spread)


def _clustered(points: Tensor, count: int, generator: torch.Generator, steps: int) -> Clusters:
    centres = _seeds(points, count, generator)
    of = _distances(points, centres).argmin(1)
    for _ in range(steps):
        centres, before = _means(points, of, centres), of
        of = _distances(points, centres).argmin(1)
        if torch.equal(of, before):
            break
    spread = _distances(points, centres).gather(1, of[:, None]).sum()
    return Clusters(centres, of, float(spread))


def _seeds(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(points.shape[0], (1,), generator=generator)
    for _ in range(count - 1):
        nearest = _distances(points, points[chosen]).amin(1)
        chosen = torch.cat([chosen, torch.multinomial(nearest, 1, generator=generator)])
    return points[chosen]


def _means(points: Tensor, of: Tensor, centres: Tensor) -> Tensor:
    """The means of clusters; one that lost all its members takes the point that is furthest from its centre."""
    sizes = torch.bincount(of, minlength=centres.shape[0])
    sums = torch.zeros_like(centres).index_add(0, of, points)
    means = sums / sizes.clamp(min=1)[:, None]
    furthest = _distances(points, centres).gather(1, of[:, None])[:, 0].argsort(descending=True)
    empty = torch.nonzero(sizes == 0).flatten()
    means[empty] = points[furthest[: empty.numel()]]
    return means


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances, [n, k]."""
    return (points[:, None] - centres).square().sum(-1)
