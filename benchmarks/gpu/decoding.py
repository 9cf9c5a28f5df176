"""Whole decoding steps and prompts of an 8B Llama 3.1 shape in bf16 (random weights), against the floor of their bytes.

    python benchmarks/gpu/decoding.py [--out FILE] [--cases NAME,…] [--steps 20] [--tiny]

The floor of a step is (bytes of the weights that it reads + bytes of the pages held) / copy bandwidth, which is
measured first, in the same run, over copies of 4 GiB (bytes read and written). A step is ``Engine.step``: the host's
work, the pass, sampling, and reading the tokens; ``device_ms`` is the captured pass alone. Caches are filled with
random numbers in scattered pages, because reading the prompts would take hours. Beside it: transformers' dynamic cache,
and its static cache compiled (``reduce-overhead``), with random contents of the same lengths.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import kvarn
from kvarn.bench.machine import hardware, versions
from kvarn.engine.requests import Request
from kvarn.memory import Arena

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SNAPKV = "snapkv"
# name: recipe, entries a head (None: all), tokens seen, sequences; names that end in pages32: with such pages
DECODING = {
    "full-1k-1": ("full", None, 1024, 1),
    "full-32k-1": ("full", None, 32768, 1),
    "full-32k-16": ("full", None, 32768, 16),
    "full-128k-4": ("full", None, 131000, 4),
    "eighth-32k-128": (SNAPKV, 4096, 32768, 128),
    "eighth-32k-216": (SNAPKV, 4096, 32768, 216),
    "eighth-128k-48": (SNAPKV, 16375, 131000, 48),
    "fixed-8k-32": (SNAPKV, 4096, 8192, 32),
    "fixed-32k-32": (SNAPKV, 4096, 32768, 32),
    "fixed-128k-32": (SNAPKV, 4096, 131000, 32),
    "kivi4-32k-32": ("kivi(bits=4)", None, 32768, 32),
    "kivi4-32k-32-pages32": ("kivi(bits=4)", None, 32768, 32),
    "kivi2-32k-64": ("kivi(bits=2)", None, 32768, 64),
    "kivi2-32k-64-pages32": ("kivi(bits=2)", None, 32768, 64),
    "fp8-32k-32": ("fp8", None, 32768, 32),
}
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}
DYNAMIC = {"dynamic-1k-1": (1024, 1), "dynamic-32k-1": (32768, 1), "dynamic-32k-16": (32768, 16)}
STATIC = {"static-1k-1": (1024, 1), "static-32k-16": (32768, 16)}
PREFILL = {
    "prefill-32k-full": ("full", None, None),
    "prefill-32k-snapkv": (SNAPKV, 4096, None),
    "prefill-32k-snapkv-chunks": (SNAPKV, 4096, 8192),
}


def main() -> None:
    options = _options()
    names = options.cases.split(",") if options.cases else [*DECODING, *PREFILL, *DYNAMIC, *STATIC]
    measure("decoding.py", options, 32, names, _row)


def measure(script, options, layers, names, row_of, **settings):
    """Writes ``row_of(model, name, options, with_floor)`` of each name to ``options.out``; ``with_floor(row, bytes)``
    sets a step beside the floor of so many bytes that are held."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = llama(options.tiny, layers)
    bandwidth = _copy_bandwidth(options.tiny)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is not embedding)

    def with_floor(row, held):
        floor = (weights + held) / bandwidth * 1e3
        return row | {"floor_ms": round(floor, 3), "times_floor": round(row["step_ms"] / floor, 3)}

    result = {
        "command": f"python benchmarks/gpu/{script} " + " ".join(sys.argv[1:]),
        "machine": hardware(DEVICE),
        "versions": versions() | {"cuda": torch.version.cuda},
        "copy_bandwidth": bandwidth,
        "weight_bytes": weights,
        "layers": layers,
        **settings,
        "rows": {},
    }
    for name in names:
        start = time.perf_counter()
        try:
            row = row_of(model, name, options, with_floor)
        except Exception as error:  # a case that fails says so, and the others go on
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        result["rows"][name] = row
        print(name, row, f"({time.perf_counter() - start:.0f} s)", flush=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def _row(model, name, options, with_floor):
    if name in DECODING:
        recipe, entries, tokens, sequences = DECODING[name]
        if options.tiny:
            entries, tokens, sequences = entries and entries // 64, tokens // 64, min(sequences, 4)
        page = 32 if name.endswith("pages32") else 16
        row = _decoding(model, recipe, entries, tokens, sequences, page, options.steps)
        row["tokens_per_second"] = round(sequences / row["step_ms"] * 1e3)
        return with_floor(row, row["page_bytes"])
    if name in PREFILL:
        recipe, entries, chunk = PREFILL[name]
        return _prefill(
            model, recipe, entries, 512 if options.tiny else 32768, chunk and (chunk // 64 if options.tiny else chunk)
        )
    tokens, sequences = (DYNAMIC | STATIC)[name]
    if options.tiny:
        tokens, sequences = tokens // 64, min(sequences, 4)
    row = _transformers(model, tokens, sequences, name in STATIC, options.steps)
    return with_floor(row, sequences * tokens * kvarn.Cache(model).spec.dense_bytes(1))


# -- kvarn ------------------------------------------------------------------------------------------------------


def _decoding(model, recipe, entries, tokens, sequences, page, steps):
    engine = kvarn.Engine(model, recipe, entries, max_batch=sequences, page_size=page)
    engine._batch = cache = _filled(model, recipe, entries, tokens, sequences, steps + 10, page)
    engine.arena = engine._scheduler.arena = cache._arena
    sampling = kvarn.Sampling(max_tokens=10**6, ignore_end=True)
    for number in range(sequences):
        engine._scheduler.running.append(Request(number, [1], sampling, frozenset(), None, None, tokens=[7], read=1))
    engine._runner.capture(cache, sequences)
    for _ in range(3):
        engine.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - start) * 1e3)
    graphs = engine._runner.graphs
    row = {
        "recipe": recipe,
        "entries": entries or tokens,
        "tokens": tokens,
        "sequences": sequences,
        "page_size": page,
        "step_ms": round(statistics.median(times), 3),
        "slowest_ms": round(max(times), 3),
        "page_bytes": cache._arena.bytes,
        "captured": graphs is not None,
    }
    if graphs is not None:
        (_, graph, _) = next(iter(graphs._captured.values()))
        row["device_ms"] = round(_device_ms(graph.replay), 3)
    cache.free()
    return row


