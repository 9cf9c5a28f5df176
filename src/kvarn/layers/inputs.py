"""Layers that keep their inputs, or latents of them, and compute keys and values on reading."""

import torch
from torch import Tensor

from ..attention import Part
from ..errors import Unsupported
from ..memory import Arena, Layout
from ..rematerialization import Known, LayerDifferences, LayerInputs, kept
from ..spec import LayerSpec
from .group import LayerGroup
from .step import Fresh

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
        self._known, self._decoding = Known(), False  # of the pass under way

    @property
    def state_bytes(self) -> int:
        return sum(inputs.nbytes for inputs in self.inputs)

    def empty(self, batch: int) -> "InputGroup":
        return InputGroup(self.numbers, self._whole, self.store.layout, self.inputs, self.arena, batch)

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        heads = self.heads(number)
        if not fresh.step.padded and not bool(fresh.step.before.any()):
            self._check(heads, fresh)
        self._known, self._decoding = fresh.step.known, False
        return super().prompt(number, fresh)

    def token(self, number: int, fresh: Fresh) -> Tensor:
        self._known, self._decoding = fresh.step.known, True
        return super().token(number, fresh)

    def _rows(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Tensor]:
        assert fresh.inputs is not None
        inputs = self._of(heads)
        if not isinstance(inputs, LayerDifferences):
            return inputs.rows(fresh.inputs)
        known, settled = self._known, self.store.keys.layout.format
        rows = inputs.difference(fresh.inputs, known.new)
        # The next layer differs from what will be read, though this one reads new tokens as they are.
        known.new = inputs.added(settled.decode(settled.encode(rows)), known.new)
        return rows, rows[..., :0]

    @property
    def reads_pages(self) -> bool:
        return False  # no kernel makes keys and values of what is kept here

    def _part(self, heads: slice, mask: Tensor | None) -> Part:
        rows, inputs = super()._part(heads, None), self._of(heads)
        if not isinstance(inputs, LayerDifferences):
            return Part(*inputs.entries(rows.keys, rows.values), mask)
        known = self._known
        read = inputs.added(rows.keys, known.stored)
        part = Part(*inputs.entries(read[:, None], rows.values), mask)
        self.arena.note_peak(2 * read.nbytes + part.keys.nbytes + part.values.nbytes)
        if self._decoding:
            assert known.new is not None
            newest = (self.store.lengths[heads] - 1).to(read.device)[:, None, None].expand_as(known.new)
            read = read.scatter(1, newest, known.new)
        known.stored = read
        return part

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
