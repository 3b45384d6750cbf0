"""What stages give beside rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

import pyarrow as pa

from stages.base import Settings
from stages.licenses import LicensePolicy
from stages.session.kinds import Rows
from stages.storage import Store, parquet_bytes


@dataclass(frozen=True)
class Ingested(Generic[Rows]):
    """Rows in one form. Every record of a source is in `rows` or in `rejects`.

    Attributes:
        rows: of all sources, with the columns of `stages.rows.ROWS`.
        targets: with a column `task`; a target's rejects are in `rejects` too.
        rejects: records that are no rows, with `source`, `file`, `record` and `reason`.
        report: what became of the records of each source and target, in numbers.
    """

    rows: Rows
    targets: Rows
    rejects: Rows
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Fitted:
    """An artifact made from rows: an autoencoder, or what targets activate.

    Attributes:
        name: of the stage that made it.
        report: its numbers.
        store: the folder that holds it, as long as the session is open.
        settings: what later stages need to know of how it was made.
        files: names of its files in that folder.
        artifacts: the artifacts that it was made with.
    """

    name: str
    report: Mapping[str, Any]
    store: Store = field(repr=False)
    settings: Settings = field(repr=False)
    files: tuple[str, ...]
    artifacts: Mapping[str, Fitted] = field(default_factory=dict, repr=False)

    def save(self, url: str) -> None:
        """Write its files into a folder, a path or fsspec URL, to keep them."""
        folder = Store(url)
        for name in self.files:
            folder.write_bytes(name, self.store.read_bytes(name))


@dataclass(frozen=True)
class Selected(Generic[Rows]):
    """What was kept and dropped. Every row is in `kept` or in `dropped`.

    Attributes:
        kept: in the order given.
        dropped: the others (rows of anchors among them), with a column `reason`, which takes the
            place of one that they had.
        decisions: id, source, keep, reason, score and tokens of every row, in the order given.
        report: rows by reason, in all and by source.
        table: all rows.
        policy: the licences that were asked for.
    """

    kept: Rows
    dropped: Rows
    decisions: pa.Table = field(repr=False)
    report: Mapping[str, Any]
    table: pa.Table = field(repr=False)
    policy: LicensePolicy | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Mixed:
    """How much of what is emitted comes from each source.

    Attributes:
        weights: shares by source, summing to 1.
        report: the value, its bounds, and by source the range of shares that are as good.
        table: the same by source.
        settings: of the mixture.
        budget: `budget_rows` or `budget_tokens`, as it was given; empty: none was.
    """

    weights: Mapping[str, float]
    report: Mapping[str, Any] = field(repr=False)
    table: pa.Table = field(repr=False)
    settings: Settings = field(repr=False)
    budget: Mapping[str, int] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Emitted(Generic[Rows]):
    """The data set.

    Attributes:
        rows: of all splits, as trainers read them.
        report: rows, tokens and quotas by source.
        files: by path, what a run leaves in its folder `dataset`.
        table: where every emitted row is: id, source, shard and position.
    """

    rows: Rows
    report: Mapping[str, Any]
    files: Mapping[str, bytes] = field(repr=False)
    table: pa.Table = field(repr=False)

    def save(self, url: str) -> None:
        """Write shards, card, report and lineage into a folder, a path or fsspec URL."""
        folder = Store(url)
        for name, data in self.files.items():
            folder.write_bytes(name, data)
        folder.write_bytes("emitted.parquet", parquet_bytes(self.table))
