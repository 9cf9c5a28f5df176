"""Page table, starts and lengths of a segment as the kernels read them: on the device, at addresses that stay."""

import torch
from torch import Tensor

_GROWTH = 1.25
_WIDTH = 16  # the table's width is a multiple of this: kernels are compiled for that


class Mirror:
    """A copy of a segment's bookkeeping on its device, brought up to date by ``update`` and never waiting for it.

    ``table`` is int32 [heads, width], ``spans`` int32 [heads, 2]: start and length in tokens. They are written in
    place, so that what was captured with their addresses keeps working, until the table has to widen: ``moves`` counts
    that. Spans are only ever copied from the host, never written by a kernel: a kernel may read them before those are
    done that it was launched behind.
    """

    def __init__(self, device: torch.device, heads: int):
        self.table = torch.zeros((heads, 0), dtype=torch.int32, device=device)
        self.spans = torch.zeros((heads, 2), dtype=torch.int32, device=device)
        self.moves = 0
        self._changed: list[tuple[Tensor, Tensor]] = []  # (heads, columns) of the table that are out of date
        self._resized = True

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.spans.nbytes

    def note_pages(self, heads: Tensor, columns: Tensor) -> None:
        """The pages at (heads, columns), int64 [n] each, have changed."""
        self._changed.append((heads, columns))

    def note_spans(self) -> None:
        """Starts or lengths have changed."""
        self._resized = True

    def update(self, table: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Brings the mirror up to date with the host's tensors: with the pages that changed where these are few, with
        the whole table else."""
        if self._resized:
            self.spans.copy_(_pinned(torch.stack([starts, lengths], 1).int(), self.spans), non_blocking=True)
            self._resized = False
        width = table.shape[1]
        if width > self.table.shape[1]:
            room = -(-max(width, int(self.table.shape[1] * _GROWTH)) // _WIDTH) * _WIDTH
            self.table = self.table.new_zeros((table.shape[0], room))
            self.moves += 1
            self._copy(table)
        elif sum(heads.numel() for heads, _ in self._changed) * 8 > table.numel():
            self._copy(table)
        elif self._changed:
            # The pages are read now, so that an entry that changed twice is sent twice with the same page.
            heads, columns = (torch.cat(each) for each in zip(*self._changed, strict=True))
            triples = torch.stack([heads, columns, table[heads, columns].long()])
            sent = _pinned(triples, self.table).to(self.table.device, non_blocking=True)
            self.table.index_put_((sent[0], sent[1]), sent[2].int())
        self._changed.clear()

    def _copy(self, table: Tensor) -> None:
        self.table[:, : table.shape[1]].copy_(_pinned(table.contiguous(), self.table), non_blocking=True)


def _pinned(tensor: Tensor, target: Tensor) -> Tensor:
    return tensor.pin_memory() if target.is_cuda else tensor
