"""Peak resident memory of ``compress`` on random Llamas of 4 GB (rtn) and 1 GB (gptq), beside what plan had said.

``python benchmarks/memory.py [--folder DIR]``; writes ``benchmarks/results/memory.json``. Making the models and running
takes about 12 GB of disk in ``--folder`` (default: a temporary folder), which is freed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.report.build import describe_machine, list_versions
from compress.report.table import size

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import write_llama
from watch import watch

RESULT = Path(__file__).parent / "results" / "memory.json"


@dataclass(frozen=True)
class Case:
    """A model to make, a recipe to run on it, and what is claimed of the peak."""

    name: str
    gigabytes: float
    recipe: str
    settings: tuple[str, ...]
    limit_bytes: int | None = None  # the peak must be below
    plan_within: float | None = None  # plan's bound must be within this share of the peak


CASES = (
    Case("rtn-4GB", 4.0, "rtn4", ("eval=null",), limit_bytes=1_500_000_000),
    Case(
        "gptq-1GB",
        1.0,
        "gptq4",
        ("eval=null", "calibration.corpus=pydoc", "calibration.samples=8", "calibration.tokens=1024"),
        plan_within=0.2,
    ),
)


def run_case(case: Case, scratch: Path) -> dict[str, Any]:
    """Make the model, compress it in a process of its own, compare with plan and with the claim."""
    model, output = scratch / case.name / "model", scratch / case.name / "output"
    print(f"{case.name}: writing {case.gigabytes} GB of random weights", flush=True)
    about = write_llama(model, case.gigabytes)
    command = [
        sys.executable,
        "-m",
        "compress",
        "--recipe",
        case.recipe,
        "--model",
        str(model),
        "--output",
        str(output),
    ]
    for setting in case.settings:
        command += ["--set", setting]
    print(f"{case.name}: {' '.join(command[2:])}", flush=True)
    seen = watch(command)
    if seen.code != 0:
        raise SystemExit(f"{case.name}: ended with code {seen.code}:\n{seen.output[-3000:]}")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    planned = report["plan"]["peak_bytes"]
    result = {
        "case": case.name,
        "model": about,
        "recipe": case.recipe,
        "settings": list(case.settings),
        "peak_bytes": seen.peak_bytes,
        "peak_bytes_children": seen.peak_bytes_children,
        "planned_bytes": planned,
        "peak_over_plan": seen.peak_bytes / planned,
        "seconds": seen.seconds,
        "limit_bytes": case.limit_bytes,
        "plan_within": case.plan_within,
    }
    result["passed"] = judge(result)
    print(
        f"{case.name}: peak {size(seen.peak_bytes)}, plan {size(planned)} "
        f"(peak / plan {result['peak_over_plan']:.2f}), child processes {size(seen.peak_bytes_children)}, "
        f"{seen.seconds:.0f} s: {'as claimed' if result['passed'] else 'NOT AS CLAIMED'}",
        flush=True,
    )
    return result


def judge(result: dict[str, Any]) -> bool:
    below = result["limit_bytes"] is None or result["peak_bytes"] < result["limit_bytes"]
    near = result["plan_within"] is None or abs(result["peak_over_plan"] - 1) <= result["plan_within"]
    return bool(below and near)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the models are made")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="only these")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compress-memory-", dir=arguments.folder) as scratch:
        chosen = [case for case in CASES if not arguments.case or case.name in arguments.case]
        results = [run_case(case, Path(scratch)) for case in chosen]
    content = {"machine": describe_machine(), "versions": list_versions(), "results": results}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.result}")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
