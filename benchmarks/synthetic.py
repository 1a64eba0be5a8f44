"""Write a random Llama of a given size, one block at a time, so that making it needs no more memory than a block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 2048, 5632, 32, 8, 32000


def write_llama(folder: Path, gigabytes: float) -> dict[str, Any]:
    """A folder of about ``gigabytes`` (10^9 bytes) of bf16 weights with as many blocks as fit, and a byte tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    outside = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    per_block = 2 * sum(_numel(shape) for shape in block_shapes(0).values())
    blocks = max(1, round((gigabytes * 1e9 - 2 * sum(_numel(shape) for shape in outside.values())) / per_block))
    generator = torch.Generator().manual_seed(0)
    units = [block_shapes(index) for index in range(blocks)] + [outside]
    index: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(units):
        file = f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
        tensors = {name: make_tensor(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += 2 * sum(tensor.numel() for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return {"bytes": total, "blocks": blocks, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "vocabulary": VOCABULARY}


def block_shapes(index: int) -> dict[str, tuple[int, ...]]:
    narrow = HIDDEN * KEY_VALUE_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}


def make_tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal of variance 1 / inputs for matrices, as training starts; ones for norms."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: nothing to download, and a text has many tokens."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
