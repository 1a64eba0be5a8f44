"""One call per token: the blocks of a Llama-like model run as one native decode step (``cpu/decode.cpp``).

A model of 30 small blocks spends most of a token in Python and in small operators. For one token of one sequence the
base model's ``forward`` hands hidden state, rotary tables and cache to the native step; everything else (prefill,
batches, training, attention outputs, other caches) takes the model's own code, as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from compress.kernels import library
from compress.kernels.weight_matmul import TYPES
from compress.runtime.cache import Store, adopt, find_store
from compress.runtime.int8_linear import Int8Linear
from compress.runtime.linear import WeightLinear

# Base models whose blocks are: norm, attention with rotary halves, add; norm, SiLU-gated MLP, add; and nothing else.
MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # tables that do not depend on the length
ROPE_CHUNK = 512  # positions whose tables are made at a time


def why_not_fused(model: Any) -> str | None:
    """Why the decode step of a base model can't be one call; None if it can."""
    name = type(model).__name__
    if name not in MODELS:
        return f"{name} is not one of {', '.join(MODELS)}"
    config: Any = model.config
    if getattr(config, "hidden_act", None) != "silu":
        return f"its activation is {getattr(config, 'hidden_act', None)}, not silu"
    kinds = getattr(model.rotary_emb, "rope_type", None)
    if kinds not in STATIC_ROPE:
        return f"rotary tables of type {kinds} change with the length"
    for block in model.layers:
        for layer in _list_linears(block).values():
            reason = _why_not_linear(layer)
            if reason is not None:
                return reason
    return None


