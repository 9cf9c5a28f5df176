"""Where Triton kernels move and encode what lies in pages. Elsewhere torch's operations do, and are the oracle."""

from functools import cache
from importlib.util import find_spec

import torch

DEVICES = {"cuda"}  # tests add "cpu", where Triton interprets its kernels
_LEAST_CAPABILITY = (8, 0)


def serves(device: torch.device) -> bool:
    """Whether the kernels of the memory serve ``device``."""
    return device.type in DEVICES and can_run(device)


@cache
def can_run(device: torch.device) -> bool:
    """Whether Triton kernels run on ``device``."""
    if not find_spec("triton"):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
