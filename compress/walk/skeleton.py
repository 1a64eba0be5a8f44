"""A model without its weights: which blocks and layers it has, and how to bring in one unit of them at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from compress.errors import UserError
from compress.types import LayerSpec
from compress.walk.conversion import Conversion, NameMap, Reader, map_names, read_conversion
from compress.walk.coverage import Coverage, cover, list_head, list_specs


@dataclass
class Skeleton:
    """A causal language model split into decoder blocks and the rest.

    From a checkpoint, ``model`` lies on meta (non-persistent buffers such as rotary tables are real) and units are read
    when asked for. From a model in memory, ``model`` is that model, and its live blocks are handed out.
    """

    model: PreTrainedModel
    blocks: tuple[str, ...]  # prefixes, such as "model.layers.0"
    dtype: torch.dtype
    reader: Reader | None = None  # None: a model in memory
    names: NameMap | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: Reader, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
        """Build the model of ``checkpoint.folder`` on meta and pair its parameters with the checkpoint's tensors.

        Raises ``UserError`` for a model that is not a causal language model, is quantized already, has no recognisable
        blocks, or whose tensors do not match: nothing is ever initialised at random.
        """
        config = read_config(checkpoint, trust_remote_code)
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
            raise UserError(f"{checkpoint.folder}: already quantized ({method}); give the uncompressed model instead")
        model = build_on_meta(config, dtype, trust_remote_code)
        names = map_names(model, checkpoint.headers)
        _refuse_mismatch(checkpoint, names)
        return cls(model, find_blocks(model), dtype, checkpoint, names)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Skeleton:
        """Wrap a model in memory. It is set to eval mode: dropout has no place in calibration."""
        return cls(model.eval(), find_blocks(model), model.dtype)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    def specs(self) -> list[LayerSpec]:
        """Every linear layer inside the blocks that may be compressed, in definition order."""
        return list_specs(self.model, self.blocks)

    def block_specs(self, i: int) -> list[LayerSpec]:
        """The layers of block ``i``."""
        return list_specs(self.model, self.blocks[i : i + 1])

    def head_specs(self) -> list[LayerSpec]:
        """The token embedding and the output head; one where they are one matrix."""
        return list_head(self.model, self._tied())

    def coverage(self, selected: Iterable[str]) -> list[Coverage]:
        """What becomes of every parameter if the layers named ``selected`` are compressed; sums to 100% of them."""
        return cover(self.model, self.blocks, set(selected), self._tied())

    def unit_tensors(self, i: int) -> list[str]:
        """Checkpoint tensor names that block ``i`` is made of (none for a model in memory)."""
        return [source for conversion in self._conversions(self.blocks[i]) for source in conversion.sources]

    def load_block(self, i: int, device: torch.device | str = "cpu") -> nn.Module:
        """Block ``i`` with its weights: a fresh copy from the checkpoint, or the live block of a model in memory."""
        prefix = self.blocks[i]
        block: nn.Module = self.model.get_submodule(prefix)
        if self.reader is None:
            return block
        block = copy.deepcopy(block).eval()
        for conversion in self._conversions(prefix):
            for name, tensor in read_conversion(conversion, self.reader, self.model, self.dtype, device).items():
                set_tensor(block, name.removeprefix(prefix + "."), tensor)
        move_buffers(block, device)
        return block

    def load_outside(self, device: torch.device | str = "cpu", head: bool = True) -> PreTrainedModel:
        """The model with everything but its blocks (which stay on meta). ``head=False`` leaves the head out as well.

        For a model in memory it is that model.
        """
        if self.reader is None:
            return self.model
        model = copy.deepcopy(self.model).eval()
        for name, tensor in self._read_outside(device, head):
            parameter = nn.Parameter(tensor, requires_grad=False)
            for alias in [name, *self._aliases(name)]:
                set_tensor(model, alias, parameter)
        move_buffers(model, device)
        return model

    def outside_names(self) -> list[str]:
        """State-dict names of all that is outside the blocks, tied ones once, in the order of ``outside_tensors``."""
        if self.reader is None:
            return [name for name, _ in self.outside_tensors()]
        tied = self._tied()
        return [tied.get(name, name) for one in self._outside_conversions(head=True) for name in one.targets]

    def outside_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``(state-dict name, tensor)`` of all that is outside the blocks, one at a time on the CPU, tied ones once."""
        if self.reader is not None:
            yield from self._read_outside("cpu", head=True)
            return
        seen: set[tuple[int, torch.Size]] = set()
        for name, tensor in self.model.state_dict().items():
            key = (tensor.data_ptr(), tensor.shape)
            if not self._in_block(name) and key not in seen:
                seen.add(key)
                yield name, tensor.detach().cpu()

    def outside_tensor(self, name: str) -> Tensor:
        """The one tensor of that name among ``outside_tensors``; of a model in memory the live parameter."""
        if self.reader is None:
            parameter: Tensor = self.model.get_parameter(name)
            return parameter.detach()
        tied = self._tied()
        wanted = next(
            one for one in self._outside_conversions(head=True) if name in {tied.get(n, n) for n in one.targets}
        )
        made = read_conversion(wanted, self.reader, self.model, self.dtype, "cpu")
        return next(tensor for target, tensor in made.items() if tied.get(target, target) == name)

    def _outside_conversions(self, head: bool) -> Iterator[Conversion]:
        assert self.names is not None
        output = self.model.get_output_embeddings()
        skipped = {id(one) for one in output.parameters()} if output is not None and not head else set()
        tied = self._tied()
        made = {name for conversion in self.names.conversions for name in conversion.targets}
        for conversion in self.names.conversions:
            name = conversion.targets[0]
            if self._in_block(name) or (tied.get(name, name) != name and tied[name] in made):
                continue
            if id(self.model.get_parameter_or_buffer(name)) not in skipped or self._aliases(name):
                yield conversion

    def _read_outside(self, device: torch.device | str, head: bool) -> Iterator[tuple[str, Tensor]]:
        assert self.reader is not None
        tied = self._tied()
        for conversion in self._outside_conversions(head):
            made = read_conversion(conversion, self.reader, self.model, self.dtype, device)
            for target in list(made):
                self._refuse_untied(target, made[target])
                yield tied.get(target, target), made.pop(target)

    def _refuse_untied(self, name: str, tensor: Tensor) -> None:
        """A checkpoint may hold both sides of a tied pair; they must be the same then."""
        assert self.reader is not None
        assert self.names is not None
        for conversion in self.names.conversions:
            if conversion.targets[0] not in self._aliases(name):
                continue
            (other,) = read_conversion(conversion, self.reader, self.model, self.dtype, tensor.device).values()
            if not torch.equal(other, tensor):
                raise UserError(
                    f"{self.reader.folder}: config.json says that {conversion.targets[0]} is tied to {name}, but the "
                    "checkpoint holds two different tensors; set tie_word_embeddings to false in config.json"
                )

    def _aliases(self, name: str) -> list[str]:
        """Other names of the same tied parameter."""
        tied = self._tied()
        source = tied.get(name, name)
        return [other for other in [source, *(t for t, s in tied.items() if s == source)] if other != name]

    def _tied(self) -> dict[str, str]:
        """``{name: the name it is tied to}``, so that a parameter with two names is read and counted once."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def _conversions(self, prefix: str) -> list[Conversion]:
        if self.names is None:
            return []
        return [one for one in self.names.conversions if one.targets[0].startswith(prefix + ".")]

    def _in_block(self, name: str) -> bool:
        return any(name.startswith(prefix + ".") for prefix in self.blocks)


def read_config(checkpoint: Reader, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of ``checkpoint.folder``; ``UserError`` where Transformers does not know or trust it."""
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint.folder}/config.json: Transformers can't read it: {reason}") from error


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The causal language model of ``config`` with parameters on meta and non-persistent buffers computed on the CPU.

    Those buffers (rotary tables) are in no checkpoint; a Transformers model fills them in ``_init_weights``, which is
    what ``from_pretrained`` calls for them too, and which does nothing to tensors on meta.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UserError(
            f"model type {config.model_type!r} is not a causal language model that Transformers knows"
        ) from error
    fill_buffers(model)
    return model.eval().requires_grad_(False)


