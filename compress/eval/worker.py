"""One measurement in a process of its own: ``python -m compress.eval.worker request.json``.

The request names the task, its arguments and where the result goes; ``process.py`` writes it and reads the answer.
Tasks: ``evaluate`` (arguments of ``compress.evaluate``), ``resident`` (memory of a loaded folder), ``logits`` (of a
folder through our own loader, for ``verify.py``), ``speed`` (of a folder), ``bandwidth`` (of the machine's memory).
Progress goes to standard output, one JSON object a line after ``@progress``; the result is written to a temporary name
and renamed. Where the process that asked is gone, so is this.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import errors
from compress.report.write import write_json

MARK = "@progress "


def main(request_file: str) -> int:
    """Do what a request file asks; write ``{"result": ...}`` or ``{"error": class, "message": ...}``."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    if request.get("watch"):
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        answer: dict[str, Any] = {"result": TASKS[request["task"]](**request["arguments"])}
    except (errors.UserError, errors.NumericsError, errors.VerificationError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    write_json(Path(request["result"]), answer)
    return 0


def run_evaluate(**arguments: Any) -> dict[str, Any]:
    """``compress.evaluate`` with its progress as lines."""
    from compress.eval.measure import evaluate

    def tell(done: int, total: int, perplexity: float) -> None:
        print(MARK + json.dumps({"done": done, "total": total, "perplexity": perplexity}), flush=True)

    return evaluate(**arguments, progress=tell)


def run_resident(folder: str, dtype: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """By how much this process's resident memory grows from before loading to after one forward of 16 tokens."""
    import psutil
    import torch

    # Imported before the first reading, so that code is not counted as the model's.
    import transformers.models.auto.modeling_auto  # noqa: F401

    from compress.eval.loading import open_model

    process = psutil.Process()
    before = process.memory_info().rss
    opened = open_model(Path(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        opened.model(input_ids=torch.arange(16)[None], use_cache=False)
    gc.collect()
    return {"resident_bytes": max(0, process.memory_info().rss - before), "loaded_with": opened.loaded_with}


def run_logits(
    folder: str, probe: str, out: str, dtype: str, device: str = "cpu", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Logits of probe tokens by the folder as our own loader decodes it.

    Not on our kernels: what is asked is whether the files hold the weights that were meant, and kernels add up in
    another order, which in bfloat16 costs as much as one slightly wrong layer.
    """
    from compress.eval import stock
    from compress.runtime.load import load

    model = load(folder, dtype, device, trust_remote_code, kernels="off").eval()
    info = {"class": type(model).__name__, "versions": stock.list_versions()}
    stock.write_logits(model, probe, out, info)
    return info


def run_speed(**arguments: Any) -> dict[str, Any]:
    """Tokens per second and memory of a folder."""
    from compress.eval.speed import measure_folder

    return measure_folder(**arguments)


def run_bandwidth(threads: int | None = None) -> dict[str, Any]:
    """How fast this machine reads memory."""
    import torch

    from compress.eval.speed import measure_bandwidth

    if threads is not None:
        torch.set_num_threads(threads)
    return measure_bandwidth()


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "evaluate": run_evaluate,
    "resident": run_resident,
    "logits": run_logits,
    "speed": run_speed,
    "bandwidth": run_bandwidth,
}


def _leave_with_parent() -> None:
    """Standard input is a pipe that the parent holds open: it ends when the parent does."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
