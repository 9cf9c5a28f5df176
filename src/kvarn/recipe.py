"""Recipes: read, written and composed."""

import ast
import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import rematerialization
from .budgets import Budget, Policy, Uniform
from .bundles import Bundle
from .calibration import calibrated
from .errors import RecipeError
from .formats import Columns, Dense, Narrow
from .memory import BoundedLayout, Layout, SideLayout, StoreLayout, TieredLayout
from .methods import METHODS, Method
from .methods.base import default_of
from .plan import Plan, Planner
from .prefill import Propagation
from .reduction import Eviction, Exemption, Merging, Precision
from .selection import Selection
from .spec import LayerSpec, ModelSpec

_DECISIONS = {
    "keep": "what to keep",
    "budget": "how much each head may keep",
    "channels": "which channels of the keys stay",
    "encode": "in which format",
    "select": "which entries a query reads",
    "carry": "which tokens go on to later layers",
    "share": "what neighbouring layers keep together",
    "read": "in which blocks a prompt is read",
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
        if "budget" in owner and "keep" not in owner:
            raise RecipeError(
                f"{owner['budget']} says how much each head may keep, and nothing here what: add a method that evicts, "
                "as in 'snapkv'"
            )
        if "select" in owner and owner["select"] is not owner.get("keep") and (self.rematerializes or self.joins):
            raise RecipeError(
                f"{owner['select']} reads some of the entries of a head, and {owner['keep']} reads the heads of a "
                "layer together: leave one of them out"
            )

        if "share" in owner:
            for method in self.methods:
                _refuse_apart(owner["share"], method)

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
        return Recipe(self.methods + methods_of(other))

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
        precision = self.precision(layer, dtype)
        sides = [*precision.high, *precision.low] if precision else self._sides(layer, dtype)
        return replace(eviction, interval=max(side.format.unit for side in sides))

    def precision(self, layer: LayerSpec, dtype: torch.dtype) -> Precision | None:
        """Which entries of ``layer`` are kept in which of two formats; None: all in one."""
        return next((p for m in self.methods if layer.window is None and (p := m.precision(layer, dtype))), None)

    def selection(self, layer: LayerSpec) -> Selection | None:
        """Which stored entries of ``layer`` a query reads; None: all, as in layers with a sliding window."""
        return next((s for m in self.methods if layer.window is None and (s := m.selection())), None)

    def sentence_ends(self, spec: ModelSpec) -> Tensor | None:
        """The tokens that end a sentence (int64), where it matters."""
        found = next((s for layer in spec.layers if (s := self.selection(layer))), None)
        ends = None if found is None else found.sentence_ends
        return None if ends is None else torch.tensor(sorted(ends), dtype=torch.int64)

    def extends(self, spec: ModelSpec) -> bool:
        """Whether texts may be longer than the positions of the model."""
        reaches = [s.reach if (s := self.selection(layer)) else None for layer in spec.layers if layer.window is None]
        return bool(reaches) and all(reach is not None and reach <= (spec.max_positions or reach) for reach in reaches)

    def alike(self, layer: LayerSpec, dtype: torch.dtype) -> bool:
        """Whether the heads of ``layer`` hold the same tokens in the same order."""
        return self.eviction(layer, dtype) is None and self.precision(layer, dtype) is None

    @property
    def propagation(self) -> Propagation | None:
        """Which tokens of a first prompt go on beyond some layer; None: all."""
        return next((p for m in self.methods if (p := m.propagation())), None)

    @property
    def block(self) -> int | None:
        """How many tokens of a prompt are read at once; None: all."""
        return next((size for m in self.methods if (size := m.blocks())), None)

    @property
    def tail(self) -> int | None:
        """Where a text that follows each block of a prompt scores it: see ``Score.tail``."""
        return next((e.score.tail for m in self.methods if (e := m.eviction())), None)

    @property
    def rematerializes(self) -> bool:
        """Whether layers with full attention keep their inputs in place of keys and values."""
        return any(method.keeps_inputs for method in self.methods)

    @property
    def joins(self) -> bool:
        """Whether layers with full attention keep a row a token for all KV heads together."""
        return not self.rematerializes and any(type(method).rows is not Method.rows for method in self.methods)

    @property
    def exemption(self) -> Exemption | None:
        """Which tokens of a prompt stay exact; None: none."""
        return next((e for m in self.methods if (e := m.exemption())), None)

    def told_apart(self, spec: ModelSpec) -> ModelSpec:
        """``spec`` with the roles that methods give its layers; from then on it stays as it is."""
        layers = spec.layers
        for method in self.methods:
            layers = method.told_apart(layers)
        return replace(spec, layers=layers)

    @property
    def bundle(self) -> Bundle | None:
        """What neighbouring layers keep together; None: nothing."""
        return next((bundle for m in self.methods if (bundle := m.bundle())), None)

    def kept(self, layer: LayerSpec) -> LayerSpec:
        """``layer`` as the store holds it."""
        if layer.window is not None:
            return layer
        if layer.bundle and self.bundle:
            return self.bundle.kept(layer)
        return next((rows for m in self.methods if (rows := m.rows(layer))), layer)

    def layout(self, layer: LayerSpec, dtype: torch.dtype, page_size: int) -> Layout:
        """How the entries of ``layer`` are kept."""
        eviction, precision = self.eviction(layer, dtype), self.precision(layer, dtype)
        selection = self.selection(layer)
        columns = {**(eviction.columns if eviction else {}), **(selection.columns if selection else {})}
        if precision is None:
            keys, values = self._sides(layer, dtype)
            if keys.before_rope or columns:
                columns = {"position": torch.int32, **columns}
            beside = selection.beside(layer, dtype) if selection else {}
            kept = StoreLayout(keys, values, Columns(columns) if columns else None, page_size, beside)
            if not layer.bundle or not self.bundle:
                return kept
            exact = StoreLayout(*self.bundle.dense(layer, keys.before_rope, dtype), kept.columns, page_size)
            return BoundedLayout(exact, kept, self.bundle.exact_share)
        if isinstance(eviction, Merging):
            raise RecipeError(f"{self}: entries that stand for several cannot be kept in two precisions")
        if selection and selection.beside(layer, dtype):
            raise RecipeError(f"{self}: what is chosen by landmarks cannot be kept in two precisions")
        if any(method.channels(layer) for method in self.methods):
            raise RecipeError(f"{self}: keys of two precisions keep all their channels")
        columns |= precision.columns
        high, low = (
            StoreLayout(*(selection.sides(*sides) if selection else sides), Columns(columns), page_size)
            for sides in (precision.high, precision.low)
        )
        share = 1.0 if precision.share is None else precision.share  # the most that the policy may say
        if precision.gap is None:
            return TieredLayout(high, low, share, precision.rounds_up)
        keys, values = (replace(side, format=side.dense) for side in (high.keys, high.values))
        fresh = StoreLayout(keys, values, Columns(columns), page_size)
        return TieredLayout(high, low, share, precision.rounds_up, fresh, precision.gap - 1)

    def state_bytes(self, spec: ModelSpec) -> int:
        """Bytes kept for the layers of a model, whatever the tokens and their formats."""
        full = [layer for layer in spec.layers if layer.window is None]
        total = sum(rematerialization.state_bytes(layer, spec.dtype) for layer in full) if self.rematerializes else 0
        selected = [(s, layer) for layer in full if (s := self.selection(layer))]
        return total + sum(s.state_bytes(layer, spec.dtype, self.alike(layer, spec.dtype)) for s, layer in selected)

    def calibrated(self, model: PreTrainedModel) -> "Recipe":
        """This recipe with what its methods have learnt about ``model``; raises CalibrationError where they must."""
        return replace(self, methods=tuple(calibrated(model, method) for method in self.methods))

    @property
    def policy(self) -> Policy:
        """How the budget is divided over heads."""
        return next((policy for m in self.methods if (policy := m.budget())), Uniform())

    def planner(
        self, spec: ModelSpec, budget: Budget, lengths: list[int], page_size: int = 16, *, empty: bool = True
    ) -> Planner:
        """What divides ``budget`` over the heads of sequences of ``lengths`` tokens.

        ``budget``: a float is a share of the dense bytes of the same tokens; a string ("64MiB") is bytes for all
        sequences together; an int is entries a head on average; None leaves it to the method. ``empty``: nothing is
        stored before the prompt, so that what it will take is known exactly.
        """
        spec = self.told_apart(spec)
        kept = {layer: self.kept(layer) for layer in set(spec.layers)}
        layouts = {layer: self.layout(layer, spec.dtype, page_size) for layer in kept}
        eviction = next((e for layer in spec.layers if (e := self.eviction(layer, spec.dtype))), None)
        state = self.state_bytes(spec) + sum(layouts[layer].shared_bytes for layer in spec.layers)
        return Planner(str(self), spec, kept, layouts, state, eviction, self.policy, budget, lengths, empty)

    def resolve(
        self, spec: ModelSpec, budget: Budget, lengths: list[int], page_size: int = 16, *, empty: bool = True
    ) -> Plan:
        """The plan for sequences of ``lengths`` tokens under ``budget`` (as for ``planner``); raises BudgetError,
        naming the least."""
        return self.planner(spec, budget, lengths, page_size, empty=empty).plan()

    def _sides(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        if layer.bundle and self.bundle:
            return self.bundle.sides(layer, self._encoded(self.bundle.inner(layer), dtype), dtype)
        channels = next((c for m in self.methods if (c := m.channels(layer))), None)
        if channels is None or layer.window is not None:
            return self._encoded(layer, dtype)
        keys, values = self._encoded(replace(layer, key_size=channels.kept), dtype)
        narrow = Narrow(keys.format, channels.kept, channels.watched, layer.key_size)
        hold = keys.hold if keys.settles else channels.recent
        return replace(keys, format=narrow, dense=Dense(layer.key_size, dtype), hold=hold), values

    def _encoded(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        kept = self.kept(layer)
        dense = Dense(kept.key_size, dtype), Dense(kept.value_size, dtype)
        keys, values = (SideLayout(each, each) for each in dense)
        if layer.window is None:
            keys, values = next((e for m in self.methods if (e := m.encoding(layer, dtype))), (keys, values))
        selection = self.selection(layer)
        return selection.sides(keys, values) if selection else (keys, values)


def _refuse_apart(sharing: Method, method: Method) -> None:
    """Raises RecipeError where ``method`` decides for each layer by itself what layers keep together."""
    if reason := _apart(sharing, method):
        raise RecipeError(
            f"{sharing} and {method} cannot act together: with {sharing.name} neighbouring layers keep entries "
            f"together, and {method.name} {reason}; leave one of them out"
        )


def _apart(sharing: Method, method: Method) -> str | None:
    """What ``method`` does for each layer by itself, in words; None: nothing."""
    by_itself = method.decides() & {"budget", "channels", "select", "carry"}
    if method is sharing:
        return None
    if by_itself:
        return f"decides {_DECISIONS[min(by_itself)]} for each layer by itself"
    if type(method).precision is not Method.precision:
        return "keeps entries in two precisions, which differ from layer to layer"
    eviction, bundle = method.eviction(), sharing.bundle()
    if isinstance(eviction, Merging):
        return "rewrites the entries of each layer by itself"
    if eviction and eviction.observes:
        return "observes the attention of each layer by itself"
    if eviction and eviction.across_heads:
        return "divides what it keeps over the heads of each layer by itself"
    return "evicts other tokens from each head" if eviction and bundle and bundle.all_heads else None


def methods_of(part: "str | Method | Recipe") -> tuple[Method, ...]:
    """The methods of a part of a recipe, which need not be a recipe on its own."""
    return (part,) if isinstance(part, Method) else Recipe.parse(part).methods


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
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.55)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _unreadable(text: str) -> RecipeError:
    return RecipeError(f"cannot read the recipe {text!r}: write methods joined by '+', as in 'snapkv + kivi(bits=4)'")
