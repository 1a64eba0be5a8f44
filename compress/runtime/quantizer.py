"""Transformers' quantizer for ``quant_method: compress``: with it, ``from_pretrained`` loads what only we can write.

``hook.py`` registers it once both we and Transformers are imported. Modules are swapped on meta, Transformers fills
their buffers by name, then they are packed for the kernels. ``compress.load`` uses it for other formats too, with a
``CompressConfig`` around their own configuration.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import UserError
from compress.runtime.attention import use_native_attention
from compress.runtime.fuse import fuse
from compress.runtime.head import speed_up_head
from compress.runtime.load import Kernels
from compress.runtime.merge import merge_siblings
from compress.runtime.save import attach_saving, read_encoded
from compress.runtime.stored import Source, place
from compress.runtime.swap import choose, finish
from compress.storage.formats.base import Format, load_format

METHOD = "compress"
INDEX = "compress.safetensors.index.json"


class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A ``quantization_config`` as config.json has it, and how to load it; ``to_dict`` gives back what was there.

    ``form``: the format file that reads it. ``kernels``: see ``compress.load``. ``weights_file``: where Transformers
    looks for weights, None for its own names.
    """

    def __init__(self, **config: Any) -> None:
        self.quant_method = METHOD
        self.config = config
        self.form = "native"
        self.kernels: Kernels = "auto"
        self.weights_file: str | None = INDEX

    def get(self, key: str, default: Any = None) -> Any:
        """Transformers looks into configurations as into dictionaries."""
        return self.quant_method if key == "quant_method" else default

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.config)


class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules before weights are read and packs them after; see the methods of the base class for when."""

    requires_calibration = True  # a dense model is compressed by ``compress.run``, not on the fly
    quantization_config: CompressConfig
    source: Source

    @property
    def form(self) -> Format:
        return load_format(self.quantization_config.form)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before files are looked for, so this is where to say what they are called."""
        if self.quantization_config.weights_file is not None:
            config.transformers_weights = self.quantization_config.weights_file
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if checkpoint_files is None:
            raise UserError("a compressed model is loaded from its files, not from a state dict")
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        source = Source.read([str(file) for file in checkpoint_files])
        stems = place(model, self.form, source.headers, self.quantization_config.config)
        self.source = Source(source.headers, source.files, source.stamps, stems)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        choice = choose(self.quantization_config.kernels, next(_list_tensors(model)).device)
        report = finish(model, self.form, self.quantization_config.config, choice)
        if not choice.reference and choice.why_dense is None:
            report.merged = merge_siblings(model)
            report.not_fused = fuse(model.base_model)
            report.fused = [] if report.not_fused else [name for name, _ in model.base_model.layers.named_children()]
            report.native_head = speed_up_head(model)
            report.native_attention = use_native_attention(model)
        model.compress_report = report
        attach_saving(model, self.source, guarded=self.form.PREFIX != "model")
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors as files have them: encoded layers read again from the files that the model came from."""
        inside = tuple(f"{stem}." for stem in self.source.stems)
        ours = tuple(f"{name}." for name in (*model.compress_report.on_kernels, *model.compress_report.decoded))
        plain = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(inside + ours) and not self._is_fused(name)
        }
        return {**plain, **read_encoded(self.source)}, {}

    def _is_fused(self, name: str) -> bool:
        """Whether a parameter was put together from slices."""
        return any(stem.rpartition(".")[0] == name for stem in self.source.stems)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make ``quant_method: compress`` known to Transformers; more than once does no harm."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, CompressConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, CompressQuantizer)


def _list_tensors(model: nn.Module) -> Any:
    yield from model.parameters()
    yield from model.buffers()
