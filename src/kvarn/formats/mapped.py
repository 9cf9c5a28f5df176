"""Vectors that are a map of vectors in another format."""

from abc import abstractmethod

from torch import Tensor

from .base import Format


class Mapped(Format):
    """Vectors that follow from vectors in the format ``inner`` by a linear map, perhaps with a fixed vector added: the
    same for all tokens of a head.

    Products with them need no decoding of their own: ``query`` times a vector is ``asked(query)`` times the inner
    vector, plus ``offset(query)``. Queries of the heads that the format was given are [R, G, size].
    """

    inner: Format

    @abstractmethod
    def asked(self, query: Tensor) -> Tensor:
        """What inner vectors are multiplied with in place of ``query``: [R, G, size of ``inner``]."""

    def offset(self, query: Tensor) -> Tensor | None:
        """What every product of a query has besides, fp32 [R, G]; None: nothing."""
        return None


def innermost(fmt: Format) -> Format:
    """The format of the rows themselves."""
    while isinstance(fmt, Mapped):
        fmt = fmt.inner
    return fmt
