"""The steps of a recipe on the layers that read one input, and the judge's figures for each of them.

Layers that share input and steps (q, k and v; gate and up) are stacked along their rows and compressed as one tall
matrix where every step treats rows independently: the same numbers, a third of the time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from compress.numerics import errors
from compress.plan_select import PlannedLayer, load_method
from compress.types import LayerReport, LayerSpec, LayerState, Statistic


@dataclass(frozen=True)
class Outcome:
    """One layer after its steps."""

    spec: LayerSpec
    state: LayerState
    report: LayerReport


def compress_layers(
    layers: Sequence[PlannedLayer],
    weights: Sequence[Tensor],
    statistic: Statistic | None,
    probe: Tensor,
    scale_dtype: torch.dtype,
) -> list[Outcome]:
    """Apply each layer's steps; layers read the same input, which ``statistic`` describes.

    ``weights``: ``(O, I)`` float32 each. ``probe``: held-out rows of the input ``(T, I)``, for the error on the
    output; there may be none (an expert that no probe token reached).
    """
    outcomes: list[Outcome] = []
    paired = list(zip(layers, weights, strict=True))
    for _, stack in groupby(paired, key=lambda pair: _stack_key(pair[0])):
        outcomes += _compress_stack(list(stack), statistic, probe, scale_dtype)
    return outcomes


def _stack_key(layer: PlannedLayer) -> Any:
    rowwise = all(load_method(step.method).ROWWISE for step in layer.steps)
    return tuple((step.method, step.config) for step in layer.steps) if rowwise else layer.spec.name


def _compress_stack(
    stack: list[tuple[PlannedLayer, Tensor]],
    statistic: Statistic | None,
    probe: Tensor,
    scale_dtype: torch.dtype,
) -> list[Outcome]:
    started = time.monotonic()
    sizes = [weight.shape[0] for _, weight in stack]
    state = LayerState(stack[0][1] if len(stack) == 1 else torch.cat([weight for _, weight in stack]))
    for step in stack[0][0].steps:
        state = load_method(step.method).compress(state, statistic, step.config, scale_dtype)
    seconds = time.monotonic() - started
    outcomes = []
    for (layer, weight), part in zip(stack, split_rows(state, sizes), strict=True):
        share = seconds * weight.shape[0] / sum(sizes)
        outcomes.append(Outcome(layer.spec, part, judge(layer, weight, part, statistic, probe, share)))
    return outcomes


def split_rows(state: LayerState, sizes: Sequence[int]) -> list[LayerState]:
    """A stacked state taken apart again: rows of weight, codes, scales and zeros."""
    if len(sizes) == 1:
        return [state]
    parts = []
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        grid = state.grid and replace(state.grid, scale=state.grid.scale[rows], zero=state.grid.zero[rows])
        codes = None if state.codes is None else state.codes[rows]
        parts.append(replace(state, weight=state.weight[rows], grid=grid, codes=codes))
        start += size
    return parts


def judge(
    layer: PlannedLayer,
    weight: Tensor,
    state: LayerState,
    statistic: Statistic | None,
    probe: Tensor,
    seconds: float,
) -> LayerReport:
    """The driver's figures for a layer, the same for every method."""
    notes = dict(state.notes)
    return LayerReport(
        name=layer.spec.name,
        shape=layer.spec.shape,
        method="+".join(step.method for step in layer.steps),
        weight_error=errors.weight_error(weight, state.weight),
        output_error=errors.rows_error(weight, state.weight, probe) if len(probe) else None,
        bits_per_weight=layer.bits_per_weight,
        seconds=round(seconds, 4),
        tokens=None if statistic is None else statistic.tokens,
        fallback=notes.pop("fallback", None),
        notes=notes,
    )
