"""The OBS loop: the promises of METHODS 2.6 on random problems in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.numerics import obs


def make_problem(rows: int = 6, columns: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, Gram matrix and U with inverse(gram) = U^T U."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    samples = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    gram = samples.T @ samples
    gram += 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), gram, upper


def round_all(weight: Tensor, upper: Tensor, step: float, block_size: int) -> tuple[Tensor, Tensor]:
    """Round to multiples of ``step``; returns the rounded weight and the loop's error."""
    result = torch.empty_like(weight)

    def rounder(i: int, current: Tensor) -> Tensor:
        result[:, i] = (current[i] / step).round() * step
        return result[:, i].clone()

    return result, obs.sweep_columns(weight, upper, rounder, block_size)


def test_reported_error_is_the_exact_quadratic_error() -> None:
    weight, gram, upper = make_problem()
    result, error = round_all(weight, upper, 0.5, 8)
    difference = weight - result
    torch.testing.assert_close(error, ((difference @ gram) * difference).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_block_size_changes_nothing(seed: int) -> None:
    weight, _, upper = make_problem(seed=seed)
    reference, _ = round_all(weight, upper, 0.5, 40)
    for block_size in (1, 3, 32, 128):
        assert torch.equal(round_all(weight, upper, 0.5, block_size)[0], reference)


def test_matches_gaussian_elimination_of_the_inverse() -> None:
    """The textbook form: eliminate each column from inverse(H) in turn (OBQ with a fixed order)."""
    weight, gram, upper = make_problem()
    inverse, current = torch.linalg.inv(gram), weight.clone()
    wanted = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        wanted[:, i] = (current[:, i] / 0.5).round() * 0.5
        current -= torch.outer((current[:, i] - wanted[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert torch.equal(round_all(weight, upper, 0.5, 16)[0], wanted)


def test_matches_babai_from_the_other_end() -> None:
    """GPTQ is Babai's nearest plane on the lattice with Gram matrix H, processed from the other end."""
    weight, gram, upper = make_problem()
    basis = torch.linalg.cholesky(gram.flip(0, 1), upper=True)  # reversed order: columns of R are the basis
    wanted = torch.empty_like(weight)
    for o, row in enumerate(weight.flip(1)):
        goal = basis @ row
        codes = torch.zeros_like(row)
        for j in reversed(range(len(row))):
            codes[j] = (goal[j] / basis[j, j] / 0.5).round()
            goal = goal - basis[:, j] * codes[j] * 0.5
        wanted[o] = codes.flip(0) * 0.5
    assert torch.equal(round_all(weight, upper, 0.5, 16)[0], wanted)


def test_bound_and_expectation_without_clipping() -> None:
    weight, gram, upper = make_problem(rows=400)
    _, error = round_all(weight, upper, 0.5, 32)
    spread = float((1 / upper.diagonal() ** 2).sum())
    assert float(error.max()) <= 0.25 / 4 * spread
    assert float(error.mean()) == pytest.approx(0.25 / 12 * spread, rel=0.1)
    nearest = weight - (weight / 0.5).round() * 0.5
    assert float(((nearest @ gram) * nearest).sum(1).mean()) > float(error.mean())


def test_diagonal_gram_is_rounding_to_nearest() -> None:
    weight, _, _ = make_problem()
    upper = torch.diag(torch.rand(40, dtype=torch.float64) + 0.1)
    result, _ = round_all(weight, upper, 0.5, 8)
    assert torch.equal(result, (weight / 0.5).round() * 0.5)


def test_rows_do_not_interact() -> None:
    weight, _, upper = make_problem(rows=7)
    together, _ = round_all(weight, upper, 0.5, 16)
    assert torch.equal(torch.cat([round_all(row[None], upper, 0.5, 16)[0] for row in weight]), together)


def test_the_weight_given_is_left_alone() -> None:
    weight, _, upper = make_problem()
    transposed = weight.T.contiguous().T  # what a copy-free transposition inside would write through
    before = transposed.clone()
    round_all(transposed, upper, 0.5, 16)
    assert torch.equal(transposed, before)
