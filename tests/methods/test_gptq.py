"""GPTQ: what the method promises, on random layers with correlated inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.methods import gptq, rtn
from compress.types import LayerState, Statistic

PLAIN: dict[str, Any] = {"damping": 0.01, "clip_search": False, "refinements": 0, "targets": "layer", "order": "none"}


def make_layer(
    rows: int = 12, columns: int = 64, seed: int = 0, drift: float = 0.0
) -> tuple[Tensor, Statistic, Tensor]:
    """Weight, statistic of correlated inputs, and the rows ``(T, 2 I)``: as the layer sees them, and as it should."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    dense = torch.randn(8 * columns, columns, generator=generator) @ mix
    seen = dense + drift * dense.std() * torch.randn(dense.shape, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    statistic = Statistic(len(seen), seen.T @ seen, (dense - seen).T @ seen)
    return weight, statistic, torch.cat([seen, dense], dim=1)


def error_of(weight: Tensor, state: LayerState, gram: Tensor) -> float:
    difference = (weight - state.weight).double()
    return float(((difference @ gram.double()) * difference).sum())


def run(weight: Tensor, statistic: Statistic | None, dtype: torch.dtype = torch.float32, **fields: Any) -> LayerState:
    return gptq.compress(LayerState(weight), statistic, gptq.Config(**fields), dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_diagonal_gram_equals_round_to_nearest_exactly(bits: int, symmetric: bool) -> None:
    weight, _, _ = make_layer()
    statistic = Statistic(100, torch.diag(torch.rand(64) + 0.1))
    state = run(weight, statistic, bits=bits, group_size=16, symmetric=symmetric, **PLAIN)
    plain = rtn.Config(bits=bits, group_size=16, symmetric=symmetric)  # type: ignore[arg-type]
    nearest = rtn.compress(LayerState(weight), None, plain, torch.float32)
    assert torch.equal(state.weight, nearest.weight) and torch.equal(state.codes, nearest.codes)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_beats_round_to_nearest_on_correlated_inputs(order: str) -> None:
    wins = 0
    for seed in range(20):
        weight, statistic, _ = make_layer(seed=seed)
        state = run(weight, statistic, bits=3, group_size=16, **{**PLAIN, "order": order})
        nearest = rtn.compress(LayerState(weight), None, rtn.Config(bits=3, group_size=16), torch.float32)
        wins += error_of(weight, state, statistic.gram) < error_of(weight, nearest, statistic.gram)
    assert wins >= 19


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_and_refinement_each_lower_the_error(bits: int) -> None:
    totals = [0.0, 0.0, 0.0]
    for seed in range(5):
        weight, statistic, _ = make_layer(seed=seed)
        for k, fields in enumerate(
            (PLAIN, {**PLAIN, "clip_search": True}, {**PLAIN, "clip_search": True, "refinements": 2})
        ):
            totals[k] += error_of(weight, run(weight, statistic, bits=bits, group_size=16, **fields), statistic.gram)
    assert totals[2] < 0.95 * totals[1] and totals[1] < totals[0]


@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
@pytest.mark.parametrize("group_size", [8, 24, 64, -1])
def test_block_size_changes_nothing(order: str, group_size: int) -> None:
    weight, statistic, _ = make_layer(columns=192 if group_size != 64 else 128)
    results = [
        run(weight, statistic, bits=3, group_size=group_size, order=order, targets="layer", block_size=size).codes
        for size in (1, 32, 200)
    ]
    for other in results[1:]:
        assert torch.equal(other, results[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("float_zero", [True, False])
def test_state_is_consistent_storable_and_repeatable(order: str, symmetric: bool, float_zero: bool) -> None:
    if symmetric and float_zero:
        with pytest.raises(ValueError, match="float_zero"):
            gptq.Config(symmetric=True, float_zero=True)
        return
    weight, statistic, _ = make_layer(drift=0.2)
    fields = {"bits": 3, "group_size": 16, "order": order, "symmetric": symmetric, "float_zero": float_zero}
    state = run(weight, statistic, torch.bfloat16, **fields)
    grid, codes = state.grid, state.codes
    assert grid is not None and codes is not None and codes.dtype == torch.uint8 and int(codes.max()) <= 7
    assert torch.equal(grid.scale.bfloat16().float(), grid.scale)
    assert float_zero or torch.equal(grid.zero, grid.zero.round().clamp(0, 7))
    assert not symmetric or bool((grid.zero == 4).all())
    wide, shift = grid.scale.repeat_interleave(16, 1), grid.zero.repeat_interleave(16, 1)
    assert torch.equal(state.weight, (codes.float() - shift) * wide)
    again = run(weight, Statistic(statistic.tokens, statistic.gram, statistic.cross), torch.bfloat16, **fields)
    assert torch.equal(again.weight, state.weight)


def test_rows_are_independent_so_that_layers_may_be_stacked() -> None:
    weight, statistic, _ = make_layer(drift=0.2)
    together = run(weight, statistic, bits=3, group_size=16)
    parts = [run(part, statistic, bits=3, group_size=16).weight for part in weight.split([5, 7])]
    torch.testing.assert_close(torch.cat(parts), together.weight, rtol=1e-5, atol=1e-5)


def test_dense_targets_come_closer_to_the_dense_output() -> None:
    wins = 0
    for seed in range(10):
        weight, statistic, rows = make_layer(seed=seed, drift=0.3)
        seen, dense = rows.chunk(2, dim=1)
        errors = []
        for targets in ("layer", "dense"):
            state = run(weight, statistic, bits=4, group_size=16, targets=targets, shrinkage=1.0)
            errors.append(float((dense @ weight.T - seen @ state.weight.T).square().sum()))
        wins += errors[1] < errors[0]
    assert wins == 10


def test_equal_streams_make_dense_targets_plain_gptq() -> None:
    weight, statistic, _ = make_layer()
    same = Statistic(statistic.tokens, statistic.gram, torch.zeros(64, 64))
    one = run(weight, same, bits=3, group_size=16, targets="dense", shrinkage=1.0)
    assert torch.equal(one.weight, run(weight, same, bits=3, group_size=16, targets="layer").weight)


def test_dead_columns_and_escalations_are_noted() -> None:
    weight, statistic, _ = make_layer()
    statistic.gram[5], statistic.gram[:, 5] = 0, 0
    state = run(weight, Statistic(100, statistic.gram), bits=4, group_size=16, targets="layer")
    assert state.notes["dead_columns"] == 1 and state.notes["damping_escalations"] == 0
    assert float(state.weight[:, 5].abs().max()) == 0
    rank_one = torch.ones(64, 64)
    state = run(weight, Statistic(1, rank_one), bits=4, group_size=16, targets="layer", damping=0.0)
    assert state.notes["damping_escalations"] > 0 and state.notes["damping"] > 0


@pytest.mark.parametrize("statistic", [None, Statistic(0, torch.zeros(64, 64))])
def test_no_tokens_falls_back_to_rounding_and_says_so(statistic: Statistic | None) -> None:
    weight, _, _ = make_layer()
    state = run(weight, statistic, bits=4, group_size=16)
    assert state.notes["fallback"] == "no calibration tokens: round to nearest"
    plain = rtn.Config(bits=4, group_size=16, clip_search=True)
    assert torch.equal(state.weight, rtn.compress(LayerState(weight), None, plain, torch.float32).weight)


def test_needs_follow_the_config() -> None:
    assert gptq.needs(gptq.Config(targets="layer")) == {"gram"}
    assert gptq.needs(gptq.Config(targets="dense", shrinkage=0.0)) == {"gram"}
    assert gptq.needs(gptq.Config(targets="dense", shrinkage=1.0)) == {"gram", "cross"}
    assert gptq.needs(gptq.Config(targets="stream", shrinkage=1.0)) == {"gram", "cross", "residual"}


def test_a_cross_of_half_the_rows_counts_double() -> None:
    weight, whole, _ = make_layer(drift=0.2)
    assert whole.cross is not None
    half = Statistic(whole.tokens, whole.gram, whole.cross / 2, cross_tokens=whole.tokens // 2)
    fields = {"bits": 3, "group_size": 16, "targets": "dense", "correction_damping": 0.0}
    assert torch.equal(run(weight, half, **fields).weight, run(weight, whole, **fields).weight)


def test_residual_of_the_stream_is_made_up_for() -> None:
    weight, statistic, rows = make_layer(drift=0.2)
    seen, dense = rows.chunk(2, dim=1)
    lost = seen @ torch.randn(64, 12, generator=torch.Generator().manual_seed(8))
    statistic.residual = lost.T @ seen
    errors = []
    for targets in ("dense", "stream"):
        state = run(weight, statistic, bits=4, group_size=16, targets=targets, shrinkage=1.0, correction_damping=0.0)
        errors.append(float((dense @ weight.T + lost - seen @ state.weight.T).square().sum()))
    assert errors[1] < 0.1 * errors[0]
