"""transformers' own caches as subjects: ``dynamic``, ``quantized`` and ``offloaded``."""

import ast
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel, QuantizedCache

from ...errors import RecipeError, Unsupported
from ...spec import ModelSpec
from ..subjects import Held, System, label, timed_pass
from .kvpress_worker import held_bytes, replica


def dynamic(config: PretrainedConfig) -> Cache:
    """Everything, dense."""
    return DynamicCache(config=config)


def quantized(
    config: PretrainedConfig,
    backend: str = "quanto",
    nbits: int = 4,
    axis_key: int = 0,
    axis_value: int = 0,
    q_group_size: int = 64,
    residual_length: int = 128,
) -> Cache:
    """Everything, quantized; parameters and defaults are those of transformers' QuantizedCache."""
    return QuantizedCache(backend, config, nbits, axis_key, axis_value, q_group_size, residual_length)


def offloaded(config: PretrainedConfig) -> Cache:
    """Everything, dense, in host memory; a layer at a time is on the device."""
    return DynamicCache(config=config, offloading=True)


CACHES: dict[str, Callable[..., Cache]] = {make.__name__: make for make in (dynamic, quantized, offloaded)}


@dataclass(frozen=True)
class TransformersSubject:
    """One of CACHES, named like a recipe: ``"quantized(nbits=2)"``. Raises RecipeError where ``name`` is none.

    No budget applies: these caches keep every token.
    """

    model: PreTrainedModel
    name: str
    budget: None = None
    system: System = "transformers"

    def __post_init__(self) -> None:
        parse(self.name)

    @property
    def label(self) -> str:
        return label(self.system, self.name, self.budget)

    def open(self) -> "TransformersSession":
        """Raises Unsupported where transformers cannot make this cache for the model."""
        make, given = parse(self.name)
        if make is offloaded and self.model.device.type == "cpu":
            raise Unsupported("offloaded moves the cache to host memory, where a model on the CPU has it: use a GPU")
        try:
            cache = make(self._plain.config, **given)
        except (ValueError, ImportError) as error:
            raise Unsupported(f"{self.label}: {error}") from error
        return TransformersSession(self._plain, self.label, cache)

    @cached_property
    def _plain(self) -> PreTrainedModel:
        """The model with transformers' own attention. Its modules and config are copies, because kvarn changes the
        attention of the model it is given; the weights are shared."""
        shared = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
        twin = copy.deepcopy(self.model, shared)
        soft_caps = getattr(twin.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
        twin.set_attn_implementation("sdpa" if twin._supports_sdpa and not soft_caps else "eager")
        return twin


class TransformersSession:
    """A session on one of transformers' caches."""

    def __init__(self, model: PreTrainedModel, label: str, cache: Cache):
        self.model, self.label, self.cache, self.seconds = model, label, cache, 0.0
        self._batch, self._tokens = 0, 0

    def read(self, tokens: Tensor) -> Tensor:
        """Raises Unsupported where the cache cannot take the tokens, for instance where quantization groups do not
        divide them."""
        try:
            logits, self.seconds = timed_pass(self.model, self.cache, tokens)
        except ValueError as error:
            raise Unsupported(f"{self.label}: {error}") from error
        self._batch, self._tokens = len(tokens), self._tokens + tokens.shape[1]
        return logits

    def fork(self) -> "TransformersSession":
        twin = copy.copy(self)
        twin.cache = replica(self.cache)
        return twin

    def held(self) -> Held:
        """The bytes on the model's device between passes. The peak is not known: a pass has one layer's entries dense
        at a time, whatever the cache keeps."""
        spec = ModelSpec.from_config(self.model.config, self.model.dtype)
        return Held(
            bytes=held_bytes(self.cache, self.model.device),
            dense_bytes=self._batch * spec.dense_bytes(self._tokens),
            peak_bytes=None,
            entries=[[layer.kept_dense(self._tokens)] * layer.kv_heads for layer in spec.layers],
        )

    def close(self) -> None:
        self.cache = None


def parse(name: str) -> tuple[Callable[..., Cache], dict[str, Any]]:
    """What makes the cache, and its parameters; raises RecipeError."""
    try:
        node = ast.parse(name.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"cannot read {name!r}: write it as in 'quantized(nbits=4)'") from error
    kind = call.func.id
    if kind not in CACHES:
        raise RecipeError(f"transformers has no cache {kind!r} here; there are {', '.join(CACHES)}")
    known = {k: p.default for k, p in inspect.signature(CACHES[kind]).parameters.items() if k != "config"}
    for parameter, value in given.items():
        if parameter not in known:
            raise RecipeError(f"{kind} has no parameter {parameter!r}; it takes {', '.join(known) or 'none'}")
        if type(value) is not type(known[parameter]):
            raise RecipeError(f"{kind}({parameter}={value!r}): write it as in {parameter}={known[parameter]!r}")
    return CACHES[kind], given
