"""What a method is: one published system as a composition of decisions."""

from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ..budgets import Policy
from ..bundles import Bundle
from ..calibration import Calibration
from ..errors import CalibrationError
from ..formats import Channels
from ..memory import SideLayout
from ..prefill import Propagation
from ..reduction import Eviction, Exemption, Precision
from ..selection import Selection
from ..spec import LayerSpec

if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass(frozen=True)
class Method:
    """One published system. Its dataclass fields are its parameters, with the paper's defaults.

    A method answers for the decisions it makes and leaves the others alone: ``eviction`` and ``rows`` what to keep,
    ``budget`` how much in each head, ``channels`` which numbers of a key, ``encoding`` or ``precision`` in which
    format, ``bundle`` what neighbouring layers keep together, ``selection`` which entries a query reads,
    ``propagation`` which tokens of a prompt go through all layers, ``blocks`` how many are read at once. Methods that
    leave each other's decisions alone combine with ``+``.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    acts: ClassVar[str]  # where it acts, in words
    needs: ClassVar[str]  # what it observes, in words
    citation: ClassVar[str]  # title, year, arXiv id
    keeps_inputs: ClassVar[bool] = False  # ``rows`` are made of the layers' inputs, not of keys and values

    def eviction(self) -> Eviction | None:
        """What to keep and what to drop; None: everything."""
        return None

    def budget(self) -> Policy | None:
        """How the budget is divided over heads; None: the same for all."""
        return None

    def rows(self, layer: LayerSpec) -> LayerSpec | None:
        """What a layer keeps for all its heads together, a row a token; None: keys and values head by head. Without
        ``keeps_inputs`` rows are the keys of all KV heads one after the other, and their values (``joint``)."""
        return None

    def told_apart(self, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        """The layers of a model, with a role for those that are kept in another way than others alike."""
        return layers

    def channels(self, layer: LayerSpec) -> Channels | None:
        """Which channels of a layer's keys stay; None: all."""
        return None

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout] | None:
        """How keys and values of a layer are kept; None: dense."""
        return None

    def exemption(self) -> Exemption | None:
        """Which tokens of a prompt stay exact in a format that exempts some (``Exempt``); None: none. For methods that
        keep ``rows``."""
        return None

    def precision(self, layer: LayerSpec, dtype: torch.dtype) -> Precision | None:
        """Which entries of a layer are kept in which of two formats; None: all in the one of ``encoding``."""
        return None

    def bundle(self) -> Bundle | None:
        """What neighbouring layers keep together; None: nothing. ``told_apart`` says which layers do."""
        return None

    def selection(self) -> Selection | None:
        """Which of the stored entries a query reads; None: all."""
        return None

    def propagation(self) -> Propagation | None:
        """Which tokens of a first prompt go on beyond some layer; None: all."""
        return None

    def blocks(self) -> int | None:
        """How many tokens of a prompt are read, and compressed, at once; None: all."""
        return None

    def calibration(self) -> Calibration | None:
        """What has to be learnt about a model before the method can act on it; None: nothing."""
        return None

    @property
    def learnt(self) -> Mapping[str, Tensor]:
        """What the calibration found out; empty where there was none."""
        return getattr(self, "_learnt", {})

    def with_learnt(self, tensors: Mapping[str, Tensor]) -> Self:
        """This method with the outcome of its calibration."""
        twin = copy(self)
        object.__setattr__(twin, "_learnt", dict(tensors))
        return twin

    def knows(self, name: str) -> Tensor:
        """A tensor of the calibration; raises CalibrationError where there was none."""
        if name not in self.learnt:
            raise CalibrationError(f"{self.name} has to be calibrated for a model first: see kvarn calibrate --help")
        return self.learnt[name]

    def decides(self) -> set[str]:
        """The decisions this method makes."""
        made = set()
        if type(self).eviction is not Method.eviction or type(self).rows is not Method.rows:
            made.add("keep")
        if type(self).channels is not Method.channels or type(self).rows is not Method.rows:
            made.add("channels")
        if type(self).budget is not Method.budget:
            made.add("budget")
        if type(self).encoding is not Method.encoding or type(self).precision is not Method.precision:
            made.add("encode")
        if type(self).selection is not Method.selection:
            made.add("select")
        if type(self).propagation is not Method.propagation:
            made.add("carry")
        if type(self).bundle is not Method.bundle:
            made.add("share")
        if type(self).blocks is not Method.blocks:
            made.add("read")
        return made

    def __add__(self, other: "Method | Recipe") -> "Recipe":
        from ..recipe import Recipe, methods_of

        return Recipe((self, *methods_of(other)))

    def __str__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != default_of(f)]
        return f"{self.name}({', '.join(given)})" if given else self.name


def default_of(field: Field) -> Any:
    """The default of a parameter; MISSING where it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default
