"""The steps of a recipe on the layers that read one input, and the judge's figures for each of them.

Where steps treat rows independently, small layers that share input and steps (q, k and v; gate and up) are stacked and
compressed as one tall matrix, and a large layer is compressed a few rows at a time: the same numbers, in less time and
in memory that does not grow with the layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.numerics import errors
from compress.numerics.activations import round_rows
from compress.plan_memory import CHUNK
from compress.plan_select import PlannedLayer, load_method
from compress.storage.formats.base import RoundInputs
from compress.types import LayerReport, LayerSpec, LayerState, Statistic


@dataclass(frozen=True)
class Outcome:
    """One layer after its steps; ``state.weight`` is in the model's dtype, as the model will see it."""

    spec: LayerSpec
    state: LayerState
    report: LayerReport


@dataclass(frozen=True)
class _Piece:
    """Some rows after the steps, and per row the energy of weight and output, and what of it was lost, float64."""

    state: LayerState
    energies: Tensor  # (4, rows): weight, lost weight, output, lost output


def compress_layers(
    layers: Sequence[PlannedLayer],
    weights: Sequence[Tensor],
    statistic: Statistic | None,
    probe: Tensor,
    scale_dtype: torch.dtype,
    round_inputs: RoundInputs = round_rows,
) -> Iterator[Outcome]:
    """Apply each layer's steps; layers read the same input, which ``statistic`` describes.

    ``weights``: ``(O, I)`` each, in the model's dtype. ``probe``: held-out rows of the input ``(T, I)``, for the error
    on the output; there may be none (an expert that no probe token reached). ``round_inputs``: how the format that is
    written rounds the input of layers with an activation rule.
    """
    for stack in _stack_layers(layers):
        started = time.monotonic()
        members = [layers[i] for i in stack]
        tall = weights[stack[0]] if len(stack) == 1 else torch.cat([weights[i] for i in stack])
        height = len(tall) if not _is_rowwise(members[0]) else max(1, CHUNK // tall.shape[1])
        pieces = [
            _compress_piece(
                tall[i : i + height], members[0], _cut(statistic, i, height), probe, scale_dtype, round_inputs
            )
            for i in range(0, len(tall), height)
        ]
        state, energies = _join([piece.state for piece in pieces]), torch.cat([p.energies for p in pieces], dim=1)
        seconds = time.monotonic() - started
        start = 0
        for layer in members:
            rows = slice(start, start + layer.spec.shape[0])
            start = rows.stop
            part = _take(state, rows)
            share = seconds * layer.spec.shape[0] / len(tall)
            yield Outcome(layer.spec, part, _report(layer, part, energies[:, rows], statistic, probe, share))


def _cut(statistic: Statistic | None, start: int, count: int) -> Statistic | None:
    """The statistic for some rows: ``residual`` has a row per output; the rest, with its cache, is shared."""
    if statistic is None or statistic.residual is None:
        return statistic
    return replace(statistic, residual=statistic.residual[start : start + count])


def _stack_layers(layers: Sequence[PlannedLayer]) -> list[list[int]]:
    """Indices of layers that are compressed together: neighbours with equal steps, up to ``CHUNK`` weights."""
    stacks: list[list[int]] = []
    key: Any = None
    for i, layer in enumerate(layers):
        own = tuple((step.method, step.config) for step in layer.steps)
        size = sum(layers[j].spec.numel for j in stacks[-1]) if stacks else 0
        if stacks and own == key and _is_rowwise(layer) and size + layer.spec.numel <= CHUNK:
            stacks[-1].append(i)
        else:
            stacks.append([i])
        key = own
    return stacks


def _is_rowwise(layer: PlannedLayer) -> bool:
    methods = [load_method(step.method) for step in layer.steps]
    return all(method.ROWWISE for method in methods if method.KIND == "layer")


def _compress_piece(
    rows: Tensor,
    layer: PlannedLayer,
    statistic: Statistic | None,
    probe: Tensor,
    scale_dtype: torch.dtype,
    round_inputs: RoundInputs,
) -> _Piece:
    weight = rows.to(torch.float32, copy=True)
    state = LayerState(weight)
    for step in layer.steps:
        if load_method(step.method).KIND == "layer":
            state = load_method(step.method).compress(state, statistic, step.config, scale_dtype)
    lost = weight - state.weight
    output = weight @ probe.float().T
    read = read_inputs(state, probe[None], round_inputs)[0]
    lost_output = lost @ probe.float().T if state.activations is None else output - state.weight @ read.float().T
    energies = [errors.row_energies(one) for one in (weight, lost, output, lost_output)]
    return _Piece(replace(state, weight=state.weight.to(rows.dtype)), torch.stack(energies))


def read_inputs(state: LayerState, x: Tensor, round_inputs: RoundInputs) -> Tensor:
    """What a layer in this state reads where its input is ``x`` ``(N, T, I)``."""
    if state.activations is None:
        return x
    kept = None if state.outliers is None else state.outliers.index
    return round_inputs(x, state.activations, kept, state.input_groups)


def _join(states: Sequence[LayerState]) -> LayerState:
    """The state of all rows from those of some; notes are the same for all rows."""
    first = states[0]
    if len(states) == 1:
        return first
    weight = torch.cat([state.weight for state in states])
    if first.grid is None:
        return replace(first, weight=weight)
    grids = [state.grid for state in states if state.grid is not None]
    codes = torch.cat([state.codes for state in states if state.codes is not None])
    scale, zero = torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids])
    columns = [state.outliers.weight for state in states if state.outliers is not None]
    outliers = first.outliers and replace(first.outliers, weight=torch.cat(columns))
    grid = replace(first.grid, scale=scale, zero=zero)
    return replace(first, weight=weight, codes=codes, grid=grid, outliers=outliers)


def _take(state: LayerState, rows: slice) -> LayerState:
    """Some rows of a state."""
    grid = state.grid and replace(state.grid, scale=state.grid.scale[rows], zero=state.grid.zero[rows])
    codes = None if state.codes is None else state.codes[rows]
    outliers = state.outliers and replace(state.outliers, weight=state.outliers.weight[rows])
    return replace(state, weight=state.weight[rows], grid=grid, codes=codes, outliers=outliers)


def _report(
    layer: PlannedLayer,
    state: LayerState,
    energies: Tensor,
    statistic: Statistic | None,
    probe: Tensor,
    seconds: float,
) -> LayerReport:
    """The driver's figures for a layer, the same for every method."""
    notes = dict(state.notes)
    weight, lost, output, lost_output = energies.sum(1).tolist()
    return LayerReport(
        name=layer.spec.name,
        shape=layer.spec.shape,
        method="+".join(step.method for step in layer.steps),
        weight_error=errors.ratio(lost, weight),
        output_error=errors.ratio(lost_output, output) if len(probe) else None,
        bits_per_weight=layer.bits_per_weight,
        seconds=round(seconds, 4),
        tokens=None if statistic is None else statistic.tokens,
        fallback=notes.pop("fallback", None),
        notes=notes,
    )
