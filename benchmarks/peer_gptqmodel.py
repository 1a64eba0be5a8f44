"""GPTQModel's quantization of a folder, timed: run by ``peers.py`` with the Python of a venv that has GPTQModel.

Stand-alone: imports nothing of ours. The calibration text comes as token ids, the very windows that ``compress`` uses.
Prints one JSON line with seconds and the largest resident memory of this process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def use_one_worker() -> list[str]:
    """Cut GPTQModel's pool of threads per device to one worker: on few cores some releases fail to start.

    On two cores one worker for the CPU is the default of 7.7 too. The arithmetic is PyTorch's and uses all cores.
    """
    patched = []
    module = importlib.import_module("gptqmodel.utils.threadx")
    original = module.DeviceThreadPool.__init__

    def start(self: Any, *arguments: Any, **settings: Any) -> None:
        workers = settings.get("workers")
        if workers is not None:
            settings["workers"] = dict.fromkeys(workers, 1)
            patched.append(str(sorted(workers)))
        original(self, *arguments, **settings)

    module.DeviceThreadPool.__init__ = start
    return patched


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("windows", help="JSON: a list of lists of token ids")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="only import and configure: does it start?")
    arguments = parser.parse_args()
    patched = use_one_worker()
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = json.loads(Path(arguments.windows).read_text(encoding="utf-8"))
    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size)
    if arguments.check:
        importlib.import_module("gptqmodel").get_device_thread_pool()
    start = time.perf_counter()
    if not arguments.check:
        model = GPTQModel.load(arguments.folder, config)
        model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=1)
        model.save(arguments.output)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    versions = {name: importlib.metadata.version(name) for name in ("gptqmodel", "torch", "transformers")}
    result = {"seconds": seconds, "peak_bytes": peak, "versions": versions, "one_worker": patched, "pid": os.getpid()}
    print("@result " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
