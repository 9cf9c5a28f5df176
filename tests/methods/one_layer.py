"""One layer's entries under a recipe, driven with random queries, keys and values, for comparison with plain loops."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kvarn
from kvarn.attention import Variant
from kvarn.attention.rotary import Rotary
from kvarn.layers import Fresh, Step, new_group
from kvarn.memory import Arena
from kvarn.methods import Method
from kvarn.spec import LayerSpec
from tiny_models import make_tiny

SIZE, KV_HEADS, GROUP = 16, 2, 2
LAYER = LayerSpec(KV_HEADS * GROUP, KV_HEADS, SIZE, SIZE, None)
VARIANT = Variant(SIZE**-0.5)


class OneLayer:
    """A group of one layer and one sequence; ``capacity`` entries a head. Keys are rotated as in Llama."""

    def __init__(self, recipe: str | Method | kvarn.Recipe, capacity: int = 10**9, device: str = "cpu"):
        parsed, arena = kvarn.Recipe.parse(recipe), Arena(torch.device(device), 4)
        before_rope = parsed.layout(LAYER, torch.float32, arena.page_size).before_rope
        rotary = Rotary(make_tiny("llama").to(device)) if before_rope else None
        self.group = new_group(parsed, [0], LAYER, torch.float32, arena, 1, rotary)
        self.group.capacity = torch.full_like(self.group.capacity, capacity)
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

    def _step(self, keys: Tensor, ends: Tensor | None = None) -> Step:
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


@dataclass(eq=False)
class Entry:
    """What a naive head holds of a token."""

    position: int
    key: Tensor
    value: Tensor
    mass: float = 0.0


class NaiveHead:
    """One KV head in plain loops: all queries of a prompt are observed, then it is reduced; then token by token.

    What is observed is the mean of the head's query heads; here it is added up, as in H2O."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def observe(self, entry: Entry, paid: float, read: int, now: int) -> None:
        """The query at ``now``, which reads ``read`` entries, pays so much to ``entry``."""
        entry.mass += paid

    def reduce(self, seen: int) -> None:
        """Lets go of what is too much after ``seen`` tokens."""
        raise NotImplementedError

    def attend(self, queries: Tensor, now: int) -> None:
        read = [entry for entry in self.entries if entry.position <= now]
        keys = torch.stack([entry.key for entry in read])
        rows = [probabilities(query, keys) for query in queries]
        for index, entry in enumerate(read):
            self.observe(entry, sum(row[index] for row in rows) / len(rows), len(read), now)

    def run(self, queries: Tensor, keys: Tensor, values: Tensor, prompt: int) -> Iterator[None]:
        """Yields after the prompt and after every token. ``queries`` are [GROUP, n, SIZE], the others [n, SIZE]."""
        for position in range(prompt):
            self.entries.append(Entry(position, keys[position], values[position]))
        for position in range(prompt):
            self.attend(queries[:, position], position)
        self.reduce(prompt)
        yield
        for position in range(prompt, keys.shape[0]):
            self.entries.append(Entry(position, keys[position], values[position]))
            self.attend(queries[:, position], position)
            self.reduce(position + 1)
            yield


def in_step(
    layer: OneLayer, naive: Sequence[NaiveHead], tokens: tuple[Tensor, Tensor, Tensor], prompt: int
) -> Iterator[None]:
    """Drives a layer and a naive restatement of each of its KV heads; after each step they hold the same tokens."""
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    runs = [head.run(queries[h], tokens[1][0, h], tokens[2][0, h], prompt) for h, head in enumerate(naive)]
    for taken, _ in enumerate(zip(*runs, strict=True)):
        first = 0 if taken == 0 else prompt + taken - 1
        (layer.prompt if taken == 0 else layer.token)(*split(tokens, first, prompt + taken))
        assert layer.positions() == [[entry.position for entry in head.entries] for head in naive]
        yield


def assert_same_rows(layer: OneLayer, naive: Sequence[NaiveHead], tolerance: float = 1e-4) -> None:
    """The layer's keys and values are those of the naive heads."""
    for mine, side in zip(layer.keys_and_values(), ("key", "value"), strict=True):
        for rows, positions, head in zip(mine, layer._rows("position"), naive, strict=True):
            expected = {entry.position: getattr(entry, side) for entry in head.entries}
            wanted = torch.stack([expected[position] for position in positions])
            torch.testing.assert_close(rows[: len(positions)], wanted, rtol=10 * tolerance, atol=tolerance)
