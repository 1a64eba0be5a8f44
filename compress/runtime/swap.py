"""Stored layers become layers that compute: packed for the kernels where they take them, dense where they don't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.memory import release_memory
from compress.numerics.panels import Panels
from compress.runtime.embedding import QuantEmbedding, find_factor
from compress.runtime.int8_linear import make_int8_linear
from compress.runtime.linear import WeightLinear, pack_coded
from compress.runtime.load import Kernels, make_rounding
from compress.runtime.report import LoadReport
from compress.runtime.stored import Stored, StoredExperts, list_stored, set_module
from compress.storage.formats.base import CodedWeight, Format
from compress.walk.layers import install_rounding


@dataclass(frozen=True)
class Choice:
    """How layers are to compute: ``why_dense`` None for packed, else the reason; ``kernels`` names what multiplies."""

    kernels: str
    why_dense: str | None = None
    reference: bool = False


def choose(mode: Kernels, device: torch.device) -> Choice:
    """What ``kernels=`` comes to here. UserError for an unknown word, and for kernels that are required and missing."""
    if mode not in ("auto", "reference", "require", "off"):
        raise UserError(f"kernels={mode!r} is unknown; use auto, reference, require or off")
    if mode == "off":
        return Choice("off", "kernels=off")
    from compress.kernels import library

    if device.type != "cpu":
        why = f"the kernels run on the CPU, the model is on {device.type}"
    elif mode == "reference" or library.get_mode() == "reference":
        return Choice("the reference bodies", reference=True)
    else:
        found = library.describe()
        if found["problem"] is None:
            return Choice(str(found["in_use"]))
        why = found["problem"]
    if mode == "require":
        raise UserError(f"kernels=require: {why}")
    return Choice("", why)


def finish(model: nn.Module, form: Format, config: Any, choice: Choice) -> LoadReport:
    """Replace every ``Stored``, one after the other, giving its tensors free. UserError for tensors that contradict."""
    report = LoadReport(choice.kernels)
    shared: dict[str, Panels | Tensor] = {}  # by layer name, what the other end of a tied matrix takes
    with torch.no_grad():
        for name, stored in sorted(list_stored(model), key=lambda item: item[1].twin_of is not None):
            if stored.spec.kind != "expert":
                set_module(model, name, _make_layer(name, stored, form, config, choice, report, shared))
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredExperts):
                parameter = _fuse_experts(module, form, config, report)
                owner, _, leaf = name.rpartition(".")
                delattr(model.get_submodule(owner), leaf)
                setattr(model.get_submodule(owner), leaf, parameter)
    release_memory()  # packing leaves as much again in the allocator's hands
    return report


def _make_layer(
    name: str,
    stored: Stored,
    form: Format,
    config: Any,
    choice: Choice,
    report: LoadReport,
    shared: dict[str, Panels | Tensor],
) -> nn.Module:
    plain, bias, order = stored.plain, _find_bias(stored), None
    packed: Panels | Tensor
    if stored.twin_of is not None:
        packed, why = shared[stored.twin_of], report.decoded.get(stored.twin_of, "")
    else:
        coded = form.unpack(stored.spec, stored.tensors(), config)
        if coded.activations is not None or coded.outliers is not None:
            return _make_rounded(name, stored, form, coded, bias, choice, report)
        got = choice.why_dense or pack_coded(coded)
        if isinstance(got, str):
            packed, why = coded.dequantize().to(stored.dtype), got
        else:
            (packed, order), why = got, ""
        shared[name] = packed
    factor = find_factor(plain) if isinstance(plain, nn.Embedding) else None
    if isinstance(packed, Panels) and isinstance(factor, str):
        packed, why = WeightLinear(packed, dtype=stored.dtype).weight, factor
    if isinstance(packed, Panels):
        report.on_kernels.append(name)
        if isinstance(plain, nn.Embedding):
            assert not isinstance(factor, str), "dense by now"
            return QuantEmbedding(packed, stored.dtype, factor)
        return WeightLinear(packed, bias, order, stored.dtype, choice.reference)
    report.decoded[name] = why
    return _make_dense(plain, packed, bias)


def _make_rounded(
    name: str,
    stored: Stored,
    form: Format,
    coded: CodedWeight,
    bias: Tensor | None,
    choice: Choice,
    report: LoadReport,
) -> nn.Module:
    """A layer whose input is rounded: on the int8 kernels, else dense with the rounding put in front."""
    layer = choice.why_dense or make_int8_linear(coded, bias, stored.dtype, choice.reference)
    if not isinstance(layer, str):
        report.on_kernels.append(name)
        return layer
    report.decoded[name] = layer
    dense = _make_dense(stored.plain, coded.dequantize().to(stored.dtype), bias)
    if coded.activations is not None:
        install_rounding(dense, make_rounding(form, coded))
    return dense


def _find_bias(stored: Stored) -> Tensor | None:
    """The bias in the model's dtype; none if it is nothing but zeros (as some writers leave in every layer)."""
    bias = dict(stored.named_buffers()).get("bias")
    if bias is None or not bool(bias.any()):
        return None
    if bias.shape != (stored.spec.shape[0],):
        raise UserError(f"{stored.stem}.bias: got {list(bias.shape)}, wanted {[stored.spec.shape[0]]}")
    return bias.to(stored.dtype)


def _make_dense(plain: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module that was there, with a weight; ``nn.Linear`` also in place of Conv1D."""
    if isinstance(plain, nn.Embedding):
        plain.weight = nn.Parameter(weight, requires_grad=False)
        factor = find_factor(plain)
        if isinstance(factor, Tensor) and "embed_scale" in plain._buffers:
            plain._buffers["embed_scale"] = factor  # it was on meta, and only the module knew its value
        return plain
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _fuse_experts(module: StoredExperts, form: Format, config: Any, report: LoadReport) -> nn.Parameter:
    """The fused parameter ``(E, O, I)``: there is no kernel for it yet, so encoded experts are unpacked."""
    device = next(module.buffers()).device
    fused = torch.empty(module.shape, dtype=module.dtype, device=device)
    for index in range(module.shape[0]):
        child = module._modules.get(str(index))
        if isinstance(child, Stored):
            fused[index] = form.unpack(child.spec, child.tensors(), config).dequantize()
            report.decoded[child.spec.name] = "experts of a fused parameter have no kernel"
            del module._modules[str(index)]
        else:
            fused[index] = getattr(module, str(index))
            del module._buffers[str(index)]
    return nn.Parameter(fused, requires_grad=False)
