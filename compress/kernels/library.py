"""The compiled kernels: found and loaded on first use, chosen by instruction set, or done without.

Modes: ``auto`` uses what is there, ``reference`` only the PyTorch bodies, ``require`` makes a missing kernel an error,
so that a benchmark never times a fallback. Mode and instruction set hold for the whole process.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

Mode = Literal["auto", "reference", "require"]
MODES = ("auto", "reference", "require")
INSTRUCTION_SETS = ("avx512", "avx2", "portable")  # the best first
COMPILERS = ("c++", "g++", "clang++", "cl")
HOW_TO_BUILD = (
    "install a C++17 compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select "
    "--install; Windows: the C++ build tools of Visual Studio), then reinstall this package from source: "
    "pip install --no-deps --force-reinstall --no-binary :all: compress-lm, or pip install -e . in a clone"
)

_mode: Mode = "auto"
_loaded: Any = None  # the extension module; False once it was looked for and isn't there
_problem = ""  # why it isn't
_threads = ""  # whose threads the kernels run on
_active: Any = False  # what ``active`` answers; None until it is worked out


class KernelMissing(RuntimeError):
    """Mode ``require``, and no kernel for this device here."""


def active() -> Any:
    """The extension module, None where PyTorch is to do the work. KernelMissing in mode ``require`` without one."""
    return _active if _active is not False else _find_active()


def _find_active() -> Any:
    global _active
    module = None if _mode == "reference" else _load()
    if module is None and _mode == "require":
        raise KernelMissing(f"kernels are required, but there are none here: {_problem}")
    _active = module
    return module


def get_mode() -> Mode:
    return _mode


def set_mode(mode: Mode) -> None:
    """``auto``, ``reference`` or ``require``, for the whole process."""
    global _mode, _active
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; use {', '.join(MODES)}")
    _mode, _active = mode, False


@contextmanager
def mode(name: Mode) -> Iterator[None]:
    """``set_mode`` for the length of a block."""
    before = _mode
    set_mode(name)
    try:
        yield
    finally:
        set_mode(before)


def select_cpu(name: str) -> None:
    """Use the kernels of one instruction set: ``avx512``, ``avx2``, ``portable``, or ``auto``, the best that is here.

    ValueError for a name that there are no kernels of, KernelMissing for one that this processor or build lacks.
    """
    if name not in ("auto", *INSTRUCTION_SETS):
        raise ValueError(f"instruction set {name!r} is unknown; use auto, {', '.join(INSTRUCTION_SETS)}")
    module = _load()
    if module is None:
        raise KernelMissing(f"{name}: there are no kernels here: {_problem}")
    if not module.select(name):
        raise KernelMissing(f"{name}: {_explain(module)[name]}; here: {', '.join(available())}")


def available() -> list[str]:
    """The instruction sets whose kernels can run here, the best first; empty without the compiled library."""
    module = _load()
    return [] if module is None else [name for name, _, here in module.instruction_sets() if here]


def describe() -> dict[str, Any]:
    """For ``compress info``: where the library is, what it runs on, what is missing and how to get it."""
    module = _load()
    if module is None:
        return {"mode": _mode, "library": None, "problem": _problem, "in_use": None, "sets": {}, "threads": None}
    return {
        "mode": _mode,
        "library": str(module.__file__),
        "problem": None,
        "in_use": module.selected(),
        "sets": _explain(module),
        "threads": _threads,
    }


def render(found: dict[str, Any]) -> list[str]:
    """``describe()`` as lines for people."""
    if found["library"] is None:
        return [f"none: {found['problem']}"]
    sets = "; ".join(name if reason is None else f"no {name}: {reason}" for name, reason in found["sets"].items())
    return [f"{found['in_use']} in use; here: {sets}", f"threads: {found['threads']}"]


def _explain(module: Any) -> dict[str, str | None]:
    """Instruction set -> None if it is here, else the reason why not."""
    found: dict[str, str | None] = {}
    for name, missing, here in module.instruction_sets():
        lacks = f"this processor lacks {missing}" if missing else "the compiler that built this library lacked it"
        found[name] = None if here else lacks
    return found


def _load() -> Any:
    """The extension module or None; looked for once."""
    global _loaded, _problem, _threads
    if _loaded is None:
        try:
            module = importlib.import_module("compress.kernels._cpu")
        except ModuleNotFoundError:
            _loaded, _problem = False, _explain_absence()
        except ImportError as error:
            _loaded, _problem = False, f"the compiled library can't be loaded ({error}); {HOW_TO_BUILD}"
        else:
            _threads = _share_threads(module)
            _loaded = module
    return _loaded or None


def _explain_absence() -> str:
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        return f"compress.kernels._cpu was not built, and there is no C++ compiler on the PATH; {HOW_TO_BUILD}"
    return (
        f"compress.kernels._cpu was not built, though there is a compiler ({found}) now; reinstall to build it, "
        "and add -v to pip to see why it fails: pip install -v -e . in a clone"
    )


def _share_threads(module: Any) -> str:
    """Hand PyTorch's OpenMP runtime to the library; says whose threads it will use.

    The address is looked up as the linker did for PyTorch itself: among the global symbols, then through its library.
    """
    if not torch.backends.openmp.is_available():
        return "its own (PyTorch was built without OpenMP)"
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    folder = Path(torch.__file__).parent / "lib"
    for place in (None, *sorted(folder.glob("libtorch_cpu.*"))):
        try:
            library = ctypes.CDLL(None if place is None else str(place))
            addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
        except (AttributeError, OSError, TypeError):
            continue
        module.use_openmp(*addresses)
        return "PyTorch's OpenMP pool"
    return "its own (PyTorch's OpenMP runtime has no GOMP_parallel)"
