"""compressed-tensors, format ``pack-quantized``: what vLLM and stock Transformers (with the package) load.

Tensors of a layer ``<name>``, all widths of 1 to 8 bits packed without waste: ``weight_packed`` int32 ``(O, ceil(I *
bits / 32))``; ``weight_scale`` ``(O, G)`` in the model's dtype, which the stock load casts it to; ``weight_shape``
int64 ``(2,)``; ``weight_zero_point`` int32 ``(ceil(O * bits / 32), G)``, packed along O, if asymmetric. Stored codes
and zeros are the package's signed ones plus ``2**(bits - 1)``: exactly ours. The stock load computes ``scale * (code
- zero)`` in the scale's dtype: one rounding, since ``|code - zero| <= 255`` is exact in bfloat16 and float16.

With int8 activations, 8-bit rows (W8A8) are ``int-quantized`` instead: ``weight`` int8 ``(O, I)``, signed codes, and
``weight_scale``; other widths and groups stay packed. A stock load rounds the input of such layers token by token with
the scale ``max|x| / 127.5`` in the input's dtype, codes -128 to 127, and multiplies in floating point; ``round_inputs``
does the same. vLLM multiplies int8 codes with the scale ``max|x| / 127``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.numerics.packing import pack_codes, packed_length, unpack_codes
from compress.storage.files import TensorHeader
from compress.storage.formats.base import (
    CodedWeight,
    Layers,
    QuantSpec,
    describe,
    read_setting,
    refuse_head,
    refuse_indivisible,
    store_exactly,
    take,
)
from compress.types import ActivationRule, LayerSpec, LayerState

NAME = "compressed-tensors"
PREFIX = "model"
LOADS_WITH: tuple[str, ...] = ("compressed-tensors",)
INPUT_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
    "observer": None,
}


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The model's dtype: a stock load casts scales to it."""
    return model_dtype


def carries(spec: LayerSpec, quant: QuantSpec | None, arch: str) -> str | None:
    """Affine grids with integer zeros on ``nn.Linear``."""
    if quant is None:
        return None
    if spec.kind in ("embedding", "head"):
        return refuse_head(spec, NAME)
    if spec.kind != "linear":
        what = "Conv1D layers" if spec.kind == "conv1d" else "experts fused in one 3-D parameter"
        return f"compressed-tensors quantizes nn.Linear only, not {what}; format native carries them"
    if not 1 <= quant.bits <= 8:
        return f"compressed-tensors carries 1 to 8 bits, got {quant.bits}"
    if quant.float_zero:
        return "compressed-tensors has integer zero points only; format native carries float zeros"
    if quant.activations is not None or quant.outliers:
        return _refuse_rule(quant) or refuse_indivisible(spec, quant)
    return refuse_indivisible(spec, quant)


def _refuse_rule(quant: QuantSpec) -> str | None:
    """Why rounded activations are not carried, if they aren't."""
    rule = quant.activations
    if rule is None or rule.threshold > 0 or quant.outliers:
        return "compressed-tensors knows no outlier features; format bitsandbytes or native carries them"
    if rule.groups != 1:
        return "compressed-tensors rounds inputs with one scale per token; format native carries groups"
    if not quant.symmetric:
        return "with rounded inputs compressed-tensors carries symmetric weights; format native carries others"
    return None


def conflict(layers: Layers, untouched: Sequence[LayerSpec]) -> str | None:
    """Symmetric layers may differ in bits and group size (config groups); with asymmetric ones all must agree.

    A stock load in packed form can't take zero points (compressed-tensors 0.20 expects them unpacked there), so such
    models carry ``dequantize: true``, and that path of Transformers 5.23 knows one scheme for the whole model.
    """
    schemes = {quant: spec.name for spec, quant in layers}
    if len(schemes) < 2 or all(quant.symmetric for quant in schemes):
        return None
    (first, one), (second, two), *_ = schemes.items()
    return (
        f"with asymmetric layers Transformers loads compressed-tensors by one scheme, but {one} has {describe(first)} "
        f"and {two} has {describe(second)}; make them alike or symmetric, or use format native"
    )


