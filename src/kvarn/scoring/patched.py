"""What a text that follows the prompt attends to, though it is not kept."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import observed
from .scores import Score
from .view import PromptView


@dataclass(frozen=True)
class PatchedMass(Score):
    """The most that any query of another text pays to an entry, any of a KV head's query heads counted.

    EpiCache (arXiv 2509.17396), after KVzip (arXiv 2505.23416): the softmax runs over the candidates
    only, so the text's own keys take nothing. The cache gives the text; without one it is the last ``tail`` tokens of
    what was read.
    """

    tail: int

    def prompt(self, view: PromptView) -> Tensor:
        score = torch.zeros(view.positions.shape, device=view.query.device)
        for paid in observed(view.query, view.parts, replace(view.variant, sinks=None)):
            score = torch.maximum(score, paid.probabilities.amax((2, 3)))
        return score
