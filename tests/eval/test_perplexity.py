"""Perplexity, KL and agreement against a slow float64 reference that works on whole windows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compress.errors import NumericsError, UserError
from compress.eval import perplexity
from compress.eval.perplexity import kl_divergence, score


def reference(model: Any, dense: Any, ids: torch.Tensor) -> dict[str, float]:
    """One token at a time, in float64."""
    nll = dense_nll = kl = agree = 0.0
    for window in ids:
        with torch.no_grad():
            q = model(input_ids=window[None]).logits[0].double().softmax(-1)
            p = dense(input_ids=window[None]).logits[0].double().softmax(-1)
        for position in range(len(window) - 1):
            target = int(window[position + 1])
            nll -= math.log(q[position, target])
            dense_nll -= math.log(p[position, target])
            kl += float((p[position] * (p[position] / q[position]).log()).sum())
            agree += float(p[position].argmax() == q[position].argmax())
    count = ids.shape[0] * (ids.shape[1] - 1)
    means = {"perplexity": math.exp(nll / count), "dense_perplexity": math.exp(dense_nll / count)}
    return {**means, "kl": kl / count, "top1_agreement": agree / count}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [1, 7 * 300, 2**26])
def test_against_the_reference(
    model: Any, other: Any, ids: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", chunk)
    result = score(other, ids, dense=model)
    for name, value in reference(other, model, ids).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-5), name
    assert result.predicted_tokens == 3 * 19
    assert result.kl is not None
    assert result.kl > 0.1


def test_a_model_against_itself(model: Any, ids: torch.Tensor) -> None:
    result = score(model, ids, dense=model)
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    assert result.perplexity == result.dense_perplexity == score(model, ids).perplexity
    assert score(model, ids).kl is None


def test_one_batch_is_the_mean_loss_of_transformers(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert score(model, ids).perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_progress_tells_every_window(model: Any, ids: torch.Tensor) -> None:
    seen: list[tuple[int, int, float]] = []
    result = score(model, ids, progress=lambda done, total, value: seen.append((done, total, value)))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == result.perplexity


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([math.log(2)])


def test_logits_that_are_not_finite(model: Any, ids: torch.Tensor) -> None:
    broken = type(model)(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NumericsError, match="window 0: the model's logits are not finite"):
        score(broken, ids)


def test_another_models_tokens(model: Any) -> None:
    with pytest.raises(UserError, match="token 999 is beyond the 300"):
        score(model, torch.tensor([[1, 999, 2]]))
