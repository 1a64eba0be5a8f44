"""int8 activations times int8 weights, outlier features in high precision (LLM.int8(), arXiv:2208.07339).

- ``compress::quantize_rows(Tensor x, float threshold, Tensor? outlier_index) -> (Tensor q, Tensor scale,
  Tensor outliers)``: rows of x ``(T, I)`` as int8 ``(T, 4 ceil(I / 4))``, ``scale = max |x| / 127`` float32 ``(T,)``,
  over the features that aren't outliers; outliers uint8 ``(I,)``: 1 where some token has ``|x| >= threshold``
  (threshold 0: none) and for the features of ``outlier_index``. q is 0 there.
- ``compress::int8_matmul(Tensor q, Tensor row_scale, Tensor codes, Tensor scale, Tensor sums, Tensor? bias, Tensor? x,
  Tensor? outliers, Tensor? outlier_index, Tensor? outlier_weight, int out_features, ScalarType dtype) -> Tensor``:
  ``y[t, o] = row_scale[t] scale[o] sum_i q[t, i] codes[o, i] + sum over outliers i of x[t, i] w[o, i] + bias[o]``. The
  weight of an outlier feature is its row in ``outlier_weight`` if ``outlier_index`` has it, else ``scale * codes``.
  Integer sums are exact. Without outliers: plain vector-wise int8.
- ``compress::int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor sums, Tensor? bias, float threshold,
  Tensor? outlier_index, Tensor? outlier_weight, int out_features) -> Tensor``: both in one call, the same to the bit;
  x ``(..., I)``, y ``(..., O)`` of x's dtype.

x float32, bfloat16 or float16; codes int8 ``(P, K, 16, 4)``, scale float32 ``(16 P,)`` and sums int32 ``(16 P,)`` as in
``numerics.int8_panels``; bias ``(O,)`` of a float dtype; outlier_index int64 ``(n,)`` ascending, outlier_weight
``(n, 16 P)`` float32, bfloat16 or float16. Shapes depend on shapes only, so the ops compile into one graph.
A row of x that holds NaN or infinity is a ValueError with its number, as is whatever doesn't fit, before memory is
touched. There is no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import library
from compress.kernels.int8_check import check_activations, check_linear, check_matmul
from compress.numerics.int8_panels import GROUP, quantize_rowwise, unpack_int8_codes

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # Type in cpu/kernels.h

_LIBRARY = torch.library.Library("compress", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    "quantize_rows(Tensor x, float threshold, Tensor? outlier_index=None) -> (Tensor, Tensor, Tensor)", tags=_TAGS
)
_LIBRARY.define(
    "int8_matmul(Tensor q, Tensor row_scale, Tensor codes, Tensor scale, Tensor sums, Tensor? bias, Tensor? x, "
    "Tensor? outliers, Tensor? outlier_index, Tensor? outlier_weight, int out_features, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor sums, Tensor? bias, float threshold, "
    "Tensor? outlier_index, Tensor? outlier_weight, int out_features) -> Tensor",
    tags=_TAGS,
)


def quantize_rows(x: Tensor, threshold: float, outlier_index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The op; see the top of this file."""
    q, scale, outliers = _QUANTIZE(x, threshold, outlier_index)
    return q, scale, outliers


