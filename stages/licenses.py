"""Licences by the names that the Hugging Face Hub uses, and which of them a recipe accepts.

This compares names. What a licence asks for, and whether two of them go together, is for a person
to decide.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from typing import Literal

from pydantic import Field, field_validator

from stages.base import Settings

UNRESTRICTED = "unrestricted"
"""Terms of a model whose maker claims nothing of what it writes."""

UNKNOWN = "unknown"
"""Stands for a licence that isn't stated."""

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
_NONCOMMERCIAL = re.compile(
    r"(?<![a-z])(by)?nc(?![a-z])|non-?commercial|not?-(for-)?commercial|academic(?!-free)"
    r"|research-(use|purposes?|only)|only-for-research"
)
_UNSTATED = frozenset(
    """
    ? n/a na nan no none not-available not-specified not-stated null other undefined unknown
    unspecified
    """.split()  # noqa: SIM905
)
"""What people write where they state no licence."""
_ALL = " AND "
"""Joins licences that bind together, as in SPDX expressions."""
_CC_URL = re.compile(r"\S*creativecommons\.org/(licenses|publicdomain)/([a-z-]+)(/[\d.]+)?\S*")
_CC = re.compile(
    r"(?:cc|creative-commons)-(by(?:-(?:nc|nd|sa))*|zero)(?:-?v?(\d\.\d))?"
    r"(?:-(?:deed|generic|international|legalcode|universal|unported))*"
)


def joined_licenses(texts: Collection[str]) -> str:
    """One text for rows that are under all of these licences."""
    return _ALL.join(texts)


def license_names(text: str | None) -> frozenset[str | None]:
    """Licences that bind rows together, in the Hub's spelling as far as it can be told.

    `CC BY-NC 4.0`, `MIT License` and `apache_2.0` become `cc-by-nc-4.0`, `mit` and `apache-2.0`;
    one that isn't stated (nothing is written, or `unknown`, `other`, `n/a` and their like) becomes
    None. Licences joined by an SPDX `AND` bind together.
    """
    return frozenset(_name(part) for part in (text or "").split(_ALL))


def license_name(text: str | None) -> str | None:
    """`license_names` as one text; None where no licence is stated."""
    names = license_names(text)
    return _ALL.join(sorted(name or UNKNOWN for name in names)) if names != {None} else None


def is_noncommercial(name: str | None) -> bool:
    """Whether a licence's name says that commercial use isn't allowed."""
    return bool(name and _NONCOMMERCIAL.search(name))


def _name(text: str) -> str | None:
    text = unicodedata.normalize("NFKC", text).lower().strip()
    if match := _CC_URL.fullmatch(text):
        text = f"cc-{match[2]}-{(match[3] or '').strip('/')}"
    words = re.sub(r"\b(the|licen[cs]ed?|version)\b", " ", text.replace("_", " "))
    name = re.sub(r"[\s,()\[\]\u2010-\u2015\u2212-]+", "-", words).strip("-.")
    name = re.sub(r"-v(?=\d)", "-", name)
    if match := _CC.fullmatch(re.sub(r"^cc-?0\b", "cc-zero", name)):
        first, *rest = match[1].split("-")
        if first == "zero":
            return "cc0-1.0"
        return "-".join(["cc", first, *sorted(rest), *([match[2]] if match[2] else [])])
    return None if not name or name in _UNSTATED else name


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
        names = {name for text in allow for name in license_names(text)}
        if None in names:
            raise ValueError(
                "license_policy.allow holds a text that names no licence; rows that state none "
                "pass with `unknown: allow`"
            )
        return tuple(sorted(name for name in names if name))

    def allows(self, text: str | None) -> bool:
        """Whether rows under this licence may be emitted: all that bind them must be allowed."""
        return all(
            self.unknown == "allow" if name is None else name in self.allow
            for name in license_names(text)
        )

    def allows_terms(self, text: str | None) -> bool:
        """Whether text of a model under these terms may be emitted."""
        return license_name(text) == UNRESTRICTED or self.allows(text)


def card_license(names: Collection[str | None]) -> dict[str, str]:
    """Front matter of a data set whose rows are under these licences (names as `license_name`).

    One licence that the Hub knows is named. Where one of them is non-commercial the whole is: it is
    named where the others allow to be passed on under it, else the whole is `other` by a name that
    says so. Several licences, or none stated, are `other`.
    """
    names = {name for text in names for name in license_names(text)}
    stated = {name for name in names if name}
    strict = {name for name in stated if is_noncommercial(name)}
    unknown = None in names
    for whole in (stated, strict):
        if len(whole) == 1 and not unknown and stated - whole <= _PERMISSIVE:
            (name,) = whole
            if name in KNOWN_LICENSES:
                return {"license": name}
    if len(stated) == 1 and not unknown:
        (name,) = stated
        name = re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") or "unnamed"
    elif strict:
        name = "mixed-non-commercial"
    else:
        name = "mixed" if stated else "unknown"
    return {"license": "other", "license_name": name, "license_link": "README.md"}
