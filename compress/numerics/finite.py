"""Counting values that are not finite, without temporary copies of the size of the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**22  # values looked at at a time


def count_nonfinite(tensor: Tensor) -> int:
    """How many values of a floating-point tensor are NaN or infinite; 0 for integers."""
    if not tensor.is_floating_point():
        return 0
    narrow = tensor.dtype.itemsize == 1  # float8 has no isfinite
    flat = tensor.reshape(-1)
    return sum(int((~torch.isfinite(one.float() if narrow else one)).sum()) for one in flat.split(CHUNK))
