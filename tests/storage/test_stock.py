"""Folders as their users load them: by stock Transformers, and by ``compress.load``, bit for bit the model meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import MODELS, build_model, logits, stock_logits, write_folder
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.runtime import load as runtime
from compress.storage.checkpoint import Checkpoint
from compress.storage.files import write_json
from compress.storage.formats.base import QuantSpec, load_format

DENSE_LINEARS = [name for name in MODELS if name not in ("gpt2", "mixtral", "qwen3_moe")]


def load_stock(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def mixed() -> dict[str, QuantSpec]:
    """Several widths and group sizes, all symmetric, and layers left alone."""
    quants = {
        f"model.layers.{i}.self_attn.{name}": QuantSpec(4, 32, True) for i in (0, 1) for name in ("q_proj", "v_proj")
    }
    quants |= {f"model.layers.{i}.mlp.up_proj": QuantSpec(3, 16, True) for i in (0, 1)}
    return quants | {
        "model.layers.0.mlp.gate_proj": QuantSpec(2, 16, True),
        "model.layers.1.mlp.gate_proj": QuantSpec(8, -1, True),
    }


@pytest.mark.parametrize("name", DENSE_LINEARS)
def test_compressed_tensors_loads_in_stock_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = build_model(name)
    layers = write_folder(tmp_path / "out", model, load_format("compressed-tensors"), QuantSpec(4, 32, False))
    loaded = load_stock(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    for spec, state in layers:
        assert torch.equal(loaded.get_submodule(spec.name).weight, state.weight.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compressed_tensors_with_mixed_schemes(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = build_model("llama", dtype)
    write_folder(tmp_path / "out", model, load_format("compressed-tensors"), mixed())
    assert torch.equal(logits(load_stock(tmp_path / "out")), logits(model))


def test_a_process_that_never_imports_us(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = build_model("llama")
    write_folder(tmp_path / "out", model, load_format("compressed-tensors"), QuantSpec(3, 16, False))
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), logits(model))


@pytest.mark.parametrize("name", ["llama", "phi3", "gptj", "gpt2", "mixtral", "qwen3_moe"])
def test_native_loads_with_us_and_dense_with_anyone(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    write_folder(tmp_path / "native", model, load_format("native"), QuantSpec(3, 16, False, float_zero=True))
    loaded = runtime.load(tmp_path / "native", kernels="off")
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    write_folder(tmp_path / "dense", model, load_format("dense"), QuantSpec(3, 16, False, float_zero=True))
    assert torch.equal(logits(load_stock(tmp_path / "dense")), logits(model))


def test_experts_left_alone_survive(tmp_path: Path) -> None:
    model = build_model("mixtral")
    quants = {"model.layers.0.mlp.experts.2.down_proj": QuantSpec(2, 16, True)}
    assert len(write_folder(tmp_path / "out", model, load_format("native"), quants)) == 1
    assert torch.equal(logits(runtime.load(tmp_path / "out", kernels="off")), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_local_experts"] = 5
    write_json(tmp_path / "out" / "config.json", config)
    with pytest.raises(UserError, match=r"gate_up_proj|down_proj"):
        runtime.load(tmp_path / "out")


def test_native_is_refused_by_stock_transformers(tmp_path: Path) -> None:
    """Not a word about an unknown method and a random model, but an error."""
    write_folder(tmp_path / "out", build_model("llama"), load_format("native"), QuantSpec(4, 32, True))
    with pytest.raises(AssertionError, match=r"no file named model\.safetensors"):
        stock_logits(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("word", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_we_load_stock_formats_whose_package_is_missing(
    word: str, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama")
    write_folder(tmp_path / "out", model, load_format(word), QuantSpec(4, 32, symmetric))
    monkeypatch.setattr(runtime, "loads_with_stock", lambda form: False)
    assert torch.equal(logits(runtime.load(tmp_path / "out", kernels="off")), logits(model))
    assert runtime.load(tmp_path / "out", dtype="float32", kernels="off").dtype == torch.float32


def test_load_quantized_gives_the_weights(tmp_path: Path) -> None:
    for word, name in (("native", "gpt2"), ("gptq", "llama"), ("compressed-tensors", "llama")):
        layers = write_folder(tmp_path / word, build_model(name), load_format(word), QuantSpec(4, 32, True))
        wanted = {spec.name: state.weight for spec, state in layers}
        found = {spec.name: weight for spec, weight in runtime.load_quantized(tmp_path / word)}
        assert set(found) == set(wanted) and all(torch.equal(found[one], wanted[one]) for one in wanted)
    write_folder(tmp_path / "dense", build_model("llama"), load_format("dense"), {})
    assert list(runtime.load_quantized(tmp_path / "dense")) == []


def test_folders_that_do_not_fit_their_config(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", build_model("llama"), load_format("native"), QuantSpec(4, 32, True))
    path = tmp_path / "out" / "config.json"
    config = Checkpoint(tmp_path / "out").config
    write_json(path, {**config, "hidden_size": 96})
    with pytest.raises(UserError, match=r"the model's parameter is|do not match the model"):
        runtime.load(tmp_path / "out")
    write_json(path, {**config, "num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"weights do not match the model \(model\.layers\.2"):
        runtime.load(tmp_path / "out")
    write_json(path, {**config, "quantization_config": {"quant_method": "other"}})
    with pytest.raises(UserError, match="'other' is not one of"):
        runtime.load(tmp_path / "out")
    write_json(path, config)
    with pytest.raises(UserError, match="dtype 'float12' is unknown"):
        runtime.load(tmp_path / "out", dtype="float12")
