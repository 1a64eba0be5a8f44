"""After the OBS sweep: better codes for fixed grids, better grids for fixed codes, in turns.

Both minimise ``trace((W - W_hat) H (W - W_hat)^T)`` exactly, one by coordinate descent over the codes (QuantEase,
arXiv 2309.01885), the other by least squares over the scales of all groups of a row together. All tensors here are
transposed, ``(I, O)`` and ``(G, O)``, so that a column of the weight is contiguous; rows never interact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.grids import round_scale


def descend_codes(
    codes: Tensor, scale: Tensor, zero: Tensor, target: Tensor, gram: Tensor, max_code: int, block_size: int = 32
) -> None:
    """One cyclic sweep: each code in turn becomes the best one given all others, in place.

    ``codes`` ``(I, O)`` float, ``scale`` and ``zero`` ``(G, O)``, ``target`` ``(I, O)``, ``gram`` ``(I, I)`` damped.
    The error never rises. With the gradient ``P = H (W - W_hat)``, column ``j`` moves towards ``w_hat_j + P_j / H_jj``.
    """
    columns = len(codes)
    group_size = columns // len(scale)
    inverse_scale = scale.reciprocal()
    approximation = expand_grid(codes, scale, zero)
    gradient = gram @ (target - approximation)
    weight_of = gram.diagonal().tolist()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        local = gram[start:end, start:end].contiguous()
        moved = torch.empty_like(gradient[start:end])
        for j in range(start, end):
            g = j // group_size
            wanted = torch.add(approximation[j], gradient[j], alpha=1.0 / weight_of[j])
            new = torch.addcmul(zero[g], wanted, inverse_scale[g]).round_().clamp_(0, max_code)
            step = torch.sub(new, codes[j], out=moved[j - start]).mul_(scale[g])
            codes[j] = new
            gradient[start:end].addr_(local[j - start], step, alpha=-1)
        if end < columns:  # earlier columns are not visited again in this sweep
            gradient[end:].addmm_(gram[end:, start:end], moved, alpha=-1)


def fit_scales(
    codes: Tensor, scale: Tensor, zero: Tensor, target: Tensor, gram: Tensor, scale_dtype: torch.dtype
) -> Tensor:
    """Scales ``(G, O)`` of least error for fixed codes and zeros, all groups of a row together.

    With ``c_g = codes - zero`` in group g and 0 elsewhere, solves ``(c_g^T H c_h) s = c_g^T H w`` per row, rounds to
    ``scale_dtype`` and keeps a row's old scales where that rounding spoils the gain. Empty groups keep their scale.
    """
    system, right = _normal_equations([_centre(codes, zero)], target, gram, len(scale))
    start = scale.T.contiguous()
    fitted = round_scale(start + _solve_moves(system, right, start), scale_dtype)
    return _keep_gains(system, right, start, fitted).T.contiguous()


def fit_scales_and_zeros(
    codes: Tensor, scale: Tensor, zero: Tensor, target: Tensor, gram: Tensor, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Like ``fit_scales`` for scales and fractional zeros together: ``w_hat = s code + t`` with ``t = -s zero``."""
    system, right = _normal_equations([codes, torch.ones_like(codes)], target, gram, len(scale))
    start = torch.cat([scale, -scale * zero]).T.contiguous()
    fitted = start + _solve_moves(system, right, start)
    groups = len(scale)
    scales = round_scale(fitted[:, :groups], scale_dtype)
    zeros = (-fitted[:, groups:] / scales).to(scale_dtype).float()
    fitted = _keep_gains(system, right, start, torch.cat([scales, -scales * zeros], dim=1))
    kept = (fitted == start).all(1)
    new = torch.where(kept, zero, zeros.T)
    return fitted[:, :groups].T.contiguous(), new.contiguous()


def _keep_gains(system: Tensor, right: Tensor, start: Tensor, fitted: Tensor) -> Tensor:
    """``fitted`` ``(O, K)`` where its quadratic ``x A x - 2 b x`` is below that of ``start``, else ``start``."""

    def value(x: Tensor) -> Tensor:
        return (x * ((system @ x.unsqueeze(-1)).squeeze(-1) - 2 * right)).sum(1, keepdim=True)

    return torch.where(value(fitted) < value(start), fitted, start)


def row_errors(codes: Tensor, scale: Tensor, zero: Tensor, target: Tensor, gram: Tensor) -> Tensor:
    """``(w - w_hat) H (w - w_hat)^T`` of each row ``(O,)``."""
    difference = target - expand_grid(codes, scale, zero)
    return (difference * (gram @ difference)).sum(0)


def expand_grid(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights ``(I, O)`` of codes ``(I, O)`` on a grid ``(G, O)``."""
    grouped = codes.view(len(scale), -1, codes.shape[1])
    return ((grouped - zero.unsqueeze(1)) * scale.unsqueeze(1)).view_as(codes)


def _centre(codes: Tensor, zero: Tensor) -> Tensor:
    return (codes.view(len(zero), -1, codes.shape[1]) - zero.unsqueeze(1)).view_as(codes)


def _normal_equations(basis: list[Tensor], target: Tensor, gram: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """``A (O, K, K)`` and ``b (O, K)``, K = len(basis) * G, of the least-squares problem under ``gram``."""
    columns, rows = target.shape
    size = columns // groups
    pulled = gram @ target
    blocks = [(g * size, (g + 1) * size) for g in range(groups)]
    system = target.new_empty((len(basis) * groups, len(basis) * groups, rows))
    right = torch.cat([(b * pulled).view(groups, size, rows).sum(1) for b in basis])
    for first, one in enumerate(basis):
        for g, (start, end) in enumerate(blocks):
            spread = gram[start:, start:end] @ one[start:end]  # the system is symmetric: later groups only
            for second, other in enumerate(basis):
                part = (other[start:] * spread).view(groups - g, size, rows).sum(1)
                system[first * groups + g, second * groups + g : (second + 1) * groups] = part
                system[second * groups + g : (second + 1) * groups, first * groups + g] = part
    return system.permute(2, 0, 1).contiguous(), right.T.contiguous()


def _solve_moves(system: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """``x - start`` for ``system x = right``, lightly damped towards ``start`` so that empty groups stay put."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal + 1e-12 * diagonal.amax(1, keepdim=True).clamp(min=1e-30) + (diagonal <= 0).float()
    residual = right - (system @ start.unsqueeze(-1)).squeeze(-1)
    lower, failed = torch.linalg.cholesky_ex(system + torch.diag_embed(ridge))
    moves = torch.cholesky_solve(residual.unsqueeze(-1), lower).squeeze(-1)
    usable = (failed == 0).unsqueeze(1) & torch.isfinite(moves)
    return torch.where(usable, moves, torch.zeros_like(moves))
