"""How the entries of a head are kept, and what that takes in bytes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import Columns, Dense, Float8, Format, Int
from .pool import PAGE_OVERHEAD, Tier
from .segment import HEAD_OVERHEAD, TABLE_ENTRY


@dataclass(frozen=True)
class SideLayout:
    """How the keys (or the values) of a head are kept: the newest tokens dense, older ones settled in ``format``.

    ``hold`` tokens always stay dense; beyond them, the oldest settle in multiples of ``block`` tokens. A dense format
    has no tail of its own. ``before_rope``: keys, those of the tail too, are kept as they are before their rotation.
    ``tier``: where settled tokens are; in the host's memory dense ones settle too. ``encodes_new``: a token of a
    decoding step need not be exact in that step, so that it can be encoded where it is appended (``appends_codes``).
    """

    format: Format
    dense: Dense
    hold: int = 0
    block: int = 1
    before_rope: bool = False
    tier: Tier = "device"
    encodes_new: bool = False

    @property
    def settles(self) -> bool:
        return self.format is not self.dense or self.tier == "host"

    @property
    def settles_at_once(self) -> bool:
        """Whether nothing stays in the tail."""
        return self.settles and self.hold == 0 and self.block == 1

    @property
    def appends_codes(self) -> bool:
        """Whether tokens of decoding steps are encoded where they are appended, so that they are never in the tail:
        where nothing stays there, and kernels know to encode single tokens."""
        alone = isinstance(self.format, Float8) or (isinstance(self.format, Int) and self.format.axis == "token")
        return self.encodes_new and self.settles_at_once and alone and self.tier == "device"

    def open_bytes(self, page_size: int) -> int:
        """Bytes of one page of each segment of a head that tokens come to."""
        one = torch.ones(1, dtype=torch.int64)
        tail = 0 if self.appends_codes else int(_segment_bytes(self.dense, one, page_size))
        return tail + (int(_segment_bytes(self.format, one, page_size, self.tier)) if self.settles else 0)

    def ripe(self, tail: Tensor) -> Tensor:
        """How many tokens of tails of these lengths settle."""
        return (tail - self.hold).clamp(min=0) // self.block * self.block

    def bytes(self, tokens: Tensor, page_size: int) -> Tensor:
        """Exact bytes on the device of one head of so many tokens appended at once, pages and bookkeeping included."""
        if not self.settles:
            return _segment_bytes(self.dense, tokens, page_size)
        settled = self.ripe(tokens)
        tail = _segment_bytes(self.dense, tokens - settled, page_size)
        return tail + _segment_bytes(self.format, settled, page_size, self.tier)

    def most_bytes(self, tokens: Tensor, page_size: int) -> Tensor:
        """The most bytes that one head of so many tokens can take once it has settled, whatever was appended, evicted
        and encoded before; never less for more tokens.

        Eviction breaks units and empties tails, so a tail may have any length up to ``hold + block - 1``. Settling
        removes its front in multiples of ``block``, so its first token may lie anywhere in a page at such a step.
        """
        if not self.settles:
            return self.bytes(tokens, page_size)
        skipped = page_size - math.gcd(self.block, page_size)
        longest = self.hold + self.block - 1
        # The most settles beside k pages of tail where these hold as few tokens as k pages can.
        first = torch.arange(-skipped, longest, page_size).clamp(min=0)
        tail = torch.cat([torch.zeros(1, dtype=torch.int64), first[first < longest] + 1])
        dense = _segment_bytes(self.dense, torch.arange(tail.numel()) * page_size, page_size)
        settled = (tokens[..., None] - tail) // self.format.unit * self.format.unit
        total = dense + _segment_bytes(self.format, settled, page_size, self.tier)
        return torch.where(settled < 0, 0, total).amax(-1)

    def most_bytes_storing(self, tokens: Tensor, moving: Tensor, page_size: int) -> Tensor:
        """The most bytes that one head takes at any moment while a prompt brings it to so many tokens: ``moving`` of
        them may lie in the tail, beside what had waited there, and settle from there."""
        if not self.settles:
            return self.bytes(tokens, page_size)
        tail = torch.minimum(tokens, moving + self.hold + self.block - 1)
        settled = tokens // self.format.unit * self.format.unit
        # Its first token may lie anywhere in a page.
        dense = _segment_bytes(self.dense, tail + page_size - 1, page_size)
        return dense + _segment_bytes(self.format, settled, page_size, self.tier)


class Layout(ABC):
    """How the entries of a head are kept, and so what they take."""

    @property
    @abstractmethod
    def before_rope(self) -> bool:
        """Whether keys are kept as they are before their rotation."""

    @abstractmethod
    def bytes(self, tokens: Tensor) -> Tensor:
        """Exact bytes on the device of one head of ``tokens`` entries (int64, any shape) appended at once."""

    @abstractmethod
    def most_bytes(self, tokens: Tensor) -> Tensor:
        """The most bytes that one head of ``tokens`` entries (int64, any shape) takes after any prompts and steps."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Bytes that one layer's sequences share, whatever their tokens."""

    @abstractmethod
    def most_bytes_storing(self, tokens: Tensor, moving: Tensor) -> Tensor:
        """The most bytes that one head takes at any moment while a prompt brings it to ``tokens`` entries, of which it
        moves ``moving`` (int64, alike) at the most: what is new, or all that stay where some leave."""

    def most_bytes_of_prompt(self, tokens: Tensor) -> Tensor:
        """``most_bytes`` at the end of a prompt."""
        return self.most_bytes(tokens)

    @property
    @abstractmethod
    def open_bytes(self) -> int:
        """Bytes of one page of each segment of a head: what a budget may be exceeded by."""


