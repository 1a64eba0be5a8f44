"""int8 weights as the kernels want them: panels of 16 out features, four neighbouring inputs in a 32-bit lane.

``codes`` int8 ``(P, K, 16, 4)``, ``P = ceil(O / 16)``, ``K = ceil(I / 4)``: ``codes[p, k, r, j]`` is the code of out
feature ``16 p + r`` and in feature ``4 k + j``; 0 beyond either end. Example, ``O = 1``, ``I = 6``: the codes
1 2 3 4 5 6 are ``codes[0, 0, 0] = 1 2 3 4`` and ``codes[0, 1, 0] = 5 6 0 0``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16  # rows of a panel
GROUP = 4  # inputs of a lane
LARGEST = 127
MAX_COLUMNS = 132104  # in features whose products of codes, 127 * 128 at most, fit an int32 sum


@dataclass(frozen=True)
class Int8Panels:
    """``w[o, i] = scale[o] * code[o, i]``, ``(O, I)`` in kernel layout."""

    codes: Tensor  # int8 (P, K, 16, 4)
    scale: Tensor  # float32 (16 P,), 0 beyond O
    sums: Tensor  # int32 (16 P,): the sum of a row's codes
    shape: tuple[int, int]  # (O, I)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + self.scale.nbytes + self.sums.nbytes


def pack_int8_panels(codes: Tensor, scale: Tensor) -> Int8Panels:
    """Codes int8 ``(O, I)`` in -127..127 and scale ``(O,)`` -> panels. ValueError if they are not that."""
    if codes.dtype is not torch.int8 or codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes must be int8 (O, I), got {str(codes.dtype)[6:]} {tuple(codes.shape)}")
    rows, columns = codes.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"int32 sums hold {MAX_COLUMNS} in features at most, got {columns}")
    if tuple(scale.shape) != (rows,):
        raise ValueError(f"scale must be ({rows},), one per out feature, got {tuple(scale.shape)}")
    if int(codes.min()) < -LARGEST:
        raise ValueError(f"codes must be in -{LARGEST}..{LARGEST}, got {int(codes.min())}")
    padded = pad(codes, (0, -columns % GROUP, 0, -rows % LANES))
    panels = padded.view(-1, LANES, padded.shape[1] // GROUP, GROUP).transpose(1, 2).contiguous()
    return Int8Panels(panels, pad_rows(scale.float()), padded.sum(1, dtype=torch.int32), (rows, columns))


def unpack_int8_codes(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Panels ``(P, K, 16, 4)`` -> codes ``(O, I)``: undoes ``pack_int8_panels``."""
    count, groups, _, _ = codes.shape
    return codes.transpose(1, 2).reshape(count * LANES, groups * GROUP)[:rows, :columns].contiguous()


def unpack_int8_panels(panels: Int8Panels) -> tuple[Tensor, Tensor]:
    """Codes ``(O, I)`` and scale ``(O,)``."""
    rows, columns = panels.shape
    return unpack_int8_codes(panels.codes, rows, columns), panels.scale[:rows].clone()


def pack_outlier_weight(weight: Tensor, index: Tensor) -> Tensor:
    """The columns ``index`` ``(n,)`` of a weight ``(O, I)`` as rows ``(n, 16 P)`` in the weight's dtype."""
    return pad_rows(weight[:, index].t()).contiguous()


def pad_rows(values: Tensor) -> Tensor:
    """``(..., O)`` -> ``(..., 16 P)``, zeros at the end."""
    return pad(values, (0, -values.shape[-1] % LANES))


def quantize_rowwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``(O, I)`` and scale float32 ``(O,)``: ``scale = max_i |w| / 127``, nearest code, ties to even.

    A row of zeros, or so small that ``127 / max`` overflows, has scale and codes 0. Infinite or NaN rows have a scale
    that is not finite and codes 0.
    """
    values = weight.float()
    largest = values.abs().amax(1) if values.shape[1] else values.new_zeros(values.shape[0])
    factor = torch.full_like(largest, LARGEST) / largest  # a number / tensor would multiply by the reciprocal
    usable = torch.isfinite(factor) & torch.isfinite(largest)
    codes = torch.where(usable.unsqueeze(1), values * factor.unsqueeze(1), 0.0).round_().to(torch.int8)
    return codes, torch.where(usable | ~torch.isfinite(largest), largest / LARGEST, 0.0)