def fuse(model: nn.Module) -> str | None:
    """Give a base model (``LlamaModel`` ...) the fused decode step on the CPU; the reason where it can't be."""
    reason = why_not_fused(model)
    if reason is not None:
        return reason
    step = FusedStep()
    model.__dict__["_compress_step"] = step
    model.__dict__["_compress_forward"] = type(model).forward
    model.__dict__["forward"] = MethodType(_forward, model)
    model.__dict__["_apply"] = MethodType(_apply_and_forget, model)
    return None


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``."""
    for name in ("_compress_step", "_compress_forward", "forward", "_apply"):
        model.__dict__.pop(name, None)


def _apply_and_forget(self: Any, fn: Any, recurse: bool = True) -> Any:
    """``.to``, ``.half`` ...: tensors move, so their addresses are taken anew."""
    self._compress_step.native = None
    return type(self)._apply(self, fn, recurse)


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    given = input_ids if inputs_embeds is None else inputs_embeds
    if (
        given is not None
        and past_key_values is not None
        and given.shape[:2] == (1, 1)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
    ):
        hidden = self._compress_step.run(self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        if hidden is not None:
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
    return self._compress_forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


@dataclass
class FusedStep:
    """The native step of one model, built at its first token and again when the model was moved."""

    native: Any = None
    kept: list[Tensor] = field(default_factory=list)  # what the native step has addresses of
    store: Store | None = None  # the cache whose addresses it has
    data: Tensor | None = None
    dtype: torch.dtype = torch.float32
    cos: Tensor | None = None  # (positions, rotary) float32
    sin: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> FusedStep:
        return FusedStep()

    def __reduce__(self) -> Any:
        return FusedStep, ()

    def run(
        self, model: Any, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache: Any,
        embeds: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """The last hidden state ``(1, 1, D)``; None where this step is not for the native code."""
        module = library.active()
        if module is None or (mask is not None and not (mask.dim() == 2 and bool(mask.all()))):
            return None
        if self.native is None and not self._build(model, module):
            return None
        store = find_store(cache)
        if store is None:
            config = model.config
            store = adopt(cache, len(model.layers), config.num_key_value_heads, self.head_size, self.dtype)
            if store is None:
                return None
        layers = cache.layers
        length = layers[0].length
        store.reserve(length + 1)
        if self.store is not store or self.data is not store.data:
            self._point_at(store)
        position = length if positions is None else int(positions)
        if self.cos is None or position >= len(self.cos):
            self._make_tables(model, position)
        assert self.cos is not None and self.sin is not None
        hidden = model.embed_tokens(ids) if embeds is None else embeds
        if hidden.dtype != self.dtype or not hidden.is_contiguous():
            return None
        out = torch.empty_like(hidden)
        row = position * self.cos.stride(0) * 4
        self.native.step(
            hidden.data_ptr(), self.cos.data_ptr() + row, self.sin.data_ptr() + row, length, store.capacity,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        for layer in layers:
            layer.length += 1
        return out

    def _build(self, model: Any, module: Any) -> bool:
        tensors = [*model.parameters(), *model.buffers()]
        self.dtype = model.norm.weight.dtype
        if any(tensor.device.type != "cpu" for tensor in tensors) or self.dtype not in TYPES:
            return False
        self.kept = []
        config = model.config
        self.head_size = model.layers[0].self_attn.head_dim
        self.native = module.Decoder(
            {
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "head_size": self.head_size,
                "rotary": self.head_size,
                "epsilon": float(model.norm.variance_epsilon),
                "attention_scale": float(model.layers[0].self_attn.scaling),
                "type": TYPES[self.dtype],
                "cache_type": TYPES[self.dtype],
                "final_norm": self._keep(model.norm.weight.float()),
            }
        )
        for block in model.layers:
            self.native.add_block(self._describe_block(block))
        self.store = self.data = self.cos = self.sin = None
        return True

    def _describe_block(self, block: Any) -> dict[str, Any]:
        linears = {name: self._describe_linear(layer) for name, layer in _list_linears(block).items()}
        attention = block.self_attn
        norms = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
        return {
            "attention_norm": self._keep(block.input_layernorm.weight.float()),
            "mlp_norm": self._keep(block.post_attention_layernorm.weight.float()),
            **{name: 0 if norm is None else self._keep(norm.weight.float()) for name, norm in norms.items()},
            **linears,
            "intermediate": linears["gate"]["rows"],
            "window": _find_window(attention),
        }

    def _describe_linear(self, layer: Any) -> dict[str, Any]:
        bias = getattr(layer, "bias", None)
        about = {
            "rows": layer.out_features,
            "columns": layer.in_features,
            "bias": 0 if bias is None else self._keep(bias.float()),
        }
        if isinstance(layer, WeightLinear):
            zero = layer.zero
            return about | {
                "kind": "weight",
                "codes": self._keep(layer.codes),
                "scale": self._keep(layer.scale),
                "scale_type": TYPES[layer.scale.dtype],
                "zero": 0 if zero is None else self._keep(zero),
                "zero_type": 0 if zero is None else TYPES[zero.dtype],
                "group": layer.group_size,
                "bits": layer.bits,
            }
        if isinstance(layer, Int8Linear):
            index, columns = layer.outlier_index, layer.outlier_weight
            return about | {
                "kind": "int8",
                "codes": self._keep(layer.codes),
                "scale": self._keep(layer.scale),
                "sums": self._keep(layer.sums),
                "threshold": float(layer.threshold),
                "outliers": 0 if index is None else len(index),
                "outlier_index": 0 if index is None else self._keep(index),
                "outlier_weight": 0 if columns is None else self._keep(columns),
                "outlier_type": 0 if columns is None else TYPES[columns.dtype],
            }
        weight = layer.weight.detach().contiguous()
        return about | {"kind": "dense", "data": self._keep(weight), "type": TYPES[weight.dtype]}

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _point_at(self, store: Store) -> None:
        for index in range(store.data.shape[0]):
            self.native.set_cache(index, store.data[index, 0].data_ptr(), store.data[index, 1].data_ptr())
        self.store, self.data = store, store.data

    def _make_tables(self, model: Any, position: int) -> None:
        """Rotary tables of all positions up to the chunk that ``position`` is in, rounded as the model rounds them."""
        count = (position // ROPE_CHUNK + 1) * ROPE_CHUNK
        cos, sin = model.rotary_emb(torch.empty(0, dtype=self.dtype), torch.arange(count)[None])
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()


def _find_window(attention: Any) -> int:
    """How many tokens a layer sees, 0 for all. Qwen's layers hold it, Mistral's take it from the configuration."""
    home = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(home, "sliding_window", None) or 0


def _list_linears(block: Any) -> dict[str, Any]:
    attention, mlp = block.self_attn, block.mlp
    return {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }


def _why_not_linear(layer: Any) -> str | None:
    if isinstance(layer, WeightLinear):
        return "a layer gathers its inputs (act-order)" if layer.order is not None else None
    if isinstance(layer, Int8Linear):
        return None
    if type(layer) is nn.Linear and layer.weight.dtype in TYPES:
        return None
    return f"a layer is {type(layer).__name__}"
