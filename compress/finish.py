"""After the loop: stage the folder, check that it reloads as what was meant, measure it, report, publish."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import compress
from compress.eval.loading import count_weight_bytes
from compress.eval.process import evaluate_folder, measure_resident
from compress.eval.verify import verify
from compress.plan import Plan
from compress.report.build import build_report
from compress.storage.writer import Writer, list_companions

if TYPE_CHECKING:
    from compress.run import Job


@dataclass(frozen=True)
class Result:
    """What a run leaves: the folder, its report (as in ``report.json``) and the plan that it followed."""

    folder: Path
    report: dict[str, Any]
    plan: Plan


@dataclass(frozen=True)
class Cost:
    """What compressing took: wall-clock seconds, and the largest resident memory of the process so far in bytes."""

    seconds: float
    peak_bytes: int


def describe_run(job: Job, model: str, checkpoint: str) -> dict[str, Any]:
    """Everything that decides what is written; two runs may share units only if all of it is the same."""
    return {
        "recipe": job.recipe.digest(),
        "settings": job.recipe.to_dict(),
        "model": model,
        "checkpoint": checkpoint,
        "texts": job.texts.digest(),
        "dtype": str(job.plan.dtype).removeprefix("torch."),
        "device": job.plan.device,
        "format": job.plan.format,
        "version": compress.__version__,
    }


def digest(about: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of ``describe_run``, less the settings that only measuring depends on."""
    decisive = {key: value for key, value in about.items() if key != "settings"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def measure_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finish_folder(
    job: Job, writer: Writer, source: Path, logits: Tensor, cost: Cost, trust_remote_code: bool
) -> Result:
    """Stage, verify, evaluate, report, publish. A previous result at the output stays until the last moment.

    ``logits`` ``(1, T, V)``: what the probe gives at the end of the compressed blocks, as they were meant.
    """
    with job.progress.stage("Reloading in a fresh process", 1):
        staged = writer.stage(write_config(job), list_companions(source, trust_remote_code))
        dtype = str(job.plan.dtype).removeprefix("torch.")
        verification = verify(
            staged,
            job.texts.probe[None],
            logits,
            dtype=dtype,
            device=job.plan.device,
            trust_remote_code=trust_remote_code,
        )
    evaluation, resident = measure(job, staged, source, trust_remote_code)
    layers = [entry for unit in writer.units for entry in writer.sidecar(unit)["layers"]]
    report = build_report(
        plan=job.plan.to_dict(),
        layers=layers,
        dense_bytes=count_weight_bytes(source),
        compressed_bytes=count_weight_bytes(staged),
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        evaluation=evaluation,
        verification=verification,
        calibration=job.texts.protocol,
        resident=resident,
    )
    return Result(writer.finish({"report.json": report}), report, job.plan)


def write_config(job: Job) -> dict[str, Any]:
    """The model's config.json with what the format adds."""
    assert job.skeleton.reader is not None
    config = dict(job.skeleton.reader.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(job.plan.dtype).removeprefix("torch.")
    chosen = {layer.spec.name for layer in job.plan.layers.values()}
    untouched = [spec for spec in job.skeleton.specs() if spec.name not in chosen]
    quantized = [(layer.spec, layer.quant) for layer in job.plan.layers.values() if layer.quant is not None]
    quantization = job.format.quantization_config(quantized, untouched)
    return config if quantization is None else {**config, "quantization_config": quantization}


def measure(
    job: Job, staged: Path, source: Path, trust_remote_code: bool
) -> tuple[dict[str, Any] | None, dict[str, int] | None]:
    """Perplexity, KL and agreement of the written folder beside the dense model; resident bytes of each, loaded."""
    wanted = job.recipe.eval
    if wanted is None:
        return None, None
    dtype = str(job.plan.dtype).removeprefix("torch.")
    with job.progress.stage("Evaluating", wanted.windows) as bar:
        evaluation = evaluate_folder(
            staged,
            lambda line: bar.advance(note=f"perplexity {line['perplexity']:.2f}"),
            against=str(source),
            corpus=wanted.corpus,
            windows=wanted.windows,
            tokens=wanted.tokens,
            dtype=dtype,
            device=job.plan.device,
            trust_remote_code=trust_remote_code,
        )
    resident = {}
    with job.progress.stage("Measuring resident memory", 2) as bar:
        for name, folder in (("dense", source), ("compressed", staged)):
            resident[name] = measure_resident(folder, dtype, trust_remote_code)
            bar.advance()
    return evaluation, resident


def report_model(job: Job, layers: list[dict[str, Any]], cost: Cost) -> dict[str, Any]:
    """The report of a model that was compressed in memory: nothing was written, so nothing is reloaded or measured."""
    return build_report(
        plan=job.plan.to_dict(),
        layers=layers,
        dense_bytes=job.plan.bytes_before,
        compressed_bytes=job.plan.bytes_after,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        calibration=job.texts.protocol,
    )
