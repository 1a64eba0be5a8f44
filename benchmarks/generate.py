"""Tokens per second of a whole model: compressed folders beside Transformers, bitsandbytes and llama.cpp, in one run.

    python benchmarks/generate.py --compress gptq4=out/demo [--compress NAME=FOLDER ...]
        [--llama-bench PATH --gguf Q4_0=FILE --gguf Q8_0=FILE] [--model demo] [--rounds 3] [--only NAME ...]

Contenders take turns, each in a fresh process every round; medians over rounds, ratios to Transformers in bf16.

- Prefill: one forward over 919 tokens of text (pydoc, test part) into a new cache, logits of the last token only.
- Decode: greedy ``generate``, batch 1, prompt of 32 tokens; the 64 tokens after the first new one, so without the
  prompt's prefill. llama-bench decodes 64 tokens at a depth of 32 instead, tokens at random, no sampling.
- Memory: growth of resident memory from before loading to after a first short forward. For llama.cpp the peak of the
  process, its mapped file included.

llama.cpp is a build of its own: this script runs its ``llama-bench`` and reads the JSON. bitsandbytes must be installed
beside Transformers, else it is left out and named. Writes ``benchmarks/results/generate.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compress
from compress.bench import cut_text
from compress.eval.loading import find_folder
from compress.eval.process import run_worker
from compress.eval.speed import LOADERS, Workload, measure_process
from compress.report.build import describe_machine, list_versions

sys.path.insert(0, str(Path(__file__).parent))
from watch import Watched, watch

HERE = Path(__file__).parent
RESULT = HERE / "results" / "generate.json"
MARK = "@result "
BASE = "transformers bf16"
THRESHOLD = 6.0  # of LLM.int8()
FIGURES = ("prefill_tokens_per_second", "decode_tokens_per_second", "resident_bytes", "load_seconds")


@dataclass(frozen=True)
class Contender:
    """Who runs: ``kind`` is ``stock``, ``compress``, ``bitsandbytes`` or ``llama.cpp``; ``path`` a folder or GGUF."""

    name: str
    kind: str
    path: str
    dtype: str = "bfloat16"


def load_bitsandbytes(folder: str, dtype: str) -> tuple[Any, str]:
    """LLM.int8() with the dense model's weights, quantized while loading."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=config, device_map={"": "cpu"}
    )
    return model.eval(), f"bitsandbytes {importlib.metadata.version('bitsandbytes')}, int8, threshold {THRESHOLD}"


