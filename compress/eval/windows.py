"""A corpus as windows of tokens: contiguous, non-overlapping, the tail dropped; the first ones or a random choice."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import UserError
from compress.eval.corpus import Corpus, describe_tokenizer

Bos = Literal["text", "window"]


@dataclass(frozen=True)
class Windows:
    """``count`` windows of ``tokens`` tokens, and what a reader needs to cut the same ones."""

    ids: Tensor  # (N, T) int64
    corpus: Corpus
    seed: int | None  # None: the first windows of the text in order
    bos: str  # in words, where a beginning-of-sequence token stands
    available: int  # whole windows that the text holds

    def protocol(self) -> dict[str, Any]:
        """What decides which tokens are predicted, for the report."""
        count, tokens = self.ids.shape
        return {
            "corpus": self.corpus.name,
            "part": self.corpus.part,
            "sha256": self.corpus.sha256,
            "windows": count,
            "tokens": tokens,
            "stride": tokens,
            "selection": "first" if self.seed is None else f"random, seed {self.seed}",
            "bos": self.bos,
            "predicted_tokens": count * (tokens - 1),
        }


def cut_windows(
    corpus: Corpus, tokenizer: Any, *, tokens: int, count: int, seed: int | None = None, bos: Bos = "text"
) -> Windows:
    """Cut a corpus into ``(count, tokens)`` token ids.

    The text is tokenized once as a whole, ``tokenizer(text)`` with its own defaults, and cut at multiples of
    ``tokens``; the tail is dropped. ``seed=None`` takes the first windows in order; an integer takes a random choice of
    different windows (Python's ``random.Random(seed).sample``), so windows never overlap.

    ``bos="text"`` leaves special tokens as the tokenizer sets them, at most once at the start of the text (the usual
    protocol); ``bos="window"`` starts every window with the beginning-of-sequence token, in place of its last token,
    for models that are lost without one (Gemma).

    Raises UserError where the text is too short, with the largest setting that fits.
    """
    assert tokens >= 1 and count >= 1, "tokens and count are positive"
    ids: list[int] = tokenizer(corpus.text, verbose=False)["input_ids"]
    start: int | None = getattr(tokenizer, "bos_token_id", None)
    body: int = tokens  # tokens of text in a window
    head: list[int] = []  # and what stands before them
    words = "once, at the start of the text" if ids and start is not None and ids[0] == start else "none"
    if bos == "window":
        if start is None:
            raise UserError(f"bos: window: the tokenizer ({describe_tokenizer(tokenizer)}) has no BOS token; use text")
        ids = ids[1:] if ids and ids[0] == start else ids
        body, head = tokens - 1, [start]
        words = "at the start of every window"
    available = len(ids) // body if body else 0
    if available < count:
        raise UserError(_too_short(corpus, len(ids), tokens=tokens, count=count, body=body))
    chosen = range(count) if seed is None else random.Random(seed).sample(range(available), count)
    rows = [head + ids[index * body : (index + 1) * body] for index in chosen]
    return Windows(torch.tensor(rows, dtype=torch.int64), corpus, seed, words, available)


def _too_short(corpus: Corpus, got: int, *, tokens: int, count: int, body: int) -> str:
    setting = "samples" if corpus.part == "calibration" else "windows"
    fits = []
    if got >= body:
        fits.append(f"{setting}={got // body} with tokens={tokens}")
    shorter = got // count + (tokens - body)
    if shorter >= 2:
        fits.append(f"{setting}={count} with tokens={shorter}")
    advice = f"the largest that fits: {', or '.join(fits)}" if fits else "pass a longer text"
    return (
        f"corpus {corpus.name}: its {corpus.part} part has {got} tokens; wanted {count * body} "
        f"({setting}={count} x tokens={tokens}); {advice}"
    )
