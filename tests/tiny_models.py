"""Tiny random models of each architecture, built from configs."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

WINDOW = 16  # of every tiny model with sliding-window layers

_COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    # With 0.02, the default, attention over so small a model is all but uniform and logits hardly differ.
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that generation runs to the length that a test asks for
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": False,  # random tied embeddings repeat the last token for ever
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}

TINY: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **k: LlamaConfig(**_COMMON | k),
    "mistral": lambda **k: MistralConfig(**_COMMON | {"sliding_window": WINDOW} | k),
    "qwen2": lambda **k: Qwen2Config(**_COMMON | k),
    "qwen3": lambda **k: Qwen3Config(**_COMMON | k),
    "gemma3": lambda **k: Gemma3TextConfig(
        **_COMMON | _GEMMA | {"layer_types": _MIXED[-k.get("num_hidden_layers", 4) :]} | k,
    ),
    "phi3": lambda **k: Phi3Config(**_COMMON | k),
    "mixtral": lambda **k: MixtralConfig(**_COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2} | k),
    "gemma2": lambda **k: Gemma2Config(
        **_COMMON
        | _GEMMA
        | {"layer_types": _ALTERNATING, "attn_logit_softcapping": 5.0}  # low enough to bite at this size
        | k
    ),
    "gpt_oss": lambda **k: GptOssConfig(
        **_COMMON
        | {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": _YARN}
        | k
    ),
}


def make_tiny(name: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A fresh random model of TINY[name], fp32, CPU, eval, no gradients. Same name, seed, overrides: same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(TINY[name](**overrides), dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):  # ones and zeros would hide a norm or bias that is left out
                parameter.data += 0.1 * torch.randn_like(parameter)
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.data += 1.0  # normed queries and keys are too alike for attention to choose
            elif key.endswith("sinks"):
                parameter.data.normal_(std=1.0)
    return model.eval().requires_grad_(False)
