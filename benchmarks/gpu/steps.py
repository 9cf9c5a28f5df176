"""The operations of a decoding step of an 8B Llama 3.1 shape, one by one: kvarn's kernels against torch's.

    python benchmarks/gpu/steps.py [--out FILE] [--rows 1,16,128,216] [--tune]

bf16, in a CUDA graph that goes through copies of the operands enough for no cache to hold them. ``ours`` is what
captured passes run, ``torch`` what transformers' modules and ``index_copy_`` run in their place. Times are microseconds
of one operation, the median of 20 replays; ``of_copy``: the bytes of an operation's weights in that time, as a share of
the bytes that a copy moves (reads and writes both counted). ``--tune`` tries tilings of the products of one and two
rows instead.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

from kvarn.attention.newest import Pages, Projected
from kvarn.attention.triton.matvec import Tiling, gated_linear, linear
from kvarn.attention.triton.small import added_norm, append, gated, norm
from kvarn.formats import Dense, Float8, Int

HIDDEN, INNER, VOCABULARY, QUERIES, KEYS, SIZE = 4096, 14336, 128256, 32, 8, 128
EPSILON = 1e-5
PAGE, PAGES = 16, 64  # tokens of a page, pages of a head
CACHED = 256 * 2**20  # bytes that operands together must have not to be read from a cache
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
Operation = Callable[[], object]
APPENDED = {
    "append": Dense(SIZE, DTYPE),
    "append 8-bit floats": Float8(SIZE, DTYPE),
    "append 4-bit integers": Int(4, "token", 32, SIZE, DTYPE),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE) / 8


def graphed(operations: list[Operation]) -> float:
    """Microseconds of one of ``operations``, replayed together: the median of 20."""
    for operation in operations:
        operation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for operation in operations:
            operation()
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(operations))
    return sorted(times[3:])[10]


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graphed([lambda: target.copy_(source)]) / 1e6)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' modules compute it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1)
    return x * cos[:, None] + half * sin[:, None]


def small(rows: int) -> dict[str, tuple[list[Operation], list[Operation]]]:
    """Each small operation by our kernels and by torch's, 16 times with operands of its own."""
    both: dict[str, tuple[list[Operation], list[Operation]]] = {}

    def add(name: str, ours: Operation, theirs: Operation) -> None:
        both.setdefault(name, ([], []))
        both[name][0].append(ours)
        both[name][1].append(theirs)

    weight = random(HIDDEN)
    for _ in range(16):
        x, more = random(rows, 1, HIDDEN), random(rows, 1, HIDDEN)
        add("norm", lambda x=x: norm(x, weight, EPSILON), lambda x=x: rms_norm(x, weight))
        add(
            "sum and norm",
            lambda x=x, more=more: added_norm(x, more, weight, EPSILON),
            lambda x=x, more=more: rms_norm(x + more, weight),
        )
        joint = random(rows, 1, 2 * INNER)
        gate, up = joint.chunk(2, -1)
        apart = gate.contiguous(), up.contiguous()
        add("gate", lambda g=gate, u=up: gated(g, u), lambda a=apart: silu(a[0]) * a[1])
        for name, fmt in APPENDED.items():
            add(name, *appending(rows, fmt))
    return both


