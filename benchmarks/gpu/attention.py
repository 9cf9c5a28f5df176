"""Decode attention over paged stores as a share of the copy bandwidth of the same device in the same run.

    python benchmarks/gpu/attention.py [--out FILE] [--cases dense,float8,…] [--lengths 32768,4096,spread]

16 sequences, 8 KV heads with 4 queries each, head size 128, bf16, entries in scattered pages. Each time is that of the
splits and their merge together, replayed in a CUDA graph over enough layers that no cache holds them. The share is the
bytes that these entries take (codes, scales, minima) in that time, of the bytes that a copy moves (reads and writes
both counted). ``spread``: log-normal lengths (sigma 1) with 32,768 entries a head on average.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from kvarn.attention import Part, Variant, attend
from kvarn.attention.triton.decode import attend_stored
from kvarn.attention.triton.stretches import Tuning
from kvarn.formats import Dense, Float8, Int
from kvarn.memory import Arena, SideLayout, Store, StoreLayout

SEQUENCES, KV_HEADS, GROUP, SIZE = 16, 8, 4, 128
ROWS = SEQUENCES * KV_HEADS
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
VARIANT = Variant(SIZE**-0.5)
CASES = ["dense", "float8", "int8", "int4", "int2"]


def layout(case: str, page: int) -> StoreLayout:
    """``case`` on both sides; integers as KIVI has them, keys by channel and values by token in groups of 32."""
    dense = Dense(SIZE, DTYPE)
    if case == "dense":
        return StoreLayout(SideLayout(dense, dense), SideLayout(dense, dense), None, page)
    if case == "float8":
        side = SideLayout(Float8(SIZE, DTYPE), dense, encodes_new=True)  # as ``fp8`` has it
        return StoreLayout(side, side, None, page)
    bits = int(case.removeprefix("int"))
    keys = SideLayout(Int(bits, "channel", 32, SIZE, DTYPE), dense, block=128)
    values = SideLayout(Int(bits, "token", 32, SIZE, DTYPE), dense, hold=128)
    return StoreLayout(keys, values, None, page)


def lengths_of(kind: str) -> torch.Tensor:
    """Entries of each head, int64 [ROWS]."""
    if kind != "spread":
        return torch.full((ROWS,), int(kind))
    spread = torch.randn(ROWS, generator=torch.Generator().manual_seed(0)).exp()
    return (spread * (32768 / spread.mean())).long().clamp(min=1)


def filled(case: str, lengths: torch.Tensor, layers: int, page: int) -> Store:
    """A store with random contents in scattered pages."""
    store = Store(layout(case, page), Arena(DEVICE, page), layers * ROWS)
    counts = lengths.repeat(layers)
    heads = slice(0, layers * ROWS)
    for side in (store.keys, store.values):
        ripe = side.layout.ripe(counts) if side.settled else torch.zeros_like(counts)
        for segment, tokens in ((side.settled, ripe), (side.tail, counts - ripe)):
            if segment is not None:
                segment.extend(heads, tokens)
                held = torch.arange(segment.table.shape[1]) < segment._held(heads)[:, None]
                pages = segment.table[held]
                segment.table[held] = pages[torch.randperm(pages.numel())]
    for pool in store.arena.pools.values():
        for name, tensor in pool.tensors.items():
            if name == "range":
                tensor[..., 0].uniform_(0.05, 0.2)
                tensor[..., 1].uniform_(-1, 0)
            elif name == "scale":
                tensor.uniform_(0.005, 0.01)
            elif tensor.dtype == torch.uint8:
                tensor.random_(0, 120 if isinstance(pool.format, Float8) else 256)
            else:
                tensor.normal_()
    return store


def bytes_of(store: Store, layers: int) -> float:
    """Bytes of the entries of one layer."""
    return (
        sum(segment.format.unit_bytes * int(segment.lengths.sum()) / segment.unit for segment in store.segments)
        / layers
    )


def graphed(run, layers: int) -> float:
    """Milliseconds of one layer, the median of 20 replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / layers)
    return sorted(times[3:])[10]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the faster of two copies of 2 GiB: the driver's and a kernel's."""
    source = torch.randn(2**29, device=DEVICE)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.mul(source, 1, out=target))
    return 2 * source.nbytes / (min(graphed(copy, 1) for copy in copies) / 1e3)


def error(store: Store, query: torch.Tensor) -> float:
    """Relative error of the kernel in the first sequence of the first layer, against attention in fp32."""
    heads = slice(0, KV_HEADS)
    out, _ = attend_stored(query, store, slice(0, ROWS), VARIANT)
    keys, values = (x.float().unflatten(0, (1, -1)) for x in store.read(heads))
    held = torch.arange(keys.shape[2]) < store.lengths[heads][:, None]
    part = Part(keys, values, held[None, :, None].to(DEVICE))
    expected = attend(query[:1].float(), [part], VARIANT)
    return float((out[:1].float() - expected).norm() / expected.norm())


def measured(case: str, kind: str, page: int, bandwidth: float, tuned: Tuning | None, chunk: int | None) -> dict:
    lengths = lengths_of(kind)
    layers = 1 if kind != "4096" else 8
    store = filled(case, lengths, layers, page)
    query = torch.randn(SEQUENCES, KV_HEADS * GROUP, 1, SIZE, dtype=DTYPE, device=DEVICE)

    def run() -> None:
        for layer in range(layers):
            attend_stored(query, store, slice(layer * ROWS, (layer + 1) * ROWS), VARIANT, tuned=tuned, chunk=chunk)

    milliseconds = graphed(run, layers)
    taken = bytes_of(store, layers)
    return {
        "case": case,
        "lengths": kind,
        "page": page,
        "bytes": taken,
        "microseconds": milliseconds * 1e3,
        "of_copy": taken / (milliseconds / 1e3) / bandwidth,
        "error": error(store, query),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--lengths", default="32768,4096,spread")
    parser.add_argument("--page", type=int, default=32)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e12:.2f} TB/s")
    rows, dense = [], {}
    for case in arguments.cases.split(","):
        for kind in arguments.lengths.split(","):
            row = measured(case, kind, arguments.page, bandwidth, None, None)
            dense.setdefault(kind, row["microseconds"])
            row["against_first"] = dense[kind] / row["microseconds"]
            rows.append(row)
            print(
                "{case:7} {lengths:>6} {microseconds:7.1f} us  {of_copy:.3f} of copy  {against_first:.2f}x  "
                "error {error:.1e}".format(**row),
                flush=True,
            )
    if arguments.out:
        report = {
            "command": "python " + " ".join(sys.argv),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_second": bandwidth,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
