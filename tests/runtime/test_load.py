"""``compress.load``: folders of every format on the kernels, beside the dense model of their decoded weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from folders import LLAMA, MODELS, build_model, logits, random_state, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import UserError
from compress.eval.verify import compare_logits
from compress.kernels import library
from compress.numerics.packing import pack_codes
from compress.runtime.int8_linear import Int8Linear
from compress.runtime.linear import WeightLinear
from compress.runtime.load import load
from compress.storage.files import write_json
from compress.storage.formats.base import QuantSpec, load_format
from compress.types import ActivationRule, LayerState

NAMES = ("llama", "qwen3", "gpt2", "gemma", "gemma3_text", "phi3", "mixtral", "opt", "gptj")
# Relative RMS of logits. Both sums are in float32 (PyTorch's bf16 products accumulate so), in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MODELS.setdefault("qwen3", LLAMA)
MODELS.setdefault("gemma3_text", {**LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 8})

pytestmark = pytest.mark.skipif(not library.available(), reason="the kernels were not built here")


def differ(model: Any, other: Any) -> float:
    """Relative RMS of logits, tokens one by one with a cache too (that is what decoding is)."""
    prefill = compare_logits(logits(model), logits(other))["relative_rms"]
    return max(prefill, compare_logits(decode(model), decode(other))["relative_rms"])


@torch.no_grad()
def decode(model: Any) -> Tensor:
    """Logits ``(1, T, V)`` of a few tokens given one at a time."""
    cache, rows = None, []
    for token in (3, 14, 15, 92, 65):
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0].float())
    return torch.cat(rows)[None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_native_on_kernels_equals_the_decoded_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layers = write_folder(tmp_path / "out", build_model(name), load_format("native"), QuantSpec(4, 32, False))
    model, dense = (load(tmp_path / "out", dtype=dtype, kernels=mode) for mode in ("require", "off"))
    assert not model.training and model.dtype == dtype
    assert differ(model, dense) <= TOLERANCE[dtype]
    report = model.compress_report
    experts = {spec.name for spec, _ in layers if spec.kind == "expert"}
    assert set(report.decoded) == experts
    assert set(report.on_kernels) == {spec.name for spec, _ in layers} - experts
    assert len(report.merged) == {"llama": 4, "qwen3": 4, "gemma": 4, "gemma3_text": 4, "mixtral": 2, "opt": 2,
                                  "gptj": 2}.get(name, 0)  # fmt: skip
    assert bool(report.fused) == (name in ("llama", "qwen3")) == (report.not_fused is None)
    assert model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=5, do_sample=False).shape == (1, 8)
    assert not dense.compress_report.on_kernels and len(dense.compress_report.decoded) == len(layers)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("word", ["gptq", "compressed-tensors", "native"])
def test_formats_and_widths(word: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = build_model("llama", torch.float32)
    write_folder(tmp_path / "out", model, load_format(word), QuantSpec(bits, 32, symmetric))
    loaded = load(tmp_path / "out", kernels="require")
    assert len(loaded.compress_report.on_kernels) == 14
    assert differ(loaded, model) <= TOLERANCE[torch.float32]


def test_odd_widths_and_mixed_schemes(tmp_path: Path) -> None:
    model = build_model("llama", torch.float32)
    quants = {
        "model.layers.0.self_attn.q_proj": QuantSpec(5, 32, True),
        "model.layers.0.self_attn.k_proj": QuantSpec(1, 64, False),
        "model.layers.0.self_attn.v_proj": QuantSpec(3, -1, False, float_zero=True),
        "model.layers.0.mlp.up_proj": QuantSpec(4, 16, True),
    }
    write_folder(tmp_path / "out", model, load_format("native"), quants)
    loaded = load(tmp_path / "out", kernels="require")
    assert differ(loaded, model) <= TOLERANCE[torch.float32]
    report = loaded.compress_report
    assert set(report.decoded) == {"model.layers.0.mlp.up_proj"} and "16" in str(report)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert report.merged == []


def test_scales_keep_their_type(tmp_path: Path) -> None:
    """float32 scales of a float32 model stay so where the model is loaded in bfloat16."""
    model = build_model("llama", torch.float32)
    write_folder(tmp_path / "out", model, load_format("native"), QuantSpec(4, 32, False, float_zero=True))
    loaded = load(tmp_path / "out", dtype=torch.bfloat16)
    layer = loaded.model.layers[0].self_attn.o_proj
    assert isinstance(layer, WeightLinear)
    assert layer.scale.dtype == layer.zero.dtype == torch.float32
    assert torch.equal(layer.weight, model.model.layers[0].self_attn.o_proj.weight.to(torch.bfloat16))


def test_the_kernel_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", torch.float32)
    write_folder(tmp_path / "out", model, load_format("native"), QuantSpec(4, 32, True))
    reference = load(tmp_path / "out", kernels="reference")
    assert reference.compress_report.kernels == "the reference bodies"
    assert differ(reference, model) <= TOLERANCE[torch.float32]
    with pytest.raises(UserError, match="kernels='fast' is unknown; use auto"):
        load(tmp_path / "out", kernels="fast")  # type: ignore[arg-type]
    missing = {"problem": "no compiler was found", "in_use": None}
    monkeypatch.setattr(library, "describe", lambda: missing)
    with pytest.raises(UserError, match="kernels=require: no compiler was found"):
        load(tmp_path / "out", kernels="require")
    dense = load(tmp_path / "out")
    assert set(dense.compress_report.decoded.values()) == {"no compiler was found"}
    assert torch.equal(logits(dense), logits(model))


# -- other people's gptq folders --------------------------------------------------------------------------------------


def write_gptq(
    folder: Path, variant: str, groups: Tensor | None, bits: int = 4, symmetric: bool = False, **settings: Any
) -> Any:
    """A Llama as other tools write it; gives the dense model that it must equal. ``groups``: of each of 64 inputs."""
    model = build_model("llama", torch.float32)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(9)
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj"):
            stem = f"model.layers.{layer}.self_attn.{name}"
            rows = state[f"{stem}.weight"].shape[0]
            codes = torch.randint(2**bits, (rows, 64), generator=generator)
            zero = torch.randint(1, 2**bits, (rows, 2), generator=generator)
            zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
            scale = (torch.rand((rows, 2), generator=generator) * 0.02).half()
            order = torch.arange(64) // 32 if groups is None else groups
            weight = scale.float()[:, order] * (codes - zero[:, order])
            model.get_submodule(stem).weight.data.copy_(weight)
            del state[f"{stem}.weight"]
            state[f"{stem}.qweight"] = pack_codes(codes.t(), bits, dim=0)
            state[f"{stem}.qzeros"] = pack_codes((zero - int(variant == "gptq")).t(), bits)
            state[f"{stem}.scales"] = scale.t().contiguous()
            if groups is not None:
                state[f"{stem}.g_idx"] = groups.int()
            state[f"{stem}.bias"] = torch.zeros(rows, dtype=torch.float16)  # as some writers leave it everywhere
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": True}
    config = {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    write_json(folder / "config.json", {**config, "quantization_config": {**quantization, **settings}})
    return model


ORDERS = {
    "act-order": torch.randperm(64, generator=torch.Generator().manual_seed(2)) // 32,
    "in order": torch.arange(64) // 32,
    "no g_idx": None,
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", ["gptq", "gptq_v2"])
def test_gptq_of_other_people(variant: str, order: str, bits: int, tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "out", variant, ORDERS[order], bits, checkpoint_format=variant)
    loaded = load(tmp_path / "out", kernels="require")
    assert len(loaded.compress_report.on_kernels) == 6 and len(loaded.compress_report.merged) == 2
    assert (loaded.model.layers[0].self_attn.v_proj.order is not None) == (order == "act-order")
    assert differ(loaded, model) <= TOLERANCE[torch.float32]


def test_symmetric_zeros_of_v1_are_left_out(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "out", "gptq", None, symmetric=True)
    loaded = load(tmp_path / "out", kernels="require")
    assert loaded.model.layers[1].self_attn.k_proj.zero is None
    assert differ(loaded, model) <= TOLERANCE[torch.float32]


def test_groups_of_unequal_size_are_decoded(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "out", "gptq_v2", (torch.arange(64) >= 20).long(), checkpoint_format="gptq_v2")
    loaded = load(tmp_path / "out", kernels="require")
    assert len(loaded.compress_report.decoded) == 6
    assert "groups of 20 to 44 inputs" in str(loaded.compress_report)
    assert differ(loaded, model) <= TOLERANCE[torch.float32]


# -- folders that are damaged, or not what they say -------------------------------------------------------------------


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


STEM = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{STEM}.scales"), f"{STEM}.scales is missing"),
        (lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"][:1].clone()}), r"scales: got .*wanted"),
        (lambda t: t.update({f"{STEM}.qzeros": t[f"{STEM}.qzeros"].float()}), r"qzeros: got torch.float32"),
        (lambda t: t.update({f"{STEM}.g_idx": t[f"{STEM}.g_idx"] + 7}), "group numbers outside 0 to 1"),
        (lambda t: t.update({f"{STEM}.bias": torch.ones(3)}), r"bias: got \[3\], wanted \[64\]"),
        (lambda t: t.pop(f"{STEM}.qweight"), "do not match the model"),
        (lambda t: t.pop("model.norm.weight"), r"do not match the model \(model.norm.weight\)"),
        (lambda t: t.update(other=torch.ones(1)), r"do not match the model \(other\)"),
        (lambda t: t.update({"a.qweight": t[f"{STEM}.qweight"].clone()}), "a: the model has no such layer"),
    ],
)
def test_tensors_that_contradict(change: Any, message: str, tmp_path: Path) -> None:
    write_gptq(tmp_path / "out", "gptq", ORDERS["act-order"])
    change_tensors(tmp_path / "out", change)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "out", kernels="require")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "wanted torch.int32"),
        ({"group_size": 64}, "wanted"),
        ({"bits": 5}, "no gptq we know"),
        ({"checkpoint_format": "marlin"}, "'marlin' is no gptq we know"),
    ],
)
def test_configurations_that_contradict(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gptq(tmp_path / "out", "gptq", ORDERS["act-order"], **{})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"].update(settings)
    write_json(tmp_path / "out" / "config.json", config)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "out", kernels="require")


def test_a_file_cut_short(tmp_path: Path) -> None:
    write_gptq(tmp_path / "out", "gptq", None)
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated, 100 bytes are missing"):
        load(tmp_path / "out", kernels="require")


def test_compiled_it_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torch._inductor")
    write_folder(tmp_path / "out", build_model("llama", torch.float32), load_format("native"), QuantSpec(4, 32, True))
    model = load(tmp_path / "out", kernels="require")
    wanted = logits(model)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert compare_logits(logits(model), wanted)["relative_rms"] <= 1e-6


# -- int8 inputs ------------------------------------------------------------------------------------------------------

INT8 = {
    "bitsandbytes": QuantSpec(8, -1, True, activations=ActivationRule(8, 2.0)),
    "compressed-tensors": QuantSpec(8, -1, True, activations=ActivationRule(8)),
    "native": QuantSpec(8, -1, True, activations=ActivationRule(8, 2.0)),
}


@pytest.fixture
def codes_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random codes without 0, which is -128 in int8; scales as methods make them, positive."""

    def make(spec: Any, quant: QuantSpec, dtype: torch.dtype, seed: int = 0) -> LayerState:
        state = random_state(spec, quant, dtype, seed)
        assert state.grid is not None and state.codes is not None
        codes, scale = state.codes.clamp(min=1), (state.grid.scale.abs() * 127) / 127
        weight = scale * (codes.float() - 128)
        return LayerState(weight, dataclasses.replace(state.grid, scale=scale), codes, activations=quant.activations)

    monkeypatch.setattr(folders, "random_state", make)


