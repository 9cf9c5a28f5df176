"""What keys and values are computed from, kept in their place and turned into them on reading.

XQuant (arXiv 2508.10395, sections 3.1 and 3.2). With x the input of a layer's key and value projections, a layer keeps
for each token, whichever takes fewer numbers:

- x itself: keys and values are x W_K and x W_V;
- latents of the rank of the keys and the values: with the singular value decomposition W = U S Bᵀ, x U_K in place of
  the keys and x U_V in place of the values. They come from the projections themselves, since x U = x W B S⁻¹, and go
  back by S Bᵀ, so that B and S are all that is kept for a layer.

XQuant-CL (section 3.3): the inputs of neighbouring layers are alike. From a base layer on, a layer keeps how its input
differs from what the layer before it gives back; where latents are fewer numbers, the difference times U of the
decomposition of both projections together, [W_K W_V], in whose span all that matters of it lies.

Shapes: B sequences, K KV heads, n tokens, D head size.
"""

import math
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .attention.rotary import Rotary
from .errors import Unsupported
from .formats import Dense, Int
from .memory import SideLayout
from .spec import LayerSpec, ModelSpec

# Roles of layers that keep differences: the first of them keeps its input.
BASE, DIFFERENCE = "base", "difference"


@dataclass(frozen=True)
class Basis:
    """B ([width, rank]) and S ([rank]) of a projection's decomposition, in the model's dtype."""

    right: Tensor
    size: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Basis":
        """The basis of a projection's weight ([width, input])."""
        right, size, _ = torch.linalg.svd(weight.float(), full_matrices=False)
        return cls(right.to(weight.dtype), size.to(weight.dtype))

    def latents(self, projected: Tensor) -> Tensor:
        """x W ([…, width]) -> x U ([…, rank]); directions that the projection does not use are 0."""
        inverse = torch.where(self.size > self.size[0] * torch.finfo(self.size.dtype).eps, 1 / self.size, 0)
        return (projected @ self.right) * inverse

    def projected(self, latents: Tensor) -> Tensor:
        """x U -> x W."""
        return (latents * self.size) @ self.right.T

    @property
    def nbytes(self) -> int:
        return self.right.nbytes + self.size.nbytes


@dataclass
class Known:
    """What is known of a layer's inputs without its own rows: those of the layer before as they are read back, of the
    ``new`` tokens [B, q, size] and of the ``stored`` ones [B, n, size]; None before the base layer."""

    new: Tensor | None = None
    stored: Tensor | None = None


class LayerInputs:
    """How the rows of one layer are made from its inputs and read as keys and values."""

    def __init__(self, model: PreTrainedModel, attention: nn.Module, layer: LayerSpec):
        self.attention: Any = attention
        self.layer, self.rotary = layer, Rotary(model)
        projections = _projections(attention, layer)
        plain = keeps_inputs(layer) or layer.role in (BASE, DIFFERENCE)
        self.bases = None if plain else tuple(Basis.of(weight) for weight, _ in projections)

    @property
    def nbytes(self) -> int:
        """Bytes kept for the layer itself, whatever the tokens."""
        return sum(basis.nbytes for basis in self.bases or ())

    def rows(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, q, input size] -> what the two sides keep, [B, 1, q, size] each."""
        if self.bases is None:
            return inputs[:, None], inputs[:, None, :, :0]
        projections = _projections(self.attention, self.layer)
        keys, values = (
            basis.latents(linear(inputs, weight))[:, None]
            for basis, (weight, _) in zip(self.bases, projections, strict=True)
        )
        return keys, values

    def entries(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of sequences from their first token on ([B, 1, n, size]) -> keys and values [B, K, n, D]."""
        projections = _projections(self.attention, self.layer)
        if self.bases is None:
            plain = [linear(first[:, 0], weight) for weight, _ in projections]
        else:
            plain = [basis.projected(x[:, 0]) for basis, x in zip(self.bases, (first, second), strict=True)]
        keys, values = (
            (x if bias is None else x + bias).unflatten(-1, (self.layer.kv_heads, -1))
            for x, (_, bias) in zip(plain, projections, strict=True)
        )
        if hasattr(self.attention, "k_norm"):
            keys = self.attention.k_norm(keys)
        positions = torch.arange(keys.shape[1], device=keys.device)
        return self.rotary.rotate(keys.transpose(1, 2), positions), values.transpose(1, 2)


class LayerDifferences(LayerInputs):
    """A layer that keeps differences of inputs; what it reads entries from are the inputs that these add up to."""

    def __init__(self, model: PreTrainedModel, attention: nn.Module, layer: LayerSpec):
        super().__init__(model, attention, layer)
        self.directions: Tensor | None = None  # U, [input, rank] in the model's dtype
        if layer.role == DIFFERENCE and not keeps_inputs(layer):
            joint = torch.cat([weight for weight, _ in _projections(attention, layer)])
            left = torch.linalg.svd(joint.float().T, full_matrices=False)[0]
            self.directions = left.to(joint.dtype)

    @property
    def nbytes(self) -> int:
        return 0 if self.directions is None else self.directions.nbytes

    def difference(self, inputs: Tensor, known: Tensor | None) -> Tensor:
        """Inputs [B, q, size] against what is known of them -> rows [B, 1, q, kept size]."""
        rows = inputs if known is None else inputs - known
        return (rows if self.directions is None else rows @ self.directions)[:, None]

    def added(self, rows: Tensor, known: Tensor | None) -> Tensor:
        """Rows [B, 1, n, kept size] and what is known -> inputs [B, n, size]."""
        rows = rows[:, 0] if self.directions is None else rows[:, 0] @ self.directions.T
        return rows if known is None else known + rows


