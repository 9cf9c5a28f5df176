"""Modules of transformers computed by few kernels, and whether that gives the same numbers.

``of`` and the functions of a module give what can replace its ``forward`` in passes of one token a sequence, None where
it is not of the shape that they know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache as TransformersCache

from ..attention.interface import Mask, Pending
from ..attention.newest import Pages, Projected
from ..attention.reference import Variant
from ..attention.triton.matvec import gated_linear, linear
from ..attention.triton.small import added_norm, append, gated, norm
from ..formats import Dense

_ROWS = 3  # of the random numbers


@runtime_checkable
class Appends(Protocol):
    """A cache in a pass of one token a sequence, which it rotates where it stores it."""

    def append(self, layer: int, token: Projected, variant: Variant) -> Tensor:
        """Stores ``token`` and attends it to all that is stored: [B, H, 1, V]."""
        ...


class Norm:
    """An RMSNorm, which can be computed together with the sum that it is given."""

    def __init__(self, weight: Tensor, epsilon: float):
        self.weight, self.epsilon = weight, epsilon
        self._ready: tuple[Tensor, Tensor] | None = None  # a sum and the norm of it

    @classmethod
    def of(cls, module: nn.Module) -> "Norm | None":
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        named = type(module).__name__.endswith("RMSNorm")
        return cls(weight, epsilon) if named and isinstance(epsilon, float) and isinstance(weight, Tensor) else None

    def __call__(self, x: Tensor) -> Tensor:
        ready, self._ready = self._ready, None
        return ready[1] if ready and ready[0] is x else norm(x, self.weight, self.epsilon)

    def sum(self, x: Tensor, added: Tensor) -> Tensor:
        """``x + added``; the norm of it is then at hand."""
        self._ready = added_norm(x, added, self.weight, self.epsilon)
        return self._ready[0]


def linear_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    return (lambda x: linear(x, module.weight, module.bias)) if _plain(module) else None


def gated_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A feed-forward layer with a gate."""
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= dict(module.named_children()).keys():
        return None
    gate, up, down, active = module.gate_proj, module.up_proj, module.down_proj, module.act_fn
    if not all(isinstance(part, nn.Linear) for part in (gate, up, down)):
        return None
    x = _random((1, gate.out_features), gate.weight)
    if not near(active(x), gated(x, torch.ones_like(x))):
        return None
    weight, bias = joined((gate, up)) or (None, None)
    if weight is None or bias is not None:
        return lambda x: down(gated(gate(x), up(x)))
    return lambda x: down(gated_linear(x, weight))


def alike(module: nn.Module, faster: Callable[[Tensor], Tensor]) -> bool:
    """Whether both, of one tensor, give the same numbers, but for the order of additions."""
    weight = next(module.parameters())
    x = _random((_ROWS, 1, weight.shape[-1]), weight)
    return near(module(x), faster(x))


class Attention:
    """Attention whose projections are one product, and whose keys are rotated where they are stored."""

    _PROJECTIONS = ("q_proj", "k_proj", "v_proj")
    _NORMS = ("q_norm", "k_norm")

    def __init__(
        self,
        module: Any,
        like: "Recorded",
        joint: tuple[Tensor, Tensor | None],
        norms: Sequence[tuple[Tensor, float]],
    ):
        self.module, self.own, self.variant = module, module.forward, like.variant
        self.weight, self.bias = joint
        self.norms = norms
        self.queries, self.keys, self.size = like.query.shape[1], like.keys.shape[1], like.query.shape[3]

    @classmethod
    def of(cls, module: Any, norms: dict[nn.Module, Norm]) -> "Attention | None":
        """``norms``: the modules that are computed by kernels."""
        children = dict(module.named_children())
        if not {*cls._PROJECTIONS, "o_proj"} <= children.keys() <= {*cls._PROJECTIONS, "o_proj", *cls._NORMS}:
            return None
        projections = [children[name] for name in cls._PROJECTIONS]
        its_norms = [norms[children[name]] for name in cls._NORMS if children.get(name) in norms]
        size = getattr(module, "head_dim", None)
        if not all(map(_plain, projections)) or size is None or len(children) != 4 + len(its_norms):
            return None
        x = _random((_ROWS, 1, projections[0].in_features), projections[0].weight)
        turn = tuple(_random((_ROWS, 1, size), x, seed) for seed in (1, 2))
        own, ours = Recorder(), Recorder()
        given = {"position_embeddings": turn, "attention_mask": Mask({})}
        try:
            out, *_ = module(hidden_states=x, past_key_values=own, **given)
        except Exception:  # what wants other arguments is not of the shape that is known
            return None
        like = own.recorded
        if like is None or not like.projected_by(projections):
            return None
        if any(its_norm.weight.numel() != size for its_norm in its_norms):
            return None
        joint = joined(projections)
        if joint is None:
            return None
        faster = cls(module, like, joint, [(each.weight, each.epsilon) for each in its_norms])
        same = near(out, faster(hidden_states=x, past_key_values=ours, **given)[0])
        return faster if same and ours.recorded is not None and like.near(ours.recorded) else None

    def __call__(self, hidden_states: Tensor, **given: Any) -> Any:
        cache, turn = given.get("past_key_values"), given.get("position_embeddings")
        if not isinstance(cache, Appends) or not self._turns(hidden_states, turn):
            return self.own(hidden_states, **given)
        states = linear(hidden_states, self.weight, self.bias)[:, 0]
        token = Projected(states, self.queries, self.keys, turn, self.norms)
        out = cache.append(self.module.layer_idx, token, self.variant)
        return self.module.o_proj(out.flatten(1)[:, None]), None

    def _turns(self, hidden_states: Tensor, turn: Any) -> bool:
        """Whether this is one token a sequence, and ``turn`` rotates all channels of a head."""
        batch, tokens, _ = hidden_states.shape
        shapes = [(rows, 1, self.size) for rows in (1, batch)]
        return tokens == 1 and isinstance(turn, tuple) and all(tuple(each.shape) in shapes for each in turn)


