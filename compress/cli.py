"""The command ``compress``: arguments in, exit code out. The work is in ``run``, ``plan``, ``eval`` and ``info``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("run", "plan", "eval", "bench", "recipes", "info")
EPILOG = """\
examples:
  compress --recipe gptq4 --model HuggingFaceTB/SmolLM2-135M --output out/small
  compress --recipe mine.yaml --model ./folder --set steps.0.bits=3 --set calibration.corpus=notes.txt
  compress plan --recipe rtn4 --model ./folder      what it would do, cost and leave; reads no weights
  compress eval out/small --against ./folder        perplexity, KL and agreement of a folder
  compress bench out/small                          tokens per second and memory beside the dense model
  compress recipes gptq4                            print a shipped recipe to start from
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 for a user's mistake (one message); 130 for Ctrl-C; 1 for anything else."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "run")
    parser = make_parser()
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    return guard(options.call, options)


def guard(call: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command and turn what it raises into one message and an exit code."""
    from compress.errors import UserError

    try:
        return call(options)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        again = "; the same command goes on from the last finished block" if options.command == "run" else ""
        return _fail(f"stopped{again}", 130)
    except BrokenPipeError:  # `compress recipes gptq4 | head -1`
        sys.stderr.close()
        return 0
    except Exception as error:
        if options.debug:
            raise
        text = " ".join(str(error).split()) or "no message"
        return _fail(f"{type(error).__name__}: {text}\n(--debug shows where; a run's finished blocks are kept)", 1)


def _fail(text: str, code: int) -> int:
    print(f"compress: {text}", file=sys.stderr)
    return code


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from compress import __version__

    parser = argparse.ArgumentParser(
        prog="compress",
        description="Make a Hugging Face language model smaller by a recipe, and measure what that cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"compress {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    _add_run(commands.add_parser("run", help="compress a model (the default: `compress --recipe ...`)"))
    _add_plan(commands.add_parser("plan", help="what a run would do and cost; reads only headers"))
    _add_eval(commands.add_parser("eval", help="measure a folder: perplexity, KL, agreement, bytes"))
    _add_bench(commands.add_parser("bench", help="tokens per second and memory of a folder beside the dense model"))
    _add_recipes(commands.add_parser("recipes", help="list the recipes that ship, or print one"))
    _add_info(commands.add_parser("info", help="versions, processor, devices, formats, memory, disk"))
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_job(parser)
    parser.add_argument("--plan", action="store_true", help="stop after the plan")
    parser.add_argument("--fresh", action="store_true", help="forget an unfinished run in the output's place")
    parser.add_argument("--quiet", action="store_true", help="no plan, no progress: only the result")
    parser.set_defaults(call=run_command)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_job(parser)
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON too ('-': only that, to stdout)")
    parser.set_defaults(call=plan_command)


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help="a YAML file, or the name of a recipe that ships")
    parser.add_argument("--model", help="hub id, local folder, GGUF file, or demo (default: the recipe's)")
    parser.add_argument("--output", help="folder to write (default: ./out/<model>-<recipe>)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. steps.0.bits=3")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--max-memory", metavar="SIZE", help="stay below this, e.g. 6GB")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="what to measure: a folder or a hub id")
    parser.add_argument("--corpus", default="pydoc", help="pydoc, wikitext2, or a path (default: pydoc)")
    parser.add_argument("--windows", type=int, default=16, help="how many windows of text (default: 16)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per window (default: 2048)")
    parser.add_argument("--against", metavar="MODEL", help="the dense model, for KL and top-1 agreement")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON too ('-': only that, to stdout)")
    _add_common(parser)
    parser.set_defaults(call=eval_command)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="what to measure, loaded by compress.load")
    parser.add_argument(
        "--vs",
        "--against",
        dest="against",
        default="dense",
        metavar="MODEL",
        help="a folder or hub id, or dense: the same shapes with random weights (default: dense)",
    )
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS", help="tokens at once (default: 512)")
    parser.add_argument("--prompt", type=int, default=32, metavar="TOKENS", help="before decoding (default: 32)")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS", help="one by one (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side, in turn (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per process (default: 3)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON too ('-': only that, to stdout)")
    _add_common(parser)
    parser.set_defaults(call=bench_command)


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print this one")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(call=recipes_command)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(call=info_command)


def run_command(options: argparse.Namespace) -> int:
    """``compress --recipe ...``: plan, and unless --plan, run and show the report."""
    if options.plan:
        options.json = None
        return plan_command(options)
    from compress.progress import make_progress
    from compress.recipe import load

    recipe = load(options.recipe, options.set)  # before the heavy imports: its mistakes should show at once
    from compress.run import run

    result = run(
        recipe,
        model=options.model,
        output=options.output,
        device=options.device,
        max_memory=options.max_memory,
        fresh=options.fresh,
        trust_remote_code=options.trust_remote_code,
        progress=make_progress(options.quiet),
    )
    from compress.report.table import print_report

    print_report(result.report)
    print(f"written to {result.folder}")
    return 0


def plan_command(options: argparse.Namespace) -> int:
    """``compress plan``: the plan as tables, and as JSON where asked."""
    from compress.plan import plan
    from compress.recipe import load

    found = plan(
        load(options.recipe, options.set),
        model=options.model,
        output=options.output,
        device=options.device,
        max_memory=options.max_memory,
        trust_remote_code=options.trust_remote_code,
    )
    _show(found.render(), found.to_dict(), options.json)
    return 0


def eval_command(options: argparse.Namespace) -> int:
    """``compress eval``: the numbers of one folder with their protocol."""
    from compress.eval.measure import evaluate
    from compress.plan_inputs import find_device
    from compress.progress import make_progress

    device = find_device(options.device)
    with make_progress(options.json == "-").stage("evaluate", options.windows) as stage:
        found = evaluate(
            options.folder,
            options.corpus,
            windows=options.windows,
            tokens=options.tokens,
            against=options.against,
            device=device,
            trust_remote_code=options.trust_remote_code,
            progress=lambda _done, _total, perplexity: stage.advance(note=f"perplexity {perplexity:.2f}"),
        )
    _show(_describe_measures(found), found, options.json)
    return 0


def bench_command(options: argparse.Namespace) -> int:
    """``compress bench``: both sides in turn, each in a process of its own."""
    from compress.bench import bench, render
    from compress.eval.speed import Workload
    from compress.progress import make_progress

    work = Workload(options.prefill, options.prompt, options.decode, options.repeats)
    with make_progress(options.json == "-").stage("bench", 2 * options.rounds) as stage:
        found = bench(
            options.folder,
            options.against,
            workload=work,
            rounds=options.rounds,
            dtype=options.dtype,
            threads=options.threads,
            trust_remote_code=options.trust_remote_code,
            tell=lambda side, run: stage.advance(note=f"{side}: decode {run['decode_tokens_per_second']:.1f} tokens/s"),
        )
    _show(render(found), found, options.json)
    return 0


def _show(text: str, data: dict[str, Any], target: str | None) -> None:
    if target == "-":
        print(json.dumps(data, indent=2))
        return
    print(text)
    if target is not None:
        from compress.report.write import write_json

        write_json(Path(target), data)


def _describe_measures(found: dict[str, Any]) -> str:
    """The numbers, one per line, and under which protocol they were taken."""
    names = ("perplexity", "kl", "top1_agreement", "bytes", "bits_per_weight")
    values = {name: found.get(name) for name in names}
    dense = found.get("dense") or {}
    lines = [f"{name:<16} {_number(value)}" for name, value in values.items() if value is not None]
    lines += [f"{'dense ' + name:<16} {_number(value)}" for name, value in dense.items()]
    protocol = ", ".join(f"{key} {value}" for key, value in found.get("protocol", {}).items())
    return "\n".join([*lines, f"protocol: {protocol}"])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def recipes_command(options: argparse.Namespace) -> int:
    """``compress recipes [NAME]``: names with one line each, or one file as it is."""
    from compress.recipe import find_file, list_shipped, shipped_folder

    if options.name:
        print(find_file(options.name).read_text(encoding="utf-8"), end="")
        return 0
    for name in list_shipped():
        first = (shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<8} {first.lstrip('# ')}")
    return 0


def info_command(options: argparse.Namespace) -> int:
    """``compress info``."""
    from compress import info

    found = info.collect()
    print(json.dumps(found, indent=2) if options.json else info.render(found))
    return 0
