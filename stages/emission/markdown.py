"""Text that others wrote, in Markdown: it shows as it is, and does nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ACTIVE = re.compile(r"[\\`*<>\[\]|~&]|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=www)\.|@")


class Markdown(str):
    """A cell of a table that is Markdown already."""

    __slots__ = ()


def escaped(text: str) -> str:
    """The text on one line, inside a paragraph, a heading or a cell.

    Nothing of it is an emphasis, a link, an image, code, a tag, an entity or the end of a cell, nor
    an address that GitHub's dialect makes a link of.
    """
    return _ACTIVE.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def code(text: str) -> Markdown:
    """The text as a code span, whatever backticks it holds."""
    line = " ".join(text.split())
    ticks = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned left, the rest right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    lines = [head, rule, *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    # Cells are cut before code spans are seen.
    return text.replace("|", "\\|") if isinstance(text, Markdown) else escaped(text)
