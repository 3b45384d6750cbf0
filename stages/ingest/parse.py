"""One source at a time: its files, records and rows, before anything is compared or written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stages.errors import RowError
from stages.ingest.settings import IngestSettings
from stages.rows import Message, row_and_group_id
from stages.sources.catalogue import resolved
from stages.sources.files import SourceFile, files_of
from stages.sources.forms import Parsed, parse
from stages.sources.readers import BadRecord, Record, file_type, records, shown
from stages.sources.reasons import UNANSWERED, code_of
from stages.sources.settings import Source, Target
from stages.storage import content_identity


class Row(NamedTuple):
    """A row as `rows.ROWS` has it.

    Attributes:
        chars: characters in its turns and tools.
        end_markers: whether end-of-text markers were stripped from its responses.
        task: the task that it serves; None for a source's row.
        origin: the record it was read from.
    """

    id: str
    group: str
    source: str
    messages: list[Message]
    tools: str | None
    answer: str | None
    license: str | None
    extra: str | None
    file: str
    record: int
    chars: int
    end_markers: bool
    task: str | None
    origin: Record

    def rejected(
        self, reason: str, *, kept: str | None = None, overlap: str | None = None
    ) -> Reject:
        """The row as a reject."""
        return Reject(
            self.source, self.file, self.record, reason, self.origin.raw, self.id, kept, overlap
        )


class Reject(NamedTuple):
    """A record that is no row, as `rows.REJECTS` has it.

    Attributes:
        asked: the turns of a record that lacks nothing but a response.
    """

    source: str
    file: str
    record: int
    reason: str
    raw: str
    id: str | None = None
    kept: str | None = None
    overlap: str | None = None
    asked: Sequence[Message] = ()

    def rejected(self, reason: str, *, overlap: str) -> Reject:
        """The record as a reject for another reason."""
        return self._replace(reason=reason, overlap=overlap)


def iter_rows(
    source: Source,
    settings: IngestSettings | None = None,
    files: Sequence[SourceFile] | None = None,
) -> Iterator[Row | Reject]:
    """Every record of a source (or target) as a row or a reject, in order; duplicates included.

    Args:
        source: what to read.
        settings: limits; the defaults unless given.
        files: the source's files where they are known already.

    Raises:
        ConfigError: a file is missing or of an unknown type.
    """
    settings = settings or IngestSettings()
    start, stop = source.rows or (0, None)
    position = 0
    for file in files_of(source) if files is None else files:
        if stop is not None and position >= stop:
            return
        known = resolved(source, file.url)
        for record in records(file.url, file=file.name, key=known.records):
            if stop is not None and position >= stop:
                return
            position += 1
            if position <= start:
                continue
            if not isinstance(record, Record):
                yield _reject(source, record, record.reason)
                continue
            try:
                yield _row(record, parse(record.value, known), known, settings)
            except RowError as error:
                yield _reject(source, record, str(error), _asked(record, known, str(error)))


def content_of(sources: Sequence[Source]) -> dict[str, list[tuple[str, str]]]:
    """What identifies the content of sources: for each, its files and their identities.

    Raises:
        ConfigError: a file is missing.
    """
    return {
        source.name: [(file.name, content_identity(file.url)) for file in files_of(source)]
        for source in sources
    }


def _row(record: Record, parsed: Parsed, source: Source, settings: IngestSettings) -> Row:
    chars = _characters(parsed)
    if settings.max_chars is not None and chars > settings.max_chars:
        raise RowError(f"too_long: {chars} characters")
    row, group = row_and_group_id(parsed.messages, parsed.tools)
    return Row(
        id=row,
        group=group,
        source=source.name,
        messages=parsed.messages,
        tools=parsed.tools,
        answer=parsed.answer,
        license=parsed.license,
        extra=parsed.extra,
        file=record.file,
        record=record.record,
        chars=chars,
        end_markers=parsed.end_markers,
        task=_task(parsed, source, record.file) if isinstance(source, Target) else None,
        origin=record,
    )


def _reject(
    source: Source, record: Record | BadRecord, reason: str, asked: Sequence[Message] = ()
) -> Reject:
    # A reason may quote the record, and so what can't be stored in it.
    return Reject(source.name, record.file, record.record, shown(reason), record.raw, asked=asked)


def _asked(record: Record, source: Source, reason: str) -> Sequence[Message]:
    """The turns of a record that was rejected for want of a response; none of other records."""
    if code_of(reason) not in UNANSWERED:
        return ()
    try:
        return parse(record.value, source, answered=False).messages
    except RowError:
        return ()


def _task(parsed: Parsed, target: Target, file: str) -> str:
    name = file.replace("\\", "/").rpartition("/")[2]
    stem = name[: name.lower().rindex(file_type(name) or "")]
    return parsed.task or (target.task or target.name).replace("{file}", stem)


def _characters(parsed: Parsed) -> int:
    turns = (
        len(turn["content"]) + len(turn.get("reasoning") or "") + len(turn.get("tool_calls") or "")
        for turn in parsed.messages
    )
    return sum(turns) + len(parsed.tools or "")
