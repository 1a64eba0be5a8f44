"""Grids against the computed table of errors on Gaussian weights, and against slow references."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import grids

# Relative mean squared error on N(0,1): (group, bits, full-range symmetric, asymmetric min-max, asymmetric search).
# Computed by simulation, independent of this code; the sampling error of this test is below 1%.
GAUSSIAN = [
    (128, 8, 4.12e-5, 3.51e-5, 3.51e-5),
    (128, 4, 1.07e-2, 1.01e-2, 9.04e-3),
    (128, 3, 4.32e-2, 4.65e-2, 3.48e-2),
    (128, 2, 1.80e-1, 2.54e-1, 1.36e-1),
    (64, 4, 9.02e-3, 8.31e-3, 7.62e-3),
    (32, 4, 7.39e-3, 6.53e-3, 6.08e-3),
    (32, 2, 1.31e-1, 1.65e-1, 1.11e-1),
]


def measure(rule: grids.FitRule, group_size: int) -> float:
    weight = torch.randn(4000, 2 * group_size, generator=torch.Generator().manual_seed(1))
    scale, zero = grids.fit_grid(grids.split_groups(weight, group_size), rule)
    codes = grids.quantize(weight, scale, zero, group_size, rule.max_code)
    error = weight - grids.dequantize(codes, scale, zero, group_size)
    return float(error.square().mean() / weight.square().mean())


@pytest.mark.parametrize("group_size, bits, symmetric, asymmetric, searched", GAUSSIAN)
def test_error_on_gaussian_weights(
    group_size: int, bits: int, symmetric: float, asymmetric: float, searched: float
) -> None:
    float32 = torch.float32
    assert measure(grids.FitRule(bits, True, float32), group_size) == pytest.approx(symmetric, rel=0.02)
    assert measure(grids.FitRule(bits, False, float32), group_size) == pytest.approx(asymmetric, rel=0.02)
    # A search may do better than the table's, never worse by more than the tolerance.
    assert measure(grids.FitRule(bits, False, float32, steps=41, polish=2), group_size) <= searched * 1.02


def test_symmetric_represents_the_extreme_exactly_whatever_its_sign() -> None:
    weight = torch.tensor([[0.5, -2.0, 1.0, 0.0], [0.5, 2.0, -1.0, 0.0]])
    rule = grids.FitRule(3, True, torch.float32)
    scale, zero = grids.fit_grid(grids.split_groups(weight, 4), rule)
    codes = grids.quantize(weight, scale, zero, 4, 7)
    assert scale.flatten().tolist() == [0.5, -0.5]
    assert torch.equal(zero, torch.full((2, 1), 4.0))
    assert torch.equal(grids.dequantize(codes, scale, zero, 4), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_grid_is_storable(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits)) * 0.02
    scale, zero = grids.fit_grid(
        grids.split_groups(weight, 32), grids.FitRule(bits, symmetric, scale_dtype, 11, polish=1)
    )
    assert torch.equal(scale.to(scale_dtype).float(), scale)
    assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= 2**bits - 1


def test_codes_are_the_nearest_points_of_the_grid() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 32, generator=generator)
    scale, zero = torch.rand(8, 4, generator=generator) + 0.05, torch.randint(0, 8, (8, 4), generator=generator).float()
    codes = grids.quantize(weight, scale, zero, 8, 7)
    for o in range(8):
        for i in range(32):
            points = scale[o, i // 8] * (torch.arange(8.0) - zero[o, i // 8])
            best = (points - weight[o, i]).abs()
            assert best[int(codes[o, i])] <= best.min() + 1e-6


def test_search_never_loses_to_the_whole_range_and_heeds_importance() -> None:
    generator = torch.Generator().manual_seed(5)
    groups = torch.randn(200, 32, generator=generator)
    importance = torch.rand(32, generator=generator) ** 4 * 100

    def loss(rule: grids.FitRule, weigh: torch.Tensor | None) -> torch.Tensor:
        scale, zero = grids.fit_grid(groups, rule, weigh)
        codes = grids.quantize(groups, scale[:, None], zero[:, None], 32, rule.max_code)
        error = groups - grids.dequantize(codes, scale[:, None], zero[:, None], 32)
        return (error.square() * importance).sum(1)

    plain, searched = grids.FitRule(3, False, torch.float32), grids.FitRule(3, False, torch.float32, 31, polish=2)
    assert (loss(searched, importance) <= loss(plain, None) * (1 + 1e-5)).all()
    assert loss(searched, importance).mean() < 0.9 * loss(searched, None).mean()


def test_float_zero_is_no_worse_than_integer_zero() -> None:
    groups = torch.randn(500, 64, generator=torch.Generator().manual_seed(6)) + 0.3
    losses = []
    for float_zero in (False, True):
        rule = grids.FitRule(2, False, torch.float32, 31, polish=3, float_zero=float_zero)
        scale, zero = grids.fit_grid(groups, rule)
        codes = grids.quantize(groups, scale[:, None], zero[:, None], 64, 3)
        losses.append(float((groups - grids.dequantize(codes, scale[:, None], zero[:, None], 64)).square().sum()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_constant_groups(symmetric: bool) -> None:
    weight = torch.zeros(2, 8)
    weight[1] = 0.75
    rule = grids.FitRule(4, symmetric, torch.float32, 11, polish=1)
    scale, zero = grids.fit_grid(grids.split_groups(weight, 8), rule)
    again = grids.dequantize(grids.quantize(weight, scale, zero, 8, 15), scale, zero, 8)
    torch.testing.assert_close(again, weight, rtol=1e-6, atol=0)


def test_ragged_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="10 input features are not a multiple of group_size 4"):
        grids.split_groups(torch.zeros(2, 10), 4)
