"""Recipes: read, written, composed, and resolved into plans."""

import ast
import difflib
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from . import rematerialization
from .budgets import uniform
from .errors import BudgetError, RecipeError
from .formats import Columns, Dense
from .memory import SideLayout, StoreLayout
from .methods import METHODS, Method
from .methods.base import default_of
from .prefill import Propagation
from .reduction import Eviction
from .spec import LayerSpec, ModelSpec

Budget = float | int | str | None

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DECISIONS = {
    "keep": "what to keep",
    "encode": "in which format",
    "carry": "which tokens go on to later layers",
}


@dataclass(frozen=True)
class Recipe:
    """A composition of methods, ``SnapKV() + KIVI(bits=2)`` or ``Recipe.parse("snapkv + kivi(bits=2)")``.

    Raises RecipeError where two methods make the same decision.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        owner: dict[str, Method] = {}
        for method in self.methods:
            for decision in sorted(method.decides()):
                if decision in owner:
                    raise RecipeError(
                        f"{owner[decision]} and {method} cannot act together: both decide {_DECISIONS[decision]}; "
                        "leave one of them out"
                    )
                owner[decision] = method

    @classmethod
    def parse(cls, text: "str | Method | Recipe") -> "Recipe":
        """Reads ``"name(parameter=value, …) + …"``; methods and recipes pass through. Raises RecipeError."""
        if isinstance(text, Recipe):
            return text
        if isinstance(text, Method):
            return cls((text,))
        if not isinstance(text, str):
            raise RecipeError(f"a recipe is a string, a Method or a Recipe, not {text!r}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise _unreadable(text) from error
        return cls(tuple(_method(node, text) for node in _summands(tree)))

    def __add__(self, other: "Method | Recipe") -> "Recipe":
        return Recipe(self.methods + Recipe.parse(other).methods)

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))

    @property
    def names(self) -> list[str]:
        return [method.name for method in self.methods]

    def eviction(self, layer: LayerSpec, dtype: torch.dtype) -> Eviction | None:
        """What decides which entries of ``layer`` stay; None where all do. Layers with a sliding window are bounded
        by the window, so methods leave them alone."""
        eviction = next((e for m in self.methods if (e := m.eviction())), None)
        if eviction is None or layer.window is not None or eviction.interval is not None:
            return eviction if layer.window is None else None
        return replace(eviction, interval=max(side.format.unit for side in self._sides(layer, dtype)))

    @property
    def propagation(self) -> Propagation | None:
        """Which tokens of a first prompt go on beyond some layer; None: all."""
        return next((p for m in self.methods if (p := m.propagation())), None)

    @property
    def rematerializes(self) -> bool:
        """Whether layers with full attention keep their inputs in place of keys and values."""
        return any(type(method).rows is not Method.rows for method in self.methods)

    def kept(self, layer: LayerSpec) -> LayerSpec:
        """``layer`` as the store holds it."""
        if layer.window is not None:
            return layer
        return next((rows for m in self.methods if (rows := m.rows(layer))), layer)

    def layout(self, layer: LayerSpec, dtype: torch.dtype, page_size: int) -> StoreLayout:
        """How the entries of ``layer`` are kept."""
        keys, values = self._sides(layer, dtype)
        eviction = self.eviction(layer, dtype)
        return StoreLayout(keys, values, Columns(eviction.columns) if eviction else None, page_size)

    def state_bytes(self, spec: ModelSpec) -> int:
        """Bytes kept for the layers of a model, whatever the tokens."""
        if not self.rematerializes:
            return 0
        return sum(rematerialization.state_bytes(layer, spec.dtype) for layer in spec.layers if layer.window is None)

    def resolve(self, spec: ModelSpec, budget: Budget, lengths: list[int], page_size: int = 16) -> "Plan":
        """The plan for sequences of ``lengths`` tokens under ``budget``; raises BudgetError, naming the least.

        ``budget``: a float is a share of the dense bytes of the same tokens; a string ("64MiB") is bytes for all
        sequences together; an int is entries a head on average; None leaves it to the method.
        """
        resolver = _Resolver(self, spec, page_size)
        allowed = _allowed_bytes(budget, spec, lengths)
        capacities = [resolver.capacity(budget, length, a) for length, a in zip(lengths, allowed, strict=True)]
        return Plan(
            capacities, [resolver.bytes(min(c, n), n) for c, n in zip(capacities, lengths, strict=True)], allowed
        )

    def _sides(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        layer = self.kept(layer)
        if layer.window is None:
            for method in self.methods:
                if sides := method.encoding(layer, dtype):
                    return sides
        keys, values = Dense(layer.key_size, dtype), Dense(layer.value_size, dtype)
        return SideLayout(keys, keys), SideLayout(values, values)


@dataclass(frozen=True)
class Plan:
    """A recipe with its budget resolved for one model and the lengths of its sequences.

    For each sequence: ``entries``, how many a KV head of a full-attention layer may hold; ``bytes``, what all heads
    take at the end of the prompt; ``allowed``, the bytes that the budget allows (None: no budget in bytes).
    """

    entries: list[int]
    bytes: list[int]
    allowed: list[int | None]


@dataclass(frozen=True)
class _Resolver:
    recipe: Recipe
    spec: ModelSpec
    page_size: int

    def capacity(self, budget: Budget, length: int, allowed: int | None) -> int:
        eviction = next((e for layer in self.spec.layers if (e := self._eviction(layer))), None)
        if eviction is None:
            return self._everything(budget, length, allowed)
        least = min(eviction.least, length)
        if allowed is None:
            entries = self._entries(budget, eviction, length)
            if entries < least:
                raise BudgetError(f"{self.recipe} needs at least {least} entries a head; the budget is {entries}")
            return entries
        most = max(length, self.spec.max_positions or 0)
        entries = uniform(lambda n: self._growing(n) + self._fixed(length), allowed, most, always=eviction.decode)
        if entries < least:
            self._require(self.bytes(least, length), allowed, length)
        return max(entries, least)

    def bytes(self, entries: int, length: int) -> int:
        """Bytes of one sequence of ``length`` tokens that keeps ``entries`` a head where the recipe evicts."""
        return int(self._growing(torch.tensor([entries]))[0]) + self._fixed(length)

    def _everything(self, budget: Budget, length: int, allowed: int | None) -> int:
        if isinstance(budget, int) and budget < length:
            raise BudgetError(f"{self.recipe} evicts nothing and needs {length} entries a head; the budget is {budget}")
        # A share of 1 or more asks for nothing to be saved, so it does not fail for the bookkeeping.
        if allowed is not None and not (isinstance(budget, float) and budget >= 1):
            self._require(self.bytes(length, length), allowed, length)
        return length

    def _entries(self, budget: Budget, eviction: Eviction, length: int) -> int:
        if isinstance(budget, int):
            return budget
        if isinstance(eviction.default, float):
            return max(int(eviction.default * length), eviction.least)
        return eviction.default

    def _require(self, needed: int, allowed: int, length: int) -> None:
        """An open page a head is beyond the budget; anything more is an error."""
        if needed > allowed + self._open_pages():
            dense = self.spec.dense_bytes(length)
            raise BudgetError(
                f"{self.recipe} needs at least {needed:,} bytes for {length} tokens ({needed / dense:.3f} of the dense "
                f"{dense:,}); the budget allows {allowed:,}"
            )

    def _growing(self, entries: Tensor) -> Tensor:
        """Bytes of all layers with full attention, each head holding ``entries``."""
        return self._sum(lambda layer, layout: layout.bytes(entries) if layer.window is None else 0 * entries)

    def _fixed(self, length: int) -> int:
        """Bytes of all layers with a sliding window, and of what is kept for layers themselves."""
        zero = torch.zeros(1, dtype=torch.int64)
        return self.recipe.state_bytes(self.spec) + int(
            self._sum(
                lambda layer, layout: zero if layer.window is None else layout.bytes(zero + layer.kept_dense(length))
            )
        )

    def _open_pages(self) -> int:
        one = torch.ones(1, dtype=torch.int64)
        return int(self._sum(lambda layer, layout: layout.bytes(one)))

    def _sum(self, bytes_of: Any) -> Tensor:
        total = torch.zeros(1, dtype=torch.int64)
        for layer in set(self.spec.layers):
            layout = self.recipe.layout(layer, self.spec.dtype, self.page_size)
            total = total + self.spec.layers.count(layer) * self.recipe.kept(layer).kv_heads * bytes_of(layer, layout)
        return total

    def _eviction(self, layer: LayerSpec) -> Eviction | None:
        return self.recipe.eviction(layer, self.spec.dtype)


def parse_bytes(text: str) -> int:
    """``"64MiB"``, ``"1.5 GB"``, ``"4096"`` -> bytes; raises BudgetError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or (match[2] or "B").upper() not in _UNITS:
        raise BudgetError(
            f"budget {text!r} is not a size: write a number and one of {', '.join(_UNITS)}, as in '64MiB'"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "B").upper()])


