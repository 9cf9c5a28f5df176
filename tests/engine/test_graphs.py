"""Passes as they are captured, computed here without a graph: on a CPU Triton interprets the kernels."""

import pytest
import torch

from kernel_reference import DEVICES, ON_A_GPU
from kvarn import Engine, Sampling
from kvarn.methods import Method
from learnt import kvquant, rotatekv
from per_token import PerToken
from tiny_models import make_tiny

pytest.importorskip("triton")

from kvarn.engine.fused import Fused
from kvarn.engine.graphs import Graphs, widened

ON_CUDA = torch.cuda.is_available()
PROMPTS = [torch.randint(1, 160, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 37, 9)]


KINDS = {
    "llama": {"RMSNorm", "MLP", "Attention", "DecoderLayer"},
    "qwen2": {"RMSNorm", "MLP", "Attention", "DecoderLayer"},  # biases
    "qwen3": {"RMSNorm", "MLP", "Attention", "DecoderLayer"},  # norms of queries and keys
    "gemma3": set(),  # one is added to the weights of norms, and the gate is another function
    "phi3": {"RMSNorm"},  # other projections
    "mixtral": {"RMSNorm", "Attention", "DecoderLayer"},
    "gpt_oss": {"RMSNorm"},  # rotations by half rows, and feed-forward layers that give more than one tensor
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_modules_are_replaced_where_they_are_the_same_and_put_back(name, device):
    model = make_tiny(name, **({} if name in ("gemma3", "gpt_oss") else {"num_hidden_layers": 1})).to(device)
    model.set_attn_implementation("kvarn")
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    ids = torch.arange(1, 7, device=device)[None]
    before = model(ids).logits
    fused = Fused(model)
    with fused.applied():
        kinds = {type(module).__name__ for module in model.modules() if "forward" in vars(module)} - {"Linear"}
    assert {kind.removeprefix(type(model).__name__.removesuffix("ForCausalLM")) for kind in kinds} == KINDS[name]
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


class Uncaptured(Graphs):
    """Computes anew what would be replayed."""

    passes = 0

    def _replayed(self, rows, state):
        self.passes += 1
        with widened(self.cache.groups, rows), self.fused.applied():
            return self.computed(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("architecture", "recipe", "budget"),
    [
        ("llama", "full", None),
        pytest.param("llama", "snapkv(window=8)", 0.5, marks=ON_A_GPU),
        pytest.param("llama", "window", 16, marks=ON_A_GPU),
        ("llama", "h2o", 16),
        pytest.param("llama", "scissorhands(history=8, recent=2)", 16, marks=ON_A_GPU),
        pytest.param("llama", "lazyeviction(window=4)", 16, marks=ON_A_GPU),
        pytest.param("llama", "kivi(bits=4, group=16, residual=16)", None, marks=ON_A_GPU),
        pytest.param("llama", "think(ratio=0.5, window=8, recent=8)", None, marks=ON_A_GPU),
        pytest.param("llama", "zipcache(gap=3)", None, marks=ON_A_GPU),
        pytest.param("llama", "mikv(low=4)", None, marks=ON_A_GPU),
        pytest.param("llama", "h2o + mikv(low=4)", 20, marks=ON_A_GPU),
        pytest.param("llama", "arkv(window=4, keep=0.9)", 18, marks=ON_A_GPU),
        pytest.param("llama", "fp8", None, marks=ON_A_GPU),
        pytest.param("llama", PerToken(), None, marks=ON_A_GPU),
        pytest.param("qwen3", "snapkv(window=8) + fp8", 0.5, marks=ON_A_GPU),
        pytest.param("gemma3", "full", None, marks=ON_A_GPU),
        pytest.param("llama", "mustafar(recent=4)", None, marks=ON_A_GPU),
        pytest.param("llama", kvquant(), None, marks=ON_A_GPU),
        pytest.param("llama", "vidkv(group=8, residual=8)", None, marks=ON_A_GPU),
        pytest.param("llama", rotatekv(bits=4, group=16, massive=3), None, marks=ON_A_GPU),
    ],
)
def test_a_pass_over_buffers_gives_the_tokens_of_the_cache(architecture, recipe, budget, device, monkeypatch):
    monkeypatch.setattr("kvarn.memory.kernels.DEVICES", {"cpu", "cuda"})
    model = make_tiny(architecture, num_hidden_layers=4 if architecture == "gemma3" else 1).to(device)
    # Enough tokens for what was observed to decide.
    sampling = [Sampling(max_tokens=n) for n in (12 if recipe == "h2o" else 5, 3, 2)]
    own = Engine(make_tiny(architecture, num_hidden_layers=model.config.num_hidden_layers), recipe, budget)
    with monkeypatch.context() as patch:
        patch.setattr("kvarn.memory.kernels.DEVICES", set())
        expected = [answer.tokens for answer in own.generate(PROMPTS, sampling)]
    engine = Engine(model, recipe, budget, max_batch=6)
    if device == "cpu":

        def capture(cache, most):
            if engine._runner.graphs is None:
                assert all(group.captures for group in cache.groups)
                cache.reserve(most)
                engine._runner.graphs = Uncaptured(model, cache, most)

        engine._runner.capture = capture
    answers = engine.generate(PROMPTS, sampling)
    graphs = engine._runner.graphs
    assert graphs is not None
    assert device == "cuda" or graphs.passes > 0
    assert [answer.tokens for answer in answers] == expected
    segments = [each for group in graphs.cache.groups for each in group.store.segments if each.state]
    assert {state.data_ptr() for each in segments for state in each.state.values()} <= set(graphs.state())


def decoding(recipe: str | Method, budget: int | None, steps: int) -> Engine:
    """An engine on a GPU that has taken ``steps`` with two requests of many tokens."""
    engine = Engine(make_tiny("llama").to("cuda"), recipe, budget, max_batch=2)
    for prompt in PROMPTS[:2]:
        engine.add(prompt, Sampling(max_tokens=40))
    for _ in range(steps):
        engine.step()
    return engine


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "budget"), [("h2o", 200), ("mikv(low=4)", None)])
def test_what_a_query_pays_is_counted_once(recipe, budget):
    """When its pass is captured too."""
    engine = decoding(recipe, budget, 4)
    ((group,), seen) = engine._batch.groups, engine._batch.seen
    mass = group.store.read_column(group.everyone, "mass")
    mass = mass.masked_fill(~group._within(group.everyone), 0).sum(1).cpu()
    torch.testing.assert_close(mass, group._per_head(seen)[group.everyone].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "budget"), [("h2o", 16), ("lazyeviction(window=4)", 16), ("mikv(low=4)", None)])
