"""What is read from a config, and which models are refused."""

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from kvarn.errors import Unsupported
from kvarn.spec import LayerSpec, ModelSpec
from tiny_models import TINY, WINDOW, make_tiny

FULL = LayerSpec(query_heads=4, kv_heads=2, key_size=16, value_size=16, window=None, input_size=64)
SLIDING = LayerSpec(query_heads=4, kv_heads=2, key_size=16, value_size=16, window=WINDOW, input_size=64)
LAYERS = {
    "llama": [FULL] * 4,
    "mistral": [SLIDING] * 4,
    "qwen2": [FULL] * 4,
    "qwen3": [FULL] * 4,
    "phi3": [FULL] * 4,
    "mixtral": [FULL] * 4,
    "gemma2": [SLIDING, FULL] * 2,
    "gemma3": [SLIDING] * 3 + [FULL],
    "gpt_oss": [SLIDING, FULL] * 2,
}


@pytest.mark.parametrize("name", TINY)
def test_layers(name: str) -> None:
    config = TINY[name]()
    spec = ModelSpec.from_config(config, torch.bfloat16)
    assert list(spec.layers) == LAYERS[name]
    assert spec.architecture == config.model_type
    assert spec.dtype == torch.bfloat16
    assert spec.max_positions == 1024


@pytest.mark.parametrize("name", TINY)
def test_dense_bytes_are_those_of_a_plain_cache(name: str) -> None:
    model = make_tiny(name)
    spec = ModelSpec.from_config(model.config, model.dtype)
    for count in (5, 40):
        cache = transformers.DynamicCache(config=model.config)
        model(torch.ones(1, count, dtype=torch.long), past_key_values=cache)
        held = sum(t.shape[2] * t[:, :, 0].nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert spec.dense_bytes(count) == held


def test_other_ways_of_saying_the_same() -> None:
    make, common = transformers.LlamaConfig, {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    assert ModelSpec.from_config(make(**common), torch.float32).layers == (LayerSpec(4, 4, 16, 16, None, 64),)
    layers = ModelSpec.from_config(make(**common, num_key_value_heads=1, head_dim=32), torch.float32).layers
    assert layers == (LayerSpec(4, 1, 32, 32, None, 64),)
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=48, n_head=3, n_positions=99)
    assert ModelSpec.from_config(gpt2, torch.float32).layers == (LayerSpec(3, 3, 16, 16, None, 48),) * 2
    assert ModelSpec.from_config(gpt2, torch.float32).max_positions == 99
    # Qwen2 can slide in its upper layers; without a window nothing does.
    qwen = TINY["qwen2"](use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3)
    assert list(ModelSpec.from_config(qwen, torch.float32).layers) == [FULL] * 3 + [SLIDING]
    assert list(ModelSpec.from_config(TINY["mistral"](sliding_window=None), torch.float32).layers) == [FULL] * 4


def test_a_text_model_within_another() -> None:
    config = transformers.Gemma3Config(text_config=TINY["gemma3"]())
    assert list(ModelSpec.from_config(config, torch.float32).layers) == LAYERS["gemma3"]


def test_entries_of_a_layer() -> None:
    layer = LayerSpec(8, 2, 24, 16, window=10)
    assert layer.entry_numbers == 2 * 40
    assert [layer.kept_dense(n) for n in (0, 8, 9, 10, 100)] == [0, 8, 9, 9, 9]
    spec = ModelSpec("toy", (layer, LayerSpec(8, 2, 24, 16, None)), torch.float16, None)
    assert spec.dense_bytes(100) == (9 + 100) * 80 * 2


REFUSED: dict[str, tuple[PreTrainedConfig, str, str]] = {
    "encoder-decoder": (transformers.T5Config(), "t5", "is an encoder-decoder"),
    "latent attention": (transformers.DeepseekV3Config(), "deepseek_v3", "uses multi-head latent attention"),
    "chunked attention": (transformers.Llama4TextConfig(num_hidden_layers=4), "llama4_text", "chunked_attention"),
    "state space": (transformers.MambaConfig(), "mamba", "no plain attention heads|layers of type"),
    "shared layers": (transformers.Gemma3nTextConfig(), "gemma3n_text", "shares caches between layers"),
    "both directions": (transformers.LlamaConfig(is_causal=False), "llama", "attends in both directions"),
    "linear attention": (
        transformers.Qwen3NextConfig(num_hidden_layers=4),
        "qwen3_next",
        "has layers of type linear_attention; kvarn does full and sliding ones",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused_by_name_and_reason(case: str) -> None:
    config, name, reason = REFUSED[case]
    with pytest.raises(Unsupported, match=reason) as caught:
        ModelSpec.from_config(config, torch.float32)
    assert str(caught.value).startswith(f"{name} ")
