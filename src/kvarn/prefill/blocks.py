"""A prompt read in blocks, so that the peak does not grow with it; after each, if need be, a text that scores it.

Both happen in hooks on a model's decoder, so they are the same under ``model(...)``, ``model.generate`` and chunks that
a caller makes. A pass through several blocks gives the hidden states, and so the logits, of the last one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import Unsupported


class Reader(ABC):
    """A cache that says how its prompts are read.

    ``block``: tokens that are read at once; None: all. ``tail`` and ``text`` (token ids, int64 [n]): where a text
    follows each block and scores it (see ``Score.tail``). ``following`` (bool [B, p]): which tokens at the end of the
    pass under way are of that text and not padding; None: there is none.
    """

    block: int | None
    tail: int | None
    text: Tensor | None
    following: Tensor | None

    @abstractmethod
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length."""

    @property
    @abstractmethod
    def seen(self) -> Tensor:
        """Real tokens of each sequence so far, int64 [B] on the host; [0] where nothing has come."""

    @abstractmethod
    def require_room(self, tokens: int) -> None:
        """Raises PromptTooLong where so many tokens are too many."""

    @abstractmethod
    def expect(self, tokens: int | Tensor) -> None:
        """Announces a prompt of several passes by the tokens that sequences will have then; 0: none any more."""

    @property
    @abstractmethod
    def expecting(self) -> bool:
        """Whether a prompt is under way of which more will come."""

    @abstractmethod
    def overflows(self, counts: Tensor) -> bool:
        """Whether entries have to leave when so many tokens come (int64 [B], host)."""


def cuts(tokens: int, block: int) -> list[tuple[int, int]]:
    """The blocks of a prompt of ``tokens``: the first is what does not fill one, so that sequences that are padded on
    the left are cut where they are cut alone."""
    starts = [0, *range(tokens % block or block, tokens, block)]
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def read_in_blocks(model: PreTrainedModel) -> None:
    """From now on ``model`` reads prompts as a ``Reader`` that it is given says; other caches are left alone."""
    decoder = model.get_decoder()
    if _before not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True)


@dataclass(frozen=True)
class _Pass:
    """What a decoder is given, by name, and how many tokens came before."""

    given: dict[str, Any]
    past: int

    @property
    def inputs(self) -> str:
        return "input_ids" if self.given.get("input_ids") is not None else "inputs_embeds"

    @property
    def rows(self) -> Tensor:
        return self.given[self.inputs]

    @property
    def tokens(self) -> int:
        return self.rows.shape[1]

    @property
    def mask(self) -> Tensor | None:
        """The mask of all tokens so far, [B, past + q]."""
        mask = self.given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise Unsupported("a prompt that is read in blocks takes a 2-d padding mask or none")
        return mask

    @property
    def valid(self) -> Tensor:
        """Which of the new tokens are real, bool [B, q]."""
        if self.mask is None:
            return torch.ones(self.rows.shape[:2], dtype=torch.bool, device=self.rows.device)
        return self.mask[:, self.past : self.past + self.tokens].bool()

    def changed(self, **given: Any) -> "_Pass":
        return replace(self, given={**self.given, **given})

    def part(self, first: int, last: int) -> "_Pass":
        """The pass of tokens ``first`` .. ``last`` of this one, those before having passed."""
        positions = self.given.get("position_ids")
        part = self.changed(**{self.inputs: self.rows[:, first:last]})
        if self.mask is not None:
            part = part.changed(attention_mask=self.mask[:, : self.past + last])
        if positions is not None:
            part = part.changed(position_ids=positions[..., first:last])
        return replace(part, past=self.past + first)

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """The last ``count`` real tokens of each sequence, [B, count, …], padded on the left, and which are real."""
        index = self.valid.byte().argsort(dim=1, stable=True)[:, -min(count, self.tokens) :]
        rows = self.rows[torch.arange(len(index), device=index.device)[:, None], index]
        return rows, self.valid.gather(1, index)

    def followed(self, rows: Tensor, real: Tensor) -> "_Pass":
        """This pass with more tokens at its end, whose positions begin at each sequence's last."""
        mask, positions = self.mask, self.given.get("position_ids")
        if positions is None:
            positions = torch.arange(self.past, self.past + self.tokens, device=rows.device)[None]
        positions = positions.expand(len(rows), -1)
        end = positions.masked_fill(~self.valid, 0).amax(1, keepdim=True)
        more = (end + real.cumsum(1) - 1).clamp(min=0)
        if mask is not None or not bool(real.all()):
            before = real.new_ones(len(rows), self.past + self.tokens) if mask is None else mask
            mask = torch.cat([before, real.to(before.dtype)], 1)
        return self.changed(
            **{self.inputs: torch.cat([self.rows, rows], 1)},
            position_ids=torch.cat([positions, more], 1),
            attention_mask=mask,
        )


def _before(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    given = (signature(decoder.forward).bind_partial(*args).arguments if args else {}) | kwargs
    cache = given.get("past_key_values")
    if not isinstance(cache, Reader):
        return None
    cache.following = None
    current = _Pass(given, cache.get_seq_length())
    if cache.block is not None and current.tokens > cache.block:
        current = _last_block(decoder, cache, current, cache.block)
    if cache.tail is not None and (current.tokens > 1 or cache.expecting or not current.past):
        current = _with_text(decoder, cache, current, cache.tail)
    return (), current.given


def _last_block(decoder: nn.Module, cache: Reader, whole: _Pass, block: int) -> _Pass:
    """Reads all blocks but the last, which is returned."""
    *blocks, last = cuts(whole.tokens, block)
    cache.require_room(whole.tokens)
    announced = cache.expecting
    if not announced:
        counts = whole.valid.sum(1).cpu()
        cache.expect(cache.seen + counts if cache.seen.numel() else counts)
    try:
        for first, end in blocks:
            with torch.no_grad():
                decoder(**whole.part(first, end).given)
    except BaseException:
        if not announced:
            cache.expect(0)
        raise
    return whole.part(*last)


def _with_text(decoder: nn.Module, cache: Reader, block: _Pass, tail: int) -> _Pass:
    """The pass with the text that scores at its end, where something has to be chosen."""
    if not cache.overflows(block.valid.sum(1).cpu()):
        return block
    if cache.text is None:
        rows, real = block.last(tail)
    else:
        rows = cache.text.to(block.rows.device).expand(len(block.rows), -1)
        real = torch.ones_like(rows, dtype=torch.bool)
        if block.inputs == "inputs_embeds":
            rows = cast(PreTrainedModel, decoder).get_input_embeddings()(rows)
    cache.following = real
    return block.followed(rows, real)


def _after(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Reader) or cache.following is None:
        return None
    count, cache.following = cache.following.shape[1], None
    return _without(output, count)


def _without(output: Any, count: int) -> Any:
    """Hidden states ([B, n, size], alone or in tuples and outputs of a model) without the last ``count`` tokens."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _without(value, count) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(_without(value, count) for value in output)
    return output[:, :-count] if isinstance(output, Tensor) and output.dim() == 3 else output
