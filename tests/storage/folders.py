"""Tiny models with random codes in their layers, written by a format, and the dense model that they must equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import compress.eval.stock
from compress.storage.formats.base import Format, QuantSpec, dequantize, encode_unit
from compress.storage.writer import Writer
from compress.types import Grid, LayerSpec, LayerState
from compress.walk.layers import set_weight
from compress.walk.skeleton import Skeleton

VOCABULARY = 128
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "phi3": LLAMA,
    "opt": {**LLAMA, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "gptj": {**GPT, "rotary_dim": 8},
    "gpt_neox": LLAMA,
    "gpt2": GPT,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def build_model(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model with random weights that are large enough to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**MODELS[name], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    if name == "gptj":  # its table of sines comes out otherwise in from_config than in from_pretrained
        table = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)
        for mine, theirs in zip(model.transformer.h, table.transformer.h, strict=True):
            mine.attn.embed_positions = theirs.attn.embed_positions
    return model


def random_state(spec: LayerSpec, quant: QuantSpec, scale_dtype: torch.dtype, seed: int = 0) -> LayerState:
    """Random codes over the whole range, scales of both signs if symmetric, zeros over the whole range if not."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.shape[0], quant.groups(spec))
    codes = torch.randint(0, 2**quant.bits, spec.shape, generator=generator).to(torch.uint8)
    scale = (torch.rand(shape, generator=generator) + 0.5) * 0.2 / 2**quant.bits
    if quant.symmetric:
        scale = scale * torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        zero = torch.full(shape, float(2 ** (quant.bits - 1)))
    else:
        zero = torch.randint(0, 2**quant.bits, shape, generator=generator).float()
    if quant.float_zero:
        zero = (zero + torch.rand(shape, generator=generator)).to(scale_dtype).float()
    scale = scale.to(scale_dtype).float()
    size = quant.inputs_per_group(spec)
    grid = Grid(quant.bits, size, quant.symmetric, scale, zero, quant.float_zero)
    return LayerState(dequantize(codes, scale, zero, size), grid, codes)


def write_folder(
    output: Path, model: Any, form: Format, quants: dict[str, QuantSpec] | QuantSpec, seed: int = 0
) -> list[tuple[LayerSpec, LayerState]]:
    """Quantize ``model`` in place with random codes and write it; ``quants``: by layer name, or one for all."""
    skeleton = Skeleton.from_model(model)
    layers, untouched = [], []
    for number, spec in enumerate(skeleton.specs()):
        quant = quants if isinstance(quants, QuantSpec) else quants.get(spec.name)
        if quant is None:
            untouched.append(spec)
            continue
        assert form.carries(spec, quant, model.config.model_type) is None
        state = random_state(spec, quant, form.scale_dtype(spec.dtype), seed + number)
        set_weight(model, spec, state.weight)
        layers.append((spec, quant, state))
    units = [*skeleton.blocks, "outside"]
    with Writer(output, units, "digest", prefix=form.PREFIX) as writer:
        for prefix in skeleton.blocks:
            block = model.get_submodule(prefix).state_dict()
            inside = [(spec, state) for spec, _, state in layers if spec.name.startswith(prefix + ".")]
            tensors = {f"{prefix}.{name}": tensor for name, tensor in block.items()}
            writer.write(prefix, encode_unit(form, tensors, inside, model.dtype), {})
        writer.write("outside", dict(skeleton.outside_tensors()), {})
        config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__], "dtype": str(model.dtype)[6:]}
        quantization = form.quantization_config([(spec, quant) for spec, quant, _ in layers], untouched)
        if quantization is not None:
            config["quantization_config"] = quantization
        writer.stage(config)
        writer.finish()
    return [(spec, state) for spec, _, state in layers]


def probe_ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return torch.stack([model(input_ids=row[None], use_cache=False).logits[0].float() for row in probe_ids()])


def stock_logits(folder: Path, scratch: Path, python: str = sys.executable) -> Tensor:
    """Logits of the folder in a process of its own that never imports us."""
    save_file({"input_ids": probe_ids()}, scratch / "probe.safetensors")
    script = compress.eval.stock.__file__
    command = [python, "-I", script, folder, scratch / "probe.safetensors", scratch / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(scratch / "out.safetensors")["logits"]
