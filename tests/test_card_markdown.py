"""Text of rows, recipes and models in the card: a Markdown renderer shows it, and no more."""

from __future__ import annotations

import re
from collections import Counter
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import yaml
from emission_runs import Run, two_sources
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from stages.emission.markdown import Markdown, code, escaped, table

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
TEXTS = st.text() | st.text("ab1 \\`*_[]()<>!|~&#;:/.@{}+-=\n\"'")
NASTY = (
    "![x](https://e.example/p.png) [MIT](https://e.example) <img src=x> <https://e.example> "
    "`code` *em* _em_ **b** ~~s~~ | cell &lt; https://e.example www.e.example\n\n# head\n\n"
    "- item\n\n[ref]: https://e.example"
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def tokens(text: str) -> list[Token]:
    return [part for token in READER.parse(text) for part in [token, *(token.children or [])]]


def shown(text: str) -> str:
    """What a reader of one paragraph sees; fails where there is more than text."""
    found = tokens(text)
    assert {token.type for token in found} <= {
        "paragraph_open", "inline", "text", "paragraph_close"
    }  # fmt: skip
    return "".join(token.content for token in found if token.type == "text")


def on_one_line(text: str) -> str:
    return " ".join(text.split()).replace("\0", "\ufffd")


@given(TEXTS)
def test_escaped_text_shows_as_it_is(text: str) -> None:
    assert shown(f"is {escaped(text)} so") == f"is {on_one_line(text)} so"


@given(TEXTS.filter(str.strip))
def test_code_shows_as_it_is(text: str) -> None:
    found = tokens(f"is {code(text)} so")
    assert [part.content for part in found if part.type == "code_inline"] == [on_one_line(text)]


@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=4))
def test_cells_of_a_table_stay_cells(rows: list[tuple[str, str]]) -> None:
    made = table(["one", "two"], [[left, code(right)] for left, right in rows], left=1)
    cells = [
        "".join(part.content for part in inline.children or [])
        for start, inline in pairwise(READER.parse(made))
        if start.type == "td_open"
    ]
    assert cells == [on_one_line(text) for row in rows for text in row]


def dressed(text: str) -> Run:
    """A run in which everything that others name holds this text."""
    run = two_sources()
    for row, stated in zip(run.rows, cycle([text, "mit", f"NC {text}"]), strict=False):
        row["license"] = stated
        row["reason"] = text
    run.statuses = {"difficulty": {"ok": 3, text: 4}}
    model = {"settings": {"model": text}, "weights": text}
    run.identities = {"difficulty": {"version": text, "models": {"student": model}}}
    run.left_out = {"sums": {"rejected": {text: 3}}}
    run.tasks = (text,)
    run.recipe = {
        "models": {"big": {"model": text, "terms": text, "dtype": text, "max_length": 9}},
        "difficulty": {"student": "big"},
        "reflection": {"teacher": "big", "template": text},
        "contamination": {"ngram": 13, "sets": [{"name": text}]},
        "license_policy": {"allow": [text]},
    }
    return run


def test_card_shows_what_others_wrote_and_nothing_of_it_is_live(url: str) -> None:
    """The same parts of Markdown as in a card of plain words, and the text as it was written."""
    cards = []
    for text in ("plain", NASTY):
        card = dressed(text).emit(url, budget_rows=60).files["README.md"].decode()
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "other"
        cards.append(tokens(body))
    plain, nasty = (Counter(part.type for part in card if part.type != "text") for card in cards)
    assert nasty == plain
    assert not {"image", "link_open", "html_inline", "html_block"} & set(nasty)
    cells = Counter("".join(part.content for part in token.children or []) for token in cards[1])
    assert cells[on_one_line(NASTY)] >= 5


def test_what_is_markdown_already_is_left_alone() -> None:
    assert table(["a"], [[Markdown("**b**")]], left=1).endswith("| **b** |")


@pytest.mark.parametrize(
    "text", ["https://e.example/a", "www.e.example", "a@e.example", "<https://e.example>"]
)
def test_addresses_are_broken_for_dialects_that_make_links_of_them(text: str) -> None:
    """GitHub's dialect links bare addresses; with a character escaped they are none."""
    assert not re.search(r"(?<!\\):|(?<=www)\.|(?<!\\)@", escaped(text))
    assert shown(escaped(text)) == text
