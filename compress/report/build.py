"""Put together ``report.json`` from what the loop and the judge found; see ``build_report`` for its keys."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compress.report.write import clean
from compress.types import LayerReport

SCHEMA = 1  # raised when a key changes its meaning or goes
PACKAGES = (
    "compress-lm", "torch", "transformers", "accelerate", "compressed-tensors", "safetensors", "tokenizers", "numpy",
    "gguf",
)  # fmt: skip


def build_report(
    *,
    plan: Mapping[str, Any],
    layers: Sequence[LayerReport | Mapping[str, Any]],
    dense_bytes: int,
    compressed_bytes: int,
    seconds: float,
    peak_bytes: int,
    evaluation: Mapping[str, Any] | None = None,
    verification: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    resident: Mapping[str, int] | None = None,
    stages: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that a run says about itself, as plain data ready for JSON.

    ``plan``: ``Plan.to_dict()``. ``evaluation``: what ``compress.evaluate(folder, against=dense)`` gave, None where
    the recipe asks for none. ``verification``: what ``eval.verify.verify`` gave. ``calibration``: the protocols of the
    texts that the run looked at, ``calibration`` (absent for methods without data), the held-out ``probe`` and the
    ``head`` text that shows the output head's input (absent where the recipe has no head).
    ``resident``: bytes of memory of the loaded ``dense`` and ``compressed`` model. ``seconds`` of the whole run so far
    and by ``stages``; ``peak_bytes``: largest resident memory of this process.

    Keys: ``schema``, ``dense``, ``compressed``, ``protocol`` (with ``calibration`` and ``probe``), ``untouched_share``,
    ``untouched``, ``layers``, ``fallbacks``, ``verification``, ``recipe``, ``digest``, ``plan``, ``seconds``,
    ``stages``, ``peak_bytes``, ``versions``, ``machine``. In ``compressed``, ``bits_per_weight`` is of the compressed
    layers in the blocks, ``bits_per_weight_head`` of embedding and output head where they are compressed,
    ``bits_per_weight_model`` of all that is on disk.
    """
    rows = [asdict(layer) if isinstance(layer, LayerReport) else dict(layer) for layer in layers]
    measured, before = evaluation or {}, (evaluation or {}).get("dense") or {}
    held = resident or {}
    ends = set((plan.get("head") or {}).get("layers", ()))  # embedding and output head, where the recipe has a head
    report = {
        "schema": SCHEMA,
        "dense": {
            "perplexity": before.get("perplexity"),
            "bytes": dense_bytes,
            "resident_bytes": held.get("dense"),
        },
        "compressed": {
            "perplexity": measured.get("perplexity"),
            "bytes": compressed_bytes,
            "kl": measured.get("kl"),
            "top1_agreement": measured.get("top1_agreement"),
            "bits_per_weight": mean_bits([row for row in rows if row["name"] not in ends]),
            "bits_per_weight_head": mean_bits([row for row in rows if row["name"] in ends]),
            "bits_per_weight_model": measured.get("bits_per_weight"),
            "parameters": measured.get("parameters"),
            "resident_bytes": held.get("compressed"),
            "loaded_with": measured.get("loaded_with"),
        },
        "protocol": {**measured.get("protocol", {}), "calibration": None, **(calibration or {})},
        "untouched_share": plan["untouched_share"],
        "untouched": plan["untouched"],
        "layers": rows,
        "fallbacks": list_fallbacks(plan, rows),
        "verification": verification,
        "recipe": plan["recipe"],
        "digest": plan["recipe_digest"],
        "plan": {
            key: value for key, value in plan.items() if key not in ("recipe", "recipe_digest", "layers", "untouched")
        },
        "seconds": seconds,
        "stages": stages or {},
        "peak_bytes": peak_bytes,
        "versions": list_versions(),
        "machine": describe_machine(),
    }
    cleaned: dict[str, Any] = clean(report)
    return cleaned


def mean_bits(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Bits per weight over some layers, scales and zeros counted; None where there are none."""
    sizes = [row["shape"][0] * row["shape"][1] for row in rows]
    bits = sum(row["bits_per_weight"] * size for row, size in zip(rows, sizes, strict=True))
    return bits / sum(sizes) if sizes else None


def list_fallbacks(plan: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Every place where something else was done than the recipe asked: by plan (adjusted, skipped) or by a method."""
    planned = [{"name": name, "fallback": text} for name, text in plan.get("adjusted", {}).items()]
    planned += [{"name": name, "fallback": f"left as it is: {text}"} for name, text in plan.get("skipped", {}).items()]
    return planned + [{"name": row["name"], "fallback": row["fallback"]} for row in rows if row.get("fallback")]


def list_versions() -> dict[str, str]:
    """Versions of what had a hand in the numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> dict[str, Any]:
    """What seconds depend on: processor, cores that this process may use, memory, system."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The processor's name; ``platform.processor()`` is empty on most Linux systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
