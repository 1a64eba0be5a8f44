"""The token embedding and the output head in a plan: which matrices, their bytes, and what rounding them would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.plan_select import PlannedLayer, suggest_group_sizes
from compress.recipe import Head, Recipe
from compress.storage.formats.base import QuantSpec, load_format
from compress.types import LayerSpec

if TYPE_CHECKING:
    from compress.walk.skeleton import Skeleton

OFFERED_SHARE = 0.15  # of the result's bytes: a dense embedding and head of less are not worth a word


@dataclass(frozen=True)
class PlannedHead:
    """Embedding and output head, tied ones once: ``specs`` is what the model has, ``layers`` what is compressed."""

    specs: tuple[LayerSpec, ...]
    layers: tuple[PlannedLayer, ...]

    @property
    def bytes_before(self) -> int:
        return sum(spec.numel * spec.dtype.itemsize for spec in self.specs)

    @property
    def bytes_after(self) -> int:
        """With those that stay as they are."""
        chosen = {layer.spec.name for layer in self.layers}
        kept = sum(spec.numel * spec.dtype.itemsize for spec in self.specs if spec.name not in chosen)
        return kept + sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the matrices that are compressed, with scales and zeros; 0 where none is."""
        numel = sum(layer.spec.numel for layer in self.layers)
        return 8 * sum(layer.nbytes for layer in self.layers) / numel if numel else 0.0

    @property
    def offer(self) -> tuple[Head, int] | None:
        """8 bits for matrices that nothing is done to, and the bytes that it would save."""
        if self.layers or not self.specs:
            return None
        fits = all(spec.shape[1] % Head().group_size == 0 for spec in self.specs)
        head = Head() if fits else Head(group_size=-1)
        after = sum(load_format("native").nbytes(spec, quant_of(head)) for spec in self.specs)
        return head, self.bytes_before - after


def quant_of(head: Head) -> QuantSpec:
    return QuantSpec(head.bits, head.group_size, head.symmetric)


def select_head(recipe: Recipe, skeleton: Skeleton) -> list[PlannedLayer]:
    """The matrices that the recipe's ``head`` asks for; their bytes are for the format to say.

    Raises UserError where the model has them in a form that is not known, for one half of a tied pair, and for a group
    size that does not divide.
    """
    if recipe.head is None:
        return []
    specs = skeleton.head_specs()
    wanted = recipe.head.layers
    tied = next((spec for spec in specs if any(other in spec.tied for other in _head_names(skeleton))), None)
    if tied is not None and wanted != "both":
        others = ", ".join(name.removesuffix(".weight") for name in tied.tied)
        raise UserError(
            f"head.layers: got {wanted!r}, but {tied.name} and {others} are one matrix (tied weights); use layers: both"
        )
    kinds = {"both": ("embedding", "head")}.get(wanted, (wanted,))
    chosen = [spec for spec in specs if spec.kind in kinds]
    missing = [kind for kind in kinds if tied is None and kind not in {spec.kind for spec in chosen}]
    if missing:
        raise UserError(_explain_missing(skeleton, missing[0], specs))
    problems = [_explain_indivisible(spec, recipe.head) for spec in chosen if not divides(recipe.head, spec)]
    if problems:
        raise UserError("\n".join(problems))
    return [PlannedLayer(spec, (), quant_of(recipe.head)) for spec in chosen]


def divides(head: Head, spec: LayerSpec) -> bool:
    return head.group_size == -1 or spec.shape[1] % head.group_size == 0


def _head_names(skeleton: Skeleton) -> list[str]:
    """Names under which the output head's weight may be tied."""
    output = skeleton.model.get_output_embeddings()
    return [f"{path}.weight" for path, module in skeleton.model.named_modules() if module is output]


def _explain_missing(skeleton: Skeleton, kind: str, specs: Sequence[LayerSpec]) -> str:
    what = {"embedding": "token embedding (nn.Embedding)", "head": "output head (nn.Linear)"}[kind]
    instead = f"use head.layers: {specs[0].kind}" if specs else "use head: null"
    return f"head: {type(skeleton.model).__name__} has no plain {what}, so it can't be quantized; {instead}"


def _explain_indivisible(spec: LayerSpec, head: Head) -> str:
    return (
        f"{spec.name}: {spec.shape[1]} input features are not a multiple of group_size {head.group_size}; "
        f"use {suggest_group_sizes(spec.shape[1], head.group_size)}, or -1 for one group per row, as head.group_size"
    )
