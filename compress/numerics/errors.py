"""How far a changed weight is from the old one: in the weight, and in what the layer computes."""

from __future__ import annotations

from torch import Tensor


def weight_error(weight: Tensor, changed: Tensor) -> float:
    """``||W - W_hat||^2 / ||W||^2``; 0 when both are zero."""
    return _ratio((weight - changed).double().square().sum(), weight.double().square().sum())


def output_error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """``trace(dW H dW^T) / trace(W H W^T)``: the share of the layer's output energy that the change destroys."""
    return _ratio(output_energy(weight - changed, gram), output_energy(weight, gram))


def rows_error(weight: Tensor, changed: Tensor, rows: Tensor) -> float:
    """``||(W - W_hat) X||^2 / ||W X||^2`` over input ``rows`` ``(T, I)``: ``output_error`` without the Gram matrix."""
    values = rows.to(weight.dtype).T
    lost = ((weight - changed) @ values).square().sum(dtype=weight.double().dtype)
    return _ratio(lost, (weight @ values).square().sum(dtype=weight.double().dtype))


def output_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """``trace(W H W^T)`` = ``sum ||W x||^2``, a scalar in float64."""
    return ((weight @ gram) * weight).sum(dtype=weight.double().dtype)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else (0.0 if float(part) == 0 else float("inf"))