@dataclass(frozen=True)
class Beside:
    """Rows that a head keeps beside its entries, each for several of them: at most ``most`` of so many entries (int64,
    any shape)."""

    format: Format
    most: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StoreLayout(Layout):
    """What a store keeps for each entry, and in which formats; ``beside``: what it keeps for several together."""

    keys: SideLayout
    values: SideLayout
    columns: Columns | None
    page_size: int
    beside: Mapping[str, Beside] = field(default_factory=dict)

    @property
    def before_rope(self) -> bool:
        return self.keys.before_rope

    def bytes(self, tokens: Tensor) -> Tensor:
        return self.keys.bytes(tokens, self.page_size) + self.values.bytes(tokens, self.page_size) + self._rest(tokens)

    def most_bytes(self, tokens: Tensor) -> Tensor:
        sides = self.keys.most_bytes(tokens, self.page_size) + self.values.most_bytes(tokens, self.page_size)
        return sides + self._rest(tokens)

    def most_bytes_storing(self, tokens: Tensor, moving: Tensor) -> Tensor:
        sides = [side.most_bytes_storing(tokens, moving, self.page_size) for side in (self.keys, self.values)]
        return sides[0] + sides[1] + self._rest(tokens)

    @property
    def shared_bytes(self) -> int:
        return self.keys.format.shared_bytes + self.values.format.shared_bytes

    @property
    def open_bytes(self) -> int:
        one = torch.ones(1, dtype=torch.int64)
        formats = [*([self.columns] if self.columns else []), *(beside.format for beside in self.beside.values())]
        sides = self.keys.open_bytes(self.page_size) + self.values.open_bytes(self.page_size)
        return sides + sum(int(_segment_bytes(fmt, one, self.page_size)) for fmt in formats)

    def _rest(self, tokens: Tensor) -> Tensor:
        """The most bytes of columns and of what is kept beside so many entries."""
        total = torch.zeros_like(tokens)
        if self.columns:
            total = total + _segment_bytes(self.columns, tokens, self.page_size)
        for beside in self.beside.values():
            total = total + _segment_bytes(beside.format, beside.most(tokens), self.page_size)
        return total


def _segment_bytes(fmt: Format, tokens: Tensor, page_size: int, tier: Tier = "device") -> Tensor:
    size = -(-page_size // fmt.unit) * fmt.unit
    pages = (tokens + size - 1) // size
    page_bytes = size // fmt.unit * fmt.unit_bytes + PAGE_OVERHEAD if tier == "device" else 0
    return pages * (page_bytes + TABLE_ENTRY) + HEAD_OVERHEAD + fmt.state_bytes
