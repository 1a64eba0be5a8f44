"""Run a command and watch its memory: the largest resident set of the process itself, and of all its children."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PERIOD = 0.05  # seconds between two looks


@dataclass(frozen=True)
class Watched:
    """What a command took. The children of ``compress`` are its verification and its evaluation."""

    code: int
    seconds: float
    peak_bytes: int  # of the process itself
    peak_bytes_children: int  # of its children, those that live at the same time added up
    output: str  # standard output and error, in one


def watch(command: Sequence[str], cwd: Path | None = None) -> Watched:
    """Run to the end. On Linux the process's own peak is the kernel's (VmHWM), elsewhere the largest that was seen."""
    start = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    words: list[str] = []
    reader = threading.Thread(target=lambda: words.extend(child.stdout or ()))
    reader.start()
    process = psutil.Process(child.pid)
    peak = peak_children = 0
    while child.poll() is None:
        try:
            peak = max(peak, read_peak(process))
            peak_children = max(peak_children, sum(_resident(one) for one in process.children(recursive=True)))
        except psutil.NoSuchProcess:
            break
        time.sleep(PERIOD)
    child.wait()
    reader.join()
    return Watched(child.returncode, time.perf_counter() - start, peak, peak_children, "".join(words))


def read_peak(process: psutil.Process) -> int:
    """Largest resident set so far where the system keeps it, else the present one, in bytes."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return _resident(process)
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0][1]) if lines else 0


def _resident(process: psutil.Process) -> int:
    try:
        resident: int = process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return resident
