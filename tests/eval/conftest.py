"""A tiny Llama with a tokenizer of bytes, made on the spot: the folder that the judge's tests measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ``<s>`` as BOS, which it does not add by itself."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,  # far from uniform, so that models differ
        bos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return make_model(0)


@pytest.fixture(scope="session")
def other() -> LlamaForCausalLM:
    """The same shape, other weights: what a compressed model is to its dense one, only worse."""
    return make_model(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> Path:
    path = tmp_path_factory.mktemp("dense")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory, other: LlamaForCausalLM) -> Path:
    path = tmp_path_factory.mktemp("other")
    other.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """1000 lines that differ, about 27,000 characters."""
    path = tmp_path / "story.md"
    path.write_text("".join(f"line {index} of a long story\n" for index in range(1000)), encoding="utf-8")
    return path
