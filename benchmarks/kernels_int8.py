"""int8 kernels beside PyTorch's own: bf16 product (oneDNN), ``torch._int_mm``, and what memory delivers.

    python benchmarks/kernels_int8.py [--tokens 1 8 128 512] [--threads N] [--rounds N] [--json FILE]

All contestants take turns in one run; medians. ``int8_linear`` is the whole: bf16 activations in, quantized, outliers
found (threshold 6), multiplied, bf16 out; ``int8_matmul`` the product with its epilogue alone; ``_int_mm`` gives bare
int32 sums. Weights are taken in turn from a set too large for the caches, as in a model. Read bandwidth: sum of a
large array, the best of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from compress.kernels import int8, library
from compress.numerics.int8_panels import pack_int8_panels

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))  # (in features, out features)
COLD_BYTES = 200 << 20  # of weights in a set


def measure_bandwidth(rounds: int) -> float:
    """GB/s that all threads read together."""
    values = torch.ones(64 << 20, dtype=torch.int32)
    best = min(time_once(lambda: values.view(-1, 4096).amax(1)) for _ in range(rounds))
    return values.nbytes / best / 1e9


def time_once(body: Callable[[], object]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def measure(contestants: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns; the argument counts calls."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, body in contestants.items():
            taken = time_once(lambda body=body, k=round_number: body(k))
            if round_number:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(columns: int, rows: int, tokens: int, rounds: int) -> dict[str, float]:
    copies = max(1, min(12, COLD_BYTES // (columns * rows)))
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    panels = pack_int8_panels(codes, torch.rand(rows) / 127)
    layers = [panels.codes.clone() for _ in range(copies)]
    plain = [codes.clone() for _ in range(copies)]
    dense = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(max(1, copies // 2))]
    x = torch.randn(tokens, columns, dtype=torch.bfloat16).clamp_(-5, 5)
    q, scale, _ = int8.quantize_rows(x, 0.0)

    def multiply(k: int) -> object:
        parts = (layers[k % copies], panels.scale, panels.sums, None, None, None, None, None)
        return int8.int8_matmul(q, scale, *parts, rows, torch.bfloat16)

    def linear(k: int) -> object:
        layer = layers[(k + copies // 2) % copies]  # not the one that multiply has just left in the caches
        parts = (layer, panels.scale, panels.sums, None, 6.0, None, None)
        return int8.int8_linear(x, *parts, rows)

    return measure(
        {
            "int8_linear": linear,
            "int8_matmul": multiply,
            "bf16": lambda k: torch.nn.functional.linear(x, dense[k % len(dense)]),
            "_int_mm": lambda k: torch._int_mm(q, plain[k % copies].t()),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library.set_mode("require")
    bandwidth = measure_bandwidth(options.rounds)
    print(f"{library.describe()['in_use']}, {options.threads} threads, reads {bandwidth:.1f} GB/s")
    results = []
    for columns, rows in SHAPES:
        for tokens in options.tokens:
            seconds = compare(columns, rows, tokens, options.rounds)
            operations = 2.0 * tokens * columns * rows
            results.append({"in": columns, "out": rows, "tokens": tokens, "seconds": seconds})
            print(f"{columns} -> {rows}, {tokens} tokens")
            for name, taken in seconds.items():
                size = columns * rows * (2 if name == "bf16" else 1)
                print(
                    f"  {name:12} {taken * 1e3:9.3f} ms  {operations / taken / 1e9:7.0f} Gop/s  "
                    f"{size / taken / 1e9:6.1f} GB/s ({size / taken / 1e9 / bandwidth:4.0%})  "
                    f"{seconds['bf16'] / taken:5.2f}x bf16"
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"bandwidth_gb_per_s": bandwidth, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
