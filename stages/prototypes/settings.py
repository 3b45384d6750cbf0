"""What the prototypes are a function of: fields of the features section."""

from __future__ import annotations

from stages.base import Settings
from stages.dictionary.settings import Part
from stages.features.settings import Pooling


class PrototypeSettings(Settings):
    """The part of the `features` section that bears on prototypes.

    Attributes:
        student: name of the model that is read.
        layer: block whose output is read.
        part: tokens that count.
        pooling: how tokens' codes make a row's.
        frequency_rows: rows over which latents are counted; None: they aren't counted.
        refit: false: frequencies are of the rows that were there first, so that rows which come
            later are measured alike.
    """

    student: str
    layer: int
    part: Part
    pooling: Pooling
    frequency_rows: int | None
    refit: bool = False
