"""Perplexity of a model over windows, and how far it is from another model on the same tokens, in one pass.

``perplexity = exp(sum of NLL / predicted tokens)``; a window of T tokens predicts T - 1.
``kl = mean over predicted tokens of sum_v p(v) (log p(v) - log q(v))`` in nats, p of the dense model, q of the other.
``top1_agreement`` is the share of predicted tokens where both models put the same token first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import NumericsError, UserError

# Logits taken to float32 at once: 256 MiB, whatever the vocabulary is.
CHUNK_ELEMENTS = 2**26

Progress = Callable[[int, int, float], None]  # windows done, windows in all, perplexity so far


@dataclass(frozen=True)
class Score:
    """What one pass over the windows gives."""

    perplexity: float
    predicted_tokens: int
    dense_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass
class _Sums:
    nll: float = 0.0
    dense_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0


@torch.inference_mode()
def score(model: Any, ids: Tensor, *, dense: Any = None, progress: Progress | None = None) -> Score:
    """Perplexity of ``model`` on windows ``ids (N, T)``; with ``dense`` also its own, KL(dense || model) and agreement.

    One window is in the models at a time. Logits keep the model's dtype; log-softmax is float32 over chunks of rows,
    and sums are float64. Raises NumericsError where a model gives logits that are not finite,
    UserError for tokens that a model does not know.
    """
    assert ids.dim() == 2 and ids.shape[1] >= 2, "windows are (N, T) with T >= 2"
    sums = _Sums()
    for index, window in enumerate(ids):
        logits = _forward(model, window, index, "the model")
        dense_logits = None if dense is None else _forward(dense, window, index, "the dense model")
        for rows in _chunks(len(window) - 1, logits.shape[-1]):
            targets = window[1:][rows].to(logits.device)
            _add(sums, logits[rows], None if dense_logits is None else dense_logits[rows], targets)
        sums.tokens += len(window) - 1
        if not math.isfinite(sums.nll + sums.dense_nll + sums.kl):
            raise NumericsError(f"window {index}: the model's logits are not finite, so it has no perplexity")
        if progress is not None:
            progress(index + 1, len(ids), _exp(sums.nll / sums.tokens))
    return Score(
        perplexity=_exp(sums.nll / sums.tokens),
        predicted_tokens=sums.tokens,
        dense_perplexity=None if dense is None else _exp(sums.dense_nll / sums.tokens),
        kl=None if dense is None else sums.kl / sums.tokens,
        top1_agreement=None if dense is None else sums.agree / sums.tokens,
    )


def _forward(model: Any, window: Tensor, index: int, who: str) -> Tensor:
    """Logits ``(T - 1, V)`` that predict the second to the last token of a window ``(T,)``."""
    embedding = model.get_input_embeddings().weight
    size = embedding.shape[0]
    if int(window.max()) >= size:
        raise UserError(
            f"window {index}: token {int(window.max())} is beyond the {size} that {who} knows; "
            "wanted the tokenizer that the model was trained with"
        )
    logits: Tensor = model(input_ids=window[None].to(embedding.device), use_cache=False).logits[0, :-1]
    return logits


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _add(sums: _Sums, logits: Tensor, dense: Tensor | None, targets: Tensor) -> None:
    log_q = torch.log_softmax(logits.float(), dim=-1)
    sums.nll -= float(log_q.gather(1, targets[:, None]).sum(dtype=torch.float64))
    if dense is None:
        return
    log_p = torch.log_softmax(dense.float().to(log_q.device), dim=-1)
    sums.dense_nll -= float(log_p.gather(1, targets[:, None]).sum(dtype=torch.float64))
    sums.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    sums.kl += float(kl_divergence(log_p, log_q).sum(dtype=torch.float64))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum_v p (log p - log q)`` per row, nats; a token that p holds impossible adds nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, torch.zeros_like(terms), terms).sum(-1)


def _exp(mean_nll: float) -> float:
    """exp without OverflowError; a mean above 700 nats is as good as infinite and is said to be 1e304."""
    return math.exp(min(mean_nll, 700.0))
