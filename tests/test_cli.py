"""The command: exit codes, messages without tracebacks, what reaches ``run``, and progress where nobody watches."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from compress import cli, info
from compress.errors import UserError
from compress.progress import Bars, Lines, Silent, _LineStage, clock, make_progress
from compress.recipe import list_shipped, shipped_folder

ROOT = Path(cli.__file__).resolve().parent.parent
RECIPE = "steps:\n  - method: rtn\n    group_size: 16\neval: null\n"


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m compress`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "compress", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).save_pretrained(tmp_path / "tiny")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path / "tiny"


def test_help_and_version_exit_with_0(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("run", "plan", "eval", "bench", "recipes", "info", "compress --recipe gptq4"):
        assert word in done.stdout
    assert command("--version", cwd=tmp_path).stdout.startswith("compress ")
    assert "--set KEY=VALUE" in command("run", "--help", cwd=tmp_path).stdout


def test_no_words_print_the_help_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().err


def test_light_commands_load_no_heavy_package(tmp_path: Path) -> None:
    code = (
        "import sys; from compress import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert cli.main(['recipes']) == 0\n"
        "sys.exit(len({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=False).returncode == 0


def test_recipes_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_shipped()
    assert all(len(line.split()) > 4 for line in lines)
    assert cli.main(["recipes", "gptq4"]) == 0
    assert capsys.readouterr().out == (shipped_folder() / "gptq4.yaml").read_text()
    assert cli.main(["recipes", "gptq5"]) == 2
    assert "did you mean 'gptq4'?" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total"] > found["memory"]["free"] > 0
    assert found["devices"][0] == "cpu"
    assert found["packages"]["torch"]
    assert found["formats"]["native"] == {"compress": found["compress"]}
    assert found["formats"]["dense"] == {}
    assert found["kernels"]["library"] or "compiler" in found["kernels"]["problem"]
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "cpu", "kernels   ", "memory", "disk", "format    compressed-tensors"):
        assert word in text
    absent = {**found, "formats": {"odd": {"no-such-package": info.find_version("no-such-package")}}}
    assert "odd: loading it needs pip install no-such-package" in info.render(absent)


def test_plan_in_a_process_of_its_own(tiny: Path) -> None:
    done = command("plan", "--recipe", "mine.yaml", "--model", "tiny", "--json", "-", cwd=tiny.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "out/tiny-mine"
    assert not (tiny.parent / "out").exists()


def test_a_users_mistake_is_one_message_and_2(tiny: Path) -> None:
    done = command("--recipe", "mine.yaml", "--model", "tiny", "--set", "steps.0.bits=5", cwd=tiny.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "compress: --set steps.0.bits=5: steps.0.bits: got 5, wanted 2, 3, 4 or 8\n"


def test_run_with_plan_stops_after_the_plan(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--recipe",
        str(tiny.parent / "mine.yaml"),
        "--model",
        str(tiny),
        "--output",
        str(tiny.parent / "o"),
        "--plan",
    ]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj" in shown
    assert not (tiny.parent / "o").exists()
    assert cli.main(["run", *words]) == 0
    assert capsys.readouterr().out.splitlines()[0] == shown.splitlines()[0]


def test_mistakes_of_the_plan_exit_with_2(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--recipe", str(tiny.parent / "mine.yaml"), "--model", str(tiny)]
    for words, said in (
        (["--set", "steps.0.group_size=31"], "not a multiple of group_size 31"),
        (["--max-memory", "1MB"], "--max-memory 1.0 MB is too little"),
        (["--max-memory", "much"], "wanted a size such as 6GB"),
        (["--device", "gpu"], "--device gpu: no such device"),
        (["--output", str(tiny)], "the model's own folder"),
    ):
        assert cli.main([*base, *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main([*base[:3], "--model", str(tiny.parent / "nowhere")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_arguments_reach_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: Any, **options: Any) -> Any:
        seen.update(options, recipe=recipe)
        return SimpleNamespace(report={"title": "the report"}, folder=Path("o"))

    fakes = {
        "compress.run": {"run": run},
        "compress.report.table": {"print_report": lambda report: print(report["title"])},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    words = ["--recipe", "gptq4", "--model", "m", "--output", "o", "--set", "steps.0.bits=3", "--set", "eval=null",
             "--device", "cpu", "--max-memory", "6GB", "--fresh", "--trust-remote-code"]  # fmt: skip
    assert cli.main(words) == 0
    assert seen.pop("recipe").to_dict()["steps"][0]["bits"] == 3
    assert isinstance(seen.pop("progress"), Lines)
    assert seen == {
        "model": "m", "output": "o", "device": "cpu", "max_memory": "6GB", "fresh": True, "trust_remote_code": True,
    }  # fmt: skip
    assert capsys.readouterr().out == "the report\nwritten to o\n"


def test_arguments_reach_evaluate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(folder: str, corpus: str, **options: Any) -> dict[str, Any]:
        options.pop("progress")(1, options["windows"], 12.5)
        assert options == {
            "windows": 2, "tokens": 64, "against": "dense", "device": "cpu", "trust_remote_code": False,
        }  # fmt: skip
        protocol = {"corpus": corpus, "windows": 2}
        return {"perplexity": 12.5, "kl": 0.25, "bytes": 1234, "dense": {"perplexity": 11.0}, "protocol": protocol}

    module = ModuleType("compress.eval.measure")
    module.evaluate = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress.eval.measure", module)
    words = [
        "eval",
        "folder",
        "--corpus",
        "pydoc",
        "--windows",
        "2",
        "--tokens",
        "64",
        "--against",
        "dense",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--json", str(tmp_path / "numbers.json")]) == 0
    shown = capsys.readouterr().out
    for word in ("perplexity       12.5000", "dense perplexity 11.0000", "1,234", "protocol: corpus pydoc, windows 2"):
        assert word in shown
    assert json.loads((tmp_path / "numbers.json").read_text())["kl"] == 0.25
    assert cli.main([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] == 0.25


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("mend this"), 2, "compress: mend this\n"),
        (KeyboardInterrupt(), 130, "compress: stopped; the same command goes on from the last finished block\n"),
        (RuntimeError("odd\nthing"), 1, "compress: RuntimeError: odd thing\n(--debug shows where; "),
    ],
)
def test_exit_codes(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def call(options: argparse.Namespace) -> int:
        raise error

    assert cli.guard(call, argparse.Namespace(command="run", debug=False)) == code
    assert capsys.readouterr().err.startswith(said)


def test_debug_shows_the_traceback() -> None:
    def call(options: argparse.Namespace) -> int:
        raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        cli.guard(call, argparse.Namespace(command="run", debug=True))


def test_plain_lines_where_nobody_watches() -> None:
    stream = io.StringIO()
    progress = make_progress(stream=stream)
    assert isinstance(progress, Lines)
    with progress.stage("blocks", 3) as stage:
        for _ in range(3):
            stage.advance()
    progress.say("done")
    assert stream.getvalue().splitlines() == ["blocks: 3 to do", "blocks: 3 of 3 done in 0:00", "done"]


def test_plain_lines_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 4.0, 20.0, 25.0])
    monkeypatch.setattr("compress.progress.time.monotonic", lambda: next(now))
    stream = io.StringIO()
    stage = _LineStage(Lines(stream), "blocks", 10)
    for _ in range(3):
        stage.advance(note="ppl 3")
    assert stream.getvalue() == "blocks: 2 of 10, 1:20 left, ppl 3\n"


def test_bars_in_a_terminal() -> None:
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=120))
    with bars.stage("blocks", 2) as stage:
        stage.advance(note="first")
        stage.advance(note="second")
    bars.say("[not markup]")
    assert "blocks" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "second" in stream.getvalue()
    assert "[not markup]" in stream.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress(quiet=True)
    assert isinstance(progress, Silent)
    with progress.stage("blocks", 2) as stage:
        stage.advance()
    progress.say("x")
    assert capsys.readouterr() == ("", "")


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 187, 3729)] == ["0:00", "1:00", "3:07", "1:02:09"]
