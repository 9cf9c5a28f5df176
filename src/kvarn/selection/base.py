"""What selects: a decision of a method, and what carries it out in some layers.

Shapes: B sequences, H query heads, K KV heads, q new tokens, n stored entries, m chosen ones, D head size; R = B * K
heads of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import Variant
from ..attention.rotary import Rotary
from ..formats import ColumnType
from ..memory import Beside, SideLayout, Store
from ..spec import LayerSpec

State = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Layers:
    """The layers of a group: ``count`` of them like ``layer``, for ``batch`` sequences. ``alike``: all heads of a layer
    hold the same tokens in the same order. ``rotary`` rotates keys that are kept before their rotation."""

    layer: LayerSpec
    count: int
    batch: int
    alike: bool
    dtype: torch.dtype
    device: torch.device
    rotary: Rotary | None


@dataclass(frozen=True)
class Reading:
    """One layer that is about to be read: its ``place`` among the layers of the group, its ``heads`` in ``store``, and
    the new tokens as attention takes them: queries [B, H, q, D], keys and values [B, K, q, D], ``positions`` (int64
    [B, q], -1 for padding) and, where the selection asks for it, whether each ends a sentence (bool [B, q]). ``read``
    gives stored keys and values as attention reads them, [R, n, D] each."""

    place: int
    heads: slice
    store: Store
    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    ends: Tensor | None
    variant: Variant
    read: Callable[[slice], tuple[Tensor, Tensor]]

    @property
    def shape(self) -> tuple[int, int]:
        """B and K."""
        return self.keys.shape[0], self.keys.shape[1]

    def entries(self) -> Tensor:
        """The positions of the stored entries, int64 [B, K, n], -1 beyond a head's length."""
        positions = self.store.read_column(self.heads, "position").long()
        return positions.masked_fill(~self.held(), -1).unflatten(0, self.shape)

    def held(self) -> Tensor:
        """Which of the entries that are read exist, bool [R, n]."""
        lengths = self.store.lengths[self.heads]
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.query.device)


@dataclass(frozen=True)
class Chosen:
    """What is read of a layer: entries ``index`` (int64 [R, m], within each head), of which those in ``valid`` (bool
    [R, m]) count, by ``query``. ``places`` (int64 [R, m]): the positions at which keys kept before their rotation are
    rotated, where not their own."""

    query: Tensor
    index: Tensor
    valid: Tensor
    places: Tensor | None = None


class Selection:
    """Which stored entries a query reads: the decision, without what it remembers. Nothing is dropped by it."""

    columns: ClassVar[Mapping[str, ColumnType]] = {}  # kept beside each entry

    @property
    def reach(self) -> int | None:
        """The most positions that queries and keys are rotated to, however long the text is; None: their own."""
        return None

    def sides(self, keys: SideLayout, values: SideLayout) -> tuple[SideLayout, SideLayout]:
        """How keys and values have to be kept, where the recipe would keep them like this."""
        return keys, values

    def beside(self, layer: LayerSpec, dtype: torch.dtype) -> Mapping[str, Beside]:
        """What a head keeps for several entries together."""
        return {}

    def state(self, layer: LayerSpec, dtype: torch.dtype, alike: bool) -> State:
        """What is remembered from step to step, for one layer of one sequence: shapes and dtypes."""
        return {}

    @property
    def sentence_ends(self) -> Collection[int] | None:
        """The tokens that end a sentence, where ``Reading.ends`` is asked for."""
        return None

    def selector(self, layers: Layers) -> "Selector | None":
        """What carries it out in some layers; None: their group does."""
        return None

    def state_bytes(self, layer: LayerSpec, dtype: torch.dtype, alike: bool) -> int:
        """Bytes of ``state``."""
        return sum(torch.Size(shape).numel() * d.itemsize for shape, d in self.state(layer, dtype, alike).values())


class Selector(ABC):
    """A selection at work in the layers of a group; ``state`` has tensors of [layers, B, *shape], zero at first."""

    def __init__(self, selection: Selection, layers: Layers):
        self.layers = layers
        kinds = selection.state(layers.layer, layers.dtype, layers.alike)
        self.state = {
            name: torch.zeros((layers.count, layers.batch, *shape), dtype=dtype, device=layers.device)
            for name, (shape, dtype) in kinds.items()
        }

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())

    def selected(self, sequences: Tensor) -> "Selector":
        """A selector for sequences ``sequences`` (int64 [B'], host; may repeat) that remembers what this one does."""
        twin = copy(self)
        twin.state = {name: tensor[:, sequences.to(tensor.device)] for name, tensor in self.state.items()}
        return twin

    def joined(self, other: "Selector") -> "Selector":
        """A selector for these sequences and those of ``other``."""
        twin = copy(self)
        twin.state = {name: torch.cat([tensor, other.state[name]], 1) for name, tensor in self.state.items()}
        return twin

    def fresh(self, store: Store, heads: slice | Tensor, ends: Tensor | None) -> dict[str, Tensor]:
        """The selection's columns of new tokens (``ends``: bool [B, q]) of these heads, [R, q] each."""
        return {}

    def prompt(self, reading: Reading) -> Tensor | None:
        """The attention of a prompt's queries, [B, H, q, D], before it is stored; None: to everything."""
        return None

    def stored(self, reading: Reading) -> None:
        """After a prompt's tokens have been stored in a layer: takes note of them."""
        return

    @abstractmethod
    def token(self, reading: Reading) -> Chosen | None:
        """What a decoding step reads, its own token (stored already) among it; None: everything."""

    def moved(self) -> None:
        """Entries have changed their places: forgets where they were."""
        return
