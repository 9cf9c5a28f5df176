"""Which heads look back at what was said before: echo and induction heads (RazorAttention, arXiv 2407.15891)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import Variant
from ..attention.probe import attending
from ..calibration import Calibration, Progress
from ..errors import Unsupported
from ..spec import ModelSpec


@dataclass(frozen=True)
class HeadSearch(Calibration):
    """Lets the model read a block of ``tokens`` random distinct tokens ``repeats`` times, and sees where heads look.

    A query head's echo score is the attention that a token from the second block on pays to the same token in earlier
    blocks, its induction score what it pays to the tokens right after those; a KV head has the best of its query heads.
    """

    tokens: int = 400
    repeats: int = 4
    seed: int = 0

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        spec = ModelSpec.from_config(model.config, model.dtype)
        scores: list[Tensor] = []

        def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
            if not variant.plain:
                raise Unsupported(f"{spec.architecture} soft-caps logits or has sinks: heads cannot be searched there")
            group = query.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
            place = torch.arange(keys.shape[2], device=keys.device)
            age = place[:, None] - place
            window = spec.layers[layer].window or keys.shape[2]
            logits = (query @ keys.transpose(-1, -2) * variant.scaling).float()
            weights = logits.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1)
            scores.append(self.scored(weights[0]).unflatten(1, (-1, group)).amax(2))
            progress(layer + 1, len(spec.layers))
            return weights.to(values.dtype) @ values

        with torch.no_grad(), attending(model, attention):
            model.base_model(self.sequence(model).to(model.device), use_cache=False)
        echo, induction = torch.stack(scores, 1).cpu()
        return {"echo": echo, "induction": induction}

    def sequence(self, model: PreTrainedModel) -> Tensor:
        """The first token of a text, then the blocks: int64 [1, 1 + repeats * tokens]."""
        generator = torch.Generator().manual_seed(self.seed)
        block = torch.randperm(model.config.get_text_config().vocab_size, generator=generator)[: self.tokens]
        first = model.config.get_text_config().bos_token_id or 0
        return torch.cat([torch.tensor([first]), block.repeat(self.repeats)])[None]

    def scored(self, weights: Tensor) -> Tensor:
        """Echo and induction scores of one layer's query heads: attention [H, n, n] -> [2, H]."""
        weights = weights[:, 1:, 1:]
        size = weights.shape[1] // self.repeats
        back = [size * times for times in range(1, self.repeats)]
        echo = [weights.diagonal(-distance, 1, 2).sum(1) for distance in back]
        # The first number of the second diagonal is of a query that has no earlier self so far back.
        induction = [weights.diagonal(1 - distance, 1, 2)[:, 1:].sum(1) for distance in back]
        return torch.stack([torch.stack(found).sum(0) for found in (echo, induction)]) / (weights.shape[1] - size)
