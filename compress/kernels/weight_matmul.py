"""``compress::weight_matmul``: activations times a weight-only quantized layer, ``y = x W^T + bias``.

Schema: ``(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size,
int out_features) -> Tensor``. Letters: O out features, I in features, T tokens, G groups per row, P = ceil(O / 16).

- x ``(..., I)`` float32, bfloat16 or float16; y ``(..., O)`` in the same dtype.
- codes int32 ``(P, I bits / 32, 16)``, scale ``(P, G, 16)`` float, zero None, uint8 or of the scale's dtype: the layout
  of ``numerics.panels``. I and group_size are multiples of 32. They must be contiguous.
- bias ``(O)``, float32 or of x's dtype, contiguous; or None.

Few tokens are a matter of reading the codes: one pass over them, sums in float32. For many tokens the weight is decoded
on the way: rounded to bfloat16 and multiplied in registers if x is bfloat16 and the processor multiplies pairs of them,
else slice by slice (float32 unless x is bfloat16) for PyTorch's own product.
Everything is checked before memory is touched: ValueError says what was got and wanted. There is no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import library
from compress.numerics.panels import BITS, LANES, RUN, SCALE_DTYPES, Panels, count_panels, dequantize_panels

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}  # Type in cpu/kernels.h
SLICE_BYTES = 1 << 22  # decoded weight that is there at a time: stays in the caches between decoding and product

_LIBRARY = torch.library.Library("compress", "FRAGMENT")
_LIBRARY.define(
    "weight_matmul(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "int out_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def weight_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op; see the top of this file."""
    y: Tensor = _OP(x, codes, scale, zero, bias, bits, group_size, out_features)
    return y


