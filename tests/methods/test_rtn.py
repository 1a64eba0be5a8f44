"""Round to nearest: exact against a loop, all widths and groups."""

from __future__ import annotations

import pytest
import torch

from compress.methods import rtn
from compress.types import LayerState


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 32, -1])
def test_asymmetric_equals_a_loop(bits: int, group_size: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits))
    config = rtn.Config(bits=bits, group_size=group_size)  # type: ignore[arg-type]
    state = rtn.compress(LayerState(weight), None, config, torch.float32)
    assert state.grid is not None and state.codes is not None
    size = 64 if group_size == -1 else group_size
    assert state.grid.group_size == size and state.codes.dtype == torch.uint8
    for o in range(6):
        for g in range(64 // size):
            part = weight[o, g * size : (g + 1) * size]
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
            wanted = [min(max(round(float(w) / step + zero), 0), 2**bits - 1) for w in part]
            assert state.codes[o, g * size : (g + 1) * size].tolist() == wanted


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip_search", [True, False])
def test_weight_is_the_dequantization_and_rounding_twice_changes_nothing(symmetric: bool, clip_search: bool) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(9))
    config = rtn.Config(bits=4, group_size=32, symmetric=symmetric, clip_search=clip_search)
    state = rtn.compress(LayerState(weight, notes={"kept": 1}), None, config, torch.bfloat16)
    assert state.grid is not None and state.codes is not None and state.notes["kept"] == 1
    wide, shift = state.grid.scale.repeat_interleave(32, 1), state.grid.zero.repeat_interleave(32, 1)
    assert torch.equal(state.weight, (state.codes.float() - shift) * wide)
    assert rtn.needs(config) == frozenset()