def parse_budget(text: str) -> Budget:
    """``"512"`` is entries a head, ``"0.25"`` a share of the dense bytes, ``"64MiB"`` bytes. Raises BudgetError."""
    if re.fullmatch(r"[+-]?\d+", text):
        budget: Budget = int(text)
    elif re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)", text):
        budget = float(text)
    else:
        budget = text
    check_budget(budget)
    return budget


def check_budget(budget: Budget) -> None:
    """Raises BudgetError unless ``budget`` is a share above 0, a size, a number of entries above 0, or None."""
    if isinstance(budget, str):
        parse_bytes(budget)
    elif budget is not None and not (type(budget) in (int, float) and 0 < budget < math.inf):
        raise BudgetError(
            f"budget {budget!r}: give a float above 0 (share of the dense bytes), a size such as '64MiB', or an int "
            "above 0 (entries a head)"
        )


def _allowed_bytes(budget: Budget, spec: ModelSpec, lengths: list[int]) -> list[int | None]:
    check_budget(budget)
    if isinstance(budget, str):
        total = parse_bytes(budget)
        return [total // len(lengths)] * len(lengths)
    if isinstance(budget, float):
        return [int(budget * spec.dense_bytes(length)) for length in lengths]
    return [None] * len(lengths)


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _summands(node.left) + _summands(node.right)
    return [node]


def _method(node: ast.expr, text: str) -> Method:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise _unreadable(text)
    name = call.func.id
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}{_nearest(name, METHODS)}; the methods are {', '.join(METHODS)}")
    try:
        given = [(str(k.arg), ast.literal_eval(k.value)) for k in call.keywords]
    except (ValueError, TypeError) as error:
        raise _unreadable(text) from error
    if len(dict(given)) < len(given):
        raise RecipeError(f"{name} is given a parameter twice in {text!r}")
    return _made(METHODS[name], dict(given))


def _made(method: type[Method], given: dict[str, Any]) -> Method:
    known = {field.name: field for field in fields(method)}
    kinds = get_type_hints(method)
    for name, value in given.items():
        if name not in known:
            takes = ", ".join(known) or "none"
            raise RecipeError(f"{method.name} has no parameter {name!r}{_nearest(name, known)}; it takes {takes}")
        if not _is_a(value, kinds[name]):
            wanted = _kind_in_words(kinds[name])
            raise RecipeError(
                f"{method.name}({name}={value!r}): expected {wanted}, as in {name}={default_of(known[name])!r}"
            )
    return method(**given)


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a literal is of an annotated kind: a class, a union of classes or a Literal. Whole numbers are floats."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _unreadable(text: str) -> RecipeError:
    return RecipeError(f"cannot read the recipe {text!r}: write methods joined by '+', as in 'snapkv + kivi(bits=4)'")
