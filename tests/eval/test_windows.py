"""Windows of tokens: contiguous, non-overlapping, reproducible, and too little text is an error with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.eval.corpus import Corpus
from compress.eval.windows import cut_windows

TEXT = "".join(chr(97 + index % 26) for index in range(1000))


def make_corpus(part: str = "test") -> Corpus:
    return Corpus(TEXT, "letters", part, "0" * 64)  # type: ignore[arg-type]


def test_the_first_windows_in_order(tokenizer: Any) -> None:
    whole = tokenizer(TEXT)["input_ids"]
    windows = cut_windows(make_corpus(), tokenizer, tokens=64, count=5)
    assert windows.ids.tolist() == [whole[start : start + 64] for start in range(0, 320, 64)]
    assert windows.ids.dtype == torch.int64
    assert windows.available == 1000 // 64
    assert windows.protocol() == {
        "corpus": "letters",
        "part": "test",
        "sha256": "0" * 64,
        "windows": 5,
        "tokens": 64,
        "stride": 64,
        "selection": "first",
        "bos": "none",
        "predicted_tokens": 5 * 63,
    }


def test_random_windows_are_different_ones_and_follow_the_seed(tokenizer: Any) -> None:
    def starts(seed: int | None) -> list[int]:
        windows = cut_windows(make_corpus(), tokenizer, tokens=50, count=20, seed=seed)
        whole = torch.tensor(tokenizer(TEXT)["input_ids"]).view(20, 50)
        return [int((whole == row).all(1).nonzero()[0]) for row in windows.ids]

    # 50 letters further the alphabet has moved by 24: windows repeat after 13, so starts are known modulo 13.
    assert starts(7) == starts(7) != starts(8)
    assert sorted(starts(7)) == sorted(starts(None))  # all twenty, each once
    assert starts(7) != starts(None)


def test_a_bos_that_the_tokenizer_adds_is_recorded(tokenizer: Any) -> None:
    class WithBos:
        bos_token_id = 256

        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [256, *tokenizer(text)["input_ids"]]}

    plain = cut_windows(make_corpus(), WithBos(), tokens=10, count=2)
    assert plain.bos == "once, at the start of the text"
    assert plain.ids[:, 0].tolist() == [256, tokenizer(TEXT)["input_ids"][9]]
    each = cut_windows(make_corpus(), WithBos(), tokens=10, count=2, bos="window")
    assert each.ids[:, 0].tolist() == [256, 256]
    assert each.ids[:, 1:].flatten().tolist() == tokenizer(TEXT)["input_ids"][:18]
    assert each.protocol()["bos"] == "at the start of every window"


@pytest.mark.parametrize(("part", "setting"), [("calibration", "samples"), ("test", "windows")])
def test_too_short_a_text_says_what_fits(tokenizer: Any, part: str, setting: str) -> None:
    with pytest.raises(UserError) as error:
        cut_windows(make_corpus(part), tokenizer, tokens=300, count=8)
    message = str(error.value)
    assert f"its {part} part has 1000 tokens; wanted 2400 ({setting}=8 x tokens=300)" in message
    assert f"{setting}=3 with tokens=300, or {setting}=8 with tokens=125" in message
    for tokens, count in ((300, 3), (125, 8)):  # what it offers does fit
        assert cut_windows(make_corpus(part), tokenizer, tokens=tokens, count=count).ids.shape == (count, tokens)


def test_an_empty_text(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"has 0 tokens; wanted 20 .*; pass a longer text"):
        cut_windows(Corpus("", "empty", "test", ""), tokenizer, tokens=10, count=2)