def run_one(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process does for a contender that is a PyTorch model."""
    one, folder = Contender(**request["contender"]), request["contender"]["path"]

    def load() -> tuple[Any, str]:
        if one.kind == "bitsandbytes":
            return load_bitsandbytes(folder, one.dtype)
        if one.kind == "compress":
            model = compress.load(folder, dtype=one.dtype, kernels="require")  # never time a fallback
            return model, f"compress.load: {model.compress_report}"
        return LOADERS[one.kind](Path(folder), one.dtype, False)

    if one.kind == "bitsandbytes":  # before memory is first read, as Transformers' own code is
        importlib.import_module("bitsandbytes")
    return measure_process(load, request["ids"], Workload(**request["workload"]), request["threads"])


def run_torch(one: Contender, ids: Sequence[int], work: Workload, threads: int) -> dict[str, Any]:
    request = {"contender": asdict(one), "ids": list(ids), "workload": asdict(work), "threads": threads}
    seen = watch([sys.executable, str(HERE / "generate.py"), "--one", json.dumps(request)])
    stop_on_error(one.name, seen)
    lines = [line for line in seen.output.splitlines() if line.startswith(MARK)]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return {**found, "peak_bytes": seen.peak_bytes}


def run_llama(one: Contender, bench: str, work: Workload, threads: int) -> dict[str, Any]:
    """Two calls of llama-bench: one of prefill, one of decode after a prompt."""
    command = [bench, "-m", one.path, "-t", str(threads), "-r", str(work.repeats), "-o", "json"]
    prefill, first = ask_llama(one.name, [*command, "-p", str(work.prefill_tokens), "-n", "0"])
    decode, second = ask_llama(
        one.name, [*command, "-p", "0", "-n", str(work.decode_tokens), "-d", str(work.prompt_tokens)]
    )
    return {
        "prefill_tokens_per_second": statistics.median(prefill["samples_ts"]),
        "decode_tokens_per_second": statistics.median(decode["samples_ts"]),
        "prefill_samples": prefill["samples_ts"],
        "decode_samples": decode["samples_ts"],
        "load_seconds": None,
        "resident_bytes": max(first.peak_bytes, second.peak_bytes),
        "loaded_with": f"llama.cpp {prefill['build_commit']} ({prefill['build_number']}), {prefill['model_type']}",
        "model_bytes": prefill["model_size"],
        "threads": threads,
    }


def ask_llama(name: str, command: list[str]) -> tuple[dict[str, Any], Watched]:
    seen = watch(command)
    stop_on_error(name, seen)
    start = seen.output.find("[\n")
    if start < 0:
        raise SystemExit(f"{name}: no JSON from {' '.join(command)}:\n{seen.output[-2000:]}")
    rows, _ = json.JSONDecoder().raw_decode(seen.output[start:])
    if len(rows) != 1:
        raise SystemExit(f"{name}: {len(rows)} results instead of one from {' '.join(command)}")
    return rows[0], seen


def stop_on_error(name: str, seen: Watched) -> None:
    if seen.code != 0:
        raise SystemExit(f"{name} ended with code {seen.code}:\n{seen.output[-3000:]}")


def list_contenders(options: argparse.Namespace, model: Path) -> list[Contender]:
    """In the order in which they run."""
    found = [
        Contender(BASE, "stock", str(model)),
        Contender("transformers f32", "stock", str(model), "float32"),
        *(Contender(f"compress {name}", "compress", path) for name, path in options.compress),
    ]
    if importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: left out")
    else:
        found.append(Contender("bitsandbytes int8", "bitsandbytes", str(model)))
    found += [Contender(f"llama.cpp {name}", "llama.cpp", path, "gguf") for name, path in options.gguf]
    if options.only:
        unknown = [word for word in options.only if not any(one.name.startswith(word) for one in found)]
        if unknown:
            raise SystemExit(
                f"--only {unknown[0]}: no such contender; there are {', '.join(one.name for one in found)}"
            )
        found = [one for one in found if any(one.name.startswith(word) for word in options.only)]
    return found


def run_rounds(contenders: Sequence[Contender], run: Callable[[Contender], dict[str, Any]], rounds: int) -> Any:
    """Name -> what each round gave."""
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contenders}
    for number in range(rounds):
        for one in contenders:
            seen = run(one)
            found[one.name].append(seen)
            print(
                f"round {number + 1}, {one.name}: prefill {seen['prefill_tokens_per_second']:.0f}, "
                f"decode {seen['decode_tokens_per_second']:.1f} tokens/s",
                flush=True,
            )
    return found


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians, and their ratio to Transformers in bf16 where that ran."""
    result: dict[str, dict[str, Any]] = {}
    for name, rounds in runs.items():
        values = {key: [one[key] for one in rounds if one[key] is not None] for key in FIGURES}
        result[name] = {key: statistics.median(found) if found else None for key, found in values.items()}
        result[name]["loaded_with"] = rounds[-1]["loaded_with"]
    base = result.get(BASE)
    for one in result.values():
        one["over_bf16"] = None
        if base is not None:
            one["over_bf16"] = {key: one[key] / base[key] if one[key] is not None else None for key in FIGURES[:3]}
    return result


def render(summary: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| | prefill, tokens/s | x bf16 | decode, tokens/s | x bf16 | memory, MB | x bf16 |"]
    lines.append("| --- |" + " ---: |" * 6)
    for name, one in summary.items():
        forms = ("{:,.0f}", "{:,.1f}", "{:,.0f}")
        cells = []
        for key, form in zip(FIGURES[:3], forms, strict=True):
            scale = 1e6 if key == "resident_bytes" else 1
            ratio = (one["over_bf16"] or {}).get(key)
            cells += [form.format(one[key] / scale), "-" if ratio is None else f"{ratio:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for key in FIGURES[:2]:
        slower = [name for name, one in summary.items() if one["over_bf16"] and one["over_bf16"][key] < 1]
        if slower:
            lines.append(f"\nSlower than {BASE} in {key.partition('_')[0]}: {', '.join(slower)}.")
    return "\n".join(lines)


def read_pair(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME=PATH")
    if not Path(path).expanduser().exists():
        raise argparse.ArgumentTypeError(f"{path}: no such file or folder")
    return name, str(Path(path).expanduser())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="the dense model")
    parser.add_argument("--compress", type=read_pair, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--llama-bench", help="llama-bench of a natively built llama.cpp")
    parser.add_argument("--gguf", type=read_pair, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--only", nargs="+", help="words that a contender's name must start with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="measurements per process")
    parser.add_argument("--prefill", type=int, default=919, help="tokens")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=describe_machine()["cores"])
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gguf and not options.llama_bench:
        parser.error("--gguf needs --llama-bench")
    return options


def main() -> int:
    options = parse()
    if options.one:
        print(MARK + json.dumps(run_one(json.loads(options.one))), flush=True)
        return 0
    model = find_folder(options.model)
    work = Workload(options.prefill, options.prompt, options.decode, options.repeats)
    ids, text = cut_text(model, work)

    def run(one: Contender) -> dict[str, Any]:
        if one.kind == "llama.cpp":
            return run_llama(one, options.llama_bench, work, options.threads)
        return run_torch(one, ids, work, options.threads)

    bandwidth = run_worker("bandwidth", {"threads": options.threads})
    runs = run_rounds(list_contenders(options, model), run, options.rounds)
    summary = summarize(runs)
    content = {
        "machine": describe_machine(),
        "versions": list_versions(),
        "model": options.model,
        "workload": {**asdict(work), "rounds": options.rounds, "batch": 1, "text": text, "threads": options.threads},
        "bandwidth": bandwidth,
        "summary": summary,
        "rounds": runs,
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(render(summary))
    print(f"written to {options.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
