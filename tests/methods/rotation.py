"""RoPE in plain loops, with the base that tiny models have."""

import math

import torch
from torch import Tensor


def rope(x: Tensor, position: int) -> Tensor:
    """One vector at a position: pairs of channels (i, i + half) turned by their angles."""
    half, out = x.shape[0] // 2, x.clone()
    for i in range(half):
        angle = position * 10000 ** (-2 * i / x.shape[0])
        a, b = float(x[i]), float(x[i + half])
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rotated(x: Tensor) -> Tensor:
    """[heads, n, size] at positions 0 .. n - 1."""
    return torch.stack([torch.stack([rope(row, t) for t, row in enumerate(head)]) for head in x])
