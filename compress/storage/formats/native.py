"""Our own format, for what stock formats can't carry: any width from 1 to 8, float zeros, Conv1D, single experts, the
embedding and the output head.

Files are ``compress-0000i-of-0000n.safetensors`` with the index ``compress.safetensors.index.json``, so that a stock
``from_pretrained`` stops with "no file named model.safetensors" rather than start at random; use ``compress.load``.
Tensors of one layer, ``<stem>`` being its name, or ``<parameter>.<index>`` for one expert of a fused parameter:

| tensor          | dtype, shape                    | meaning                                                        |
| --------------- | ------------------------------- | -------------------------------------------------------------- |
| ``<stem>.codes``| uint8 ``ceil(O * I * bits / 8)``| codes ``0 .. 2**bits - 1``, row after row, lowest bit first     |
| ``<stem>.scale``| float ``(O, G)``                | one scale per row and group of inputs                          |
| ``<stem>.zero`` | uint8 ``ceil(O * G * bits / 8)``| integer zeros, packed as the codes; absent if symmetric         |
|                 | or float ``(O, G)``             | float zeros, in the dtype of the scale                         |

Where a layer keeps columns in high precision: ``<stem>.outlier_index`` int32 ``(n,)``, which ones, sorted, and
``<stem>.outlier_weight`` ``(O, n)`` in the model's dtype; their codes stand for 0. With ``activations.groups > 1``:
``<stem>.input_group`` uint8 ``(I,)``, the group of each input feature.

``weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g])``, ``(O, I)`` for Conv1D too; symmetric means
``zero = 2**(bits - 1)``. ``config.json`` lists every layer under ``quantization_config.layers``. Of kind ``embedding``
and ``head`` is the matrix of the token embedding and of the output head; where they are one, it is stored once, as the
embedding, and ``tied`` names the other parameters. Rows are independent: eight rows begin at a whole byte.

A layer with ``activations`` reads its input rounded per token (``numerics.activations.round_rows``): ``bits``; features
that reach ``threshold`` anywhere in the forward pass stay as they are, and so do those of ``outlier_index``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.numerics.packing import pack_codes, unpack_codes
from compress.storage.files import DTYPE_NAMES, DTYPES, TensorHeader
from compress.storage.formats.base import (
    CodedWeight,
    Layers,
    QuantSpec,
    read_setting,
    refuse_indivisible,
    store_exactly,
    take,
)
from compress.types import ActivationRule, LayerSpec, LayerState, Outliers

NAME = "native"
PREFIX = "compress"
LOADS_WITH: tuple[str, ...] = ("compress",)
VERSION = 1
LEAVES = ("codes", "scale", "zero", "outlier_index", "outlier_weight", "input_group")
KINDS = ("linear", "conv1d", "expert", "embedding", "head")
ROWS = 8  # so many rows of packed codes take whole bytes, whatever their width


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The model's own dtype."""
    return model_dtype


def carries(spec: LayerSpec, quant: QuantSpec | None, arch: str) -> str | None:
    """Any affine grid of 1 to 8 bits whose groups fit the row."""
    if quant is None:
        return None
    if not 1 <= quant.bits <= 8:
        return f"native carries 1 to 8 bits, got {quant.bits}"
    if quant.activations is not None and spec.kind not in ("linear", "conv1d"):
        return f"inputs are rounded in front of nn.Linear and Conv1D only, not of the kind {spec.kind}"
    return refuse_indivisible(spec, quant)


def conflict(layers: Layers, untouched: Sequence[LayerSpec]) -> str | None:
    """Never: each layer is described on its own."""
    return None


