"""One layer's entries under a recipe, driven with random queries, keys and values, for comparison with plain loops."""

import math

import torch
from torch import Tensor

import kvarn
from kvarn.attention import Variant
from kvarn.attention.rotary import Rotary
from kvarn.group import Fresh, LayerGroup, Step
from kvarn.joint_group import JointGroup
from kvarn.memory import Arena
from kvarn.methods import Method
from kvarn.spec import LayerSpec
from kvarn.tiered_group import TieredGroup
from tiny_models import make_tiny

SIZE, KV_HEADS, GROUP = 16, 2, 2
LAYER = LayerSpec(KV_HEADS * GROUP, KV_HEADS, SIZE, SIZE, None)
VARIANT = Variant(SIZE**-0.5)


class OneLayer:
    """A group of one layer and one sequence; ``capacity`` entries a head. Keys are rotated as in Llama."""

    def __init__(self, recipe: str | Method | kvarn.Recipe, capacity: int = 10**9, device: str = "cpu"):
        parsed = kvarn.Recipe.parse(recipe)
        layout = parsed.layout(LAYER, torch.float32, page_size=4)
        eviction = parsed.eviction(LAYER, torch.float32)
        arena, precision = Arena(torch.device(device), 4), parsed.precision(LAYER, torch.float32)
        rotary = Rotary(make_tiny("llama")) if layout.before_rope else None
        if parsed.joins:
            self.group = JointGroup([0], LAYER, layout, parsed.exemption, arena, 1, rotary)
        elif precision:
            self.group = TieredGroup([0], LAYER, layout, eviction, precision, arena, 1, rotary)
        else:
            self.group = LayerGroup([0], LAYER, layout, eviction, arena, 1, rotary)
        if selection := parsed.selection(LAYER):
            self.group.select(selection, parsed.alike(LAYER, torch.float32), torch.float32)
        self.group.capacity = torch.full((1, 1, KV_HEADS), capacity)
        self.seen = 0

    def prompt(self, query: Tensor, keys: Tensor, values: Tensor, ends: Tensor | None = None) -> Tensor:
        out = self.group.prompt(0, Fresh(query, keys, values, self._step(keys, ends), VARIANT))
        self.group.end_prompt()
        return out

    def token(self, query: Tensor, keys: Tensor, values: Tensor, ends: Tensor | None = None) -> Tensor:
        step = self._step(keys, ends)
        self.group.begin_token(step)
        out = self.group.token(0, Fresh(query, keys, values, step, VARIANT))
        self.group.end_token(step)
        return out

    def positions(self) -> list[list[int]]:
        """The positions of the entries of each head, ascending."""
        return [sorted(row) for row in self._rows("position")]

    def by_position(self, name: str) -> list[dict[int, float]]:
        """A column of each head, by position."""
        pairs = zip(self._rows("position"), self._rows(name), strict=True)
        return [dict(zip(positions, column, strict=True)) for positions, column in pairs]

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """What is read: [KV heads, n, SIZE] each; [1, n, KV heads * SIZE] where the heads of a layer are one row."""
        return self.group.store.read(self.group.everyone)

    def _rows(self, name: str) -> list[list]:
        rows = self.group.store.read_column(self.group.everyone, name)
        return [row[:n].tolist() for row, n in zip(rows, self.group.store.lengths.tolist(), strict=True)]

    def _step(self, keys: Tensor, ends: Tensor | None) -> Step:
        before, self.seen = self.seen, self.seen + keys.shape[2]
        positions = torch.arange(before, self.seen, device=keys.device)[None]
        return Step(positions, torch.tensor([before]), torch.tensor([self.seen]), False, ends=ends)


def random_tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, H, count, SIZE], keys and values [1, K, count, SIZE]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return tuple(2 * torch.randn(1, heads, count, SIZE, generator=generator) for heads in shapes)


def split(tokens: tuple[Tensor, ...], first: int, last: int) -> list[Tensor]:
    return [t[:, :, first:last] for t in tokens]


def probabilities(query: Tensor, keys: Tensor) -> list[float]:
    """Softmax of one query ([SIZE]) over keys ([n, SIZE]), in plain loops."""
    logits = [sum(float(a) * float(b) for a, b in zip(query, key, strict=True)) / math.sqrt(SIZE) for key in keys]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]
