"""The small operations of transformers' modules as few Triton kernels, for passes that are captured."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.triton.small import turned
from .modules import Attention, Layer, Norm, alike, gated_of, linear_of, near


class Fused:
    """The modules of ``model``, which attends through kvarn, that kernels can serve: found, and verified on random
    numbers, once.

    Weights of projections of one input come to lie in one tensor, of which theirs become views. That takes the memory
    of one layer's weights for a moment, and leaves the model's parameters and what it computes as they were.
    """

    def __init__(self, model: PreTrainedModel):
        self._forwards: dict[nn.Module, Callable] = {}
        self._rotations = _rotations(model)
        modules = [module for module in model.modules() if "forward" not in vars(module)]
        with torch.no_grad():
            for faster_of in (Norm.of, linear_of, gated_of):
                self._add_alike(modules, faster_of)
            norms = {module: forward for module, forward in self._forwards.items() if isinstance(forward, Norm)}
            for module in modules:
                self._add(module, Attention.of(module, norms))
            for layer, following in _layers(model):
                self._add(layer, Layer.of(layer, following, norms))
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # where the weights were that lie elsewhere now

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has the modules compute passes of one token a sequence by the kernels; puts everything back afterwards."""
        for module, forward in self._forwards.items():
            module.forward = forward
        for home, own in self._rotations.items():
            setattr(home, "apply_rotary_pos_emb", _rotation(own))  # noqa: B010
        try:
            yield
        finally:
            for module in self._forwards:
                del module.forward
            for home, own in self._rotations.items():
                setattr(home, "apply_rotary_pos_emb", own)  # noqa: B010

    def _add(self, module: nn.Module, faster: Callable | None) -> None:
        if faster is not None:
            self._forwards[module] = faster

    def _add_alike(self, modules: list[nn.Module], faster_of: Callable[[nn.Module], Callable | None]) -> None:
        """Adds modules of one tensor; those of the same kind and shape are tried once."""
        known: dict[tuple, bool] = {}
        for module in modules:
            faster = faster_of(module)
            if faster is None:
                continue
            key = (type(module), *(parameter.shape for parameter in module.parameters()))
            if key not in known:
                known[key] = alike(module, faster)
            if known[key]:
                self._add(module, faster)


def _layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Decoder layers, each with the norm of what it gives."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            norms = [getattr(layer, "input_layernorm", None) for layer in layers[1:]]
            yield from zip(layers, [*norms, getattr(module, "norm", None)], strict=True)


def _rotations(model: PreTrainedModel) -> dict[Any, Callable]:
    homes = {sys.modules[type(module).__module__] for module in model.modules() if hasattr(module, "q_proj")}
    return {home: home.apply_rotary_pos_emb for home in homes if hasattr(home, "apply_rotary_pos_emb")}


def _rotation(own: Callable) -> Callable:
    verified: dict[tuple, bool] = {}

    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        together = all(x.shape[2] == 1 and x.stride(3) == 1 and x.stride(1) == x.shape[3] for x in (query, key))
        packed = all(x.stride(0) == x.shape[1] * x.shape[3] or x.shape[0] == 1 for x in (query, key))
        if args or kwargs or not together or not packed or cos.shape[-1] != query.shape[-1] or cos.dim() != 3:
            return own(query, key, cos, sin, *args, **kwargs)
        kind = (query.shape[1:], key.shape[1:], query.dtype)
        if kind not in verified and not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            pairs = zip(own(query, key, cos, sin), turned(query, key, cos, sin), strict=True)
            verified[kind] = all(near(a, b) for a, b in pairs)
        if not verified.get(kind):
            return own(query, key, cos, sin)
        return turned(query, key, cos, sin)

    return apply
