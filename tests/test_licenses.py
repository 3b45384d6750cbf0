"""Licences: names as people write them, what a policy lets through, what a card names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.licenses import (
    LicensePolicy,
    card_license,
    is_noncommercial,
    license_name,
    license_names,
)


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
        ("MIT-License.", "mit"),
        ("cc0", "cc0-1.0"),
        ("CC0 1.0 Universal", "cc0-1.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "cc0-1.0"),
        ("https://creativecommons.org/licenses/by-nc/4.0/", "cc-by-nc-4.0"),
        ("http://www.creativecommons.org/licenses/by-sa/3.0/deed.en", "cc-by-sa-3.0"),
        ("CC BY-NC4.0", "cc-by-nc-4.0"),
        ("CC BY-NC 4.0 International", "cc-by-nc-4.0"),
        ("Creative Commons BY 4.0", "cc-by-4.0"),
        ("CC BY-SA-NC 3.0 Unported", "cc-by-nc-sa-3.0"),
        ("CC BY\u2011NC\u00a04.0", "cc-by-nc-4.0"),
        ("(CC BY-NC)", "cc-by-nc"),
        ("llama3.1", "llama3.1"),
        ("Apache v2.0", "apache-2.0"),
        ("unrestricted", "unrestricted"),
        ("MIT AND CC-BY-NC-4.0", "cc-by-nc-4.0 AND mit"),
        ("MIT AND other", "mit AND unknown"),
        ("MIT AND mit license", "mit"),
        ("unknown", None),
        ("Other", None),
        ("N/A", None),
        ("none", None),
        ("NULL", None),
        ("-", None),
        ("unknown AND other", None),
        ("", None),
        ("   ", None),
        (None, None),
    ],
)
def test_names(written: str | None, name: str | None) -> None:
    assert license_name(written) == name
    assert license_name(name) == name


@given(
    st.text("vV10.-_ ,()/?cybndlicensthAND\u2011\u00a0")
    | st.lists(st.sampled_from(["MIT", "unknown", "CC BY-NC 4.0"])).map(" AND ".join)
)
def test_a_name_is_its_own_name(text: str) -> None:
    assert license_names(license_name(text)) == license_names(text)


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
        ("https://creativecommons.org/licenses/by-nc/4.0/", True),
        ("CC BY-NC4.0", True),
        ("(CC BY-NC)", True),
        ("MIT for code, CC BY-NC for text", True),
        ("MIT AND CC-BY-NC-SA-3.0", True),
        ("research use only", True),
        ("for research purposes only", True),
        ("Research only", True),
        ("academic use only", True),
        ("not for commercial use", True),
        ("Academic Free License v3.0", False),
        ("Example Inc.", False),
    ],
)
def test_noncommercial(name: str | None, expected: bool) -> None:
    assert is_noncommercial(license_name(name)) == expected


def test_policy() -> None:
    policy = LicensePolicy(allow=("MIT", "cc0-1.0"))
    assert policy.allows("mit license")
    assert policy.allows("MIT AND CC0")
    assert not policy.allows("unrestricted")
    assert policy.allows_terms("Unrestricted")
    assert not policy.allows_terms("unknown")
    assert not policy.allows_terms("cc-by-nc-4.0")
    assert not policy.allows("MIT AND CC-BY-NC-4.0")
    assert not policy.allows("MIT AND unknown")
    assert not policy.allows("cc-by-nc-4.0")
    assert not policy.allows(None)
    lenient = LicensePolicy(allow=("mit",), unknown="allow")
    for unstated in (None, " ", "unknown", "other", "n/a", "none", "null"):
        assert not policy.allows(unstated)
        assert lenient.allows(unstated)
    assert lenient.allows("MIT AND unknown")
    assert not lenient.allows("CC0 AND unknown")
    for wrong in ((), (" ",), ("unknown",)):
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
        ({"our-noncommercial"}, "our-noncommercial"),
        ({"our-noncommercial", "gpl-3.0"}, "mixed-non-commercial"),
        ({"cc-by-nc-4.0 AND mit"}, {"license": "cc-by-nc-4.0"}),
        ({"cc-by-nc-4.0 AND unknown"}, "mixed-non-commercial"),
        ({"![x](https://e.example/p.png)"}, "x-https-e.example-p.png"),
        ({"mit", "apache-2.0"}, "mixed"),
        ({"mit", None}, "mixed"),
        ({"house-rules"}, "house-rules"),
        ({None}, "unknown"),
    ],
)
def test_card(names: set[str | None], card: dict[str, str] | str) -> None:
    other = {"license": "other", "license_name": card, "license_link": "README.md"}
    assert card_license(names) == (other if isinstance(card, str) else card)
