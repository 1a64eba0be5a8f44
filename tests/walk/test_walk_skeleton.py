"""The skeleton of a checkpoint: blocks, layers, coverage, and units that are bit-equal to ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, MIXTURES, FolderReader, build_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.walk.layers import get_weight, set_weight
from compress.walk.skeleton import Skeleton


def save(name: str, folder: Path, **kwargs: object) -> FolderReader:
    build_model(name).save_pretrained(folder, **kwargs)
    return FolderReader(folder)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> FolderReader:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return FolderReader(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_equal_from_pretrained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reader = save(name, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = stock.state_dict()
    skeleton = Skeleton.from_checkpoint(reader, dtype)
    found: dict[str, Tensor] = {}
    for i, prefix in enumerate(skeleton.blocks):
        reader.reads.clear()
        block = skeleton.load_block(i)
        assert set(reader.reads) == set(skeleton.unit_tensors(i)), "a block reads its own tensors and no others"
        assert not any(parameter.is_meta for parameter in [*block.parameters(), *block.buffers()])
        found |= {f"{prefix}.{key}": value for key, value in block.state_dict().items()}
    outside = dict(skeleton.outside_tensors())
    assert not set(outside) & set(found)
    found |= outside
    tied = set(wanted) - set(found)
    assert tied == (set(stock.all_tied_weights_keys) if stock.config.tie_word_embeddings else set())
    for key, value in found.items():
        assert value.dtype == wanted[key].dtype, key
        assert torch.equal(value, wanted[key]), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_buffers_equal_from_pretrained(name: str, tmp_path: Path) -> None:
    reader = save(name, tmp_path)
    wanted = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    skeleton = Skeleton.from_checkpoint(reader, torch.float32)
    found = dict(skeleton.load_outside().named_buffers())
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coverage_adds_up_to_all_parameters(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    skeleton = Skeleton.from_checkpoint(save(name, tmp_path), torch.float32)
    specs = skeleton.specs()
    selected = [spec.name for spec in specs][1:]
    rows = skeleton.coverage(selected)
    assert sum(row.numel for row in rows) == total
    compressed = sum(row.numel for row in rows if row.status == "compressed")
    assert compressed == sum(spec.numel for spec in specs[1:])
    assert all(row.reason for row in rows if row.status == "untouched")
    left = [row.reason for row in rows if row.parameter == specs[0].parameter and row.status == "untouched"]
    assert left == ["no step selects it"]
    matrices = {row.reason.split(",")[0] for row in rows if model.get_parameter(row.parameter).dim() > 1}
    assert matrices <= {"", "embedding", "output head", "router", "no step selects it"}
    assert ("router" in matrices) == (name in MIXTURES)


def test_tied_embedding_is_counted_once_and_says_so(tmp_path: Path) -> None:
    skeleton = Skeleton.from_checkpoint(save("llama-tied", tmp_path), torch.float32)
    (row,) = [row for row in skeleton.coverage([]) if "embed" in row.parameter]
    assert row.reason == "embedding, tied with lm_head.weight"
    assert not any(row.parameter == "lm_head.weight" for row in skeleton.coverage([]))
    outside = skeleton.load_outside()
    assert outside.lm_head.weight is outside.model.embed_tokens.weight


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_read_and_write_rows_of_outputs(name: str) -> None:
    model = build_model(name)
    skeleton = Skeleton.from_model(model)
    for spec in skeleton.specs():
        parameter = model.get_parameter(spec.parameter)
        weight = get_weight(model, spec)
        assert tuple(weight.shape) == spec.shape
        rows = parameter[spec.index] if spec.kind == "expert" else parameter
        rows = rows.T if spec.kind == "conv1d" else rows
        assert torch.equal(weight, rows)
        before = parameter.detach().clone()
        set_weight(model, spec, weight + 1)
        assert torch.equal(rows, weight + 1)
        untouched = parameter.numel() - spec.numel
        assert int((parameter == before).sum()) == untouched, "only this layer's slice changes"


def test_a_checkpoint_written_with_module_names_loads_in_stock_transformers(tmp_path: Path) -> None:
    for name in ("gpt2", "gpt_neox", "llama-tied", *MIXTURES):
        folder = tmp_path / name
        skeleton = Skeleton.from_checkpoint(save(name, folder), torch.float32)
        tensors = dict(skeleton.outside_tensors())
        for i, prefix in enumerate(skeleton.blocks):
            tensors |= {f"{prefix}.{key}": value for key, value in skeleton.load_block(i).state_dict().items()}
        wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        rewrite(folder, tensors)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for key, value in model.state_dict().items():
            assert torch.equal(value, wanted[key]), key
        again = Skeleton.from_checkpoint(FolderReader(folder), torch.float32)
        for key, value in again.load_block(1).state_dict().items():
            assert torch.equal(value, wanted[f"{again.blocks[1]}.{key}"]), key


def test_gpt2_as_on_the_hub_without_prefix_and_with_masks(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    skeleton = Skeleton.from_checkpoint(rewrite(tmp_path, bare), torch.float32)
    assert "h.1.attn.c_attn.weight" in skeleton.unit_tensors(1)
    for key, value in skeleton.load_block(0).state_dict().items():
        assert torch.equal(value, wanted[f"transformer.h.0.{key}"]), key


def test_mixtral_experts_come_one_by_one_from_disk(tmp_path: Path) -> None:
    reader = save("mixtral", tmp_path)
    names = [name for name in reader.headers if name.endswith("layers.0.block_sparse_moe.experts.3.w1.weight")]
    assert names, "this test wants the hub's layout on disk"
    skeleton = Skeleton.from_checkpoint(reader, torch.float32)
    gate_up = skeleton.load_block(0).state_dict()["mlp.experts.gate_up_proj"]
    on_disk = load_file(tmp_path / "model.safetensors")[names[0]]
    assert torch.equal(gate_up[3, : on_disk.shape[0]], on_disk), "the gate's rows come first"


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    moved = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.1.mlp.extra.weight"] = moved
    with pytest.raises(UserError, match=r"missing \(model.layers.1.mlp.up_proj.weight\).*model.layers.1.mlp.extra"):
        Skeleton.from_checkpoint(rewrite(tmp_path, tensors), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    skeleton = Skeleton.from_checkpoint(rewrite(tmp_path, tensors), torch.float32)
    skeleton.load_block(0)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: 1 of 1536 weights"):
        skeleton.load_block(1)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(32, 16)
    skeleton = Skeleton.from_checkpoint(rewrite(tmp_path, tensors), torch.float32)
    with pytest.raises(UserError, match=r"o_proj.weight.*\(32, 16\).*\(32, 32\)"):
        skeleton.load_block(0)


def test_tied_pair_with_two_values_is_refused(tmp_path: Path) -> None:
    save("llama-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    skeleton = Skeleton.from_checkpoint(rewrite(tmp_path, tensors), torch.float32)
    assert [name for name, _ in skeleton.outside_tensors()] == ["model.embed_tokens.weight", "model.norm.weight"]
    tensors["lm_head.weight"][0, 0] += 1
    skeleton = Skeleton.from_checkpoint(rewrite(tmp_path, tensors), torch.float32)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        list(skeleton.outside_tensors())


def test_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    reader = save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"already quantized.*gptq"):
        Skeleton.from_checkpoint(reader, torch.float32)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    reader = save("llama", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(UserError, match=r"config.json: Transformers can't read it: .*never_heard_of"):
        Skeleton.from_checkpoint(reader, torch.float32)


def test_encoder_is_refused(tmp_path: Path) -> None:
    reader = save("llama", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="'vit' is not a causal language model"):
        Skeleton.from_checkpoint(reader, torch.float32)


def test_experts_of_unknown_layout_are_left_alone_with_a_reason() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    skeleton = Skeleton.from_model(model)
    assert not any(spec.kind == "expert" for spec in skeleton.specs())
    rows = skeleton.coverage([spec.name for spec in skeleton.specs()])
    assert sum(row.numel for row in rows) == sum(parameter.numel() for parameter in model.parameters())
    reasons = {row.parameter: row.reason for row in rows}
    assert "unknown layout" in reasons["model.layers.0.mlp.experts.gate_up_proj"]
    assert reasons["model.layers.0.mlp.router.weight"] == "router"
