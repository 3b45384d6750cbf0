"""Rows of the sources in one random order, never all in memory.

The order is that of a hash of a row's id and the seed, as everywhere in tamis: it depends on
neither files nor sources, equal rows of two sources come together and count once, and a training
goes on after a row that it remembers by its hash alone. Files are read once for each window of
that order, with about `_WINDOW` rows in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from pipeline.rejects import check_mostly_read
from stages.engines import MaskedSequence
from stages.errors import ConfigError, RowError
from stages.ingest.parse import Row, iter_rows
from stages.ingest.settings import IngestSettings
from stages.rows import Message, key_hash
from stages.sources.files import SourceFile
from stages.sources.settings import Source

_WINDOW = 50_000
_KEYS = 1 << 64

Sequenced = Callable[[Sequence[Message]], MaskedSequence]
"""A conversation as token ids; RowError where it has none to train on."""


@dataclass(frozen=True)
class Place:
    """A place in the stream: after the row of a key, in a pass over the rows."""

    reading: int = 0
    key: int = -1


@dataclass(frozen=True)
class Survey:
    """What the sources hold.

    Attributes:
        rows: readable records of each source.
        rejected: unreadable ones.
        tokens: activations that one pass gives; counting stops at what is needed.
        held_out: rows that aren't trained on, by rising hash.
    """

    rows: dict[str, int]
    rejected: dict[str, int]
    tokens: int
    held_out: list[MaskedSequence]


class Pool:
    """The rows of some sources, split by hash into those to train on and those held out.

    Args:
        sources: each with its files.
        seed: of the order and of the split.
        held_out_share: rows whose hash lies in the first such share of all are held out.
        sequenced: a conversation as token ids.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, list[SourceFile]]],
        seed: int,
        held_out_share: float,
        sequenced: Sequenced,
    ) -> None:
        """Keep what to read."""
        self._sources = sources
        self._seed = seed
        self._bound = int(held_out_share * _KEYS)
        self._sequenced = sequenced
        self._rows = 0

    def survey(self, tokens: int, evaluation_tokens: int) -> Survey:
        """Read everything once.

        Args:
            tokens: activations that one pass should give.
            evaluation_tokens: activations that the held-out rows should give.

        Raises:
            ConfigError: a source has no row, or too many that can't be read; or no row is held out.
        """
        rows: dict[str, int] = {}
        rejected: dict[str, int] = {}
        counted: set[int] = set()
        held_out = _LowestRows(evaluation_tokens)
        found = 0
        for source, files in self._sources:
            rows[source.name] = rejected[source.name] = 0
            for row in iter_rows(source, IngestSettings(max_chars=None), files):
                if not isinstance(row, Row):
                    rejected[source.name] += 1
                    continue
                rows[source.name] += 1
                key = key_hash(row.id, self._seed)
                if key >= self._bound and found < tokens and key not in counted:
                    sequence = self._usable(row.messages)
                    found += sum(sequence.keep) if sequence else 0
                    counted.add(key)
                elif key < self._bound and held_out.wants(key):
                    sequence = self._usable(row.messages)
                    if sequence:
                        held_out.add(key, sequence)
            check_mostly_read(source, rows[source.name], rejected[source.name])
        self._rows = sum(rows.values())
        if not held_out.rows:
            raise ConfigError(
                f"training.held_out_share: none of {self._rows} rows is held out; raise it"
            )
        return Survey(rows, rejected, found, [held_out.rows[key] for key in sorted(held_out.rows)])

    def chunks(
        self, after: Place, passes: int, size: int
    ) -> Iterator[tuple[list[MaskedSequence], Place]]:
        """Rows to train on, `size` at a time, and the place after each chunk.

        Args:
            after: where to go on.
            passes: how often the rows are read.
            size: rows of a chunk, those without a token to train on included.
        """
        chunk: list[MaskedSequence] = []
        seen = 0
        for place, messages in self._ordered(after, passes):
            sequence = self._usable(messages)
            if sequence:
                chunk.append(sequence)
            seen += 1
            if seen == size:
                yield chunk, place
                chunk, seen = [], 0
        if chunk:
            yield chunk, place

    def _ordered(self, after: Place, passes: int) -> Iterator[tuple[Place, Sequence[Message]]]:
        windows = -(-self._rows // _WINDOW)
        for reading in range(after.reading, passes):
            key = after.key if reading == after.reading else -1
            for window in range(max(key, 0) * windows // _KEYS, windows):
                found = self._window(reading, window, windows)
                for later in sorted(one for one in found if one > key):
                    yield Place(reading, later), found[later]

    def _window(self, reading: int, window: int, windows: int) -> dict[int, Sequence[Message]]:
        """The rows to train on of one window of a pass's order, by key."""
        found: dict[int, Sequence[Message]] = {}
        for source, files in self._sources:
            for row in iter_rows(source, IngestSettings(max_chars=None), files):
                if isinstance(row, Row) and key_hash(row.id, self._seed) >= self._bound:
                    key = key_hash(row.id, self._seed + reading)
                    if key * windows // _KEYS == window:
                        found[key] = row.messages
        return found

    def _usable(self, messages: Sequence[Message]) -> MaskedSequence | None:
        try:
            return self._sequenced(messages)
        except RowError:
            return None


class _LowestRows:
    """Of all rows that it is given, the fewest of lowest key that hold a number of tokens."""

    def __init__(self, tokens: int) -> None:
        self.rows: dict[int, MaskedSequence] = {}
        self._wanted = tokens
        self._tokens = 0
        self._highest: list[int] = []

    def wants(self, key: int) -> bool:
        """Whether the row of a key would be among them."""
        full = self._tokens >= self._wanted
        return key not in self.rows and not (full and key > -self._highest[0])

    def add(self, key: int, sequence: MaskedSequence) -> None:
        """Take a row, and let go of those that it makes needless."""
        self.rows[key] = sequence
        self._tokens += sum(sequence.keep)
        heappush(self._highest, -key)
        while self._tokens - (last := sum(self.rows[-self._highest[0]].keep)) >= self._wanted:
            del self.rows[-heappop(self._highest)]
            self._tokens -= last
