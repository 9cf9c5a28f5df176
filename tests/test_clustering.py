"""K-means against what it must find."""

import pytest
import torch

from kvarn.clustering import kmeans


def test_groups_that_are_apart_are_found() -> None:
    middles = 20 * torch.eye(4)
    points = torch.cat([middle + torch.randn(n, 4) for middle, n in zip(middles, (30, 5, 12, 1), strict=True)])
    found = kmeans(points, 4)
    names = [int(group.unique()) for group in found.of.split((30, 5, 12, 1))]
    assert sorted(names) == [0, 1, 2, 3]
    for name, group in zip(names, points.split((30, 5, 12, 1)), strict=True):
        torch.testing.assert_close(found.centres[name], group.mean(0))
    spread = sum(float((p - found.centres[c]).square().sum()) for p, c in zip(points, found.of, strict=True))
    assert found.spread == pytest.approx(spread, rel=1e-4)


def test_each_point_is_with_its_nearest_centre_and_the_same_seed_gives_the_same() -> None:
    points = torch.randn(60, 5)
    found, again = kmeans(points, 7), kmeans(points, 7)
    distances = (points[:, None] - found.centres).square().sum(-1)
    assert torch.equal(found.of, distances.argmin(1))
    assert torch.equal(found.of, again.of)
    assert found.spread <= min(kmeans(points, 7, tries=1, seed=seed).spread for seed in range(3)) * 1.1
    for centre in range(7):
        torch.testing.assert_close(found.centres[centre], points[found.of == centre].mean(0))


def test_fewer_points_than_clusters() -> None:
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = kmeans(points, 4)
    assert found.centres.shape == (2, 2)
    assert found.of[0] == found.of[2] != found.of[1]
    assert found.spread == 0
