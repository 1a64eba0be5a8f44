"""Which linear layers a model has, and what becomes of each of its parameters: nothing is left unaccounted for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.types import LayerSpec
from compress.walk.experts import PARAMETERS, holds_experts, why_not_walkable

# Last part of the name of a module that chooses experts; a change of its weights changes which experts run.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Coverage:
    """A parameter, or the experts of a fused one that share a status."""

    parameter: str
    numel: int
    status: Literal["compressed", "untouched"]
    reason: str  # why it is left untouched; "" for compressed


def list_head(model: PreTrainedModel, tied: dict[str, str]) -> list[LayerSpec]:
    """The token embedding and the output head, ``(vocabulary, D)`` each; one spec where they are one matrix.

    Only plain ones: ``nn.Embedding`` (also where the model scales what it gives) and ``nn.Linear``. A bias of the head
    is a parameter of its own and no part of it.
    """
    ends: tuple[tuple[nn.Module, Literal["embedding", "head"], type[nn.Module]], ...] = (
        (model.get_input_embeddings(), "embedding", nn.Embedding),
        (model.get_output_embeddings(), "head", nn.Linear),
    )
    specs: dict[str, LayerSpec] = {}
    for module, kind, plain in ends:
        path = next((path for path, one in model.named_modules() if one is module), None)
        if path is None or not isinstance(module, plain):
            continue
        parameter = tied.get(f"{path}.weight", f"{path}.weight")
        others = tuple(sorted(name for name, source in tied.items() if source == parameter != name))
        weight = model.get_parameter(parameter)
        shape = (weight.shape[0], weight.shape[1])
        name = parameter.removesuffix(".weight")
        specs.setdefault(parameter, LayerSpec(name, shape, weight.dtype, kind, parameter, tied=others))
    return list(specs.values())


def list_specs(model: nn.Module, blocks: tuple[str, ...]) -> list[LayerSpec]:
    """Linear layers inside ``blocks``, routers excepted, in definition order; fused experts one by one."""
    return [spec for prefix in blocks for spec in _list_block(model.get_submodule(prefix), prefix)]


def _list_block(block: nn.Module, prefix: str) -> Iterator[LayerSpec]:
    for path, module in block.named_modules():
        name = f"{prefix}.{path}"
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in ROUTERS:
            shape = (module.weight.shape[0], module.weight.shape[1])
            yield LayerSpec(name, shape, module.weight.dtype, "linear", f"{name}.weight")
        elif isinstance(module, Conv1D):
            shape = (module.weight.shape[1], module.weight.shape[0])
            yield LayerSpec(name, shape, module.weight.dtype, "conv1d", f"{name}.weight")
        elif holds_experts(module) and why_not_walkable(module) is None:
            yield from _list_experts(module, name)


def _list_experts(module: nn.Module, name: str) -> Iterator[LayerSpec]:
    fused = {leaf: module.get_parameter(leaf) for leaf in PARAMETERS}
    for index in range(fused["down_proj"].shape[0]):
        for leaf, parameter in fused.items():
            shape = (parameter.shape[1], parameter.shape[2])
            yield LayerSpec(f"{name}.{index}.{leaf}", shape, parameter.dtype, "expert", f"{name}.{leaf}", index)


def cover(model: PreTrainedModel, blocks: tuple[str, ...], selected: set[str], tied: dict[str, str]) -> list[Coverage]:
    """One row per parameter (two for a fused one of which only some experts are ``selected``), tied ones once.

    The ``numel`` of all rows add up to the number of parameters of the model.
    """
    layers: dict[str, list[LayerSpec]] = {}
    head = [spec for spec in list_head(model, tied) if spec.name in selected]
    for spec in [*list_specs(model, blocks), *head]:
        layers.setdefault(spec.parameter, []).append(spec)
    rows: list[Coverage] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if tied.get(name, name) != name:
            continue
        if name in layers:
            chosen = sum(spec.numel for spec in layers[name] if spec.name in selected)
            rest = parameter.numel() - chosen
            if chosen:
                rows.append(Coverage(name, chosen, "compressed", ""))
            if rest:
                rows.append(Coverage(name, rest, "untouched", "no step selects it"))
        else:
            reason = _untouched_reason(model, name, blocks, [other for other, to in tied.items() if to == name])
            rows.append(Coverage(name, parameter.numel(), "untouched", reason))
    return rows


def _untouched_reason(model: PreTrainedModel, name: str, blocks: tuple[str, ...], tied: list[str]) -> str:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return f"embedding, tied with {', '.join(tied)}" if tied else "embedding"
    if leaf == "bias":
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if module is model.get_output_embeddings():
        return "output head"
    if path.rpartition(".")[2] in ROUTERS:
        return "router"
    if holds_experts(module):
        return why_not_walkable(module) or "experts outside the blocks"
    if not any(name.startswith(prefix + ".") for prefix in blocks):
        return "outside the blocks"
    return "not a linear layer"
