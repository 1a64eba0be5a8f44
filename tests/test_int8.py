"""LLM.int8() and W8A8 through the whole loop: stock loads of what is written give the logits that were meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.errors import UserError
from compress.eval import stock

W8A8 = {"method": "rtn", "bits": 8, "group_size": -1, "symmetric": True, "activation_bits": 8}
IDS = torch.arange(96)[None] * 37 % 256


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"line {i} of a long story with {i * i} words\n" for i in range(2000)), encoding="utf-8")
    return path


def make_recipe(steps: list[dict[str, Any]], form: str, text: Path) -> dict[str, Any]:
    calibration = {"corpus": str(text), "samples": 3, "tokens": 96}
    return {"steps": steps, "calibration": calibration, "eval": None, "format": form}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def compress_in_memory(folder: Path, recipe: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return compress.run(recipe, model, tokenizer=AutoTokenizer.from_pretrained(folder))


def compare(got: torch.Tensor, meant: torch.Tensor) -> float:
    spread = meant - meant.mean(-1, keepdim=True)
    return float((got - meant).norm() / spread.norm())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bitsandbytes_loads_what_was_meant(
    name: str, make_model_folder: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_model_folder(name)
    recipe = make_recipe([{"method": "llm_int8", "threshold": 3.0}], "bitsandbytes", text)
    result = compress.run(recipe, folder, output=tmp_path / "out")
    assert result.report["verification"]["checked_with"] == "transformers, in a process without compress"
    assert result.report["verification"]["relative_rms"] < 0.05
    counts = [layer["notes"]["outlier_features"] for layer in result.report["layers"]]
    assert max(counts) > 0 and all(layer["notes"]["largest_input"] > 0 for layer in result.report["layers"])
    loaded, found = stock.load_model(str(tmp_path / "out"), "bfloat16")
    assert not any(found.values())
    assert type(loaded.get_submodule(result.report["layers"][0]["name"])).__name__ == "Linear8bitLt"
    meant = logits(compress_in_memory(folder, recipe))
    error = compare(logits(loaded), meant)
    plain = make_recipe([{**recipe["steps"][0], "threshold": 0.0}], "bitsandbytes", text)
    assert error < 0.05 and compare(logits(compress_in_memory(folder, plain)), meant) > 0, (
        "the threshold does something"
    )


def test_w8a8_loads_to_the_bit(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe([{"method": "smoothquant"}, W8A8], "compressed-tensors", text)
    result = compress.run(recipe, llama, output=tmp_path / "out")
    assert result.report["verification"]["relative_rms"] == 0.0
    assert result.report["fallbacks"] == []
    first = result.report["layers"][0]
    assert first["notes"]["smoothing"] == "input_layernorm -> q_proj, k_proj, v_proj"
    assert first["notes"]["input_spread"][1] < first["notes"]["input_spread"][0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    loaded, found = stock.load_model(str(tmp_path / "out"), "bfloat16")
    assert not any(found.values())
    assert torch.equal(logits(loaded), logits(compress_in_memory(llama, recipe)))


@pytest.mark.parametrize("steps", [
    [{**W8A8, "bits": 4, "group_size": 32}],
    [{**W8A8, "include": ["*self_attn*"]}, {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True,
                                           "include": ["*mlp*"]}],
])  # fmt: skip
def test_other_widths_and_mixtures_load_to_the_bit(
    steps: list[dict[str, Any]], llama: Path, text: Path, tmp_path: Path
) -> None:
    result = compress.run(make_recipe(steps, "compressed-tensors", text), llama, output=tmp_path / "out")
    assert result.report["verification"]["relative_rms"] == 0.0


@pytest.mark.parametrize("step", [
    {"method": "llm_int8", "threshold": 3.0, "outliers": "static", "max_outliers": 4},
    {"method": "llm_int8", "threshold": 3.0},
    {**W8A8, "activation_groups": 4},
])  # fmt: skip
def test_native_carries_lists_and_groups(step: dict[str, Any], llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe([step], "native", text)
    result = compress.run(recipe, llama, output=tmp_path / "out")
    assert result.report["verification"]["passed"]
    loaded = compress.load(tmp_path / "out", kernels="off")
    assert torch.equal(logits(loaded), logits(compress_in_memory(llama, recipe)))


def test_smoothing_changes_a_model_by_rounding_only(llama: Path, text: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    step = {"method": "smoothquant", "powers_of_two": True}
    exact = compress_in_memory(llama, make_recipe([step], "dense", text))
    assert torch.equal(logits(exact), logits(dense)), "powers of two round nothing"
    assert not torch.equal(exact.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
    close = compress_in_memory(llama, make_recipe([{"method": "smoothquant"}], "dense", text))
    assert 0 < compare(logits(close), logits(dense)) < 0.05


def test_a_layer_that_shares_its_input_and_is_left_out(llama: Path, text: Path) -> None:
    step = {"method": "smoothquant", "exclude": ["*.k_proj"]}
    model = compress_in_memory(llama, make_recipe([step], "dense", text))
    told = {entry["name"]: entry["fallback"] for entry in model.compress_report["fallbacks"]}
    assert "k_proj shares its input and is left out" in told["model.layers.0.self_attn.q_proj"]
    assert "model.layers.0.mlp.up_proj" not in told


def test_what_plan_refuses(llama: Path, make_model_folder: Callable[[str], Path], text: Path) -> None:
    for name, steps, form, words in (
        ("llama", [{"method": "llm_int8"}], "compressed-tensors", "set format=bitsandbytes or --set format=native"),
        ("llama", [{"method": "llm_int8", "outliers": "static"}], "bitsandbytes", "--set format=native can carry"),
        ("llama", [W8A8], "gptq", "rounded to 8 bits at run time"),
        ("qwen3_moe", [{"method": "llm_int8"}], "bitsandbytes", "not experts fused"),
        ("llama", [{"method": "llm_int8"}, W8A8], "bitsandbytes", "would both quantize it"),
    ):
        with pytest.raises(UserError, match=words):
            compress.plan(make_recipe(steps, form, text), make_model_folder(name))
    auto = compress.plan(make_recipe([{"method": "llm_int8"}], "auto", text), llama)
    assert auto.format == "bitsandbytes"
