"""Where the kernels run in these tests."""

import os

import pytest
import torch

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="not interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or the CPU that plays one in Triton's interpreter; kernels serve it and nothing else."""
    pytest.importorskip("triton")
    monkeypatch.setattr("kvarn.memory.kernels.DEVICES", {request.param})
    return torch.device(request.param)
