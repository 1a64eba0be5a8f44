"""Gram matrices: sums against a slow reference, the damping ladder, targets from the dense stream."""

from __future__ import annotations

import pytest
import torch

from compress.errors import NumericsError
from compress.numerics import gram as grams


def make_rows(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix


@pytest.mark.parametrize("features", [1, 3, 7, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_gram_equals_the_sum_of_outer_products(features: int, dtype: torch.dtype) -> None:
    rows = make_rows(50, features).to(dtype)
    total = torch.zeros(features, features)
    grams.add_gram(total, rows[:20])
    grams.add_gram(total, rows[20:])
    wanted = torch.zeros(features, features, dtype=torch.float64)
    for row in rows.double():
        wanted += torch.outer(row, row)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8  # bfloat16 products are rounded once per call
    torch.testing.assert_close(
        grams.mirror_gram(total).double(), wanted, rtol=rounding, atol=10 * rounding * float(wanted.abs().max())
    )
    assert torch.equal(total, total.T)


def test_add_cross_is_oriented() -> None:
    rows, other = make_rows(40, 6, 1).float(), make_rows(40, 6, 2).float()
    cross = torch.zeros(6, 6)
    grams.add_cross(cross, rows, other)
    torch.testing.assert_close(
        cross, sum(torch.outer(d - x, x) for x, d in zip(rows, other, strict=True)), rtol=1e-4, atol=1e-3
    )


def test_nonfinite_rows_are_refused_with_their_count() -> None:
    rows = torch.ones(10, 4)
    rows[2, 1], rows[7, 0], rows[7, 3] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(NumericsError, match="2 of 10"):
        grams.add_gram(torch.zeros(4, 4), rows)


def test_factor_is_the_upper_root_of_the_inverse() -> None:
    rows = make_rows(200, 70)
    gram = (rows.T @ rows).float()
    factor = grams.factor_gram(gram, 0.01)
    assert torch.equal(factor.upper, factor.upper.triu()) and factor.escalations == 0 and factor.damping == 0.01
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(70)
    identity = factor.upper.double() @ damped @ factor.upper.double().T
    torch.testing.assert_close(identity, torch.eye(70, dtype=torch.float64), rtol=0, atol=1e-3)


def test_escalation_is_counted_and_undamped_singular_still_solved() -> None:
    rows = make_rows(5, 40).float()  # rank 5
    factor = grams.factor_gram(rows.T @ rows, 0.0)
    assert factor.escalations > 0 and factor.damping > 0
    assert torch.isfinite(factor.upper).all()


def test_hopeless_and_nonfinite_matrices_raise() -> None:
    with pytest.raises(NumericsError, match="positive definite"):
        grams.factor_gram(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)
    with pytest.raises(NumericsError, match="NaN"):
        grams.factor_gram(torch.full((2, 2), float("nan")), 0.01)


def test_dead_columns_do_not_disturb_the_rest() -> None:
    rows = make_rows(100, 8).float()
    rows[:, 3] = 0
    gram = rows.T @ rows
    assert grams.find_dead_columns(gram).tolist() == [False] * 3 + [True] + [False] * 4
    upper = grams.factor_gram(gram, 0.01).upper
    assert float(upper[3].abs().sum() - upper[3, 3].abs()) == 0


def test_full_correction_is_the_least_squares_solution() -> None:
    dense, seen = make_rows(500, 12, 1), make_rows(500, 12, 2)
    seen = dense + 0.1 * seen
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cross = (dense - seen).T @ seen
    factor = grams.factor_gram((seen.T @ seen).float(), 0.0)
    corrected = grams.correct_targets(weight.float(), factor, cross.float(), None, 1.0)
    wanted = torch.linalg.lstsq(seen, dense @ weight.T).solution.T
    torch.testing.assert_close(corrected.double(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(grams.correct_targets(weight.float(), factor, cross.float() * 0, None, 1.0), weight.float())


def test_residual_correction_reaches_for_the_stream() -> None:
    dense, noise, lost = make_rows(500, 12, 1), make_rows(500, 12, 2), make_rows(500, 5, 4)
    seen = dense + 0.1 * noise
    lost = lost + seen @ torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cross, residual = torch.zeros(12, 12), torch.zeros(5, 12)
    grams.add_cross(cross, seen.float(), dense.float())
    grams.add_drift(residual, seen.float(), torch.zeros(500, 5), lost.float())
    factor = grams.factor_gram((seen.T @ seen).float(), 0.0)
    corrected = grams.correct_targets(weight.float(), factor, cross, residual, 1.0)
    wanted = torch.linalg.lstsq(seen, dense @ weight.T + lost).solution.T
    torch.testing.assert_close(corrected.double(), wanted, rtol=1e-3, atol=1e-3)
