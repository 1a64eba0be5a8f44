"""Open a written folder for measuring, in the form that a user would load, and count what it holds."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.eval import stock

# Files that hold weights, by suffix; everything else in a folder (tokenizer, config, report) is not counted.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Opened:
    """A model ready to run, and who loaded it: ``transformers`` or ``compress.runtime``."""

    model: Any
    loaded_with: str
    why: str | None = None  # why it was not stock Transformers


def find_folder(model: str | Path, trust_remote_code: bool = False) -> Path:
    """The folder of a model: itself, or what a hub id, a GGUF file or a demo name resolves to."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    from compress.storage.source import resolve

    folder: Path = resolve(str(model), trust_remote_code=trust_remote_code).folder
    return folder


def open_model(folder: Path, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> Opened:
    """Load by stock ``from_pretrained`` where the format's own packages are installed, else by ``compress.load``.

    Raises UserError for a folder without a config or with weights that are missing: a model that is random in part
    must not be measured.
    """
    why = why_not_stock(folder)
    if why is not None:
        from compress.runtime.load import load

        model = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return Opened(model.eval(), "compress.runtime", why)
    model, weights = stock.load_model(str(folder), dtype, trust_remote_code)
    lost = weights["missing_keys"] + weights["mismatched_keys"]
    if lost:
        names = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise UserError(f"{folder}: {len(lost)} weights of the model are not in its files: {names}")
    return Opened(model.to(device), "transformers")


def why_not_stock(folder: Path) -> str | None:
    """None where Transformers and the packages that are installed can load the folder, else the reason."""
    from compress.runtime.load import FORMATS
    from compress.storage.formats.base import load_format

    method = read_config(folder).get("quantization_config", {}).get("quant_method")
    if method not in FORMATS:
        return None  # a dense folder, or a format that is none of ours: Transformers knows best
    packages = load_format(FORMATS[method]).LOADS_WITH
    if "compress" in packages:
        return "the native format, which Transformers alone does not know"
    absent = missing_packages(packages)
    return f"{' and '.join(absent)} not installed" if absent else None


def missing_packages(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package.replace("-", "_")) is None]


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: can't be read: {error}; wanted a folder that save_pretrained or compress wrote"
        ) from error
    return config


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder; UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no tokenizer can be loaded from it ({str(error).splitlines()[0]}); "
            "put its files beside config.json, or pass a tokenizer"
        ) from error


def count_parameters(folder: Path, trust_remote_code: bool = False) -> int:
    """Parameters of the dense model behind a folder, tied ones once; from its config, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def count_weight_bytes(model: Any) -> int:
    """Bytes of the weight files of a folder, or of the parameters and buffers of a model in memory (shared once)."""
    if isinstance(model, str | Path):
        return sum(path.stat().st_size for path in _list_weight_files(Path(model)))
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _list_weight_files(folder: Path) -> list[Path]:
    """The files that a load reads: what the safetensors index names, else everything that looks like weights."""
    from compress.storage.checkpoint import Checkpoint

    try:
        return [folder / name for name in Checkpoint(folder).files]
    except UserError:  # no safetensors
        return [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
