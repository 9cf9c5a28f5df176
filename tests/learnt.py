"""What calibrations of formats might find in models with 4 layers, 2 KV heads and heads of 16 channels."""

import torch

from kvarn.methods.kvquant import KVQuant
from kvarn.methods.rotatekv import RotateKV

LAYERS, SIZE = 4, 32


def kvquant(**parameters) -> KVQuant:
    """Levels that are not equally far apart, and key channels with ranges of their own."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for side in ("keys", "values"):
        for kind in ("apart", "whole"):
            for bits in (2, 3, 4):
                levels = 2 * torch.rand(LAYERS, 2**bits, generator=generator) - 1
                tensors[f"{side}.{kind}.levels{bits}"] = levels.sort(1).values
            tensors[f"{side}.{kind}.read2"] = 1.1 * tensors[f"{side}.{kind}.levels2"] - 0.02
    for kind in ("apart", "whole"):
        tensors[f"keys.{kind}.center"] = torch.randn(LAYERS, SIZE, generator=generator)
        tensors[f"keys.{kind}.half"] = 2 + 2 * torch.rand(LAYERS, SIZE, generator=generator)
    return KVQuant(**parameters).with_learnt(tensors)


def rotatekv(**parameters) -> RotateKV:
    means = torch.randn(LAYERS, SIZE, generator=torch.Generator().manual_seed(4))
    return RotateKV(**parameters).with_learnt({"means": means})