def encoded(layer: LayerSpec, bits: int, group: int, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
    """How rows of ``layer`` are quantized: latents of keys per channel in blocks of ``group`` tokens, of which the last
    stays exact, all else per token in groups of as many numbers, or of the largest divisor that these have in common
    with the width."""
    layer = kept(layer)

    def per_token(size: int) -> SideLayout:
        return SideLayout(Int(bits, "token", math.gcd(group, size), size, dtype), Dense(size, dtype))

    if not layer.value_size:
        nothing = Dense(0, dtype)
        return per_token(layer.key_size), SideLayout(nothing, nothing)
    first = Int(bits, "channel", group, layer.key_size, dtype)
    return SideLayout(first, Dense(layer.key_size, dtype), block=group), per_token(layer.value_size)


def keeps_inputs(layer: LayerSpec) -> bool:
    """Whether inputs are fewer numbers than latents of keys and values together."""
    return layer.input_size <= sum(_ranks(layer))


def kept(layer: LayerSpec) -> LayerSpec:
    """What the store holds of such a layer: one row a token for all heads."""
    keys, values = _ranks(layer)
    if keeps_inputs(layer) or layer.role == BASE:
        keys, values = layer.input_size, 0
    elif layer.role == DIFFERENCE:
        keys, values = keys + values, 0
    return replace(layer, kv_heads=1, key_size=keys, value_size=values)


def state_bytes(layer: LayerSpec, dtype: torch.dtype) -> int:
    """Bytes of a layer's bases."""
    if keeps_inputs(layer) or layer.role == BASE:
        return 0
    if layer.role == DIFFERENCE:
        return layer.input_size * sum(_ranks(layer)) * dtype.itemsize
    widths = layer.kv_heads * layer.key_size, layer.kv_heads * layer.value_size
    return sum(rank * (width + 1) for rank, width in zip(_ranks(layer), widths, strict=True)) * dtype.itemsize


def inputs_of(model: PreTrainedModel, spec: ModelSpec) -> list[LayerInputs | None]:
    """One for each layer with full attention, the same for all caches of a model that keep its layers alike, whose
    attention modules hand their inputs to ``take_inputs`` of such a cache from now on. Raises Unsupported."""
    known = _MODELS.get(model, {})
    if spec.layers not in known:
        layers = getattr(model.get_decoder(), "layers", ())
        attentions: list[nn.Module] = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
        if len(attentions) != len(spec.layers):
            raise Unsupported(
                f"{type(model).__name__} does not list its attention layers, so their inputs are not known"
            )
        known[spec.layers] = [
            _inputs(model, attention, layer) for attention, layer in zip(attentions, spec.layers, strict=True)
        ]
        if model not in _MODELS:
            for attention in attentions:
                attention.register_forward_pre_hook(_hand_over, with_kwargs=True)
        _MODELS[model] = known
    return known[spec.layers]


_MODELS: WeakKeyDictionary[PreTrainedModel, dict[tuple[LayerSpec, ...], list[LayerInputs | None]]] = WeakKeyDictionary()


def _inputs(model: PreTrainedModel, attention: nn.Module, layer: LayerSpec) -> LayerInputs | None:
    if layer.window is not None:
        return None
    return (LayerDifferences if layer.role in (BASE, DIFFERENCE) else LayerInputs)(model, attention, layer)


def _hand_over(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    take = getattr(kwargs.get("past_key_values"), "take_inputs", None)
    if take is not None:
        take(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _ranks(layer: LayerSpec) -> tuple[int, int]:
    return (
        min(layer.kv_heads * layer.key_size, layer.input_size),
        min(layer.kv_heads * layer.value_size, layer.input_size),
    )


def _projections(attention: nn.Module, layer: LayerSpec) -> list[tuple[Tensor, Tensor | None]]:
    """Weights ([width, input]) and biases of the key and the value projection, as they are in the module."""
    keys, values = getattr(attention, "k_proj", None), getattr(attention, "v_proj", None)
    if isinstance(keys, nn.Linear) and isinstance(values, nn.Linear):
        return [(keys.weight, keys.bias), (values.weight, values.bias)]
    joint = getattr(attention, "qkv_proj", None)
    if not isinstance(joint, nn.Linear):
        raise Unsupported(
            f"{type(attention).__name__} has no plain key and value projections, so its keys and values cannot be "
            "computed again from its inputs"
        )
    sizes = [layer.query_heads * layer.key_size, layer.kv_heads * layer.key_size, layer.kv_heads * layer.value_size]
    biases = [None] * 3 if joint.bias is None else joint.bias.split(sizes)
    return list(zip(joint.weight.split(sizes), biases, strict=True))[1:]
