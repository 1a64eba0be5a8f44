"""Orders of the visit: permutations, groups kept whole, undone exactly."""

from __future__ import annotations

import torch

from compress.numerics import order


def test_example_of_the_docstring() -> None:
    assert order.order_within_groups(torch.tensor([1.0, 5.0, 2.0, 9.0]), 2).tolist() == [3, 2, 1, 0]


def test_groups_stay_whole_and_fall() -> None:
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(0))
    permutation = order.order_within_groups(diagonal, 16)
    assert sorted(permutation.tolist()) == list(range(96))
    groups = (permutation // 16).reshape(6, 16)
    assert (groups == groups[:, :1]).all()
    maxima = diagonal[permutation].reshape(6, 16)
    assert (maxima[:, :-1] >= maxima[:, 1:]).all() and (maxima[:-1, 0] >= maxima[1:, 0]).all()


def test_activation_order_falls_and_inverts() -> None:
    diagonal = torch.rand(50, generator=torch.Generator().manual_seed(1))
    permutation = order.order_by_activation(diagonal)
    assert (diagonal[permutation][:-1] >= diagonal[permutation][1:]).all()
    assert torch.equal(permutation[order.invert_order(permutation)], torch.arange(50))
