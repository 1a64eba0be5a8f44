"""``compress.load``: a written folder as a model that runs, whatever its format and whatever is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import UserError
from compress.runtime.report import LoadReport
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import CodedWeight, Format, find_rounding, load_format
from compress.types import LayerSpec
from compress.walk.layers import Rounding, install_rounding

Kernels = Literal["auto", "reference", "require", "off"]
FORMATS = {  # quant_method -> file
    "gptq": "gptq",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "compress": "native",
}


def load(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    kernels: Kernels = "auto",
) -> Any:
    """The model in ``folder``, in eval mode; ``model.compress_report`` says what became of its layers.

    On a CPU, weights stay packed and our kernels multiply with them; a layer that they can't take is dense, and named
    in the report. ``kernels``: ``auto`` uses them where they are built, ``require`` raises UserError where not,
    ``reference`` computes the same in plain PyTorch (slow), ``off`` makes a dense model of the decoded weights.
    Without kernels (and on other devices), folders of stock formats whose packages are installed load by
    ``from_pretrained``, others are decoded. Dense folders always load by ``from_pretrained``.
    Raises UserError for a folder that is damaged, or that has weights the model doesn't know.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    form = find_format(checkpoint)
    if form is None:
        return _load_stock(checkpoint, dtype, device, trust_remote_code)
    from compress.runtime.swap import choose

    choice = choose(kernels, torch.device(device))
    if choice.why_dense is None and hasattr(form, "unpack"):
        return _load_packed(checkpoint, form, dtype, trust_remote_code, kernels)
    if kernels != "off" and loads_with_stock(form):
        return _load_stock(checkpoint, dtype, device, trust_remote_code)
    model = load_decoded(checkpoint, form, dtype, device, trust_remote_code)
    names = [spec.name for spec, _ in form.list_layers(checkpoint.headers, checkpoint.config["quantization_config"])]
    why = choice.why_dense or f"{form.NAME} has no kernel yet"
    model.compress_report = LoadReport(decoded=dict.fromkeys(names, why))
    return model


def loads_with_stock(form: Format) -> bool:
    """Whether Transformers loads ``form`` with the packages that are installed."""
    needed = [word.replace("-", "_") for word in form.LOADS_WITH]
    return "compress" not in needed and all(importlib.util.find_spec(word) is not None for word in needed)


def find_format(checkpoint: Checkpoint) -> Format | None:
    """The format that the folder's config.json names; None for a dense folder. UserError for one that is not ours."""
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in FORMATS:
        raise UserError(f"{checkpoint.folder}: quant_method {method!r} is not one of {', '.join(FORMATS)}")
    return load_format(FORMATS[method])


def load_quantized(folder: str | Path) -> Iterator[tuple[LayerSpec, Tensor]]:
    """Every encoded layer of a folder with its weight ``(O, I)`` float32, one at a time; nothing for a dense folder.

    The gptq layout doesn't say which layers are Conv1D: its specs all have kind ``linear``.
    """
    checkpoint = Checkpoint(folder)
    form = find_format(checkpoint)
    if form is None:
        return
    config = checkpoint.config["quantization_config"]
    for spec, names in form.list_layers(checkpoint.headers, config):
        yield spec, form.decode(spec, checkpoint.read(names), config)


def load_decoded(
    checkpoint: Checkpoint,
    form: Format,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A dense model holding the weights that our own decoding gives."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    del config.quantization_config
    wanted = pick_dtype(config, dtype)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    state, roundings = _decode_state(checkpoint, form, shell, wanted)
    model, found = type(shell).from_pretrained(
        None, config=config, state_dict=state, dtype=wanted, output_loading_info=True
    )
    _refuse_lost(checkpoint, found)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(checkpoint.folder)
    for name, rounding in roundings.items():
        install_rounding(model.get_submodule(name), rounding)
    return model.eval().to(device)


def _decode_state(
    checkpoint: Checkpoint, form: Format, shell: Any, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Rounding]]:
    """The state dict of the dense model, and how layers round their inputs; ``shell`` is that model on meta."""
    quantization = checkpoint.config["quantization_config"]
    layers = form.list_layers(checkpoint.headers, quantization)
    encoded = {name for _, names in layers for name in names}
    filler = Filler(checkpoint, shell, dtype)
    for name in checkpoint.headers:
        if name not in encoded:
            filler.put_plain(name, checkpoint.read([name])[name])
    roundings: dict[str, Rounding] = {}
    for spec, names in layers:
        coded = form.unpack(spec, checkpoint.read(names), quantization)
        filler.put_layer(spec, coded.dequantize())
        if coded.activations is not None:
            roundings[spec.name] = make_rounding(form, coded)
    return filler.finish(), roundings


