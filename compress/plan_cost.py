"""Memory and time of a plan: from units, layers and the calibration set-up to ``Costs``, within ``--max-memory``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from compress import plan_time
from compress.errors import UserError
from compress.plan_memory import BlockShape, Memory, Workload, group_layers, measure_free, peak_bytes, spill_bytes
from compress.plan_select import PlannedLayer, load_method
from compress.plan_table import size
from compress.prepare import HEAD_TOKENS, PROBE_TOKENS
from compress.recipe import Recipe
from compress.types import LayerSpec
from compress.walk.memory import estimate_live_bytes, estimate_running_bytes

if TYPE_CHECKING:
    from compress.plan import PlannedUnit
    from compress.walk.skeleton import Skeleton


@dataclass(frozen=True)
class Costs:
    """What a run takes. ``seconds`` by stage; ``free_bytes`` is what the machine has to give."""

    memory: Memory
    suspend: bool
    seconds: Mapping[str, float]
    free_bytes: int
    spill_bytes: int  # hidden states on the output's disk while the run goes on

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def estimate_costs(
    recipe: Recipe, skeleton: Skeleton, units: Sequence[PlannedUnit], *, device: str, limit: int | None, in_memory: bool
) -> Costs:
    """Peak memory with all windows waiting at once, or one at a time where that is too much, and the time.

    Raises UserError when even that is more than ``limit``. On an accelerator the bound is the sum of both memories.
    """
    work = describe_work(recipe, skeleton, units, in_memory)
    memory = peak_bytes(work)
    free = measure_free()
    allowed = limit if limit is not None else memory.base + int(0.8 * free)
    if work.suspend and memory.peak > allowed:
        work = replace(work, suspend=False)
        memory = peak_bytes(work, memory.base)
    if limit is not None and memory.peak > limit:
        raise UserError(_explain_need(memory, limit, work))
    seconds = estimate_seconds(recipe, skeleton, units, work, device)
    return Costs(memory, work.suspend, seconds, free, spill_bytes(work))


def describe_work(
    recipe: Recipe, skeleton: Skeleton, units: Sequence[PlannedUnit], in_memory: bool = False
) -> Workload:
    """The run as the memory model sees it."""
    needs = find_needs([layer for unit in units for layer in unit.layers])
    windows, tokens = (recipe.calibration.samples, recipe.calibration.tokens) if needs else (1, PROBE_TOKENS)
    itemsize = skeleton.dtype.itemsize
    blocks = []
    for index, unit in enumerate(units[:-1]):
        specs = skeleton.block_specs(index)
        live = estimate_live_bytes(skeleton.config, specs, tokens, itemsize) if specs else 0
        running = estimate_running_bytes(skeleton.config, specs, tokens, itemsize) if specs else 0
        groups = group_layers([layer.spec for layer in unit.layers])
        blocks.append(BlockShape(unit.bytes_before, unit.bytes_after, groups, live, running))
    outside = [row for row in skeleton.coverage(()) if not _inside(row.parameter, skeleton.blocks)]
    width = int(skeleton.config.get_text_config(decoder=True).hidden_size)
    configs = [step.config for unit in units for layer in unit.layers for step in layer.steps]
    dense = [min(getattr(c, "dense_windows", None) or windows, windows) for c in configs] if "cross" in needs else []
    sequential = [getattr(config, "true_sequential", True) for config in configs]
    return Workload(
        blocks=tuple(dict.fromkeys(blocks)),
        embedding_bytes=0 if in_memory else itemsize * sum(row.numel for row in outside if row.reason != "output head"),
        largest_outside_bytes=0 if in_memory else itemsize * max((row.numel for row in outside), default=0),
        window_bytes=tokens * width * itemsize,
        windows=windows,
        dense_windows=max(dense, default=0),
        gram="gram" in needs,
        matrices=len(needs & {"gram", "cross", "residual"}),
        cross="cross" in needs,
        grams_at_once=not all(sequential),
        suspend=all(sequential),
        windows_in_memory=in_memory,
        head_bytes=max((itemsize * layer.spec.numel for layer in units[-1].layers), default=0),
    )


def find_needs(layers: Iterable[PlannedLayer]) -> frozenset[str]:
    """The statistics that any step of any layer wants."""
    return frozenset().union(*(load_method(s.method).needs(s.config) for layer in layers for s in layer.steps))


def estimate_seconds(
    recipe: Recipe, skeleton: Skeleton, units: Sequence[PlannedUnit], work: Workload, device: str
) -> dict[str, float]:
    """By stage: forward passes, statistics, methods, evaluation, disk."""
    forward_rate = plan_time.measure_rate(skeleton.dtype, device)
    rate = forward_rate if skeleton.dtype == torch.float32 else plan_time.measure_rate(torch.float32, device)
    routed = find_routed_share(skeleton)
    seconds = {"forward": 0.0, "statistics": 0.0, "methods": 0.0, "evaluation": 0.0}
    window = recipe.calibration.tokens if find_needs(one for unit in units for one in unit.layers) else PROBE_TOKENS
    tokens = work.windows * window
    width = int(skeleton.config.get_text_config(decoder=True).hidden_size)
    cross_tokens = tokens * work.dense_windows // work.windows
    active = float(sum(row.numel for row in skeleton.coverage(()) if row.reason == "output head"))
    for index, unit in enumerate(units[:-1]):
        specs = [layer.spec for layer in unit.layers]
        used = count_active(skeleton.block_specs(index), routed)
        active += used
        widths = [columns for columns, _ in group_layers(specs)]
        again = 1.0 if work.grams_at_once else 0.0 if work.suspend else len({*widths}) / 2
        seconds["forward"] += (
            (1 + again) * plan_time.forward_flops(used, tokens + cross_tokens, window, width) / forward_rate
        )
        seconds["methods"] += plan_time.search_seconds(sum(spec.numel for spec in specs))
        if not work.gram or not specs:
            continue
        seconds["statistics"] += plan_time.statistic_flops(specs, tokens, cross_tokens, routed) / rate
        turns = max((int(getattr(s.config, "refinements", 0)) for one in unit.layers for s in one.steps), default=0)
        seconds["methods"] += plan_time.solve_flops(specs, widths, turns) / (rate * plan_time.SWEEP_EFFICIENCY)
    if recipe.eval is not None:  # the dense model and the compressed one
        measured = recipe.eval.windows * recipe.eval.tokens
        attended = len(skeleton.blocks) * width
        seconds["evaluation"] = (
            2 * plan_time.forward_flops(active, measured, recipe.eval.tokens, attended) / forward_rate
        )
    rounded = sum(layer.spec.numel for layer in units[-1].layers)
    if rounded:  # with a pass of the dense model that shows the head's input
        seconds["forward"] += plan_time.forward_flops(active, HEAD_TOKENS) / forward_rate
        seconds["methods"] += plan_time.search_seconds(rounded)
    read, written = sum(unit.bytes_before for unit in units), sum(unit.bytes_after for unit in units)
    written += spill_bytes(work) * len(skeleton.blocks)
    seconds["disk"] = plan_time.disk_seconds(2 * read if rounded else read, written)
    return seconds


def find_routed_share(skeleton: Skeleton) -> float:
    """The share of tokens that an expert sees on average; 1 for a model without experts."""
    specs = skeleton.block_specs(0)
    experts = 1 + max((spec.index or 0 for spec in specs if spec.kind == "expert"), default=0)
    chosen = getattr(skeleton.config.get_text_config(decoder=True), "num_experts_per_tok", None) or 1
    return min(1.0, int(chosen) / experts)


def count_active(specs: Sequence[LayerSpec], routed: float) -> float:
    """Weights that one token passes through."""
    return sum(spec.numel * (routed if spec.kind == "expert" else 1.0) for spec in specs)


def _inside(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(prefix + ".") for prefix in blocks)


def _explain_need(memory: Memory, limit: int, work: Workload) -> str:
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.largest())
    cures = []
    if work.gram:
        cures.append("fewer calibration.tokens")
    if work.cross:
        cures.append("targets: layer (no dense copy)")
    if work.grams_at_once:
        cures.append("true_sequential: true (one Gram matrix at a time)")
    if work.gram:
        cures.append("method: rtn (no calibration)")
    lower = f"; {' or '.join(cures)} would lower it" if cures else ""
    return (
        f"--max-memory {size(limit)} is too little: this run needs {size(memory.peak)} "
        f"(process {size(memory.base)}, {parts}){lower}"
    )
