"""Attention mass with noise and a temperature, against the bias of entries that have gone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import ColumnType
from .hashing import mixed
from .observing import Columns, ObservingScore
from .view import Observation


@dataclass(frozen=True)
class PerturbedMass(ObservingScore):
    """Accumulated mass of softmax((logits + Gumbel noise) / temperature), averaged over a KV head's query heads.

    Keyformer (arXiv 2403.09054, section 3). The temperature is ``first`` in prompts and grows to ``last`` in ``steps``
    decoding steps. The noise, ``noise`` times standard Gumbel, is a function of ``seed``, the layer, the query head and
    the positions of query and key: the same in every run, alone or in a batch.
    """

    first: float
    last: float
    steps: int
    noise: float
    seed: int

    @property
    def columns(self) -> Mapping[str, ColumnType]:
        return {"mass": torch.float32}

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        paid = observation.paid.probabilities
        temperature = self.first + (self.last - self.first) * (observation.decoded / self.steps).clamp(max=1)
        logits = paid.log()  # up to a constant for each query, which the softmax takes out again
        if self.noise:
            logits += self.noise * self._gumbel(observation, columns["position"], paid.shape[2])
        perturbed = (logits / temperature.view(-1, 1, 1, 1, 1)).softmax(-1)
        reads = (paid > 0).any(-1, keepdim=True)
        return {"mass": columns["mass"] + perturbed.where(reads, 0).sum(3).mean(2)}

    def stored(self, columns: Columns, seen: Tensor) -> Tensor:
        return columns["mass"]

    def _gumbel(self, observation: Observation, entries: Tensor, group: int) -> Tensor:
        """Noise for each query and entry, [B, K, G, q, n]."""
        kv_heads = entries.shape[1]
        heads = torch.arange(kv_heads * group, device=entries.device, dtype=torch.int32).view(1, kv_heads, group, 1)
        stream = mixed(heads + (observation.layer * 40503 + self.seed * 97))
        rows = mixed(stream + observation.queries.int()[:, None, None] * 0x27D4EB2F)
        hashed = mixed(rows[..., None] + entries.int()[:, :, None, None] * 0x165667B1)
        uniform = ((hashed >> 9 & 0x7FFFFF).float() + 0.5) / 2**23  # never 0 or 1 in fp32
        return -(-uniform.log()).log()
