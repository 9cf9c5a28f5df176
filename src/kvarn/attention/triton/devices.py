"""What devices can do that run the kernels."""

import os
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def overlaps(device: torch.device) -> bool:
    """Whether kernels can be launched before those are done that they wait for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def processors(device: torch.device) -> int:
    """How many run programs side by side; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
