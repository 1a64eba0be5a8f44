"""Rooms import only downward, and no two of them each other: read from the source, nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "compress"
# What each room may import of ours besides itself and the shared ground. Whoever is not listed here is the
# orchestration at the top of the package, which may import everything.
GROUND = {"types", "errors"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "memory": set(),
    "numerics": GROUND,
    "methods": GROUND | {"numerics"},
    "walk": GROUND | {"numerics", "storage"},
    "storage": GROUND | {"numerics"},
    "runtime": GROUND | {"numerics", "storage", "walk", "kernels", "memory"},
    "kernels": GROUND | {"numerics"},
    "report": GROUND | {"storage"},
    "eval": GROUND | {"storage", "runtime", "report"},
}
# Of storage the walk may know how to read a checkpoint, and the report how to write a JSON file: no more.
NARROW = {("walk", "storage"): {"checkpoint", "files"}, ("report", "storage"): {"files"}}


def list_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def find_imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Modules of ours that a file imports, anywhere in it, without the leading ``compress.``.

    ``from compress.a import b`` counts as ``a.b`` where that is a file or folder, else as ``a``. Imports for type
    checkers only (``if TYPE_CHECKING``) tie rooms together in a reader's head too, so they count.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out, so that it can be searched for"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *parts = name.split(".")
            if first == "compress":
                while parts and not (
                    package.joinpath(*parts).is_dir() or package.joinpath(*parts).with_suffix(".py").is_file()
                ):
                    parts.pop()
                found.add(".".join(parts) or "__init__")
    return found


def find_room(path: Path, package: Path = PACKAGE) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def find_offences(path: Path, package: Path = PACKAGE) -> list[str]:
    room = find_room(path, package)
    if room not in ALLOWED:
        return []
    offences = []
    for module in sorted(find_imports(path, package)):
        target, _, rest = module.partition(".")
        narrow = NARROW.get((room, target))
        allowed = target == room or target in ALLOWED[room]
        if not allowed or (narrow is not None and target != room and rest.split(".")[0] not in narrow):
            offences.append(f"{path.relative_to(package)} imports compress.{module}")
    return offences


@pytest.mark.parametrize("path", list_sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_downward(path: Path) -> None:
    assert not find_offences(path)


def test_every_folder_is_a_room_that_is_listed() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    rooms = {folder.relative_to(PACKAGE).parts[0] for folder in folders}
    assert rooms - {"recipes"} <= set(ALLOWED), "a new room: say in ALLOWED what it may import"


def test_rooms_form_no_circle() -> None:
    """Over all that is imported, orchestration files being one room: each room comes after those that it imports."""
    arrows: dict[str, set[str]] = {}
    for path in list_sources():
        room = find_room(path) if find_room(path) in ALLOWED else "orchestration"
        targets = {module.split(".")[0] for module in find_imports(path)}
        targets = {target if target in ALLOWED else "orchestration" for target in targets}
        arrows.setdefault(room, set()).update(targets - {room})
    while arrows:
        free = {room for room, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"a circle among {', '.join(sorted(arrows))}"
        arrows = {room: targets for room, targets in arrows.items() if room not in free}


def test_numerics_see_tensors_and_numbers() -> None:
    """No module, model, file or process: of the libraries only those that compute."""
    allowed = {"torch", "numpy", "scipy", "math", "typing", "collections", "dataclasses", "functools", "itertools"}
    for path in sorted((PACKAGE / "numerics").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed | {"compress", "__future__", "enum"}, f"{path.name} imports {name}"
                assert not name.startswith("torch.nn.Module"), f"{path.name} imports {name}"
                assert name != "torch.nn", f"{path.name} imports {name}"


def test_the_test_can_fail(tmp_path: Path) -> None:
    (tmp_path / "numerics").mkdir()
    (tmp_path / "walk").mkdir()
    (tmp_path / "storage").mkdir()
    for name in ("walk/hooks.py", "storage/writer.py", "types.py"):
        (tmp_path / name).touch()
    bad = tmp_path / "numerics" / "bad.py"
    bad.write_text("def f():\n    from compress.walk import hooks\n    from compress.types import Grid\n")
    assert find_offences(bad, tmp_path) == ["numerics/bad.py imports compress.walk.hooks"]
    narrow = tmp_path / "walk" / "bad.py"
    narrow.write_text("import compress.storage.writer\n")
    assert find_offences(narrow, tmp_path) == ["walk/bad.py imports compress.storage.writer"]
