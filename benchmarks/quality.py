"""Perplexity of the shipped recipes on the demo model, and what each ingredient of gptq buys; one JSON file of figures.

    python benchmarks/quality.py --corpus FOLDER [--only gptq4 ...] [--set-of recipes|ablation]

``FOLDER`` holds WikiText-2: ``test.raw.txt`` to measure on, ``valid.calibration.txt`` to calibrate on. Protocol: the
first 16 windows of 2048 tokens of each, bf16 forward. Every case runs ``compress`` as a user would; its figures are
appended to ``benchmarks/results/quality.json`` and a case that is there is not run again unless ``--again``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality.json"
PROTOCOL = (
    "calibration.samples=16", "calibration.tokens=2048", "calibration.seed=null", "eval.windows=16", "eval.tokens=2048",
)  # fmt: skip

RECIPES: dict[str, tuple[str, ...]] = {name: (name,) for name in ("rtn8", "rtn4", "gptq4", "gptq3", "gptq2")}
# From the textbook to the default, one ingredient at a time, and the default with one ingredient taken away.
PLAIN = (
    "steps.0.clip_search=false", "steps.0.order=none", "steps.0.targets=layer", "steps.0.refinements=0",
    "steps.0.damping=0.01",
)  # fmt: skip
ABLATION: dict[str, tuple[str, ...]] = {
    f"{recipe}: {name}": (recipe, *settings)
    for recipe in ("gptq4", "gptq3", "gptq2")
    for name, settings in {
        "textbook (min-max grid, columns in order, 1% damping)": PLAIN,
        "default without refinement": ("steps.0.refinements=0",),
        "default without targets from the dense stream": ("steps.0.targets=layer",),
        "default without clip search": ("steps.0.clip_search=false",),
        "default with columns in order": ("steps.0.order=none",),
        "default with 1% damping": ("steps.0.damping=0.01",),
        "default, all statistics before the block changes": ("steps.0.true_sequential=false",),
        "default, symmetric": ("steps.0.symmetric=true",),
        "default, float zeros (native format)": ("steps.0.float_zero=true", "format=native"),
    }.items()
}


def main() -> None:
    """Run the cases that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder with test.raw.txt and valid.calibration.txt")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--set-of", choices=("recipes", "ablation"), default="recipes")
    parser.add_argument("--only", nargs="*", help="words that a case's name must start with")
    parser.add_argument("--again", action="store_true", help="run cases that are recorded already")
    options = parser.parse_args()
    cases = RECIPES if options.set_of == "recipes" else ABLATION
    for name, (recipe, *settings) in cases.items():
        if options.only and not any(name.startswith(word) for word in options.only):
            continue
        recorded = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        if name in recorded and not options.again:
            continue
        recorded[name] = run_case(recipe, settings, options.model, options.corpus)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(recorded, indent=1) + "\n")
        print(format_row(name, recorded[name]), flush=True)


def run_case(recipe: str, settings: list[str], model: str, corpus: str) -> dict[str, Any]:
    """One ``compress`` run in a scratch folder; the figures of its report."""
    with tempfile.TemporaryDirectory(prefix="compress-quality-") as scratch:
        folder = Path(scratch, "out")
        command = [sys.executable, "-m", "compress", "--recipe", recipe, "--model", model, "--output", str(folder)]
        for setting in (f"calibration.corpus={corpus}", f"eval.corpus={corpus}", *PROTOCOL, *settings):
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((folder / "report.json").read_text())
    compressed = report["compressed"]
    errors = [layer["output_error"] for layer in report["layers"] if layer["output_error"] is not None]
    return {
        "settings": settings,
        "dense_perplexity": report["dense"]["perplexity"],
        **{key: compressed[key] for key in ("perplexity", "kl", "top1_agreement", "bits_per_weight", "bytes")},
        "mean_output_error": sum(errors) / len(errors),
        "fallbacks": len(report["fallbacks"]),
        **{key: report[key] for key in ("seconds", "peak_bytes", "protocol", "versions", "machine")},
    }


def format_row(name: str, case: dict[str, Any]) -> str:
    """A line of the table in markdown."""
    return (
        f"| {name} | {case['bits_per_weight']:.2f} | {case['perplexity']:.2f} | {case['kl']:.3f} | "
        f"{case['top1_agreement']:.1%} | {case['seconds']:.0f} s | {case['peak_bytes'] / 1e6:.0f} MB |"
    )


if __name__ == "__main__":
    main()
