"""Single matrix products: our packed weights beside dense ones, in one run, in turn; medians.

``python benchmarks/kernel_speed.py [--rounds 7] [--shapes 4096x4096 ...] [--tokens 1 8 ...]``; writes
``benchmarks/results/kernels.json``. Shapes are out x in features; activations are bf16, weights in groups of 64.

At one token a product is as fast as its weight can be read: the table gives bytes of codes, scales and zeros per second
and their share of the read bandwidth, which is measured here too (``compress.eval.speed.measure_bandwidth``: the best
of several sums over 256 MiB by PyTorch's threads). Every product cycles through copies of its weight that are together
far larger than the caches. At more tokens it gives GFLOP/s (2 x tokens x out x in) and the speed over bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.eval.speed import measure_bandwidth
from compress.kernels import library
from compress.report.build import describe_machine, list_versions

RESULT = Path(__file__).parent / "results" / "kernels.json"
SHAPES = ("4096x4096", "4096x14336", "576x576", "1536x576", "576x1536", "49152x576")
TOKENS = (1, 4, 8, 16, 64, 512)
BITS = (2, 3, 4, 8)
GROUP = 64
LANES = 16  # rows of a panel
THRESHOLD = 6.0  # of LLM.int8()
BASE = "bf16"  # what everything is compared with


@dataclass(frozen=True)
class Contender:
    """A way to multiply: ``call(copy)`` with one of ``copies`` of the weight."""

    name: str
    nbytes: int  # of one copy
    copies: int
    call: Callable[[int], Any]
    note: str = ""


def count_copies(nbytes: int, cycle: int) -> int:
    """So many that a cycle reads ``cycle`` bytes, two at least."""
    return max(2, -(-cycle // nbytes))


def make_weight_only(rows: int, columns: int, bits: int, x: Tensor, cycle: int) -> Contender:
    """Random codes, float16 scales and integer zeros, as a gptq folder has them."""
    from compress.kernels.weight_matmul import weight_matmul

    panels = -(-rows // LANES)
    codes = torch.randint(-(2**31), 2**31, (panels, columns * bits // 32, LANES), dtype=torch.int64).to(torch.int32)
    scale = torch.rand(panels, columns // GROUP, LANES).mul(0.01).to(torch.float16)
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    nbytes = codes.nbytes + scale.nbytes + zero.nbytes
    copies = [(codes.clone(), scale.clone(), zero.clone()) for _ in range(count_copies(nbytes, cycle))]

    def call(copy: int) -> Tensor:
        return weight_matmul(x, *copies[copy], None, bits, GROUP, rows)

    return Contender(f"int{bits} g{GROUP}", nbytes, len(copies), call)


def make_dense(rows: int, columns: int, x: Tensor, cycle: int, dtype: torch.dtype, name: str) -> Contender:
    """``F.linear``; bf16 goes to oneDNN."""
    weight = torch.randn(rows, columns).to(dtype)
    copies = [weight.clone() for _ in range(count_copies(weight.nbytes, cycle))]
    given = x.to(dtype)
    return Contender(name, weight.nbytes, len(copies), lambda copy: linear(given, copies[copy]))


def make_int8(rows: int, columns: int, x: Tensor, cycle: int) -> list[Contender]:
    """Quantize and multiply in one call, with and without outliers, and the product alone."""
    from compress.kernels.int8 import int8_linear, int8_matmul, quantize_rows

    panels = -(-rows // LANES)
    codes = torch.randint(-127, 128, (panels, -(-columns // 4), LANES, 4), dtype=torch.int8)
    scale = torch.rand(panels * LANES).mul(0.01)
    sums = codes.sum(dim=(1, 3), dtype=torch.int32).flatten()
    nbytes = codes.nbytes + scale.nbytes + sums.nbytes
    copies = [(codes.clone(), scale.clone(), sums.clone()) for _ in range(count_copies(nbytes, cycle))]
    large = x.clone()
    large[:, :: max(1, columns // 6)] = 20.0  # six features or so, what LLM.int8() found in models of 7B
    q, row_scale, _ = quantize_rows(x, 0.0)

    def plain(copy: int) -> Tensor:
        return int8_linear(x, *copies[copy], None, 0.0, None, None, rows)

    def with_outliers(copy: int) -> Tensor:
        return int8_linear(large, *copies[copy], None, THRESHOLD, None, None, rows)

    def product(copy: int) -> Tensor:
        return int8_matmul(q, row_scale, *copies[copy], None, None, None, None, None, rows, x.dtype)

    calls = {"int8 linear": plain, "LLM.int8() linear, 6 outliers": with_outliers, "int8 product alone": product}
    return [Contender(name, nbytes, len(copies), call) for name, call in calls.items()]


def make_torch_int8(rows: int, columns: int, tokens: int, cycle: int) -> Contender | None:
    """``torch._int_mm``: int8 to int32, nothing scaled; in the layout that is faster here. None where it refuses."""
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    x = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    layouts = {"(out, in)": lambda: weight.clone().t(), "(in, out)": lambda: weight.t().contiguous()}
    found: list[tuple[float, str]] = []
    for name, make in layouts.items():
        one = make()
        try:
            torch._int_mm(x, one)
        except RuntimeError as error:
            print(f"  torch._int_mm, {name}: {str(error).splitlines()[0]}")
            continue
        found.append((min(time_calls(lambda _, one=one: torch._int_mm(x, one), 3, 1) for _ in range(3)), name))
    if not found:
        return None
    name = min(found)[1]
    copies = [layouts[name]() for _ in range(count_copies(weight.nbytes, cycle))]
    return Contender(
        "torch._int_mm", weight.nbytes, len(copies), lambda copy: torch._int_mm(x, copies[copy]), f"weight {name}"
    )


def time_calls(call: Callable[[int], Any], calls: int, copies: int, first: int = 0) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for number in range(first, first + calls):
        call(number % copies)
    return (time.perf_counter() - start) / calls


def run_case(contenders: Sequence[Contender], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round; one after the other in each."""
    calls, position = {}, dict.fromkeys((one.name for one in contenders), 0)
    for one in contenders:
        once = time_calls(one.call, 2, one.copies)
        once = min(once, time_calls(one.call, 2, one.copies, first=2))
        calls[one.name] = max(1, min(10_000, round(seconds / once)))
    times: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(rounds):
        for one in contenders:
            times[one.name].append(time_calls(one.call, calls[one.name], one.copies, position[one.name]))
            position[one.name] += calls[one.name]
    return times