def check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> None:
    """Raises ValueError for what the contract doesn't allow; looks at no data."""
    if bits not in BITS:
        raise ValueError(f"weight_matmul: bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    if codes.dtype is not torch.int32 or codes.dim() != 3 or codes.shape[1] % bits or codes.shape[2] != LANES:
        raise ValueError(
            f"weight_matmul: codes must be int32 (P, I * {bits} / 32, {LANES}) with I a multiple of {RUN}, "
            f"got {_tell(codes)}"
        )
    panels, words, _ = codes.shape
    columns = words // bits * RUN
    if out_features < 1 or count_panels(out_features) != panels:
        raise ValueError(f"weight_matmul: {panels} panels of {LANES} rows do not make {out_features} out features")
    if group_size < RUN or group_size % RUN or columns % group_size:
        raise ValueError(
            f"weight_matmul: group_size must be a multiple of {RUN} that divides {columns} in features, "
            f"got {group_size}"
        )
    if x.dtype not in SCALE_DTYPES or x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"weight_matmul: x must be float32, bfloat16 or float16 (..., {columns}), got {_tell(x)}")
    wanted = (panels, columns // group_size, LANES)
    if scale.dtype not in SCALE_DTYPES or scale.shape != wanted:
        raise ValueError(f"weight_matmul: scale must be float32, bfloat16 or float16 {wanted}, got {_tell(scale)}")
    if zero is not None and ((zero.dtype is not torch.uint8 and zero.dtype != scale.dtype) or zero.shape != wanted):
        raise ValueError(f"weight_matmul: zero must be uint8 or {scale.dtype} {wanted}, got {_tell(zero)}")
    if bias is not None and (
        (bias.dtype is not torch.float32 and bias.dtype != x.dtype) or bias.shape != (out_features,)
    ):
        raise ValueError(f"weight_matmul: bias must be float32 or {x.dtype} ({out_features},), got {_tell(bias)}")
    if not (
        codes.is_contiguous()
        and scale.is_contiguous()
        and (zero is None or zero.is_contiguous())
        and (bias is None or bias.is_contiguous())
    ):
        raise ValueError(_name_strided(codes, scale, zero, bias))


def _tell(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _name_strided(codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> str:
    parts = {"codes": codes, "scale": scale, "zero": zero, "bias": bias}
    wrong = ", ".join(
        f"{name} has strides {part.stride()}"
        for name, part in parts.items()
        if part is not None and not part.is_contiguous()
    )
    return f"weight_matmul: weights must be contiguous; {wrong}; call .contiguous()"


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"weight_matmul: all tensors must be on one device, got {tensor.device} beside {x.device}")


def _check_addresses(*tensors: Tensor | None) -> None:
    """On a CPU: every tensor lies where its dtype may (the native code checks for itself)."""
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % tensor.element_size():
            raise ValueError(
                f"weight_matmul: {_tell(tensor)} is misaligned: its address {tensor.data_ptr()} is not a multiple of "
                f"{tensor.element_size()}; call .clone()"
            )


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """Plain PyTorch on any device: weight and sums in float32, rounded to x's dtype at the end."""
    check(x, codes, scale, zero, bias, bits, group_size, out_features)
    _check_devices(x, codes, scale, zero, bias)
    if x.is_cpu:
        _check_addresses(x, codes, scale, zero, bias)
    shape = (out_features, codes.shape[1] // bits * RUN)
    weight = dequantize_panels(Panels(codes, scale, zero, bits, group_size, shape))
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def _on_cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    native = library.active()
    if native is None:
        return reference(x, codes, scale, zero, bias, bits, group_size, out_features)
    check(x, codes, scale, zero, bias, bits, group_size, out_features)
    columns = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    tokens = y.numel() // out_features
    if tokens == 0:
        return y
    if not (x.is_cpu and codes.is_cpu and scale.is_cpu):
        _check_devices(x, codes, scale)
    if not x.is_contiguous():
        x = _make_rows(x, columns)
    kind = TYPES[x.dtype]
    stride = columns if x.dim() != 2 else x.stride(0)
    layer = (codes.data_ptr(), scale.data_ptr(), TYPES[scale.dtype], *_locate(zero))
    size = (out_features, columns, group_size, bits)
    threads = torch.get_num_threads()
    if tokens > native.FEW_TOKENS:
        x, stride = (x if x.is_contiguous() else x.contiguous()), columns
        if kind != 2 or not native.multiplies_pairs():
            y2 = y.view(tokens, out_features)
            _check_addresses(x, bias)
            _multiply_slices(native, x.view(tokens, columns), (*layer, *size), bias, y2, threads)
            return y
    place = (x.data_ptr(), kind, stride, tokens, y.data_ptr(), kind, out_features)
    native.weight_matmul(*layer, *_locate(bias), *size, *place, threads)
    return y


def _locate(tensor: Tensor | None) -> tuple[int, int]:
    """Address and type of a tensor that may be absent: zeros then, and so never those of one on another device."""
    if tensor is None:
        return 0, 0
    if not tensor.is_cpu:
        raise ValueError(f"weight_matmul: all tensors must be on one device, got {tensor.device} beside cpu")
    return tensor.data_ptr(), TYPES[tensor.dtype]


def _make_rows(x: Tensor, columns: int) -> Tensor:
    """``(T, I)`` with neighbouring inputs side by side: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, columns)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= columns else rows.contiguous()


def _multiply_slices(
    native: Any, x: Tensor, layer: tuple[int, ...], bias: Tensor | None, y: Tensor, threads: int
) -> None:
    """Decode a slice of the weight, multiply by it, next: y ``(T, O)`` is filled."""
    rows, columns = y.shape[1], x.shape[1]
    dtype = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
    panels = count_panels(rows)
    step = max(1, min(panels, SLICE_BYTES // (LANES * columns * dtype.itemsize)))
    buffer = torch.empty((step * LANES, columns), dtype=dtype)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    for first in range(0, panels, step):
        last = min(first + step, panels)
        native.weight_rows(*layer, buffer.data_ptr(), TYPES[dtype], first, last, threads)
        begin, end = first * LANES, min(last * LANES, rows)
        part = None if bias is None else bias[begin:end]
        with torch.autocast("cpu", enabled=False):
            y[:, begin:end] = torch.nn.functional.linear(x, buffer[: end - begin], part)


def _elsewhere(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """Devices that have no kernel yet."""
    if library.get_mode() == "require":
        raise library.KernelMissing(f"kernels are required, but weight_matmul has none for {x.device.type}")
    return reference(x, codes, scale, zero, bias, bits, group_size, out_features)


def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    check(x, codes, scale, zero, bias, bits, group_size, out_features)
    _check_devices(x, codes, scale, zero, bias)
    return x.new_empty((*x.shape[:-1], out_features))


_LIBRARY.impl("weight_matmul", _on_cpu, "CPU")
_LIBRARY.impl("weight_matmul", _elsewhere, "CompositeExplicitAutograd")
torch.library.register_fake("compress::weight_matmul", _fake, lib=_LIBRARY)
_OP = torch.ops.compress.weight_matmul.default
