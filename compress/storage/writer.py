"""An output folder that is either finished or not there: units are written beside it and swapped in at the very end.

``<output>.partial/`` holds the shards of finished units, and in ``work/`` the run's digest, a sidecar per unit and the
spill files of the stream. It has no index and no config.json, so nothing loads it. ``stage`` makes ``work/staged/``,
the folder as it will be (its shards are links), for the judge to load; ``finish`` moves it in place. Killed at any
point, a previous result stays as it was, and the next run goes on with the units that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.storage.files import free_bytes, read_header, read_json, sync_folder, write_json, write_safetensors

MARK = "compress.json"  # in a finished folder: what we may replace
# Files of the source folder that belong to the model but are neither weights nor configuration.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*",
    "additional_chat_templates", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


class Writer:
    """Writes the units of one run. Use as a context manager: leaving it gives the lock back and keeps the units."""

    def __init__(
        self,
        output: str | Path,
        units: Sequence[str],
        digest: str,
        *,
        prefix: str = "model",
        about: Mapping[str, Any] | None = None,
        fresh: bool = False,
        needed_bytes: int = 0,
    ) -> None:
        """Open or reopen ``<output>.partial``.

        ``units``: names of all units in order, each a shard ``<prefix>-0000i-of-0000n.safetensors``. ``digest`` names
        recipe and model: units of a run with another digest are never mixed in. ``about``: what the digest was made
        of, for the message that says what differs. ``needed_bytes``: refused at once if the disk has less.
        Raises UserError where the output is not ours to replace, another run is at it, or another one is unfinished.
        """
        self.output = Path(output).absolute()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.work = self.partial / "work"
        self.units = tuple(units)
        self.digest = digest
        self.prefix = prefix
        assert len(set(self.units)) == len(self.units), "two units have the same name"
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial)
        try:
            self._restore_previous()
            refuse_to_replace(self.output)
            self._open(dict(about or {}), fresh, needed_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; finished units stay for the next run. A folder that nothing was put in goes."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self.partial.rmdir()
            os.close(self._lock)
            self._lock = None

    def shard(self, unit: str) -> str:
        """The file name of a unit's shard."""
        return f"{self.prefix}-{self.units.index(unit) + 1:05d}-of-{len(self.units):05d}.safetensors"

    def has(self, unit: str) -> bool:
        """Whether ``unit`` was finished, by this run or the one it goes on with."""
        return (self.partial / self.shard(unit)).is_file() and self._sidecar_path(unit).is_file()

    def write(self, unit: str, tensors: Mapping[str, Tensor], sidecar: Mapping[str, Any]) -> int:
        """Write a unit: its sidecar first, then its shard, each whole or absent. Returns the shard's bytes."""
        self.note(unit, sidecar)
        return write_safetensors(self.partial / self.shard(unit), tensors)

    def note(self, unit: str, sidecar: Mapping[str, Any]) -> None:
        """Replace what is noted of ``unit``."""
        write_json(self._sidecar_path(unit), dict(sidecar))

    def sidecar(self, unit: str) -> dict[str, Any]:
        """What was noted when ``unit`` was written."""
        return read_json(self._sidecar_path(unit))

    def stage(
        self,
        config: Mapping[str, Any],
        companions: Iterable[Path] = (),
        json_files: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Path:
        """The whole folder as it will be, in ``work/staged``, with links for shards: to be loaded and judged.

        ``config``: content of config.json. ``companions``: files or folders to copy (see ``list_companions``).
        ``json_files``: further files by name.
        """
        missing = [unit for unit in self.units if not self.has(unit)]
        assert not missing, f"units not written yet: {missing}"
        staged = self.work / "staged"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        weight_map: dict[str, str] = {}
        total = 0
        for unit in self.units:
            shard = self.shard(unit)
            for name, header in read_header(self.partial / shard).items():
                assert name not in weight_map, f"tensor {name} is in two units"
                weight_map[name] = shard
                total += header.nbytes
            _link(self.partial / shard, staged / shard)
        for path in companions:
            _copy(path, staged / path.name)
        for name, content in (json_files or {}).items():
            write_json(staged / name, content)
        write_json(staged / MARK, {"digest": self.digest, "files": self.prefix})
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(staged / f"{self.prefix}.safetensors.index.json", index)
        write_json(staged / "config.json", config)
        return staged

    def finish(self, json_files: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Make the staged folder the output; a previous result is replaced now and not before. Returns its path.

        ``json_files``: what is known only after the judge has seen the staged folder, such as the report.
        """
        staged = self.work / "staged"
        assert (staged / "config.json").is_file(), "finish() comes after stage()"
        for name, content in (json_files or {}).items():
            write_json(staged / name, content)
        last = (f"{self.prefix}.safetensors.index.json", "config.json")
        rest = sorted(path.name for path in staged.iterdir() if not path.is_symlink() and path.name not in last)
        for name in [*rest, *last]:
            target = self.partial / name
            if (staged / name).stat().st_nlink > 1 and target.exists():  # a hard-linked shard
                continue
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(staged / name, target)
        sync_folder(self.partial)
        self._swap()
        shutil.rmtree(self.output / "work", ignore_errors=True)
        self.close()
        return self.output

    def spill_folder(self, name: str = "stream") -> Path:
        """A folder for files that are needed only while the run goes on; on the output's disk, gone with ``work/``."""
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        return folder

    def _sidecar_path(self, unit: str) -> Path:
        return self.work / f"{self.units.index(unit):05d}.json"

    def _open(self, about: dict[str, Any], fresh: bool, needed_bytes: int) -> None:
        run = self.work / "run.json"
        about = json.loads(json.dumps(about))
        identity = {"digest": self.digest, "prefix": self.prefix, "units": list(self.units), "about": about}
        if fresh:
            _empty(self.partial)
        elif run.is_file():
            self._compare(read_json(run), identity)
        elif any(path.name != "work" for path in self.partial.iterdir()):
            raise UserError(
                f"{self.partial}: not empty and no unfinished run of compress; move it away or choose another output"
            )
        for name in (f"{self.prefix}.safetensors.index.json", "config.json"):  # killed while finishing
            (self.partial / name).unlink(missing_ok=True)
        self.work.mkdir(exist_ok=True)
        (self.work / "pid").write_text(f"{os.getpid()}\n")
        done = sum((self.partial / self.shard(unit)).stat().st_size for unit in self.units if self.has(unit))
        free = free_bytes(self.partial)
        if needed_bytes - done > free:
            raise UserError(
                f"{self.output}: the disk has too little space: {needed_bytes - done} bytes needed, {free} free; "
                "free some, or choose an output on another disk"
            )
        if not run.is_file():
            write_json(run, identity)

    def _compare(self, found: dict[str, Any], identity: dict[str, Any]) -> None:
        if all(found.get(key) == identity[key] for key in ("digest", "prefix", "units")):
            return
        raise UserError(
            f"{self.partial}: an unfinished run of another recipe or model is there ({_describe(found, identity)}); "
            "finish it with its own recipe, or start over with --fresh, which deletes what it has done"
        )

    def _swap(self) -> None:
        previous = self._previous
        if self.output.exists():
            os.replace(self.output, previous)
        os.replace(self.partial, self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(previous, ignore_errors=True)

    @property
    def _previous(self) -> Path:
        return self.output.with_name(self.output.name + ".previous")

    def _restore_previous(self) -> None:
        """A run killed between the two renames of the swap left the old result under another name."""
        if not (self._previous / MARK).is_file():
            return
        if self.output.exists():
            shutil.rmtree(self._previous, ignore_errors=True)
        else:
            os.replace(self._previous, self.output)


def refuse_to_replace(output: Path) -> None:
    """UserError unless ``output`` is absent, empty, or a folder that an earlier run of ours wrote."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise UserError(f"{output}: exists and is not a folder; choose another output")
    if any(output.iterdir()) and not (output / MARK).is_file():
        raise UserError(
            f"{output}: not empty and not written by compress, so it is not replaced; choose another output"
        )


def list_companions(folder: Path, trust_remote_code: bool = False) -> list[Path]:
    """Files beside the weights that make the model usable: tokenizer, generation settings, chat template, licence.

    A model's own ``*.py`` only with ``trust_remote_code``.
    """
    patterns = (*COMPANIONS, "*.py") if trust_remote_code else COMPANIONS
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _lock(folder: Path) -> int | None:
    """Lock ``folder`` itself against a second run; the lock goes with the process, however it ends."""
    if sys.platform == "win32":  # no such lock there; the pid file still names the other run
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        pid = folder / "work" / "pid"
        who = pid.read_text().strip() if pid.is_file() else "unknown"
        raise UserError(
            f"{folder}: another run is writing there (process {who}); wait for it, or stop it first"
        ) from None
    if not folder.exists() or os.fstat(descriptor).st_ino != folder.stat().st_ino:
        os.close(descriptor)
        raise UserError(f"{folder}: another run has just finished there; run the command again")
    return descriptor


def _describe(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The settings that differ, in words."""
    old, new = (value.get("about") or {} for value in (found, wanted))
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    parts = [f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here" for key in keys[:5]]
    return "; ".join(parts) or f"digest {str(found.get('digest'))[:12]} there, {wanted['digest'][:12]} here"


def _empty(folder: Path) -> None:
    """Delete everything inside ``folder``, its run's record first; the folder itself holds the lock."""
    (folder / "work" / "run.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    """A symbolic link where the system allows it, else a hard link."""
    try:
        target.symlink_to(source)
    except OSError:
        os.link(source, target)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)  # follows links, such as those of the hub's cache
