"""GPTQ, the layout of AutoGPTQ and GPTQModel: what stock Transformers loads with ``optimum`` and ``gptqmodel``.

Tensors of a layer ``<name>``, transposed: ``qweight`` int32 ``(I * bits / 32, O)``, codes packed along I; ``qzeros``
int32 ``(G, O * bits / 32)``, packed along O; ``scales`` float16 ``(G, O)``; ``g_idx`` int32 ``(I,)``, the group of each
input, always ``i // group_size`` here (``desc_act: false``). Three bits run across word borders.

Two variants: ``gptq`` (v1) stores ``zero - 1``, which has no code for zero 0; ``gptq_v2`` stores ``zero``. Symmetric
models are written as v1, which every reader knows, asymmetric ones as v2; ``checkpoint_format`` says which.

GPTQModel 7.7 on a CPU keeps scales in float16 whatever the model's dtype, and rounds ``scale * (code - zero)`` to
float16 before the model's dtype: weights differ from a single rounding by one float16 step at most. Its CPU kernel
for 4 bits refuses one group per row unless the row has 32, 64, 128 or 256 inputs (its GPU kernels take any).
"""

from __future__ import annotations

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
    refuse_activations,
    refuse_head,
    refuse_indivisible,
    store_exactly,
    take,
)
from compress.types import LayerSpec, LayerState

NAME = "gptq"
PREFIX = "model"
LOADS_WITH: tuple[str, ...] = ("optimum", "gptqmodel")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel's kernels take, beside -1
# Where optimum looks for the blocks; it knows no others.
BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """float16, always: the layout knows no other."""
    return torch.float16


def carries(spec: LayerSpec, quant: QuantSpec | None, arch: str) -> str | None:
    """2, 3, 4 and 8 bits with integer zeros; sizes that are multiples of 32."""
    if quant is None:
        return None
    if spec.kind in ("embedding", "head"):
        return refuse_head(spec, NAME)
    if quant.activations is not None:
        return refuse_activations(quant, NAME)
    if spec.kind != "linear":
        what = "Conv1D layers (GPTQModel's kernels do not load in GPT-2)" if spec.kind == "conv1d" else "fused experts"
        return f"gptq carries nn.Linear only, not {what}; format native carries them"
    if quant.bits not in BITS:
        return f"gptq carries {', '.join(map(str, BITS))} bits, got {quant.bits}"
    if quant.float_zero:
        return "gptq has integer zero points only; format native carries float zeros"
    if quant.group_size not in (-1, *GROUP_SIZES):
        return f"gptq knows the group sizes -1, {', '.join(map(str, GROUP_SIZES))}, got {quant.group_size}"
    if spec.shape[0] % 32 or spec.shape[1] % 32:
        return f"gptq packs 32 codes together, and {spec.shape[0]} x {spec.shape[1]} are not both multiples of 32"
    if _find_block(spec.name) is None:
        return f"gptq is loaded by optimum, which knows blocks under {', '.join(BLOCKS)} only"
    return refuse_indivisible(spec, quant)


def conflict(layers: Layers, untouched: Sequence[LayerSpec]) -> str | None:
    """A stock load knows one width, group size and symmetry for the whole model."""
    schemes = {quant: spec.name for spec, quant in layers}
    if len(schemes) < 2:
        return None
    (first, one), (second, two), *_ = schemes.items()
    return (
        f"gptq holds one scheme per model, but {one} has {describe(first)} and {two} has {describe(second)}; "
        "use format compressed-tensors or native"
    )


