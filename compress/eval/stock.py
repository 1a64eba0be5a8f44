"""Load a folder as its user would, with Transformers and nothing of ours, and write the logits of probe tokens.

A stand-alone script, run in a process of its own: ``python -I stock.py FOLDER probe.safetensors out.safetensors
--dtype bfloat16``. The probe holds ``input_ids (N, T)``; the output holds ``logits (N, T, V)`` float32 and, as
metadata ``info``, JSON: the model's class, weights that were missing, mismatched or unexpected, versions of packages.
It must never import ``compress``: then a folder that only we could load would pass.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from typing import Any

PACKAGES = ("torch", "transformers", "compressed-tensors", "gptqmodel", "optimum", "bitsandbytes", "gguf")


def load_model(folder: str, dtype: str, trust_remote_code: bool = False) -> tuple[Any, dict[str, list[str]]]:
    """The model of a folder by stock ``from_pretrained``, and which weights did not find their place.

    Transformers initialises at random what is missing and only warns, so the caller must look at the lists.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    names = ("missing_keys", "mismatched_keys", "unexpected_keys")
    return model.eval(), {name: sorted(str(key) for key in found.get(name) or ()) for name in names}


def list_versions() -> dict[str, str]:
    """Versions of the packages that decide how a folder is loaded, those that are installed."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_logits(model: Any, probe: str, out: str, info: dict[str, Any]) -> None:
    """Logits of every probe window, one window at a time, float32."""
    import torch
    from safetensors.torch import load_file, save_file

    ids = load_file(probe)["input_ids"]
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        rows = [model(input_ids=row[None].to(device), use_cache=False).logits[0].float().cpu() for row in ids]
    save_file({"logits": torch.stack(rows)}, out, metadata={"info": json.dumps(info)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("probe")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args()
    model, weights = load_model(arguments.folder, arguments.dtype, arguments.trust_remote_code)
    assert "compress" not in sys.modules, "this script checks what loads without us"
    info = {**weights, "class": type(model).__name__, "versions": list_versions()}
    write_logits(model.to(arguments.device), arguments.probe, arguments.out, info)


if __name__ == "__main__":
    main()
