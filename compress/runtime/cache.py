"""A key-value cache that grows in place: what the fused decode step writes to, and what Transformers' own code reads.

Transformers' ``DynamicLayer`` makes a new tensor of the whole past for every token. Here all layers share one tensor
``(L, 2, heads, capacity, head_size)`` with room to spare; ``keys`` and ``values`` are views of its filled part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SPARE = 256  # tokens of room that a store gets beside what it holds, and half as many again


class Store:
    """The memory of all layers of one cache, batch 1."""

    def __init__(self, layers: int, heads: int, head_size: int, capacity: int, dtype: torch.dtype) -> None:
        self.data = torch.empty((layers, 2, heads, capacity, head_size), dtype=dtype)

    @property
    def capacity(self) -> int:
        return self.data.shape[3]

    def reserve(self, length: int) -> None:
        """Room for ``length`` tokens; what is there is kept."""
        if length <= self.capacity:
            return
        layers, two, heads, capacity, size = self.data.shape
        larger = self.data.new_empty((layers, two, heads, length + length // 2 + SPARE, size))
        larger[:, :, :, :capacity] = self.data
        self.data = larger


class StoredLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's part of a ``Store``.

    Whoever assigns other tensors (beam search, batches) detaches it: from then on it is an ordinary ``DynamicLayer``.
    """

    def __init__(self, store: Store, index: int, length: int) -> None:
        self.store: Store | None = store
        self.index = index
        self.length = length
        self._own: dict[int, Tensor | None] = {}
        self.dtype, self.device = store.data.dtype, store.data.device
        self.is_initialized = True

    def _read(self, which: int) -> Tensor | None:
        if self.store is None:
            return self._own.get(which)
        return self.store.data[self.index, which, :, : self.length][None]

    def _assign(self, which: int, value: Tensor | None) -> None:
        if self.store is not None:
            kept = {0: self._read(0), 1: self._read(1)}
            self.store, self._own = None, kept
        self._own[which] = value

    keys = property(lambda self: self._read(0), lambda self, value: self._assign(0, value))
    values = property(lambda self: self._read(1), lambda self, value: self._assign(1, value))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``(1, heads, T, head_size)``; gives all of them back."""
        if self.store is not None and key_states.shape[0] == 1 and key_states.dtype == self.store.data.dtype:
            length = self.length + key_states.shape[-2]
            self.store.reserve(length)
            self.store.data[self.index, 0, :, self.length : length] = key_states[0]
            self.store.data[self.index, 1, :, self.length : length] = value_states[0]
            self.length = length
            keys, values = self._read(0), self._read(1)
            assert keys is not None and values is not None
            return keys, values
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length if self.store is not None else int(super().get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if self.store is not None and tokens_to_remove < 0:
            self.length = max(0, self.length + tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


def find_store(cache: Any) -> Store | None:
    """The store of a cache whose layers all live in it with one length, None if they don't (yet)."""
    layers = getattr(cache, "layers", None)
    if not layers:  # a cache of another kind, or one that nothing was put into yet
        return None
    first = layers[0]
    if type(first) is not StoredLayer or first.store is None:
        return None
    for layer in layers:
        if type(layer) is not StoredLayer or layer.store is not first.store or layer.length != first.length:
            return None
    store: Store = first.store
    return store


def adopt(cache: Any, layers: int, heads: int, head_size: int, dtype: torch.dtype) -> Store | None:
    """Move an ordinary cache of batch 1 into a store; None where it is of another kind, shape or type.

    A sliding one can be moved as long as nothing has slid out of it; the store then keeps everything.
    """
    if type(cache) is not DynamicCache or len(cache.layers) != layers or getattr(cache, "offloading", False):
        return None
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, StoredLayer) for layer in cache.layers):
        return None
    held = [(layer.keys, layer.values) for layer in cache.layers]
    length = cache.layers[0].get_seq_length()
    wanted = (1, heads, length, head_size)
    for pair in held:
        for tensor in pair:
            if tensor is None or tuple(tensor.shape) != wanted or tensor.dtype != dtype or tensor.device.type != "cpu":
                return None
    store = Store(layers, heads, head_size, length + length // 2 + SPARE, dtype)
    for index, (keys, values) in enumerate(held):
        store.data[index, 0, :, :length] = keys[0]
        store.data[index, 1, :, :length] = values[0]
    cache.layers[:] = [StoredLayer(store, index, length) for index in range(layers)]
    return store
