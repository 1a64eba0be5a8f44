"""``report.json`` as a page for the terminal: what it cost, under which protocol, and where it hurts most."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

WORST = 5  # layers by output error
SHOWN = 5  # reasons and fallbacks written out; the rest is counted
NONE = "-"


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Draw a report on a console (default: standard output)."""
    (console or Console()).print(draw(report))


def render_text(report: Mapping[str, Any], width: int = 100) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    print_report(report, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def draw(report: Mapping[str, Any]) -> Group:
    """The parts of the page, those that the report has."""
    parts = [
        _headline(report),
        _lines(report),
        _worst(report),
        _bullets("fallbacks", [f"{row['name']}: {row['fallback']}" for row in report["fallbacks"]]),
    ]
    return Group(*(part for part in parts if part is not None))


def _headline(report: Mapping[str, Any]) -> Table:
    dense, compressed = report["dense"], report["compressed"]
    table = Table(box=box.SIMPLE_HEAD, title="before and after", title_justify="left")
    for name in ("", "dense", "compressed", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("perplexity", *_pair(dense["perplexity"], compressed["perplexity"], number, "{:.3f}x"))
    table.add_row("bytes on disk", *_pair(dense["bytes"], compressed["bytes"], size, "{:.3f}x"))
    if dense.get("resident_bytes") or compressed.get("resident_bytes"):
        table.add_row("bytes in memory", *_pair(dense["resident_bytes"], compressed["resident_bytes"], size, "{:.3f}x"))
    single = (
        ("KL, dense to compressed, nats per token", compressed["kl"], "{:.4f}"),
        ("same first token", compressed["top1_agreement"], "{:.2%}"),
        ("bits per weight, compressed layers in the blocks", compressed["bits_per_weight"], "{:.3f}"),
        ("bits per weight, embedding and output head", compressed.get("bits_per_weight_head"), "{:.3f}"),
        ("bits per weight, whole model", compressed["bits_per_weight_model"], "{:.3f}"),
    )
    for name, value, form in single:
        if value is not None:
            table.add_row(name, "", form.format(value), "")
    return table


def _pair(before: float | None, after: float | None, form: Any, ratio: str) -> tuple[str, str, str]:
    known = before is not None and after is not None and before > 0
    words = [NONE if value is None else form(value) for value in (before, after)]
    return words[0], words[1], ratio.format(after / before) if known else NONE  # type: ignore[operator]


def _lines(report: Mapping[str, Any]) -> Text:
    """The protocol, what was left untouched and why, the check, the cost: one line each."""
    lines = [describe_protocol(report["protocol"])]
    if report["protocol"].get("calibration"):
        lines.append(f"calibration: {_windows(report['protocol']['calibration'])}")
    reasons = [f"{row['share']:.2%} {row['reason']}" for row in report["untouched"][:SHOWN]]
    more = len(report["untouched"]) - len(reasons)
    why = f" ({'; '.join(reasons)}{f'; {more} more reasons' if more > 0 else ''})" if reasons else ""
    lines.append(f"untouched: {report['untouched_share']:.2%} of the parameters{why}")
    lines.append(describe_verification(report["verification"]))
    lines.append(f"took {report['seconds']:.0f} s; largest resident memory {size(report['peak_bytes'])}")
    return Text("\n".join(f"  {line}" for line in lines))


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """The line that must stand beside every perplexity."""
    if "windows" not in protocol:
        return "protocol: not measured (the recipe has eval: null)"
    return (
        f"protocol: {_windows(protocol)}, {protocol['predicted_tokens']} predicted tokens, "
        f"{protocol['dtype']} on {protocol['device']}"
    )


def _windows(protocol: Mapping[str, Any]) -> str:
    return (
        f"{protocol['corpus']} ({protocol['part']} part, sha256 {protocol['sha256'][:12]}), "
        f"{protocol['windows']} windows of {protocol['tokens']} ({protocol['selection']}), "
        f"stride {protocol['stride']}, BOS {protocol['bos']}"
    )


def describe_verification(verification: Mapping[str, Any] | None) -> str:
    if verification is None:
        return "reload: not checked"
    error, limit = verification["relative_rms"], verification["tolerance"]
    return (
        f"reload: logits agree to {error:.2g} relative RMS (at most {limit:.2g}); "
        f"checked with {verification['checked_with']}"
    )


def _worst(report: Mapping[str, Any]) -> Table | None:
    rows = [row for row in report["layers"] if row.get("output_error") is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: -row["output_error"])
    total = len(report["layers"])
    title = f"largest output error, {min(WORST, len(rows))} of {total} layers"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    columns = ("layer", "method", "output error", "weight error", "bits", "seconds")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=index == 0)
    for row in rows[:WORST]:
        weight_error = NONE if row.get("weight_error") is None else f"{row['weight_error']:.2e}"
        figures = (f"{row['output_error']:.2e}", weight_error, f"{row['bits_per_weight']:.2f}", f"{row['seconds']:.1f}")
        table.add_row(escape(row["name"]), escape(row["method"]), *figures)
    return table


def _bullets(title: str, lines: list[str]) -> Text | None:
    if not lines:
        return None
    shown = [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more, in report.json"] if len(lines) > SHOWN else [])]
    return Text("\n".join([f"  {title} ({len(lines)}):", *(f"    {line}" for line in shown)]))


def number(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.3g}"


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}" if unit == "GB" else f"{nbytes / scale:.1f} {unit}"
    return f"{int(nbytes)} B"
