"""Gram matrices, cross terms and token weights against sums in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build_model, make_windows
from torch import Tensor, nn

from compress.walk.coroutine import BlockWalk
from compress.walk.hidden import Hidden
from compress.walk.skeleton import Skeleton
from compress.walk.statistics import accumulate, make_token_weights, observe, read_held_out
from compress.walk.stream import Call, Calls, capture

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
                if kind == "residual" and group.writes:
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
            held_out = read_held_out(group)
            assert held_out.shape[1] == features
            assert torch.equal(held_out, torch.cat([one.x for one in group.rows(held_out=True)] or [held_out]))


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
            wanted = accumulate(group)
            assert calibration.tokens == wanted.tokens
            assert torch.equal(calibration.gram, wanted.gram)
            assert torch.equal(held_out, read_held_out(group))


WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "phi3": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "mixtral": ["self_attn.o_proj"],
    "gemma2": [],  # its branches go through a norm before they are added
    "gptj": [],  # both branches are added at once
}


@pytest.mark.parametrize("name", WRITERS)
def test_layers_that_write_to_the_residual_stream_are_found(name: str) -> None:
    with _walk_beside_dense(name)[0] as walk:
        found = [one.removeprefix("model.decoder.layers.0.").removeprefix("model.layers.0.") for one in walk.writers]
        assert sorted(one.removeprefix("transformer.h.0.") for one in found) == sorted(WRITERS[name])


def test_residual_is_what_the_stream_lost_before_a_writer_adds_to_it() -> None:
    walk, blocks, (hidden, dense_hidden), calls = _walk_beside_dense("llama")
    with walk:
        for group in walk.groups():
            found = accumulate(group, cross=True)
            name = group.specs[0].name.rpartition(".")[2]
            assert (found.residual is not None) == (name in ("o_proj", "down_proj"))
            if found.residual is None:
                continue
            expected = torch.zeros(*group.specs[0].shape, dtype=torch.float64)
            for n in range(2):
                streams = [
                    _stream_before(block, states.read(n), calls[0], name)
                    for block, states in zip(blocks, (hidden, dense_hidden), strict=True)
                ]
                x = next(rows.x for rows in group.rows() if rows.window == n)
                expected += (streams[1] - streams[0]).double().T @ x.double()
            torch.testing.assert_close(found.residual.double(), expected, rtol=1e-3, atol=1e-4)


def _walk_beside_dense(name: str) -> tuple[BlockWalk, list[nn.Module], tuple[Hidden, Hidden], Calls]:
    """Two windows through block 0 and, with other hidden states, through its copy."""
    skeleton = Skeleton.from_model(build_model(name))
    hidden, calls = capture(skeleton, make_windows([12, 12]))
    dense_hidden = Hidden.create(None, hidden.lengths, hidden.width, hidden.dtype)
    torch.manual_seed(0)
    for n in range(2):
        states = hidden.read(n)
        dense_hidden.write(n, states + 0.1 * torch.randn_like(states))
    block = skeleton.load_block(0)
    dense = copy.deepcopy(block)
    walk = BlockWalk(block, skeleton.block_specs(0), hidden, calls[0], dense_block=dense, dense_inputs=dense_hidden)
    return walk, [block, dense], (hidden, dense_hidden), calls


@torch.no_grad()
def _stream_before(block: nn.Module, hidden: Tensor, calls: dict[int, Call], layer: str) -> Tensor:
    """The residual stream ``(T, D)`` that ``o_proj`` or ``down_proj`` of a Llama block adds to, written out by hand."""
    if layer == "o_proj":
        return hidden[0]
    attention = block.self_attn(hidden_states=block.input_layernorm(hidden), **calls[hidden.shape[1]].kwargs)[0]
    return (hidden + attention)[0]
