"""The token embedding and the output head: rounded to nearest, written, put back, and judged, a few rows at a time.

They are rounded before the calibration text is embedded, so that the blocks are compressed for the inputs that they
will get. An error in what makes logits counts as much as the mean square of the feature that it meets, as the dense
model shows it on a little calibration text: some features are a thousand times larger there than others, and a range
that is searched for without knowing them costs more than it gains. Behind the last block the head is judged on the
held-out probe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.block import Streams
from compress.numerics import errors, grids
from compress.plan import Plan
from compress.plan_memory import CHUNK
from compress.plan_select import PlannedLayer
from compress.prepare import Texts
from compress.storage.files import read_header, read_tensor
from compress.storage.formats import native
from compress.storage.formats.base import Format, QuantSpec, encode_layer
from compress.storage.writer import Writer
from compress.types import Grid, LayerReport, LayerState
from compress.walk.skeleton import Skeleton
from compress.walk.stream import observe_head, read_head_inputs

STEPS, NARROWEST, POLISH = 25, 0.4, 2  # the search for a grid's range, see grids.FitRule

Energy = Callable[[slice, Tensor], float]  # rows and their values (or what of them was lost) -> energy of the output


@dataclass
class Head:
    """Embedding and output head of one run. ``writer`` None: a model in memory, changed in place."""

    plan: Plan
    skeleton: Skeleton
    form: Format
    texts: Texts
    writer: Writer | None = None
    originals: dict[str, Tensor] = field(default_factory=dict)  # of a model in memory, what is judged later
    reports: dict[str, LayerReport] = field(default_factory=dict)  # of a model in memory, by parameter

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        return self.plan.head.layers

    @property
    def output(self) -> PlannedLayer | None:
        """What logits are made with, if it is compressed: a head of its own, or the tied matrix."""
        return next((layer for layer in self.layers if layer.spec.kind == "head" or layer.spec.tied), None)

    @property
    def changes_embedding(self) -> bool:
        return any(layer.spec.kind == "embedding" for layer in self.layers)

    @torch.no_grad()
    def round(self) -> None:
        """Round and write what a killed run has not written yet. The model's blocks must still be the dense ones."""
        left = [layer for layer in self.layers if not self._is_written(layer)]
        output = self.output if self.output in left else None
        importance = None
        if output is not None:
            assert self.texts.head is not None
            importance = observe_head(self.skeleton, self.texts.head, self.plan.device)
            if self.writer is None:
                weight = self.skeleton.outside_tensor(output.spec.parameter)
                self.originals[output.spec.parameter] = weight.clone()
        for layer in left:
            if layer is output:
                self._round(layer, importance, None)
            else:
                self._round(layer, None, self._lookup_energy(layer))

    def put(self, model: Any) -> None:
        """Rounded weights in place of those that ``model`` (a copy of what is outside the blocks) was read with."""
        for layer in self.layers if self.writer is not None else ():
            parameter = model.get_parameter(layer.spec.parameter)
            if self._is_written(layer) and not parameter.is_meta:
                for rows, values in self._read_rows(layer):
                    parameter.data[rows] = values.to(device=parameter.device, dtype=parameter.dtype)

    @torch.no_grad()
    def finish(self, streams: Streams) -> None:
        """Behind the last block: judge what logits are made with on the probe."""
        layer = self.output
        if layer is None or self._report(layer).output_error is not None:
            return
        model = self.skeleton.load_outside(self.plan.device, head=False)
        hidden = streams.main.read(streams.probe, self.plan.device)
        inputs = read_head_inputs(model, self.skeleton.blocks, hidden)
        if inputs is None:  # the model makes its logits in a way of its own
            return
        old = self.originals.get(layer.spec.parameter)
        weight = self.skeleton.outside_tensor(layer.spec.parameter) if old is None else old
        output = lost = 0.0
        for rows, values in self._read_rows(layer):
            before = weight[rows].to(inputs)
            output += float(errors.row_energies(before @ inputs.T).sum())
            lost += float(errors.row_energies((before - values.to(before)) @ inputs.T).sum())
        report = replace(self._report(layer), output_error=errors.ratio(lost, output))
        if self.writer is None:
            self.reports[layer.spec.parameter] = report
        else:
            self.writer.note(layer.spec.parameter, {"layers": [asdict(report)]})

    def list_reports(self) -> list[dict[str, Any]]:
        """Of a model in memory, as for ``report.json``."""
        return [asdict(self.reports[layer.spec.parameter]) for layer in self.layers]

    def _round(self, layer: PlannedLayer, importance: Tensor | None, energy: Energy | None) -> None:
        """Round all rows; write them, or set them in place; note what it cost."""
        started = time.monotonic()
        spec, quant = layer.spec, layer.quant
        assert quant is not None
        weight = self.skeleton.outside_tensor(spec.parameter)
        totals = torch.zeros(4, dtype=torch.float64)  # energy of weight and output, and what of each was lost
        forms: list[dict[str, Tensor]] = []
        for rows in cut_rows(*spec.shape):
            old = weight[rows].to(self.plan.device, torch.float32, copy=True)
            state = round_rows(old, quant, self.plan.scale_dtype, importance)
            new = state.weight.to(weight.dtype)  # as the model has it
            totals[0] += errors.row_energies(old).sum().cpu()
            totals[1] += errors.row_energies(old - state.weight).sum().cpu()
            if energy is not None:
                totals[2] += energy(rows, old)
                totals[3] += energy(rows, old - new.float())
            if self.writer is None:
                weight[rows] = new
            else:
                forms.append(self._encode(layer, state, weight.dtype))
        seen = None if importance is None or self.texts.head is None else len(self.texts.head)
        report = LayerReport(
            name=spec.name,
            shape=spec.shape,
            method="rtn",
            weight_error=errors.ratio(float(totals[1]), float(totals[0])),
            output_error=None if energy is None else errors.ratio(float(totals[3]), float(totals[2])),
            bits_per_weight=layer.bits_per_weight,
            seconds=round(time.monotonic() - started, 4),
            tokens=seen,
            notes={"kind": spec.kind, **({"tied": list(spec.tied)} if spec.tied else {})},
        )
        if self.writer is None:
            self.reports[spec.parameter] = report
        else:
            tensors = {name: torch.cat([form.pop(name) for form in forms]) for name in list(forms[0])}
            self.writer.write(spec.parameter, tensors, {"layers": [asdict(report)]})

    def _lookup_energy(self, layer: PlannedLayer) -> Energy:
        """Of the rows that the probe's tokens look up."""
        counts = torch.bincount(self.texts.probe.cpu(), minlength=layer.spec.shape[0]).double()
        return lambda rows, values: float((counts[rows] * errors.row_energies(values).cpu()).sum())

    def _is_written(self, layer: PlannedLayer) -> bool:
        return self.writer is not None and self.writer.has(layer.spec.parameter)

    def _report(self, layer: PlannedLayer) -> LayerReport:
        if self.writer is None:
            return self.reports[layer.spec.parameter]
        (entry,) = self.writer.sidecar(layer.spec.parameter)["layers"]
        return LayerReport(**{**entry, "shape": tuple(entry["shape"])})

    def _encode(self, layer: PlannedLayer, state: LayerState, dtype: torch.dtype) -> dict[str, Tensor]:
        """The written form of some rows; laid end to end they are that of the matrix."""
        spec = replace(layer.spec, shape=(state.weight.shape[0], state.weight.shape[1]))
        form = encode_layer(self.form, spec, state, self.plan.dtype)
        form = {spec.parameter: state.weight.to(dtype)} if form is None else form
        return {name: tensor.cpu() for name, tensor in form.items()}

    def _read_rows(self, layer: PlannedLayer) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the rounded matrix, as they were written or as they are in memory."""
        spec, quant = layer.spec, layer.quant
        assert quant is not None
        if self.writer is None:
            weight = self.skeleton.outside_tensor(spec.parameter)
            yield from ((rows, weight[rows]) for rows in cut_rows(*spec.shape))
            return
        path = self.writer.partial / self.writer.shard(spec.parameter)
        with path.open("rb") as file:
            tensors = {name: read_tensor(file, header) for name, header in read_header(path).items()}
        if spec.parameter in tensors:
            yield from ((rows, tensors[spec.parameter][rows]) for rows in cut_rows(*spec.shape))
            return
        config = native.quantization_config([(spec, quant)], []) or {}
        for rows in cut_rows(*spec.shape):
            part = replace(spec, shape=(min(rows.stop, spec.shape[0]) - rows.start, spec.shape[1]))
            values = native.decode(part, native.take_rows(spec, quant, tensors, rows), config)
            yield rows, values.to(spec.dtype)


def cut_rows(count: int, width: int) -> list[slice]:
    """Rows in pieces of about ``CHUNK`` weights, each starting where packed codes start at a whole byte."""
    height = max(native.ROWS, CHUNK // width // native.ROWS * native.ROWS)
    return [slice(start, start + height) for start in range(0, count, height)]


def round_rows(weight: Tensor, quant: QuantSpec, scale_dtype: torch.dtype, importance: Tensor | None) -> LayerState:
    """Rows ``(n, D)`` float32 on the grids of least squared error, a feature's weighed by ``importance`` ``(D,)``."""
    size = weight.shape[1] if quant.group_size == -1 else quant.group_size
    rule = grids.FitRule(quant.bits, quant.symmetric, scale_dtype, STEPS, NARROWEST, POLISH)
    cost = None if importance is None else importance.to(weight).reshape(-1, size)
    scale, zero = grids.fit_grid(grids.split_groups(weight, size), rule, cost)
    codes = grids.quantize(weight, scale, zero, size, rule.max_code)
    grid = Grid(quant.bits, size, quant.symmetric, scale, zero)
    return LayerState(grids.dequantize(codes, scale, zero, size), grid, codes)