def encode(spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer; a layer without a grid is written as its plain weight."""
    stem = _stem(spec)
    if state.grid is None or state.codes is None:
        weight = state.weight.t() if spec.kind == "conv1d" else state.weight
        return {stem if spec.kind == "expert" else spec.parameter: weight.to(model_dtype).contiguous()}
    grid = state.grid
    dtype = scale_dtype(model_dtype)
    tensors = {
        f"{stem}.codes": pack_bytes(state.codes, grid.bits),
        f"{stem}.scale": store_exactly(spec, grid.scale, dtype, "scale"),
    }
    if grid.float_zero:
        tensors[f"{stem}.zero"] = store_exactly(spec, grid.zero, dtype, "float zero")
    elif not grid.symmetric:
        tensors[f"{stem}.zero"] = pack_bytes(store_exactly(spec, grid.zero, torch.uint8, "zero"), grid.bits)
    else:
        assert bool((grid.zero == 2 ** (grid.bits - 1)).all()), f"{spec.name}: a symmetric zero is 2**(bits - 1)"
    if state.outliers is not None:
        tensors[f"{stem}.outlier_index"] = state.outliers.index.to(torch.int32).contiguous()
        tensors[f"{stem}.outlier_weight"] = store_exactly(spec, state.outliers.weight, model_dtype, "outlier column")
    if state.input_groups is not None:
        tensors[f"{stem}.input_group"] = state.input_groups.contiguous()
    return tensors


def decode(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """``(O, I)`` float32. Raises UserError where configuration and tensors contradict each other."""
    return unpack(spec, tensors, config).dequantize()


def unpack(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedWeight:
    """Codes, scales and zeros. Same errors as ``decode``."""
    stem = _stem(spec)
    quant = _read_quant(spec, config)
    rows, columns = spec.shape
    groups = quant.groups(spec)
    stream = take(spec, tensors, f"{stem}.codes", torch.uint8, (count_bytes(spec.numel, quant.bits),))
    codes = unpack_bytes(stream, quant.bits, spec.numel).reshape(rows, columns)
    scale = take(spec, tensors, f"{stem}.scale", None, (rows, groups))
    zero = None
    if quant.float_zero:
        zero = take(spec, tensors, f"{stem}.zero", None, (rows, groups))
    elif not quant.symmetric:
        stream = take(spec, tensors, f"{stem}.zero", torch.uint8, (count_bytes(rows * groups, quant.bits),))
        zero = unpack_bytes(stream, quant.bits, rows * groups).reshape(rows, groups)
    return CodedWeight(
        codes,
        scale,
        zero,
        quant.bits,
        quant.inputs_per_group(spec),
        activations=quant.activations,
        outliers=_take_outliers(spec, tensors),
        input_groups=_take_input_groups(spec, quant, tensors),
    )


def _take_outliers(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> Outliers | None:
    stem, (rows, columns) = _stem(spec), spec.shape
    found = tensors.get(f"{stem}.outlier_index")
    if found is None:
        return None
    index = take(spec, tensors, f"{stem}.outlier_index", torch.int32, (found.numel(),)).to(torch.int64)
    if not bool((index.diff() > 0).all()) or bool((index < 0).any()) or bool((index >= columns).any()):
        raise UserError(f"{stem}.outlier_index: wanted sorted numbers from 0 to {columns - 1}, no two alike")
    weight = take(spec, tensors, f"{stem}.outlier_weight", None, (rows, len(index)))
    return Outliers(index, weight.float())


def _take_input_groups(spec: LayerSpec, quant: QuantSpec, tensors: Mapping[str, Tensor]) -> Tensor | None:
    if quant.activations is None or quant.activations.groups == 1:
        return None
    name, count = f"{_stem(spec)}.input_group", quant.activations.groups
    groups = take(spec, tensors, name, torch.uint8, (spec.shape[1],))
    if int(groups.max()) >= count:
        raise UserError(
            f"{name}: group {int(groups.max())} of {count}; configuration and weights do not belong together"
        )
    return groups


def take_rows(spec: LayerSpec, quant: QuantSpec, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The tensors of some rows of a layer, as ``encode`` would have made them; ``rows`` starts at a multiple of 8.

    Encoded pieces of that many rows laid end to end are in turn the tensors of the whole layer.
    """
    assert rows.start % ROWS == 0, f"rows start at {rows.start}, wanted a multiple of {ROWS}"
    stem, groups = _stem(spec), quant.groups(spec)
    zeros = f"{stem}.zero"
    found = {
        f"{stem}.codes": tensors[f"{stem}.codes"][_byte_range(rows, spec.shape[1], quant.bits)],
        f"{stem}.scale": tensors[f"{stem}.scale"][rows],
    }
    if zeros in tensors:
        found[zeros] = tensors[zeros][rows if quant.float_zero else _byte_range(rows, groups, quant.bits)]
    return found


def nbytes(spec: LayerSpec, quant: QuantSpec | None) -> int:
    """Bytes of the tensors of one layer."""
    size = spec.dtype.itemsize
    if quant is None:
        return spec.numel * size
    scales = spec.shape[0] * quant.groups(spec)
    zeros = scales * size if quant.float_zero else 0 if quant.symmetric else count_bytes(scales, quant.bits)
    several = quant.activations is not None and quant.activations.groups > 1
    kept = quant.outliers * (4 + spec.shape[0] * size) + (spec.shape[1] if several else 0)
    return count_bytes(spec.numel, quant.bits) + scales * scale_dtype(spec.dtype).itemsize + zeros + kept


def quantization_config(layers: Layers, untouched: Sequence[LayerSpec]) -> dict[str, Any] | None:
    """Every layer with where it lives and how its codes are laid out."""
    table = {}
    for spec, quant in layers:
        entry: dict[str, Any] = {
            "shape": list(spec.shape),
            "dtype": DTYPE_NAMES[spec.dtype],
            "kind": spec.kind,
            "parameter": spec.parameter,
            "bits": quant.bits,
            "group_size": quant.group_size,
            "symmetric": quant.symmetric,
        }
        if quant.float_zero:
            entry["float_zero"] = True
        if spec.index is not None:
            entry["index"] = spec.index
        if quant.activations is not None:
            entry["activations"] = asdict(quant.activations)
        if spec.tied:
            entry["tied"] = list(spec.tied)
        table[spec.name] = entry
    return {"quant_method": "compress", "version": VERSION, "layers": table}


def list_layers(
    headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[tuple[LayerSpec, tuple[str, ...]]]:
    """Every encoded layer and the tensors that make it."""
    version = config.get("version")
    if version != VERSION:
        raise UserError(
            f"quantization_config: version is {version!r}, this compress reads {VERSION}; install a matching one"
        )
    found = []
    for name, entry in read_setting(config, "layers", dict, "quantization_config").items():
        spec = _read_spec(name, entry)
        stem = _stem(spec)
        names = tuple(f"{stem}.{leaf}" for leaf in LEAVES)
        found.append((spec, tuple(tensor for tensor in names if tensor in headers)))
    return found


def count_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes laid end to end."""
    return -(-count * bits // 8)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as one stream of bits without padding: uint8 ``(ceil(numel * bits / 8),)``."""
    return pack_codes(codes.reshape(-1), bits).view(torch.uint8)[: count_bytes(codes.numel(), bits)].clone()


def unpack_bytes(stream: Tensor, bits: int, count: int) -> Tensor:
    """Undoes ``pack_bytes``: uint8 ``(count,)``."""
    padded = torch.nn.functional.pad(stream, (0, -len(stream) % 4))
    return unpack_codes(padded.view(torch.int32), bits, count)


def _byte_range(rows: slice, columns: int, bits: int) -> slice:
    """Where rows of packed codes are; past the end is the end."""
    return slice(count_bytes(rows.start * columns, bits), count_bytes(rows.stop * columns, bits))


def _stem(spec: LayerSpec) -> str:
    return f"{spec.parameter}.{spec.index}" if spec.kind == "expert" else spec.name


def _read_spec(name: str, entry: Any) -> LayerSpec:
    where = f"quantization_config.layers.{name}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: wanted a mapping, got {entry!r}")
    shape = read_setting(entry, "shape", list, where)
    kind = read_setting(entry, "kind", str, where)
    index = read_setting(entry, "index", int, where) if kind == "expert" else None
    dtype = DTYPES.get(read_setting(entry, "dtype", str, where))
    whole = len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or dtype is None or kind not in KINDS:
        raise UserError(f"{where}: shape {shape}, dtype {entry['dtype']!r}, kind {kind!r} describe no layer")
    tied = read_setting(entry, "tied", list, where) if "tied" in entry else []
    parameter = read_setting(entry, "parameter", str, where)
    return LayerSpec(name, (shape[0], shape[1]), dtype, kind, parameter, index, tuple(map(str, tied)))


def _read_rule(entry: Mapping[str, Any], where: str) -> ActivationRule | None:
    if "activations" not in entry:
        return None
    rule = read_setting(entry, "activations", dict, where)
    bits, groups = (read_setting(rule, key, int, f"{where}.activations") for key in ("bits", "groups"))
    threshold = rule.get("threshold")
    if not isinstance(threshold, float | int) or not 0 <= threshold < float("inf") or bits != 8 or groups < 1:
        raise UserError(f"{where}.activations: {rule} is not a rule that this compress knows")
    return ActivationRule(bits, float(threshold), groups)


def _read_quant(spec: LayerSpec, config: Mapping[str, Any]) -> QuantSpec:
    where = f"quantization_config.layers.{spec.name}"
    entry = read_setting(config, "layers", dict, "quantization_config").get(spec.name)
    if not isinstance(entry, dict):
        raise UserError(f"{where}: missing")
    quant = QuantSpec(
        read_setting(entry, "bits", int, where),
        read_setting(entry, "group_size", int, where),
        read_setting(entry, "symmetric", bool, where),
        bool(entry.get("float_zero", False)),
        _read_rule(entry, where),
    )
    reason = (
        carries(spec, quant, "") if quant.group_size == -1 or quant.group_size > 0 else "group_size is not positive"
    )
    if reason is not None:
        raise UserError(f"{where}: {reason}")
    return quant
