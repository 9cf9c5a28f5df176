"""The mean key of each head before its rotation by position."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Calibration, Progress
from ..spec import ModelSpec
from .reading import reading, samples


@dataclass(frozen=True)
class KeyMeans(Calibration):
    """Means over ``samples`` pieces of ``tokens`` of the text: ``means``, fp32 [layers, K * D].

    Orders of channels by their sums, after any rotation that is linear, follow from them.
    """

    samples: int = 8
    tokens: int = 512

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        spec = ModelSpec.from_config(model.config, model.dtype)
        sums = torch.zeros(len(spec.layers), spec.layers[0].joint.key_size)
        for done, ids in enumerate(samples(tokenizer, text, self.samples, self.tokens), 1):
            sums += torch.stack([read.keys.mean(0) for read in reading(model, spec, ids, gradients=False)])
            progress(done, self.samples)
        return {"means": sums / self.samples}