def int8_matmul(
    q: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    outliers: Tensor | None,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The op; see the top of this file."""
    y: Tensor = _MATMUL(
        q, row_scale, codes, scale, sums, bias, x, outliers, outlier_index, outlier_weight, out_features, dtype
    )
    return y


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    threshold: float,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
) -> Tensor:
    """The op; see the top of this file."""
    y: Tensor = _LINEAR(x, codes, scale, sums, bias, threshold, outlier_index, outlier_weight, out_features)
    return y


# -- reference bodies: plain PyTorch, any device ----------------------------------------------------------------------


def reference_quantize(
    x: Tensor, threshold: float, outlier_index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_activations("quantize_rows", x, threshold, outlier_index)
    values = x.float()
    finite = values.isfinite().all(1)
    if not bool(finite.all()):
        _refuse_row("quantize_rows", int((~finite).nonzero()[0]))
    large = (values.abs() >= threshold).any(0) if threshold > 0 else values.new_zeros(values.shape[1], dtype=torch.bool)
    if outlier_index is not None:
        _check_index("quantize_rows", outlier_index, values.shape[1])
        large[outlier_index] = True
    q, scale = quantize_rowwise(values.masked_fill(large, 0.0))
    return torch.nn.functional.pad(q, (0, -x.shape[1] % GROUP)), scale, large.to(torch.uint8)


def reference_matmul(
    q: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    outliers: Tensor | None,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_matmul(
        q, row_scale, codes, scale, sums, bias, x, outliers, outlier_index, outlier_weight, out_features, dtype
    )
    matrix = unpack_int8_codes(codes, out_features, q.shape[1])
    if q.shape[0] == 0:
        return q.new_empty((0, out_features), dtype=dtype)
    exact = q.double() @ matrix.double().t()  # integers below 2^53: exact
    y = (row_scale.unsqueeze(1) * scale[:out_features]) * exact.float()
    if outlier_index is not None:
        _check_index("int8_matmul", outlier_index, q.shape[1] if x is None else x.shape[1])
    if x is not None and outliers is not None:
        weight = matrix[:, : x.shape[1]].float() * scale[:out_features].unsqueeze(1)
        if outlier_index is not None and outlier_weight is not None:
            weight[:, outlier_index] = outlier_weight[:, :out_features].t().float()
        found = outliers != 0
        with torch.autocast(x.device.type, enabled=False):
            y = y + x[:, found].float() @ weight[:, found].t()
    return (y if bias is None else y + bias.float()).to(dtype)


def reference_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    threshold: float,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
) -> Tensor:
    check_linear(x, codes, scale, sums, bias, threshold, outlier_index, outlier_weight, out_features)
    rows = x.reshape(-1, x.shape[-1])
    q, row_scale, outliers = reference_quantize(rows, threshold, outlier_index)
    parts = (rows, outliers, outlier_index, outlier_weight)
    y = reference_matmul(q, row_scale, codes, scale, sums, bias, *parts, out_features, x.dtype)
    return y.view(*x.shape[:-1], out_features)


def _check_index(op: str, index: Tensor, columns: int) -> None:
    values = index.tolist()
    if any(not 0 <= value < columns for value in values) or values != sorted(set(values)):
        raise ValueError(f"{op}: outlier_index must ascend within 0..{columns - 1}, got {values[:20]}")


def _refuse_row(op: str, row: int) -> None:
    raise ValueError(f"{op}: row {row} of x holds NaN or infinity; int8 can't carry them: look for where they arise")


# -- CPU kernels ------------------------------------------------------------------------------------------------------


def _quantize_cpu(x: Tensor, threshold: float, outlier_index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    native = library.active()
    if native is None:
        return reference_quantize(x, threshold, outlier_index)
    check_activations("quantize_rows", x, threshold, outlier_index)
    tokens, columns = x.shape
    q, scale, outliers = _fake_quantize(x, threshold, outlier_index)
    if tokens == 0:
        return reference_quantize(x, threshold, outlier_index)
    x = _make_rows(x, columns)
    row = native.quantize_rows(
        x.data_ptr(), TYPES[x.dtype], x.stride(0), tokens, columns, threshold, *_index_of(outlier_index),
        q.data_ptr(), scale.data_ptr(), outliers.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if row >= 0:
        _refuse_row("quantize_rows", row)
    return q, scale, outliers


def _matmul_cpu(
    q: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    outliers: Tensor | None,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    native = library.active()
    parts = (q, row_scale, codes, scale, sums, bias, x, outliers, outlier_index, outlier_weight, out_features, dtype)
    if native is None:
        return reference_matmul(*parts)
    check_matmul(*parts)
    tokens = q.shape[0]
    y = q.new_empty((tokens, out_features), dtype=dtype)
    if tokens == 0:
        return y
    columns, source = q.shape[1], (0, 0, 0, 0)
    if x is not None and outliers is not None:
        columns = x.shape[1]
        x = _make_rows(x, columns)
        source = (x.data_ptr(), TYPES[x.dtype], x.stride(0), outliers.data_ptr())
    native.int8_matmul(
        codes.data_ptr(), scale.data_ptr(), sums.data_ptr(), out_features, columns, q.data_ptr(), row_scale.data_ptr(),
        tokens, *source, *_index_of(outlier_index), *_value_of(outlier_weight), *_value_of(bias), y.data_ptr(),
        TYPES[dtype], out_features, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _linear_cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    threshold: float,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
) -> Tensor:
    native = library.active()
    if native is None:
        return reference_linear(x, codes, scale, sums, bias, threshold, outlier_index, outlier_weight, out_features)
    check_linear(x, codes, scale, sums, bias, threshold, outlier_index, outlier_weight, out_features)
    columns, kind = x.shape[-1], TYPES[x.dtype]
    y = x.new_empty((*x.shape[:-1], out_features))
    tokens = y.numel() // out_features
    if tokens == 0:
        return y
    rows = x if x.is_contiguous() else _make_rows(x, columns)
    stride = rows.stride(0) if rows.dim() == 2 else columns
    row = native.int8_linear(
        codes.data_ptr(), scale.data_ptr(), sums.data_ptr(), out_features, columns, rows.data_ptr(), kind, stride,
        tokens, threshold, *_index_of(outlier_index), *_value_of(outlier_weight), *_value_of(bias), y.data_ptr(), kind,
        out_features, torch.get_num_threads(),
    )  # fmt: skip
    if row >= 0:
        _refuse_row("int8_linear", row)
    return y


def _make_rows(x: Tensor, columns: int) -> Tensor:
    """``(T, I)`` with neighbouring inputs side by side: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, columns)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= columns else rows.contiguous()


