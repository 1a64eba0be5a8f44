"""What this machine and installation have: versions, CPU features, kernels, devices, formats, memory, disk."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "gguf", "datasets", "numpy", "pydantic")
CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "sve")


def collect() -> dict[str, Any]:
    """Everything, as plain data."""
    import psutil
    import torch

    import compress
    from compress.kernels import library
    from compress.plan_memory import measure_free

    disk = shutil.disk_usage(Path.cwd())
    return {
        "compress": compress.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: find_version(name) for name in PACKAGES},
        "cpu": {"name": cpu_name(), "cores": psutil.cpu_count(logical=False), "threads": torch.get_num_threads()},
        "cpu_features": cpu_features(),
        "kernels": library.describe(),
        "devices": describe_devices(),
        "formats": describe_formats(),
        "memory": {"total": int(psutil.virtual_memory().total), "free": measure_free()},
        "disk": {"folder": str(Path.cwd()), "total": disk.total, "free": disk.free},
    }


def find_version(package: str) -> str | None:
    """The installed version, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of ``CPU_FEATURES`` that the processor reports (Linux only; elsewhere what PyTorch says)."""
    import torch

    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return [torch.backends.cpu.get_cpu_capability().lower()]
    flags: set[str] = set()
    for line in path.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            flags.update(line.partition(":")[2].split())
    return [name for name in CPU_FEATURES if name in flags]


def describe_devices() -> list[str]:
    """Devices that ``--device`` takes."""
    import torch

    found = ["cpu"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {of.name}, {of.total_memory / 1e9:.1f} GB, sm_{of.major}{of.minor}")
    return found


def describe_formats() -> dict[str, dict[str, str | None]]:
    """Format -> packages that a stock load of it needs -> installed version or None."""
    import compress
    from compress.recipe_check import list_words
    from compress.storage.formats.base import load_format

    formats = [load_format(word) for word in list_words("storage/formats")]
    here = {"compress": compress.__version__}  # the native format needs this package, whatever its distribution's name
    return {one.NAME: {name: here.get(name) or find_version(name) for name in one.LOADS_WITH} for one in formats}


def render(info: dict[str, Any]) -> str:
    """Lines for people."""
    from compress.kernels import library

    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in info["packages"].items())
    lines = [
        f"compress  {info['compress']}, Python {info['python']}, {info['system']}",
        f"packages  {packages}",
        f"cpu       {info['cpu']['name']}, {info['cpu']['cores']} cores, {info['cpu']['threads']} threads in use",
        f"          features: {' '.join(info['cpu_features']) or 'unknown'}",
        *(f"kernels   {line}" for line in library.render(info["kernels"])),
        *(f"device    {name}" for name in info["devices"]),
    ]
    for name, needed in info["formats"].items():
        missing = [package for package, version in needed.items() if version is None]
        state = f"loading it needs pip install {' '.join(missing)}" if missing else "can be written and loaded here"
        lines.append(f"format    {name}: {state}")
    memory, disk = info["memory"], info["disk"]
    lines.append(f"memory    {memory['free'] / 1e9:.1f} GB free of {memory['total'] / 1e9:.1f} GB")
    lines.append(f"disk      {disk['free'] / 1e9:.1f} GB free of {disk['total'] / 1e9:.1f} GB at {disk['folder']}")
    return "\n".join(lines)