def measure(rows: int, columns: int, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender for one shape and number of tokens."""
    cycle = int(options.cycle * 1e6)
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    contenders = [
        make_dense(rows, columns, x, cycle, torch.bfloat16, BASE),
        make_dense(rows, columns, x, cycle, torch.float32, "f32"),
        *(make_weight_only(rows, columns, bits, x, cycle) for bits in options.bits),
    ]
    if not options.no_int8:
        contenders += make_int8(rows, columns, x, cycle)
        peer = make_torch_int8(rows, columns, tokens, cycle)
        contenders += [] if peer is None else [peer]
    times = run_case(contenders, options.rounds, options.seconds)
    base = statistics.median(times[BASE])
    result = []
    for one in contenders:
        middle = statistics.median(times[one.name])
        result.append(
            {
                "shape": [rows, columns],
                "tokens": tokens,
                "kernel": one.name,
                "note": one.note,
                "seconds": middle,
                "all_seconds": times[one.name],
                "bytes": one.nbytes,
                "copies": one.copies,
                "gigabytes_per_second": one.nbytes / middle / 1e9,
                "gigaflops": 2 * tokens * rows * columns / middle / 1e9,
                "over_bf16": base / middle,
            }
        )
    return result


def render(rows: Sequence[dict[str, Any]], bandwidth: float) -> str:
    """One Markdown table per shape: kernels down, tokens across."""
    lines = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        mine = [row for row in rows if tuple(row["shape"]) == shape]
        tokens = sorted({row["tokens"] for row in mine})
        names = dict.fromkeys(row["kernel"] for row in mine)
        lines += ["", f"### {shape[0]} x {shape[1]}", "", "| kernel | " + " | ".join(map(str, tokens)) + " |"]
        lines.append("| --- |" + " --- |" * len(tokens))
        for name in names:
            by_tokens = {row["tokens"]: row for row in mine if row["kernel"] == name}
            lines.append(f"| {name} | " + " | ".join(_cell(by_tokens.get(one), bandwidth) for one in tokens) + " |")
    lines += ["", "Each cell: at 1 token GB/s of packed weight and share of the read bandwidth, else GFLOP/s; then the"]
    lines += ["speed over `F.linear` in bf16."]
    slower = [row for row in rows if row["over_bf16"] < 1 and row["kernel"] not in (BASE, "f32")]
    lines += ["", "Slower than dense bf16:" if slower else "Nothing is slower than dense bf16."]
    for row in slower:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"- {row['kernel']}, {shape}, tokens {row['tokens']}: {row['over_bf16']:.2f} of its speed")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, bandwidth: float) -> str:
    if row is None:
        return "-"
    if row["tokens"] == 1:
        speed = f"{row['gigabytes_per_second']:.1f} GB/s ({row['gigabytes_per_second'] * 1e9 / bandwidth:.0%})"
    else:
        speed = f"{row['gigaflops']:.0f}"
    return f"{speed}, {row['over_bf16']:.2f}x"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="out x in features, e.g. 4096x14336")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--bits", nargs="*", type=int, default=list(BITS))
    parser.add_argument("--no-int8", action="store_true", help="only weight-only kernels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each kernel in each round, about")
    parser.add_argument("--cycle", type=float, default=256, help="MB of weights that a cycle reads (L3 holds 32 here)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", default="auto", help="instruction set of our kernels: auto, avx512, avx2 or portable")
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    library.set_mode("require")
    library.select_cpu(options.cpu)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    probes = [measure_bandwidth()]
    with torch.inference_mode():
        for shape in options.shapes:
            out, columns = (int(word) for word in shape.split("x"))
            for tokens in options.tokens:
                rows += measure(out, columns, tokens, options)
                print(f"{shape}, tokens {tokens}: done", flush=True)
            probes.append(measure_bandwidth())
    bandwidth = max(probes, key=lambda probe: float(probe["bytes_per_second"]))
    for row in rows:
        row["bandwidth_share"] = row["gigabytes_per_second"] * 1e9 / bandwidth["bytes_per_second"]
    content = {
        "machine": describe_machine(),
        "versions": list_versions(),
        "kernels": {**library.describe(), "library": Path(str(library.describe()["library"])).name},
        "threads": torch.get_num_threads(),
        "bandwidth": {**bandwidth, "all": [probe["bytes_per_second"] for probe in probes]},
        "protocol": {
            "rounds": options.rounds, "seconds_per_round": options.seconds, "cycle_bytes": int(options.cycle * 1e6),
            "group_size": GROUP, "activations": "bfloat16", "threshold": THRESHOLD,
        },
        "results": rows,
    }  # fmt: skip
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(render(rows, bandwidth["bytes_per_second"]))
    print(f"\nread bandwidth {bandwidth['bytes_per_second'] / 1e9:.1f} GB/s ({bandwidth['probe']})")
    print(f"written to {options.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
