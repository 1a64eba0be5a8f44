"""Runs pytest with another build of the compiled kernels: ``python tests/sanitized.py FOLDER [pytest's words]``.

``make sanitize`` uses it with the build that AddressSanitizer and UndefinedBehaviorSanitizer watch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "compress.kernels._cpu"


def main() -> int:
    built = sorted(Path(sys.argv[1]).glob("_cpu.*"))
    if not built:
        raise SystemExit(f"{sys.argv[1]}: no _cpu library there")
    spec = importlib.util.spec_from_file_location(NAME, built[0].resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    from compress.kernels import library

    print(f"kernels: {library.describe()['library']}")
    return int(pytest.main(sys.argv[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
