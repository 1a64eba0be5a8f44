"""Tiny copies of the supported architectures, built from their configurations, and a stand-in checkpoint reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_GROUPS = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


class Architecture(NamedTuple):
    model_type: str
    options: dict[str, Any]
    groups: tuple[tuple[str, ...], ...]  # sibling layers of a block in execution order; experts excepted


ARCHITECTURES = {
    "llama": Architecture("llama", LLAMA, LLAMA_GROUPS),
    "llama-tied": Architecture("llama", {**LLAMA, "tie_word_embeddings": True}, LLAMA_GROUPS),
    "qwen2": Architecture("qwen2", LLAMA, LLAMA_GROUPS),
    "qwen3": Architecture("qwen3", LLAMA, LLAMA_GROUPS),
    "mistral": Architecture("mistral", {**LLAMA, "sliding_window": 8}, LLAMA_GROUPS),
    "gemma": Architecture("gemma", LLAMA, LLAMA_GROUPS),
    "gemma2": Architecture("gemma2", {**LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 8}, LLAMA_GROUPS),
    "gemma3": Architecture("gemma3_text", {**LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 8}, LLAMA_GROUPS),
    "phi3": Architecture(
        "phi3",
        LLAMA,
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    "gpt2": Architecture(
        "gpt2",
        {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
        (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    ),
    "opt": Architecture(
        "opt",
        {
            **COMMON,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "pad_token_id": 1,
        },
        (QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    ),
    "gptj": Architecture(
        "gptj",
        {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, "n_inner": 48},
        (
            ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
            ("attn.out_proj",),
            ("mlp.fc_out",),
        ),
    ),
    "gpt_neox": Architecture(
        "gpt_neox",
        {
            **COMMON,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        (
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
    ),
    "mixtral": Architecture(
        "mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, (QKV, ("self_attn.o_proj",))
    ),
    "qwen3_moe": Architecture(
        "qwen3_moe",
        {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
        (QKV, ("self_attn.o_proj",)),
    ),
}
_NO_HEAD_DIM = {key: value for key, value in LLAMA.items() if key != "head_dim"}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # (model type, options): walked by the same generic code
    "opt-350m": (
        "opt",
        {**ARCHITECTURES["opt"].options, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "phi": ("phi", _NO_HEAD_DIM),
    "falcon": ("falcon", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "bloom": ("bloom", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_NO_HEAD_DIM,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_NO_HEAD_DIM,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
MIXTURES = ("mixtral", "qwen3_moe")


def build_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny model of the architecture with random weights that are large enough to matter."""
    architecture = ARCHITECTURES[name]
    config = AutoConfig.for_model(architecture.model_type, **architecture.options)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_windows(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]


class Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    nbytes: int


class FolderReader:
    """What the walk needs of a checkpoint, read in the plainest way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.headers: dict[str, Header] = {}
        self.reads: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    tensor = handle.get_tensor(name)
                    self.headers[name] = Header(tensor.dtype, tuple(tensor.shape), file.name, tensor.nbytes)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        self.reads += names
        found = {}
        for name in names:
            with safe_open(self.folder / self.headers[name].file, "pt") as handle:
                found[name] = handle.get_tensor(name).clone()
        return found
