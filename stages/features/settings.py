"""Settings of the features stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings
from stages.dictionary.settings import Part


class FeaturesSettings(RowSettings):
    """The `features` section of a recipe: similarity of each row to the targets."""

    student: str = Field(default="student", description="Name of the model that is read.")
    layer: int | None = Field(
        default=None, ge=0, description="Block whose output is read; unset: the dictionary's."
    )
    part: Part = Field(
        default="both", description="Tokens that count; template and special tokens never do."
    )
    aggregate: Literal["max", "mean"] = Field(
        default="max", description="How the similarities to several tasks make one score."
    )
