"""What a reader of a format is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.dictionary.sae import SparseAutoencoder


class Wanted(NamedTuple):
    """What the recipe says of the autoencoder: the block, and the scale where no file holds it."""

    layer: int
    activation_scale: float | None = None


@dataclass(frozen=True)
class Published:
    """A published autoencoder in our form.

    Attributes:
        sae: in float32; its codes are those of the format's own library.
        config: what its files say of it, as they say it.
        block: the block whose output it reads, or None where neither files nor folder tell.
        told_by: where that stands.
    """

    sae: SparseAutoencoder
    config: dict[str, Any] = field(default_factory=dict)
    block: int | None = None
    told_by: str = ""
