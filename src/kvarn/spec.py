"""What kvarn needs to know of a model, read from its transformers config."""

from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from .errors import Unsupported


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer: its heads, the sizes of a key and a value, its sliding window (None: full attention), and
    the size of its input. ``role``: what a recipe tells it by from layers that are otherwise alike. ``bundle``: how
    many neighbouring layers keep their entries together (0: each keeps its own)."""

    query_heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None
    input_size: int = 0
    role: str = ""
    bundle: int = 0

    @property
    def joint(self) -> "LayerSpec":
        """This layer with the keys of all its KV heads as one, and their values."""
        sizes = self.kv_heads * self.key_size, self.kv_heads * self.value_size
        return replace(self, kv_heads=1, key_size=sizes[0], value_size=sizes[1])

    @property
    def depth(self) -> int:
        """Layers that have one row of the store together."""
        return max(self.bundle, 1)

    @property
    def entry_numbers(self) -> int:
        """Numbers in the keys and values of one token, all KV heads together."""
        return self.kv_heads * (self.key_size + self.value_size)

    def kept_dense(self, tokens: int) -> int:
        """Tokens that a plain cache holds in this layer after ``tokens`` tokens."""
        return tokens if self.window is None else min(tokens, self.window - 1)


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: its layers, its dtype and the number of positions it was trained for (None: not stated)."""

    architecture: str
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    max_positions: int | None

    @classmethod
    def from_config(cls, config: PretrainedConfig, dtype: torch.dtype) -> "ModelSpec":
        """Reads a text decoder's config; raises Unsupported, naming the architecture, where kvarn cannot serve it."""
        text = config.get_text_config(decoder=True)
        name = text.model_type
        _refuse_unless_decoder(text, name)
        types = get_layer_types_and_kwargs(text)[0]
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise Unsupported(
                f"{name} has layers of type {', '.join(sorted(unknown))}; kvarn does full and sliding ones"
            )
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        layers = tuple(
            LayerSpec(
                query_heads=heads,
                kv_heads=getattr(text, "num_key_value_heads", None) or heads,
                key_size=size,
                value_size=size,
                window=text.sliding_window if kind == "sliding_attention" else None,
                input_size=text.hidden_size,
            )
            for kind in types
        )
        return cls(name, layers, dtype, getattr(text, "max_position_embeddings", None))

    def dense_bytes(self, tokens: int) -> int:
        """Bytes that a plain cache in the model's dtype holds after ``tokens`` tokens of one sequence."""
        return sum(layer.kept_dense(tokens) * layer.entry_numbers for layer in self.layers) * self.dtype.itemsize


def _refuse_unless_decoder(config: PretrainedConfig, name: str) -> None:
    reasons = {
        "is an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "uses multi-head latent attention": getattr(config, "kv_lora_rank", None),
        "shares caches between layers": getattr(config, "num_kv_shared_layers", None),
        "attends in both directions": not getattr(config, "is_causal", True)
        or getattr(config, "use_bidirectional_attention", None),
        "has no plain attention heads": not hasattr(config, "num_attention_heads"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise Unsupported(f"{name} {reason}, which kvarn does not support; use transformers' own cache for it")
