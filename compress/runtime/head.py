"""The output head of a model that decodes: dense rows read once at the speed of memory, for one or a few tokens.

At one token the head of a small model is a large part of the bytes, and PyTorch's product of a single bfloat16 row
takes about twice as long as reading them. Everything else (many tokens, gradients, other devices) is ``nn.Linear``'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels import library
from compress.kernels.weight_matmul import TYPES

FEW_TOKENS = 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HeadLinear(nn.Linear):
    """``nn.Linear`` without bias whose product of up to ``FEW_TOKENS`` tokens is native; same weight, same state."""

    def forward(self, x: Tensor) -> Tensor:
        native = library.active()
        if native is None or not self._takes(x):
            return super().forward(x)
        weight, tokens = self.weight, x.shape[:-1].numel()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        kind = TYPES[x.dtype]
        native.dense_few(
            weight.data_ptr(), kind, self.out_features, self.in_features, x.data_ptr(), kind, self.in_features, tokens,
            y.data_ptr(), kind, self.out_features, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _takes(self, x: Tensor) -> bool:
        """Whether the native product is for this input."""
        weight = self.weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        fits = x.dtype == weight.dtype and x.shape[-1] == self.in_features and 0 < x.shape[:-1].numel() <= FEW_TOKENS
        return fits and x.is_cpu and weight.is_cpu and x.is_contiguous() and weight.is_contiguous()


def speed_up_head(model: Any) -> bool:
    """Make a model's dense head a ``HeadLinear``, weight and ties untouched; False where it is something else."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and getattr(head, "bias", None) is None
    if not plain or head.weight.dtype not in FLOATS:
        return False
    head.__class__ = HeadLinear
    return True
