"""MiniCache: neighbouring layers share the directions of their keys and values."""

from dataclasses import dataclass
from typing import Literal

from ..bundles import SharedDirections
from ..errors import RecipeError
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class MiniCache(Method):
    """From the share ``start`` of the layers on, two layers keep one direction and two lengths for each of a token's
    keys and values.

    The direction lies at ``interpolation`` of the arc from the shallower layer's to the deeper's. Entries whose angle
    is within the share ``gamma`` of a head's range of angles below its largest are retained: both layers keep theirs as
    they are. The first prompt sets that bound. ``judged_by``: whose angles retain an entry; with ``either``, its key's
    or its value's. At most the share ``most`` of the entries is retained, those with the largest angles.
    """

    start: float = 0.5
    interpolation: float = 0.6
    gamma: float = 0.05
    judged_by: Literal["either", "keys", "values"] = "either"
    most: float = 0.05

    name = "minicache"
    family = "cross-layer"
    acts = "end of prompt, every decoding step"
    needs = "nothing"
    citation = "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models, 2024, arXiv 2405.14366"

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise RecipeError(f"{self}: needs 0 <= start < 1")
        if not 0 <= self.interpolation <= 1 or not 0 <= self.gamma <= 1 or not 0 <= self.most <= 1:
            raise RecipeError(f"{self}: interpolation, gamma and most are between 0 and 1")
        if self.judged_by not in ("either", "keys", "values"):
            raise RecipeError(f"{self}: judged_by is 'either', 'keys' or 'values'")

    def bundle(self) -> SharedDirections:
        return SharedDirections(
            2,
            self.start,
            exact_share=self.most,
            interpolation=self.interpolation,
            key_gamma=None if self.judged_by == "values" else self.gamma,
            value_gamma=None if self.judged_by == "keys" else self.gamma,
        )

    def told_apart(self, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        return self.bundle().told_apart(layers)
