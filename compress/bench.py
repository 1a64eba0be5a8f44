"""``compress bench``: what a folder gains in speed and memory over the dense model, measured in turn in one run.

Each side of each round is a process of its own, so that its memory is the model's and only one model is there at a
time. Figures are medians over the rounds; every round is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.eval.loading import find_folder, open_tokenizer, read_config
from compress.eval.process import run_worker
from compress.eval.speed import RANDOM, Workload

DENSE = "dense"
SIDES = (DENSE, "compressed")
FIGURES = (
    "prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "resident_bytes", "weight_bytes",
    "read_bytes_per_token",
)  # fmt: skip
Told = Callable[[str, Mapping[str, Any]], None]  # side, what was measured


def bench(
    folder: str | Path,
    against: str | Path = DENSE,
    *,
    workload: Workload | None = None,
    rounds: int = 3,
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    tell: Told | None = None,
) -> dict[str, Any]:
    """Measure ``folder`` through ``compress.load`` beside a dense model, ``rounds`` times in turn.

    ``against``: a folder or hub id, or ``dense``: a model of the same shape with random weights, whose speed is the
    same. Gives ``dense`` and ``compressed`` (``FIGURES``, ``bandwidth_share``, ``loaded_with``, ``rounds``), ``ratio``
    (compressed over dense), ``bandwidth``, ``workload``, ``text``, ``kernels``, ``machine``, ``versions``.
    ``bandwidth_share`` is decode's share of the speed at which memory could deliver the weights that a token reads.

    Raises UserError for folders that can't be loaded and sequences longer than a model takes.
    """
    from compress.kernels import library
    from compress.report.build import describe_machine, list_versions

    workload = workload or Workload()
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}")
    home = find_folder(folder, trust_remote_code)
    config = read_config(home)
    workload.check_length(config.get("text_config", config).get("max_position_embeddings"))
    other = home if str(against) == DENSE else find_folder(against, trust_remote_code)
    ids, text = cut_text(home, workload, trust_remote_code)
    common = {
        "ids": ids, "workload": asdict(workload), "dtype": dtype, "threads": threads,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    jobs = {
        DENSE: {"folder": str(other), "loader": RANDOM if str(against) == DENSE else "stock", **common},
        "compressed": {"folder": str(home), "loader": "compress", **common},
    }
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    probes = []
    for _ in range(rounds):
        probes.append(run_worker("bandwidth", {"threads": threads}))
        for side in SIDES:
            found[side].append(run_worker("speed", jobs[side]))
            if tell is not None:
                tell(side, found[side][-1])
    bandwidth = max(probes, key=lambda probe: float(probe["bytes_per_second"]))
    sides = {side: summarize(runs, bandwidth["bytes_per_second"]) for side, runs in found.items()}
    return {
        **sides,
        "ratio": {name: divide(sides["compressed"][name], sides[DENSE][name]) for name in FIGURES},
        "bandwidth": bandwidth,
        "workload": {**asdict(workload), "rounds": rounds, "batch": 1},
        "text": text,
        "folder": str(folder),
        "against": str(against),
        "kernels": library.describe(),
        "machine": describe_machine(),
        "versions": list_versions(),
    }


def cut_text(folder: Path, workload: Workload, trust_remote_code: bool = False) -> tuple[list[int], str]:
    """Token ids to run on and what they are: Python's own documentation; random ones for a folder without tokenizer."""
    import torch

    from compress.eval import corpus
    from compress.eval.windows import cut_windows

    count = max(workload.prefill_tokens, workload.prompt_tokens, 16)
    try:
        tokenizer = open_tokenizer(folder, trust_remote_code)
    except UserError:
        config = read_config(folder)
        vocabulary = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 2)
        ids = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))
        return ids.tolist(), "random tokens (the folder has no tokenizer)"
    windows = cut_windows(corpus.load("pydoc", "test"), tokenizer, tokens=count, count=1)
    ids = windows.ids[0]
    return ids.tolist(), "pydoc, test part"


def summarize(runs: Sequence[Mapping[str, Any]], bytes_per_second: float) -> dict[str, Any]:
    """Medians of one side over its rounds."""
    result: dict[str, Any] = {}
    for name in FIGURES:
        values = [run[name] for run in runs if run[name] is not None]
        result[name] = statistics.median(values) if values else None
    speed, size = result["decode_tokens_per_second"], result["read_bytes_per_token"]
    result["bandwidth_share"] = divide(None if size is None else speed * size, bytes_per_second)
    result |= {name: runs[-1][name] for name in ("loaded_with", "dtype", "threads", "logits")}
    return {**result, "rounds": [dict(run) for run in runs]}


def divide(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def render(found: Mapping[str, Any]) -> str:
    """A table for people, with what it was measured on."""
    work, bandwidth = found["workload"], found["bandwidth"]
    rows = (
        (f"prefill, tokens/s ({work['prefill_tokens']} tokens)", "prefill_tokens_per_second", "{:,.0f}"),
        (f"decode, tokens/s ({work['decode_tokens']} tokens)", "decode_tokens_per_second", "{:,.1f}"),
        ("share of the bandwidth limit", "bandwidth_share", "{:.0%}"),
        ("resident memory, MB", "resident_bytes", "{:,.0f}"),
        ("weights in memory, MB", "weight_bytes", "{:,.0f}"),
        ("loading, seconds", "load_seconds", "{:.1f}"),
    )
    lines = [f"{'':<34}{'dense':>12}{'compressed':>12}{'ratio':>9}"]
    for label, name, form in rows:
        scale = 1e6 if name.endswith("_bytes") else 1
        words = ["-" if (value := found[side][name]) is None else form.format(value / scale) for side in SIDES]
        ratio = found["ratio"].get(name)
        lines.append(f"{label:<34}{words[0]:>12}{words[1]:>12}{'' if ratio is None else f'{ratio:.2f}x':>9}")
    slower = [row[0].partition(",")[0] for row in rows[:2] if (found["ratio"][row[1]] or 1) < 1]
    if slower:
        lines.append(f"SLOWER than dense: {' and '.join(slower)}")
    lines += [f"{side}: {found[side]['loaded_with']}, {found[side]['dtype']}" for side in SIDES]
    lines.append(
        f"batch 1, greedy, {found['text']}; medians of {work['rounds']} rounds of {work['repeats']} in turn, "
        f"{found['compressed']['threads']} threads; memory is read at "
        f"{bandwidth['bytes_per_second'] / 1e9:.1f} GB/s ({bandwidth['probe']})"
    )
    return "\n".join(lines)