class Layer:
    """A decoder layer whose sums are computed with the norms of them."""

    def __init__(self, layer: Any, first: Norm, second: Norm, following: Norm | None):
        self.layer, self.own = layer, layer.forward
        self.first, self.second, self.following = first, second, following

    @classmethod
    def of(cls, layer: nn.Module, following: nn.Module | None, norms: dict[nn.Module, Norm]) -> "Layer | None":
        """``following``: the norm of what the layer gives."""
        children = dict(layer.named_children())
        if children.keys() != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return None
        first, second = norms.get(children["input_layernorm"]), norms.get(children["post_attention_layernorm"])
        if first is None or second is None:
            return None
        faster = cls(layer, first, second, norms.get(following) if following else None)
        return faster if faster._same() else None

    def __call__(self, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        if args:
            return self.own(hidden_states, *args, **given)
        attended, *_ = self.layer.self_attn(hidden_states=self.first(hidden_states), **given)
        total = self.second.sum(hidden_states, attended)
        fed = self.layer.mlp(self.second(total))
        return total + fed if self.following is None else self.following.sum(total, fed)

    def _same(self) -> bool:
        """Whether the sums and norms are the layer's, whatever attention and feed-forward layer compute."""
        attention, feed = self.layer.self_attn, self.layer.mlp
        x = _random((_ROWS, 1, self.first.weight.numel()), self.first.weight)
        attention.forward = lambda hidden_states, **_: (hidden_states.flip(-1), None)
        feed.forward = lambda x: x.roll(1, -1)
        try:
            out, faster = self.own(x), self(x)
        except Exception:  # what wants other arguments is not of the shape that is known
            return False
        finally:
            del attention.forward, feed.forward
        return isinstance(out, Tensor) and near(out, faster)


@dataclass(frozen=True)
class Recorded:
    """What attention is given: [B, H, 1, D], [B, K, 1, D], [B, K, 1, V]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    variant: Variant

    def projected_by(self, projections: Sequence[nn.Linear]) -> bool:
        """Whether these are all that the projections give."""
        states = (self.query, self.keys, self.values)
        return all(x[0].numel() == each.out_features for x, each in zip(states, projections, strict=True))

    def near(self, other: "Recorded") -> bool:
        return all(near(getattr(self, name), getattr(other, name)) for name in ("query", "keys", "values"))


class Recorder(TransformersCache):
    """A cache that remembers what it is given, and attends each query to the new value alone."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.recorded: Recorded | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        return Pending(key_states, self, layer_idx), Pending(value_states, self, layer_idx)

    def attend(
        self, module: nn.Module, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Mask, variant: Variant
    ) -> Tensor:
        self.recorded = Recorded(query, keys, values, variant)
        return values.repeat_interleave(query.shape[1] // values.shape[1], 1)

    def append(self, layer: int, token: Projected, variant: Variant) -> Tensor:
        assert token.turn is not None
        (batch, width), size = token.states.shape, token.turn[0].shape[-1]
        heads = batch * token.keys
        value_size = (width - (token.queries + token.keys) * size) // token.keys
        # Pages of one token, one for each head.
        table = torch.arange(heads, dtype=torch.int32, device=token.states.device)[:, None]
        spans = torch.cat([torch.zeros_like(table), torch.ones_like(table)], 1)
        new = [token.states.new_zeros((heads, 1, n)) for n in (size, value_size)]
        keys, values = (Pages(Dense(x.shape[2], x.dtype), {"x": x}, table, spans) for x in new)
        query = append(token, keys, values, 0)
        stored = [x.view(batch, token.keys, 1, -1) for x in new]
        return self.attend(nn.Identity(), layer, query, stored[0], stored[1], Mask({}), variant)


def joined(parts: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weights, and biases, of linear layers of one input as one tensor, of which those of the layers become views; None
    where these are not alike."""
    if not all(map(_plain, parts)):
        return None
    weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    if len({(w.dtype, w.device, w.shape[1], b is None) for w, b in zip(weights, biases, strict=True)}) > 1:
        return None
    return _neighbours(weights), None if biases[0] is None else _neighbours(biases)


def _neighbours(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters one after another in one tensor, of which they are views."""
    first, rows = parameters[0], [parameter.shape[0] for parameter in parameters]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() != storage or parameter.data_ptr() != end:
            break
        end += parameter.nbytes
    else:
        return first.detach().as_strided((sum(rows), *first.shape[1:]), first.stride())
    joint = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joint.split(rows), strict=True):
        parameter.data = part
    return joint


def _plain(module: Any) -> bool:
    """Whether this is a linear layer as torch has it, which nothing hooks into."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and module.weight.is_contiguous() and module.weight.is_floating_point()


def _random(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def near(own: Tensor, ours: Tensor) -> bool:
    """Whether numbers are the same, but for the order of additions."""
    if own.shape != ours.shape:
        return False
    return float((own - ours).abs().max()) <= 4 * torch.finfo(own.dtype).eps * float(own.abs().max())
