"""What layers that keep their entries alike do in a prompt: attend to all of it, then store what the recipe keeps.

Shapes: B sequences, H query heads, K KV heads, q new tokens, n entries, D head size.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import Part, attend
from ..attention.kernels import prompt, prompt_decoded, serves_prompts
from ..memory import sent
from ..plan import Plan
from ..prefill import Propagation
from ..reduction import Entries, Eviction, Merging
from ..scoring import ObservingScore, PromptView
from .step import Fresh, Step
from .stored import StoredLayers


class PromptedLayers(StoredLayers):
    """Layers whose prompts are read and compressed."""

    divide: Callable[[int, PromptView], None] | None = None  # of the prompt under way: see ``share``

    @property
    def observers(self) -> list[ObservingScore]:
        """What observes attention, each once."""
        return [self.eviction.observes] if self.eviction and self.eviction.observes else []

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        """Attends new tokens to what is stored and to themselves, exactly, then stores what the recipe keeps."""
        heads = self.heads(number)
        past = bool(self.store.lengths[heads].any())
        # A text that scores is to see everything.
        selects = self.selector is not None and fresh.step.following is None
        out = self.selector.prompt(self._reading(number, fresh)) if self.selector and selects else None
        if out is None and past:
            out = self._over_pages(heads, fresh)
        stored = self._candidates(heads) if past and out is not None and self._weighs(number, fresh.step) else None
        if out is None:
            stored = self._part(heads, None) if past else None
            out = self._over_decoded(heads, stored, fresh) if stored else None
        if out is None:
            out = attend(fresh.query, self._exact_parts(heads, stored, fresh), fresh.variant)
        self.prompted = fresh.step.after
        decoded = [stored.keys, stored.values] if stored else []
        with self.arena.holding(fresh.keys, fresh.values, *decoded):
            asking, fresh = fresh.query, fresh.without_following()
            self._store_prompt(number, stored, fresh, asking[:, :, fresh.keys.shape[2] :])
            if self.selector:
                self.selector.stored(self._reading(number, fresh))
        if not past and self._place[number] == 0:
            self.store.reserve_like(heads, self.layers - 1)
        return out

    def chosen(self, number: int, fresh: Fresh, propagation: Propagation) -> Tensor:
        """The tokens of a first prompt that go on beyond layer ``number``, bool [B, q]."""
        return propagation.chosen(self._view(self.heads(number), None, fresh), fresh.step.counts)

    def end_prompt(self) -> None:
        """After the last layer."""
        if self.divide is not None:
            self.divide = None
            self.arena.note_peak()
            self.store.wait(False)
            self.store.settle(self.everyone)
        self.store.note_spans()

    def share(self, divide: Callable[[int, PromptView], None]) -> None:
        """Before a prompt whose layers share the budget by what they show: ``divide`` is told a layer and its view
        before what the layer keeps is decided, and may shrink others. Until the prompt's end all is kept dense, so that
        what is cut or merged several times is encoded once."""
        self.divide = divide
        self.store.wait(True)

    def allow(self, plan: Plan) -> None:
        """Takes on what ``plan`` allows each head."""
        self.capacity = plan.capacity[self.numbers[:: self.layer.depth]]

    def shrink(self, plan: Plan, before: int, after: Tensor) -> None:
        """Takes on another ``plan`` in the middle of a prompt up to ``after`` (int64 [B]) tokens; the layers before
        ``before``, which have stored it, are cut to that."""
        self.allow(plan)
        capacity = self._capacity.flatten()
        heads = torch.nonzero(self._before(before) & (self.store.lengths > capacity)).flatten()
        if self.eviction is None or not heads.numel():
            return
        if isinstance(self.eviction, Merging):
            self._merge(self.eviction, heads, after, (self.store.lengths - capacity)[heads])
            return
        counts, device = capacity[heads], self.arena.device
        state = sent(torch.stack([self.store.lengths[heads], self._per_head(after)[heads], counts]), device)
        self.store.keep(heads, self.eviction.best(self.store.read_columns(heads), *state), counts)

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts leave what is stored in its pages, in its formats."""
        return self.eviction is None and self.selector is None and self._as_read and serves_prompts(self.store)

    def _over_pages(self, heads: slice, fresh: Fresh) -> Tensor | None:
        """Attention of a prompt's tokens to all that a layer stores and to themselves, by the kernel, which decodes no
        copy of it; None where it does not serve."""
        if not self._as_read or fresh.step.padded:
            return None
        new = fresh.query, fresh.keys, fresh.values
        return prompt(*new, self.store, heads, fresh.variant, self.layer.window, self._counted)

    def _over_decoded(self, heads: slice, stored: Part, fresh: Fresh) -> Tensor | None:
        """The same over what was decoded, where no kernel reads it as it lies."""
        if fresh.step.padded or self.layer.window is not None:
            return None
        lengths = self.store.lengths[heads].view(self.batch, -1)
        lengths = lengths.repeat_interleave(stored.keys.shape[1] // lengths.shape[1], 1)
        return prompt_decoded(fresh.query, fresh.keys, fresh.values, stored, lengths, fresh.variant)

    # -- what is kept -------------------------------------------------------------------------------------------

    def _store_prompt(self, number: int, stored: Part | None, fresh: Fresh, following: Tensor) -> None:
        """Keeps what the recipe keeps of a layer's new tokens and of what is ``stored``; ``following``: the queries of
        the text that scores, [B, H, p, D]."""
        if self.eviction is not None or self.observers:
            self._store_best(number, stored, fresh, following)
        elif self.layer.window is not None:
            self._store_window(self.layer.window, self.heads(number), fresh)
        else:
            self._append_all(self.heads(number), fresh)

    def _fits(self, number: int, step: Step) -> bool:
        """Whether a layer may keep everything."""
        held = self.store.lengths[self.heads(number)].view(self.batch, -1)
        capacity = self.capacity[self._place[number]]
        return self.eviction is None or self.eviction.fits(held + step.counts[:, None], capacity)

    def _weighs(self, number: int, step: Step) -> bool:
        """Whether a layer looks at all its candidates at the end of a prompt."""
        return bool(self.observers) or not self._fits(number, step)

    def _store_best(self, number: int, stored: Part | None, fresh: Fresh, following: Tensor) -> None:
        """Keeps the best of what is stored and what is new, by the recipe's score, and what was observed of it."""
        heads, step = self.heads(number), fresh.step
        capacity = self.capacity[self._place[number]]
        if not self._weighs(number, step):
            self._append_all(heads, fresh)
            return
        view = self._view(heads, stored, fresh)
        for observer in self.observers:
            view = observer.after_prompt(view, number)
        if self.divide is not None:
            self.divide(number, view)
            capacity = self.capacity[self._place[number]]
        old = 0 if stored is None else stored.keys.shape[2]
        keep, columns = view.valid, dict(view.columns)
        counts: Tensor | None = step.counts[:, None]
        if self.eviction is not None:
            counts = None if self.eviction.across_heads else torch.minimum(capacity, step.counts[:, None])
            if isinstance(self.eviction, Merging):
                keep, columns, fresh = self._merged(self.eviction, heads, view, fresh, old, capacity)
            elif not self._fits(number, step):
                asked = view if step.following is None else view.asked_by(following, step.following)
                keep = self.eviction.keep(asked, capacity, self._scores(self.eviction, asked))
        del columns["position"]
        if stored is not None:
            if columns:
                self.store.set_columns(heads, {name: c[:, :, :old].flatten(0, 1) for name, c in columns.items()})
            self.store.keep(heads, keep[..., :old].flatten(0, 1))
        if stored is not None or counts is None:
            counts = keep[..., old:].sum(-1).cpu()
        self._append(heads, fresh, keep[..., old:], counts, {name: c[:, :, old:] for name, c in columns.items()})

    def _scores(self, eviction: Eviction, view: PromptView) -> Tensor:
        """What a prompt's candidates are worth, [B, K, n]."""
        return eviction.score.prompt(view)

    def _merged(
        self, merging: Merging, heads: slice, view: PromptView, fresh: Fresh, old: int, capacity: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Fresh]:
        """Merges a prompt's candidates, ``old`` of which are stored: which stay (bool [B, K, n]), their columns, and
        the new ones as they become. Stored ones are overwritten in place."""
        keys, values = (
            torch.cat([getattr(part, side) for part in view.parts], 2).flatten(0, 1) for side in ("keys", "values")
        )
        columns = {name: column.flatten(0, 1) for name, column in view.columns.items()}
        seen = view.seen.repeat_interleave(self.layer.kv_heads)[:, None]
        room = sent(capacity.flatten(), keys.device)
        leaving = (view.valid.flatten(0, 1).sum(1) - room).clamp(min=0)
        joined = merging.join(Entries(keys, columns, seen, room, leaving))
        self.arena.note_peak(2 * (keys.nbytes + values.nbytes))
        keys, values = joined.merged(keys), joined.merged(values)
        if old:
            self._overwrite(heads, joined.changed[:, :old], keys[:, :old], values[:, :old])
        shape = (self.batch, -1)
        columns |= joined.columns
        fresh = replace(fresh, keys=keys[:, old:].unflatten(0, shape), values=values[:, old:].unflatten(0, shape))
        keep = joined.stays.unflatten(0, shape) & view.valid
        return keep, {name: column.unflatten(0, shape) for name, column in columns.items()}, fresh

    def _merge(self, merging: Merging, heads: Tensor, after: Tensor, leaving: Tensor) -> None:
        """Merges away ``leaving`` (int64 [R], above 0) entries of each of ``heads``, layer by layer; ``after`` (int64
        [B]) tokens have been seen."""
        seen, capacity = self._per_head(after)[heads], self._capacity.flatten()[heads]
        sizes = torch.bincount(heads // self.stride).tolist()
        for layer in zip(*(each.split(sizes) for each in (heads, seen, capacity, leaving)), strict=True):
            if layer[0].numel():
                self._merge_layer(merging, *layer)

    def _merge_layer(self, merging: Merging, heads: Tensor, seen: Tensor, capacity: Tensor, leaving: Tensor) -> None:
        store = self.store
        columns, (keys, values) = store.read_columns(heads), self._read(heads)
        self.arena.note_peak(keys.nbytes + values.nbytes)
        held = self._within(heads)
        columns["position"] = columns["position"].masked_fill(~held, -1)
        state = (sent(each, keys.device) for each in (seen[:, None], capacity, leaving))
        joined = merging.join(Entries(keys, columns, *state))
        self._overwrite(heads, joined.changed, joined.merged(keys), joined.merged(values))
        store.set_columns(heads, joined.columns)
        gone = (joined.stays | ~held).byte().argsort(dim=1, stable=True)[:, : int(leaving.max())]
        store.drop(heads, gone, leaving)

    def _view(self, heads: slice, stored: Part | None, fresh: Fresh) -> PromptView:
        """What a score sees; columns are those before the prompt's queries."""
        step = fresh.step
        positions = step.positions[:, None].expand(-1, self.layer.kv_heads, -1)
        noted = {name: column.unflatten(0, positions.shape[:2]) for name, column in self._noted(heads, step).items()}
        columns = {"position": positions, **self._unread(positions, step), **noted}
        if stored is not None:
            before = self._columns(heads)
            columns = {name: torch.cat([before[name], column], 2) for name, column in columns.items()}

        def masked_parts(query_positions: Tensor) -> tuple[Part, ...]:
            new = Part(fresh.keys, fresh.values, self._visible(query_positions, step.positions[:, None]))
            if stored is None:
                return (new,)
            held = self._held(heads)[:, :, None] & (query_positions >= 0)[:, None, :, None]
            return (replace(stored, mask=held), new)

        if step.padded:
            parts = masked_parts(step.positions)
        else:
            # Masks of a row for each query would take more than all that is held.
            old = () if stored is None else (replace(stored, mask=self._held(heads)[:, :, None]),)
            parts = (*old, Part(fresh.keys, fresh.values, causal=True))
        seen = sent(step.after, fresh.query.device)
        positions = columns["position"]
        return PromptView(fresh.query, step.positions, parts, fresh.variant, positions, seen, columns, masked_parts)

    def _unread(self, positions: Tensor, prompt: Step | None = None) -> dict[str, Tensor]:
        """The columns of new entries at ``positions``, but for these, before a query has read them."""
        columns = self.eviction.fresh(positions) if self.eviction else {}
        for observer in self.observers:
            first = positions
            if prompt is not None:
                most = prompt.counts if observer.of_prompt is None else prompt.counts.clamp(max=observer.of_prompt)
                first = sent(prompt.after - most, positions.device)[:, None, None]
            columns |= observer.fresh(positions, first)
        return columns

    def _noted(self, heads: slice | Tensor, step: Step) -> dict[str, Tensor]:
        """The columns that a selection keeps of new tokens of these heads, [R, q] each."""
        return self.selector.fresh(self.store, heads, step.ends) if self.selector else {}

    def _store_window(self, window: int, heads: slice, fresh: Fresh) -> None:
        """Keeps the newest tokens that the next query of a sliding-window layer can still read."""
        kept, step = window - 1, fresh.step
        held = self.store.lengths[heads].view(self.batch, -1)
        self.store.pop_front(heads, (held + step.counts[:, None] - kept).clamp(min=0).minimum(held).flatten())
        newest = step.positions >= (step.after - kept).clamp(min=0)[:, None].to(step.positions.device)
        self._append(heads, fresh, newest[:, None], step.counts.clamp(max=kept)[:, None])

    def _append_all(self, heads: slice, fresh: Fresh) -> None:
        positions = fresh.step.positions[:, None]
        columns = {}
        if self.eviction is not None:
            each = positions.expand(-1, self.layer.kv_heads, -1)
            columns = self.eviction.fresh(each)
        noted = self._noted(heads, fresh.step)
        columns |= {name: column.unflatten(0, (self.batch, -1)) for name, column in noted.items()}
        self._append(heads, fresh, positions >= 0, fresh.step.counts[:, None], columns)

    def _append(
        self, heads: slice, fresh: Fresh, keep: Tensor, counts: Tensor, columns: dict[str, Tensor] | None = None
    ) -> None:
        """Appends the new tokens where ``keep`` (bool [B, K or 1, q]), ``counts`` ([B, K or 1], host) of each head."""
        counts = counts.expand(-1, self.layer.kv_heads).flatten()
        longest = int(counts.max())
        if not longest:
            return
        keys, values = self._rows(heads, fresh)
        position = fresh.step.positions.to(torch.int32)[:, None].expand(-1, self.layer.kv_heads, -1)
        marked = self._exempt(fresh)[:, None].expand(-1, self.layer.kv_heads, -1)
        columns = {"position": position, "marked": marked, **(columns or {})}
        if int(counts.min()) < keys.shape[2]:
            index = (~keep).byte().argsort(dim=-1, stable=True)[..., :longest].expand(-1, self.layer.kv_heads, -1)
            keys = keys.gather(2, index[..., None].expand(-1, -1, -1, keys.shape[3]))
            values = values.gather(2, index[..., None].expand(-1, -1, -1, values.shape[3]))
            columns = {name: _gathered(column, index) for name, column in columns.items()}
        rows = {name: column.flatten(0, 1) for name, column in columns.items()}
        self._put(heads, (keys.flatten(0, 1), values.flatten(0, 1)), rows, counts, fresh)

    def _put(
        self, heads: slice, new: tuple[Tensor, Tensor], columns: dict[str, Tensor], counts: Tensor, fresh: Fresh
    ) -> None:
        """Stores ``counts`` (int64 [R]) of the keys and values ``new`` ([R, n, size] each) of a prompt; ``columns`` say
        beside the store's which are ``marked`` to be read exactly."""
        watched, marked = self.store.watched, columns.pop("marked")
        if watched is not None:
            self.store.observe(heads, *new, counts, self._last_queries(fresh, watched), marked)
        self._enter(heads, *new, columns, counts)

    def _enter(self, heads: slice, keys: Tensor, values: Tensor, columns: dict[str, Tensor], counts: Tensor) -> None:
        """Stores a prompt's entries of a layer that stay, ``counts`` of each head: [R, n, …]."""
        self.store.append(heads, keys, values, columns, counts)

    def _last_queries(self, fresh: Fresh, count: int) -> Tensor:
        """The last ``count`` real queries of a prompt, zero where there are fewer: [B * K, G, count, D]."""
        positions, index = fresh.step.positions.sort(dim=1, stable=True)
        first = max(index.shape[1] - count, 0)
        rows = index[:, None, first:, None].expand(-1, fresh.query.shape[1], -1, fresh.query.shape[3])
        real = positions[:, None, first:, None] >= 0
        last = fresh.query.gather(2, rows).masked_fill(~real, 0)
        if self.rotary and count:
            last = self.rotary.undo(last, positions[:, first:].clamp(min=0))
        return last.unflatten(1, (self.layer.kv_heads, -1)).flatten(0, 1)

    def _exempt(self, fresh: Fresh) -> Tensor:
        """The new tokens that are to be read exactly, bool [B, q]."""
        return torch.zeros_like(fresh.step.positions, dtype=torch.bool)


def _gathered(column: Tensor, index: Tensor) -> Tensor:
    """[B, K, n, …] at index [B, K, m] -> [B, K, m, …]."""
    trailing = column.shape[3:]
    return column.gather(2, index.view(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing))
