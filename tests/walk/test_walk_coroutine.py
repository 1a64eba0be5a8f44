"""Groups of layers with one input, the rows they see while the block changes, and both ways to walk."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_models import ARCHITECTURES, MIXTURES, build_model, make_windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import NumericsError, UserError
from compress.types import LayerSpec
from compress.walk.coroutine import BlockWalk
from compress.walk.hidden import Hidden
from compress.walk.layers import get_weight, set_weight
from compress.walk.memory import estimate_live_bytes
from compress.walk.skeleton import Skeleton
from compress.walk.stream import Call, Calls, capture, run_block

LENGTHS = [24, 24, 13]


def prepare(name: str, lengths: list[int] | None = None) -> tuple[Skeleton, Hidden, Calls]:
    skeleton = Skeleton.from_model(build_model(name))
    return skeleton, *capture(skeleton, make_windows(lengths or LENGTHS))


def damage(weight: Tensor) -> Tensor:
    """A change that every later layer notices."""
    return (weight * 4).round() / 4


def like(hidden: Hidden) -> Hidden:
    return Hidden.create(None, hidden.lengths, hidden.width, hidden.dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_are_the_siblings_of_the_table(name: str) -> None:
    skeleton, hidden, calls = prepare(name)
    specs = skeleton.block_specs(0)
    with BlockWalk(skeleton.load_block(0), specs, hidden, calls[0]) as walk:
        groups = [group.specs for group in walk.input_groups()]
    prefix = skeleton.blocks[0] + "."
    plain = [tuple(spec.name.removeprefix(prefix) for spec in one) for one in groups if one[0].kind != "expert"]
    assert tuple(plain) == ARCHITECTURES[name].groups
    experts = [spec for one in groups for spec in one if spec.kind == "expert"]
    assert experts == [spec for spec in specs if spec.kind == "expert"], "index order, gate_up before down"
    assert sorted(spec.name for one in groups for spec in one) == sorted(spec.name for spec in specs)


def hooked_inputs(block: nn.Module, spec: LayerSpec, hidden: Hidden, calls: Calls, n: int) -> Tensor:
    """The slow reference: run the whole block as it is now and look at one layer's input."""
    seen: list[Tensor] = []
    path = next(path for path, _ in block.named_modules() if path and spec.name.endswith("." + path))
    handle = block.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        run_block(block, hidden.read(n), calls[0][hidden.lengths[n]])
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize(
    ("name", "suspend"),
    [(name, True) for name in ARCHITECTURES if name not in MIXTURES] + [("llama", False), ("gptj", False)],
)
def test_rows_are_the_inputs_in_the_block_as_compressed_so_far(name: str, suspend: bool) -> None:
    skeleton, hidden, calls = prepare(name)
    block = skeleton.load_block(0)
    reference = copy.deepcopy(block)
    with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0], suspend=suspend) as walk:
        for group in walk.groups():
            for rows in group.rows():
                assert rows.positions is None
                assert rows.dense is None
                assert torch.equal(rows.x, hooked_inputs(reference, group.specs[0], hidden, calls, rows.window))
            for spec in group.specs:
                changed = damage(get_weight(block, spec))
                set_weight(block, spec, changed)
                set_weight(reference, spec, changed)
        out = like(hidden)
        walk.outputs(out)
    for n, length in enumerate(hidden.lengths):
        with torch.no_grad():
            assert torch.equal(out.read(n), run_block(reference, hidden.read(n), calls[0][length]))


