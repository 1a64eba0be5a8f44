"""LLM.int8() on the demo model: perplexity and speed against the outlier threshold.

    python benchmarks/outliers.py --folder out/int8 [--corpus pydoc|FOLDER] [--windows 16] [--thresholds 0 2 4 6 ...]

``FOLDER`` is what ``compress --recipe llm_int8`` wrote. The threshold is a choice at run time, so one folder serves for
all; 0 means that nothing is left out. Speed: prefill of 919 tokens, decode of 64, every threshold in turn, medians.
Also counts, over the prefill, which share of the input features is multiplied in high precision. Writes
``benchmarks/results/outliers.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import compress
from compress.bench import cut_text
from compress.eval.loading import open_tokenizer
from compress.eval.speed import Workload, measure_model
from compress.report.build import describe_machine, list_versions
from compress.runtime.int8_linear import Int8Linear

RESULT = Path(__file__).parent / "results" / "outliers.json"


def set_threshold(model: Any, threshold: float) -> None:
    """The same for all layers; what the fused decode step copied of it is forgotten."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.threshold = threshold
    step = getattr(model.base_model, "_compress_step", None)
    if step is not None:
        step.native = None


@torch.no_grad()
def count_outliers(model: Any, ids: torch.Tensor, threshold: float) -> dict[str, float]:
    """Share of input features that some token reaches the threshold in: mean over layers, and the largest layer's."""
    shares: dict[str, float] = {}

    def look(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            shares[name] = float((rows.abs() >= threshold).any(0).float().mean()) if threshold > 0 else 0.0

        return hook

    hooks = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear)
    ]
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {"mean_share": statistics.mean(shares.values()), "largest_share": max(shares.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--corpus", default="pydoc")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 2.0, 4.0, 6.0, 10.0, 20.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()

    model = compress.load(options.folder, kernels="require")
    workload = Workload()
    ids = torch.tensor(cut_text(options.folder, workload)[0])
    speeds: dict[float, list[dict[str, Any]]] = {threshold: [] for threshold in options.thresholds}
    with torch.inference_mode():
        for _ in range(options.rounds):
            for threshold in options.thresholds:
                set_threshold(model, threshold)
                speeds[threshold].append(measure_model(model, ids, workload))
    rows = []
    tokenizer = open_tokenizer(options.folder)
    print("| threshold | features left out: mean, most | perplexity | prefill | decode |")
    print("| --- | --- | --- | --- | --- |")
    for threshold in options.thresholds:
        set_threshold(model, threshold)
        found = compress.evaluate(model, corpus=options.corpus, windows=options.windows, tokenizer=tokenizer)
        row = {
            "threshold": threshold,
            **count_outliers(model, ids[None], threshold),
            "perplexity": found["perplexity"],
            **{
                key: statistics.median(one[key] for one in speeds[threshold])
                for key in ("prefill_tokens_per_second", "decode_tokens_per_second")
            },
        }
        rows.append(row)
        print(
            f"| {threshold:g} | {row['mean_share']:.2%}, {row['largest_share']:.1%} | {row['perplexity']:.3f} | "
            f"{row['prefill_tokens_per_second']:.0f} | {row['decode_tokens_per_second']:.1f} |",
            flush=True,
        )
    about = {"machine": describe_machine(), "versions": list_versions(), "protocol": found["protocol"], "results": rows}
    options.result.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
