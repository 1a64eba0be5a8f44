"""How long a run will take: counted operations over a rate that is measured on the spot in a blink."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from compress.types import LayerSpec

SEARCH_RATE = 4e7  # weights per second and core through a clip search, measured on two laptop cores
SWEEP_EFFICIENCY = 0.12  # of the GEMM rate, for column loops and triangular matrices; measured on SmolLM2-135M
ATTENTION_COST = 4.0  # how much slower than products attention and what stands around it run; measured there too
DISK_RATE = 3e8  # bytes per second read and written


def measure_rate(dtype: torch.dtype, device: str = "cpu", budget: float = 0.12) -> float:
    """FLOP/s of a square product in ``dtype``: the best of what fits into ``budget`` seconds."""
    size = 1024 if device == "cpu" else 4096
    left = torch.ones((size, size), dtype=dtype, device=device)
    end = time.perf_counter() + budget
    best = 0.0
    while True:
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for an accelerator
        now = time.perf_counter()
        best = max(best, 2 * size**3 / max(now - start, 1e-9))
        if now > end:
            return best


def forward_flops(parameters: float, tokens: int, window: int = 0, width: int = 0) -> float:
    """Two operations per parameter and token; and causal attention over ``window`` tokens of ``width`` features.

    Attention's ``2 window width`` per token are counted ``ATTENTION_COST`` times.
    """
    return tokens * (2.0 * parameters + ATTENTION_COST * 2.0 * window * width)


def statistic_flops(specs: Sequence[LayerSpec], tokens: int, cross_tokens: int, routed: float) -> float:
    """``x x^T`` of every distinct input (half of it, by symmetry) and the full cross product where wanted.

    ``routed``: the share of tokens that reaches an expert; experts have no cross product.
    """
    experts = sum(routed * tokens * spec.shape[1] ** 2 for spec in specs if spec.kind == "expert")
    inputs = {(spec.name.rpartition(".")[0], spec.shape[1]) for spec in specs if spec.kind != "expert"}
    return experts + sum((tokens + 2.0 * cross_tokens) * width**2 for _, width in inputs)


def solve_flops(specs: Sequence[LayerSpec], widths: Sequence[int], turns: int) -> float:
    """Factorization ``(I, I)`` per input; per layer the OBS sweep ``O I^2``, doubled by each turn of refinement."""
    return sum(2.0 * i**3 for i in widths) + sum((1.0 + 2 * turns) * s.shape[0] * s.shape[1] ** 2 for s in specs)


def search_seconds(weights: int) -> float:
    """Fitting grids and rounding, which is bound by memory."""
    return weights / (SEARCH_RATE * max(torch.get_num_threads(), 1))


def disk_seconds(read: int, written: int) -> float:
    return (read + written) / DISK_RATE
