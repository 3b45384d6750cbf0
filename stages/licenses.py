"""Licences by the names that the Hugging Face Hub uses, and which of them a recipe accepts.

This compares names. What a licence asks for, and whether two of them go together, is for a person
to decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from pydantic import Field, field_validator

from stages.base import Settings

UNRESTRICTED = "unrestricted"
"""Terms of a model whose maker claims nothing of what it writes."""

WRITERS = (("reflection", "teacher"), ("prefixes", "model"))
"""Models whose text can be emitted: section of a recipe, and the field that names the model."""

KNOWN_LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 epl-2.0 gfdl
    gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 mit mpl-2.0
    odbl odc-by openrail openrail++ pddl postgresql unlicense wtfpl zlib
    """.split()  # noqa: SIM905 - forty names read better as text
)
_PERMISSIVE = frozenset(
    """
    apache-2.0 bsd-2-clause bsd-3-clause cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc0-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 isc mit odc-by pddl unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)
"""Licences whose rows may be passed on under a stricter one, with attribution at most."""
_NONCOMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial|research-only|academic")


def license_name(text: str | None) -> str | None:
    """A licence's name in the Hub's spelling as far as it can be told; None where none is stated.

    `CC BY-NC 4.0`, `MIT License` and `apache_2.0` become `cc-by-nc-4.0`, `mit` and `apache-2.0`.
    """
    words = re.sub(r"\b(the|licen[cs]e|version)\b", " ", (text or "").lower().replace("_", " "))
    return re.sub(r"[\s,]+", "-", words.strip()) or None


def is_noncommercial(name: str | None) -> bool:
    """Whether a licence's name says that commercial use isn't allowed."""
    return bool(name and _NONCOMMERCIAL.search(name))


class LicensePolicy(Settings):
    """The `license_policy` section of a recipe."""

    allow: tuple[str, ...] = Field(
        min_length=1, description="Licences whose rows may be emitted, by their Hub names."
    )
    unknown: Literal["block", "allow"] = Field(
        default="block", description="What becomes of rows and models that state nothing."
    )

    @field_validator("allow")
    @classmethod
    def _named(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        names = [license_name(name) for name in allow]
        if None in names:
            raise ValueError("license_policy.allow holds an empty name")
        return tuple(sorted({name for name in names if name}))

    def allows(self, text: str | None) -> bool:
        """Whether rows under this licence, or text of a model under these terms, may be emitted."""
        name = license_name(text)
        if name is None:
            return self.unknown == "allow"
        return name == UNRESTRICTED or name in self.allow


def card_license(names: Collection[str | None]) -> dict[str, str]:
    """Front matter of a data set whose rows are under these licences (names as `license_name`).

    One licence that the Hub knows is named. Where one of them is non-commercial the whole is: it is
    named where the others allow to be passed on under it, else the whole is `other` by a name that
    says so. Several licences, or none stated, are `other`.
    """
    stated = {name for name in names if name}
    strict = {name for name in stated if is_noncommercial(name)}
    unknown = None in names
    for whole in (stated, strict):
        if len(whole) == 1 and not unknown and stated - whole <= _PERMISSIVE:
            (name,) = whole
            if name in KNOWN_LICENSES:
                return {"license": name}
    if strict:
        name = "mixed-non-commercial"
    elif len(stated) == 1 and not unknown:
        (name,) = stated
    else:
        name = "mixed" if stated else "unknown"
    return {"license": "other", "license_name": name, "license_link": "README.md"}
