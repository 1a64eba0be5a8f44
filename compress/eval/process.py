"""Run a task of ``worker.py`` in a fresh process: its memory is its own, and nothing of this process helps it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress import errors
from compress.eval.worker import MARK

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
TAIL = 2000  # characters of a dead process's last words that a message repeats


def run_worker(
    task: str, arguments: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None = None
) -> Any:
    """The result of a task. Its UserError, NumericsError or VerificationError is raised here again as such.

    RuntimeError with the end of its standard error where the process died without an answer (killed for memory).
    """
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        content = {"task": task, "arguments": arguments, "result": str(result), "watch": True}
        request.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", "compress.eval.worker", str(request)]
        with open(Path(folder, "stderr"), "w+", encoding="utf-8", errors="replace") as words:
            with _child(command, words) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    if on_progress is not None and line.startswith(MARK):
                        on_progress(json.loads(line.removeprefix(MARK)))
                code = child.wait()
            words.seek(0)
            said = words.read()[-TAIL:]
        if not result.exists():
            raise RuntimeError(f"the process for {task!r} ended with code {code} and no result:\n{said}")
        answer = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["result"]


def evaluate_folder(
    folder: str | Path, on_progress: Callable[[dict[str, Any]], None] | None = None, **arguments: Any
) -> dict[str, Any]:
    """``compress.evaluate`` of a folder in a fresh process; ``on_progress`` gets ``{done, total, perplexity}``."""
    result: dict[str, Any] = run_worker("evaluate", {"model": str(folder), **arguments}, on_progress)
    return result


def measure_resident(folder: str | Path, dtype: str = "auto", trust_remote_code: bool = False) -> int:
    """Bytes of resident memory that a loaded folder takes, weights and what one short forward needs."""
    arguments = {"folder": str(folder), "dtype": dtype, "trust_remote_code": trust_remote_code}
    return int(run_worker("resident", arguments)["resident_bytes"])


@contextmanager
def _child(command: list[str], words: Any) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()