@pytest.mark.usefixtures("codes_of_int8")
@pytest.mark.parametrize("word", INT8)
def test_int8_on_kernels_equals_rounded_inputs(word: str, tmp_path: Path) -> None:
    """A rounding that falls to the other side moves an input by a whole step, hence the room."""
    layers = write_folder(tmp_path / "out", build_model("llama", torch.float32), load_format(word), INT8[word])
    model, dense = (load(tmp_path / "out", kernels=mode) for mode in ("require", "off"))
    assert len(model.compress_report.on_kernels) == len(layers) == 14
    assert isinstance(model.model.layers[0].mlp.down_proj, Int8Linear)
    assert model.model.layers[0].mlp.down_proj.threshold == INT8[word].activations.threshold  # type: ignore[union-attr]
    assert differ(model, dense) <= 2e-2
    plain = load(tmp_path / "out", kernels="off")
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    assert differ(model, plain) > 0, "inputs are rounded"


@pytest.mark.usefixtures("codes_of_int8")
def test_a_layer_that_int8_kernels_can_not_take_still_rounds_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "out", build_model("llama", torch.float32), load_format("native"), INT8["native"])
    monkeypatch.setattr("compress.runtime.swap.make_int8_linear", lambda *args: "no")
    model, dense = (load(tmp_path / "out", kernels=mode) for mode in ("require", "off"))
    assert set(model.compress_report.decoded.values()) == {"no"}
    assert torch.equal(logits(model), logits(dense))
