"""What happens to entries between steps: kernels beside torch's operations, and beside the floor of the bytes moved.

    python benchmarks/gpu/memory.py [--out FILE] [--cases keep,drop,…] [--tiny]

Heads of 128 numbers in bf16, in pages of 32 entries. ``keep``: half of 32,768 entries of 128 heads, in random places.
``drop``: one of 4,096 entries of 8,192 heads (32 layers, 32 sequences, 8 KV heads), with two columns. ``settle``: 128
keys and values of 8,192 heads to KIVI's integers. ``step``: one value of each of these heads, as every step has it.

``ms`` is the median time from the call to the end of what the device does, ``host_ms`` until the call returns, and
``waits`` says whether the host waits for a device that is busy with something else. The floor is the bytes that are
read and written at the rate of a copy on the same device in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvarn.bench.machine import hardware, versions
from kvarn.formats import Columns, Dense, Int
from kvarn.memory import Arena, Segment, SideLayout, Store, StoreLayout, kernels

SIZE, PAGE, DTYPE = 128, 32, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DENSE = Dense(SIZE, DTYPE)
ROUNDS = 7
PATHS: dict[str, set[str]] = {"kernels": {DEVICE.type}, "torch": set()}
Round = tuple[Callable[[], None], Callable[[], None]]  # what prepares, what is timed


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    heads, shrink = (8192, 1) if not options.tiny else (4, 64)
    cases: dict[str, Callable[[], tuple[list[Round], int]]] = {
        "keep": lambda: keep(128 // shrink, 32768 // shrink),
        "drop": lambda: drop(heads, 4096 // shrink),
        "settle-int4": lambda: settle(heads, 4, 128),
        "settle-int2": lambda: settle(heads, 2, 128),
        "step-int4": lambda: settle(heads, 4, 1),
        "step-int2": lambda: settle(heads, 2, 1),
    }
    bandwidth = copy_bandwidth(2**31 if not options.tiny else 2**20)
    report = {
        "command": "python benchmarks/gpu/memory.py " + " ".join(sys.argv[1:]),
        "machine": hardware(DEVICE),
        "versions": versions() | {"cuda": torch.version.cuda},
        "copy_bytes_per_second": bandwidth,
        "rows": [],
    }
    print(f"copies at {bandwidth / 1e12:.3f} TB/s", flush=True)
    for case in options.cases.split(",") if options.cases else cases:
        for path, devices in PATHS.items():
            kernels.DEVICES = devices
            rounds, moved = cases[case]()
            floor = moved / bandwidth * 1e3
            row = {"case": case, "path": path, "bytes": moved, "floor_ms": floor} | measured(rounds)
            row["times_floor"] = row["ms"] / floor
            del rounds
            report["rows"].append(row)
            print(
                "{case:12} {path:8} {ms:9.3f} ms  host {host_ms:8.3f} ms  waits {waits!s:5}  floor {floor_ms:7.3f} ms  "
                "{times_floor:8.1f} times".format(**row),
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


def keep(heads: int, entries: int) -> tuple[list[Round], int]:
    """The rounds, each on a store of its own, and the bytes that one moves."""
    everyone, kept = slice(0, heads), entries // 2
    side = SideLayout(DENSE, DENSE)
    chosen = torch.rand(heads, entries, device=DEVICE).argsort(1)[:, :kept]
    mask = torch.zeros(heads, entries, dtype=torch.bool, device=DEVICE).scatter_(1, chosen, True)
    counts, rounds = torch.full((heads,), kept), []
    for _ in range(ROUNDS):
        store = Store(StoreLayout(side, side, Columns({"position": torch.int32}), PAGE), Arena(DEVICE, PAGE), heads)
        extended(list(store.segments), everyone, entries)
        rounds.append((nothing, lambda store=store: store.keep(everyone, mask, counts)))
    return rounds, 2 * heads * kept * row_bytes(store)


def drop(heads: int, entries: int) -> tuple[list[Round], int]:
    everyone, side = slice(0, heads), SideLayout(DENSE, DENSE)
    columns = Columns({"position": torch.int32, "mass": torch.float32})
    store = Store(StoreLayout(side, side, columns, PAGE), Arena(DEVICE, PAGE), heads)
    extended(list(store.segments), everyone, entries)
    victims = torch.randint(0, entries - ROUNDS, (ROUNDS, heads, 1), device=DEVICE)
    rounds = [(nothing, lambda each=each: store.drop(everyone, each)) for each in victims]
    return rounds, 2 * heads * row_bytes(store)


def settle(heads: int, bits: int, tokens: int) -> tuple[list[Round], int]:
    """``tokens`` of keys, where they are a block, and of values."""
    everyone = slice(0, heads)
    keys = SideLayout(Int(bits, "channel", 32, SIZE, DTYPE), DENSE, block=128)
    values = SideLayout(Int(bits, "token", 32, SIZE, DTYPE), DENSE, hold=128)
    store = Store(StoreLayout(keys, values, None, PAGE), Arena(DEVICE, PAGE), heads)
    extended([store.values.tail], everyone, 128)
    for side in (store.keys, store.values):
        for segment in side.segments:
            segment.pool.reserve(heads * -(-(256 + ROUNDS * tokens) // segment.pool.page_size))
        side.tail.pool.tensors["x"].normal_()
    sides = [store.keys, store.values] if tokens == 128 else [store.values]

    def ripen() -> None:
        extended([side.tail for side in sides], everyone, tokens)

    coded = [side.settled for side in sides if side.settled]
    written = sum(segment.format.unit_bytes * tokens // segment.unit for segment in coded)
    read = len(sides) * tokens * DENSE.unit_bytes
    return [(ripen, lambda: store.settle(everyone))] * ROUNDS, heads * (read + written)


def extended(segments: list[Segment], heads: slice, tokens: int) -> None:
    for segment in segments:
        segment.extend(heads, torch.full((heads.stop,), tokens))


def row_bytes(store: Store) -> int:
    """Bytes of one entry."""
    return sum(segment.format.unit_bytes for segment in store.segments)


def nothing() -> None:
    pass


def measured(rounds: list[Round]) -> dict:
    """Times of the rounds, without the first two, which compile what does so, and then of one behind a busy device."""
    times, returned, waits = [], [], None
    for prepare, act in rounds[:-1]:
        prepare()
        synchronize()
        start = time.perf_counter()
        act()
        returned.append(time.perf_counter() - start)
        synchronize()
        times.append(time.perf_counter() - start)
    host = statistics.median(returned[2:])
    prepare, act = rounds[-1]
    prepare()
    synchronize()
    if DEVICE.type == "cuda":
        torch.cuda._sleep(int(2e9 * (0.05 + 2 * host)))  # cycles
        act()
        waits = torch.cuda.current_stream().query()  # nothing is left to do
        synchronize()
    return {"ms": statistics.median(times[2:]) * 1e3, "host_ms": host * 1e3, "waits": waits}


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of the fastest of five copies."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target, times = torch.empty_like(source), []
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size / min(times[1:])


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases")
    parser.add_argument("--tiny", action="store_true", help="a few heads, to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
