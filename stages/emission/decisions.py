"""What selection decided, as compact arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.emission.sample import IntArray
from stages.errors import StageError
from stages.rows import LABEL
from stages.storage import Store

_OTHER_ROW = r": [0-9a-f]{32}\b.*$"
"""What a reason says of another row, which would make every reason its own."""


@dataclass(frozen=True)
class Decisions:
    """One entry a row of the run, in its order: about 36 + 17 bytes a row.

    Attributes:
        ids: string [n].
        source: number of the source in `names`, int32 [n].
        names: source names.
        keep: bool [n].
        tokens: tokens of the text that would be emitted, int64 [n]; may be estimates.
        reason: number of the reason in `reasons`, int32 [n].
        reasons: why rows were kept or dropped, without ids of other rows.
    """

    ids: pa.Array
    source: npt.NDArray[np.int32]
    names: tuple[str, ...]
    keep: npt.NDArray[np.bool_]
    tokens: IntArray
    reason: npt.NDArray[np.int32]
    reasons: tuple[str, ...]

    def of(self, name: str) -> npt.NDArray[np.bool_]:
        """Mask of a source's rows, bool [n]."""
        if name not in self.names:
            return np.zeros(len(self.keep), dtype=bool)
        mine: npt.NDArray[np.bool_] = self.source == self.names.index(name)
        return mine

    def dropped(self, name: str) -> Counter[str]:
        """A source's dropped rows by reason."""
        codes, counts = np.unique(self.reason[self.of(name) & ~self.keep], return_counts=True)
        pairs = zip(codes.tolist(), counts.tolist(), strict=True)
        return Counter({self.reasons[code]: count for code, count in pairs})

    def ids_of(self, rows: IntArray) -> list[str]:
        """Ids of the rows of these numbers."""
        taken: list[str] = self.ids.take(pa.array(rows)).to_pylist()
        return taken


def read_decisions(selection: Store, count_tokens: bool) -> Decisions:
    """Read `decisions.parquet` of a run's selection.

    Args:
        selection: the stage's folder.
        count_tokens: whether a kept row without a token count is an error (else it counts 0).

    Raises:
        StageError: a kept row has no token count and the budget is in tokens.
    """
    names = ["id", "source", "keep", "reason", "tokens"]
    table = selection.read_table("decisions.parquet", names)
    table = table.set_column(1, "source", table["source"].cast(pa.string()))
    reason = pc.replace_substring_regex(table["reason"].cast(pa.string()), _OTHER_ROW, "")
    reason = reason.fill_null("no reason given").combine_chunks().dictionary_encode()
    keep = table["keep"].fill_null(False)
    unknown = pc.sum(pc.and_(keep, pc.is_null(table["tokens"]))).as_py() or 0
    if count_tokens and unknown:
        raise StageError(
            f"emission: {unknown:,} selected rows have no token count, which budget_tokens needs; "
            "use budget_rows",
            stage="emission",
        )
    sources = sorted(value for value in table["source"].unique().to_pylist() if value is not None)
    codes = pc.index_in(table["source"], value_set=pa.array(sources, pa.string()))
    return Decisions(
        ids=table["id"].combine_chunks() if table.num_rows else pa.array([], pa.string()),
        source=codes.to_numpy().astype(np.int32),
        names=tuple(sources),
        keep=np.asarray(keep.to_numpy(), dtype=bool),
        tokens=table["tokens"].fill_null(0).to_numpy().astype(np.int64),
        reason=reason.indices.to_numpy().astype(np.int32),
        reasons=tuple(reason.dictionary.to_pylist()),
    )


def emitted_table(
    decisions: Decisions, rows: IntArray, shards: Sequence[tuple[str, int]]
) -> pa.Table:
    """Where every emitted line is: id, source, shard (file), position in it, copies in all.

    Args:
        decisions: of the run.
        rows: row numbers in the order emitted, int64 [n].
        shards: names and line counts of the files, in order.
    """
    _, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
    lines = [count for _, count in shards]
    files = pa.array([name for name, _ in shards], pa.string())
    return pa.table(
        {
            "id": decisions.ids.take(pa.array(rows)),
            "source": pa.DictionaryArray.from_arrays(
                pa.array(decisions.source[rows], pa.int32()), pa.array(decisions.names, pa.string())
            ),
            "shard": pa.DictionaryArray.from_arrays(
                pa.array(np.repeat(np.arange(len(lines)), lines), pa.int32()), files
            ),
            "position": pa.array(np.concatenate([np.arange(n) for n in lines]), pa.int32()),
            "copies": pa.array(counts[inverse], pa.int32()),
        },
        schema=pa.schema(
            [
                ("id", pa.string()),
                ("source", LABEL),
                ("shard", LABEL),
                ("position", pa.int32()),
                ("copies", pa.int32()),
            ]
        ),
    )
