"""Fixtures for all tests: tiny random models, and the built-in SmolLM2."""

import os

import pytest
import torch

# Where there is no GPU, Triton interprets its kernels; it has to be told before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_models import make_tiny

# The same examples in every run; how long one takes depends on what else the machine does.
settings.register_profile("kvarn", deadline=None, derandomize=True, database=None)
settings.load_profile("kvarn")


@pytest.fixture
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """make_tiny by name: @pytest.mark.parametrize("tiny_model", ["llama", "gemma3"], indirect=True)."""
    return make_tiny(getattr(request, "param", "llama"))


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The built-in model's real weights, fp32 on CPU, and its tokenizer. Shared: leave it as you found it."""
    from kvarn import models

    return models.load("smollm2", device="cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # Processes that each use all cores slow each other down: parallel workers, and runs that were told to use fewer.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    most = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(max(1, min(most, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
