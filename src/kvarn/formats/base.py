"""What a format is: how the keys or the values of a head are encoded as rows of small tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from types import MappingProxyType

import torch
from torch import Tensor

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Rows = dict[str, Tensor]


class Format(ABC):
    """An encoding of vectors of one size, in units of ``unit`` consecutive tokens.

    A unit is the least that can be encoded or decoded alone: one token for most formats, a group of tokens where they
    share scales. ``layout`` names the tensors of one unit with shape and dtype; the memory stores exactly these.

    What all units of a head share and a prompt decides is the head's ``state``, laid out alike: ``observe`` makes it,
    from the last ``watched`` queries too, or ``exempt`` from tokens that are to stay exact, and ``given`` binds the
    format to it. It stays as it is, or where the format ``grows``, becomes what ``grown`` says before more tokens are
    encoded. What the sequences of a layer share (codebooks, orders of channels) is ``shared``: tensors of [layers of
    the model, KV heads as stored, *shape], kept once a layer and bound by ``given`` too. What a block shares belongs in
    its rows.
    """

    unit: int = 1
    name: str
    layout: Layout
    state: Layout = MappingProxyType({})
    shared: Mapping[str, Tensor] = MappingProxyType({})
    watched: int = 0
    grows: bool = False

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        """The state of R heads, tensors of [R, *shape], made of the tokens that a prompt leaves in them: ``x`` is [R,
        n, size], of which those in ``held`` (bool [R, n]) exist; ``queries`` are [R, G, watched, size], zero where the
        prompt had fewer."""
        return {}

    def exempt(self, x: Tensor, marked: Tensor) -> Rows:
        """The part of the state of R heads that holds tokens which are to be read exactly: those in ``marked`` (bool
        [R, n]) of ``x`` ([R, n, size])."""
        return {}

    def grown(self, state: Rows, x: Tensor, held: Tensor) -> Rows:
        """The ``state`` of R heads with the tokens ``x`` of which those in ``held`` exist (as in ``observe``) too."""
        return state

    def given(self, state: Rows) -> "Format":
        """This format for heads of ``state``, and of what their layers share (tensors of [R, *shape]); ``x`` then is
        [R, tokens, size]."""
        return self

    @abstractmethod
    def encode(self, x: Tensor) -> Rows:
        """``x`` of [..., tokens, size], tokens a multiple of ``unit`` -> tensors of [..., tokens / unit, *shape]."""

    @abstractmethod
    def decode(self, rows: Rows) -> Tensor:
        """The inverse of ``encode``, up to the format's loss, in the dtype of the model."""

    def decode_channels(self, rows: Rows, channels: slice) -> Tensor:
        """The numbers ``channels`` of what ``decode`` gives."""
        return self.decode(rows)[..., channels]

    @property
    def unit_bytes(self) -> int:
        """Exact bytes of one unit, scales and other metadata included."""
        return _bytes(self.layout)

    @property
    def state_bytes(self) -> int:
        """Exact bytes of the state of one head."""
        return _bytes(self.state)

    @property
    def shared_bytes(self) -> int:
        """Exact bytes of what one layer shares."""
        return sum(tensor[0].nbytes for tensor in self.shared.values())

    @property
    def key(self) -> tuple:
        """Formats with equal keys can share a pool."""
        shared = tuple(sorted((name, _digest(tensor)) for name, tensor in self.shared.items()))
        return (self.name, self.unit, tuple(sorted((k, s, str(d)) for k, (s, d) in self.layout.items())), shared)


def _digest(tensor: Tensor) -> str:
    return sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _bytes(layout: Layout) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
