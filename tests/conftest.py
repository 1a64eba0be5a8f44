"""Tiny models with a tokenizer of bytes, made on the spot: what the tests of the whole loop compress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "tie_word_embeddings": True},
    "qwen3_moe": {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.1,
        "bos_token_id": 256, "eos_token_id": 257,
    },
}  # fmt: skip


def save_tokenizer(folder: Path) -> Any:
    """One token per byte; ``<s>`` is there but not added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def make_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``make_model_folder("llama")`` -> a bf16 model folder with a tokenizer, the same one for the whole session."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, **CONFIGS[name])
            folder = tmp_path_factory.mktemp(name)
            AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
            save_tokenizer(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def llama(make_model_folder: Callable[[str], Path]) -> Path:
    """The folder of a tiny Llama."""
    return make_model_folder("llama")
