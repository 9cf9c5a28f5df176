"""Where the kernels run in these tests."""

import pytest
import torch

from kernel_reference import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or the CPU that plays one in Triton's interpreter; kernels serve it and nothing else."""
    pytest.importorskip("triton")
    monkeypatch.setattr("kvarn.memory.kernels.DEVICES", {request.param})
    return torch.device(request.param)
