"""Where Triton kernels run: those that move and encode what lies in pages, and those that attend to it. Elsewhere
torch's operations do, and are the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

DEVICES = {"cuda"}  # tests add "cpu", where Triton interprets its kernels
_LEAST_CAPABILITY = (8, 0)


def serves(device: torch.device) -> bool:
    """Whether kernels serve ``device``."""
    return device.type in DEVICES and _can_run(device)


@contextmanager
def reference_only() -> Iterator[None]:
    """No kernel reads, moves or encodes what is stored: what is computed is the reference's, to compare with."""
    global DEVICES
    before, DEVICES = DEVICES, set()
    try:
        yield
    finally:
        DEVICES = before


@cache
def _can_run(device: torch.device) -> bool:
    """Whether Triton kernels run on ``device``."""
    if not find_spec("triton"):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
