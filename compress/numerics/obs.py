"""The optimal-brain-surgeon loop over columns: the only copy, whatever happens to a column.

For the error ``trace(dW H dW^T)`` a column that is changed for good lets the later ones make up for it. With
``inverse(H) = U^T U``, U upper, visiting columns ``i = 0, 1, ...`` costs ``((w_i - q_i) / U_ii)^2`` each and the later
columns move by ``-e_i U[i, i+1:]``, ``e_i = (w_i - q_i) / U_ii`` (GPTQ, arXiv 2210.17323, and SparseGPT, 2301.00774).
Rows never interact, so everything is vectorised over them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rounder = Callable[[int, Tensor], Tensor]
"""``(i, current) -> (O,)``: what column ``i`` becomes, given all columns ``current`` ``(I, O)`` as compensated so far.

Rows of ``current`` from ``i`` to the end of the block that holds ``i`` are up to date; at the first column of a block
all later rows are. The result must not alias ``current``.
"""


def sweep_columns(weight: Tensor, upper: Tensor, rounder: Rounder, block_size: int = 32) -> Tensor:
    """Visit the columns of ``weight`` ``(O, I)`` in order; returns the squared error of each row ``(O,)``.

    What a column becomes is for the ``rounder`` to keep. ``upper`` is U ``(I, I)``. ``block_size`` columns are
    compensated one by one, everything to the right once a block; it changes the speed, not the result.
    """
    columns = weight.shape[1]
    current = weight.T.clone(memory_format=torch.contiguous_format)  # (I, O): a column of the weight is contiguous
    error = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    scale = upper.diagonal().tolist()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        pending = torch.empty((end - start, weight.shape[0]), dtype=weight.dtype, device=weight.device)
        for i in range(start, end):
            e = torch.sub(current[i], rounder(i, current), out=pending[i - start]).div_(scale[i])
            if i + 1 < end:
                current[i + 1 : end].addr_(upper[i, i + 1 : end], e, alpha=-1)
        error += pending.square().sum(0)
        current[end:].addmm_(upper[start:end, end:].T, pending, alpha=-1)
    return error
