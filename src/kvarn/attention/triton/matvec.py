"""Products of weights with one or two rows, which are bound by reading the weights.

A program holds some rows of the weights and goes through their columns, with one tile always on its way. The first is
asked for before the kernels before this one are done: no pass changes weights.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .devices import overlaps
from .small import gated

MOST_ROWS = 2  # more of them are for the tensor cores


@dataclass(frozen=True)
class Tiling:
    """Tiles of weights that a program reads: ``rows`` times ``columns``, by so many ``warps``. All outputs of a narrow
    layer should be under way at once, so tiles and sums have to leave registers for that."""

    rows: int
    columns: int
    warps: int


_TILING = Tiling(8, 512, 4)


@triton.jit
def _product(
    x,  # [ROWS, size]
    weight,  # [outputs, size], or with GATED [2 * outputs, size]: gates, then what they are for
    bias,
    out,  # [ROWS, outputs]
    size,
    outputs,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if GATED else 1
    line = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    place = tl.arange(0, WIDTH)
    tiles = ()
    sums = ()
    for part in tl.static_range(PARTS):
        tiles = tiles + (_tile(weight, line + part * outputs, line < outputs, place, size),)
        for _ in tl.static_range(ROWS):
            sums = sums + (tl.zeros([HEIGHT, WIDTH], tl.float32),)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    for base in tl.range(0, size, WIDTH):
        coming = ()
        for part in tl.static_range(PARTS):
            rows = line + part * outputs
            coming = coming + (_tile(weight, rows, line < outputs, base + WIDTH + place, size),)
        more = ()
        for part in tl.static_range(PARTS):
            for row in tl.static_range(ROWS):
                some = tl.load(x + row * size + base + place, mask=base + place < size, other=0).to(tl.float32)
                more = more + (sums[part * ROWS + row] + tiles[part].to(tl.float32) * some[None, :],)
        tiles = coming
        sums = more
    dtype = out.dtype.element_ty
    for row in tl.static_range(ROWS):
        result = tl.sum(sums[row], 1)
        if BIASED:
            result += tl.load(bias + line, mask=line < outputs, other=0).to(tl.float32)
        if GATED:
            gate = result.to(dtype).to(tl.float32)
            active = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
            result = active * tl.sum(sums[ROWS + row], 1).to(dtype).to(tl.float32)
        tl.store(out + row * outputs + line, result.to(dtype), mask=line < outputs)


@triton.jit
def _tile(weight, rows, there, columns, size):
    at = weight + rows.to(tl.int64)[:, None] * size + columns[None, :]
    return tl.load(at, mask=there[:, None] & (columns < size)[None, :], other=0, eviction_policy="evict_first")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tiling: Tiling = _TILING) -> Tensor:
    """``x`` [..., size] times ``weight`` [outputs, size], and ``bias`` [outputs]."""
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return torch_linear(x, weight, bias)
    return _multiplied(x, weight, bias, False, tiling)


def gated_linear(x: Tensor, weight: Tensor, tiling: Tiling = _TILING) -> Tensor:
    """silu(x @ gate) * (x @ up) of ``x`` [..., size]; ``weight`` [2 * outputs, size]: rows of the gate, then of up."""
    if x.numel() > MOST_ROWS * x.shape[-1]:
        gate, up = torch_linear(x, weight).chunk(2, -1)
        return gated(gate, up)
    return _multiplied(x, weight, None, True, tiling)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tiling: Tiling) -> Tensor:
    size, outputs = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    rows, overlap = x.numel() // size, overlaps(x.device)
    out = x.new_empty((*x.shape[:-1], outputs))
    height = max(tiling.rows // (rows * (2 if gated else 1)), 1)
    _product[(triton.cdiv(outputs, height),)](
        x.contiguous(),
        weight,
        weight if bias is None else bias,
        out,
        size,
        outputs,
        ROWS=rows,
        HEIGHT=height,
        WIDTH=min(tiling.columns, triton.next_power_of_2(size)),
        GATED=gated,
        BIASED=bias is not None,
        OVERLAP=overlap,
        num_warps=tiling.warps,
        launch_pdl=overlap,
    )
    return out
