"""What the contracts of the int8 ops allow: ValueError says what was got and wanted. Looks at no data."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.int8_panels import GROUP, LANES, MAX_COLUMNS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = "float32, bfloat16 or float16"


def tell(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{strides}"


def check_activations(op: str, x: Tensor, threshold: float, outlier_index: Tensor | None) -> None:
    """Of ``quantize_rows``."""
    if x.dtype not in FLOATS or x.dim() != 2 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"{op}: x must be {_NAMES} (T, I) with 1 <= I <= {MAX_COLUMNS}, got {tell(x)}")
    _check_threshold(op, threshold)
    if outlier_index is not None:
        _check_index_type(op, outlier_index)


def check_matmul(
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
) -> None:
    """Of ``int8_matmul``."""
    op = "int8_matmul"
    width = _check_weight(op, codes, scale, sums, bias, out_features)
    if q.dtype is not torch.int8 or q.dim() != 2 or q.shape[1] != width or not q.is_contiguous():
        raise ValueError(f"{op}: q must be contiguous int8 (T, {width}), got {tell(q)}")
    tokens = q.shape[0]
    if row_scale.dtype is not torch.float32 or row_scale.shape != (tokens,) or not row_scale.is_contiguous():
        raise ValueError(f"{op}: row_scale must be contiguous float32 ({tokens},), got {tell(row_scale)}")
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype must be {_NAMES}, got {dtype}")
    if (x is None) != (outliers is None):
        raise ValueError(f"{op}: x and outliers belong together, got only {'outliers' if x is None else 'x'}")
    if x is not None and outliers is not None:
        if x.dtype not in FLOATS or x.dim() != 2 or x.shape[0] != tokens or not width - GROUP < x.shape[1] <= width:
            raise ValueError(
                f"{op}: x must be {_NAMES} ({tokens}, I) with I in {width - GROUP + 1}..{width}, got {tell(x)}"
            )
        if outliers.dtype is not torch.uint8 or outliers.shape != (x.shape[1],) or not outliers.is_contiguous():
            raise ValueError(f"{op}: outliers must be contiguous uint8 ({x.shape[1]},), got {tell(outliers)}")
    _check_outlier_weight(op, outlier_index, outlier_weight, codes.shape[0])


def check_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    threshold: float,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    out_features: int,
) -> None:
    """Of ``int8_linear``."""
    op = "int8_linear"
    width = _check_weight(op, codes, scale, sums, bias, out_features)
    if x.dtype not in FLOATS or x.dim() < 1 or not width - GROUP < x.shape[-1] <= width:
        raise ValueError(f"{op}: x must be {_NAMES} (..., I) with I in {width - GROUP + 1}..{width}, got {tell(x)}")
    _check_threshold(op, threshold)
    _check_outlier_weight(op, outlier_index, outlier_weight, codes.shape[0])


def _check_weight(op: str, codes: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, out_features: int) -> int:
    """Returns ``4 K``."""
    if codes.dtype is not torch.int8 or codes.dim() != 4 or codes.shape[2:] != (LANES, GROUP):
        raise ValueError(f"{op}: codes must be int8 (P, K, {LANES}, {GROUP}), got {tell(codes)}")
    panels, groups = codes.shape[:2]
    if not codes.is_contiguous():
        raise ValueError(f"{op}: codes must be contiguous, got {tell(codes)}; call .contiguous()")
    if out_features < 1 or -(-out_features // LANES) != panels:
        raise ValueError(f"{op}: {panels} panels of {LANES} rows do not make {out_features} out features")
    if not 1 <= groups * GROUP <= MAX_COLUMNS:
        raise ValueError(f"{op}: int32 sums hold 1..{MAX_COLUMNS} in features, got {groups * GROUP}")
    rows = panels * LANES
    if scale.dtype is not torch.float32 or scale.shape != (rows,) or not scale.is_contiguous():
        raise ValueError(f"{op}: scale must be contiguous float32 ({rows},), got {tell(scale)}")
    if sums.dtype is not torch.int32 or sums.shape != (rows,) or not sums.is_contiguous():
        raise ValueError(f"{op}: sums must be contiguous int32 ({rows},), got {tell(sums)}")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (out_features,) or not bias.is_contiguous()):
        raise ValueError(f"{op}: bias must be contiguous {_NAMES} ({out_features},), got {tell(bias)}")
    return groups * GROUP


def _check_threshold(op: str, threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"{op}: threshold must be 0 (no outliers) or positive, got {threshold}")


def _check_index_type(op: str, index: Tensor) -> None:
    if index.dtype is not torch.int64 or index.dim() != 1 or not index.is_contiguous():
        raise ValueError(f"{op}: outlier_index must be contiguous int64 (n,), got {tell(index)}")


def _check_outlier_weight(op: str, index: Tensor | None, weight: Tensor | None, panels: int) -> None:
    if index is None and weight is None:
        return
    if index is None or weight is None:
        given = "outlier_weight" if index is None else "outlier_index"
        raise ValueError(f"{op}: outlier_index and outlier_weight belong together, got only {given}")
    _check_index_type(op, index)
    wanted = (index.shape[0], panels * LANES)
    if weight.dtype not in FLOATS or weight.shape != wanted or not weight.is_contiguous():
        raise ValueError(f"{op}: outlier_weight must be contiguous {_NAMES} {wanted}, got {tell(weight)}")
