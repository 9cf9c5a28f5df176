"""kvarn's attention function inside transformers, with other caches and with its own."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvarn
from kvarn.attention.interface import NAME, Mask, Pending, attention
from kvarn.errors import CacheMismatch, Unsupported
from tiny_models import make_tiny

# Each with its own implementation: softcapping and sinks are beyond sdpa.
OWN = {"llama": "sdpa", "mistral": "sdpa", "gemma3": "sdpa", "gemma2": "eager", "gpt_oss": "eager"}
MODELS = {name: make_tiny(name) for name in OWN}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(3, 160, (batch, count), generator=torch.Generator().manual_seed(count))


def padding(count: int, lengths: list[int]) -> Tensor:
    return (torch.arange(count) >= count - torch.tensor(lengths)[:, None]).long()


def logits(model: PreTrainedModel, implementation: str, mask: Tensor | None, **inputs: object) -> Tensor:
    """Of a prompt, a second passage of several tokens and two single ones, through a DynamicCache."""
    model.set_attn_implementation(implementation)
    ids, cache, out = tokens(2, 40), DynamicCache(config=model.config), []
    for first, last in ((0, 30), (30, 38), (38, 39), (39, 40)):
        seen = None if mask is None else mask[:, :last]
        out.append(model(ids[:, first:last], attention_mask=seen, past_key_values=cache, **inputs).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("padded", [False, True])
def test_with_another_cache_it_computes_what_the_model_does(name: str, padded: bool) -> None:
    mask = padding(40, [40, 23]) if padded else None
    model = MODELS[name]
    expected, found = logits(model, OWN[name], mask), logits(model, NAME, mask)
    real = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], **CLOSE)


@pytest.mark.parametrize("name", OWN)
def test_without_a_cache(name: str) -> None:
    model, ids = MODELS[name], tokens(2, 40)
    model.set_attn_implementation(OWN[name])
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **CLOSE)


def causal(count: int, dtype: torch.dtype) -> Tensor:
    """Causal, and every third token hidden, as a 4-d mask."""
    readable = torch.ones(count, count, dtype=torch.bool).tril() & (torch.arange(count) % 3 > 0)
    readable |= torch.eye(count, dtype=torch.bool)
    if dtype == torch.bool:
        return readable.expand(2, 1, -1, -1)
    return torch.zeros(2, 1, count, count, dtype=dtype).masked_fill(~readable, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_masks_work_with_other_caches(dtype: torch.dtype) -> None:
    model, ids, mask = MODELS["llama"], tokens(2, 12), causal(12, dtype)
    model.set_attn_implementation(OWN["llama"])
    expected = model(ids, attention_mask=mask).logits
    assert not torch.allclose(expected, model(ids).logits, **CLOSE), "the mask matters"
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **CLOSE)


@pytest.mark.parametrize("name", OWN)
def test_custom_masks_are_refused_with_a_kvarn_cache(name: str) -> None:
    model, ids = MODELS[name], tokens(2, 12)
    cache = kvarn.Cache(model, "full")
    expected = model(ids, past_key_values=kvarn.Cache(model, "full")).logits
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(Unsupported, match="custom attention mask"):
            model(ids, attention_mask=causal(12, dtype), past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert cache.report().bytes == 0
    # The cache serves what comes next as if nothing had happened.
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_additive_masks_and_gradients_are_refused_where_sdpa_cannot_help(name: str) -> None:
    model = make_tiny(name)
    model.set_attn_implementation(NAME)
    with pytest.raises(Unsupported, match="additive masks"):
        model(tokens(2, 12), attention_mask=causal(12, torch.float32))
    with pytest.raises(Unsupported, match="gradients"):
        model.requires_grad_(True)(tokens(2, 12))


def test_gradients_as_the_model_computes_them() -> None:
    grads = []
    for implementation in (OWN["llama"], NAME):
        model = make_tiny("llama")
        model.set_attn_implementation(implementation)
        model.requires_grad_(True)
        model(tokens(1, 12), use_cache=False).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


class Recorder:
    """A cache that notes what it is asked and answers with the queries."""

    def attend(
        self, module: object, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Mask, variant: object
    ) -> Tensor:
        self.asked = (layer, keys, values, mask, variant)
        return query


def masks(**arguments: object) -> Mask:
    return Mask({"attention_mask": None, "kv_length": 6, "q_length": 3, **arguments})


def test_handles_are_passed_to_their_cache() -> None:
    cache, query, keys, values = Recorder(), torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    sinks, mask = torch.randn(4), masks()
    module = torch.nn.Identity()
    out, nothing = attention(
        module, query, Pending(keys, cache, 5), Pending(values, cache, 5), mask, softcap=3.0, s_aux=sinks
    )
    assert nothing is None
    assert torch.equal(out, query.transpose(1, 2))
    layer, given_keys, given_values, given_mask, variant = cache.asked
    assert (layer, given_keys is keys, given_values is values, given_mask is mask) == (5, True, True, True)
    assert (variant.scaling, variant.softcap, variant.sinks is sinks) == (8**-0.5, 3.0, True)
    attention(module, query, Pending(keys, cache, 5), Pending(values, cache, 5), mask, scaling=0.1)
    assert cache.asked[-1].scaling == 0.1
    assert cache.asked[-1].plain


@pytest.mark.parametrize(
    ("mask", "more"),
    [
        (None, {}),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), {}),
        (masks(use_vmap=True), {}),
        (masks(allow_is_causal_skip=False), {}),
        (masks(), {"position_bias": torch.zeros(1)}),
    ],
    ids=["none", "tensor", "mask function", "not causal", "position bias"],
)
def test_what_a_kvarn_cache_refuses(mask: Mask | Tensor | None, more: dict[str, object]) -> None:
    x = torch.randn(1, 2, 3, 8)
    cache = Recorder()
    with pytest.raises(Unsupported, match="Identity was given a custom attention mask or a position bias"):
        attention(torch.nn.Identity(), x, Pending(x, cache, 0), Pending(x, cache, 0), mask, **more)
    assert not hasattr(cache, "asked")


def test_which_new_tokens_are_padding() -> None:
    assert masks().valid is None
    assert masks(attention_mask=torch.ones(2, 6)).valid is None
    padded = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert masks(attention_mask=padded).valid.tolist() == [[False, True, True], [True, True, True]]
    # Padding of tokens that are stored already is nothing new.
    assert masks(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])).valid is None


def test_a_kvarn_cache_says_when_the_model_attends_otherwise() -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model)
    model.set_attn_implementation("eager")
    with pytest.raises(CacheMismatch, match=r"'eager'.*set_attn_implementation"):
        model(tokens(1, 4), past_key_values=cache)
