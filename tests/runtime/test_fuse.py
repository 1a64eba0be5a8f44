"""The fused decode step: same logits as the model's own blocks, every other use left to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from compress.kernels import library
from compress.numerics.int8_panels import pack_int8_panels, pack_outlier_weight
from compress.numerics.panels import pack_panels
from compress.runtime.cache import StoredLayer, adopt, find_store
from compress.runtime.fuse import fuse, unfuse, why_not_fused
from compress.runtime.int8_linear import Int8Linear
from compress.runtime.linear import WeightLinear

pytestmark = pytest.mark.skipif(library.describe()["library"] is None, reason="the kernels are not built here")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # biases on q, k, v
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),  # norms on q and k, heads wider than hidden / heads
}


def make(name: str, dtype: torch.dtype = torch.float32, bits: int | None = 4) -> Any:
    """A tiny model; its blocks' layers hold random codes of ``bits`` (None: dense)."""
    torch.manual_seed(5)
    config, model_class, more = MODELS[name]
    model = model_class(config(**SIZES, **more)).to(dtype).eval()
    for block in model.model.layers if bits else ():
        for owner in (block.self_attn, block.mlp):
            for leaf, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(owner, leaf, quantize(layer, bits))
    return model


def quantize(layer: nn.Linear, bits: int) -> WeightLinear:
    codes = torch.randint(0, 2**bits, layer.weight.shape, dtype=torch.uint8)
    scale = (torch.rand(layer.out_features, layer.in_features // 32) * 0.3 / 2**bits).to(layer.weight.dtype)
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8)
    bias = None if layer.bias is None else layer.bias.detach().normal_()
    return WeightLinear(pack_panels(codes, scale, zero, bits, 32), bias, None, layer.weight.dtype)


def make_int8(threshold: float, kept: int) -> Any:
    """A Llama of int8 layers with ``kept`` features in high precision."""
    model = make("llama", bits=None)
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for leaf, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear):
                    weight = layer.weight.detach() * 5
                    index = torch.randperm(layer.in_features)[:kept].sort().values if kept else None
                    scale = weight.abs().amax(1) / 127
                    codes = (weight / scale[:, None]).round().to(torch.int8)
                    columns = None if index is None else pack_outlier_weight(weight, index)
                    panels = pack_int8_panels(codes, scale)
                    setattr(owner, leaf, Int8Linear(panels, threshold, None, index, columns))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def walk(model: Any, prompt: torch.Tensor, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits of each of ``tokens``, given one by one behind ``prompt``."""
    cache = model(prompt, use_cache=True, past_key_values=cache).past_key_values
    return torch.cat([model(token.view(1, 1), past_key_values=cache).logits[0] for token in tokens])


@pytest.mark.parametrize("bits", [2, 3, 4, 8, None])
@pytest.mark.parametrize("name", list(MODELS))
def test_same_logits_as_the_models_own_blocks(name: str, bits: int | None) -> None:
    model = make(name, bits=bits)
    fused = copy.deepcopy(model)
    assert fuse(fused.model) is None
    prompt, tokens = torch.randint(0, 300, (1, 7)), torch.randint(0, 300, (300,))  # the cache grows on the way
    cache = DynamicCache(config=model.config)
    assert relative(walk(fused, prompt, tokens, cache), walk(model, prompt, tokens)) < 1e-5
    assert all(type(layer) is StoredLayer for layer in cache.layers)  # so it was the native step
    assert cache.get_seq_length() == 307


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_int8_layers_with_outliers(threshold: float, kept: int) -> None:
    model = make_int8(threshold, kept)
    fused = copy.deepcopy(model)
    assert fuse(fused.model) is None
    prompt, tokens = torch.randint(0, 300, (1, 7)), torch.randint(0, 300, (20,))
    cache = DynamicCache(config=model.config)
    # A float32 difference can move an activation to the next of 255 codes; one code is 1/127 of the row's largest.
    assert relative(walk(fused, prompt, tokens, cache), walk(model, prompt, tokens)) < 5e-3
    assert type(cache.layers[0]) is StoredLayer
    fused.model.embed_tokens.weight.data[7, 3] = float("inf")
    with torch.no_grad(), pytest.raises(ValueError, match="NaN or infinity"):
        fused(torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize("set_name", ["avx512", "avx2", "portable"])
def test_every_instruction_set(set_name: str) -> None:
    if set_name not in library.available():
        pytest.skip(f"no {set_name} here")
    model = make("qwen3")
    fused = copy.deepcopy(model)
    fuse(fused.model)
    prompt, tokens = torch.randint(0, 300, (1, 5)), torch.randint(0, 300, (20,))
    wanted = walk(model, prompt, tokens)
    library.select_cpu(set_name)
    try:
        assert relative(walk(fused, prompt, tokens), wanted) < 1e-5
    finally:
        library.select_cpu("auto")


def test_sixteen_bits_are_nearer_to_the_truth_than_the_models_own() -> None:
    """Against the same weights in float64: the fused step keeps float32 between the matrices."""
    model = make("llama", torch.bfloat16, None)
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse(fused.model)
    prompt, tokens = torch.randint(0, 300, (1, 7)), torch.randint(0, 300, (40,))
    wanted = walk(exact, prompt, tokens)
    ours, own = relative(walk(fused, prompt, tokens), wanted), relative(walk(model, prompt, tokens), wanted)
    assert ours < own
    assert ours < 0.02


def test_sliding_window() -> None:
    torch.manual_seed(1)
    config = MistralConfig(**SIZES, sliding_window=8)
    config._attn_implementation = "eager"
    model = MistralForCausalLM(config).eval()
    fused = copy.deepcopy(model)
    fuse(fused.model)
    prompt, tokens = torch.randint(0, 300, (1, 3)), torch.randint(0, 300, (20,))
    # A cache without a config keeps everything; the window is then the attention's business.
    wanted = walk(model, prompt, tokens, DynamicCache())
    assert relative(walk(fused, prompt, tokens, DynamicCache()), wanted) < 1e-5
    sliding = DynamicCache(config=config)
    assert relative(walk(fused, prompt, tokens, sliding), wanted) < 1e-5
    assert type(sliding.layers[0]) is StoredLayer
    late = DynamicCache(config=config)  # something has slid out before the first single token: the model's own code
    prompt = torch.randint(0, 300, (1, 30))
    assert relative(walk(fused, prompt, tokens, late), walk(model, prompt, tokens)) < 1e-5
    assert type(late.layers[0]) is not StoredLayer


def test_generate_greedy_beams_and_batches() -> None:
    model = make("llama")
    fused = copy.deepcopy(model)
    fuse(fused.model)
    prompt = torch.randint(1, 300, (1, 9))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(prompt, **options), model.generate(prompt, **options))
    assert torch.equal(fused.generate(prompt, num_beams=3, **options), model.generate(prompt, num_beams=3, **options))
    batch = torch.randint(1, 300, (3, 9))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    wanted = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(fused.generate(batch, attention_mask=mask, **options), wanted)
    one = {"attention_mask": mask[1:2], **options}  # a padded prompt alone: not for the native step
    assert torch.equal(fused.generate(batch[1:2], **one), model.generate(batch[1:2], **one))


def test_several_tokens_and_cropping_behind_the_native_step() -> None:
    model = make("qwen2")
    fused = copy.deepcopy(model)
    fuse(fused.model)
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    prompt, tokens = torch.randint(0, 300, (1, 5)), torch.randint(0, 300, (9,))
    several, last = torch.randint(0, 300, (1, 4)), torch.randint(0, 300, (1, 1))
    results = []
    with torch.no_grad():
        for one, cache in zip((model, fused), caches, strict=True):
            walk(one, prompt, tokens, cache)
            cache.crop(-3)
            logits = one(several, past_key_values=cache).logits
            results.append(torch.cat([logits, one(last, past_key_values=cache).logits], dim=1))
    assert relative(results[1], results[0]) < 1e-5
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 5 + 9 - 3 + 4 + 1


def test_moves_copies_gradients_and_hooks_of_outputs() -> None:
    model = make("llama", bits=None)
    fused = copy.deepcopy(model)
    fuse(fused.model)
    prompt, tokens = torch.randint(0, 300, (1, 5)), torch.randint(0, 300, (3,))
    walk(fused, prompt, tokens)
    fused.double().float()  # other addresses
    assert relative(walk(fused, prompt, tokens), walk(model, prompt, tokens)) < 1e-5
    twin = copy.deepcopy(fused)
    twin.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert relative(walk(twin, prompt, tokens), walk(model, prompt, tokens)) > 1e-3
    assert relative(walk(fused, prompt, tokens), walk(model, prompt, tokens)) < 1e-5
    cache = model(prompt, use_cache=True).past_key_values
    output = fused(tokens[:1].view(1, 1), past_key_values=cache)
    output.logits.sum().backward()
    assert fused.model.layers[0].mlp.down_proj.weight.grad is not None
    with torch.no_grad():
        seen = fused(tokens[:1].view(1, 1), past_key_values=cache, output_hidden_states=True)
    assert len(seen.hidden_states) == 4
    unfuse(fused.model)
    assert "forward" not in fused.model.__dict__


def test_what_is_not_fused_says_why() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    assert "GPT2Model" in str(why_not_fused(gpt2.transformer))
    config = LlamaConfig(**SIZES, hidden_act="gelu")
    assert "gelu" in str(fuse(LlamaForCausalLM(config).model))
    odd = make("llama")
    odd.model.layers[1].mlp.down_proj = nn.Sequential(nn.Identity())
    assert "Sequential" in str(fuse(odd.model))


@torch.no_grad()
def test_a_first_token_alone_and_an_empty_cache() -> None:
    model = make("llama")
    fused = copy.deepcopy(model)
    fuse(fused.model)
    token = torch.tensor([[5]])
    for cache in (DynamicCache, lambda: DynamicCache(config=model.config), lambda: None):
        wanted = model(token, past_key_values=cache(), use_cache=True).logits
        assert relative(fused(token, past_key_values=cache(), use_cache=True).logits, wanted) < 1e-5
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(token, **options), model.generate(token, **options))


def test_reference_mode_leaves_the_native_step_alone() -> None:
    model = make("llama")
    fuse(model.model)
    cache = DynamicCache(config=model.config)
    with library.mode("reference"):
        walk(model, torch.randint(0, 300, (1, 4)), torch.randint(0, 300, (2,)), cache)
    assert not any(type(layer) is StoredLayer for layer in cache.layers)


def test_a_store_takes_over_a_cache_and_lets_it_go() -> None:
    cache = DynamicCache()
    keys = [torch.randn(1, 2, 5, 16) for _ in range(3)]
    for index, one in enumerate(keys):
        cache.update(one, -one, index)
    store = adopt(cache, 3, 2, 16, torch.float32)
    assert store is not None
    assert find_store(cache) is store
    assert all(
        torch.equal(layer.keys, one) and torch.equal(layer.values, -one)
        for layer, one in zip(cache.layers, keys, strict=True)
    )
    for _ in range(400):  # beyond its room
        for index in range(3):
            cache.update(torch.ones(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), index)
    assert cache.get_seq_length() == 405
    assert torch.equal(cache.layers[1].keys[:, :, :5], keys[1])
    assert bool((cache.layers[1].keys[:, :, 5:] == 1).all())
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape == (2, 2, 405, 16)
    assert find_store(cache) is None
    assert adopt(cache, 3, 2, 16, torch.float32) is None  # batch 2
    assert adopt(DynamicCache(), 3, 2, 16, torch.float32) is None