def encode(spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer; a layer without a grid is written as its plain weight."""
    if state.grid is None or state.codes is None:
        return {spec.parameter: state.weight.to(model_dtype).contiguous()}
    grid = state.grid
    assert not grid.float_zero, f"{spec.name}: float zeros need format native"
    assert state.outliers is None, f"{spec.name}: outlier columns need format bitsandbytes or native"
    size = -1 if grid.group_size == spec.shape[1] else grid.group_size
    if _name_layout(QuantSpec(grid.bits, size, grid.symmetric, activations=state.activations)) == "int-quantized":
        return {
            f"{spec.name}.weight": (state.codes.to(torch.int16) - 128).to(torch.int8).contiguous(),
            f"{spec.name}.weight_scale": store_exactly(spec, grid.scale, scale_dtype(model_dtype), "scale"),
        }
    tensors = {
        f"{spec.name}.weight_packed": pack_codes(state.codes, grid.bits),
        f"{spec.name}.weight_scale": store_exactly(spec, grid.scale, scale_dtype(model_dtype), "scale"),
        f"{spec.name}.weight_shape": torch.tensor(spec.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        zero = store_exactly(spec, grid.zero, torch.uint8, "zero")
        tensors[f"{spec.name}.weight_zero_point"] = pack_codes(zero, grid.bits, dim=0)
    else:
        assert bool((grid.zero == 2 ** (grid.bits - 1)).all()), f"{spec.name}: a symmetric zero is 2**(bits - 1)"
    return tensors


def decode(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """``(O, I)`` float32. Raises UserError where configuration and tensors contradict each other."""
    return unpack(spec, tensors, config).dequantize()


def unpack(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedWeight:
    """Codes, scales and zeros. Same errors as ``decode``."""
    quant = _find_scheme(spec, config)
    rows, columns = spec.shape
    groups = quant.groups(spec)
    if _name_layout(quant) == "int-quantized":
        signed = take(spec, tensors, f"{spec.name}.weight", torch.int8, (rows, columns))
        scale = take(spec, tensors, f"{spec.name}.weight_scale", None, (rows, 1))
        codes = (signed.to(torch.int16) + 128).to(torch.uint8)
        return CodedWeight(codes, scale, None, 8, columns, activations=quant.activations)
    shape = take(spec, tensors, f"{spec.name}.weight_shape", torch.int64, (2,))
    if shape.tolist() != [rows, columns]:
        raise UserError(f"{spec.name}.weight_shape: got {shape.tolist()}, wanted {[rows, columns]}")
    words = take(spec, tensors, f"{spec.name}.weight_packed", torch.int32, (rows, packed_length(columns, quant.bits)))
    codes = unpack_codes(words, quant.bits, columns)
    scale = take(spec, tensors, f"{spec.name}.weight_scale", None, (rows, groups))
    zero = None
    if not quant.symmetric:
        packed = (packed_length(rows, quant.bits), groups)
        words = take(spec, tensors, f"{spec.name}.weight_zero_point", torch.int32, packed)
        zero = unpack_codes(words, quant.bits, rows, dim=0)
    size = quant.inputs_per_group(spec)
    return CodedWeight(codes, scale, zero, quant.bits, size, activations=quant.activations)


def nbytes(spec: LayerSpec, quant: QuantSpec | None) -> int:
    """Bytes of the tensors of one layer."""
    size = spec.dtype.itemsize
    if quant is None:
        return spec.numel * size
    rows, columns = spec.shape
    groups = quant.groups(spec)
    if _name_layout(quant) == "int-quantized":
        return spec.numel + rows * size
    zeros = 0 if quant.symmetric else 4 * packed_length(rows, quant.bits) * groups
    return 4 * rows * packed_length(columns, quant.bits) + rows * groups * size + 16 + zeros


def quantization_config(layers: Layers, untouched: Sequence[LayerSpec]) -> dict[str, Any] | None:
    """One config group per scheme; its targets are regular expressions over layer names, block numbers left open."""
    reason = conflict(layers, untouched)
    if reason is not None:
        raise UserError(reason)
    schemes: dict[QuantSpec, list[str]] = {}
    for spec, quant in layers:
        schemes.setdefault(quant, []).append(spec.name)
    if not schemes:
        return None
    others = [spec.name for spec in untouched]
    groups = {}
    for number, (quant, names) in enumerate(schemes.items()):
        elsewhere = {name for other, members in schemes.items() if other != quant for name in members} | set(others)
        groups[f"group_{number}"] = {
            "targets": _write_targets(names, elsewhere),
            "weights": {
                "num_bits": quant.bits,
                "type": "int",
                "symmetric": quant.symmetric,
                "strategy": "channel" if quant.group_size == -1 else "group",
                "group_size": None if quant.group_size == -1 else quant.group_size,
                "dynamic": False,
            },
            "input_activations": None if quant.activations is None else INPUT_ACTIVATIONS,
            "output_activations": None,
            "format": _name_layout(quant),
        }
    layouts = {_name_layout(quant) for quant in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "dequantize": not all(quant.symmetric for quant in schemes),
        "config_groups": groups,
        "ignore": [*others, "lm_head"],
    }


def list_layers(
    headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[tuple[LayerSpec, tuple[str, ...]]]:
    """Every encoded layer and the tensors that make it."""
    found: list[tuple[LayerSpec, tuple[str, ...]]] = []
    for tensor, header in headers.items():
        name, _, leaf = tensor.rpartition(".")
        if leaf == "weight" and header.dtype == torch.int8 and f"{name}.weight_scale" in headers:
            dtype = headers[f"{name}.weight_scale"].dtype
            spec = LayerSpec(name, (header.shape[0], header.shape[1]), dtype, "linear", f"{name}.weight")
            found.append((spec, (tensor, f"{name}.weight_scale")))
        if leaf != "weight_packed" or len(header.shape) != 2:
            continue
        spec = LayerSpec(name, (header.shape[0], 0), torch.bfloat16, "linear", f"{name}.weight")
        quant = _find_scheme(spec, config)
        scale = headers.get(f"{name}.weight_scale")
        if scale is None or len(scale.shape) != 2:
            raise UserError(f"{name}: weight_packed without a weight_scale of shape (O, G)")
        columns = scale.shape[1] * quant.group_size if quant.group_size != -1 else header.shape[1] * 32 // quant.bits
        spec = LayerSpec(name, (header.shape[0], columns), scale.dtype, "linear", f"{name}.weight")
        leaves = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        found.append((spec, tuple(f"{name}.{one}" for one in leaves if f"{name}.{one}" in headers)))
    return found


def round_inputs(x: Tensor, rule: ActivationRule, kept: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
    """What a stock load multiplies in place of ``x`` ``(N, T, I)``, in its dtype.

    Where a layer reads ``(T, I)`` (OPT's fc1), compressed-tensors 0.20 takes one scale for all of it.
    """
    assert kept is None and groups is None and rule.threshold == 0, "compressed-tensors knows no outliers and groups"
    if x.numel() == 0:
        return x
    peak = x.abs().amax() if x.dim() < 3 else x.abs().amax(dim=tuple(range(2, x.dim())), keepdim=True)
    half = 2 ** (rule.bits - 1)
    scale = peak / (half - 0.5)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).clamp_(-half, half - 1).round_() * scale


def _name_layout(quant: QuantSpec) -> str:
    whole = quant.bits == 8 and quant.group_size == -1 and quant.symmetric
    return "int-quantized" if quant.activations is not None and whole else "pack-quantized"


def _write_targets(names: Sequence[str], elsewhere: set[str]) -> list[str]:
    """Regular expressions with the block number left open where that catches nothing else, otherwise names."""
    targets: list[str] = []
    for name in names:
        pattern = "re:^" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) + "$"
        clashes = any(re.match(pattern.removeprefix("re:"), other) for other in elsewhere)
        target = name if clashes else pattern
        if target not in targets:
            targets.append(target)
    return targets


def _find_scheme(spec: LayerSpec, config: Mapping[str, Any]) -> QuantSpec:
    where = "quantization_config"
    for key, group in read_setting(config, "config_groups", dict, where).items():
        for target in read_setting(group, "targets", list, f"{where}.config_groups.{key}"):
            matches = re.match(target[3:], spec.name) if target.startswith("re:") else target in (spec.name, "Linear")
            if matches:
                return _read_scheme(group, f"{where}.config_groups.{key}")
    raise UserError(f"{where}: no config group has {spec.name} among its targets")


def _read_scheme(group: Mapping[str, Any], where: str) -> QuantSpec:
    weights = read_setting(group, "weights", dict, where)
    bits = read_setting(weights, "num_bits", int, where)
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel") or weights.get("type", "int") != "int" or not 1 <= bits <= 8:
        raise UserError(
            f"{where}: {bits} bits {weights.get('type')}, strategy {strategy!r} is not an integer weight grid"
        )
    size = read_setting(weights, "group_size", int, where) if strategy == "group" else -1
    if size == 0 or size < -1:
        raise UserError(f"{where}: group_size {size} is not positive")
    symmetric = read_setting(weights, "symmetric", bool, where)
    inputs = group.get("input_activations")
    if inputs is None:
        return QuantSpec(bits, size, symmetric)
    rule = {key: inputs.get(key) for key in ("num_bits", "type", "strategy", "symmetric", "dynamic")}
    if rule != {key: INPUT_ACTIVATIONS[key] for key in rule}:
        raise UserError(
            f"{where}: input_activations {rule} are not read; only int8 per token, symmetric and dynamic, are"
        )
    return QuantSpec(bits, size, symmetric, activations=ActivationRule())
