"""LLM.int8(): the tests of METHODS 1, with outliers planted where plain int8 fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress.methods import llm_int8
from compress.numerics.activations import round_rows
from compress.types import LayerState, Statistic

TOKENS, INPUTS, OUTPUTS, PLANTED = 256, 512, 96, 77


def make_layer(size: float = 60.0) -> tuple[Tensor, Tensor, Statistic]:
    """N(0, 1) weights and inputs, one feature of magnitude ``size``."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(TOKENS, INPUTS, generator=generator)
    x[:, PLANTED] = size * torch.sign(x[:, PLANTED])
    magnitude = x.abs()
    empty = torch.zeros(0, 0)
    return weight, x, Statistic(TOKENS, empty, absmax=magnitude.amax(0), peaks=magnitude.amax(1))


def run(weight: Tensor, statistic: Statistic | None, **settings: Any) -> LayerState:
    return llm_int8.compress(LayerState(weight), statistic, llm_int8.Config(**settings), torch.float32)


def multiply(state: LayerState, x: Tensor) -> Tensor:
    """By integers: codes times codes in int32, scales behind, outlier features in floating point."""
    assert state.grid is not None and state.codes is not None and state.activations is not None
    kept = None if state.outliers is None else state.outliers.index
    stay = torch.zeros(x.shape[1], dtype=torch.bool)
    if state.activations.threshold > 0:
        stay |= (x.abs() >= state.activations.threshold).any(0)
    if kept is not None:
        stay[kept] = True
    inside = x.masked_fill(stay, 0.0)
    scale = inside.abs().amax(1, keepdim=True) / 127
    left = (inside / scale).round().to(torch.int64)
    right = state.codes.to(torch.int64) - 128
    product = (left @ right.T).double() * scale.double() * state.grid.scale[:, 0].double()
    return (product + x[:, stay].double() @ state.weight[:, stay].double().T).float()


def error(state: LayerState, weight: Tensor, x: Tensor) -> float:
    wanted = x @ weight.T
    return float((multiply(state, x) - wanted).norm() / wanted.norm())


def test_the_stand_in_is_the_integer_product() -> None:
    weight, x, statistic = make_layer()
    for settings in ({}, {"threshold": 0.0}, {"outliers": "static"}):
        state = run(weight, statistic, **settings)
        assert state.activations is not None
        kept = None if state.outliers is None else state.outliers.index
        read = round_rows(x, state.activations, kept)
        torch.testing.assert_close(read @ state.weight.T, multiply(state, x), rtol=1e-4, atol=1e-3)


def test_decomposition_restores_what_plain_int8_loses() -> None:
    """METHODS 1 (c): ten times less with 16-bit columns, five times with dequantized ones."""
    weight, x, statistic = make_layer()
    plain = error(run(weight, statistic, threshold=0.0), weight, x)
    dynamic = error(run(weight, statistic), weight, x)
    static = error(run(weight, statistic, outliers="static"), weight, x)
    assert plain > 5 * dynamic and plain > 10 * static and static < dynamic


def test_without_outliers_the_threshold_does_not_matter() -> None:
    weight, x, statistic = make_layer(size=1.0)
    a, b = run(weight, statistic, threshold=0.0), run(weight, statistic, threshold=1e6)
    assert torch.equal(a.weight, b.weight) and torch.equal(multiply(a, x), multiply(b, x))


def test_with_everything_an_outlier_nothing_is_rounded() -> None:
    weight, x, statistic = make_layer()
    state = run(weight, statistic, threshold=1e-9, outliers="static", max_outliers=INPUTS)
    torch.testing.assert_close(multiply(state, x), x @ weight.T, rtol=1e-4, atol=1e-3)


def test_the_bound_of_every_element() -> None:
    """METHODS 1 (e)."""
    weight, x, statistic = make_layer(size=1.0)
    state = run(weight, statistic, threshold=0.0)
    cx, cw = x.abs().amax(1)[:, None, None], weight.abs().amax(1)[None, :, None]
    bound = (weight.abs()[None] * cx / 254 + x.abs()[:, None] * cw / 254 + cx * cw / 254**2).sum(-1)
    assert bool(((multiply(state, x) - x @ weight.T).abs() <= bound * 1.001).all())


def test_the_grid_is_bitsandbytes_own() -> None:
    weight, _, statistic = make_layer()
    state = run(weight, statistic)
    assert state.grid is not None and state.codes is not None
    absmax = weight.abs().amax(1, keepdim=True)
    assert torch.equal(state.grid.scale, absmax / 127) and (state.grid.bits, state.grid.symmetric) == (8, True)
    assert torch.equal(state.codes.to(torch.int64) - 128, (weight * 127 / absmax).round().to(torch.int64))
    assert int(state.codes.min()) >= 1
    zeros = run(torch.zeros(4, INPUTS), statistic)
    assert bool((zeros.weight == 0).all()) and bool(torch.isfinite(zeros.grid.scale).all())  # type: ignore[union-attr]


def test_what_the_report_says_of_outliers() -> None:
    weight, x, statistic = make_layer()
    x[:5, 3] = 9.0
    statistic.absmax, statistic.peaks = x.abs().amax(0), x.abs().amax(1)
    notes = run(weight, statistic, threshold=7.0).notes
    assert notes["outlier_features"] == 2 and notes["outlier_index"] == [PLANTED, 3]
    assert notes["largest_input"] == 60.0 and notes["outlier_tokens"] == 1.0
    x[:, PLANTED] = 0.0
    statistic.absmax, statistic.peaks = x.abs().amax(0), x.abs().amax(1)
    assert run(weight, statistic, threshold=7.0).notes["outlier_tokens"] == pytest.approx(5 / TOKENS)
    many = run(weight, statistic, threshold=0.5).notes
    assert many["outlier_features"] > 32 and len(many["outlier_index"]) == 32


def test_a_static_list_is_short_and_exact() -> None:
    weight, _, statistic = make_layer()
    state = run(weight, statistic, outliers="static", threshold=1.0, max_outliers=3)
    assert state.outliers is not None and state.activations is not None
    assert len(state.outliers.index) == 3 and PLANTED in state.outliers.index.tolist()
    assert torch.equal(state.outliers.weight, weight[:, state.outliers.index])
    assert torch.equal(state.weight[:, state.outliers.index], state.outliers.weight)
    assert state.codes is not None and bool((state.codes[:, state.outliers.index] == 128).all())
    assert state.activations.threshold == 0.0 and state.notes["kept_features"] == 3
    none = run(weight, Statistic(0, torch.zeros(0, 0)), outliers="static")
    assert none.outliers is None and "no calibration tokens" in none.notes["fallback"]


def test_settings_that_mean_nothing() -> None:
    for wrong in ({"threshold": -1.0}, {"outliers": "some"}, {"max_outliers": 0}, {"bits": 8}):
        with pytest.raises(ValidationError):
            llm_int8.Config(**wrong)  # type: ignore[arg-type]
