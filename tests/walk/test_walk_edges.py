"""Edges: what may be rescaled in every architecture, and that rescaling it changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, OTHERS, build_model, make_windows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.walk.edges import find_edges, measure_ranges, measure_weights
from compress.walk.groups import Hooked
from compress.walk.skeleton import Skeleton
from compress.walk.stream import capture

GATED = {"v_proj -> o_proj", "up_proj -> down_proj"}
LLAMA = {"input_layernorm -> q_proj, k_proj, v_proj", "post_attention_layernorm -> gate_proj, up_proj"} | GATED
WANTED: dict[str, set[str]] = {
    **dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma"), LLAMA),
    **dict.fromkeys(
        ("gemma2", "gemma3"),
        {"input_layernorm -> q_proj, k_proj, v_proj", "pre_feedforward_layernorm -> gate_proj, up_proj"} | GATED,
    ),
    "phi3": {
        "input_layernorm -> qkv_proj",
        "post_attention_layernorm -> gate_up_proj",
        "qkv_proj -> o_proj",
        "gate_up_proj -> down_proj",
    },
    "gpt2": {"ln_1 -> c_attn", "ln_2 -> c_fc", "c_attn -> c_proj"},
    "opt": {
        "self_attn_layer_norm -> q_proj, k_proj, v_proj",
        "final_layer_norm -> fc1",
        "v_proj -> out_proj",
        "fc1 -> fc2",
    },
    "gptj": {"ln_1 -> q_proj, k_proj, v_proj, fc_in", "v_proj -> out_proj"},
    "gpt_neox": {
        "input_layernorm -> query_key_value",
        "post_attention_layernorm -> dense_h_to_4h",
        "query_key_value -> dense",
    },
    "mixtral": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "post_attention_layernorm -> " + ", ".join(["gate_up_proj"] * 4),
        "v_proj -> o_proj",
        "gate_up_proj -> down_proj",
    },
    "qwen3_moe": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "post_attention_layernorm -> " + ", ".join(["gate_up_proj"] * 8),
        "v_proj -> o_proj",
        "gate_up_proj -> down_proj",
    },
}


def rescale(model: Any, seed: int = 0) -> tuple[set[str], dict[str, str]]:
    """Scale every edge of every block by random factors, in place."""
    skeleton = Skeleton.from_model(model)
    inputs, calls = capture(skeleton, make_windows([16, 16]))
    names: set[str] = set()
    refused: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for i, path in enumerate(skeleton.blocks):
        block = model.get_submodule(path)
        before = copy.deepcopy(block.state_dict())
        hooked = Hooked(block, skeleton.block_specs(i))
        edges = find_edges(hooked, skeleton.block_specs(i), inputs.read(0)[:, :8], calls[i][8], inner=True)
        assert all(torch.equal(before[key], now) for key, now in block.state_dict().items()), "only looked at"
        refused |= edges.refused
        for edge in edges.found:
            names.add(edge.name.removeprefix(path + "."))
            for link in edge.links:
                count = len(link.maker.get_parameter("weight")) if link.rows is None else len(link.rows)
                link.scale(torch.rand(count, generator=generator).double() * 3 + 0.2)
        hooked.close()
    return names, refused


@torch.no_grad()
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_is_rescaled_computes_the_same(name: str) -> None:
    model = build_model(name, torch.float64)
    ids = torch.stack(make_windows([24, 24], seed=1))
    before = model(input_ids=ids).logits
    names, refused = rescale(model)
    after = model(input_ids=ids).logits
    assert names == WANTED[name]
    assert not refused
    # Gemma multiplies with 1 + weight in float32, and rounding in front of a norm computed in float32 shows.
    tolerance = 1e-5 if name.startswith("gemma") else 1e-6 if "moe" in name or name == "mixtral" else 1e-9
    assert float((after - before).norm() / before.norm()) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("name", list(OTHERS))
def test_architectures_that_no_table_knows(name: str) -> None:
    kind, options = OTHERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = torch.stack(make_windows([24, 24], seed=1))
    before = model(input_ids=ids).logits
    names, _ = rescale(model)
    assert float((model(input_ids=ids).logits - before).norm() / before.norm()) < 1e-6
    if name == "opt-350m":  # norms come after the branches: none stands in front of layers
        assert not any("norm" in one for one in names)
    if name == "phi":
        assert "input_layernorm -> q_proj, k_proj, v_proj, fc1" in names


class Hidden(nn.Module):
    """Reads a norm's output in a way that no hook sees."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.extra = nn.Parameter(torch.randn(32, 32) * 0.2)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        return self.block(x, **kwargs) + self.block.input_layernorm(x) @ self.extra


@torch.no_grad()
def test_a_reader_that_is_not_known_forbids_the_edge() -> None:
    model = build_model("llama")
    skeleton = Skeleton.from_model(model)
    inputs, calls = capture(skeleton, make_windows([16]))
    specs = skeleton.block_specs(0)
    block = model.get_submodule("model.layers.0")
    hooked = Hooked(block, specs)
    hooked.block = Hidden(block)
    edges = find_edges(hooked, specs, inputs.read(0)[:, :8], calls[0][8], inner=False)
    assert [edge.name for edge in edges.found] == ["block.post_attention_layernorm -> gate_proj, up_proj"]
    assert set(edges.refused) == {f"model.layers.0.self_attn.{one}_proj" for one in "qkv"}
    assert "more reads it than the layers that are known" in edges.refused["model.layers.0.self_attn.q_proj"]


@torch.no_grad()
def test_ranges_are_those_of_the_channels() -> None:
    """Grouped queries: a channel of v is read by several inputs of o, and the largest of them counts."""
    model = build_model("llama")
    skeleton = Skeleton.from_model(model)
    inputs, calls = capture(skeleton, make_windows([16, 12, 9]))
    specs, block = skeleton.block_specs(0), model.get_submodule("model.layers.0")
    hooked = Hooked(block, specs)
    edges = find_edges(hooked, specs, inputs.read(0)[:, :8], calls[0][8], inner=True).found
    ranges = measure_ranges(hooked, edges, inputs, [0, 1], calls[0])
    found = {edge.name: one for edge, one in zip(edges, ranges, strict=True)}
    norm, seen = block.input_layernorm, []
    handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].abs().amax(0)))
    for n in (0, 1):
        block(inputs.read(n), *calls[0][inputs.lengths[n]].args, **calls[0][inputs.lengths[n]].kwargs)
    handle.remove()
    wanted = torch.stack([norm(inputs.read(n))[0].abs().amax(0) for n in (0, 1)]).amax(0)
    torch.testing.assert_close(found["input_layernorm -> q_proj, k_proj, v_proj"][0], wanted)
    heads = torch.stack(seen).amax(0).reshape(2, 2, 8)  # (heads of v, queries that share one, features)
    torch.testing.assert_close(found["v_proj -> o_proj"][0], heads.amax(1).reshape(-1))
    link = next(edge for edge in edges if edge.name == "v_proj -> o_proj").links[0]
    columns = block.self_attn.o_proj.weight.abs().amax(0).reshape(2, 2, 8).amax(1).reshape(-1)
    torch.testing.assert_close(measure_weights(link, list(hooked.modules.values())), columns)
