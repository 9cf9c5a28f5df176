"""Prompts that are read in blocks: by the cache itself, by its caller, and what either leaves alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import kvarn
from drive import left_padded, logits_of
from kvarn.errors import BudgetError, PromptTooLong, RecipeError, Unsupported
from kvarn.prefill import cuts
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (6,), generator=torch.Generator().manual_seed(2))
TEXT = torch.randint(1, 160, (9,), generator=torch.Generator().manual_seed(3))
RECIPES = [("snapkv(window=8)", 30), ("h2o", 0.5), ("kivi(bits=8, group=8, residual=16)", None), ("epicache", 30)]


@given(st.integers(1, 300), st.integers(1, 60))
def test_cuts(tokens: int, block: int) -> None:
    found = cuts(tokens, block)
    assert [token for first, last in found for token in range(first, last)] == list(range(tokens))
    assert all(last - first == block for first, last in found[1:])
    assert 0 < found[0][1] <= block


def positions(cache: kvarn.Cache) -> list[list[int]]:
    store, group = cache._groups[0].store, cache._groups[0]
    rows = store.read_column(group.everyone, "position").tolist()
    return [sorted(row[:n]) for row, n in zip(rows, store.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(("recipe", "budget"), RECIPES)
@torch.no_grad()
def test_the_caller_may_cut_as_well(recipe, budget) -> None:
    model = make_tiny("llama")
    own, chunked = (kvarn.Cache(model, recipe, budget, block=block) for block in (25, 1000))
    logits = model(PROMPT, past_key_values=own).logits
    chunked.expect(90)
    for first, last in cuts(90, 25):
        assert chunked.expecting == (last > 0)
        other = model(PROMPT[:, first:last], past_key_values=chunked).logits
    assert not chunked.expecting
    assert torch.equal(logits, other)
    assert logits.shape[1] == 25
    assert own.report().entries == chunked.report().entries
    assert own.plan.allowed == chunked.plan.allowed
    if budget is not None:
        assert positions(own) == positions(chunked)


@pytest.mark.parametrize(("recipe", "budget"), [("snapkv(window=8)", 30), ("epicache(block=30)", 30)])
def test_generate_reads_in_blocks_and_so_do_its_own_chunks(recipe, budget) -> None:
    model = make_tiny("llama")
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12, "do_sample": False}
    own, chunked = (kvarn.Cache(model, recipe, budget, block=block) for block in (30, 1000))
    ours = model.generate(PROMPT, past_key_values=own, **arguments)
    theirs = model.generate(PROMPT, past_key_values=chunked, prefill_chunk_size=30, **arguments)
    assert torch.equal(ours, theirs)
    assert positions(own) == positions(chunked)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["full", "epicache"])
def test_with_room_for_everything_blocks_change_nothing(architecture, recipe) -> None:
    model = make_tiny(architecture)
    whole = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    blocks = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, recipe, block=25))
    torch.testing.assert_close(blocks, whole, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_sliding_layers_do_not_see_the_text_that_scores() -> None:
    model = make_tiny("gemma3")
    cache = kvarn.Cache(model, "epicache(block=30)", 20, text=TEXT)
    plain = kvarn.Cache(model, "window", 1000)
    for first, last in cuts(90, 30):
        scored = model(PROMPT[:, first:last], past_key_values=cache).logits
        if first == 0:
            assert torch.allclose(scored, model(PROMPT[:, :30], past_key_values=plain).logits, atol=1e-4)
    entries = cache.report().entries
    assert [layer[0] for layer in entries[:3]] == [[15, 15]] * 3
    assert sum(entries[3][0]) == 40


@pytest.mark.parametrize("given_positions", [True, False])
@torch.no_grad()
def test_a_padded_batch_is_cut_where_its_sequences_are(given_positions) -> None:
    model = make_tiny("llama").double()
    sequences = [PROMPT[0], PROMPT[0, 30:], PROMPT[0, :41]]
    ids, mask = left_padded(sequences)
    more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if given_positions else {}
    together = kvarn.Cache(model, "epicache(block=25)", 16, text=TEXT)
    logits = model(ids, attention_mask=mask, past_key_values=together, **more).logits[:, -1]
    for row, sequence in enumerate(sequences):
        alone = kvarn.Cache(model, "epicache(block=25)", 16, text=TEXT)
        own = model(sequence[None], past_key_values=alone).logits[0, -1]
        assert [x[row] for x in together.report().entries] == [x[0] for x in alone.report().entries]
        torch.testing.assert_close(logits[row], own, rtol=1e-4, atol=1e-4)  # rotations are in fp32


@torch.no_grad()
def test_every_way_of_giving_a_prompt() -> None:
    model = make_tiny("llama")

    def cache() -> kvarn.Cache:
        return kvarn.Cache(model, "epicache(block=30)", 20, text=TEXT)

    expected = model(PROMPT, past_key_values=cache(), output_hidden_states=True)
    assert [states.shape[1] for states in expected.hidden_states] == [30] * 5
    embeds = model.get_input_embeddings()(PROMPT)
    assert torch.equal(model(inputs_embeds=embeds, past_key_values=cache()).logits, expected.logits)
    decoder = model.get_decoder()
    positional = decoder(PROMPT, torch.ones_like(PROMPT), torch.arange(90)[None], cache())
    assert torch.equal(model.lm_head(positional.last_hidden_state), expected.logits)
    (states, *_) = decoder(PROMPT, past_key_values=cache(), return_dict=False)
    assert torch.equal(states, positional.last_hidden_state)


@torch.no_grad()
def test_a_share_is_one_of_the_whole_prompt_from_its_first_block_on() -> None:
    model = make_tiny("llama")
    cache, seen = kvarn.Cache(model, "snapkv(window=8)", 0.5, block=30), []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(cache.plan.allowed[0]))
    model(PROMPT, past_key_values=cache)
    hook.remove()
    assert seen == [int(0.5 * cache.spec.dense_bytes(90))] * 3
    assert cache.plan.bytes[0] <= seen[0]


@torch.no_grad()
def test_a_last_pass_of_one_token_belongs_to_the_prompt() -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "snapkv(window=4)", 30)
    cache.expect(81)
    for first, last in ((0, 80), (80, 81)):
        model(PROMPT[:, first:last], past_key_values=cache)
        assert cache.report().entries == [[[30, 30]]] * 4
    model(PROMPT[:, 81:82], past_key_values=cache)
    assert cache.report().entries == [[[31, 31]]] * 4


@torch.no_grad()
def test_refused_prompts_leave_the_cache_as_it_was() -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "kivi(bits=8, group=16, residual=16)", "40KB", block=30)
    model(PROMPT, past_key_values=cache)
    before = cache.report().to_dict()
    with pytest.raises(BudgetError):
        model(PROMPT.repeat(1, 5), past_key_values=cache)
    with pytest.raises(PromptTooLong, match="1090 tokens"):
        model(PROMPT[:, :1].expand(1, 1000), past_key_values=cache)
    with pytest.raises(Unsupported, match="2-d padding mask"):
        model(PROMPT, attention_mask=torch.ones(1, 1, 90, 180), past_key_values=cache)
    assert cache.report().to_dict() == before
    assert not cache.expecting
    model(PROMPT[:, :5], past_key_values=cache)


def test_what_cannot_be_read_in_blocks() -> None:
    model = make_tiny("llama")
    with pytest.raises(RecipeError, match="fastkv leaves tokens of a prompt behind"):
        kvarn.Cache(model, "fastkv", block=30)
    with pytest.raises(RecipeError, match="at least 1 token"):
        kvarn.Cache(model, block=0)
    with pytest.raises(RecipeError, match="snapkv scores prompts by their own queries"):
        kvarn.Cache(model, "snapkv", text=TEXT)
    with pytest.raises(RecipeError, match=r"text is token ids, int64 \[n\], not"):
        kvarn.Cache(model, "epicache", text=TEXT[None])
    with pytest.raises(RecipeError, match="cannot act together: both decide"):
        kvarn.Cache(model, "epicache + epicache(block=9)")


@torch.no_grad()
def test_other_caches_of_the_model_are_left_alone() -> None:
    model = make_tiny("llama")
    kvarn.Cache(model, "epicache(block=30)", 20, text=TEXT)
    own = model(PROMPT, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(model(PROMPT, past_key_values=kvarn.Cache(model)).logits, own)
    assert len(model.get_decoder()._forward_pre_hooks) == 1
    kvarn.Cache(model, block=7)
    assert len(model.get_decoder()._forward_pre_hooks) == 1


@pytest.mark.parametrize("recipe", ["epicache(block=30)", "h2o", "snapkv(window=8)"])
@torch.no_grad()
def test_a_fork_that_is_not_bounded_keeps_what_comes(recipe) -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, 20)
    model(PROMPT, past_key_values=cache)
    held, before = torch.tensor(cache.report().entries), positions(cache)
    fork = cache.fork(bounded=False)
    for tokens in (CONTINUATION[:1], CONTINUATION, PROMPT[0, :50], CONTINUATION[:1]):
        model(tokens[None], past_key_values=fork)
    assert torch.equal(torch.tensor(fork.report().entries), held + 58)
    assert positions(cache) == before
    assert [row[: len(old)] for row, old in zip(positions(fork), before, strict=True)] == before
    model(PROMPT[:, :50], past_key_values=cache)
    assert torch.tensor(cache.report().entries).sum() == held.sum()
    fork.reset()
    model(PROMPT, past_key_values=fork)
    assert torch.tensor(fork.report().entries).sum() == held.sum()


@pytest.mark.parametrize("chunk", [None, 10, 25, 60])
def test_the_engine_reads_the_same_blocks(chunk) -> None:
    model, recipe = make_tiny("llama"), "epicache(block=25, tail=8)"
    engine = kvarn.Engine(model, recipe, 0.5, prefill_chunk=chunk, step_tokens=40)
    prompts = [PROMPT[0], PROMPT[0, :51]]
    outputs = engine.generate([prompt.tolist() for prompt in prompts], kvarn.Sampling(max_tokens=8))
    for prompt, output in zip(prompts, outputs, strict=True):
        cache = kvarn.Cache(model, recipe, 0.5)
        own = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
        )
        assert output.tokens == own[0, len(prompt) :].tolist()
