"""The bitsandbytes format against the package: the same tensors, the same products, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.methods import llm_int8
from compress.storage.formats import bitsandbytes as form
from compress.storage.formats import compressed_tensors, dense, gptq
from compress.storage.formats.base import QuantSpec
from compress.types import ActivationRule, LayerSpec, LayerState, Statistic

SPEC = LayerSpec("model.layers.0.mlp.up_proj", (32, 64), torch.float32, "linear", "model.layers.0.mlp.up_proj.weight")
QUANT = QuantSpec(8, -1, True, activations=ActivationRule(threshold=3.0))


def make_theirs(threshold: float) -> Any:
    """bitsandbytes' own layer, and the linear that it was made from."""
    package = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32)
    plain.weight.data = plain.weight.data.half().float()  # it quantizes the weight as float16
    layer = package.nn.Linear8bitLt(64, 32, bias=True, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(plain.state_dict())
    return plain, layer.to("cpu").eval()


def quantize(weight: torch.Tensor, threshold: float) -> LayerState:
    statistic = Statistic(0, torch.zeros(0, 0))
    return llm_int8.compress(LayerState(weight), statistic, llm_int8.Config(threshold=threshold), torch.float32)


def test_the_tensors_are_those_that_bitsandbytes_writes() -> None:
    plain, theirs = make_theirs(3.0)
    ours = form.encode(SPEC, quantize(plain.weight.data, 3.0), torch.float32)
    wanted = theirs.state_dict()
    for leaf in ("weight", "SCB", "weight_format"):
        mine = ours[f"{SPEC.name}.{leaf}"]
        assert mine.dtype == wanted[leaf].dtype and torch.equal(mine, wanted[leaf]), leaf


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_a_layer_gives_what_bitsandbytes_gives(
    rows: int, threshold: float, dtype: torch.dtype, tolerance: float
) -> None:
    plain, theirs = make_theirs(threshold)
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[0, 0, 5] = 9.0
    state = quantize(plain.weight.data, threshold)
    assert state.activations is not None
    read = form.round_inputs(x, state.activations)
    got = torch.nn.functional.linear(read.float(), state.weight, plain.bias)
    wanted = theirs(x).float()
    assert float((got - wanted).norm() / wanted.norm()) < tolerance
    rounded = torch.nn.functional.linear(x.float(), state.weight, plain.bias)
    if dtype == torch.float32:
        assert float((rounded - wanted).norm() / wanted.norm()) > 100 * tolerance, "inputs are rounded"


def test_every_scale_that_the_method_makes_is_stored_exactly() -> None:
    absmax = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(form._find_absmax(SPEC, absmax / 127) / 127, absmax / 127)


def test_what_it_does_not_carry() -> None:
    conv = LayerSpec("h.0.c_fc", (32, 64), torch.float32, "conv1d", "h.0.c_fc.weight")
    expert = LayerSpec("e.0.down_proj", (32, 64), torch.float32, "expert", "e.down_proj", 0)
    assert form.carries(SPEC, QUANT, "llama") is None and form.carries(conv, QUANT, "gpt2") is None
    rule = ActivationRule()
    for spec, quant, words in (
        (expert, QUANT, "experts"),
        (SPEC, QuantSpec(8, -1, True), "rounds inputs"),
        (SPEC, QuantSpec(4, -1, True, activations=rule), "llm_int8"),
        (SPEC, QuantSpec(8, 32, True, activations=rule), "llm_int8"),
        (SPEC, QuantSpec(8, -1, True, activations=ActivationRule(groups=2)), "one scale per token"),
        (SPEC, QuantSpec(8, -1, True, activations=rule, outliers=4), "dynamic"),
    ):
        assert words in (form.carries(spec, quant, "llama") or "")
    for other in (dense, gptq):
        assert "rounded to 8 bits" in (other.carries(SPEC, QUANT, "llama") or "")
    assert "outlier" in (compressed_tensors.carries(SPEC, QUANT, "llama") or "")


def test_one_threshold_for_the_model_and_layers_that_are_left_alone() -> None:
    low = QuantSpec(8, -1, True, activations=ActivationRule(threshold=2.0))
    assert "one threshold" in (form.conflict([(SPEC, QUANT), (SPEC, low)], []) or "")
    config = form.quantization_config(
        [(SPEC, QUANT)], [LayerSpec("model.layers.0.mlp.gate_proj", (1, 1), torch.float32)]
    )
    assert config is not None and config["llm_int8_threshold"] == 3.0 and config["load_in_8bit"] is True
    assert {"lm_head", "model.layers.0.mlp.gate_proj"} <= set(config["llm_int8_skip_modules"])
    assert form.quantization_config([], []) is None


def test_checkpoints_that_contradict_themselves() -> None:
    state = quantize(torch.randn(32, 64), 3.0)
    tensors = form.encode(SPEC, state, torch.float32)
    config = form.quantization_config([(SPEC, QUANT)], [])
    assert config is not None
    found = form.unpack(SPEC, tensors, config)
    assert torch.equal(found.dequantize(), state.weight) and found.activations == QUANT.activations
    for change, words in (
        ({f"{SPEC.name}.SCB": torch.ones(31)}, r"SCB: got .*\[31\]"),
        ({f"{SPEC.name}.weight": torch.ones(32, 64)}, "wanted torch.int8"),
        ({f"{SPEC.name}.weight_format": torch.tensor(2, dtype=torch.uint8)}, "row-major"),
    ):
        with pytest.raises(UserError, match=words):
            form.decode(SPEC, {**tensors, **change}, config)
    with pytest.raises(UserError, match="4-bit"):
        form.decode(SPEC, tensors, {**config, "load_in_8bit": False})
    with pytest.raises(UserError, match="llm_int8_threshold is -1"):
        form.decode(SPEC, tensors, {**config, "llm_int8_threshold": -1})
