"""``QuantEmbedding``: a token embedding whose rows are dequantized as they are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels import library
from compress.kernels.weight_matmul import TYPES
from compress.numerics.packing import unpack_codes
from compress.numerics.panels import LANES, Panels, join_halves
from compress.runtime.linear import Packed


class QuantEmbedding(Packed):
    """Rows of a packed matrix ``(V, D)`` by token: panel ``token // 16``, lane ``token % 16``.

    The panels are those of an output head, so that tied ones share them. ``factor``: what the replaced module
    multiplied with (Gemma 3 scales inside its embedding), in the model's dtype.
    """

    factor: Tensor | None
    shifts: Tensor | None

    def __init__(self, panels: Panels, dtype: torch.dtype, factor: Tensor | None = None) -> None:
        super().__init__(panels, dtype)
        self.num_embeddings, self.embedding_dim = panels.shape
        self.padding_idx: int | None = None
        self.register_buffer("factor", factor, persistent=False)
        bits = torch.arange(0, 32, self.bits, dtype=torch.int32) if 32 % self.bits == 0 else None
        self.register_buffer("shifts", bits, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(...)`` integers -> ``(..., D)`` in the model's dtype. IndexError for a token outside the vocabulary."""
        flat = tokens.reshape(-1)
        compiling = torch.compiler.is_compiling()
        native = None if compiling or not (flat.is_cpu and self.codes.is_cpu) else library.active()
        if native is not None and flat.numel():
            rows = self._look_up_native(native, flat.to(torch.int64).contiguous())
        else:
            if flat.numel() and not compiling:
                self._check_range(flat)
            rows = self.look_up(flat)
        rows = rows.reshape(*tokens.shape, self.embedding_dim)
        return rows if self.factor is None else rows * self.factor.to(self.dtype)

    def _check_range(self, flat: Tensor) -> None:
        low, high = (int(end) for end in torch.aminmax(flat))
        if low < 0 or high >= self.num_embeddings:
            raise IndexError(f"tokens are {low} to {high}, the vocabulary has {self.num_embeddings}")

    def _look_up_native(self, native: Any, flat: Tensor) -> Tensor:
        rows = torch.empty((len(flat), self.embedding_dim), dtype=self.dtype)
        zero = self.zero
        place = (0, 0) if zero is None else (zero.data_ptr(), TYPES[zero.dtype])
        wrong = native.look_up(
            self.codes.data_ptr(), self.scale.data_ptr(), TYPES[self.scale.dtype], *place, self.num_embeddings,
            self.embedding_dim, self.group_size, self.bits, flat.data_ptr(), len(flat), rows.data_ptr(),
            TYPES[self.dtype],
        )  # fmt: skip
        if wrong >= 0:
            self._check_range(flat)
        return rows

    def look_up(self, tokens: Tensor) -> Tensor:
        """Rows ``(T, D)`` of tokens ``(T,)``."""
        panel, lane = tokens // LANES, tokens % LANES
        codes = self._unpack_words(self.codes[panel, :, lane])
        scale = self.scale[panel, :, lane].float()
        grouped = codes.to(torch.float32).reshape(len(tokens), -1, self.group_size)
        if self.zero is None:
            grouped = grouped - float(2 ** (self.bits - 1))
        else:
            grouped = grouped - self.zero[panel, :, lane].float().unsqueeze(-1)
        return (grouped * scale.unsqueeze(-1)).reshape(len(tokens), -1).to(self.dtype)

    def _unpack_words(self, words: Tensor) -> Tensor:
        """Codes ``(T, D)`` of words ``(T, D * bits / 32)``."""
        words = join_halves(words, self.bits)
        if self.shifts is None:
            return unpack_codes(words, self.bits, self.embedding_dim)
        codes: Tensor = (words.unsqueeze(-1) >> self.shifts) & (2**self.bits - 1)
        return codes

    def extra_repr(self) -> str:
        return f"vocabulary {self.num_embeddings}, {super().extra_repr()}"


def find_factor(module: nn.Embedding) -> Tensor | str | None:
    """What an embedding multiplies its rows with; the reason in words where it does something that we don't know."""
    if type(module) is nn.Embedding:
        return None
    factor = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if isinstance(factor, float | int):
        return torch.tensor(float(factor))
    return f"an embedding of type {type(module).__name__} may compute more than a row"
