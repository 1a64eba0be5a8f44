"""One linear layer of a block as a matrix ``(O, I)``, wherever it lives: ``nn.Linear``, ``Conv1D``, a fused expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.types import LayerSpec

Rounding = Callable[[Tensor], Tensor]  # a layer's input (..., I) -> what the layer reads in its place


@torch.no_grad()
def get_weight(block: nn.Module, spec: LayerSpec) -> Tensor:
    """The weight of ``spec`` as a float32 copy ``(O, I)``. ``block`` is the spec's block, or the whole model."""
    return _as_rows(find_parameter(block, spec), spec).detach().to(torch.float32, copy=True).contiguous()


@torch.no_grad()
def view_weight(block: nn.Module, spec: LayerSpec) -> Tensor:
    """The weight of ``spec`` as it lies in the block, ``(O, I)`` in the model's dtype: a view, not to be changed."""
    return _as_rows(find_parameter(block, spec), spec).detach()


@torch.no_grad()
def set_weight(block: nn.Module, spec: LayerSpec, weight: Tensor) -> None:
    """Write ``weight`` ``(O, I)`` where the layer's weight lives, cast to the parameter's dtype, in place."""
    assert tuple(weight.shape) == spec.shape, f"{spec.name}: weight is {tuple(weight.shape)}, layer is {spec.shape}"
    _as_rows(find_parameter(block, spec).data, spec).copy_(weight)


def install_rounding(module: nn.Module, rounding: Rounding) -> torch.utils.hooks.RemovableHandle:
    """Let ``module`` read ``rounding(x)`` for ``x`` until the handle is removed."""
    return module.register_forward_pre_hook(lambda _module, args: (rounding(args[0]), *args[1:]))


def find_parameter(block: nn.Module, spec: LayerSpec) -> Tensor:
    """The parameter that holds the layer; ``spec.parameter`` is a full name, ``block`` may be any module above it."""
    parameter: Tensor = getattr(*_owner(block, spec.parameter))
    return parameter


def find_module(block: nn.Module, name: str) -> nn.Module:
    """The module of full ``name`` below ``block``, which stands somewhere on its path."""
    return _owner(block, name + ".")[0]


def _owner(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Resolve a full name from inside: drop leading parts until the rest is found below ``block``."""
    path, _, leaf = name.rpartition(".")
    parts = path.split(".")
    for start in range(len(parts) + 1):
        try:
            module = block.get_submodule(".".join(parts[start:]))
        except AttributeError:
            continue
        if not leaf or hasattr(module, leaf):
            return module, leaf
    raise AssertionError(f"{name} is not below {type(block).__name__}")


def _as_rows(parameter: Tensor, spec: LayerSpec) -> Tensor:
    """A view of the parameter as ``(O, I)``."""
    if spec.kind == "conv1d":
        return parameter.t()
    if spec.kind == "expert":
        assert spec.index is not None
        return parameter[spec.index]
    return parameter