def _index_of(index: Tensor | None) -> tuple[int, int]:
    return (0, 0) if index is None else (index.data_ptr(), index.shape[0])


def _value_of(values: Tensor | None) -> tuple[int, int]:
    return (0, 0) if values is None else (values.data_ptr(), TYPES[values.dtype])


# -- shapes alone, other devices, registration ------------------------------------------------------------------------


def _fake_quantize(x: Tensor, threshold: float, outlier_index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    check_activations("quantize_rows", x, threshold, outlier_index)
    tokens, columns = x.shape
    return (
        x.new_empty((tokens, -(-columns // GROUP) * GROUP), dtype=torch.int8),
        x.new_empty((tokens,), dtype=torch.float32),
        x.new_empty((columns,), dtype=torch.uint8),
    )


def _fake_matmul(q: Tensor, *parts: Any) -> Tensor:
    check_matmul(q, *parts)
    return q.new_empty((q.shape[0], parts[-2]), dtype=parts[-1])


def _fake_linear(x: Tensor, *parts: Any) -> Tensor:
    check_linear(x, *parts)
    return x.new_empty((*x.shape[:-1], parts[-1]))


def _register(name: str, on_cpu: Any, reference: Any, fake: Any) -> Any:
    def elsewhere(first: Tensor, *parts: Any) -> Any:
        if library.get_mode() == "require":
            raise library.KernelMissing(f"kernels are required, but {name} has none for {first.device.type}")
        return reference(first, *parts)

    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compress::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.compress, name).default


_QUANTIZE = _register("quantize_rows", _quantize_cpu, reference_quantize, _fake_quantize)
_MATMUL = _register("int8_matmul", _matmul_cpu, reference_matmul, _fake_matmul)
_LINEAR = _register("int8_linear", _linear_cpu, reference_linear, _fake_linear)
