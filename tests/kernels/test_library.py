"""Finding, choosing and doing without the compiled kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from compress.kernels import library

NATIVE = library.active()
needs_library = pytest.mark.skipif(NATIVE is None, reason="the compiled kernels are not here: see `compress info`")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the library was not built."""
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "_active", False)
    monkeypatch.setattr(library, "_problem", library._explain_absence())


def test_modes_are_known_words_and_end_with_their_block() -> None:
    before = library.get_mode()
    with library.mode("reference"):
        assert library.get_mode() == "reference"
        assert library.active() is None
    assert library.get_mode() == before
    assert library.active() is NATIVE
    with pytest.raises(ValueError, match="'fast' is unknown; use auto, reference, require"):
        library.set_mode("fast")  # type: ignore[arg-type]


def test_without_the_library(no_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.active() is None
    assert library.available() == []
    with library.mode("require"), pytest.raises(library.KernelMissing, match="not built"):
        library.active()
    with pytest.raises(library.KernelMissing, match="avx2: there are no kernels here"):
        library.select_cpu("avx2")
    found = library.describe()
    assert found["library"] is None
    assert "not built" in library.render(found)[0]
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert "apt install g++" in library._explain_absence()
    monkeypatch.setattr(library.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "there is a compiler" in library._explain_absence()


def test_where_there_is_a_compiler_the_library_was_built() -> None:
    """A build that fails installs the package without kernels: that must not pass as a success here."""
    if not any(shutil.which(name) for name in library.COMPILERS):
        pytest.skip("no C++ compiler on the PATH")
    assert NATIVE is not None, library.describe()["problem"]


def test_unknown_instruction_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="'sse9' is unknown; use auto, avx512, avx2, portable"):
        library.select_cpu("sse9")


@needs_library
def test_instruction_sets_can_be_chosen() -> None:
    here = library.available()
    assert here[-1] == "portable"
    assert list(list_sets()) == list(library.INSTRUCTION_SETS)
    try:
        for name in library.INSTRUCTION_SETS:
            if name in here:
                library.select_cpu(name)
                assert library.describe()["in_use"] == name
            else:
                with pytest.raises(library.KernelMissing, match=f"{name}: .* lack"):
                    library.select_cpu(name)
    finally:
        library.select_cpu("auto")
    assert library.describe()["in_use"] == here[0]


def list_sets() -> dict[str, Any]:
    sets: dict[str, Any] = library.describe()["sets"]
    return sets


@needs_library
def test_the_description_says_what_is_here_and_why_not() -> None:
    found = library.describe()
    assert found["problem"] is None
    assert found["library"].endswith((".so", ".pyd"))
    lacking = {**found, "sets": {"avx512": "this processor lacks avx512f", "portable": None}}
    assert "no avx512: this processor lacks avx512f; portable" in library.render(lacking)[0]


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


THREADS = """
import threading
from compress.kernels import library
native = library.active()
if {own}:
    native.use_openmp(0, 0, 0)
assert native.count_threads(1) == 1
assert native.count_threads(0) == 1
seen = []
def call():
    for wanted in (1, 2, 3, 2, 4) * 40:
        seen.append((wanted, native.count_threads(wanted)))
callers = [threading.Thread(target=call) for _ in range(4)]
[one.start() for one in callers]
[one.join() for one in callers]
assert len(seen) == 800
assert all(1 <= got <= wanted for wanted, got in seen)
assert native.count_threads(3) == 3
print("fine")
"""


@needs_library
@pytest.mark.parametrize("own", [False, True], ids=["openmp", "own"])
def test_threads_are_given_as_asked_and_calls_may_meet(own: bool) -> None:
    assert run_python(THREADS.format(own=own), OMP_NUM_THREADS="2") == "fine"


FORK = """
import os
from compress.kernels import library
native = library.active()
native.use_openmp(0, 0, 0)
assert native.count_threads(2) == 2
child = os.fork()
if child == 0:
    os._exit(0 if native.count_threads(2) == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_own_threads_start_anew_in_a_forked_child() -> None:
    assert run_python(FORK) == "fine"


@needs_library
def test_pytorchs_pool_is_shared() -> None:
    """No second OpenMP runtime comes with the library, and PyTorch's own is used where it has GOMP_parallel."""
    threads = library.describe()["threads"]
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        assert threads == "PyTorch's OpenMP pool"
        code = (
            "import torch, re; from pathlib import Path\n"
            "loaded = lambda: sorted(set(re.findall(r'/\\S*lib[gi]?omp\\S*', Path('/proc/self/maps').read_text())))\n"
            "before = loaded()\n"
            "from compress.kernels import library; library.active()\n"
            "assert loaded() == before, (before, loaded()); print('fine')"
        )
        assert run_python(code) == "fine"
    else:
        assert threads.startswith("its own")


def test_import_loads_nothing() -> None:
    code = "import sys, compress.kernels.library; print('compress.kernels._cpu' in sys.modules)"
    assert run_python(code) == "False"


def test_active_may_be_asked_from_many_threads() -> None:
    library.set_mode("auto")
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(library.active())) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(answers) == 8 and all(one is NATIVE for one in answers)
