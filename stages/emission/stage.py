"""The stage that writes the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from stages.base import Columns, Outcome, ShardedColumns
from stages.emission.card import card_markdown
from stages.emission.decisions import Decisions, emitted_table, read_decisions
from stages.emission.examples import DIFFICULTY, LOW_IS_HARD, SHOWN, Ranked, extremes
from stages.emission.facts import Facts, licenses, source_facts, task_counts
from stages.emission.gather import gather, provenance_columns, read_scores
from stages.emission.lineage import lineage_json
from stages.emission.quotas import plan_quotas, shares
from stages.emission.records import StageRecord, read_records
from stages.emission.report import report_html
from stages.emission.sample import FloatArray, IntArray, fill_quota, sampling_order, shuffled
from stages.emission.settings import EmissionSettings
from stages.emission.shards import plan_schema, write_shards
from stages.errors import ConfigError, StageError
from stages.mixture.emitted import emitted_value
from stages.mixture.settings import MixtureSettings
from stages.storage import Store


class EmissionStage:
    """Samples the selected rows to the mixture's quotas and writes them, with what explains them.

    Memory: the emitted rows and their compressed files, some copies of one output shard while it is
    written, about 50 bytes a row of the run for selection's decisions, and 4 bytes a row for each
    column that the report charts. Other rows are streamed.
    """

    name = "emission"
    version = 1

    def __init__(
        self,
        settings: EmissionSettings,
        seed: int,
        recipe: Mapping[str, Any],
        present: tuple[str, ...],
    ) -> None:
        """Check that the columns which the settings name are there.

        Args:
            settings: the recipe's `emission` section.
            seed: the recipe's.
            recipe: the resolved recipe.
            present: names of all columns of the run.

        Raises:
            ConfigError: `score` names no column, or a source's `repeats` is below 1.
        """
        if settings.score is not None and settings.score not in present:
            raise ConfigError(
                f"emission.score: no stage of this recipe adds {settings.score}; columns are "
                f"{', '.join(present)}"
            )
        self.settings = settings
        self.seed = seed
        self.recipe = recipe
        self.present = present
        self._repeats: dict[str, int] = {}
        self._anchors: set[str] = set()
        for source in recipe.get("sources") or []:
            repeats = source.get("repeats")
            if repeats is not None and repeats < 1:
                raise ConfigError(f"source {source['name']}: repeats must be at least 1: {repeats}")
            self._repeats[source["name"]] = int(repeats or 1)
            if source.get("role") == "anchor":
                self._anchors.add(source["name"])

    def columns(self) -> Columns:
        """The text, and every small column that stages added."""
        own = ("id", "source", "messages", "messages_reflected", "tools", "answer")
        wanted = (*own, "answer_effective", "license", *provenance_columns(self.present))
        always = ("id", "source", "messages")
        needs = tuple(name for name in wanted if name in always or name in self.present)
        return Columns(needs=needs, adds=pa.schema([]))

    def decide(
        self, columns: ShardedColumns, targets: ShardedColumns, artifacts: Mapping[str, Store]
    ) -> Outcome:
        """Write the data set.

        Args:
            columns: of the run.
            targets: rows with a `task`, to be counted.
            artifacts: folders of earlier stages; `selection` must be there.

        Returns:
            Table `emitted` (id, source, shard, position, copies); files `data/train-*.parquet`,
            `README.md`, `report.html`, `lineage.json`; report with rows, tokens, quotas and
            shortfalls by source.

        Raises:
            StageError: quotas can't be met, nothing is left, or rows don't fit the format.
        """
        settings, unit = self.settings, self.settings.unit
        records = read_records(artifacts)
        reports = {record.name: record.report for record in records}
        decisions = read_decisions(artifacts["selection"], unit == "tokens")
        mixture = reports.get("mixture")
        available = self._available(decisions, repeats=True)
        weights = self._weights(decisions, mixture)
        quotas = plan_quotas(weights, available, settings.budget, unit)
        order = self._order(columns, decisions, quotas)
        if mixture is not None and self.recipe.get("mixture"):
            mixture = dict(mixture) | emitted_value(
                columns,
                targets,
                order,
                [decisions.names[code] for code in decisions.source.tolist()],
                mixture,
                MixtureSettings.model_validate(self.recipe["mixture"]),
                self.seed,
            )
        ranked = self._ranked(columns, decisions)
        gathered = gather(
            columns, self.columns().needs, decisions, np.unique(order), ranked.numbers
        )
        schema = plan_schema(gathered, settings, provenance_columns(self.present))
        shards, files = write_shards(
            gathered, order, schema, settings.shard_bytes, self._metadata(records)
        )
        facts = Facts(
            recipe=self.recipe,
            settings=settings,
            seed=self.seed,
            sources=source_facts(
                self.recipe,
                reports.get("ingest", {}),
                decisions,
                {name: float(share) for name, share in shares(weights).items()},
                quotas,
                available,
                order,
                unit,
            ),
            stages=records,
            mixture=mixture,
            shards=shards,
            tasks=task_counts(targets),
            licenses=licenses(gathered, self.recipe),
            rewritten=int(gathered.rewritten[order].sum()),
            tools=schema.tools,
            columns=schema.arrow.names,
        )
        files["README.md"] = card_markdown(facts, self.version)
        files["report.html"] = report_html(facts, gathered, decisions, order, self.seed, ranked)
        files["lineage.json"] = lineage_json(facts, self.version)
        emitted = emitted_table(decisions, order, [(shard.name, shard.rows) for shard in shards])
        return Outcome(tables={"emitted.parquet": emitted}, report=_report(facts), files=files)

    def _available(self, decisions: Decisions, *, repeats: bool) -> dict[str, int]:
        """What every source can give, in the budget's unit; anchors give nothing."""
        can: dict[str, int] = {}
        for name in decisions.names:
            if name not in self._anchors:
                kept = decisions.of(name) & decisions.keep
                once = (
                    decisions.tokens[kept].sum() if self.settings.unit == "tokens" else kept.sum()
                )
                can[name] = int(once) * (self._repeats.get(name, 1) if repeats else 1)
        return can

    def _weights(self, decisions: Decisions, mixture: Mapping[str, Any] | None) -> dict[str, float]:
        """Weights by source, without anchors; they need not sum to 1."""
        own = self._available(decisions, repeats=False)
        given: Mapping[str, float] = own if mixture is None else mixture["weights"]
        given = {name: given[name] for name in sorted(given) if name not in self._anchors}
        if not any(weight > 0 for weight in given.values()):
            why = "selection kept no row" if mixture is None else "no source has a weight"
            raise StageError(
                f"emission: there is nothing to emit: {why} of a source that isn't an anchor; "
                "loosen selection",
                stage=self.name,
            )
        return dict(given)

    def _order(
        self, columns: ShardedColumns, decisions: Decisions, quotas: Mapping[str, int]
    ) -> IntArray:
        """Numbers of the emitted rows, copies included, in the order written."""
        settings = self.settings
        scores: FloatArray | None = None
        if settings.score is not None:
            scores = read_scores(columns, settings.score)
        chosen = []
        for name in sorted(quotas):
            rows = np.flatnonzero(decisions.of(name) & decisions.keep).astype(np.int64)
            ranked = sampling_order(
                rows,
                decisions.ids_of(rows),
                self.seed,
                None if scores is None else scores[rows],
            )
            sizes = decisions.tokens[ranked] if settings.unit == "tokens" else None
            chosen.append(fill_quota(ranked, quotas[name], sizes, self._repeats.get(name, 1)))
        picked = np.concatenate(chosen)
        if not len(picked):
            raise StageError(
                f"emission: a budget of {settings.budget:,} {settings.unit} holds no row; raise "
                f"emission.budget_{settings.unit}",
                stage=self.name,
            )
        return shuffled(picked, decisions.ids_of(picked), self.seed)

    def _ranked(self, columns: ShardedColumns, decisions: Decisions) -> Ranked:
        """The hardest and easiest rows of the run, those of anchors left out."""
        own = np.zeros(len(decisions.keep), dtype=bool)
        for name in decisions.names:
            if name not in self._anchors:
                own |= decisions.of(name)
        for name in DIFFICULTY:
            if name in self.present:
                scores = read_scores(columns, name)
                if name == "ifd_effective" and "ifd" in self.present:
                    # Rows that reflection wasn't asked for stand as they came.
                    scores = np.where(np.isnan(scores), read_scores(columns, "ifd"), scores)
                values = np.where(own, scores, np.nan)
                if np.isfinite(values).any():
                    hardest, easiest = extremes(values, name in LOW_IS_HARD, SHOWN)
                    return Ranked(name, values, hardest, easiest)
        nothing = np.zeros(0, np.int64)
        return Ranked(None, nothing.astype(np.float64), nothing, nothing)

    def _metadata(self, records: list[StageRecord]) -> dict[str, str]:
        prints = {f"tamis.{record.name}": record.fingerprint or "" for record in records}
        return {
            **prints,
            "tamis.recipe": str(self.recipe.get("name") or ""),
            "tamis.seed": str(self.seed),
        }


def _report(facts: Facts) -> dict[str, Any]:
    return {
        "rows": facts.rows,
        "distinct_rows": facts.total("distinct"),
        "tokens": facts.tokens,
        "rewritten": facts.rewritten,
        "unit": facts.settings.unit,
        "budget": facts.settings.budget,
        "shortfall": facts.total("shortfall"),
        "shards": len(facts.shards),
        **{key: value for key, value in (facts.mixture or {}).items() if "emitted" in key},
        "sources": {
            source.name: {
                "weight": source.weight,
                "quota": source.quota,
                "available": source.available,
                "rows": source.rows,
                "distinct_rows": source.distinct,
                "tokens": source.tokens,
                "shortfall": source.shortfall,
            }
            for source in facts.offered
        },
    }
