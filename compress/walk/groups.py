"""Which layers of a block read the very same input: found by running a few tokens, by identity of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.types import LayerSpec
from compress.walk.experts import UnfusedExperts, holds_experts, why_not_walkable
from compress.walk.layers import find_module
from compress.walk.stream import Call, run_block


@dataclass(frozen=True)
class Group:
    """Layers with one input, in execution order; the first one executed is where a forward pauses."""

    specs: tuple[LayerSpec, ...]

    @property
    def is_expert(self) -> bool:
        return self.specs[0].kind == "expert"


class Hooked:
    """A block whose fused experts are unfused, and the module that computes each layer."""

    def __init__(self, block: nn.Module, specs: Sequence[LayerSpec]) -> None:
        self.block = block
        self.experts = {
            id(module): UnfusedExperts(module)
            for module in block.modules()
            if holds_experts(module) and why_not_walkable(module) is None
        }
        self.modules = {spec.name: self._find(spec) for spec in specs}

    def _find(self, spec: LayerSpec) -> nn.Module:
        path, _, leaf = spec.parameter.rpartition(".")
        module = find_module(self.block, path)
        if spec.kind != "expert":
            return module
        assert spec.index is not None
        return self.experts[id(module)].linears[spec.index, leaf]

    def close(self) -> None:
        for unfused in self.experts.values():
            unfused.refuse()


@torch.no_grad()
def find_groups(hooked: Hooked, specs: Sequence[LayerSpec], hidden: Tensor, call: Call) -> list[Group]:
    """The groups of ``specs`` in the order in which the block reaches them, from one short forward of ``hidden``.

    Layers that this forward does not reach get groups of their own: all experts of a fused tensor in index order, each
    expert's ``gate_up_proj`` and ``down_proj``; any other layer directly after the one defined before it.
    Raises ``UserError`` if a layer runs twice on different inputs.
    """
    order: list[list[LayerSpec]] = []
    inputs: list[Tensor] = []  # kept alive, so that no two inputs share an address
    place: dict[str, int] = {}

    def note(spec: LayerSpec, x: Tensor) -> None:
        known = next((i for i, other in enumerate(inputs) if is_same_input(other, x)), None)
        if spec.name in place:
            if place[spec.name] != known:
                raise UserError(f"{spec.name}: runs more than once per forward, on different inputs; exclude it")
            return
        if known is None:
            known = len(order)
            order.append([])
            inputs.append(x)
        place[spec.name] = known
        order[known].append(spec)

    handles = [
        hooked.modules[spec.name].register_forward_pre_hook(lambda _m, args, spec=spec: note(spec, args[0]))
        for spec in specs
    ]
    try:
        run_block(hooked.block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return _place_unreached([Group(tuple(group)) for group in order], specs)


def is_same_input(a: Tensor, b: Tensor) -> bool:
    """The same values in the same memory; ``(1, T, I)`` and its view ``(T, I)`` count as one."""
    same_storage = a.untyped_storage()._cdata == b.untyped_storage()._cdata  # an address would not do on meta
    return same_storage and a.storage_offset() == b.storage_offset() and a.shape.numel() == b.shape.numel()


def _place_unreached(groups: list[Group], specs: Sequence[LayerSpec]) -> list[Group]:
    """Add the layers that no token reached, and put the experts of each fused tensor in index order."""
    owners = {_owner(spec) for spec in specs if spec.kind == "expert"}
    for owner in owners:
        experts = [Group((spec,)) for spec in specs if spec.kind == "expert" and _owner(spec) == owner]
        reached = [i for i, group in enumerate(groups) if group.is_expert and _owner(group.specs[0]) == owner]
        first = reached[0] if reached else len(groups)
        rest = [group for i, group in enumerate(groups) if i not in reached]
        groups = [*rest[:first], *experts, *rest[first:]]
    for i, spec in enumerate(specs):
        if any(spec in group.specs for group in groups):
            continue
        before = [j for j, group in enumerate(groups) if i > 0 and specs[i - 1] in group.specs]
        groups.insert(before[-1] + 1 if before else 0, Group((spec,)))
    return groups


def _owner(spec: LayerSpec) -> str:
    return spec.parameter.rpartition(".")[0]
