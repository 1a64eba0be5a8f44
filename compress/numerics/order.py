"""In which order the OBS loop visits the columns of a weight.

A permutation ``p`` ``(I,)`` lists original columns in the order of the visit; ``invert_order(p)`` undoes it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_by_activation(diagonal: Tensor) -> Tensor:
    """Columns by falling ``diag(H)`` ``(I,)``: act-order. Scatters groups, so fit all grids first (static groups)."""
    return torch.argsort(diagonal, descending=True, stable=True)


def order_within_groups(diagonal: Tensor, group_size: int) -> Tensor:
    """Group-aware order (GAR, arXiv 2505.14638): groups by their largest ``diag(H)``, columns inside by ``diag(H)``.

    Groups stay contiguous, so grids may still be fitted on the weights as compensated so far.
    Example, diag 1 5 | 2 9, group size 2: 3 2 | 1 0.
    """
    groups = diagonal.reshape(-1, group_size)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    outer = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=diagonal.device).unsqueeze(1) * group_size)[outer].reshape(-1)


def invert_order(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    return torch.argsort(order)
