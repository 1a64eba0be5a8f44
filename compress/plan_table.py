"""A plan as tables for people and as plain data for machines."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from compress.plan_head import OFFERED_SHARE

if TYPE_CHECKING:
    from compress.plan import Plan
    from compress.plan_select import PlannedLayer

WIDTH = 110


def render(plan: Plan, width: int | None = None) -> str:
    """Layers by kind, what is left untouched, then size, memory and time."""
    stream = io.StringIO()
    console = Console(file=stream, width=width or WIDTH, color_system=None, highlight=False)
    recipe = plan.recipe.name or "+".join(step.method for step in plan.recipe.steps)
    target = f" -> {plan.output}" if plan.output else ""
    console.print(f"{plan.model} with {recipe}{target}", markup=False, soft_wrap=True)
    console.print(_layer_table(plan))
    console.print(_untouched_table(plan))
    for line in _summary(plan):
        console.print(line, markup=False, soft_wrap=True)
    return stream.getvalue().rstrip() + "\n"


def _layer_table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Layers", title_justify="left", pad_edge=False)
    table.add_column("layers", no_wrap=True)
    for name in ("count", "shape", "steps", "bits", "group", "stored", "bytes"):
        table.add_column(name, justify="left" if name == "steps" else "right", overflow="fold")
    for row in group_rows(plan):
        one, count = row[0], len(row)
        quant = one.quant
        group = "" if quant is None else "row" if quant.group_size == -1 else str(quant.group_size)
        steps = "+".join(step.method for step in one.steps) or one.spec.kind
        bits, stored = "" if quant is None else str(quant.bits), f"{one.bits_per_weight:.2f} bit"
        shape = f"{one.spec.shape[0]} x {one.spec.shape[1]}"
        table.add_row(_pattern(one.spec.name), str(count), shape, steps, bits, group, stored, size(count * one.nbytes))
    return table


def group_rows(plan: Plan) -> list[list[PlannedLayer]]:
    """Layers that differ by their number only, together."""
    rows: dict[Any, list[PlannedLayer]] = {}
    for layer in plan.layers.values():
        key = (_pattern(layer.spec.name), layer.spec.shape, layer.quant, layer.steps)
        rows.setdefault(key, []).append(layer)
    return list(rows.values())


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _untouched_table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Left as they are", title_justify="left", pad_edge=False)
    for name in ("why", "parameters", "share"):
        table.add_column(name, justify="left" if name == "why" else "right")
    for one in plan.untouched:
        table.add_row(one.reason, f"{one.numel:,}", percent(one.share))
    table.add_row("together", f"{sum(one.numel for one in plan.untouched):,}", percent(plan.untouched_share))
    return table


def _summary(plan: Plan) -> list[str]:
    lines = [
        f"format   {plan.format.replace('_', '-')}, {str(plan.dtype).removeprefix('torch.')}",
        f"size     {size(plan.bytes_before)} -> {size(plan.bytes_after)}"
        f" ({percent(plan.bytes_after / max(plan.bytes_before, 1))}),"
        f" {plan.bits_per_weight:.2f} bits per compressed weight{' in the blocks' if plan.head.layers else ''}",
        *_head_lines(plan),
        f"memory   {size(plan.peak_bytes)} at the peak (process {size(plan.memory.base)}"
        + "".join(f", {name} {size(value)}" for name, value in plan.memory.largest() if value)
        + ")",
        f"time     about {duration(plan.costs.total_seconds)} on {plan.device}"
        + " ("
        + ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan.costs.seconds.items() if seconds >= 0.5)
        + ")",
    ]
    if plan.needs and not plan.suspend:
        lines.append("note     windows go through each block one at a time: slower, same numbers, less memory")
    if plan.peak_bytes > plan.memory.base + plan.costs.free_bytes:
        lines.append(f"warning  this is more memory than is free now ({size(plan.costs.free_bytes)})")
    for name, what in _first_of_each(plan.adjusted).items():
        lines.append(f"adjusted {name}: {what}")
    for name, what in _first_of_each(plan.skipped).items():
        lines.append(f"skipped  {name}: {what}")
    return [line.replace(" ()", "") for line in lines]


def _head_lines(plan: Plan) -> list[str]:
    """What becomes of embedding and output head; nothing where they stay as they are and are small."""
    head, names = plan.head, " and ".join(spec.name for spec in plan.head.specs)
    if head.layers:
        change = f"{size(head.bytes_before)} -> {size(head.bytes_after)}, {head.bits_per_weight:.2f} bits per weight"
        return [f"head     {names}: {change}"]
    share = head.bytes_after / max(plan.bytes_after, 1)
    if head.offer is None or share < OFFERED_SHARE:
        return []
    offered, saved = head.offer
    words = f"--set head.bits={offered.bits}"
    words += "" if offered.group_size > 0 else " --set head.group_size=-1"
    words += "" if plan.format == "native" or plan.recipe.format == "auto" else " --set format=native"
    return [f"head     {names}: {size(head.bytes_after)} left as they are, {percent(share)} of the result; {words} "
            f"saves {size(saved)}"]  # fmt: skip


def _first_of_each(notes: Any) -> dict[str, str]:
    """One line per text, named after its first layer and the number of others."""
    names: dict[str, list[str]] = {}
    for name, text in notes.items():
        names.setdefault(text, []).append(name)
    return {f"{found[0]} (and {len(found) - 1} more)" if found[1:] else found[0]: text for text, found in names.items()}


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain data: the whole plan, layer by layer."""
    layers = [
        {
            "name": one.spec.name,
            "shape": list(one.spec.shape),
            "steps": [step.to_dict() for step in one.steps],
            "bits": one.quant and one.quant.bits,
            "group_size": one.quant and one.quant.group_size,
            "symmetric": one.quant and one.quant.symmetric,
            "bytes": one.nbytes,
            "bits_per_weight": one.bits_per_weight,
        }
        for one in plan.layers.values()
    ]
    units = [
        {"name": one.name, "layers": len(one.layers), "bytes_before": one.bytes_before, "bytes_after": one.bytes_after}
        for one in plan.units
    ]
    return {
        "recipe": plan.recipe.to_dict(),
        "recipe_digest": plan.recipe.digest(),
        "model": plan.model,
        "output": None if plan.output is None else str(plan.output),
        "device": plan.device,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "format": plan.format,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight,
        "head": {
            "layers": [one.spec.name for one in plan.head.layers],
            "bytes_before": plan.head.bytes_before,
            "bytes_after": plan.head.bytes_after,
            "bits_per_weight": plan.head.bits_per_weight or None,
        },
        "peak_bytes": plan.peak_bytes,
        "memory": {"base": plan.memory.base, **{name: dict(terms) for name, terms in plan.memory.phases.items()}},
        "max_memory": plan.max_memory,
        "suspend": plan.suspend,
        "seconds": dict(plan.costs.seconds),
        "untouched_share": plan.untouched_share,
        "untouched": [{"reason": u.reason, "parameters": u.numel, "share": u.share} for u in plan.untouched],
        "adjusted": dict(plan.adjusted),
        "skipped": dict(plan.skipped),
        "units": units,
        "layers": layers,
    }


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}" if unit == "GB" else f"{nbytes / scale:.1f} {unit}"
    return f"{int(nbytes)} B"


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
