"""What kernels are compared with, for several tests."""

import pytest
import torch
from torch import Tensor

from kvarn.attention import Part, Variant, attend_with_mass
from kvarn.memory import Store

ON_A_GPU = pytest.mark.gpu  # alone: Triton's interpreter takes seconds for each


def expected(query: Tensor, store: Store, heads: slice, variant: Variant, counted: bool) -> tuple[Tensor, Tensor]:
    """The output, and the mass of each entry, by the reference in fp32."""
    shape = (query.shape[0], -1)
    keys, values = (x.float().unflatten(0, shape) for x in store.read(heads))
    held = (torch.arange(keys.shape[2]) < store.lengths[heads][:, None]).to(query.device)
    part = Part(keys, values, held.unflatten(0, shape)[:, :, None])
    if counted:
        part.log_weight = store.read_column(heads, "count").unflatten(0, shape).clamp(min=1).log()
    out, masses = attend_with_mass(query.float(), [part], variant)
    return out, masses[0]