def fill_buffers(model: PreTrainedModel) -> None:
    """Compute the non-persistent buffers of a model on meta. Raises ``UserError`` for one that it leaves unset."""
    made: list[tuple[str, Tensor]] = []
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                filler = float("nan") if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, filler, device="cpu")
                made.append((f"{path}.{name}", module._buffers[name]))
        module._is_hf_initialized = False
    model.initialize_weights()
    unset = [name for name, buffer in made if buffer.is_floating_point() and bool(buffer.isnan().any())]
    if unset:
        raise UserError(f"{type(model).__name__}: does not compute its buffers {', '.join(unset[:5])}; not supported")


def find_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """Prefixes of the decoder blocks: the one ``ModuleList`` as long as the configuration's ``num_hidden_layers``."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module[0].parameters())
    ]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise UserError(
            f"{type(model).__name__}: the decoder blocks are not recognisable: wanted one list of {count} modules "
            f"(num_hidden_layers), found {found}; this architecture is not supported"
        )
    return tuple(f"{outermost[0]}.{i}" for i in range(int(count or 0)))


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` in the place of the parameter or buffer ``name``."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    else:
        owner._buffers[leaf] = tensor.data


def move_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Bring every real buffer to ``device``."""
    for one in module.modules():
        for name, buffer in one._buffers.items():
            if buffer is not None and not buffer.is_meta:
                one._buffers[name] = buffer.to(device)


def _refuse_mismatch(checkpoint: Reader, names: NameMap) -> None:
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{' ...' if len(found) > 5 else ''})"
        for found, what in (
            (names.missing, "tensors that the model wants are missing"),
            (names.unexpected, "tensors that the model does not know"),
        )
        if found
    ]
    if problems:
        raise UserError(
            f"{checkpoint.folder}: config.json and weights do not match: {'; '.join(problems)}; "
            "download the folder again, or correct config.json"
        )
