"""Rounding of inputs: by the letter of the formula, outliers left alone, groups with scales of their own."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.activations import find_outliers, group_by_range, round_rows
from compress.types import ActivationRule


def rows(count: int = 9, features: int = 24) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(0))


def round_slowly(x: list[float], stay: set[int]) -> list[float]:
    peak = max([abs(v) for i, v in enumerate(x) if i not in stay], default=0.0)
    return [v if i in stay or peak == 0 else round(v * 127 / peak) * peak / 127 for i, v in enumerate(x)]


@pytest.mark.parametrize("threshold", [0.0, 1.5, 100.0])
def test_equals_a_loop(threshold: float) -> None:
    x = rows()
    stay = {i for i in range(24) if threshold > 0 and float(x[:, i].abs().max()) >= threshold}
    assert bool(stay) == (threshold == 1.5)
    wanted = torch.tensor([round_slowly(row.tolist(), stay) for row in x])
    torch.testing.assert_close(round_rows(x, ActivationRule(threshold=threshold)), wanted, rtol=1e-6, atol=1e-6)


def test_the_example_of_the_docstring() -> None:
    x = torch.tensor([[127.0, 1.4, -60.0]])
    assert round_rows(x, ActivationRule()).tolist() == [[127.0, 1.0, -60.0]]


def test_kept_features_are_untouched_and_do_not_count() -> None:
    x = rows()
    x[:, 7] *= 1000
    kept = torch.tensor([7])
    got = round_rows(x, ActivationRule(), kept)
    assert torch.equal(got[:, 7], x[:, 7])
    rest = torch.arange(24) != 7
    assert torch.equal(got[:, rest], round_rows(x[:, rest], ActivationRule()))
    assert float((round_rows(x, ActivationRule())[:, rest] - x[:, rest]).norm()) > 20 * float((got - x).norm())


def test_zeros_nothing_and_any_shape() -> None:
    assert torch.equal(round_rows(torch.zeros(2, 5), ActivationRule()), torch.zeros(2, 5))
    assert round_rows(torch.zeros(0, 5), ActivationRule()).shape == (0, 5)
    x = rows(12).to(torch.bfloat16)
    assert torch.equal(
        round_rows(x.reshape(3, 4, 24), ActivationRule()).reshape(12, 24), round_rows(x, ActivationRule())
    )
    assert round_rows(x, ActivationRule()).dtype == torch.bfloat16


def test_tokens_scale_alone_and_their_order_does_not_matter() -> None:
    x = rows()
    longer = x.clone()
    longer[3] *= 4
    got, scaled = round_rows(x, ActivationRule()), round_rows(longer, ActivationRule())
    assert torch.equal(scaled[3], got[3] * 4) and torch.equal(scaled[:3], got[:3])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    rule = ActivationRule(threshold=1.5)
    assert torch.equal(round_rows(x[order], rule), round_rows(x, rule)[order])


def test_the_error_is_at_most_half_a_step() -> None:
    x = rows()
    steps = x.abs().amax(1, keepdim=True) / 127
    assert bool(((round_rows(x, ActivationRule()) - x).abs() <= steps * 0.5001).all())


def test_one_group_is_none_and_one_per_feature_is_exact() -> None:
    x, zeros = rows(), torch.zeros(24, dtype=torch.uint8)
    assert torch.equal(round_rows(x, ActivationRule(groups=2), groups=zeros), round_rows(x, ActivationRule()))
    alone = round_rows(x, ActivationRule(groups=24), groups=torch.arange(24, dtype=torch.uint8))
    torch.testing.assert_close(alone, x, rtol=1e-6, atol=0)


def test_more_groups_by_range_lose_less() -> None:
    x = rows(200) * torch.logspace(-2, 2, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(2))]
    errors = []
    for count in (1, 2, 4, 8):
        groups = group_by_range(x.abs().amax(0), count)
        assert groups.bincount(minlength=count).tolist() == [24 // count] * count
        got = round_rows(x, ActivationRule(groups=count), groups=None if count == 1 else groups)
        errors.append(float(((got - x) / x.abs().amax(0)).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 5


def test_outliers_are_features_that_any_token_reaches() -> None:
    x = torch.zeros(3, 4)
    x[1, 2], x[0, 3] = -6.0, 5.99
    assert find_outliers(x, 6.0).tolist() == [False, False, True, False]
    assert not bool(find_outliers(x, 0.0).any())
