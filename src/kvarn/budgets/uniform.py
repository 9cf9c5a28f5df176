"""Every head of every layer may keep the same number of entries."""

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(bytes_of: Callable[[Tensor], Tensor], allowed: int, most: int, *, always: bool) -> int:
    """The most entries a head may hold so that all heads together stay within ``allowed`` bytes (0: not even one).

    ``bytes_of`` gives the bytes of all heads holding n entries each (int64 [m] -> int64 [m]). With ``always`` every
    smaller number of entries must be within the bytes too, because heads pass through them while they grow.
    """
    entries = torch.arange(1, most + 1)
    costs = bytes_of(entries)
    fits = (costs.cummax(0).values if always else costs) <= allowed
    return int(entries[fits].max()) if bool(fits.any()) else 0
