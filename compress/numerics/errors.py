"""How far a changed weight is from the old one: in the weight, and in what the layer computes."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_error(weight: Tensor, changed: Tensor) -> float:
    """``||W - W_hat||^2 / ||W||^2``; 0 when both are zero."""
    return ratio((weight - changed).double().square().sum(), weight.double().square().sum())


def output_error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """``trace(dW H dW^T) / trace(W H W^T)``: the share of the layer's output energy that the change destroys."""
    return ratio(output_energy(weight - changed, gram), output_energy(weight, gram))


def row_energies(values: Tensor) -> Tensor:
    """Sum of squares of each row, float64; of ``W``, or of ``W X^T`` for input rows ``X``."""
    return values.square().sum(dim=1, dtype=torch.float64)


def output_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """``trace(W H W^T)`` = ``sum ||W x||^2``, a scalar in float64."""
    return ((weight @ gram) * weight).sum(dtype=weight.double().dtype)


def ratio(part: Tensor | float, whole: Tensor | float) -> float:
    """``part / whole``; 0 of nothing is 0, something of nothing is infinite."""
    return float(part / whole) if float(whole) > 0 else (0.0 if float(part) == 0 else float("inf"))
