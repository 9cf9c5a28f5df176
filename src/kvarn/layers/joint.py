"""Layers whose formats see the keys, or the values, of all KV heads of a token as one vector."""

from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import Part
from ..attention.rotary import Rotary
from ..errors import Unsupported
from ..memory import Arena, Layout
from ..reduction import Exemption
from ..spec import LayerSpec, ModelSpec
from .group import LayerGroup
from .step import Fresh


class JointGroup(LayerGroup):
    """A layer group with one row a token for all KV heads of a layer. ``exemption``: which tokens stay exact."""

    def __init__(
        self,
        numbers: list[int],
        layer: LayerSpec,
        layout: Layout,
        exemption: Exemption | None,
        arena: Arena,
        batch: int,
        rotary: Rotary | None,
    ):
        super().__init__(numbers, layer.joint, layout, None, arena, batch, rotary)
        self._whole, self._exemption = layer, exemption

    def empty(self, batch: int) -> "JointGroup":
        layout = self.store.layout
        return JointGroup(self.numbers, self._whole, layout, self._exemption, self.arena, batch, self.rotary)

    @property
    def _together(self) -> int:
        return self._whole.kv_heads

    def _rows(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Tensor]:
        keys, values = super()._rows(heads, fresh)
        return keys.transpose(1, 2).flatten(2)[:, None], values.transpose(1, 2).flatten(2)[:, None]

    def _part(self, heads: slice, mask: Tensor | None) -> Part:
        rows = self.store.read(heads)
        keys, values = (x.unflatten(-1, (self._whole.kv_heads, -1)).transpose(1, 2) for x in rows)
        if self.rotary:
            keys = self.rotary.rotate(keys, self.store.read_column(heads, "position").long())
        return Part(keys, values, mask)

    def _exempt(self, fresh: Fresh) -> Tensor:
        if self._exemption is None:
            return super()._exempt(fresh)
        return self._exemption.marked(fresh.step.positions, fresh.inputs)


def hand_over_inputs(model: PreTrainedModel, spec: ModelSpec) -> None:
    """From now on the model's decoder layers hand what enters them to caches that take it. Raises Unsupported."""
    if model in _HANDING_OVER:
        return
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != len(spec.layers):
        raise Unsupported(f"{type(model).__name__} does not list its decoder layers, so what enters them is not known")
    for layer in layers:
        layer.register_forward_pre_hook(_hand_over, with_kwargs=True)
    _HANDING_OVER.add(model)


_HANDING_OVER: WeakSet[PreTrainedModel] = WeakSet()


def _hand_over(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    take = getattr(kwargs.get("past_key_values"), "take_layer_inputs", None)
    if take is not None:
        take(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
