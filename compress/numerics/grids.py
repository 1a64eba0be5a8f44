"""Affine grids: fit a scale and zero per group, quantize to codes, dequantize.

One group is the last dimension of a tensor ``(..., g)``; its grid is one ``scale`` and one ``zero`` ``(...)``.
Codes are ``0 .. 2**bits - 1`` and ``w_hat = scale * (code - zero)``. Example, 2 bits, ``scale 0.5, zero 1``: the codes
0, 1, 2, 3 stand for -0.5, 0, 0.5, 1. Every scale is rounded to the dtype it is stored in *before* it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-10  # a group of zeros gets this scale at least, so that its inverse is finite


def round_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """``scale`` as it reads back after storing in ``scale_dtype``, float32; magnitudes that vanish become 1."""
    stored = scale.to(scale_dtype).float()
    usable = torch.isfinite(stored) & (stored.abs() > _TINY)
    return torch.where(usable, stored, torch.ones_like(stored))


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """``(O, I)`` as ``(O, G, g)``; the group size must divide ``I``."""
    rows, columns = weight.shape
    if group_size <= 0 or columns % group_size:
        raise ValueError(f"{columns} input features are not a multiple of group_size {group_size}")
    return weight.reshape(rows, columns // group_size, group_size)


def encode(weight: Tensor, inverse_scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest codes as floats; ``inverse_scale`` and ``zero`` broadcast against ``weight``."""
    return torch.addcmul(zero, weight, inverse_scale).round_().clamp_(0, max_code)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, group_size: int, max_code: int) -> Tensor:
    """Nearest codes ``(O, I)`` uint8 on the grid ``scale, zero`` ``(O, G)``."""
    groups = split_groups(weight, group_size)
    codes = encode(groups, scale.reciprocal().unsqueeze(-1), zero.unsqueeze(-1), max_code)
    return codes.reshape(weight.shape).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """Weights ``(O, I)`` float32 of codes ``(O, I)`` on the grid ``scale, zero`` ``(O, G)``."""
    groups = split_groups(codes.float(), group_size)
    return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(codes.shape)


@dataclass(frozen=True)
class FitRule:
    """How a grid is fitted to a group of weights; all fields are numbers, so that a fit is a pure function.

    ``steps`` shrinks of the range are tried, evenly from 1 down to ``narrowest`` (0 = keep the whole range), and the
    best one is polished ``polish`` times by least squares for the scale with the codes fixed.
    """

    bits: int
    symmetric: bool
    scale_dtype: torch.dtype
    steps: int = 0
    narrowest: float = 0.4
    polish: int = 0
    float_zero: bool = False

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


def fit_whole_range(groups: Tensor, rule: FitRule) -> tuple[Tensor, Tensor]:
    """Scale and ideal zero (not yet rounded) ``(...)`` that represent the extremes of ``groups`` ``(..., g)``.

    Asymmetric: min-max, the range always holding 0. Symmetric: full-range signed absmax, ``scale = -m / 2**(bits-1)``
    for the entry ``m`` of largest magnitude, which is represented exactly (METHODS 0.1); the scale may be negative.
    """
    if rule.symmetric:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        half = float(2 ** (rule.bits - 1))
        return -extreme / half, torch.full_like(extreme, half)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scale = (high - low) / rule.max_code
    zero = torch.where(scale > 0, -low / scale.clamp(min=1e-30), torch.zeros_like(scale))
    return scale, zero


def fit_grid(groups: Tensor, rule: FitRule, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero ``(...)`` float32 for ``groups`` ``(..., g)`` that minimise ``sum importance * (w - w_hat)^2``.

    ``importance`` ``(g,)`` or like ``groups``, non-negative, says what an error of each weight costs; None weighs all
    alike. Without search the fit is the whole range, rounded to the stored scale and the nearest zero.
    """
    whole, ideal = fit_whole_range(groups, rule)
    scale = round_scale(whole, rule.scale_dtype)
    zero = ideal if rule.float_zero else ideal.round()
    zero = zero.clamp(0, rule.max_code)
    if rule.steps == 0 and rule.polish == 0:
        return scale, zero
    cost = None if importance is None else importance.expand_as(groups)
    loss = _loss(groups, scale, zero, rule, cost)
    for shrink in torch.linspace(1.0, rule.narrowest, max(rule.steps, 1)).tolist():
        tried = round_scale(whole * shrink, rule.scale_dtype)
        for candidate in _zeros(ideal, rule):
            scale, zero, loss = _keep_better(groups, (scale, zero, loss), (tried, candidate), rule, cost)
    for _ in range(rule.polish):
        fitted = _least_squares(groups, scale, zero, rule, cost)
        scale, zero, loss = _keep_better(groups, (scale, zero, loss), fitted, rule, cost)
    return scale, zero


def _zeros(ideal: Tensor, rule: FitRule) -> list[Tensor]:
    """Zeros worth trying: both integers around the ideal one (METHODS 2.3)."""
    if rule.symmetric or rule.float_zero:
        return [ideal]
    return [ideal.floor(), ideal.ceil().clamp(max=rule.max_code)]


def _loss(groups: Tensor, scale: Tensor, zero: Tensor, rule: FitRule, cost: Tensor | None) -> Tensor:
    shift = zero.unsqueeze(-1)
    error = encode(groups, scale.reciprocal().unsqueeze(-1), shift, rule.max_code)
    error.sub_(shift).mul_(scale.unsqueeze(-1)).sub_(groups)
    return error.square_().sum(-1) if cost is None else error.square_().mul_(cost).sum(-1)


def _keep_better(
    groups: Tensor,
    best: tuple[Tensor, Tensor, Tensor],
    tried: tuple[Tensor, Tensor],
    rule: FitRule,
    cost: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _loss(groups, *tried, rule, cost)
    better = loss < best[2]
    scale, zero = (torch.where(better, new, old) for new, old in zip(tried, best[:2], strict=True))
    return scale, zero, torch.where(better, loss, best[2])


def _least_squares(
    groups: Tensor, scale: Tensor, zero: Tensor, rule: FitRule, cost: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Best scale (and zero, if it may be fractional) for the codes that ``scale, zero`` give."""
    codes = encode(groups, scale.reciprocal().unsqueeze(-1), zero.unsqueeze(-1), rule.max_code)
    weigh = torch.ones_like(groups) if cost is None else cost
    if rule.float_zero:
        total = weigh.sum(-1).clamp_(min=1e-30)
        mean_code, mean_weight = (weigh * codes).sum(-1) / total, (weigh * groups).sum(-1) / total
        centred = codes - mean_code.unsqueeze(-1)
        squares = (weigh * centred * centred).sum(-1)
        fitted = (weigh * centred * groups).sum(-1) / squares.clamp(min=1e-30)
        fitted = round_scale(torch.where(squares > 0, fitted, scale), rule.scale_dtype)
        return fitted, mean_code - mean_weight / fitted
    centred = codes - zero.unsqueeze(-1)
    squares = (weigh * centred * centred).sum(-1)
    fitted = (weigh * centred * groups).sum(-1) / squares.clamp(min=1e-30)
    return round_scale(torch.where(squares > 0, fitted, scale), rule.scale_dtype), zero
