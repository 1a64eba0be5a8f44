"""Block steps: what rescales the channels of a whole block before its layers are compressed one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.plan_select import PlannedLayer, load_method
from compress.recipe import Step
from compress.types import LayerSpec
from compress.walk.edges import Edge, find_edges, measure_ranges, measure_weights
from compress.walk.groups import Hooked
from compress.walk.hidden import Hidden
from compress.walk.stream import PROBE_TOKENS, Call

Notes = dict[str, dict[str, Any]]  # layer name -> what the report says of it


def list_block_steps(layers: Mapping[str, PlannedLayer]) -> list[tuple[Step, frozenset[str]]]:
    """The steps of methods that see a whole block, each with the names of the layers that it selects."""
    found: list[tuple[Step, set[str]]] = []
    for name, layer in layers.items():
        for step in layer.steps:
            if load_method(step.method).KIND != "block":
                continue
            names = next((names for known, names in found if known == step), None)
            if names is None:
                found.append((step, {name}))
            else:
                names.add(name)
    return [(step, frozenset(names)) for step, names in found]


@torch.no_grad()
def smooth_block(
    block: nn.Module,
    specs: Sequence[LayerSpec],
    layers: Mapping[str, PlannedLayer],
    inputs: Hidden,
    windows: Sequence[int],
    calls: Mapping[int, Call],
) -> Notes:
    """Apply the block steps of ``layers`` to ``block`` in place; the block computes the same as before.

    ``specs``: all layers of the block; ``windows``: those of ``inputs`` that a method may look at. One pass per step.
    Notes: ``smoothing``, the edge; ``input_spread``, the largest channel's range over the median one's, before and
    after; ``fallback`` for layers behind a norm that can't be rescaled.
    """
    notes: Notes = {}
    device = next(block.parameters()).device
    calls = {length: call.to(device) for length, call in calls.items()}
    for step, names in list_block_steps(layers):
        hooked = Hooked(block, specs)
        try:
            length = min(PROBE_TOKENS, inputs.lengths[0])
            length = length if length in calls else inputs.lengths[0]
            hidden = inputs.read(0, device)[:, :length]
            edges = find_edges(hooked, specs, hidden, calls[length], step.config.model_dump()["inner"])
            for name in names & set(edges.refused):
                notes[name] = {"fallback": f"{step.method}: not rescaled: {edges.refused[name]}"}
            chosen = _choose(edges.found, names, step, notes)
            _scale(
                hooked, chosen, measure_ranges(hooked, chosen, inputs, windows, calls) if chosen else [], step, notes
            )
        finally:
            hooked.close()
    return notes


def _choose(edges: Sequence[Edge], names: frozenset[str], step: Step, notes: Notes) -> list[Edge]:
    """The edges all of whose layers the step selects."""
    chosen = []
    for edge in edges:
        readers = {name for link in edge.links for name in link.layers}
        if readers <= names:
            chosen.append(edge)
            continue
        left_out = sorted(readers - names)[0]
        for name in readers & names:
            notes[name] = {"fallback": f"{step.method}: not rescaled: {left_out} shares its input and is left out"}
    return chosen


def _scale(hooked: Hooked, edges: Sequence[Edge], ranges: Sequence[Any], step: Step, notes: Notes) -> None:
    method = load_method(step.method)
    for edge, peaks in zip(edges, ranges, strict=True):
        for link, peak in zip(edge.links, peaks, strict=True):
            walked = [*hooked.modules.values(), *(unfused.module for unfused in hooked.experts.values())]
            factors = method.find_factors(peak, measure_weights(link, walked), step.config)
            link.scale(factors.double() if next(link.maker.parameters()).dtype == torch.float64 else factors)
            spread = [_spread(peak), _spread(peak / factors)]
            for name in link.layers:
                notes[name] = {"smoothing": edge.name, "input_spread": spread}


def _spread(peak: torch.Tensor) -> float:
    return float(peak.max() / peak.median().clamp_min(1e-30))
