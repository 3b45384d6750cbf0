"""Fields that a published autoencoder's files name, checked for type and value in one place."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.explained import explained

FieldsT = TypeVar("FieldsT", bound="Fields")


class Fields(BaseModel):
    """The fields of a file that bear on the codes; others are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def checked_fields(file: str, kind: type[FieldsT], values: object) -> FieldsT:
    """The fields in a file's values.

    Raises:
        ValueError: One is missing, of another type, or has a value that can't be followed exactly.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(explained(error, file, kind)) from error
