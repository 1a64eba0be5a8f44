"""What every method's ``Config`` shares: frozen, strict, no unknown fields.

A method is a file of this folder; its ``Config`` is the one home of its defaults. Files are found by listing the
folder, so a new method is a new file and nothing else.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator


class MethodConfig(BaseModel):
    """Base of every method's ``Config``: immutable, unknown fields and lossy conversions are errors.

    Lists (all that YAML has) become tuples before validation, so that fields can be immutable tuples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _freeze_lists(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}

    @field_validator("group_size", check_fields=False)
    @classmethod
    def _check_group_size(cls, value: int) -> int:
        if value < -1 or value == 0:
            raise ValueError("a positive number of inputs, or -1 for a whole row")
        return value


Checked = TypeVar("Checked")


def check_groups(config: Checked, bits: int | None, groups: int) -> Checked:
    """For validators: groups of inputs mean nothing where inputs are not rounded."""
    if groups > 1 and bits is None:
        raise ValueError("activation_groups needs rounded inputs: set activation_bits: 8")
    return config
