"""Time and memory of ``compress --recipe gptq4`` beside GPTQModel: same model, same calibration tokens, in turn.

``python benchmarks/peers.py --peer-python VENV/bin/python [--text FILE_OR_FOLDER] [--eval-corpus ...] [--rounds 2]``;
writes ``benchmarks/results/peers.json``. GPTQModel lives in a venv of its own and is run by ``peer_gptqmodel.py``.
Seconds are of the quantization: load, quantize, save; importing packages, checking and measuring are left out on both
sides. ``wall_seconds`` are of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress import recipe as recipes
from compress.eval import corpus as corpora
from compress.eval.loading import find_folder, open_tokenizer
from compress.eval.process import evaluate_folder
from compress.eval.windows import cut_windows
from compress.report.build import describe_machine, list_versions
from compress.report.table import size

sys.path.insert(0, str(Path(__file__).parent))
from watch import Watched, watch

HERE = Path(__file__).parent
RESULT = HERE / "results" / "peers.json"
MARK = "@result "


def run_ours(model: Path, output: Path, recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """``compress`` without its evaluation; seconds as its report has them."""
    command = [
        sys.executable,
        "-m",
        "compress",
        "--recipe",
        recipe,
        "--model",
        str(model),
        "--output",
        str(output),
        "--fresh",
    ]
    for setting in (*settings, "eval=null"):
        command += ["--set", setting]
    seen = watch(command)
    stop_on_error("compress", seen)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    bits = report["compressed"]["bits_per_weight"]
    return {"who": "compress", "seconds": report["seconds"], **describe(seen), "bits_per_weight": bits}


def run_peer(python: str, model: Path, windows: Path, output: Path, step: dict[str, Any]) -> dict[str, Any]:
    """GPTQModel with its defaults, the recipe's bits and group size."""
    script = [python, str(HERE / "peer_gptqmodel.py"), str(model.resolve()), str(windows), str(output)]
    # It leaves a folder of logs where it runs: next to the output, which is in the scratch folder.
    seen = watch([*script, "--bits", str(step["bits"]), "--group-size", str(step["group_size"])], cwd=output.parent)
    stop_on_error("GPTQModel", seen)
    inner = read_result(seen.output)
    return {"who": "GPTQModel", "seconds": inner["seconds"], **describe(seen), "versions": inner["versions"]}


def describe(seen: Watched) -> dict[str, Any]:
    return {
        "wall_seconds": seen.seconds,
        "peak_bytes": seen.peak_bytes,
        "peak_bytes_children": seen.peak_bytes_children,
    }


def stop_on_error(who: str, seen: Watched) -> None:
    if seen.code != 0:
        raise SystemExit(f"{who} ended with code {seen.code}:\n{seen.output[-3000:]}")


def read_result(output: str) -> dict[str, Any]:
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(f"GPTQModel gave no result:\n{output[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return result


def write_windows(model: Path, recipe: recipes.Recipe, path: Path) -> dict[str, Any]:
    """The calibration windows that our run cuts, as token ids for the peer."""
    wanted = recipe.calibration
    text = corpora.load(wanted.corpus, "calibration")
    tokenizer = open_tokenizer(model)
    windows = cut_windows(text, tokenizer, tokens=wanted.tokens, count=wanted.samples, seed=wanted.seed)
    path.write_text(json.dumps(windows.ids.tolist()), encoding="utf-8")
    return windows.protocol()


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each side and our share of the peer's."""
    keys = ("seconds", "wall_seconds", "peak_bytes")
    middle = {
        who: {key: statistics.median(run[key] for run in runs if run["who"] == who) for key in keys}
        for who in ("compress", "GPTQModel")
    }
    ratio = {key: middle["compress"][key] / middle["GPTQModel"][key] for key in keys}
    return {**middle, "compress_over_GPTQModel": ratio}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="Python of a venv that has gptqmodel")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="gptq4")
    parser.add_argument("--text", default="pydoc", help="calibration corpus: a name, a text file or a folder")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="as for compress")
    parser.add_argument("--eval-corpus", help="measure the perplexity of both results on this corpus too")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only see whether the peer starts")
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    settings = [f"calibration.corpus={arguments.text}", *arguments.settings]
    recipe = recipes.load(arguments.recipe, settings)
    model = find_folder(arguments.model)
    if os.sep in arguments.peer_python:  # it is run from another folder; a link into a venv must stay one
        arguments.peer_python = os.path.abspath(arguments.peer_python)
    with tempfile.TemporaryDirectory(prefix="compress-peers-") as scratch:
        windows, outputs = Path(scratch, "windows.json"), {who: Path(scratch, who) for who in ("compress", "GPTQModel")}
        protocol = write_windows(model, recipe, windows)
        if arguments.check:
            command = [
                arguments.peer_python,
                str(HERE / "peer_gptqmodel.py"),
                str(model.resolve()),
                str(windows),
                scratch,
                "--check",
            ]
            return subprocess.run(command, check=False, cwd=scratch).returncode
        runs: list[dict[str, Any]] = []
        for _ in range(arguments.rounds):
            runs.append(run_ours(model, outputs["compress"], arguments.recipe, settings))
            tell(runs[-1])
            runs.append(
                run_peer(arguments.peer_python, model, windows, outputs["GPTQModel"], recipe.steps[0].to_dict())
            )
            tell(runs[-1])
        quality = {}
        if arguments.eval_corpus:
            for who, folder in outputs.items():
                found = evaluate_folder(folder, corpus=arguments.eval_corpus, dtype="bfloat16")
                quality[who] = {key: found[key] for key in ("perplexity", "bytes", "protocol", "loaded_with")}
                print(f"{who}: perplexity {found['perplexity']:.3f}, {size(found['bytes'])} on disk", flush=True)
    summary = summarize(runs)
    content = {
        "machine": describe_machine(),
        "versions": list_versions(),
        "model": arguments.model,
        "recipe": recipe.to_dict(),
        "calibration": protocol,
        "runs": runs,
        "summary": summary,
        "quality": quality,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    ratio = summary["compress_over_GPTQModel"]
    print(f"compress / GPTQModel: seconds {ratio['seconds']:.2f}, peak memory {ratio['peak_bytes']:.2f}")
    print(f"written to {arguments.result}")
    return 0


def tell(run: dict[str, Any]) -> None:
    print(
        f"{run['who']}: {run['seconds']:.0f} s ({run['wall_seconds']:.0f} s in all), peak {size(run['peak_bytes'])}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
