"""Licences: names as people write them, what a policy lets through, what a card names."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stages.licenses import LicensePolicy, card_license, is_noncommercial, license_name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("MIT", "mit"),
        ("MIT License", "mit"),
        ("The MIT licence", "mit"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("apache_2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("  ODC-By ", "odc-by"),
        ("house rules", "house-rules"),
        ("", None),
        ("   ", None),
        (None, None),
    ],
)
def test_names(written: str | None, name: str | None) -> None:
    assert license_name(written) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("cc-by-nc-sa-3.0", True),
        ("house-non-commercial", True),
        ("noncommercial", True),
        ("ncsa", False),  # a permissive licence whose name begins alike
        ("cc-by-sa-4.0", False),
        ("mit", False),
        (None, False),
    ],
)
def test_noncommercial(name: str | None, expected: bool) -> None:
    assert is_noncommercial(name) == expected


def test_policy() -> None:
    policy = LicensePolicy(allow=("MIT", "cc0-1.0"))
    assert policy.allows("mit license")
    assert policy.allows("unrestricted")
    assert not policy.allows("cc-by-nc-4.0")
    assert not policy.allows(None)
    assert not policy.allows(" ")
    assert LicensePolicy(allow=("mit",), unknown="allow").allows(None)
    for wrong in ((), (" ",)):
        with pytest.raises(ValidationError):
            LicensePolicy(allow=wrong)


@pytest.mark.parametrize(
    ("names", "card"),
    [
        ({"mit"}, {"license": "mit"}),
        ({"cc-by-nc-4.0", "mit", "cc0-1.0"}, {"license": "cc-by-nc-4.0"}),
        ({"cc-by-nc-4.0", "cc-by-sa-3.0"}, "mixed-non-commercial"),  # they don't go together
        ({"cc-by-nc-4.0", "cc-by-nc-sa-4.0"}, "mixed-non-commercial"),
        ({"cc-by-nc-4.0", None}, "mixed-non-commercial"),
        ({"our-noncommercial"}, "mixed-non-commercial"),
        ({"mit", "apache-2.0"}, "mixed"),
        ({"mit", None}, "mixed"),
        ({"house-rules"}, "house-rules"),
        ({None}, "unknown"),
    ],
)
def test_card(names: set[str | None], card: dict[str, str] | str) -> None:
    other = {"license": "other", "license_name": card, "license_link": "README.md"}
    assert card_license(names) == (other if isinstance(card, str) else card)
