"""What became of the layers of a loaded model: ``model.compress_report``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Which layers multiply packed weights, which were unpacked to dense ones and why, and what was put together."""

    kernels: str = ""  # which kernels, or why there are none
    on_kernels: list[str] = field(default_factory=list)  # names of layers
    decoded: dict[str, str] = field(default_factory=dict)  # name -> why it is dense
    merged: list[tuple[str, ...]] = field(default_factory=list)  # siblings computed in one call
    fused: list[str] = field(default_factory=list)  # blocks whose decode step is one call
    not_fused: str | None = None  # why there are none
    native_head: bool = False  # whether a dense output head takes the native product at few tokens
    native_attention: bool = False  # whether causal attention over a prompt is native

    def __str__(self) -> str:
        reasons = sorted(set(self.decoded.values()))
        dense = f"{len(self.decoded)} dense ({'; '.join(reasons)})" if reasons else "none dense"
        return (
            f"{len(self.on_kernels)} layers on {self.kernels or 'no kernels'}, {dense}, "
            f"{len(self.merged)} groups merged, {len(self.fused)} blocks fused"
        )
