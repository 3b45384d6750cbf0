"""Settings of the concepts stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings
from stages.dictionary.settings import Part


class ConceptsSettings(RowSettings):
    """The `concepts` section of a recipe: labels for training that predicts concepts too."""

    student: str = Field(default="student", description="Name of the model that is read.")
    part: Part = Field(
        default="both", description="Tokens that get concepts; template and special ones never do."
    )
    per_token: int = Field(default=4, ge=1, description="Concepts of a token, at most.")
    per_row: int = Field(default=32, ge=1, description="Concepts of a row, at most.")
    latents: Literal["active", "all"] = Field(
        default="active",
        description="Which latents can be concepts: those in the token's code, or all by their "
        "activation before sparsification.",
    )
    gradient_of: Literal["loss", "likelihood"] = Field(
        default="loss",
        description="loss: latents whose activation raises the next token's loss, as published; "
        "likelihood: those whose activation raises its log-probability.",
    )