def _filled(model, recipe, entries, tokens, sequences, steps, page):
    """A cache of ``sequences`` that hold ``entries`` a head (None: all), with room for ``steps`` more."""
    cache = kvarn.Cache(model, recipe, entries, arena=Arena(model.device, page))
    cache._adopt(cache._new_groups(sequences, model.device))
    counts = []
    for group in cache.groups:
        store = group.store
        held = torch.full_like(store.lengths, entries or tokens)
        for side in (store.keys, store.values):
            ripe = side.layout.ripe(held) if side.settled else torch.zeros_like(held)
            counts += [(side.settled, ripe)] if side.settled else []
            counts += [] if side.layout.appends_codes else [(side.tail, held - ripe)]
        if store.columns:
            counts.append((store.columns, held))
        group.capacity = torch.full_like(group.capacity, entries or 2**60)
    needed: dict = {}
    for segment, count in counts:
        ends = count + steps + 2 * segment.pool.page_size
        needed[segment.pool] = needed.get(segment.pool, 0) + int(segment._pages_of(ends).sum())
    for pool, pages in needed.items():
        pool.reserve(pages)
        pool._free = torch.randperm(pool._free_count).int()
        for tensor in pool.tensors.values():
            _randomize(tensor)
    for segment, count in counts:
        segment.extend(slice(0, count.numel()), count)
    cache._seen = torch.full((sequences,), tokens)
    cache._passed = cache._seen.clone()
    for group in cache.groups:
        group.prompted = cache._seen.clone()
    return cache


def _randomize(tensor):
    for part in tensor.split(max(1, 2**28 // max(1, tensor[0].numel()))):
        if tensor.is_floating_point():
            part.normal_(std=0.5)
        else:
            part.random_(0, 127)


def _prefill(model, recipe, entries, tokens, chunk):
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=DEVICE)
    times, peaks = [], []
    for _ in range(3):
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        cache = kvarn.Cache(model, recipe, entries)
        cache.expect(tokens)
        synchronize()
        start = time.perf_counter()
        for part in ids.split(chunk or tokens, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        peaks.append((torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0) - before)
        report = cache.report()
        cache.free()
    return {
        "recipe": recipe,
        "entries": entries,
        "tokens": tokens,
        "chunk": chunk,
        "ms": round(min(times), 1),
        "held_bytes": report.bytes,
        "planned_bytes": cache.plan.bytes[0] if cache.plan else None,
        "planned_peak_bytes": cache.plan.peak[0] if cache.plan and cache.plan.peak else None,
        "kvarn_peak_bytes": report.peak_bytes,
        "torch_peak_bytes": peaks[-1],
    }


# -- transformers -----------------------------------------------------------------------------------------------


def _transformers(model, tokens, sequences, static, steps):
    config = model.config
    model.set_attn_implementation("sdpa")
    shape = (sequences, config.num_key_value_heads, tokens, config.head_dim)
    room = tokens + steps + 16
    cache = StaticCache(config=config, max_cache_len=room) if static else DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        x = torch.randn(shape, dtype=model.dtype, device=DEVICE)
        cache.update(x, x.clone(), layer)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False) if static else model.forward
    token = torch.full((sequences, 1), 7, device=DEVICE)
    times = []
    for step in range(steps + 5):
        synchronize()
        start = time.perf_counter()
        positions = torch.full((sequences, 1), tokens + step, device=DEVICE)
        out = forward(token, position_ids=positions, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
        token.tolist()
        times.append((time.perf_counter() - start) * 1e3)
    model.set_attn_implementation("kvarn")
    return {
        "cache": "static, compiled" if static else "dynamic",
        "tokens": tokens,
        "sequences": sequences,
        "step_ms": round(statistics.median(times[5:]), 3),
        "tokens_per_second": round(sequences / statistics.median(times[5:]) * 1e3),
    }


# -- measuring --------------------------------------------------------------------------------------------------


def llama(tiny, layers):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = SHAPE | {"num_hidden_layers": layers} | (TINY if tiny else {}) | {"rope_parameters": rope}
    with DEVICE:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def _copy_bandwidth(tiny):
    """Bytes a second, read and written."""
    size = 2**20 if tiny else 2**32
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return round(2 * size / _device_ms(lambda: target.copy_(source)) * 1e3)


def _device_ms(run, times=10):
    """The least of three means."""
    run()
    means = []
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        synchronize()
        means.append((time.perf_counter() - start) / times * 1e3)
    return min(means)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="names of the cases, all by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--out", default="benchmarks/results/gpu/decoding.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
