"""compress: a Hugging Face language model and a recipe in, a smaller model with a measured report out.

The public names are loaded on first use, so that ``import compress`` costs nothing and does nothing else.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.runtime.hook import install

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "compress.recipe",
    "Step": "compress.recipe",
    "UserError": "compress.errors",
    "evaluate": "compress.eval.measure",
    "load": "compress.runtime.load",
    "plan": "compress.plan",
    "run": "compress.run",
}
__all__ = ["Recipe", "Step", "UserError", "evaluate", "load", "plan", "run"]

if TYPE_CHECKING:
    from compress.errors import UserError
    from compress.eval.measure import evaluate
    from compress.plan import plan
    from compress.recipe import Recipe, Step
    from compress.run import run
    from compress.runtime.load import load


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'compress' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``compress.run`` is the function, also after the file ``compress/run.py`` of the same name was imported.

    Python sets an imported submodule as an attribute of its package; for the public names that would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
install()  # Transformers then knows our quantizer, once it is imported
