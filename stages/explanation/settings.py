"""Settings of the explanation stage."""

from __future__ import annotations

from pydantic import Field

from stages.base import Settings


class ExplanationSettings(Settings):
    """The `explanation` section of a recipe: selected rows that the report explains."""

    rows: int = Field(
        default=6, ge=1, description="Selected rows to explain: those of lowest hash(id, seed)."
    )
    latents: int = Field(
        default=5,
        ge=1,
        description="Latents named for a row, strongest first; and of all these, how many are "
        "shown with their own top rows.",
    )
    read: int = Field(
        default=64,
        ge=1,
        description="Selected rows, of lowest hash, in which a latent's top rows are looked for.",
    )
    top_rows: int = Field(default=3, ge=1, description="Rows shown for a latent, strongest first.")
    places: int = Field(default=2, ge=1, description="Tokens shown for a latent, strongest first.")
    window: int = Field(default=12, ge=0, description="Tokens shown before and after each of them.")
