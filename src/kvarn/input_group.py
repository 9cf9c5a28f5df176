"""Layers that keep their inputs, or latents of them, and compute keys and values on reading."""

import torch
from torch import Tensor

from .attention import Part
from .errors import Unsupported
from .group import Fresh, LayerGroup
from .memory import Arena, Layout
from .rematerialization import LayerInputs, kept
from .spec import LayerSpec

_CHECKED = 4  # tokens


class InputGroup(LayerGroup):
    """A layer group with one row a token for all heads of a layer. ``inputs``: how each layer's rows are read."""

    def __init__(
        self,
        numbers: list[int],
        layer: LayerSpec,
        layout: Layout,
        inputs: list[LayerInputs],
        arena: Arena,
        batch: int,
    ):
        super().__init__(numbers, kept(layer), layout, None, arena, batch)
        self.inputs, self._whole = inputs, layer

    @property
    def state_bytes(self) -> int:
        return sum(inputs.nbytes for inputs in self.inputs)

    def empty(self, batch: int) -> "InputGroup":
        return InputGroup(self.numbers, self._whole, self.store.layout, self.inputs, self.arena, batch)

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        heads = self.heads(number)
        if not fresh.step.padded and not bool(fresh.step.before.any()):
            self._check(heads, fresh)
        return super().prompt(number, fresh)

    def _rows(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Tensor]:
        assert fresh.inputs is not None
        return self._of(heads).rows(fresh.inputs)

    def _part(self, heads: slice, mask: Tensor | None) -> Part:
        rows = super()._part(heads, None)
        return Part(*self._of(heads).entries(rows.keys, rows.values), mask)

    def _of(self, heads: slice) -> LayerInputs:
        return self.inputs[heads.start // self.stride]

    def _check(self, heads: slice, fresh: Fresh) -> None:
        """Raises Unsupported where the model computes keys or values in a way that is not known here."""
        assert fresh.inputs is not None
        own = self._of(heads).entries(*self._of(heads).rows(fresh.inputs[:, :_CHECKED]))
        for computed, given in zip(own, (fresh.keys, fresh.values), strict=True):
            expected = given[:, :, :_CHECKED]
            if not torch.allclose(computed, expected, rtol=0, atol=0.02 * float(expected.abs().max())):
                raise Unsupported(
                    "this model computes keys and values from its layers' inputs in a way kvarn does not know, so it "
                    "cannot keep inputs in their place"
                )