def record(name: str, suspend: bool) -> Iterator[Tensor]:
    """Everything that a walk with a dense stream and a held-out window shows, with changes in between."""
    skeleton, hidden, calls = prepare(name)
    block, dense = skeleton.load_block(0), copy.deepcopy(skeleton.load_block(0))
    dense_hidden = Hidden.create(None, hidden.lengths[:2], hidden.width, hidden.dtype)
    for n in range(2):
        dense_hidden.write(n, hidden.read(n) * 1.01)
    options = {"dense_block": dense, "dense_inputs": dense_hidden, "held_out": [1], "suspend": suspend}
    with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0], **options) as walk:
        for group in walk.groups():
            for held_out in (False, True):
                for rows in group.rows(held_out):
                    assert (rows.window == 1) == held_out
                    yield rows.x.clone()
                    assert (rows.dense is not None) == (rows.window < 2 and group.specs[0].kind != "expert")
                    if rows.dense is not None:
                        yield rows.dense.clone()
            for spec in group.specs:
                set_weight(block, spec, damage(get_weight(block, spec)))
        out, dense_out = like(hidden), like(dense_hidden)
        walk.outputs(out, dense_out)
    yield from (out.read(n) for n in range(3))
    for n in range(2):
        yield dense_out.read(n)
        with torch.no_grad():
            assert torch.equal(dense_out.read(n), run_block(dense, dense_hidden.read(n), calls[0][hidden.lengths[n]]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma3", *MIXTURES])
def test_suspended_and_rerun_walks_are_bit_identical(name: str) -> None:
    first, second = list(record(name, True)), list(record(name, False))
    assert len(first) == len(second) > 10
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_dense_windows_may_be_any() -> None:
    skeleton, hidden, calls = prepare("llama")
    block = skeleton.load_block(0)
    dense_hidden = Hidden.create(None, hidden.lengths[2:], hidden.width, hidden.dtype)
    dense_hidden.write(0, hidden.read(2))
    options = {"dense_block": copy.deepcopy(block), "dense_inputs": dense_hidden, "dense_windows": [2]}
    with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0], **options) as walk:
        for group in walk.groups():
            for rows in group.rows():
                assert (rows.dense is not None) == (rows.window == 2)
                if rows.dense is not None:
                    assert torch.equal(rows.dense, rows.x), "nothing has been compressed"


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_see_the_rows_that_the_router_sends(name: str) -> None:
    skeleton, hidden, calls = prepare(name)
    block = skeleton.load_block(0)
    choices: list[Tensor] = []
    inputs: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append(args[0].clone())
        choices.append(args[1].clone())

    handle = block.mlp.experts.register_forward_pre_hook(note, with_kwargs=True)
    for n, length in enumerate(hidden.lengths):
        with torch.no_grad():
            run_block(block, hidden.read(n), calls[0][length])
    handle.remove()
    with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0]) as walk:
        for group in walk.groups():
            spec = group.specs[0]
            if spec.kind != "expert":
                continue
            found = {rows.window: rows for rows in group.rows()}
            for n in range(len(hidden)):
                token = (choices[n] == spec.index).any(dim=1).nonzero()[:, 0]
                assert (len(found[n].x) if n in found else 0) == len(token)
                if n in found:
                    assert sorted(found[n].positions.tolist()) == token.tolist()
                    if spec.name.endswith("gate_up_proj"):
                        assert torch.equal(found[n].x, inputs[n][found[n].positions])


def test_an_expert_that_no_token_reaches_has_an_empty_group() -> None:
    skeleton, hidden, calls = prepare("qwen3_moe")
    block = skeleton.load_block(0)
    with torch.no_grad():
        block.mlp.gate.weight[5] = 0
        block.mlp.gate.weight[:5] *= 10
    with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0]) as walk:
        tokens = {group.specs[0].name: sum(len(rows.x) for rows in group.rows()) for group in walk.groups()}
    assert len(tokens) == 2 + 2 * 8
    assert tokens["model.layers.0.mlp.experts.5.down_proj"] == 0
    routed = sum(count for name, count in tokens.items() if name.endswith("experts.0.gate_up_proj"))
    assert 0 < routed < sum(hidden.lengths)
    assert sum(count for name, count in tokens.items() if "gate_up" in name) == 2 * sum(hidden.lengths)


@pytest.mark.parametrize("name", ["llama", "gptj", "mixtral"])
def test_one_pass_observes_what_unchanged_groups_show(name: str) -> None:
    skeleton, hidden, calls = prepare(name)
    block, specs = skeleton.load_block(0), skeleton.block_specs(0)
    seen: dict[tuple[int, int], Tensor] = {}
    with BlockWalk(block, specs, hidden, calls[0]) as walk:
        walk.observe(lambda group, rows: seen.__setitem__((group.index, rows.window), rows.x.clone()))
        out = like(hidden)
        for spec in specs:
            set_weight(block, spec, damage(get_weight(block, spec)))
        walk.outputs(out)
        for n, length in enumerate(hidden.lengths):
            with torch.no_grad():
                assert torch.equal(out.read(n), run_block(block, hidden.read(n), calls[0][length]))
    fresh = Skeleton.from_model(build_model(name))
    with BlockWalk(fresh.load_block(0), specs, hidden, calls[0]) as walk:
        again = {(group.index, rows.window): rows.x.clone() for group in walk.groups() for rows in group.rows()}
    assert seen.keys() == again.keys()
    assert all(torch.equal(seen[key], again[key]) for key in seen)


