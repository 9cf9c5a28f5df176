"""Small tensors on their way between the control plane and the device."""

from collections.abc import Callable

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. The host does not wait for what the device still computes."""
    return (
        tensor.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
    )


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """``tensor`` on its way to the host: what waits for it, and not for what the device is given to do meanwhile."""
    if not tensor.is_cuda:
        return lambda: tensor
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staged.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> Tensor:
        event.synchronize()
        return staged

    return arrived
