"""Error measures against sums over samples."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import errors


def test_errors_equal_sums_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    changed = weight + 0.1 * torch.randn(5, 12, generator=generator)
    difference = rows @ (weight - changed).T
    wanted = float(difference.square().sum() / (rows @ weight.T).square().sum())
    assert errors.output_error(weight, changed, rows.T @ rows) == pytest.approx(wanted, rel=1e-4)
    assert errors.weight_error(weight, changed) == pytest.approx(float((weight - changed).norm() / weight.norm()) ** 2)


def test_zero_weights() -> None:
    zero, one, gram = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)
    assert errors.weight_error(zero, zero) == 0.0 and errors.output_error(zero, zero, gram) == 0.0
    assert errors.weight_error(zero, one) == float("inf")
