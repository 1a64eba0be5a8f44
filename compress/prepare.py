"""The text that a run looks at: calibration windows and the held-out probe, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import UserError
from compress.eval import corpus as corpora
from compress.eval.windows import cut_windows
from compress.recipe import Recipe

CHARACTERS = 32  # of the text that are tokenized for each token that is wanted
HEAD_TOKENS = 512  # of calibration text that show which features of the output head's input are large
PROBE_TOKENS = 256  # held-out tokens that every run sends along: error per layer, and the check after writing


@dataclass(frozen=True)
class Texts:
    """Token ids: calibration windows ``(T,)`` each (none for methods without data) and the held-out probe ``(T,)``."""

    windows: Sequence[Tensor]
    probe: Tensor
    protocol: dict[str, Any] = field(default_factory=dict)
    head: Tensor | None = None  # where the recipe has a head: calibration tokens that show what its input is like

    @property
    def all(self) -> list[Tensor]:
        """The windows and, last, the probe: the order in which they stream."""
        return [*self.windows, self.probe]

    def digest(self) -> str:
        """SHA-256 (hex) of all token ids."""
        sha = hashlib.sha256()
        for ids in [*self.all, *([] if self.head is None else [self.head])]:
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
        probe = torch.randint(vocabulary, (PROBE_TOKENS,), generator=generator)
        protocol: dict[str, Any] = {"probe": "random tokens"}
        if recipe.head is None:
            return Texts((), probe, protocol)
        seen = torch.randint(vocabulary, (PROBE_TOKENS,), generator=generator)
        return Texts((), probe, {**protocol, "head": "random tokens"}, seen)
    wanted = recipe.calibration
    probe, protocol = _cut_part(recipe, tokenizer, "test", PROBE_TOKENS)
    protocol = {"probe": protocol}
    head: Tensor | None = None
    if recipe.head is not None:
        head, protocol["head"] = _cut_part(recipe, tokenizer, "calibration", HEAD_TOKENS)
    if not calibrated:
        return Texts((), probe, protocol, head)
    windows = cut_windows(
        corpora.load(wanted.corpus, "calibration"),
        tokenizer,
        tokens=wanted.tokens,
        count=wanted.samples,
        seed=wanted.seed,
    )
    return Texts(list(windows.ids), probe, {**protocol, "calibration": windows.protocol()}, head)


def _cut_part(
    recipe: Recipe, tokenizer: Any, part: Literal["calibration", "test"], tokens: int
) -> tuple[Tensor, dict[str, Any]]:
    """The first tokens of a part, as many as there are up to ``tokens`` and a calibration window.

    The test part is that of the evaluation's corpus, if there is one.
    """
    tested = part == "test" and recipe.eval is not None
    corpus = corpora.load(recipe.eval.corpus if tested and recipe.eval else recipe.calibration.corpus, part)
    start = replace(corpus, text=corpus.text[: CHARACTERS * tokens])  # tokenizing all of it would take long
    held = len(tokenizer(start.text, verbose=False)["input_ids"])
    length = max(2, min(tokens, recipe.calibration.tokens, held))
    windows = cut_windows(start, tokenizer, tokens=length, count=1)
    return windows.ids[0], windows.protocol()
