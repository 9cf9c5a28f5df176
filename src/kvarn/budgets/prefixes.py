"""How many of its most important tokens each layer keeps: prefixes of one threshold (PrefixKV, arXiv 2412.03409)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import Variant, attend_with_mass
from ..attention.probe import attending, causal
from ..calibration import Calibration, Progress
from ..errors import CalibrationError
from ..spec import ModelSpec
from .policy import Heads, Policy, highest

_THRESHOLDS = 1 << 40  # levels of the search for a threshold from 0 to 1


@dataclass(frozen=True, eq=False)
class Prefixes(Policy):
    """Layers keep shares of a prompt's tokens as a table says: row i of ``kept`` (float64 [steps + 1, layers], rising
    from 0 to 1) where i / steps of all entries are kept.

    Between its rows the table is interpolated. Beyond the prompt's tokens all heads have the same room. Without a
    budget the ``share`` of all entries is kept.
    """

    kept: Tensor
    share: float

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, heads.layers * most)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        steps = self.kept.shape[0] - 1
        share = level.double() / (heads.layers * heads.lengths).clamp(min=1)
        row = share.clamp(max=1) * steps
        below = row.long().clamp(max=steps - 1)
        low, high = self.kept[below], self.kept[below + 1]
        kept = low + (row - below)[:, None] * (high - low) + (share - 1).clamp(min=0)[:, None]
        entries = (kept * heads.lengths[:, None]).round().long()
        return entries.T[..., None].expand(-1, -1, heads.kv_heads)

    def unasked(self, heads: Heads) -> Tensor:
        return (self.share * heads.layers * heads.lengths).long()


@dataclass(frozen=True)
class PrefixSearch(Calibration):
    """Finds for each share of all entries how it is divided over the layers, on average over passages of a text.

    A layer's tokens are ranked by the attention that they receive from all queries of a passage, averaged over heads.
    For a threshold p every layer keeps the fewest first ones of its ranking that together receive p of all that its
    tokens receive; p is found by bisection so that all layers together keep a given share (section 3.3). ``samples``
    passages of ``tokens`` tokens, spread evenly over the text; ``steps`` shares from 0 to 1.
    """

    samples: int = 10
    tokens: int = 512
    steps: int = 100

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        read = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if read.numel() < self.tokens:
            raise CalibrationError(f"the text has {read.numel()} tokens, and {self.tokens} are needed")
        found = []
        for start in torch.linspace(0, read.numel() - self.tokens, self.samples).long().tolist():
            found.append(self.divided(self.importance(model, read[None, start : start + self.tokens])))
            progress(len(found), self.samples)
        return {"kept": torch.stack(found).mean(0)}

    def importance(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """The attention that each token of ``ids`` (int64 [1, n]) receives in each layer, fp32 [layers, n] on the CPU;
        the same for all tokens in layers with a sliding window, which keep their tokens anyway."""
        spec = ModelSpec.from_config(model.config, model.dtype)
        received: list[Tensor] = []

        def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
            window = spec.layers[layer].window
            out, (mass,) = attend_with_mass(query, [causal(keys, values, window)], variant)
            mean = mass[0].mean((0, 1)).cpu()
            received.append(mean if window is None else torch.ones_like(mean))
            return out

        with torch.no_grad(), attending(model, attention):
            model.base_model(ids.to(model.device), use_cache=False)
        return torch.stack(received)

    def divided(self, importance: Tensor) -> Tensor:
        """The share of its tokens that each layer keeps, for each share of all: float64 [steps + 1, layers]."""
        layers, tokens = importance.shape
        curves = importance.double().sort(dim=1, descending=True).values.cumsum(1)
        curves = curves / curves[:, -1:]
        allowed = torch.arange(self.steps + 1) * layers * tokens // self.steps

        def prefixes(threshold: Tensor) -> Tensor:
            wanted = (threshold.double() / _THRESHOLDS).expand(layers, -1).contiguous()
            return (torch.searchsorted(curves, wanted) + 1).clamp(max=tokens)

        best = highest(lambda threshold: prefixes(threshold).sum(0) <= allowed, torch.full_like(allowed, _THRESHOLDS))
        kept = prefixes(best).T.double() / tokens
        kept[0], kept[-1] = 0, 1
        return kept
