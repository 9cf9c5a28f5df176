"""Which kind of group a recipe asks for."""

from collections.abc import Sequence

import torch

from ..attention.rotary import Rotary
from ..memory import Arena, BoundedLayout, TieredLayout
from ..recipe import Recipe
from ..rematerialization import LayerInputs
from ..selection import Chunks
from ..spec import LayerSpec
from .bundled import BundledGroup
from .chunks import ChunkGroup
from .group import LayerGroup
from .inputs import InputGroup
from .joint import JointGroup
from .tiered import TieredGroup


def new_group(
    recipe: Recipe,
    numbers: list[int],
    layer: LayerSpec,
    dtype: torch.dtype,
    arena: Arena,
    batch: int,
    rotary: Rotary | None = None,
    inputs: Sequence[LayerInputs] = (),
) -> LayerGroup:
    """An empty group for layers ``numbers``, all of them like ``layer``, of ``batch`` sequences.

    ``rotary``: where keys are kept before their rotation; ``inputs``: of each layer, where the recipe keeps those.
    """
    layout, selection = recipe.layout(layer, dtype, arena.page_size), recipe.selection(layer)
    full = layer.window is None
    if recipe.rematerializes and full:
        return InputGroup(numbers, layer, layout, list(inputs), arena, batch)
    if isinstance(selection, Chunks):
        return ChunkGroup(numbers, layer, layout, selection, arena, batch, rotary)
    if recipe.joins and full:
        return JointGroup(numbers, layer, layout, recipe.exemption, arena, batch, rotary)
    eviction, precision = recipe.eviction(layer, dtype), recipe.precision(layer, dtype)
    if isinstance(layout, BoundedLayout) and (bundle := recipe.bundle):
        return BundledGroup(numbers, layer, layout, eviction, bundle, arena, batch, rotary)
    if isinstance(layout, TieredLayout) and precision:
        group: LayerGroup = TieredGroup(numbers, layer, layout, eviction, precision, arena, batch, rotary)
    else:
        group = LayerGroup(numbers, layer, layout, eviction, arena, batch, rotary)
    if selection:
        group.select(selection, recipe.alike(layer, dtype), dtype)
    return group
