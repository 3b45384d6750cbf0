"""The stage that writes the data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import Columns, Outcome, ShardedColumns
from stages.emission.card import card_markdown, recipe_yaml
from stages.emission.concepts import IDENTITY, concept_identity, concept_tables
from stages.emission.croissant import croissant_json
from stages.emission.decisions import Decisions, emitted_table, read_decisions
from stages.emission.examples import (
    DIFFICULTY,
    LOW_IS_HARD,
    SHOWN,
    Ranked,
    extremes,
    searched_rows,
)
from stages.emission.facts import Facts, source_facts, task_counts
from stages.emission.gather import (
    APART,
    Gathered,
    audited_columns,
    gather,
    provenance_columns,
    read_scores,
)
from stages.emission.lineage import SCHEMA, lineage_json
from stages.emission.mixture_view import mixture_charts
from stages.emission.prefix import PrefixFacts, prefix_facts, prefix_tables
from stages.emission.publication import emitted_licenses, model_facts, window_facts
from stages.emission.quotas import plan_quotas, shares
from stages.emission.records import StageRecord, read_records
from stages.emission.rejects import rejected_examples
from stages.emission.report import Chosen, Explained, report_html
from stages.emission.sample import FloatArray, IntArray, fill_quota, sampling_order, shuffled
from stages.emission.settings import EmissionSettings
from stages.emission.shards import ShardFile, plan_schema, write_lines, write_shards
from stages.emission.splits import prompt_count, split_rows
from stages.emission.trainers import trainer_files
from stages.errors import ConfigError, StageError
from stages.explanation.stage import EXPLANATIONS, TOP_ROWS
from stages.mixture.emitted import emitted_value
from stages.mixture.settings import MixtureSettings
from stages.storage import Store


@dataclass(frozen=True)
class Plan:
    """What is decided before a row is read.

    Attributes:
        records: of earlier stages.
        decisions: of selection.
        mixture: the mixture's report, None where none was fitted.
        available: rows or tokens that each source can give.
        weights: shares of the sources, summing to 1.
        quotas: rows or tokens of each source.
    """

    records: list[StageRecord]
    decisions: Decisions
    mixture: Mapping[str, Any] | None
    available: Mapping[str, int]
    weights: Mapping[str, float]
    quotas: Mapping[str, int]


class EmissionStage:
    """Samples the selected rows to the mixture's quotas and writes them, with what explains them.

    Memory: the emitted rows and their compressed files, some copies of one output shard while it is
    written, about 50 bytes a row of the run for selection's decisions, and 4 bytes a row for each
    column that the report charts. Other rows are streamed.
    """

    name = "emission"
    version = 8

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
        """The text, every small column that stages added, and prefixes."""
        own = ("id", "source", "messages", "messages_reflected", "tools", "answer")
        wanted = dict.fromkeys(
            (
                *own,
                "answer_effective",
                "license",
                *provenance_columns(self.present),
                *audited_columns(self.present),
                *APART,
            )
        )
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
            artifacts: folders of earlier stages, in their order; `selection` must be there.

        Returns:
            Table `emitted` (id, source, shard, position, copies); files of data, of prefixes and
            for trainers, `README.md`, `report.html`, `lineage.json`, `croissant.json`,
            `recipe.yaml`; report with rows, tokens, quotas and shortfalls by source.

        Raises:
            StageError: quotas can't be met, nothing is left, or rows don't fit the format.
        """
        plan = self._plan(artifacts)
        order = self._order(columns, plan)
        mixture = plan.mixture
        if mixture is not None and self.recipe.get("mixture"):
            mixture = dict(mixture) | emitted_value(
                columns,
                targets,
                order,
                [plan.decisions.names[code] for code in plan.decisions.source.tolist()],
                mixture,
                MixtureSettings.model_validate(self.recipe["mixture"]),
                self.seed,
                artifacts["mixture"],
            )
        chosen, gathered = self._gathered(columns, plan.decisions, order)
        splits = split_rows(gathered, order, self.settings.validation, self.seed)
        order = np.concatenate(list(splits.values()))
        schema = plan_schema(gathered, self.settings, provenance_columns(self.present))
        metadata = self._metadata(plan.records)
        shards, files = write_shards(gathered, splits, schema, self.settings.shard_bytes, metadata)
        prefixes = prefix_tables(gathered, splits)
        concepts = concept_tables(gathered, splits)
        beside: list[ShardFile] = []
        for folder, tables in (("prefix", prefixes), ("concepts", concepts)):
            more, written = write_lines(folder, tables, self.settings.shard_bytes, metadata)
            beside += more
            files |= written
        facts = self._facts(
            plan,
            targets,
            gathered,
            splits,
            mixture=mixture,
            shards=[*shards, *beside],
            prefix=prefix_facts(prefixes, gathered),
            concepts={split: table.num_rows for split, table in concepts.items()},
            columns=schema.arrow.names,
        )
        trainers = trainer_files(facts.name, schema, facts.splits)
        rejects = rejected_examples(artifacts["ingest"], self.seed) if "ingest" in artifacts else []
        files |= trainers.files
        if concepts:
            files[IDENTITY] = concept_identity(self.recipe, artifacts["dictionary"], facts.models)
        files["README.md"] = card_markdown(facts, self.version, trainers.notes)
        charts = mixture_charts(mixture, artifacts["mixture"]) if mixture is not None else []
        files["report.html"] = report_html(
            facts, gathered, plan.decisions, order, chosen, rejects, _explained(artifacts), charts
        )
        files["lineage.json"] = lineage_json(facts, self.version)
        files["croissant.json"] = croissant_json(facts, schema.arrow)
        files["recipe.yaml"] = recipe_yaml(self.recipe)
        emitted = emitted_table(
            plan.decisions, order, [(shard.name, shard.rows) for shard in shards]
        )
        return Outcome(tables={"emitted.parquet": emitted}, report=_report(facts), files=files)

    def report(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        artifacts: Mapping[str, Store],
        dataset: Store,
    ) -> bytes:
        """`report.html` of a data set that was written, made again from what is there.

        Args:
            columns: of the run.
            targets: rows with a `task`, to be counted.
            artifacts: folders of earlier stages, in their order.
            dataset: the folder that `decide` filled.

        Raises:
            StageError: another version of this stage wrote it.
        """
        lineage = dataset.read_json("lineage.json")
        if lineage["schema"] != SCHEMA:
            raise StageError(
                "emission: another version of tamis wrote this data set; run again with "
                "--restart-from emission",
                stage=self.name,
            )
        plan = self._plan(artifacts)
        emitted = dataset.read_table("emitted.parquet", ["id", "shard"])
        rows = pc.index_in(emitted["id"], value_set=plan.decisions.ids).combine_chunks()
        order = rows.to_numpy().astype(np.int64)
        shards = [ShardFile(**shard) for shard in lineage["shards"]]
        of = {shard.name: shard.split for shard in shards}
        split = np.array([of[name] for name in emitted["shard"].to_pylist()])
        splits = {name: order[split == name] for name in lineage["splits"]}
        chosen, gathered = self._gathered(columns, plan.decisions, order)
        facts = self._facts(
            plan,
            targets,
            gathered,
            splits,
            mixture=lineage["mixture"],
            shards=shards,
            prefix=prefix_facts(prefix_tables(gathered, splits), gathered),
            concepts={
                split: table.num_rows for split, table in concept_tables(gathered, splits).items()
            },
            columns=lineage["columns"],
        )
        rejects = rejected_examples(artifacts["ingest"], self.seed) if "ingest" in artifacts else []
        mixture = lineage["mixture"]
        charts = mixture_charts(mixture, artifacts["mixture"]) if mixture is not None else []
        return report_html(
            facts, gathered, plan.decisions, order, chosen, rejects, _explained(artifacts), charts
        )

    def _plan(self, artifacts: Mapping[str, Store]) -> Plan:
        """Quotas, from what selection and the mixture decided."""
        settings, unit = self.settings, self.settings.unit
        records = read_records(artifacts)
        decisions = read_decisions(artifacts["selection"], unit == "tokens")
        mixture = next((record.report for record in records if record.name == "mixture"), None)
        available = self._available(decisions, repeats=True)
        weights = self._weights(decisions, mixture)
        return Plan(
            records=records,
            decisions=decisions,
            mixture=mixture,
            available=available,
            weights={name: float(share) for name, share in shares(weights).items()},
            quotas=plan_quotas(weights, available, settings.budget, unit),
        )

    def _gathered(
        self, columns: ShardedColumns, decisions: Decisions, order: IntArray
    ) -> tuple[Chosen, Gathered]:
        """The emitted rows and those that the report shows."""
        emitted = np.unique(order)
        own = self._own(decisions)
        searched = searched_rows(decisions, emitted, own, self.seed)
        chosen = Chosen(self._ranked(columns, own), searched)
        needs = self.columns().needs
        return chosen, gather(columns, needs, decisions, emitted, chosen.numbers, self.seed)

    def _facts(
        self,
        plan: Plan,
        targets: ShardedColumns,
        gathered: Gathered,
        splits: Mapping[str, IntArray],
        *,
        mixture: Mapping[str, Any] | None,
        shards: list[ShardFile],
        prefix: PrefixFacts | None,
        concepts: Mapping[str, int],
        columns: list[str],
    ) -> Facts:
        order = np.concatenate(list(splits.values()))
        ingest = next((record.report for record in plan.records if record.name == "ingest"), {})
        return Facts(
            recipe=self.recipe,
            settings=self.settings,
            seed=self.seed,
            sources=source_facts(
                self.recipe,
                ingest,
                plan.decisions,
                plan.weights,
                plan.quotas,
                plan.available,
                order,
                self.settings.unit,
            ),
            stages=plan.records,
            mixture=mixture,
            shards=shards,
            tasks=task_counts(targets),
            licenses=emitted_licenses(gathered, order, self.recipe),
            stated=gathered.licenses,
            models=model_facts(self.recipe, plan.records),
            windows=window_facts(self.recipe, plan.records, gathered),
            splits={
                name: (len(rows), prompt_count(gathered, rows) if len(splits) > 1 else None)
                for name, rows in splits.items()
            },
            prefix=prefix,
            concepts=concepts,
            rewritten=int(gathered.rewritten[order].sum()),
            columns=columns,
        )

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

    def _order(self, columns: ShardedColumns, plan: Plan) -> IntArray:
        """Numbers of the emitted rows, copies included, in the order written."""
        settings, decisions, quotas = self.settings, plan.decisions, plan.quotas
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

    def _own(self, decisions: Decisions) -> npt.NDArray[np.bool_]:
        """Rows that aren't an anchor's, bool [n]."""
        own = np.zeros(len(decisions.keep), dtype=bool)
        for name in decisions.names:
            if name not in self._anchors:
                own |= decisions.of(name)
        return own

    def _ranked(self, columns: ShardedColumns, own: npt.NDArray[np.bool_]) -> Ranked:
        """The hardest and easiest rows of the run, those of anchors left out."""
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


def _explained(artifacts: Mapping[str, Store]) -> Explained:
    """What the explanation stage found; nothing where there is none."""
    store = artifacts.get("explanation")
    if store is None:
        return Explained()
    return Explained(store.read_json(EXPLANATIONS), store.read_json(TOP_ROWS))


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
        "splits": {name: rows for name, (rows, _) in facts.splits.items()},
        "prefix": facts.prefix.as_dict() if facts.prefix else None,
        "warnings": facts.warnings,
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
