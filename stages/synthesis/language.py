"""The language of a problem's prose."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from stages.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

_FORMULA = re.compile(
    r"```.*?```|\$\$.+?\$\$|\$[^$\n]+?\$|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\[a-zA-Z]+",
    re.DOTALL,
)


class Language(NamedTuple):
    """An ISO 639 code and its probability."""

    code: str
    probability: float


def language_of(text: str) -> Language:
    """The most probable language of a text without its formulas and code, by py3langid."""
    code, probability = _identifier().classify(_FORMULA.sub(" ", text))
    return Language(str(code), float(probability))


def check_languages(codes: Iterable[str]) -> None:
    """Refuse codes that no text could ever get.

    Raises:
        ConfigError: a code is unknown.
    """
    known = set(_identifier().labels)
    unknown = [code for code in codes if code not in known]
    if unknown:
        raise ConfigError(
            f"filters.languages: {unknown[0]!r} is no language that can be told; there are "
            f"{', '.join(sorted(known))}"
        )


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
