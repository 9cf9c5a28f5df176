"""xKV: neighbouring layers share the subspace that a prompt's keys and values lie in."""

from dataclasses import dataclass

from ..bundles import SharedSubspace
from ..errors import RecipeError
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class XKV(Method):
    """Of ``layers`` neighbouring layers, keeps a prompt's keys before their rotation, and its values, by one low-rank
    factorization each: coordinates for each token, shared by the layers, and a basis for each sequence.

    The rank is the share ``keys`` (and ``values``) of the numbers in a token's keys of all these layers: the defaults
    are the paper's 512 and 768 for the 4096 of four layers of Llama 3.1 8B. Generated tokens stay exact until a later
    prompt comes; then everything is factorized anew. Neighbours that are fewer share a subspace too.
    """

    layers: int = 4
    keys: float = 0.125
    values: float = 0.1875

    name = "xkv"
    family = "cross-layer"
    acts = "end of prompt"
    needs = "keys before their rotation"
    citation = "xKV: Cross-Layer SVD for KV-Cache Compression, 2025, arXiv 2503.18893"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise RecipeError(f"{self}: layers is at least 1")
        if not 0 < self.keys <= 1 or not 0 < self.values <= 1:
            raise RecipeError(f"{self}: keys and values are shares above 0 and at most 1")

    def bundle(self) -> SharedSubspace:
        return SharedSubspace(
            self.layers,
            partial=True,
            by_prompt=True,
            all_heads=True,
            before_rope=True,
            keys=self.keys,
            values=self.values,
        )

    def told_apart(self, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        return self.bundle().told_apart(layers)
