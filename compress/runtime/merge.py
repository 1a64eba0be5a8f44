"""Sibling layers that read the same input (q, k, v; gate and up) as one product: fewer, larger calls.

The first sibling that is called computes for all, the others take their slice: models call them one after the other
with the very same tensor. A result is served once to each sibling and dropped with the last. It is never served for a
tensor that was written to in between (its version counts), so not for inference tensors, which have no version.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.kernels.weight_matmul import weight_matmul
from compress.numerics.panels import LANES, Panels
from compress.runtime.linear import WeightLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MAX_MISSES = 4  # results that siblings did not ask for: then the model calls them otherwise, and each computes alone


class Shelf:
    """A result between the first sibling and the last; not on the module, where setting it takes a microsecond."""

    __slots__ = ("kept", "misses")

    def __init__(self) -> None:
        # Input, its version, what each sibling gets, and who is still to come (one bit each).
        self.kept: tuple[Tensor, int, Sequence[Tensor], int] | None = None
        self.misses = 0

    def __deepcopy__(self, memo: object) -> Shelf:
        return Shelf()


class Group(WeightLinear):
    """The merged layer: rows of all siblings one after the other."""

    def __init__(self, layers: list[WeightLinear]) -> None:
        first = layers[0]
        rows = [layer.out_features for layer in layers]
        panels = Panels(
            torch.cat([layer.codes for layer in layers]),
            torch.cat([layer.scale for layer in layers]),
            None if first.zero is None else torch.cat([layer.zero for layer in layers if layer.zero is not None]),
            first.bits,
            first.group_size,
            (sum(rows), first.in_features),
        )
        super().__init__(panels, _join_biases(layers, rows), first.order, first.dtype)
        self.rows, self.starts = rows, [sum(rows[:n]) for n in range(len(rows) + 1)]
        self.every = (1 << len(rows)) - 1
        self.shelf = Shelf()

    def serve(self, x: Tensor, part: int) -> Tensor:
        """The rows of sibling ``part``, from the product that another sibling asked for if it was of this ``x``."""
        shelf = self.shelf
        if shelf.misses >= MAX_MISSES or x.is_inference() or (x.requires_grad and torch.is_grad_enabled()):
            return self.multiply_part(x, part)
        kept, bit = shelf.kept, 1 << part
        if kept is not None and kept[0] is x and kept[1] == x._version and kept[3] & bit:
            parts, left = kept[2], kept[3] & ~bit
        else:
            shelf.misses += kept is not None
            parts, left = self.multiply(x).split_with_sizes(self.rows, -1), self.every & ~bit
        shelf.kept = (x, x._version, parts, left) if left else None
        return parts[part]

    def multiply_part(self, x: Tensor, part: int) -> Tensor:
        """The rows of sibling ``part`` alone."""
        panels, bias, order = self.take_part(part)
        if order is not None:
            x = x.index_select(-1, order)
        return weight_matmul(
            x, panels.codes, panels.scale, panels.zero, bias, self.bits, self.group_size, panels.shape[0]
        )

    def take_part(self, part: int) -> tuple[Panels, Tensor | None, Tensor | None]:
        """Panels, bias and order of a sibling: views."""
        begin, end = self.starts[part], self.starts[part + 1]
        span = slice(begin // LANES, -(-end // LANES))
        zero = None if self.zero is None else self.zero[span]
        shape = (end - begin, self.in_features)
        panels = Panels(self.codes[span], self.scale[span], zero, self.bits, self.group_size, shape)
        return panels, None if self.bias is None else self.bias[begin:end], self.order


class Sibling(WeightLinear):
    """Stands where a layer was that is now a part of a group; the first of them owns the group.

    It has no buffers: its tensors are views of the group's.
    """

    def __init__(self, group: Group, part: int) -> None:
        nn.Module.__init__(self)
        self.__dict__["group"] = group  # found without the search that attributes of modules cost
        if part == 0:
            self._modules["group"] = group
        self.part, self.reference = part, False
        self.bits, self.group_size, self.dtype = group.bits, group.group_size, group.dtype
        self.in_features = group.in_features
        self.out_features = group.starts[part + 1] - group.starts[part]

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.group.multiply_part(x, self.part)
        return self.group.serve(x, self.part)

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        return self.group.take_part(self.part)[0].codes

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.group.take_part(self.part)[0].scale

    @property
    def zero(self) -> Tensor | None:  # type: ignore[override]
        return self.group.take_part(self.part)[0].zero

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.group.take_part(self.part)[1]

    @property
    def order(self) -> Tensor | None:  # type: ignore[override]
        return self.group.order

    def extra_repr(self) -> str:
        return f"part {self.part}, {self.in_features} -> {self.out_features}"


def merge_siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Merge wherever siblings are alike; the names of what was merged."""
    merged = []
    for name, parent in list(model.named_modules()):
        for words in SIBLINGS:
            layers = [layer for layer in map(parent._modules.get, words) if type(layer) is WeightLinear]
            if len(layers) < len(words) or not _are_alike(layers):
                continue
            group = Group(layers)
            for part, word in enumerate(words):
                setattr(parent, word, Sibling(group, part))
            merged.append(tuple(f"{name}.{word}" for word in words))
    return merged


def _are_alike(layers: list[WeightLinear]) -> bool:
    """Whether all are packed in the same way, read the same features in the same order, and begin at whole panels."""
    first = layers[0]
    for layer in layers:
        if first.reference or _describe(layer) != _describe(first):
            return False
        if first.order is not None and (layer.order is None or not torch.equal(layer.order, first.order)):
            return False
    return all(layer.out_features % LANES == 0 for layer in layers[:-1])


def _describe(layer: WeightLinear) -> tuple[object, ...]:
    zero = None if layer.zero is None else layer.zero.dtype
    return (
        layer.bits, layer.group_size, layer.in_features, layer.scale.dtype, zero, layer.order is None, layer.reference,
        layer.dtype,
    )  # fmt: skip


def _join_biases(layers: list[WeightLinear], rows: list[int]) -> Tensor | None:
    """All biases one after the other, zeros for a layer without; None where none has one."""
    dtype = next((layer.bias.dtype for layer in layers if layer.bias is not None), None)
    if dtype is None:
        return None
    pairs = zip(layers, rows, strict=True)
    return torch.cat([torch.zeros(n, dtype=dtype) if one.bias is None else one.bias for one, n in pairs])
