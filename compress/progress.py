"""How far a run is: bars with the time left in a terminal and a notebook, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

LINE_SECONDS = 10.0  # between two plain lines of one stage


class Stage(Protocol):
    """One part of a run with a known number of equal pieces."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more pieces are done; ``note`` is what to show beside the bar."""


class Progress(Protocol):
    """Where a run tells how far it is. It is told, never asked: no result depends on it."""

    def say(self, text: str) -> None:
        """One line that stays, such as "block 3: damping raised"."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Stage]:
        """A ``with`` block around the work of one stage; gives the ``Stage`` to advance."""


def make_progress(quiet: bool = False, stream: IO[str] | None = None) -> Progress:
    """Bars if ``stream`` (default: stderr) is a terminal or this is a notebook, plain lines otherwise."""
    if quiet:
        return Silent()
    console = Console(file=stream or sys.stderr, highlight=False)
    if console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal):
        return Bars(console)
    return Lines(stream or sys.stderr)


class Silent:
    """Tells nobody."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        yield _SilentStage()


class _SilentStage:
    def advance(self, count: int = 1, note: str = "") -> None:
        pass


class Bars:
    """A bar per stage, with what is done, the time spent and the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with RichBars(*columns, console=self._console) as bars:
            yield _Bar(bars, bars.add_task(name, total=total, note=""))


class _Bar:
    def __init__(self, bars: RichBars, task: object) -> None:
        self._bars, self._task = bars, task

    def advance(self, count: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=count, note=note)  # type: ignore[arg-type]


class Lines:
    """A line when a stage starts and ends, and every ten seconds between."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        started = time.monotonic()
        self.say(f"{name}: {total} to do" if total > 1 else f"{name} ...")
        stage = _LineStage(self, name, total)
        yield stage
        done = f"{stage.done} of {total} done" if total > 1 else "done"
        self.say(f"{name}: {done} in {clock(time.monotonic() - started)}")


class _LineStage:
    def __init__(self, lines: Lines, name: str, total: int) -> None:
        self._lines, self._name, self._total = lines, name, total
        self.done = 0
        self._started = self._said = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self._said < LINE_SECONDS or self.done >= self._total:
            return
        self._said = now
        left = (now - self._started) / max(self.done, 1) * (self._total - self.done)
        self._lines.say(f"{self._name}: {self.done} of {self._total}, {clock(left)} left{', ' + note if note else ''}")


def clock(seconds: float) -> str:
    """``3:07`` or ``1:02:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
