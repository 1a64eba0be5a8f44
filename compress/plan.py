"""Recipe x headers -> Plan: units, layers, bytes, memory, time; every user error is raised here, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.plan_cost import Costs, estimate_costs, find_needs
from compress.plan_head import PlannedHead, select_head
from compress.plan_inputs import (
    check_calibration,
    check_lengths,
    check_output,
    default_output,
    find_device,
    parse_size,
    pick_dtype,
)
from compress.plan_memory import Memory
from compress.plan_select import PlannedLayer, choose_format, select_layers
from compress.recipe import Recipe
from compress.storage.formats.base import load_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.storage.checkpoint import Checkpoint
    from compress.walk.coverage import Coverage
    from compress.walk.skeleton import Skeleton

__all__ = ["Plan", "PlannedLayer", "PlannedUnit", "Untouched", "make_plan", "plan"]


@dataclass(frozen=True)
class PlannedUnit:
    """A part of the result: a block, which is one file, or all that is outside the blocks."""

    name: str  # "model.layers.0", or "outside"
    layers: tuple[PlannedLayer, ...]  # outside the blocks: embedding and output head, where the recipe has a head
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Untouched:
    """Parameters that stay as they are for one reason."""

    reason: str
    numel: int
    share: float  # of all parameters


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost. Everything in it comes from headers and shapes."""

    recipe: Recipe
    model: str
    output: Path | None  # None: a model in memory is changed in memory
    device: str
    dtype: torch.dtype
    format: str  # a file of compress/storage/formats
    units: tuple[PlannedUnit, ...]
    coverage: tuple[Coverage, ...]
    bytes_before: int
    bytes_after: int
    costs: Costs
    max_memory: int | None
    adjusted: Mapping[str, str]  # layer -> what was changed for it
    skipped: Mapping[str, str]  # layer -> why it is left as it is
    head: PlannedHead  # token embedding and output head

    @property
    def layers(self) -> dict[str, PlannedLayer]:
        """Every layer that changes, by name, in the order of the model; embedding and output head come last."""
        return {layer.spec.name: layer for unit in self.units for layer in unit.layers}

    @property
    def memory(self) -> Memory:
        return self.costs.memory

    @property
    def peak_bytes(self) -> int:
        return self.costs.memory.peak

    @property
    def suspend(self) -> bool:
        """Whether all windows wait in a block at once; else each group starts them afresh: slower, same numbers."""
        return self.costs.suspend

    @property
    def scale_dtype(self) -> torch.dtype:
        found: torch.dtype = load_format(self.format).scale_dtype(self.dtype)
        return found

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that any step wants; empty for a run without data."""
        return find_needs(self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Of the compressed layers in the blocks, with scales and zeros."""
        layers = [layer for unit in self.units[:-1] for layer in unit.layers]
        numel = sum(layer.spec.numel for layer in layers)
        return 8 * sum(layer.nbytes for layer in layers) / numel if numel else 0.0

    @property
    def untouched(self) -> tuple[Untouched, ...]:
        total = sum(row.numel for row in self.coverage)
        reasons: dict[str, int] = {}
        for row in self.coverage:
            if row.status == "untouched":
                reasons[row.reason] = reasons.get(row.reason, 0) + row.numel
        ordered = sorted(reasons.items(), key=lambda item: -item[1])
        return tuple(Untouched(reason, numel, numel / total) for reason, numel in ordered)

    @property
    def untouched_share(self) -> float:
        return sum(one.share for one in self.untouched)

    def unit(self, name: str) -> PlannedUnit:
        return next(one for one in self.units if one.name == name)

    def render(self, width: int | None = None) -> str:
        """The plan as tables of text."""
        from compress.plan_table import render

        return render(self, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        from compress.plan_table import to_dict

        return to_dict(self)


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | PreTrainedModel | None = None,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    max_memory: int | str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What ``run`` with the same arguments would do, without reading a weight. Raises every UserError that it would."""
    recipe = as_recipe(recipe)
    from compress.walk.skeleton import Skeleton

    target = model if model is not None else recipe.model
    if target is None:
        raise UserError("no model: give --model, or model: in the recipe (a hub id, a folder, a GGUF file, or demo)")
    if not isinstance(target, str | Path):
        skeleton = Skeleton.from_model(target)
        name = type(target).__name__
        return make_plan(recipe, skeleton, name=name, output=None, device=device, max_memory=max_memory)
    from compress.storage.checkpoint import Checkpoint
    from compress.storage.source import resolve

    source = resolve(str(target), trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source.folder)
    checkpoint.check()
    skeleton = Skeleton.from_checkpoint(checkpoint, pick_dtype(recipe, checkpoint), trust_remote_code)
    folder = Path(output or recipe.output or default_output(source.name, recipe))
    return make_plan(
        recipe, skeleton, checkpoint, name=source.name, output=folder, device=device, max_memory=max_memory
    )


def as_recipe(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from itself, a path or shipped name, or plain data."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.load(recipe) if isinstance(recipe, str | Path) else Recipe.from_dict(recipe)


def make_plan(
    recipe: Recipe,
    skeleton: Skeleton,
    checkpoint: Checkpoint | None = None,
    *,
    name: str,
    output: Path | None,
    device: str = "auto",
    max_memory: int | str | None = None,
) -> Plan:
    """The plan for a model whose skeleton and headers are there; without ``checkpoint`` it is a model in memory."""
    device = find_device(device)
    limit = parse_size(max_memory)
    untouched = skeleton.coverage(())
    others = {row.parameter.removesuffix(".weight"): row.reason for row in untouched}
    specs = skeleton.specs()
    others = {key: reason for key, reason in others.items() if key not in {spec.name for spec in specs}}
    others.update(_tied_names(skeleton))
    for parameter in (name for spec in skeleton.head_specs() for name in (spec.parameter, *spec.tied)):
        others[parameter.removesuffix(".weight")] += "; the recipe's key head: is for it"
    selection = select_layers(recipe, specs, others)
    arch = str(skeleton.config.model_type)
    chosen = {layer.spec.name for layer in selection.layers}
    every = [*selection.layers, *select_head(recipe, skeleton)]
    form = choose_format(recipe.format, every, [spec for spec in specs if spec.name not in chosen], arch)
    layers = [replace(one, nbytes=load_format(form).nbytes(one.spec, one.quant)) for one in every]
    coverage = _explain_skipped(skeleton, layers, selection.skipped)
    units = _make_units(skeleton, layers, coverage)
    if checkpoint is not None:
        check_calibration(recipe, find_needs(layers), checkpoint.folder)
    check_lengths(recipe, find_needs(layers), skeleton.config)
    after = sum(unit.bytes_after for unit in units)
    costs = estimate_costs(recipe, skeleton, units, device=device, limit=limit, in_memory=output is None)
    if output is not None:
        check_output(output, after + costs.spill_bytes, checkpoint.folder if checkpoint else None)
    before = checkpoint.nbytes if checkpoint is not None else sum(unit.bytes_before for unit in units)
    return Plan(
        recipe,
        name,
        output,
        device,
        skeleton.dtype,
        form,
        units,
        tuple(coverage),
        before,
        after,
        costs,
        limit,
        selection.adjusted,
        selection.skipped,
        PlannedHead(tuple(skeleton.head_specs()), units[-1].layers),
    )


def _tied_names(skeleton: Skeleton) -> dict[str, str]:
    """Modules whose weight is another's: ``{"lm_head": "tied with model.embed_tokens"}``."""
    tied: dict[str, str] = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
    return {
        name.removesuffix(".weight"): f"tied with {source.removesuffix('.weight')}: one change would be two"
        for name, source in tied.items()
    }


def _explain_skipped(skeleton: Skeleton, layers: list[PlannedLayer], skipped: Mapping[str, str]) -> list[Coverage]:
    why: dict[str, str] = {}
    for spec in skeleton.specs():
        if spec.name in skipped:
            why[spec.parameter] = skipped[spec.name]
    rows = skeleton.coverage([layer.spec.name for layer in layers])
    return [
        replace(row, reason=why[row.parameter]) if row.status == "untouched" and row.parameter in why else row
        for row in rows
    ]


def _make_units(skeleton: Skeleton, layers: list[PlannedLayer], coverage: list[Coverage]) -> tuple[PlannedUnit, ...]:
    size = skeleton.dtype.itemsize
    units = []
    for prefix in skeleton.blocks:
        inside = [row for row in coverage if row.parameter.startswith(prefix + ".")]
        chosen = tuple(layer for layer in layers if layer.spec.name.startswith(prefix + "."))
        before = size * sum(row.numel for row in inside)
        kept = size * sum(row.numel for row in inside if row.status == "untouched")
        units.append(PlannedUnit(prefix, chosen, before, kept + sum(layer.nbytes for layer in chosen)))
    total = size * sum(row.numel for row in coverage)
    outside = total - sum(unit.bytes_before for unit in units)
    head = tuple(layer for layer in layers if layer.spec.kind in ("embedding", "head"))
    saved = sum(size * layer.spec.numel - layer.nbytes for layer in head)
    return (*units, PlannedUnit("outside", head, outside, outside - saved))