def appending(rows: int, fmt: Dense | Float8 | Int) -> tuple[Operation, Operation]:
    """A token of ``rows`` sequences rotated, and written in a format to scattered pages."""
    states = random(rows, (QUERIES + 2 * KEYS) * SIZE)
    cos, sin = random(rows, 1, SIZE), random(rows, 1, SIZE)
    heads = rows * KEYS
    table = torch.randperm(heads * PAGES, device=DEVICE).view(heads, PAGES).int()
    lengths = torch.randint(1, PAGE * PAGES, (heads,), device=DEVICE)
    spans = torch.stack([torch.zeros_like(lengths), lengths], 1).int()
    keys, values = (Pages(fmt, fmt.encode(random(heads * PAGES, PAGE, SIZE)), table, spans) for _ in range(2))
    token = Projected(states, QUERIES, KEYS, (cos, sin))
    slots = table.gather(1, (lengths[:, None] - 1) // PAGE)[:, 0].long() * PAGE + (lengths - 1) % PAGE
    query, key, value = (
        x.view(rows, 1, -1, SIZE).transpose(1, 2).contiguous()
        for x in states.split([QUERIES * SIZE, KEYS * SIZE, KEYS * SIZE], 1)
    )

    def theirs() -> Tensor:
        for pages, new in ((keys, rotated(key, cos, sin)), (values, value)):
            for name, encoded in fmt.encode(new.flatten(0, 2)).items():
                pages.tensors[name].flatten(0, 1).index_copy_(0, slots, encoded)
        return rotated(query, cos, sin)

    return lambda: append(token, keys, values, 0), theirs


def products(rows: int) -> dict[str, tuple[list[Operation], list[Operation], int]]:
    """Each product with weights by ours and by torch's, and the bytes of its weights."""
    inner = QUERIES * SIZE
    shapes = {
        "queries, keys, values": (HIDDEN, [inner, KEYS * SIZE, KEYS * SIZE]),
        "attention's output": (inner, [HIDDEN]),
        "gate and up": (HIDDEN, [INNER, INNER]),
        "down": (INNER, [HIDDEN]),
        "logits": (HIDDEN, [VOCABULARY]),
    }
    both = {}
    for name, (size, outputs) in shapes.items():
        taken = 2 * size * sum(outputs)
        x = random(rows, 1, size)
        weights = [random(sum(outputs), size) for _ in range(-(-CACHED // taken))]
        product = gated_linear if name == "gate and up" else linear
        ours = [lambda w=w, x=x, f=product: f(x, w) for w in weights]
        apart = [w.split(outputs) for w in weights]

        def theirs(parts: tuple[Tensor, ...], x: Tensor = x, gates: bool = name == "gate and up") -> object:
            outs = [torch_linear(x, part) for part in parts]
            return silu(outs[0]) * outs[1] if gates else outs

        both[name] = ours, [lambda p=p, f=theirs: f(p) for p in apart], taken
    return both


def tuned(bandwidth: float) -> list[dict]:
    """Tilings of products of one and two rows."""
    found = []
    tilings = [Tiling(*each) for each in itertools.product((4, 8, 16), (256, 512, 1024), (2, 4, 8))]
    for name, (size, outputs) in {"narrow": (4096, 4096), "wide": (4096, 28672), "deep": (14336, 4096)}.items():
        weights = [random(outputs, size) for _ in range(-(-CACHED // (2 * size * outputs)))]
        for rows in (1, 2):
            x = random(rows, 1, size)
            of_copy = 2 * size * outputs / bandwidth * 1e6
            cublas = graphed([lambda w=w, x=x: torch_linear(x, w) for w in weights])
            print(f"{name} {rows}: torch {cublas:.1f} us, {of_copy / cublas:.3f} of copy", flush=True)
            for tiling in tilings:
                if tiling.rows * tiling.columns > 256 * tiling.warps * 8:
                    continue  # tiles and sums are beyond the registers
                time = graphed([lambda w=w, x=x, t=tiling: linear(x, w, tiling=t) for w in weights])
                row = {"case": name, "rows": rows, "tiling": vars(tiling), "microseconds": time, "torch": cublas}
                found.append(row | {"of_copy": of_copy / time})
                print(f"  {tiling} {time:.1f} us, {of_copy / time:.3f} of copy", flush=True)
    return found


def compared(rows: int, bandwidth: float) -> list[dict]:
    found = []
    operations = {name: (*each, None) for name, each in small(rows).items()} | products(rows)
    for name, (ours, theirs, taken) in operations.items():
        row = {"operation": name, "rows": rows, "ours": graphed(ours), "torch": graphed(theirs)}
        row["ratio"] = row["torch"] / row["ours"]
        if taken is not None:
            row |= {f"{who}_of_copy": taken / (row[who] / 1e6) / bandwidth for who in ("ours", "torch")}
        found.append(row)
        share = f"  {row['ours_of_copy']:.3f} against {row['torch_of_copy']:.3f} of copy" if taken is not None else ""
        print(
            "{rows:4} {operation:22} {ours:8.1f} us  torch {torch:8.1f} us  {ratio:5.2f}x".format(**row) + share,
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", default="1,16,128,216")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    report = {
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "rows": [],
    }
    batches = [None] if arguments.tune else [int(rows) for rows in arguments.rows.split(",")]
    for rows in batches:
        report["rows"] += tuned(bandwidth) if rows is None else compared(rows, bandwidth)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
