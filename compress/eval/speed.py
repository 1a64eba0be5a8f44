"""How fast a model runs and what it holds: prefill, decode, memory, and the read bandwidth that bounds decode.

Prefill is one forward over ``prefill_tokens`` tokens of text that fills the cache and gives the logits of the last
token. Decode is greedy ``generate`` with batch 1 after a prompt of ``prompt_tokens``: seconds between the first new
token and the last, so without the prompt's prefill. Each figure is the median of ``repeats`` after one warm-up.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.eval.loading import find_folder, open_model, read_config

RANDOM = "random"  # instead of a dense model: one of the folder's shape with random weights
PROBE_BYTES = 256 << 20  # far more than any cache
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Workload:
    """What is timed. UserError for numbers that can't be."""

    prefill_tokens: int = 512
    prompt_tokens: int = 32
    decode_tokens: int = 64
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def check_length(self, longest: Any) -> None:
        """UserError if a sequence is longer than the ``max_position_embeddings`` of a config, where it has one."""
        last = self.prompt_tokens + self.decode_tokens + 1
        if isinstance(longest, int) and 0 < longest < max(self.prefill_tokens, last):
            raise UserError(
                f"the model takes {longest} tokens; prefill takes {self.prefill_tokens} and decode goes from "
                f"{self.prompt_tokens} to {last}; ask for fewer"
            )


class Clock:
    """A streamer for ``generate`` that notes when each token came; the first entry is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure_model(model: Any, ids: Tensor, workload: Workload) -> dict[str, Any]:
    """Tokens per second of a loaded model on ``ids (T)``, T >= ``prefill_tokens`` and ``prompt_tokens``.

    Keys: ``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``prefill_seconds`` and
    ``decode_seconds_per_token`` (each of the repeats), ``logits`` (``last``, or ``all`` for a model that always gives
    them all).
    """
    prompt, text = ids[None, : workload.prompt_tokens], ids[None, : workload.prefill_tokens]
    time_prefill(model, text)
    prefill = [time_prefill(model, text) for _ in range(workload.repeats)]
    time_decode(model, prompt, min(4, workload.decode_tokens))
    decode = [time_decode(model, prompt, workload.decode_tokens) for _ in range(workload.repeats)]
    return {
        "prefill_tokens_per_second": workload.prefill_tokens / statistics.median(prefill),
        "decode_tokens_per_second": 1 / statistics.median(decode),
        "prefill_seconds": prefill,
        "decode_seconds_per_token": decode,
        "logits": "last" if _keeps_logits(model) else "all",
    }


def time_prefill(model: Any, ids: Tensor) -> float:
    """Seconds of one forward over ``ids (1, T)`` that fills a new cache."""
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    with torch.inference_mode():
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, **options)
        return time.perf_counter() - start


def time_decode(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds per token of greedy ``generate`` after the prompt ``ids (1, T)``: ``tokens`` after the first new one."""
    from transformers import GenerationConfig

    vocabulary = int(model.config.get_text_config().vocab_size)
    # A model stops at a token that does not exist: every run has the same length, and checks for it as any would.
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=tokens + 1, eos_token_id=vocabulary, pad_token_id=0
    )
    clock = Clock()
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, generation_config=config, streamer=clock)
    if len(clock.times) != tokens + 2:
        raise RuntimeError(f"generate gave {len(clock.times) - 1} tokens, not {tokens + 1}")
    return (clock.times[-1] - clock.times[1]) / tokens


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def count_read_bytes(model: nn.Module) -> int | None:
    """Bytes of weights that a decode step reads: all but an input embedding whose matrix is not the head's too.

    None for a mixture of experts, where that depends on the tokens.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    if any(getattr(text, name, None) for name in EXPERTS):
        return None
    held = _list_storage(model)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is embedding:
            inside = _list_storage(module)
            rest = [_list_own(other) for key, other in model.named_modules() if key != name]
            elsewhere = {place for own in rest for place in own}
            return sum(held.values()) - sum(size for place, size in inside.items() if place not in elsewhere)
    return sum(held.values())


def _list_storage(module: nn.Module) -> dict[int, int]:
    """Address -> bytes of every parameter and buffer, shared ones once."""
    return {place: size for one in module.modules() for place, size in _list_own(one).items()}


def _list_own(module: nn.Module) -> dict[int, int]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}


def measure_bandwidth(size: int = PROBE_BYTES, repeats: int = 5) -> dict[str, Any]:
    """Bytes per second that PyTorch's threads read from memory: the best of several sums over ``size`` bytes.

    The best, for it stands for what the machine can do, and whatever else runs only takes from it.
    """
    integers = torch.ones(size // 8, dtype=torch.int64)
    floats = integers.view(torch.float32)
    probes: dict[str, Callable[[], Tensor]] = {
        "sum of int64": integers.sum,
        "sum of float32": floats.sum,
        "product of a float32 matrix and a vector": lambda: torch.mv(floats.view(-1, 4096), floats[:4096]),
    }
    best = {name: min(_time(probe) for _ in range(repeats + 1)) for name, probe in probes.items()}
    name = min(best, key=lambda key: best[key])
    return {"bytes_per_second": size / best[name], "probe": f"{name}, {size} bytes, {torch.get_num_threads()} threads"}


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_folder(
    folder: str,
    ids: list[int],
    workload: dict[str, int],
    loader: str,
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """``measure_process`` of a folder. ``loader``: ``compress`` (``compress.load``), ``stock`` (as evaluation does), or
    ``random`` (a dense model of the folder's shape; its load is not timed).
    """
    found = measure_process(
        lambda: LOADERS[loader](Path(folder), dtype, trust_remote_code), ids, Workload(**workload), threads
    )
    return {**found, "load_seconds": None} if loader == RANDOM else found


def measure_process(
    load: Callable[[], tuple[Any, str]], ids: list[int], workload: Workload, threads: int | None = None
) -> dict[str, Any]:
    """``measure_model`` of what ``load`` gives, with how it was loaded; for a process that does nothing else.

    Adds ``load_seconds``, ``resident_bytes`` (growth of this process from before loading to after a first short
    forward, so with code and whatever else loading left there), ``weight_bytes`` (parameters and buffers),
    ``read_bytes_per_token``, ``loaded_with``, ``dtype``, ``threads``.
    """
    import psutil

    # Imported before the first reading, so that code is not counted as the model's.
    import transformers.models.auto.modeling_auto  # noqa: F401

    if threads is not None:
        torch.set_num_threads(threads)
    tokens = torch.tensor(ids)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    model, loaded_with = load()
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(input_ids=tokens[None, :16], use_cache=False)
    gc.collect()
    return {
        "load_seconds": seconds,
        "resident_bytes": max(0, process.memory_info().rss - before),
        "weight_bytes": sum(_list_storage(model).values()),
        "read_bytes_per_token": count_read_bytes(model),
        "loaded_with": loaded_with,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **measure_model(model, tokens, workload),
    }


def _load_compress(folder: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, str]:
    from compress.runtime.load import load

    model = load(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    report = getattr(model, "compress_report", None)
    return model, "compress.load" if report is None else f"compress.load: {report}"


def _load_stock(folder: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, str]:
    opened = open_model(find_folder(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    return opened.model, opened.loaded_with


def _make_random(folder: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, str]:
    """A dense model of the folder's architecture: speed does not depend on the values of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    read_config(folder)  # its message is the better one where there is none
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    return model.eval(), "transformers, random weights of the same shapes"


LOADERS: dict[str, Callable[[Path, str, bool], tuple[Any, str]]] = {
    "compress": _load_compress,
    "stock": _load_stock,
    RANDOM: _make_random,
}
