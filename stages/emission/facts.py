"""The numbers that the card, the report and the lineage share, so that they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from stages.base import ShardedColumns
from stages.emission.decisions import Decisions
from stages.emission.prefix import PrefixFacts
from stages.emission.publication import ModelFacts, WindowFacts, license_warnings, written_terms
from stages.emission.records import StageRecord
from stages.emission.sample import IntArray
from stages.emission.settings import EmissionSettings
from stages.emission.shards import ShardFile
from stages.emission.splits import VALIDATION
from stages.licenses import license_name


@dataclass(frozen=True)
class SourceFacts:
    """One source from its records to its emitted lines.

    Attributes:
        name: of the source.
        role: `anchor` for data that is compared with and never emitted.
        license: as the recipe says, or None.
        paths: as the recipe says.
        records: records read, or None where ingest didn't say.
        rejected: rejected records by reason.
        end_markers: responses whose end-of-text marker was stripped.
        kept: rows after ingest.
        selected: rows that selection kept.
        dropped: rows that selection dropped, by reason.
        weight: share of the mixture.
        quota: rows or tokens asked for.
        available: rows or tokens that it could give, repeats included.
        rows: emitted lines.
        distinct: emitted rows, copies not counted.
        tokens: tokens of the emitted lines.
        shortfall: quota less what was emitted, in the quota's unit.
        duplicate_of: exact duplicates by the source of the row that stays.
        near_duplicate_of: near duplicates likewise.
        overlaps: contaminated rows by target or evaluation set, and how they overlap it.
    """

    name: str
    role: str | None
    license: str | None
    paths: tuple[str, ...]
    records: int | None
    rejected: Mapping[str, int]
    end_markers: int
    kept: int
    selected: int
    dropped: Mapping[str, int]
    weight: float
    quota: int
    available: int
    rows: int
    distinct: int
    tokens: int
    shortfall: int
    duplicate_of: Mapping[str, int] = field(default_factory=dict)
    near_duplicate_of: Mapping[str, int] = field(default_factory=dict)
    overlaps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """A data set and how it was made.

    Attributes:
        recipe: the resolved recipe.
        settings: of emission.
        seed: of the run.
        sources: in the recipe's order.
        stages: records of earlier stages.
        mixture: the mixture's numbers, or None where weights follow the selected rows.
        shards: written files.
        tasks: target rows by task.
        licenses: emitted lines by source and licence; None is unknown.
        stated: rows of the run by source and licence.
        models: of the recipe.
        windows: rows that models' windows didn't hold whole.
        splits: lines and prompts by split; prompts are counted where there are two splits.
        prefix: numbers of the data set of prefixes, None where there is none.
        concepts: lines of the data set of concepts, by split.
        rewritten: emitted lines whose text was rewritten.
        columns: names of the emitted columns.
    """

    recipe: Mapping[str, Any]
    settings: EmissionSettings
    seed: int
    sources: Sequence[SourceFacts]
    stages: Sequence[StageRecord]
    mixture: Mapping[str, Any] | None
    shards: Sequence[ShardFile]
    tasks: Mapping[str, int]
    licenses: Mapping[str, Mapping[str | None, int]]
    stated: Mapping[str, Mapping[str | None, int]]
    models: Sequence[ModelFacts]
    windows: Sequence[WindowFacts]
    splits: Mapping[str, tuple[int, int | None]]
    prefix: PrefixFacts | None
    concepts: Mapping[str, int]
    rewritten: int
    columns: Sequence[str] = field(default=())

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.recipe.get("name") or "dataset")

    @property
    def offered(self) -> list[SourceFacts]:
        """Sources that can be emitted."""
        return [source for source in self.sources if source.role != "anchor"]

    @property
    def rows(self) -> int:
        """Emitted lines."""
        return sum(lines for lines, _ in self.splits.values())

    @property
    def written(self) -> dict[str, int]:
        """Emitted lines whose text a model wrote, by its role."""
        prefixes = sum(self.prefix.lines.values()) if self.prefix else 0
        return {"reflection.teacher": self.rewritten, "prefixes.model": prefixes}

    @property
    def warnings(self) -> list[str]:
        """What to find out or to heed before the data set is published."""
        return license_warnings(self.licenses, self.models, self.written)

    @property
    def split_note(self) -> str | None:
        """How rows are split, None where no validation split is asked for."""
        share = self.settings.validation
        if not share:
            return None
        if VALIDATION not in self.splits:
            return (
                f"There is no validation split: no prompt's hash fell into the share {share:g} "
                "that is held out. Raise emission.validation, or emit more rows."
            )
        return (
            f"Prompts are held out whose hash falls into a share of {share:g}, so the share of the "
            "rows is near it. All rows of one prompt, as it was and as it was rewritten, are in "
            "one split, and stay there when rows are added."
        )

    @property
    def names_of_licenses(self) -> set[str | None]:
        """Of all emitted lines, and the stated terms of the models that wrote some."""
        rows = {name for counts in self.licenses.values() for name in counts}
        return rows | written_terms(self.models, self.written)

    def license_of(self, source: SourceFacts) -> str:
        """The licences of a source's rows in words; a dash where it has no row to state one."""
        counts = self.stated.get(source.name)
        if not counts:
            return license_name(source.license) or "–"
        names = sorted(counts, key=lambda name: (-counts[name], name or ""))
        return ", ".join(name or "not stated" for name in names)

    @property
    def tokens(self) -> int:
        """Tokens of the emitted lines, as selection counted them."""
        return sum(source.tokens for source in self.sources)

    def total(self, name: str) -> int:
        """Sum of a number over the sources that can be emitted."""
        return sum(int(getattr(source, name) or 0) for source in self.offered)

    def reasons(self, name: str) -> dict[str, int]:
        """`rejected` or `dropped` over the sources that can be emitted, most first."""
        counted: Counter[str] = Counter()
        for source in self.offered:
            counted.update(getattr(source, name))
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def source_facts(
    recipe: Mapping[str, Any],
    ingest: Mapping[str, Any],
    decisions: Decisions,
    weights: Mapping[str, float],
    quotas: Mapping[str, int],
    available: Mapping[str, int],
    order: IntArray,
    unit: str,
) -> list[SourceFacts]:
    """Facts of every source that the recipe, ingest or selection knows.

    Args:
        recipe: resolved.
        ingest: the report of ingest.
        decisions: of selection.
        weights: shares by source, summing to 1.
        quotas: by source, in `unit`.
        available: by source, in `unit`.
        order: emitted row numbers.
        unit: rows or tokens.
    """
    declared = {str(entry["name"]): entry for entry in recipe.get("sources") or []}
    seen = ingest.get("sources") or {}
    names = list(dict.fromkeys([*declared, *sorted(seen), *decisions.names]))
    facts = []
    for name in names:
        entry, counts, mine = declared.get(name, {}), seen.get(name, {}), decisions.of(name)
        lines = order[mine[order]]
        tokens = int(decisions.tokens[lines].sum())
        path = entry.get("path") or ()
        facts.append(
            SourceFacts(
                name=name,
                role=entry.get("role"),
                license=entry.get("license"),
                paths=(path,) if isinstance(path, str) else tuple(str(item) for item in path),
                records=counts.get("in"),
                rejected=counts.get("rejected") or {},
                end_markers=counts.get("end_markers") or 0,
                kept=int(mine.sum()),
                selected=int((mine & decisions.keep).sum()),
                dropped=decisions.dropped(name),
                weight=float(weights.get(name, 0.0)),
                quota=quotas.get(name, 0),
                available=available.get(name, 0),
                rows=len(lines),
                distinct=len(np.unique(lines)),
                tokens=tokens,
                shortfall=quotas.get(name, 0) - (tokens if unit == "tokens" else len(lines)),
                duplicate_of=counts.get("duplicate_of") or {},
                near_duplicate_of=counts.get("near_duplicate_of") or {},
                overlaps=counts.get("overlaps") or {},
            )
        )
    return facts


def task_counts(targets: ShardedColumns) -> dict[str, int]:
    """Target rows by task, in the order of the names."""
    counted: Counter[str] = Counter()
    if targets.n_rows:
        for table in targets.iter(["task"]):
            for pair in table["task"].cast(pa.string()).value_counts().to_pylist():
                counted[pair["values"] or "unnamed"] += pair["counts"]
    return dict(sorted(counted.items()))