def make_rounding(form: Format, coded: CodedWeight) -> Rounding:
    """What a layer with an activation rule does to its input."""
    rule, round_inputs, groups = coded.activations, find_rounding(form), coded.input_groups
    kept = None if coded.outliers is None else coded.outliers.index
    assert rule is not None
    return lambda x: round_inputs(x, rule, kept, groups)


class Filler:
    """Puts weights where a model keeps them: transposed for Conv1D, slice by slice into fused 3-D parameters."""

    def __init__(self, checkpoint: Checkpoint, shell: Any, dtype: torch.dtype) -> None:
        from transformers.pytorch_utils import Conv1D

        self.folder = checkpoint.folder
        self.dtype = dtype
        self.shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
        self.conv1d = {f"{name}.weight" for name, module in shell.named_modules() if isinstance(module, Conv1D)}
        self.state: dict[str, Tensor] = {}
        self.missing: dict[str, set[int]] = {}  # of each fused parameter, the slices that have not come yet

    def put_plain(self, name: str, tensor: Tensor) -> None:
        """A tensor that is not encoded: as it is, or ``<parameter>.<index>``, a slice of a fused parameter."""
        parameter, _, index = name.rpartition(".")
        if name not in self.shapes and index.isdigit() and parameter in self.shapes:
            self._put_slice(parameter, int(index), tensor)
        else:
            self.state[name] = tensor

    def put_layer(self, spec: LayerSpec, weight: Tensor) -> None:
        """A decoded weight ``(O, I)``."""
        shape = self.shapes.get(spec.parameter)
        if shape is None:
            raise UserError(
                f"{self.folder}: the model has no parameter {spec.parameter}; config.json is of another one"
            )
        if spec.kind == "expert":
            assert spec.index is not None
            self._put_slice(spec.parameter, spec.index, weight)
            return
        transposed = spec.parameter in self.conv1d
        if shape != (spec.shape[::-1] if transposed else spec.shape):
            raise UserError(f"{spec.name}: weights are {list(spec.shape)}, the model's parameter is {list(shape)}")
        self.state[spec.parameter] = (weight.t() if transposed else weight).to(self.dtype).contiguous()

    def finish(self) -> dict[str, Tensor]:
        """The state dict; UserError if a fused parameter is incomplete."""
        for parameter, left in self.missing.items():
            if left:
                raise UserError(f"{self.folder}: {parameter}: {len(left)} slices are missing, the first is {min(left)}")
        return self.state

    def _put_slice(self, parameter: str, index: int, weight: Tensor) -> None:
        shape = self.shapes[parameter]
        if len(shape) != 3 or shape[1:] != tuple(weight.shape) or index >= shape[0]:
            raise UserError(
                f"{parameter}.{index}: weights are {list(weight.shape)}, the model's parameter is {list(shape)}"
            )
        if parameter not in self.state:
            self.state[parameter] = torch.empty(shape, dtype=self.dtype)
            self.missing[parameter] = set(range(shape[0]))
        self.state[parameter][index] = weight.to(self.dtype)
        self.missing[parameter].discard(index)


def pick_dtype(config: Any, dtype: str | torch.dtype) -> torch.dtype:
    """``dtype`` as a torch dtype; ``auto`` is what config.json says."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        found = getattr(config, "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"dtype {dtype!r} is unknown; use auto, bfloat16, float16 or float32")
    return found


def _load_packed(
    checkpoint: Checkpoint, form: Format, dtype: str | torch.dtype, trust_remote_code: bool, kernels: Kernels
) -> Any:
    """Through Transformers with our quantizer, whatever the format: layers are packed one by one as they were read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from compress.runtime import quantizer

    quantizer.register()
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    pick_dtype(config, dtype)
    wrapped = quantizer.CompressConfig(**checkpoint.config["quantization_config"])
    wrapped.form, wrapped.kernels = form.__name__.rpartition(".")[2], kernels  # type: ignore[attr-defined]
    wrapped.weights_file = checkpoint.entry
    config.quantization_config = wrapped
    model, found = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _refuse_lost(checkpoint, found)
    return model.eval()


def _load_stock(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    _refuse_lost(checkpoint, found)
    return model.eval().to(device)


def _refuse_lost(checkpoint: Checkpoint, found: dict[str, Any]) -> None:
    lost = sorted(
        str(key) for words in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in found.get(words) or ()
    )
    if lost:
        raise UserError(
            f"{checkpoint.folder}: {len(lost)} weights do not match the model ({', '.join(lost[:3])}); config.json and "
            "weights do not belong together"
        )
