"""Which layers suffer when a prompt is read in blocks (EpiCache, arXiv 2509.17396)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import Part, Variant, attend
from ..attention.probe import attending
from ..calibration import Calibration, Progress
from ..errors import CalibrationError
from ..spec import LayerSpec, ModelSpec

LEAST_SHARE = 0.25  # of the mean, whatever a layer's sensitivity


@dataclass(frozen=True)
class LayerSensitivity(Calibration):
    """How alike a layer's keys are when the model reads ``tokens`` of a text with full attention and in blocks.

    In the second reading the tokens of a block of ``block`` tokens see the first ``sinks`` tokens, the last half block
    before theirs, and their own block. ``similarity`` (fp32 [layers]): the mean over KV heads and windows of ``window``
    tokens of the cosine between all keys of a window in the one and the other; NaN for layers with a sliding window.
    """

    tokens: int = 16384
    block: int = 4096
    sinks: int = 128
    window: int = 100

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        ids = tokenizer(text, add_special_tokens=True, verbose=False).input_ids[: self._tokens(model)]
        if len(ids) <= self.block:
            raise CalibrationError(f"the text has {len(ids)} tokens, and more than a block of {self.block} are needed")
        return {"similarity": self.similarity(model, torch.tensor(ids), progress)}

    def similarity(self, model: PreTrainedModel, ids: Tensor, progress: Progress) -> Tensor:
        """Of all layers for one text, int64 [n]: fp32 [layers] on the CPU."""
        spec = ModelSpec.from_config(model.config, model.dtype)
        found: list[Tensor] = []

        def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
            sliding = spec.layers[layer].window is not None
            found.append(torch.tensor(torch.nan) if sliding else self._alike(*keys.float()).cpu())
            progress(layer + 1, len(spec.layers))
            # Both readings are one batch, so that no layer's keys have to be kept for the other.
            rows = zip(query.split(1), keys.split(1), values.split(1), (True, False), strict=True)
            return torch.cat([self._read(q, k, v, variant, spec.layers[layer], whole) for q, k, v, whole in rows])

        with torch.no_grad(), attending(model, attention):
            model.base_model(ids.to(model.device).expand(2, -1), use_cache=False)
        return torch.stack(found)

    def _tokens(self, model: PreTrainedModel) -> int:
        limit = ModelSpec.from_config(model.config, model.dtype).max_positions
        return self.tokens if limit is None else min(self.tokens, limit)

    def _read(
        self, query: Tensor, keys: Tensor, values: Tensor, variant: Variant, layer: LayerSpec, whole: bool
    ) -> Tensor:
        """Attention of one reading, block by block: [1, H, n, D]."""
        out = []
        for start in range(0, query.shape[2], self.block):
            end = min(start + self.block, query.shape[2])
            first = 0 if whole else max(start - self.block // 2, 0)
            seen = torch.arange(end, device=keys.device)
            seen = seen[(seen >= first) | (seen < self.sinks)]
            if layer.window is not None:
                rows = torch.arange(start, end, device=keys.device)[:, None]
                mask = ((seen <= rows) & (seen > rows - layer.window))[None, None]
                part = Part(keys[:, :, seen], values[:, :, seen], mask)
            else:
                part = Part(keys[:, :, seen], values[:, :, seen], causal=True)
            out.append(attend(query[:, :, start:end], [part], variant))
        return torch.cat(out, 2)

    def _alike(self, one: Tensor, other: Tensor) -> Tensor:
        """The similarity of keys [K, n, D] and [K, n, D]; what does not fill a window is left out."""
        full = one.shape[1] // self.window * self.window
        one, other = (x[:, :full].unflatten(1, (-1, self.window)).flatten(2) for x in (one, other))
        return cosine_similarity(one, other, dim=-1).mean()


def sensitive_shares(similarity: Tensor, power: float) -> Tensor:
    """What layers share in, float64 [layers, 1, 1] of a mean of one over those that are known (not NaN): in proportion
    to (1 - u)^``power``, u being the similarity between the least and the largest, but at least a quarter of the mean.
    """
    known = similarity.isfinite()
    least, most = similarity[known].min(), similarity[known].max()
    weight = torch.ones_like(similarity, dtype=torch.float64)
    if most > least:
        weight[known] = (1 - (similarity[known].double() - least) / (most - least)) ** power
    shares = (weight / weight[known].mean()).clamp(min=LEAST_SHARE)
    return (shares / shares[known].mean())[:, None, None]
