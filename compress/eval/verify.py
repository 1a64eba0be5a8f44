"""Does what was written reload as the model that was meant? Asked of a fresh process, answered with logits."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import VerificationError
from compress.eval import stock
from compress.eval.loading import read_config, why_not_stock
from compress.eval.perplexity import kl_divergence
from compress.eval.process import TAIL, run_worker

# Largest relative RMS difference of logits, by the dtype of the forward. Where the reloaded model has the same weights
# and the same kernels, the difference is 0. SmolLM2-135M in bf16 gives, on 256 tokens: the same text in a longer window
# 2e-2 (other order of additions), eager attention instead of fused 4e-2, a layer of 210 rounded to 4 bit 5e-2 to 9e-2,
# a layer with its rows off by one 0.4 to 0.7. So the tolerance is below what a wrong layer costs.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
# A format whose package multiplies with kernels of its own (gptq with GPTQModel) differs by their rounding at every
# layer, more than one slightly wrong layer does: there only gross errors are seen.
OWN_KERNELS = {"gptq": 5.0}
# bitsandbytes multiplies integers exactly, and what was meant had weights and inputs rounded to the model's dtype: each
# layer differs by 2e-3 to 4e-3 in bfloat16. That moves some inputs of the next layer by a whole step and some features
# over the threshold, so that through 30 layers the logits come to differ by as much as rounding inputs costs: a tiny
# Llama by 2e-2 (2e-3 in float32), SmolLM2-135M by 0.18, and by 0.17 from the dense model. Only gross errors are seen.
BITSANDBYTES = {"bfloat16": 3e-1, "float16": 1e-1, "float32": 3e-2}


def verify(
    folder: str | Path,
    input_ids: Tensor,
    logits: Tensor,
    *,
    dtype: str,
    device: str = "cpu",
    tolerance: float | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Reload a folder in a fresh process and compare its logits with the meant ones.

    ``input_ids (N, T)``, ``logits (N, T, V)`` of the model that was meant; ``dtype`` the forward's, "bfloat16", ...,
    and ``device`` where it ran, so that the reloaded model runs with the same kernels.
    Stock Transformers loads it where the format's own packages are installed; else our own loader does, and
    ``checked_with`` says so. Gives ``passed``, ``relative_rms``, ``max_error``, ``kl``, ``top1_agreement``,
    ``tolerance``, ``tokens``, ``checked_with``, ``versions``. Raises VerificationError with the figures.
    """
    why = why_not_stock(Path(folder))
    with tempfile.TemporaryDirectory(prefix="compress-verify-") as scratch:
        probe, out = Path(scratch, "probe.safetensors"), Path(scratch, "logits.safetensors")
        save_file({"input_ids": input_ids.to(torch.int64).cpu().contiguous()}, str(probe))
        if why is None:
            info = _ask_stock(Path(folder), probe, out, dtype, device, trust_remote_code)
            checked_with = "transformers, in a process without compress"
        else:
            arguments = {"folder": str(folder), "probe": str(probe), "out": str(out), "dtype": dtype, "device": device}
            info = run_worker("logits", {**arguments, "trust_remote_code": trust_remote_code})
            checked_with = f"compress.load, in a fresh process ({why})"
        with safe_open(str(out), framework="pt") as file:
            got = file.get_tensor("logits")
    limit = find_tolerance(Path(folder), dtype, stock_loads=why is None) if tolerance is None else tolerance
    figures = compare_logits(got, logits.float().cpu())
    result = {**figures, "tolerance": limit, "checked_with": checked_with, "versions": info["versions"]}
    _judge(Path(folder), result)
    return {"passed": True, **result}


def find_tolerance(folder: Path, dtype: str, stock_loads: bool) -> float:
    """The largest relative RMS that passes, for the kernels that a folder's logits come from."""
    method = read_config(folder).get("quantization_config", {}).get("quant_method")
    if stock_loads and method == "bitsandbytes":
        return BITSANDBYTES[dtype]
    return TOLERANCE[dtype] * (OWN_KERNELS.get(method, 1.0) if stock_loads else 1.0)


def compare_logits(got: Tensor, meant: Tensor) -> dict[str, Any]:
    """How far logits ``(N, T, V)`` are from the meant ones, both float32.

    ``relative_rms = rms(got - meant) / rms(meant - mean over V)``: a shift of all logits by the same amount would not
    change the model, so it must not make the difference look small.
    """
    if got.shape != meant.shape:
        raise VerificationError(f"the reloaded model gives logits {tuple(got.shape)}; wanted {tuple(meant.shape)}")
    difference = got - meant
    spread = (meant - meant.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    log_p, log_q = torch.log_softmax(meant, -1), torch.log_softmax(got, -1)
    return {
        "relative_rms": float(difference.pow(2).mean().sqrt() / spread.clamp_min(1e-30)),
        "max_error": float(difference.abs().max()),
        "kl": float(kl_divergence(log_p, log_q).mean()),
        "top1_agreement": float((meant.argmax(-1) == got.argmax(-1)).float().mean()),
        "tokens": meant.shape[0] * meant.shape[1],
    }


def _ask_stock(
    folder: Path, probe: Path, out: Path, dtype: str, device: str, trust_remote_code: bool
) -> dict[str, Any]:
    """Run ``stock.py`` isolated from this environment's paths; VerificationError where it can't load the folder."""
    command = [sys.executable, "-I", str(Path(stock.__file__)), str(folder), str(probe), str(out)]
    command += ["--dtype", dtype, "--device", device]
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise VerificationError(
            f"{folder}: stock Transformers can't load it (code {done.returncode}):\n{done.stderr[-TAIL:]}"
        )
    with safe_open(str(out), framework="pt") as file:
        info: dict[str, Any] = json.loads(file.metadata()["info"])
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            found = f"{len(info[kind])} {kind.replace('_', ' ')}: {', '.join(info[kind][:3])}"
            raise VerificationError(f"{folder}: stock Transformers finds {found}")
    return info


def _judge(folder: Path, result: dict[str, Any]) -> None:
    error = result["relative_rms"]
    if not error <= result["tolerance"]:  # a NaN fails too
        raise VerificationError(
            f"{folder}: reloaded, its logits differ from the model that was meant: relative RMS {error:.3g}, wanted "
            f"at most {result['tolerance']:.3g}; largest difference {result['max_error']:.3g}, KL {result['kl']:.3g} "
            f"nats, top-1 agreement {result['top1_agreement']:.1%} over {result['tokens']} tokens; "
            f"loaded with {result['checked_with']}"
        )
