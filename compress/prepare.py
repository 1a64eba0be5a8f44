"""The text that a run looks at: calibration windows and the held-out probe, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.eval import corpus as corpora
from compress.eval.windows import cut_windows
from compress.recipe import Recipe

PROBE_CHARACTERS = 8192  # of the test text that are tokenized for the probe
PROBE_TOKENS = 256  # held-out tokens that every run sends along: error per layer, and the check after writing


@dataclass(frozen=True)
class Texts:
    """Token ids: calibration windows ``(T,)`` each (none for methods without data) and the held-out probe ``(T,)``."""

    windows: Sequence[Tensor]
    probe: Tensor
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def all(self) -> list[Tensor]:
        """The windows and, last, the probe: the order in which they stream."""
        return [*self.windows, self.probe]

    def digest(self) -> str:
        """SHA-256 (hex) of all token ids."""
        sha = hashlib.sha256()
        for ids in self.all:
            sha.update(ids.to(torch.int64).numpy().tobytes() + b"|")
        return sha.hexdigest()


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any | None:
    """The folder's tokenizer, or None where it has none."""
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer can't be read: {error}") from None


def make_texts(recipe: Recipe, tokenizer: Any | None, calibrated: bool, vocabulary: int) -> Texts:
    """Tokenize what the run needs. Raises ``UserError`` for a corpus that is too short or a missing tokenizer.

    The probe is the start of the test part of the evaluation's corpus, disjoint from what methods see; without a
    tokenizer it is random tokens, which only methods without data can do with.
    """
    if tokenizer is None:
        if calibrated:
            raise UserError(
                "calibration wants text, and the model has no tokenizer; add one, or use rtn, which needs no data"
            )
        generator = torch.Generator().manual_seed(recipe.seed)
        return Texts((), torch.randint(vocabulary, (PROBE_TOKENS,), generator=generator), {"probe": "random tokens"})
    wanted = recipe.calibration
    probe, protocol = _cut_probe(recipe, tokenizer)
    if not calibrated:
        return Texts((), probe, {"probe": protocol})
    windows = cut_windows(
        corpora.load(wanted.corpus, "calibration"),
        tokenizer,
        tokens=wanted.tokens,
        count=wanted.samples,
        seed=wanted.seed,
    )
    return Texts(list(windows.ids), probe, {"probe": protocol, "calibration": windows.protocol()})


def _cut_probe(recipe: Recipe, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """The first tokens of the test part, as many as there are up to ``PROBE_TOKENS`` and a calibration window."""
    corpus = corpora.load(recipe.eval.corpus if recipe.eval is not None else recipe.calibration.corpus, "test")
    start = replace(corpus, text=corpus.text[:PROBE_CHARACTERS])  # tokenizing all of it would take memory and seconds
    held = len(tokenizer(start.text, verbose=False)["input_ids"])
    length = max(2, min(PROBE_TOKENS, recipe.calibration.tokens, held))
    windows = cut_windows(start, tokenizer, tokens=length, count=1)
    return windows.ids[0], windows.protocol()
