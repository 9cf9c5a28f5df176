"""How the vectors of each format are cut into tiles: what kernels are compiled for."""

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import triton.language as tl
from triton import next_power_of_2

from ...formats import Codes, Corrected, Dense, Exempt, Float8, Format, Int, NonUniform, Rotated, Signs, Sparse, Ternary
from .kinds import LEVELS_CHANNEL, LEVELS_TOKEN, RANKED, SIGNS, SPARSE, TERNARY, TURNED
from .tiles import CHANNEL, CODES, DENSE, FLOAT8, TOKEN

_MOST_BESIDE = 64  # exact numbers of a vector (loops over them are unrolled), or exact tokens (entries look for theirs)
_TURNED = 32  # channels that one product transforms: more are more multiplications, fewer are more sums before


@dataclass(frozen=True)
class Tiling:
    """How the vectors of a format are cut into tiles (see ``tiles``, and ``folded`` for those that are), and what is
    kept beside them (see ``kinds``)."""

    kind: int
    bits: int
    group: int
    size: int
    parts: int
    run: int
    fine: bool = False
    folded: bool = False
    beside: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)

    @property
    def tiles(self) -> int:
        return 2 * self.size // self.run if self.folded else self.size // self.run

    @property
    def plain(self) -> bool:
        """Whether ``tiles.numbers`` gives all of it."""
        return self.kind < SPARSE.value and not any(self.beside)

    def arguments(self, side: str, page: int, dtype: torch.dtype) -> dict[str, Any]:
        """Constants of the kernels, named for a side; ``dtype``: the model's."""
        number = tl.float32 if dtype == torch.float32 else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
        constants = {
            "KIND": self.kind,
            "BITS": self.bits,
            "GROUP": self.group,
            "PAGE": page,
            "SIZE": self.size,
            "TILES": self.tiles,
            "PARTS": self.parts,
            "RUN": self.run,
            "WIDTH": max(16, next_power_of_2(self.size if self.folded else self.run)),
            "FINE": self.fine,
            "FOLDED": self.folded,
            "TYPE": number,
            "BESIDE": self.beside,
        }
        return {f"{side}_{name}": constant for name, constant in constants.items()}


def tiling(fmt: Format, block: int, exact: bool = False, heads: int = 1, turns: bool = False) -> Tiling | None:
    """How the kernels read ``fmt`` in blocks of so many entries; None: they do not. ``exact``: numbers in fp32;
    ``heads``: KV heads whose vectors are one row; ``turns``: tiles are cut so that channels half a vector apart lie at
    the same places of two tiles."""
    cut = _joint_tiling(fmt, heads) or (_tiling(fmt, block, exact) if heads == 1 else None)
    if cut is None or max(cut.beside[0], cut.beside[1], cut.beside[3]) > _MOST_BESIDE:
        return None
    if turns:
        cut = replace(cut, run=gcd(cut.run, cut.size // 2) if cut.parts == 1 else cut.run, folded=False)
    return cut


def _tiling(fmt: Format, block: int, exact: bool) -> Tiling | None:
    if type(fmt) is Float8:
        run = gcd(fmt.size, 64)
        return Tiling(FLOAT8.value, 8, fmt.size, fmt.size, 1, run, folded=_folds(fmt.size, run, exact))
    if type(fmt) is Sparse:
        return Tiling(SPARSE.value, 1, fmt.kept, fmt.size, 8, fmt.size // 8)
    if type(fmt) is Ternary:
        return Tiling(TERNARY.value, 2, fmt.unit, fmt.size, 1, fmt.size)
    if type(fmt) is Signs:
        run = gcd(fmt.wide, fmt.size)
        return Tiling(SIGNS.value, 2, fmt.unit, fmt.size, 1, run, beside=(0, 0, 0, 0, fmt.wide))
    if type(fmt) is Corrected:
        cut = _tiling(fmt.backbone, block, exact)
        return cut and replace(cut, folded=False, beside=(2 * fmt.each_side, fmt.rank, fmt.unit, 0, 0))
    if type(fmt) is Codes:
        parts = _parts(fmt.bits)
        return Tiling(CODES.value, fmt.bits, fmt.size, fmt.size, parts, fmt.size // parts)
    if type(fmt) is not Int:
        return None
    parts = _parts(fmt.bits)
    whole = fmt.size // parts
    per_channel = fmt.axis == "channel"
    run = gcd(whole, 64 if per_channel else fmt.group)
    fine = bool(fmt.group % block) if per_channel else run < 16
    few = per_channel or fmt.size <= 8 * fmt.group  # groups that ``folded.group_minima`` has lines for
    folded = fmt.bits != 3 and not fine and few and _folds(fmt.size, run, exact)
    kind = CHANNEL if per_channel else TOKEN
    return Tiling(kind.value, fmt.bits, fmt.group, fmt.size, parts, whole if fine else run, fine, folded)


def _joint_tiling(fmt: Format, heads: int) -> Tiling | None:
    """Of formats that are read where ``heads`` KV heads have one row too."""
    if type(fmt) is Dense:
        ((row,), _) = fmt.layout["x"]
        return Tiling(DENSE.value, 16, row, row // heads, 1, row // heads)
    if type(fmt) is NonUniform:
        kind, size = LEVELS_CHANNEL if fmt.fixed else LEVELS_TOKEN, fmt.size // heads
        return Tiling(kind.value, fmt.bits, size, size, 1, size, beside=(fmt.exact, 0, 0, 0, 0))
    if type(fmt) is Rotated:
        kind, size = RANKED if fmt.shared else TURNED, fmt.inner.size // heads
        if fmt.inner.axis == "channel" or fmt.block % size:
            return None
        beside = (0, 0, 0, 0, fmt.block // size)
        return Tiling(kind.value, fmt.inner.bits, fmt.inner.group, size, 1, gcd(size, _TURNED), beside=beside)
    if type(fmt) is Exempt and isinstance(fmt.inner, NonUniform | Rotated):
        cut = _joint_tiling(fmt.inner, heads)
        return cut and replace(cut, beside=(*cut.beside[:3], fmt.most, cut.beside[4]))
    return None


def _parts(bits: int) -> int:
    """Codes that share a byte."""
    return 1 if bits == 3 else 8 // bits


def _folds(size: int, run: int, exact: bool) -> bool:
    """Whether vectors in runs of so many bytes can be read as ``folded`` has them."""
    return run >= 32 and size & (size - 1) == 0 and not exact
