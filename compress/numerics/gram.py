"""Gram matrices of layer inputs: accumulate, damp, factor.

For rows ``x`` (tokens) of ``I`` features the Gram matrix is ``H = sum x x^T`` ``(I, I)``; the error of a layer whose
weight moves by ``dW`` ``(O, I)`` is ``trace(dW H dW^T)``. A constant factor never matters, since damping is relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericsError

_LADDER = (1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 1000.0)  # multiples of the damping asked for, tried in this order
_PANELS = 4  # column panels of a Gram matrix; more save products, but narrow ones run slower
_SMALLEST = 1e-3  # first rung for damping 0, relative to mean(diag H)


def count_nonfinite_rows(rows: Tensor) -> int:
    """Number of rows of ``(T, I)`` that hold a NaN or an infinity."""
    return int((~torch.isfinite(rows).all(dim=-1)).sum())


def _check_rows(rows: Tensor) -> None:
    if rows.dim() != 2:
        raise ValueError(f"rows must be (tokens, features), got shape {tuple(rows.shape)}")
    # One pass that stays finite exactly when all entries are: cheaper than isfinite on every entry.
    if not torch.isfinite(rows.float().sum()):
        bad = count_nonfinite_rows(rows)
        if bad:
            raise NumericsError(f"{bad} of {len(rows)} activation rows hold NaN or infinite values")


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """``gram += sum x x^T`` over ``rows`` ``(T, I)``, in float32, in place; only blocks on and below the diagonal.

    Call ``mirror_gram`` once after the last rows. Leaving out what lies above the diagonal saves 3/8 of the products.
    Raises ``NumericsError`` with the count when rows are not finite.
    """
    _check_rows(rows)
    columns = gram.shape[0]
    width = max(1, -(-columns // _PANELS))
    for start in range(0, columns, width):
        add_product(gram[start:, start : start + width], rows[:, start:], rows[:, start : start + width])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right`` ``(M, N)`` float32, for ``(T, M)`` and ``(T, N)``, in place.

    Two bfloat16 operands on a processor with bfloat16 products are multiplied as they are, more than twice as fast:
    summed in float32 over T, rounded once to bfloat16 (relative error 2**-9 per entry of this call, far below what the
    next few thousand tokens change), then added in float32. Everything else is multiplied in float32.
    """
    if left.dtype == right.dtype == torch.bfloat16 and _has_fast_bfloat16(left.device):
        total.add_(left.T @ right)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def _has_fast_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mirror_gram(gram: Tensor) -> Tensor:
    """Fill the upper triangle from the lower one, in place; returns ``gram``."""
    return gram.copy_(gram.tril() + gram.tril(-1).T)


def add_cross(cross: Tensor, rows: Tensor, other: Tensor) -> None:
    """``cross += sum (other - rows) rows^T`` over paired rows ``(T, I)``, in float32, in place.

    ``cross[o, i] = sum (other - rows)[:, o] rows[:, i]``: what a layer's input lost on the way through compressed
    blocks, correlated with the input it sees.
    """
    add_drift(cross, rows, rows, other)


def add_drift(total: Tensor, rows: Tensor, now: Tensor, dense: Tensor) -> None:
    """``total += sum (dense - now) rows^T`` over paired rows: ``rows`` ``(T, I)``, ``now`` and ``dense`` ``(T, O)``.

    With the residual stream in front of a layer's addition as ``now`` and ``dense``: ``Statistic.residual``.
    """
    for values in (rows, now, dense):
        _check_rows(values)
    add_product(total, dense - now, rows)


def find_dead_columns(gram: Tensor) -> Tensor:
    """Inputs that are zero in every row, ``(I,)`` bool: their weights cannot matter."""
    return gram.diagonal() <= 0


@dataclass(frozen=True)
class Factor:
    """A damped Gram matrix and the upper ``U`` with ``inverse(gram) = U^T U``, both ``(I, I)`` float32.

    ``damping`` is what was used, relative to ``mean(diag H)``; ``escalations`` counts failed attempts before it.
    """

    gram: Tensor
    upper: Tensor
    damping: float
    escalations: int
    float64: bool = False


def factor_gram(gram: Tensor, damping: float) -> Factor:
    """Damp ``gram`` ``(I, I)`` by ``damping * mean(diag)`` and factor its inverse.

    With ``J`` the reversal of rows, ``J H J = L L^T`` gives ``H = M M^T``, ``M = J L J`` upper, so ``U = inverse(M)``:
    one Cholesky factorization and one triangular inverse. Dead columns get the mean on the diagonal. A matrix that is
    not positive definite in float32 is tried in float64, then with more damping, every failure counted.
    Raises ``NumericsError`` when no rung of the ladder works.
    """
    if not torch.isfinite(gram).all():
        raise NumericsError("the Gram matrix holds NaN or infinite values")
    dead = find_dead_columns(gram)
    mean = float(gram.diagonal().double().mean()) if len(gram) else 1.0
    mean = mean if mean > 0 else 1.0
    escalations = 0
    for rung in _LADDER:
        used = rung * damping if damping > 0 else (0.0 if rung == 1.0 else rung * _SMALLEST)
        damped = gram.clone()
        damped.diagonal().add_(used * mean)
        damped.diagonal()[dead] = mean
        for dtype in (torch.float32, torch.float64):
            upper = _invert(damped.to(dtype))
            if upper is not None:
                return Factor(damped, upper.float(), used, escalations, dtype == torch.float64)
            escalations += 1
    raise NumericsError(f"no damping up to {used:g} x mean(diag) makes the Gram matrix positive definite")


def _invert(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed) or not torch.isfinite(lower).all():
        return None
    upper = _invert_upper(lower.flip(0, 1))
    return upper if torch.isfinite(upper).all() else None


def _invert_upper(matrix: Tensor) -> Tensor:
    """Inverse of an upper triangle by halves: inv([[A, B], [0, D]]) = [[inv A, -inv A B inv D], [0, inv D]]."""
    size = len(matrix)
    if size <= 128:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        base: Tensor = torch.linalg.solve_triangular(matrix, eye, upper=True)
        return base
    half = size // 2
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = _invert_upper(matrix[:half, :half])
    inverse[half:, half:] = _invert_upper(matrix[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ matrix[:half, half:]) @ inverse[half:, half:]
    return inverse


def correct_targets(
    weight: Tensor, factor: Factor, cross: Tensor | None, residual: Tensor | None, strength: float
) -> Tensor:
    """Weights ``(O, I)`` that make up, on the compressed stream, for what came before: ``W + a (W C + R) inverse(H)``.

    Minimises ``sum |W x_dense + (h_dense - h) - W* x|^2`` for ``a = strength = 1``: the output the layer had in the
    dense model (METHODS 2.4, target-corrected GPTQ), plus what the residual stream ``h``, to which the output is added,
    has lost by then. ``cross`` ``C = sum (x_dense - x) x^T`` ``(I, I)``, ``residual`` ``R = sum (h_dense - h) x^T``
    ``(O, I)``, either may be None; both scaled to the number of rows in ``H``.
    """
    moved = torch.zeros_like(weight)
    if cross is not None:
        moved += weight @ cross
    if residual is not None:
        moved += residual
    return weight + strength * (moved @ factor.upper.T) @ factor.upper
