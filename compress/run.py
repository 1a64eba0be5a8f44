"""The loop: recipe -> plan -> read a block -> observe -> method -> format -> write. Start reading here.

One block of the model is in memory at a time. Its calibration windows run through it as suspended forwards (``walk``):
at each distinct layer input the driver computes the statistic, lets the steps change the layers that read it, and lets
the windows go on through the changed layers (``block.py``). A finished block is a finished file, so that a killed run
goes on where it was. The judge (errors per layer, the check after writing, perplexity) is in the driver and in
``eval``, never in a method.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import finish
from compress.block import BlockTask, Needs, Streams, compress_block
from compress.errors import UserError
from compress.head import Head
from compress.memory import release_memory
from compress.plan import Plan, as_recipe, make_plan
from compress.plan_inputs import default_output, pick_dtype
from compress.prepare import Texts, load_tokenizer, make_texts
from compress.progress import Progress, make_progress
from compress.recipe import Recipe
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import Format, assemble_unit, encode_layer, find_rounding, load_format
from compress.storage.source import Source, resolve
from compress.storage.writer import Writer
from compress.types import LayerSpec, LayerState
from compress.walk.hidden import Hidden
from compress.walk.layers import install_rounding
from compress.walk.skeleton import Skeleton
from compress.walk.stream import Call, capture, record_calls
from compress.walk.stream import finish as finish_forward


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the loop starts."""

    recipe: Recipe
    plan: Plan
    skeleton: Skeleton
    texts: Texts
    progress: Progress
    format: Format

    @cached_property
    def needs(self) -> Needs:
        """What the steps want to know of the layers' inputs."""
        return Needs.of(self.plan.layers.values(), len(self.texts.windows))


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    model: Any = None,
    *,
    output: str | Path | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    max_memory: int | str | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Compress ``model`` as ``recipe`` says.

    ``recipe``: a ``Recipe``, its dict, the path of a YAML file or the name of a shipped one. ``model``: a hub id, a
    local folder, a GGUF file or a demo name (default: the recipe's); then the result is the folder ``output``, and a
    ``finish.Result`` with its report is returned. Or a Transformers model in memory (with its ``tokenizer``, for
    methods that look at text); then its weights are replaced in place and the same model is returned, with
    ``model.compress_report``.

    ``max_memory``: bytes or "6GB"; the plan keeps below it or says why it can't. ``fresh``: forget an unfinished run.
    Raises ``UserError`` for what the user can mend, before any weight is loaded; ``VerificationError`` if what was
    written does not reload as what was meant.
    """
    recipe = as_recipe(recipe)
    progress = progress or make_progress()
    if isinstance(model, nn.Module):
        return compress_model(recipe, model, tokenizer, progress)
    word = model if model is not None else recipe.model
    if word is None:
        raise UserError("no model: give --model, or model: in the recipe (a hub id, a folder, a GGUF file, or demo)")
    source = resolve(str(word), trust_remote_code=trust_remote_code)
    release_memory()  # a GGUF file may just have been converted
    return compress_folder(recipe, source, output, device, max_memory, fresh, trust_remote_code, progress)


def compress_folder(
    recipe: Recipe,
    source: Source,
    output: str | Path | None,
    device: str,
    max_memory: int | str | None,
    fresh: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> finish.Result:
    """A checkpoint on disk in, a folder out; see ``run``."""
    started = time.monotonic()
    checkpoint = Checkpoint(source.folder)
    checkpoint.check()
    skeleton = Skeleton.from_checkpoint(checkpoint, pick_dtype(recipe, checkpoint), trust_remote_code)
    folder = Path(output or recipe.output or default_output(source.name, recipe))
    plan = make_plan(
        recipe, skeleton, checkpoint, name=source.name, output=folder, device=device, max_memory=max_memory
    )
    progress.say(plan.render())
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    texts = make_texts(recipe, tokenizer, bool(plan.needs), vocabulary(skeleton))
    job = Job(recipe, plan, skeleton, texts, progress, load_format(plan.format))
    about = finish.describe_run(job, source.name, checkpoint.digest())
    names = [*skeleton.blocks, *skeleton.outside_names()]
    with Writer(
        folder, names, finish.digest(about), prefix=job.format.PREFIX, about=about, fresh=fresh,
        needed_bytes=plan.bytes_after,
    ) as writer:  # fmt: skip
        logits = compress_units(job, writer)
        cost = finish.Cost(time.monotonic() - started, finish.measure_peak())
        return finish.finish_folder(job, writer, source.folder, logits, cost, trust_remote_code)


def compress_units(job: Job, writer: Writer) -> Tensor:
    """All units that are not written yet. Returns the compressed model's logits ``(1, T, V)`` of the probe."""
    blocks = job.skeleton.blocks
    done = next((i for i, name in enumerate(blocks) if not writer.has(name)), len(blocks))
    spill = writer.spill_folder()
    head = Head(job.plan, job.skeleton, job.format, job.texts, writer)
    streams, calls = start_streams(job, head, spill, done)
    with job.progress.stage("Compressing blocks", len(blocks) - done) as bar:
        for i in range(done, len(blocks)):
            task = make_task(job, i, calls[i], spill)
            result = compress_block(job.skeleton, task, streams, job.plan.device)
            streams.close()
            streams = result.streams
            state = {f"{blocks[i]}.{name}": tensor for name, tensor in result.block.state_dict().items()}
            reports = [asdict(report) for report in result.reports]
            writer.write(blocks[i], assemble_unit(state, result.encoded), {"layers": reports})
            Streams.delete(spill, i)
            del result, state  # before the next block is read
            release_memory()
            bar.advance()
    head.finish(streams)
    if not all(writer.has(name) for name in writer.units):
        for name, tensor in job.skeleton.outside_tensors():
            if not writer.has(name):
                writer.write(name, {name: tensor}, {"layers": []})
            del tensor  # before the next one is read
    return probe_logits(job, head, streams)


def start_streams(job: Job, head: Head, spill: Path | None, done: int) -> tuple[Streams, list[dict[int, Call]]]:
    """The streams in front of block ``done``: embedded anew for the first one, else as a killed run left them.

    Embedding and head are rounded first; the main stream starts from the rounded embedding, the dense one does not.
    """
    if done == 0:
        windows, device = job.texts.all, job.plan.device
        dense_path = spill and spill / Streams.file("dense", 0)
        dense = None
        if job.needs.dense_windows and head.changes_embedding:
            dense, _ = capture(job.skeleton, windows[: job.needs.dense_windows], dense_path, device)
        head.round()
        main, calls = capture(job.skeleton, windows, spill and spill / Streams.file("main", 0), device, head.put)
        if job.needs.dense_windows and dense is None:
            dense = Hidden.create(dense_path, main.lengths[: job.needs.dense_windows], main.width, main.dtype)
            for n in range(len(dense)):
                dense.write(n, main.read(n))
            dense.flush()
        return Streams(main, dense), calls
    assert spill is not None
    model = job.skeleton.load_outside(job.plan.device, head=False)
    calls = record_calls(model, job.skeleton.blocks, job.texts.all)
    dense_path = spill / Streams.file("dense", done)
    dense = Hidden.open(dense_path) if dense_path.is_file() else None
    return Streams(Hidden.open(spill / Streams.file("main", done)), dense), calls


def make_task(job: Job, i: int, calls: dict[int, Call], spill: Path | None) -> BlockTask:
    """What ``compress_block`` needs to know of block ``i``."""
    layers = {layer.spec.name: layer for layer in job.plan.unit(job.skeleton.blocks[i]).layers}

    def encode(spec: LayerSpec, state: LayerState) -> dict[str, Tensor] | None:
        return None if spill is None else encode_layer(job.format, spec, state, job.plan.dtype)

    rounding = find_rounding(job.format)
    return BlockTask(i, layers, calls, job.needs, job.plan.scale_dtype, job.plan.suspend, spill, encode, rounding)


def probe_logits(job: Job, head: Head, streams: Streams) -> Tensor:
    """Logits ``(1, T, V)`` of the held-out probe at the end of the compressed blocks: what a reload has to give."""
    model = job.skeleton.load_outside(job.plan.device)
    head.put(model)
    hidden = streams.main.read(streams.probe, job.plan.device)
    streams.close()
    return finish_forward(model, job.skeleton.blocks, hidden).float().cpu()


def compress_model(recipe: Recipe, model: Any, tokenizer: Any, progress: Progress) -> Any:
    """A model in memory: the same loop, its weights replaced in place; see ``run``.

    Layers with an activation rule round their inputs from then on, by a hook: the numbers of integer kernels, not their
    speed.
    """
    started = time.monotonic()
    skeleton = Skeleton.from_model(model)
    plan = make_plan(recipe, skeleton, name=type(model).__name__, output=None, device=str(model.device))
    progress.say(plan.render())
    texts = make_texts(recipe, tokenizer, bool(plan.needs), vocabulary(skeleton))
    job = Job(recipe, plan, skeleton, texts, progress, load_format(plan.format))
    head = Head(plan, skeleton, job.format, texts)
    streams, calls = start_streams(job, head, None, 0)
    reports: list[dict[str, Any]] = []
    with torch.no_grad(), progress.stage("Compressing blocks", len(skeleton.blocks)) as bar:
        for i in range(len(skeleton.blocks)):
            result = compress_block(skeleton, make_task(job, i, calls[i], None), streams, plan.device)
            streams = result.streams
            reports += [asdict(report) for report in result.reports]
            for name, rounding in result.roundings.items():
                install_rounding(model.get_submodule(name), rounding)
            bar.advance()
    head.finish(streams)
    model.compress_report = finish.report_model(
        job, reports + head.list_reports(), finish.Cost(time.monotonic() - started, finish.measure_peak())
    )
    return model


def vocabulary(skeleton: Skeleton) -> int:
    """Number of tokens that the model knows."""
    return int(skeleton.config.get_text_config(decoder=True).vocab_size)
