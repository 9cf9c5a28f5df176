"""Where the levels of non-uniform codes lie: ranges and codebooks of a model's keys and values (KVQuant)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Calibration, Progress
from ..formats import exact_numbers
from ..spec import ModelSpec
from .reading import Read, reading, samples

BITS = (2, 3, 4)


@dataclass(frozen=True)
class LevelSearch(Calibration):
    """Ranges of key channels, and codebooks of keys and of values for each layer (arXiv 2401.18079, sections 3.1 to
    3.4), from ``samples`` pieces of ``tokens`` of the text.

    For 2, 3 and 4 bits, with the share ``outliers`` of the numbers apart and without: ``keys.apart.center`` and
    ``keys.apart.half`` (fp32 [layers, K * D]), ``keys.apart.levels4`` (fp32 [layers, 16]) and so on, and in place of
    ``apart`` too ``whole``, in place of ``keys`` ``values`` (which have no ranges), and for two bits ``read2`` beside
    ``levels2``: what Q-Norm reads the levels as. Levels are the centers of weighted k-means, at most ``rounds`` long,
    over the numbers with their ranges at [-1, 1], weighted by the squared gradient of the loss with respect to them.
    The first token of each sample is left out.
    """

    samples: int = 8
    tokens: int = 512
    outliers: float = 0.01
    rounds: int = 50

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        spec = ModelSpec.from_config(model.config, model.dtype)
        steps, read = self.samples + len(spec.layers), []
        for done, ids in enumerate(samples(tokenizer, text, self.samples, self.tokens), 1):
            read.append(reading(model, spec, ids, gradients=True))
            progress(done, steps)
        found = []
        for done, layer in enumerate(zip(*read, strict=True), 1):
            found.append(self.of_layer(layer))
            progress(self.samples + done, steps)
        return {name: torch.stack([layer[name] for layer in found]) for name in found[0]}

    def of_layer(self, read: Sequence[Read]) -> dict[str, Tensor]:
        """The tensors of one layer, from what it was in each sample."""
        tensors: dict[str, Tensor] = {}
        for side in ("keys", "values"):
            numbers, weight = (
                torch.cat([getattr(part, name)[1:] for part in read]) for name in (side, f"{side}_weight")
            )
            for kind, share in (("apart", self.outliers), ("whole", 0.0)):
                if side == "keys":
                    center, half, apart = channel_ranges(numbers, share)
                    tensors |= {f"keys.{kind}.center": center, f"keys.{kind}.half": half}
                else:
                    center, half, apart = token_ranges(numbers, share)
                scaled = torch.where(half > 0, (numbers - center) / half, 0)[~apart].clamp(-1, 1)
                for bits in BITS:
                    levels = nearest_levels(scaled, weight[~apart], 2**bits, self.rounds)
                    tensors[f"{side}.{kind}.levels{bits}"] = levels
                tensors[f"{side}.{kind}.read2"] = matched(scaled, tensors[f"{side}.{kind}.levels2"])
        return tensors


def channel_ranges(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centers and half widths ([size]) of the channels of ``x`` ([tokens, size]), and which numbers (bool [tokens,
    size]) are left out: of each token those that lie farthest out, in terms of the quantiles ``share / 2`` and ``1 -
    share / 2`` of their channels. The ranges are those of the others."""
    ordered, rank = x.sort(0).values, share / 2 * (x.shape[0] - 1)
    first, part = int(rank), rank - int(rank)
    low = ordered[first].lerp(ordered[min(first + 1, x.shape[0] - 1)], part)
    high = ordered[-1 - first].lerp(ordered[max(-2 - first, -x.shape[0])], part)
    center, half = (high + low) / 2, (high - low) / 2
    distance = torch.where(half > 0, (x - center).abs() / half, 0)
    farthest = distance.topk(exact_numbers(share, x.shape[1]), dim=1, sorted=False).indices
    apart = torch.zeros_like(x, dtype=torch.bool).scatter(1, farthest, True)
    # A channel that is apart in every token has nothing to be read by a level; its quantiles will do.
    some = ~apart.all(0)
    low = torch.where(some, x.masked_fill(apart, torch.inf).amin(0), low)
    high = torch.where(some, x.masked_fill(apart, -torch.inf).amax(0), high)
    return (high + low) / 2, (high - low) / 2, apart


def token_ranges(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the tokens of ``x``: centers and half widths are [tokens, 1], those of what lies between the
    outermost numbers at either end."""
    each = exact_numbers(share, x.shape[1]) // 2
    order = x.argsort(1)
    outer = torch.cat([order[:, :each], order[:, x.shape[1] - each :]], 1)
    apart = torch.zeros_like(x, dtype=torch.bool).scatter(1, outer, True)
    low = x.masked_fill(apart, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(apart, -torch.inf).amax(1, keepdim=True)
    return (high + low) / 2, (high - low) / 2, apart


def nearest_levels(x: Tensor, weight: Tensor, count: int, rounds: int) -> Tensor:
    """``count`` levels in ascending order with a small sum of ``weight`` times squared distance from ``x`` ([n] in [-1,
    1]) to the nearest: Lloyd's iteration from equal distances, and from equal numbers; the better of both. fp32."""
    x, order = x.double().sort()
    sums = torch.stack([w.cumsum(0) for w in _moments(x, weight.double()[order])])
    sums = torch.nn.functional.pad(sums, (1, 0))
    parts = torch.arange(count, dtype=torch.float64)
    starts = (2 * parts / (count - 1) - 1, x[((parts + 0.5) / count * x.numel()).long()])
    found = [_refined(start, x, sums, rounds) for start in starts]
    return min(found, key=lambda levels: _error(levels, x, sums)).float()


def matched(x: Tensor, levels: Tensor) -> Tensor:
    """The levels moved and stretched so that what is read has the mean and the deviation of ``x`` (section 3.6,
    Q-Norm)."""
    coded = levels[torch.searchsorted(_borders(levels), x)]
    stretch = x.std() / coded.std().clamp(min=torch.finfo(x.dtype).tiny)
    return levels * stretch + (x.mean() - coded.mean() * stretch)


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight, weight * x, weight * x * x


def _refined(levels: Tensor, x: Tensor, sums: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        weight, first, _ = _within(levels, x, sums)
        better = torch.where(weight > 0, first / weight, levels)
        if torch.equal(better, levels):
            break
        levels = better
    return levels


def _error(levels: Tensor, x: Tensor, sums: Tensor) -> float:
    weight, first, second = _within(levels, x, sums)
    return float((second - 2 * levels * first + levels * levels * weight).sum())


def _within(levels: Tensor, x: Tensor, sums: Tensor) -> Tensor:
    """Of what is nearest to each level the sums of weight, weight * x and weight * x * x, [3, levels]."""
    borders = torch.searchsorted(x, _borders(levels))
    edges = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), x.numel())])
    return sums[:, edges].diff(dim=1)


def _borders(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2
