"""Rounding of a layer's input to integers, token by token, and back: what a layer with int8 activations really reads.

``x_hat = scale * round(x / scale)`` with one scale per token, ``scale = max|x| / (2**(bits - 1) - 1)``. Multiplying
``x_hat`` with the dequantized weight gives what integer kernels give, up to the rounding of floats. Example, 8 bits: of
the token ``(127, 1.4, -60)`` the scale is 1 and ``x_hat`` is ``(127, 1, -60)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.types import ActivationRule, Statistic


def round_rows(x: Tensor, rule: ActivationRule, kept: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
    """``x`` ``(..., I)`` rounded and back, in its dtype; computed in float32.

    Features of the list ``kept`` ``(n,)``, and those in which any row reaches ``rule.threshold``, are left as they are
    and don't count for the scale. ``groups`` ``(I,)``: the group of each feature, where ``rule.groups > 1``.
    """
    if x.numel() == 0:
        return x
    rows = x.reshape(-1, x.shape[-1]).float()
    stay = find_outliers(rows, rule.threshold)
    if kept is not None:
        stay[kept.to(stay.device)] = True
    inside = rows.masked_fill(stay, 0.0)
    peak = find_peaks(inside, rule, groups)
    limit = (1 << (rule.bits - 1)) - 1
    inverse = torch.where(peak > 0, limit / peak, torch.zeros_like(peak))
    rounded = (inside * inverse).round_().clamp_(-limit, limit).mul_(peak / limit)
    return torch.where(stay, rows, rounded).to(x.dtype).reshape(x.shape)


def find_outliers(rows: Tensor, threshold: float) -> Tensor:
    """Features ``(I,)`` bool in which any of ``rows`` ``(T, I)`` reaches ``threshold``; 0: none (METHODS 1, step 1)."""
    if threshold <= 0:
        return torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
    return (rows.abs() >= threshold).any(0)


def find_peaks(rows: Tensor, rule: ActivationRule, groups: Tensor | None) -> Tensor:
    """The largest magnitude of each row ``(T, 1)``, or of each row's group at every feature of it ``(T, I)``."""
    size = rows.abs()
    if rule.groups == 1:
        return size.amax(-1, keepdim=True)
    assert groups is not None, "several groups, and no word on which feature is in which"
    index = groups.to(device=rows.device, dtype=torch.int64).expand_as(rows)
    peaks = torch.zeros(len(rows), rule.groups, device=rows.device)
    return peaks.scatter_reduce_(1, index, size, "amax").gather(1, index)


def group_by_range(absmax: Tensor, count: int) -> Tensor:
    """Groups of features of like range (METHODS 8.1): ``(I,)`` uint8 in ``0 .. count - 1``.

    Features are sorted by ``absmax`` ``(I,)`` and cut into ``count`` runs of nearly equal length, so that the few of
    huge range share a scale with each other only.
    """
    order = absmax.argsort(stable=True)
    groups = torch.empty(len(absmax), dtype=torch.uint8, device=absmax.device)
    ranks = torch.arange(len(absmax), device=absmax.device) * count // len(absmax)
    groups[order] = ranks.to(torch.uint8)
    return groups


def rounding_rule(bits: int | None, groups: int) -> ActivationRule | None:
    """The rule of ``activation_bits`` and ``activation_groups``."""
    return None if bits is None else ActivationRule(bits, groups=groups)


def group_inputs(statistic: Statistic | None, features: int, groups: int) -> Tensor | None:
    """The group of each input feature ``(I,)``, by range (METHODS 8.1); without calibration tokens by position."""
    if groups == 1:
        return None
    absmax = None if statistic is None or statistic.tokens == 0 else statistic.absmax
    return group_by_range(torch.arange(features) if absmax is None else absmax, groups)
