"""``compress.evaluate``: what a model costs and what it lost, every number with the protocol it was taken under."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.eval import corpus as corpora
from compress.eval.loading import Opened, count_parameters, count_weight_bytes, find_folder, open_model, open_tokenizer
from compress.eval.perplexity import Progress, score
from compress.eval.windows import Bos, cut_windows


def evaluate(
    model: Any,
    corpus: str | Path = "pydoc",
    *,
    windows: int = 16,
    tokens: int = 2048,
    against: Any = None,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "cpu",
    bos: Bos = "text",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model (object, folder, hub id) on the first ``windows`` windows of a corpus's test part.

    With ``against``, the dense model as an object, folder or hub id, both are measured in one pass over the same
    tokens. Gives ``perplexity``, ``kl`` (nats per token, dense || model) and ``top1_agreement`` (None without
    ``against``), ``bytes`` of the weights, ``parameters``, ``bits_per_weight`` of the whole model, ``dense``
    (``perplexity``, ``bytes``) or None, ``protocol``, ``loaded_with``, ``seconds``.

    Raises UserError for what can't be loaded and a text too short, NumericsError for logits that are not finite.
    """
    start = time.perf_counter()
    folder = None if _is_model(model) else find_folder(model, trust_remote_code)
    dense_folder = None if against is None or _is_model(against) else find_folder(against, trust_remote_code)
    if tokenizer is None:
        home = folder or dense_folder
        if home is None:
            raise UserError("evaluate: a model in memory has no tokenizer with it; pass tokenizer=")
        tokenizer = open_tokenizer(home, trust_remote_code)
    cut = cut_windows(corpora.load(corpus, "test"), tokenizer, tokens=tokens, count=windows, bos=bos)
    load = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    opened = Opened(model, "memory") if folder is None else open_model(folder, **load)  # type: ignore[arg-type]
    dense = against if dense_folder is None else open_model(dense_folder, **load).model  # type: ignore[arg-type]
    _check_length(opened.model, tokens)
    modes = [(each, each.training) for each in (opened.model, dense) if each is not None]
    try:
        for each, _ in modes:
            each.eval()
        result = score(opened.model, cut.ids, dense=dense, progress=progress)
    finally:
        for each, training in modes:
            each.train(training)
    size = count_weight_bytes(opened.model if folder is None else folder)
    home = folder or dense_folder
    parameters = _count(dense if dense is not None else model) if home is None else count_parameters(home)
    return {
        "perplexity": result.perplexity,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "bytes": size,
        "parameters": parameters,
        "bits_per_weight": 8 * size / parameters,
        "dense": None
        if dense is None
        else {
            "perplexity": result.dense_perplexity,
            "bytes": count_weight_bytes(dense if dense_folder is None else dense_folder),
        },
        "protocol": {**cut.protocol(), **_describe(opened.model)},
        "loaded_with": opened.loaded_with if opened.why is None else f"{opened.loaded_with} ({opened.why})",
        "seconds": time.perf_counter() - start,
    }


def _is_model(value: Any) -> bool:
    return isinstance(value, torch.nn.Module)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _describe(model: Any) -> dict[str, str]:
    """The type of number that the forward computes in, where, and with our kernels if it is on them."""
    parameter = next(model.parameters())
    about = {"dtype": str(parameter.dtype).removeprefix("torch."), "device": parameter.device.type}
    report: Any = getattr(model, "compress_report", None)
    if getattr(report, "on_kernels", None):  # of compress.load; compress.run leaves a report of its own
        about["kernels"] = f"compress, {report.kernels}, {len(report.on_kernels)} layers"
    return about


def _check_length(model: Any, tokens: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < tokens:
        raise UserError(
            f"eval: windows of {tokens} tokens are longer than the {longest} that the model takes; lower tokens"
        )