def test_layers_left_out_of_the_walk_do_not_pause_it() -> None:
    skeleton, hidden, calls = prepare("llama")
    specs = [spec for spec in skeleton.block_specs(0) if "k_proj" in spec.name or "down" in spec.name]
    with BlockWalk(skeleton.load_block(0), specs, hidden, calls[0]) as walk:
        assert [group.specs for group in walk.groups()] == [(spec,) for spec in specs]
    with BlockWalk(skeleton.load_block(0), [], hidden, calls[0]) as walk:
        assert list(walk.groups()) == []
        out = like(hidden)
        walk.outputs(out)
    with torch.no_grad():
        assert torch.equal(out.read(2), run_block(skeleton.load_block(0), hidden.read(2), calls[0][13]))


class ListOfExperts(nn.Module):
    """A block whose experts are plain linears in a list, of which a window may reach any, in an order of its own."""

    def __init__(self, sorted_order: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(3))
        self.sorted_order = sorted_order

    def forward(self, hidden: Tensor) -> Tensor:
        first = hidden[0, :, 0].long().unique(sorted=True).tolist()
        order = first if self.sorted_order else sorted(first, key=lambda index: (hidden.shape[1] * index) % 3)
        hidden = hidden + self.inner(hidden)
        for index in order:
            hidden = hidden + self.experts[index]["down"](self.experts[index]["up"](hidden))
        return hidden


def list_of_experts(sorted_order: bool) -> tuple[ListOfExperts, list[LayerSpec], Hidden, dict[int, Call]]:
    block = ListOfExperts(sorted_order)
    specs = [
        LayerSpec(f"layers.0.{path}", tuple(module.weight.shape), torch.float32, "linear", f"layers.0.{path}.weight")
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    hidden = Hidden.create(None, [10, 5], 4, torch.float32)
    for n, reached in enumerate(([1], [0, 1, 2])):
        window = torch.randn(hidden.lengths[n], 4)
        window[:, 0] = torch.tensor(reached).repeat(10)[: len(window)]
        hidden.write(n, window)
    return block, specs, hidden, {10: Call(), 5: Call()}


@pytest.mark.parametrize("suspend", [True, False])
def test_layers_that_only_some_windows_reach_have_groups_too(suspend: bool) -> None:
    block, specs, hidden, calls = list_of_experts(sorted_order=True)
    with BlockWalk(block, specs, hidden, calls, suspend=suspend) as walk:
        seen = {group.specs[0].name: [rows.window for rows in group.rows()] for group in walk.groups()}
        walk.outputs(like(hidden))
    assert list(seen) == [spec.name for spec in specs]
    assert seen["layers.0.inner"] == [0, 1]
    assert seen["layers.0.experts.1.down"] == [0, 1]
    assert seen["layers.0.experts.2.up"] == [1]


def test_an_order_that_depends_on_the_tokens_is_refused() -> None:
    block, specs, hidden, calls = list_of_experts(sorted_order=False)
    with (
        BlockWalk(block, specs, hidden, calls) as walk,
        pytest.raises(UserError, match="order of layers depends on the tokens"),
    ):
        walk.outputs(like(hidden))


@pytest.mark.parametrize("suspend", [True, False])
def test_a_walk_that_is_given_up_leaves_the_block_clean(suspend: bool) -> None:
    skeleton, hidden, calls = prepare("mixtral")
    block = skeleton.load_block(0)

    def interrupted() -> None:
        with BlockWalk(block, skeleton.block_specs(0), hidden, calls[0], suspend=suspend) as walk:
            for group in walk.groups():
                if group.index == 4:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not any("forward" in module.__dict__ for module in block.modules())
    assert torch.is_grad_enabled()


def test_activations_that_are_not_finite_are_counted() -> None:
    skeleton, hidden, calls = prepare("llama")
    poisoned = hidden.read(1)
    poisoned[0, 3, 2] = float("inf")
    hidden.write(1, poisoned)
    with BlockWalk(skeleton.load_block(0), skeleton.block_specs(0), hidden, calls[0]) as walk:
        group = next(walk.groups())
        with pytest.raises(NumericsError, match=r"model.layers.0: 1 of 768 values.*q_proj.*window 1"):
            list(group.rows())
        with pytest.raises(NumericsError, match="output are not finite in window 1"):
            walk.outputs(like(hidden))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_estimate_of_a_waiting_window_is_close_to_what_it_holds(name: str) -> None:
    skeleton, hidden, calls = prepare(name, [64, 64])
    model: PreTrainedModel = skeleton.model
    with BlockWalk(skeleton.load_block(0), skeleton.block_specs(0), hidden, calls[0]) as walk:
        held = max(walk.live_bytes() for _ in walk.groups()) / 2
    estimate = estimate_live_bytes(model.config, skeleton.block_specs(0), 64, 4)
    assert 0.9 * held <= estimate <= 1.4 * held
