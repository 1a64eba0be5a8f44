"""Counting values that are not finite, also across the chunks that are looked at."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_counts_nan_and_both_infinities_in_every_chunk(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "CHUNK", 16)
    values = torch.zeros(10, 7, dtype=dtype)
    values[0, 0], values[4, 3], values[9, 6] = float("nan"), float("inf"), -float("inf")
    assert finite.count_nonfinite(values) == 3
    assert finite.count_nonfinite(values.t()) == 3
    assert finite.count_nonfinite(torch.zeros(10, dtype=dtype)) == 0


def test_integers_and_empty_tensors_are_finite() -> None:
    assert finite.count_nonfinite(torch.ones(5, dtype=torch.int32)) == 0
    assert finite.count_nonfinite(torch.zeros(0)) == 0
