"""Refinement: never worse, least squares is least squares, a converged descent is a coordinate-wise minimum."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics import refine


def make_problem(groups: int = 3, size: int = 8, rows: int = 10, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * size
    mix = torch.randn(columns, columns, generator=generator)
    samples = torch.randn(4 * columns, columns, generator=generator) @ mix
    target = torch.randn(columns, rows, generator=generator)
    scale, zero = torch.rand(groups, rows, generator=generator) + 0.3, torch.full((groups, rows), 4.0)
    wide, shift = scale.repeat_interleave(size, 0), zero.repeat_interleave(size, 0)
    codes = (target / wide + shift).round().clamp(0, 7)
    return {"codes": codes, "scale": scale, "zero": zero, "target": target, "gram": samples.T @ samples / columns}


def error_of(p: dict[str, Tensor], **changed: Tensor) -> Tensor:
    p = {**p, **changed}
    size = len(p["codes"]) // len(p["scale"])
    weight = (p["codes"] - p["zero"].repeat_interleave(size, 0)) * p["scale"].repeat_interleave(size, 0)
    difference = (p["target"] - weight).double()
    return (difference * (p["gram"].double() @ difference)).sum(0)


def test_row_errors_is_the_quadratic_error() -> None:
    p = make_problem()
    torch.testing.assert_close(refine.row_errors(**p).double(), error_of(p), rtol=1e-4, atol=0)


def test_descent_falls_to_a_minimum_in_every_coordinate() -> None:
    p = make_problem()
    before = error_of(p)
    for _ in range(50):
        previous = p["codes"].clone()
        refine.descend_codes(p["codes"], p["scale"], p["zero"], p["target"], p["gram"], 7, block_size=5)
        after = error_of(p)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
        if torch.equal(previous, p["codes"]):
            break
    assert before.sum() < 0.8 * error_of(make_problem()).sum()
    for i in range(len(p["codes"])):
        for move in (-1, 1):
            other = p["codes"].clone()
            other[i] = (other[i] + move).clamp(0, 7)
            assert (error_of(p, codes=other) >= before * (1 - 1e-5)).all()


def test_block_size_changes_nothing() -> None:
    results = []
    for block_size in (1, 7, 24):
        p = make_problem(seed=4)
        refine.descend_codes(p["codes"], p["scale"], p["zero"], p["target"], p["gram"], 7, block_size)
        results.append(p["codes"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_fitted_scales_solve_the_least_squares_problem() -> None:
    p = make_problem()
    fitted = refine.fit_scales(*p.values(), scale_dtype=torch.float32)
    root = torch.linalg.cholesky(p["gram"].double(), upper=True)
    for o in range(10):
        basis = torch.zeros(24, 3, dtype=torch.float64)
        for g in range(3):
            basis[g * 8 : g * 8 + 8, g] = p["codes"][g * 8 : g * 8 + 8, o] - p["zero"][g, o]
        wanted = torch.linalg.lstsq(root @ basis, (root @ p["target"][:, o].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted[:, o].double(), wanted, rtol=2e-3, atol=1e-4)


def test_fitted_scales_are_storable_and_never_worse() -> None:
    p = make_problem()
    p["scale"] = p["scale"].bfloat16().float()
    fitted = refine.fit_scales(*p.values(), scale_dtype=torch.bfloat16)
    assert torch.equal(fitted.bfloat16().float(), fitted)
    assert (error_of(p, scale=fitted) <= error_of(p) * (1 + 1e-5)).all()
    assert error_of(p, scale=fitted).sum() < error_of(p).sum()


def test_free_zeros_are_at_least_as_good_as_fixed_ones() -> None:
    p = make_problem()
    scale = refine.fit_scales(*p.values(), scale_dtype=torch.float32)
    both = refine.fit_scales_and_zeros(*p.values(), scale_dtype=torch.float32)
    assert (error_of(p, scale=both[0], zero=both[1]) <= error_of(p, scale=scale) * (1 + 1e-3)).all()


def test_an_empty_group_keeps_its_scale() -> None:
    p = make_problem()
    p["codes"][:8] = p["zero"][0]
    fitted = refine.fit_scales(*p.values(), scale_dtype=torch.float32)
    assert torch.equal(fitted[0], p["scale"][0]) and torch.isfinite(fitted).all()
