"""Registers our quantizer with Transformers as soon as that is imported, and not before: importing us stays cheap.

If ``transformers.quantizers.auto`` is there already, ``install`` registers at once. Otherwise it waits at the front of
``sys.meta_path`` for the import of that one module, lets the usual finders load it, registers, and is gone.
``remove`` takes it away again.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "transformers.quantizers.auto"
QUANTIZER = "compress.runtime.quantizer"


class Finder:
    """A finder that finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        remove()
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now, or once Transformers' quantizers are imported."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def remove() -> None:
    """Wait no longer."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]


def _register() -> None:
    started = sys.modules.get(QUANTIZER)
    if started is not None and not hasattr(started, "register"):
        return  # it is what imports Transformers' quantizers just now; load.py, which imports it, registers
    try:
        quantizer = importlib.import_module(QUANTIZER)
    except ImportError as error:  # a Transformers whose interface we don't know: it must go on working without us
        import warnings

        warnings.warn(f"compress can't register with Transformers ({error}); use compress.load", stacklevel=2)
        return
    quantizer.register()