def encode(spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer; a layer without a grid is written as its plain weight."""
    if state.grid is None or state.codes is None:
        return {spec.parameter: state.weight.to(model_dtype).contiguous()}
    grid = state.grid
    assert not grid.float_zero, f"{spec.name}: float zeros need format native"
    if grid.symmetric:
        assert bool((grid.zero == 2 ** (grid.bits - 1)).all()), f"{spec.name}: a symmetric zero is 2**(bits - 1)"
    zero = store_exactly(spec, grid.zero, torch.uint8, "zero") - int(grid.symmetric)
    return {
        f"{spec.name}.qweight": pack_codes(state.codes.t(), grid.bits, dim=0),
        f"{spec.name}.qzeros": pack_codes(zero.t(), grid.bits),
        f"{spec.name}.scales": store_exactly(spec, grid.scale.t(), torch.float16, "scale"),
        f"{spec.name}.g_idx": torch.arange(spec.shape[1], dtype=torch.int32) // grid.group_size,
    }


def decode(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """``(O, I)`` float32. Raises UserError where configuration and tensors contradict each other."""
    return unpack(spec, tensors, config).dequantize()


def unpack(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedWeight:
    """Codes, scales and zeros; inputs stay where they are, with act-order too. Same errors as ``decode``."""
    quant, stored_minus_one = _read_scheme(config)
    rows, columns = spec.shape
    group_size = quant.inputs_per_group(spec)
    groups = quant.groups(spec)
    words = take(spec, tensors, f"{spec.name}.qweight", torch.int32, (packed_length(columns, quant.bits), rows))
    codes = unpack_codes(words, quant.bits, columns, dim=0).t().contiguous()
    words = take(spec, tensors, f"{spec.name}.qzeros", torch.int32, (groups, packed_length(rows, quant.bits)))
    zero = unpack_codes(words, quant.bits, rows).t() + stored_minus_one
    scale = take(spec, tensors, f"{spec.name}.scales", None, (groups, rows)).t()
    found = _read_groups(spec, tensors, groups, group_size)
    symmetric = bool((zero == 2 ** (quant.bits - 1)).all())
    return CodedWeight(codes, scale, None if symmetric else zero, quant.bits, group_size, found)


def nbytes(spec: LayerSpec, quant: QuantSpec | None) -> int:
    """Bytes of the tensors of one layer."""
    if quant is None:
        return spec.numel * spec.dtype.itemsize
    rows, columns = spec.shape
    groups = quant.groups(spec)
    words = packed_length(columns, quant.bits) * rows + groups * packed_length(rows, quant.bits) + columns
    return 4 * words + 2 * groups * rows


def quantization_config(layers: Layers, untouched: Sequence[LayerSpec]) -> dict[str, Any] | None:
    """The scheme; layers left alone are named both ways that readers know (optimum's and GPTQModel's)."""
    reason = conflict(layers, untouched)
    if reason is not None:
        raise UserError(reason)
    if not layers:
        return None
    quant = layers[0][1]
    variant = "gptq" if quant.symmetric else "gptq_v2"
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": quant.bits,
        "group_size": quant.group_size,
        "sym": quant.symmetric,
        "desc_act": False,
        "checkpoint_format": variant,
        "format": variant,
        "pack_dtype": "int32",
        "lm_head": False,
        "true_sequential": True,
        "block_name_to_quantize": _find_block(layers[0][0].name),
    }
    inside = [spec for spec in untouched if _find_block(spec.name) is not None]
    if inside:
        config["modules_in_block_to_quantize"] = [[spec.name for spec, _ in layers]]
        config["dynamic"] = {f"-:^{spec.name.replace('.', chr(92) + '.')}$": {} for spec in inside}
    return config


def list_layers(
    headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[tuple[LayerSpec, tuple[str, ...]]]:
    """Every encoded layer and the tensors that make it. Conv1D layers can't be told from linear ones here."""
    found = []
    for tensor, header in headers.items():
        name, _, leaf = tensor.rpartition(".")
        if leaf != "qweight" or len(header.shape) != 2:
            continue
        order = headers.get(f"{name}.g_idx")
        columns = order.shape[0] if order is not None else header.shape[0] * 32 // _read_scheme(config)[0].bits
        spec = LayerSpec(name, (header.shape[1], columns), torch.float16, "linear", f"{name}.weight")
        leaves = ("qweight", "qzeros", "scales", "g_idx")
        found.append((spec, tuple(f"{name}.{one}" for one in leaves if f"{name}.{one}" in headers)))
    return found


def _read_scheme(config: Mapping[str, Any]) -> tuple[QuantSpec, int]:
    """The scheme, and 1 if zeros are stored minus one."""
    where = "quantization_config"
    bits = read_setting(config, "bits", int, where)
    size = read_setting(config, "group_size", int, where)
    variant = config.get("checkpoint_format", config.get("format", "gptq"))
    if bits not in BITS or (size < 1 and size != -1) or variant not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: bits {bits}, group_size {size}, checkpoint_format {variant!r} is no gptq we know")
    return QuantSpec(bits, size, read_setting(config, "sym", bool, where)), int(variant == "gptq")


def _read_groups(spec: LayerSpec, tensors: Mapping[str, Tensor], groups: int, group_size: int) -> Tensor | None:
    """The group of each input as other people's act-order has it; None for ``i // group_size`` or without ``g_idx``."""
    name = f"{spec.name}.g_idx"
    if name not in tensors:
        return None
    found = take(spec, tensors, name, torch.int32, (spec.shape[1],)).long()
    if bool((found < 0).any()) or bool((found >= groups).any()):
        raise UserError(f"{name}: group numbers outside 0 to {groups - 1}")
    return None if torch.equal(found, torch.arange(spec.shape[1]) // group_size) else found


def _find_block(name: str) -> str | None:
    return next((block for block in BLOCKS if name.startswith(block + ".")), None)
