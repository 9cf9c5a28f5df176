"""Layers that share a budget by what each of them shows in the prompt, decided as the prompt goes through them."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import mass_received, observed
from ..scoring import PromptView
from ..scoring.shifting import kurtosis, over_queries
from ..scoring.view import concatenated
from .policy import UNBOUNDED, Heads, Policy, Uniform


class Cascade(Uniform):
    """Layers share the budget in proportion to their preferences, which are known only once a layer has been computed.

    Until then a layer is counted with the least that the recipe needs. With every further layer the ones before it hold
    less, so the bytes held never exceed the budget by more than a layer (CAKE, arXiv 2503.12491, section 4.3).
    """

    @abstractmethod
    def preference(self, view: PromptView) -> Tensor:
        """How much a layer wants, float64 [B] above zero."""

    def divides(self, capacity: Tensor, tokens: Tensor) -> bool:
        """Whether layers have to tell where heads may hold ``capacity`` ([layers, B, K]) of ``tokens`` ([B])."""
        return bool((capacity < tokens[:, None]).any())

    def whole(self, layers: int) -> Tensor:
        """Which layers keep everything, bool [layers]; the others share what these leave."""
        return torch.zeros(layers, dtype=torch.bool)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        return super().entries(level, heads).masked_fill(self.whole(heads.layers)[:, None, None], UNBOUNDED)

    def preferring(self, preferences: Tensor) -> Policy:
        """Divides by ``preferences`` (float64 [layers, B], 0 for layers not seen yet)."""
        return Preferred(preferences, self.whole(preferences.shape[0]))


class Preferred(Uniform):
    """Entries in proportion to ``preferences`` (float64 [layers, B], 0 for layers not seen yet), but for the layers
    that are kept ``whole`` (bool [layers]); no other head has more than the prompt's tokens."""

    def __init__(self, preferences: Tensor, whole: Tensor):
        seen = (preferences > 0) & ~whole[:, None]
        mean = torch.where(seen, preferences, 0).sum(0) / seen.sum(0).clamp(min=1)
        # Layers that want next to nothing would make the highest level endless.
        self.shares = torch.where(seen, (preferences / mean).clamp(min=1e-3), 0)
        self.whole = whole

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, 1000 * most)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        entries = (self.shares * level).round().long().minimum(heads.lengths)
        entries = entries.masked_fill(self.whole[:, None], UNBOUNDED)
        return entries[..., None].expand(-1, -1, heads.kv_heads)


@dataclass(frozen=True)
class Restlessness(Cascade):
    """A layer wants D^(1 / ``dispersion``) * V^(1 / ``change``): D the entropy of what the last ``window`` queries of
    the prompt pay to entries before them, V the variance of it over these queries, both summed over query heads
    (CAKE, arXiv 2503.12491, equations 4 to 6). With ``peaks``, it wants that times K^(1 / ``peaks``), K the sum of the
    kurtosis over these queries."""

    window: int
    dispersion: float
    change: float
    peaks: float | None = None

    def preference(self, view: PromptView) -> Tensor:
        queries = view.last_positions(self.window)
        (paid,) = observed(*view.last_queries(self.window), view.variant)
        before = ~view.among_last(self.window)[:, :, None, None]
        rows = (paid.probabilities * before).double()
        entropy = -(rows * (rows + 1e-10).log()).sum((1, 2, 3, 4))
        variance = over_queries(rows, queries)[1].sum((1, 2, 3))
        tiny = torch.finfo(torch.float32).tiny
        wanted = entropy.clamp(min=tiny) ** (1 / self.dispersion) * variance.clamp(min=tiny) ** (1 / self.change)
        if self.peaks is None:
            return wanted
        return wanted * kurtosis(rows, queries).sum((1, 2, 3)).clamp(min=tiny) ** (1 / self.peaks)


@dataclass(frozen=True)
class PrecisionCascade(Restlessness):
    """All layers may hold equally many entries, and those that want more keep more of them in the higher precision.

    Of C entries a head keeps the newest ``window`` in it and a share of the others: the layer's preference over the
    largest one (ARKV, arXiv 2603.08727), or with ``share``, that in every layer. As later layers tell what they want,
    more entries of the layers before them are lowered.
    """

    share: float | None = None

    def divides(self, capacity: Tensor, tokens: Tensor) -> bool:
        return True  # decoding needs the shares as soon as a head is full

    def preferring(self, preferences: Tensor) -> Policy:
        return Graded(preferences, self.window, self.share)


class Graded(Uniform):
    """Equally many entries for all layers of ``preferences`` (float64 [layers, B], 0 for layers not seen yet); of those
    before the newest ``window`` a share is high ones: the preference over the largest, or ``share``."""

    grades = True

    def __init__(self, preferences: Tensor, window: int, share: float | None):
        self.seen, self.window = preferences > 0, window
        shares = preferences / preferences.amax(0)
        self.shares = torch.where(self.seen, shares if share is None else share, 1)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        return torch.where(self.seen, level, 0)[..., None].expand(-1, -1, heads.kv_heads)

    def high(self, capacity: Tensor, heads: Heads) -> Tensor:
        older = (capacity - self.window).clamp(min=0)
        return torch.minimum(capacity, self.window + (self.shares[..., None] * older).round().long())


@dataclass(frozen=True)
class Density(Cascade):
    """The denser a layer's attention is, the more it keeps; the ``first`` and ``last`` layers keep everything.

    D2O (arXiv 2406.13035, section 3.2): a layer wants exp(-F). F is the mean over query heads of the variance, over
    entries, of the mass that they receive from all queries of the prompt, once these variances are scaled to 0 for the
    least and 1 for the greatest of the layer.
    """

    first: int
    last: int

    def preference(self, view: PromptView) -> Tensor:
        mass = concatenated(mass_received(view.query, view.parts, view.variant)).double().flatten(1, 2)
        valid = view.valid.repeat_interleave(mass.shape[1] // view.valid.shape[1], 1)
        count = valid.sum(-1)
        mean = (mass * valid).sum(-1) / count.clamp(min=1)
        squares = ((mass - mean[..., None]).square() * valid).sum(-1)
        variance = squares / (count - 1).clamp(min=1)
        least, greatest = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
        return (-((variance - least) / (greatest - least + 1e-6)).mean(1)).exp()

    def whole(self, layers: int) -> Tensor:
        place = torch.arange(layers)
        return (place < self.first) | (place >= layers - self.last)