def test_entries_leave_and_move_while_the_host_does_not_wait(recipe, budget):
    engine = decoding(recipe, budget, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            engine._runner.decode(engine._batch, [1, 2])
            engine._batch.settle()
            engine._batch.open()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert budget is None or max(int(group.entries().max()) for group in engine._batch.groups) <= budget + 1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8", PerToken()], ids=str)
def test_nothing_is_left_to_encode_between_steps(recipe, monkeypatch):
    engine = decoding(recipe, None, 0)
    monkeypatch.delattr("kvarn.memory.triton.encoding.encode")
    for _ in range(20):
        engine.step()
        for group in engine._batch.groups:
            planned = int(group.store.layout.most_bytes(group.store.lengths).sum())
            assert sum(s.page_bytes + s.bookkeeping_bytes for s in group.store.segments) == planned
    assert engine._runner.graphs is not None


def test_what_decides_on_the_host_is_not_captured(monkeypatch):
    monkeypatch.setattr("kvarn.memory.kernels.DEVICES", {"cpu", "cuda"})
    model = make_tiny("llama")
    for recipe, budget in [("keyformer", 20), ("xquant(bits=8, group=16)", None)]:
        engine = Engine(model, recipe, budget)
        engine.generate(PROMPTS[:1], Sampling(max_tokens=1))
        engine.add(PROMPTS[0], Sampling(max_tokens=5))
        with monkeypatch.context() as patch:
            patch.setattr("kvarn.memory.kernels.DEVICES", set())
            engine.step()
        assert not any(group.captures for group in engine._batch.groups)
