"""Token-selective propagation: from some layer on, a prompt goes on with the tokens that matter."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import Unsupported
from ..scoring import PromptView, Score
from ..spec import ModelSpec


@dataclass(frozen=True)
class Propagation:
    """After layer ``layer`` (None: the last of the first half), the share ``rate`` of a first prompt's tokens goes on:
    its newest ``recent`` ones, and those with the largest ``score``, summed over the layer's KV heads.

    FastKV (arXiv 2502.01068, section 4). Tokens keep their positions. What later layers never see is not stored there.
    """

    score: Score
    rate: float
    recent: int
    layer: int | None = None

    def later_layers(self, model: PreTrainedModel, spec: ModelSpec) -> list[nn.Module]:
        """The decoder layers that are given fewer tokens. Raises Unsupported where there can be none."""
        count = len(spec.layers)
        last = count // 2 - 1 if self.layer is None else self.layer
        if not 0 <= last < count - 1:
            raise Unsupported(f"tokens cannot stay behind after layer {last} of {count}: name an earlier layer")
        if any(layer.window is not None for layer in spec.layers[last + 1 :]):
            raise Unsupported(
                f"layers of this {spec.architecture} after layer {last} have a sliding window and need every token of "
                "a prompt; tokens can stay behind only where all later layers have full attention"
            )
        layers = getattr(model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) != count:
            raise Unsupported(f"{type(model).__name__} does not list its decoder layers, so tokens cannot stay behind")
        return list(layers[last + 1 :])

    def chosen(self, view: PromptView, tokens: Tensor) -> Tensor:
        """The tokens of each sequence that go on, bool [B, q]; ``tokens`` (int64 [B], host): real ones of each."""
        scores = self.score.prompt(view).sum(1)
        ranked = scores.masked_fill(view.among_last(self.recent)[:, 0], torch.inf)
        ranked = ranked.masked_fill(~view.valid[:, 0], -torch.inf)
        counts = (tokens * self.rate).long().clamp(min=self.recent).minimum(tokens)
        best = ranked.argsort(dim=-1, descending=True, stable=True)
        within = torch.arange(best.shape[1], device=best.device) < counts.to(best.device)[:, None]
        return torch.zeros_like(within).scatter_(1, best, within)


class Carried:
    """The tokens that go on, in a pass under way: narrows what ``layers``, the decoder layers still to come, are given.

    ``chosen``: bool [B, q], of the pass's tokens. ``index`` (int64 [B, m]) are their places in order, to the right;
    sequences with fewer than the longest begin with places that are not among the chosen (``real`` [B, m] is False).
    """

    def __init__(self, chosen: Tensor, owner: object, layers: Sequence[nn.Module]):
        self.tokens = chosen.shape[1]
        self.counts = chosen.sum(1).cpu()
        self.index = chosen.byte().argsort(dim=1, stable=True)[:, self.tokens - int(self.counts.max()) :]
        self.real = chosen.gather(1, self.index)
        self._owner = weakref.ref(owner)
        self._hooks = [layer.register_forward_pre_hook(self._narrow, with_kwargs=True) for layer in layers]

    def narrowed(self, x: Any) -> Any:
        """``x`` with the chosen rows, where it is a tensor [1 or B, q, …] or a tuple of such; else as it is."""
        if isinstance(x, tuple):
            return tuple(map(self.narrowed, x))
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != self.tokens:
            return x
        shape = (*self.index.shape, *x.shape[2:])
        index = self.index.view(*self.index.shape, *[1] * (x.dim() - 2)).expand(shape)
        return x.expand(shape[0], *x.shape[1:]).gather(1, index)

    def remove(self) -> None:
        """Leaves the model's layers as they were."""
        for hook in self._hooks:
            hook.remove()

    def _narrow(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # A pass that was interrupted leaves its hooks until its cache is reset; other caches must not meet them.
        if kwargs.get("past_key_values") is not self._owner():
            return None
        return self.narrowed(args), {name: self.narrowed(value) for name, value in kwargs.items()}
