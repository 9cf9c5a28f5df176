"""Segments as kernels take them: tensors of pages, page tables, and what formats need besides."""

from torch import Tensor

from ...formats import Corrected, Exempt, Format, Mapped, NonUniform, Rotated, Signs
from ...memory import Segment, Side


def segments(side: Side) -> tuple[tuple, tuple]:
    """The settled segment (the tail, where there is none) and the tail, as kernels take them."""
    tail = arguments(side.tail)
    return (arguments(side.settled) if side.settled else tail), tail


def arguments(segment: Segment, *columns: str) -> tuple:
    """Two tensors of a segment (one, twice, where there is no other), where its entries lie, and what its format needs
    besides. ``columns``: the names of one or two columns, which are the tensors."""
    tensors, mirror = segment.pool.tensors, segment.mirror()
    if columns:
        x, second = tensors[columns[0]], tensors[columns[-1]]
    else:
        x, second = _first(tensors, "codes", "bitmap", "x"), _first(tensors, "range", "scale", "numbers")
    place = mirror.table, mirror.spans, mirror.table.stride(0)
    return (x, x if second is None else second, *place, *_beside(segment))


def _beside(segment: Segment) -> tuple[tuple, ...]:
    """The tensors that the kind of a segment needs besides, and those of exact tokens (see ``kinds``)."""
    fmt = segment.format
    if isinstance(fmt, Exempt):
        return (*_of_kind(segment, fmt.inner), (segment.state["exact"], segment.state["places"]))
    return _of_kind(segment, fmt)


def _of_kind(segment: Segment, fmt: Format) -> tuple[tuple, ...]:
    tensors, (shared, row) = segment.pool.tensors, segment.shared
    while isinstance(fmt, Mapped) and not (isinstance(fmt, Rotated) and fmt.shared):
        fmt = fmt.inner
    if isinstance(fmt, Rotated):
        return ((shared["rank"], row),)
    if isinstance(fmt, Corrected):
        return (tuple(tensors[name] for name in ("exact", "places", "left", "right")),)
    if isinstance(fmt, Signs):
        return ((tensors["signs"], tensors["magnitude"]),)
    if isinstance(fmt, NonUniform):
        ranges = shared if fmt.fixed else tensors
        read = shared["read"] if "read" in shared else shared["levels"]
        return ((tensors["exact"], tensors["places"], read, row, ranges["center"], ranges["half"]),)
    return ()


def _first(tensors: dict[str, Tensor], *names: str) -> Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)
