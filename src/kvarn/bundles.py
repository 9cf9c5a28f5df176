"""Neighbouring layers that keep their entries together: which they are, and in which formats.

A bundle of G layers has one row a token for each KV head, or one for all heads: the vectors of its layers one after
another, encoded together by a ``Bundled`` format. Entries that should not be encoded so stay as they are, in rows of
the same form.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from .errors import Unsupported
from .formats import Bundled, Dense, Directions, Format, Subspace
from .memory import SideLayout
from .spec import LayerSpec


@dataclass(frozen=True)
class Bundle(ABC):
    """Layers are bundled by ``size``, from the share ``start`` of a model's layers on.

    ``partial``: neighbours that are fewer make a bundle too; else they are left alone. ``exact_share``: the largest
    share of entries that stay as they are. ``by_prompt``: what is stored is encoded as a whole and anew with every
    prompt, and generated tokens stay as they are until then. ``all_heads``: one row a token for all heads.
    ``before_rope``: keys are joined before their rotation.
    """

    size: int
    start: float = 0.0
    partial: bool = False
    exact_share: float = 0.0
    by_prompt: bool = False
    all_heads: bool = False
    before_rope: bool = False

    @abstractmethod
    def inner(self, layer: LayerSpec) -> LayerSpec:
        """A layer of which the entries have the sizes of what is common to a bundle of layers like ``layer``."""

    @abstractmethod
    def joint(self, layer: LayerSpec, keys: Format, values: Format, dtype: torch.dtype) -> tuple[Bundled, Bundled]:
        """The formats of a bundle's keys and values, with what is common in ``keys`` and ``values``."""

    def told_apart(self, all_layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        """The layers of a model, which say how many are bundled; raises Unsupported where none are."""
        layers, number = list(all_layers), int(self.start * len(all_layers))
        while number < len(layers):
            count = _alike(layers[number : number + self.size])
            if layers[number].window is not None or (count < self.size and not self.partial):
                number += 1
                continue
            layers[number : number + count] = [replace(layers[number], bundle=count)] * count
            number += count
        if not any(layer.bundle for layer in layers):
            raise Unsupported(
                f"this model has no {self.size} neighbouring layers with full attention from layer "
                f"{int(self.start * len(layers))} on that could keep entries together"
            )
        return tuple(layers)

    def kept(self, layer: LayerSpec) -> LayerSpec:
        """What the store holds of a bundle of layers like ``layer``."""
        heads = layer.kv_heads if self.all_heads else 1
        return replace(
            layer,
            kv_heads=layer.kv_heads // heads,
            key_size=layer.bundle * heads * layer.key_size,
            value_size=layer.bundle * heads * layer.value_size,
        )

    def dense(self, layer: LayerSpec, before_rope: bool, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        """How entries are kept that stay as they are, keys as the others' are."""
        kept = self.kept(layer)
        keys, values = Dense(kept.key_size, dtype), Dense(kept.value_size, dtype)
        return SideLayout(keys, keys, before_rope=before_rope), SideLayout(values, values)

    def sides(
        self, layer: LayerSpec, encoded: tuple[SideLayout, SideLayout], dtype: torch.dtype
    ) -> tuple[SideLayout, SideLayout]:
        """How the others are kept, with what is common as in ``encoded``."""
        before_rope = self.before_rope or encoded[0].before_rope
        formats = self.joint(layer, encoded[0].format, encoded[1].format, dtype)
        keys, values = (
            replace(inner, format=fmt, dense=whole.dense)
            for inner, fmt, whole in zip(encoded, formats, self.dense(layer, before_rope, dtype), strict=True)
        )
        return replace(keys, before_rope=before_rope), values


@dataclass(frozen=True, kw_only=True)
class SharedDirections(Bundle):
    """Pairs of layers share directions (``Directions``), except for the token pairs whose angle is large."""

    interpolation: float
    key_gamma: float | None
    value_gamma: float | None

    def inner(self, layer: LayerSpec) -> LayerSpec:
        return replace(layer, bundle=0)

    def joint(self, layer: LayerSpec, keys: Format, values: Format, dtype: torch.dtype) -> tuple[Bundled, Bundled]:
        return (
            Directions(keys, self.interpolation, self.key_gamma, layer.key_size, dtype),
            Directions(values, self.interpolation, self.value_gamma, layer.value_size, dtype),
        )


@dataclass(frozen=True, kw_only=True)
class SharedSubspace(Bundle):
    """Layers share the subspace of a prompt (``Subspace``), of the shares ``keys`` and ``values`` of their width."""

    keys: float
    values: float

    def inner(self, layer: LayerSpec) -> LayerSpec:
        kept = self.kept(layer)
        return replace(
            layer,
            bundle=0,
            kv_heads=1,
            key_size=_rank(self.keys, kept.key_size),
            value_size=_rank(self.values, kept.value_size),
        )

    def joint(self, layer: LayerSpec, keys: Format, values: Format, dtype: torch.dtype) -> tuple[Bundled, Bundled]:
        kept, inner = self.kept(layer), self.inner(layer)
        return (
            Subspace(keys, inner.key_size, kept.key_size, dtype),
            Subspace(values, inner.value_size, kept.value_size, dtype),
        )


def _alike(layers: list[LayerSpec]) -> int:
    """How many of the first layers are equal."""
    return next((i for i, layer in enumerate(layers) if layer != layers[0]), len(layers))


def _rank(share: float, width: int) -> int:
    """A rank of about ``share`` of ``width``, in eights, which formats of packed codes need."""
    return min(max(round(share * width / 8), 1) * 8, width)
