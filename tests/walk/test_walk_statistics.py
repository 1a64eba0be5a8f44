"""Gram matrices, cross terms and token weights against sums in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build_model, make_windows
from torch import Tensor

from compress.walk.coroutine import BlockWalk
from compress.walk.hidden import Hidden
from compress.walk.skeleton import Skeleton
from compress.walk.statistics import accumulate, make_token_weights, observe
from compress.walk.stream import capture

LENGTHS = [24, 24, 13]
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of about 50 products


def weights_by_hand(hidden: Hidden, windows: list[int]) -> dict[int, Tensor]:
    raw = {n: 1 / hidden.read(n)[0].double().square().mean(dim=1) for n in range(len(hidden))}
    mean = torch.cat([raw[n] for n in windows]).mean()
    return {n: weight / mean for n, weight in raw.items()}


@pytest.mark.parametrize("kind", ["uniform", "residual"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_statistic_is_the_weighted_sum_of_outer_products(name: str, kind: str) -> None:
    skeleton = Skeleton.from_model(build_model(name))
    hidden, calls = capture(skeleton, make_windows(LENGTHS))
    block = skeleton.load_block(0)
    dense_hidden = Hidden.create(None, hidden.lengths[:1], hidden.width, hidden.dtype)
    dense_hidden.write(0, hidden.read(0) + 0.1)
    weights = make_token_weights(kind, hidden, held_out=[2])
    by_hand = weights_by_hand(hidden, [0, 1])
    options = {"dense_block": copy.deepcopy(block), "dense_inputs": dense_hidden, "held_out": [2]}
    with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0], **options) as walk:
        for group in walk.groups():
            features = group.specs[0].shape[1]
            gram, cross = torch.zeros(2, features, features, dtype=torch.float64)
            tokens = 0
            for rows in group.rows():
                x = rows.x.double()
                weight = torch.ones(len(x), dtype=torch.float64)
                if kind == "residual":
                    weight = by_hand[rows.window]
                    weight = weight if rows.positions is None else weight[rows.positions]
                tokens += len(x)
                for t in range(len(x)):
                    gram += weight[t] * torch.outer(x[t], x[t])
                    if rows.dense is not None:
                        cross += weight[t] * torch.outer(rows.dense[t].double() - x[t], x[t])
            found = accumulate(group, cross=True, weights=weights)
            assert found.tokens == tokens
            torch.testing.assert_close(found.gram.double(), gram, **CLOSE)
            torch.testing.assert_close(found.gram, found.gram.T, rtol=0, atol=0)
            if group.specs[0].kind == "expert":
                assert found.cross is None
                assert found.cross_tokens == 0
            else:
                assert found.cross is not None
                assert found.cross_tokens == LENGTHS[0]
                torch.testing.assert_close(found.cross.double(), cross, **CLOSE)
            held_out = accumulate(group, held_out=True)
            x = torch.cat([rows.x for rows in group.rows(held_out=True)] or [torch.zeros(0, features)]).double()
            assert held_out.tokens == len(x)
            torch.testing.assert_close(held_out.gram.double(), x.T @ x, **CLOSE)


def test_token_weights_have_mean_one_over_calibration_windows() -> None:
    skeleton = Skeleton.from_model(build_model("llama"))
    hidden, _ = capture(skeleton, make_windows(LENGTHS))
    assert make_token_weights("uniform", hidden) is None
    weights = make_token_weights("residual", hidden, held_out=[0])
    assert weights is not None
    mean = torch.cat([weights.read(1), weights.read(2)]).mean()
    torch.testing.assert_close(mean, torch.tensor(1.0))


def test_observed_statistics_equal_those_of_waiting_groups() -> None:
    skeleton = Skeleton.from_model(build_model("mixtral"))
    hidden, calls = capture(skeleton, make_windows(LENGTHS))
    with BlockWalk(skeleton.load_block(0), skeleton.block_specs(0), hidden, calls[0], held_out=[1]) as walk:
        seen = observe(walk)
        for (other, calibration, held_out), group in zip(seen, walk.groups(), strict=True):
            assert other.specs == group.specs
            for found, wanted in (
                (calibration, accumulate(group)),
                (held_out, accumulate(group, held_out=True)),
            ):
                assert found.tokens == wanted.tokens
                assert torch.equal(found.gram, wanted.gram)
