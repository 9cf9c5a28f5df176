"""Layers that keep chunks of old tokens in few numbers and read some of them."""

import torch
from torch import Tensor

from ..attention import Part, attend
from ..attention.rotary import Rotary
from ..memory import Arena, Layout
from ..selection import Chunks, stray
from ..spec import LayerSpec
from .joint import JointGroup
from .step import Fresh, Step


class ChunkGroup(JointGroup):
    """A joint group whose queries read landmarks and then some chunks of what has settled (``Chunks``).

    Prompts settle; generated tokens stay as they are until the next prompt. Settled keys are reconstructed on the
    device while the values of the same tokens come from the host, but for those that were read last.
    """

    def __init__(
        self,
        numbers: list[int],
        layer: LayerSpec,
        layout: Layout,
        chunks: Chunks,
        arena: Arena,
        batch: int,
        rotary: Rotary | None,
    ):
        super().__init__(numbers, layer, layout, None, arena, batch, rotary)
        self.chunks = chunks
        # Of each layer the chunks that were read last, int64 [B, K, m], and their values, [B, K, m, size, D].
        self._last: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def state_bytes(self) -> int:
        return sum(chunks.nbytes + values.nbytes for chunks, values in self._last.values())

    def empty(self, batch: int) -> "ChunkGroup":
        layout = self.store.layout
        return ChunkGroup(self.numbers, self._whole, layout, self.chunks, self.arena, batch, self.rotary)

    def join(self, other: "ChunkGroup") -> None:  # type: ignore[override]
        super().join(other)
        self._last.clear()
        other._last.clear()

    def leave(self, sequence: int) -> "ChunkGroup":
        self._last.clear()
        alone = super().leave(sequence)
        assert isinstance(alone, ChunkGroup)
        return alone

    # -- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        self._last.pop(number, None)
        return super().prompt(number, fresh)

    def _append(
        self, heads: slice, fresh: Fresh, keep: Tensor, counts: Tensor, columns: dict[str, Tensor] | None = None
    ) -> None:
        first = not int(self.store.lengths[heads].max())
        if int(self._settled(heads).max()):
            self._encode_anew(heads, fresh)
        super()._append(heads, fresh, keep, counts, columns)
        self._add_landmarks(heads, fresh if first else None)

    def _encode_anew(self, heads: slice, fresh: Fresh) -> None:
        """Finds the subspace of old and new keys together, and encodes the old ones in it."""
        settled, lengths = self.store.keys.settled, self.store.lengths[heads]
        assert settled is not None
        old, new = self.store.read_keys(heads), self._rows(heads, fresh)[0].flatten(0, 1)
        held = (torch.arange(old.shape[1]) < lengths[:, None]).to(old.device)
        held = torch.cat([held, fresh.step.positions >= 0], 1)
        state = settled.format.observe(torch.cat([old, new], 1), held, new[:, None, :0])
        for name, tensor in state.items():
            settled.state[name][heads] = tensor
        counts = settled.lengths[heads].clone()
        settled.rewrite(heads, settled.encode(heads, old[:, : int(counts.max())]), counts)

    def _add_landmarks(self, heads: slice, fresh: Fresh | None) -> None:
        """Takes note of chunks that have settled. ``fresh``: the exact keys and values of a first prompt; then outliers
        are kept too."""
        size, means = self.chunks.size, self.store.beside["means"]
        done = means.lengths[heads].clone()
        counts = self._settled(heads) // size - done
        most = int(counts.max())
        if not most:
            return
        index = (done[:, None] * size + torch.arange(most * size)).to(self.arena.device)
        if fresh is None:
            index = index[:, None].expand(-1, self._whole.kv_heads, -1)
            keys, values = self._keys_at(heads, index), None
        else:
            real = (fresh.step.positions < 0).byte().argsort(dim=1, stable=True)
            at = real.gather(1, index.clamp(max=real.shape[1] - 1))[:, None, :, None]
            keys, values = (x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])) for x in (fresh.keys, fresh.values))
        keys = keys.unflatten(2, (most, size))  # [B, K, n, size, D]
        landmarks = keys.float().mean(3).to(keys.dtype).transpose(1, 2).flatten(2)
        means.append(heads, {"x": landmarks}, counts)
        if values is not None and self.chunks.outliers:
            self._keep_outliers(heads, keys, values.unflatten(2, (most, size)), counts)

    def _keep_outliers(self, heads: slice, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Keeps exact copies of the chunks ([B, K, n, size, D], the first ``counts`` of each sequence) that their means
        stand for least."""
        beyond = (torch.arange(keys.shape[2]) >= counts[:, None]).to(keys.device)
        kept = counts.clamp(max=self.chunks.outliers)
        worst = stray(keys).masked_fill(beyond[:, None], torch.inf).argsort(dim=-1, stable=True)[..., : int(kept.max())]
        rows = {
            name: x.gather(2, worst[..., None, None].expand(-1, -1, -1, *x.shape[3:])).permute(0, 2, 3, 1, 4)
            for name, x in (("keys", keys), ("values", values))
        }
        self.store.beside["outliers"].append(heads, {**rows, "chunk": worst.transpose(1, 2).int()}, kept)

    # -- decoding -----------------------------------------------------------------------------------------------

    def token(self, number: int, fresh: Fresh) -> Tensor:
        heads = self.heads(number)
        if not int(self._settled(heads).max()):
            return super().token(number, fresh)
        keys, values = self._rows(heads, fresh)
        self.store.put_token(heads, keys.flatten(0, 2), values.flatten(0, 2))
        outliers, strays = self._outliers(heads)
        parts = [self._chosen(number, fresh.query[:, :, 0], strays), self._tail(heads)]
        return attend(fresh.query, [*parts, outliers] if outliers else parts, fresh.variant)

    def end_token(self, step: Step) -> None:
        self.arena.note_peak()
        self.store.note_spans()

    def _chosen(self, number: int, query: Tensor, strays: Tensor) -> Part:
        """The chunks that a query [B, H, D] reads, but for ``strays`` (int64 [B, K, o], -1: none)."""
        heads, size = self.heads(number), self.chunks.size
        means = self.store.beside["means"]
        counts = means.lengths[heads].to(query.device)
        landmarks = means.decode(heads).unflatten(-1, (self._whole.kv_heads, -1)).transpose(1, 2)
        readable = torch.arange(landmarks.shape[2], device=query.device) < counts[:, None, None]
        readable = readable.expand(-1, landmarks.shape[1], -1)
        apart = torch.zeros((*readable.shape[:2], readable.shape[2] + 1), dtype=torch.bool, device=query.device)
        apart.scatter_(2, torch.where(strays < 0, readable.shape[2], strays), True)
        chunks, valid = self.chunks.chosen(query, landmarks, readable & ~apart[..., :-1])
        index = (chunks[..., None] * size + torch.arange(size, device=query.device)).flatten(2)
        keys, values = self._keys_at(heads, index), self._values_at(number, chunks)
        self.arena.note_peak(keys.nbytes + values.nbytes)
        return Part(keys, values.flatten(2, 3), valid.repeat_interleave(size, 2)[:, :, None])

    def _keys_at(self, heads: slice, index: Tensor) -> Tensor:
        """Settled keys of tokens ``index`` (int64 [B, K, t]) as attention reads them, [B, K, t, D]."""
        settled = self.store.keys.settled
        assert settled is not None
        assert self.rotary is not None
        rows = settled.read_at(heads, index.flatten(1))["x"].unflatten(1, index.shape[1:])
        basis = settled.state["basis"][heads].unflatten(-1, (index.shape[1], -1)).transpose(1, 2)
        keys = (rows @ basis).flatten(0, 1)
        return self.rotary.rotate(keys[:, None], index.flatten(0, 1))[:, 0].unflatten(0, index.shape[:2])

    def _values_at(self, number: int, chunks: Tensor) -> Tensor:
        """Settled values of ``chunks`` (int64 [B, K, m]), [B, K, m, size, D]; only those come from the host that were
        not read last."""
        missing = torch.ones_like(chunks, dtype=torch.bool)
        held = None
        if number in self._last:
            before, held = self._last[number]
            count = int(self.store.beside["means"].lengths[self.heads(number)].max())
            place = torch.full((*chunks.shape[:2], count), -1, device=chunks.device)
            place.scatter_(2, before, torch.arange(before.shape[2], device=chunks.device).expand_as(before))
            place = place.gather(2, chunks)
            missing = place < 0
        sequence, head, _ = torch.nonzero(missing, as_tuple=True)
        fetched = self._fetched(number, sequence, head, chunks[missing])
        values = fetched.new_empty((*chunks.shape, *fetched.shape[1:]))
        if held is not None:
            values = held.gather(2, place.clamp(min=0)[..., None, None].expand_as(values))
        values[missing] = fetched
        self._last[number] = chunks, values
        return values

    def _fetched(self, number: int, sequence: Tensor, head: Tensor, chunks: Tensor) -> Tensor:
        """Settled values of ``chunks`` (int64 [f]), each of a sequence and a KV head: [f, size, D]."""
        settled, size = self.store.values.settled, self.chunks.size
        assert settled is not None
        owners = (sequence + self.heads(number).start)[:, None].expand(-1, size)
        tokens = chunks[:, None] * size + torch.arange(size, device=chunks.device)
        owners, tokens, heads = (x.flatten().cpu() for x in (owners, tokens, head[:, None].expand(-1, size)))
        rows = settled.read_parts(owners, tokens, heads, self._whole.kv_heads)
        return rows.view(-1, size, rows.shape[-1])

    def _tail(self, heads: slice) -> Part:
        """What has not settled."""
        keys, values = (side.tail.decode(heads) for side in (self.store.keys, self.store.values))
        keys, values = (x.unflatten(-1, (self._whole.kv_heads, -1)).transpose(1, 2) for x in (keys, values))
        place, device = torch.arange(keys.shape[2]), keys.device
        positions = self._settled(heads)[:, None] + place
        held = place < self.store.keys.tail.lengths[heads][:, None]
        assert self.rotary is not None
        return Part(self.rotary.rotate(keys, positions.to(device)), values, held[:, None, None].to(device))

    def _outliers(self, heads: slice) -> tuple[Part | None, Tensor]:
        """The chunks that are kept exactly, and which they are: int64 [B, K, o], -1 where a sequence has fewer."""
        segment = self.store.beside["outliers"]
        rows, lengths = segment.read(heads), segment.lengths[heads]
        beyond = (torch.arange(rows["chunk"].shape[1]) >= lengths[:, None]).to(rows["chunk"].device)
        chunks = rows["chunk"].long().masked_fill(beyond[..., None], -1).transpose(1, 2)
        if not chunks.shape[2]:
            return None, chunks
        keys, values = (rows[name].permute(0, 3, 1, 2, 4).flatten(2, 3) for name in ("keys", "values"))
        mask = (~beyond).repeat_interleave(self.chunks.size, 1)[:, None, None]
        return Part(keys, values, mask), chunks

    def _settled(self, heads: slice) -> Tensor:
        """Settled tokens of each sequence, int64 [B] on the host."""
        settled = self.store.keys.settled
        assert settled is not None
        return settled.lengths[heads]
