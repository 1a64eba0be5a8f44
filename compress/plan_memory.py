"""How much memory a run will hold at its peak: one named term per thing that lives then, from shapes alone.

The terms of one phase live at the same time, phases follow each other; the peak is the base and the largest phase.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from compress.types import LayerSpec

FLOAT = 4  # bytes of a float32
HALF = 2  # bytes of a weight in the model's dtype, where that is bfloat16 or float16
CHUNK = 2**22  # weights that are compressed at a time (apply.py)
COPIES_FREE = 5.0  # float32 copies of a layer's weight that a method without data holds: old, new, search, error
COPIES_CALIBRATED = 7.0  # with the OBS loop: stacked weights, targets, codes, and the new weights being judged
GRAM_COPIES = 5.0  # (I, I) float32 at the factorization: damped, reversed, factor, identity, inverse
SLACK = 0.05  # of the sum: what an allocator holds on to
LIBRARIES = 120_000_000  # code and thread buffers of BLAS and oneDNN that only the first large product loads


@dataclass(frozen=True)
class Memory:
    """Bytes by phase and term. ``peak`` is what the process will have resident at most."""

    base: int
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def peak(self) -> int:
        terms = self.phases.get(self.peak_phase, {})
        return self.base + LIBRARIES + int((1 + SLACK) * sum(terms.values()))

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """The largest terms of the largest phase."""
        terms = self.phases.get(self.peak_phase, {})
        return sorted(terms.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class BlockShape:
    """What decides the memory of one block; ``groups`` are ``(I, rows)`` of layers that may be stacked."""

    weight_bytes: int  # all parameters of the block in the model's dtype
    encoded_bytes: int  # what its unit will hold once written
    groups: tuple[tuple[int, int], ...]
    live_bytes: int = 0  # one waiting window (walk.memory.estimate_live_bytes)
    running_bytes: int = 0  # on top, the window that is running


@dataclass(frozen=True)
class Workload:
    """A run as the memory model sees it."""

    blocks: Sequence[BlockShape]
    embedding_bytes: int  # what has to be there to embed the calibration text
    largest_outside_bytes: int  # the largest tensor outside the blocks
    window_bytes: int  # one hidden state (T, D) in the model's dtype
    windows: int  # calibration windows; for a run without data the one held-out window
    dense_windows: int  # how many of them the dense stream has
    gram: bool
    matrices: int  # per statistic, at most (I, I) float32 each: Gram, cross, residual
    cross: bool  # targets from the dense stream: a second block, a second stream, a second matrix
    grams_at_once: bool  # all of a block's Gram matrices live together (not true-sequential)
    suspend: bool  # all windows wait in the block at once
    windows_in_memory: bool  # hidden states are kept in memory, not on disk
    head_bytes: int = 0  # the larger one of embedding and head that are compressed, as it was


def measure_base() -> int:
    """Resident bytes of this process now: Python, PyTorch, the skeleton."""
    return int(psutil.Process().memory_info().rss)


def measure_free() -> int:
    """Bytes that could still be had: what the machine has available, or what the control group leaves, if less."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if os.name == "posix" and limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text.isdecimal():
            free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def group_layers(specs: Sequence[LayerSpec]) -> tuple[tuple[int, int], ...]:
    """``(I, rows)`` of layers that may share an input: the same parent and the same width; each expert by itself.

    An upper bound: which layers really share is known only once a block has run.
    """
    groups: dict[tuple[object, ...], int] = {}
    for spec in specs:
        key = (spec.name if spec.kind == "expert" else spec.name.rpartition(".")[0], spec.shape[1])
        groups[key] = groups.get(key, 0) + spec.shape[0]
    return tuple((int(str(key[1])), rows) for key, rows in groups.items())


def peak_bytes(work: Workload, base: int | None = None) -> Memory:
    """The terms of every phase of a run."""
    phases: dict[str, Mapping[str, int]] = {}
    windows = hidden_bytes(work) + work.window_bytes
    phases["embedding"] = {"embedding": work.embedding_bytes, "hidden states": windows}
    for block in work.blocks:
        terms = block_terms(work, block)
        known = phases.get("blocks")
        if known is None or sum(terms.values()) > sum(known.values()):
            phases["blocks"] = terms
    if work.head_bytes:
        copies = int(COPIES_FREE * CHUNK * FLOAT)
        phases["head"] = {"embedding or head and its written form": 2 * work.head_bytes, "working copies": copies}
    phases["outside"] = {"largest tensor outside the blocks": 2 * work.largest_outside_bytes}
    return Memory(measure_base() if base is None else base, phases)


def block_terms(work: Workload, block: BlockShape) -> dict[str, int]:
    """Everything that lives while the widest group of a block is being compressed."""
    working, gram = max(
        ((copies_bytes(work, i, rows), gram_bytes(work, i)) for i, rows in block.groups), key=sum, default=(0, 0)
    )
    if work.gram and work.grams_at_once:
        gram += sum(work.matrices * i * i * FLOAT for i, _ in block.groups)
    return {
        "block weights": block.weight_bytes,
        "dense copy of the block": block.weight_bytes if work.cross else 0,
        "working copies of the widest layers": working,
        "Gram matrices and their factor": gram,
        "written form of the block": block.encoded_bytes,
        "hidden states": hidden_bytes(work),
        "waiting windows": waiting_bytes(work, block),
        "running window": (2 if work.cross else 1) * block.running_bytes,
    }


def copies_bytes(work: Workload, columns: int, rows: int) -> int:
    """Float32 copies of the rows that a method works on; of all rows the new weights and codes, and a stacked copy."""
    at_once = min(rows * columns, max(CHUNK, columns))
    copies = int((COPIES_CALIBRATED if work.gram else COPIES_FREE) * at_once * FLOAT)
    return copies + rows * columns * (2 * HALF + 1)


def gram_bytes(work: Workload, columns: int) -> int:
    """The statistic of one input and what its factorization needs, ``(I, I)`` float32 each."""
    return int((work.matrices + GRAM_COPIES) * columns * columns * FLOAT) if work.gram else 0


def hidden_bytes(work: Workload) -> int:
    """Hidden states between blocks: the streams in memory, or one window of each where they are on disk."""
    if work.windows_in_memory:
        return 2 * work.window_bytes * (work.windows + work.dense_windows)
    return 2 * work.window_bytes * (2 if work.cross else 1)


def waiting_bytes(work: Workload, block: BlockShape) -> int:
    """What windows hold while they wait in the middle of the block: all of them, or one at a time."""
    if work.suspend:
        return block.live_bytes * (work.windows + work.dense_windows)
    return block.live_bytes * (2 if work.cross else 1)


def spill_bytes(work: Workload) -> int:
    """Hidden states on disk: the streams in front of a block and behind it."""
    return 0 if work.windows_in_memory else 2 * work.window_bytes * (work.windows + work.dense_windows)
