"""Many sequences at once: requests, their order, sampling, and the loop that serves them."""

from .engine import Engine
from .requests import Event, Output
from .sampling import Logprobs, Sampling

__all__ = ["Engine", "Event", "Logprobs", "Output", "Sampling"]
