"""The session: each stage as a method that takes rows and keywords, and gives rows back."""

from __future__ import annotations

import io
import json
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from stages.allocation.rollouts import RolloutsStage
from stages.allocation.settings import AllocationSettings, RolloutsSettings
from stages.allocation.stage import AllocationStage
from stages.base import (
    UNSEEN,
    Checked,
    FitStage,
    RowSettings,
    RowStage,
    SetStage,
    Settings,
    check_endpoints,
    checked_columns,
)
from stages.dictionary.settings import DictionarySettings
from stages.dictionary.stage import DictionaryStage
from stages.difficulty.settings import DifficultySettings
from stages.difficulty.stage import DifficultyStage
from stages.embedding.settings import EmbeddingSettings
from stages.embedding.stage import EmbeddingStage
from stages.emission.settings import EmissionSettings
from stages.emission.stage import EmissionStage
from stages.engines.local import make_engine
from stages.engines.model_files import model_identity
from stages.errors import ConfigError
from stages.explained import explained
from stages.features.settings import FeaturesSettings
from stages.features.stage import FeaturesStage
from stages.ingest import ingest
from stages.ingest.settings import ContaminationSettings, IngestSettings
from stages.licenses import LicensePolicy
from stages.mixture.settings import MixtureSettings
from stages.mixture.stage import MixtureStage, Supply
from stages.pass_rate.settings import PassRateSettings
from stages.pass_rate.stage import PassRateStage
from stages.prefixes.settings import PrefixesSettings
from stages.prefixes.stage import PrefixesStage
from stages.prototypes.stage import PrototypesStage
from stages.reasoning.settings import ReasoningSettings
from stages.reasoning.stage import ReasoningStage
from stages.reflection.probe import REPLIES, RepliesStage
from stages.reflection.settings import ReflectionSettings
from stages.reflection.stage import ReflectionStage
from stages.requests import lowest_keys, not_requested_columns, requested_rows
from stages.rows import REJECTS, ROWS, TARGETS
from stages.rules import rule_columns, rule_mask
from stages.selection.settings import RESPONSE_REWRITTEN, SelectionSettings
from stages.selection.stage import SelectionStage
from stages.session.background import BackgroundLoop
from stages.session.keywords import takes
from stages.session.kinds import Rows, arrow_table, is_rows, same_kind
from stages.session.memory import MemoryColumns, view_of
from stages.session.models import MakeEngine, ModelLike, OpenModels, model_settings
from stages.session.results import Emitted, Fitted, Ingested, Mixed, Selected
from stages.sources.settings import Source, Target
from stages.storage import Store
from stages.thinking.settings import ThinkingSettings
from stages.thinking.stage import ThinkingStage

S = TypeVar("S", bound=BaseModel)

_MODELS = ("student", "teacher", "model", "gradient_model", "judge", "encoder")
"""Fields of settings that name a model."""

_ADDED_BY = {
    **dict.fromkeys(ROWS.names, "ingest"),
    "pass_rate": "pass_rate",
    "rollout_verdicts": "pass_rate",
    "embedding": "embedding",
    "similarity": "features",
}
"""What to call for a column that rows lack."""


class Session:
    """What stages share while rows are worked on in memory: models, a seed, and where they write.

    Rows are an Arrow table, a pandas frame, a list of dicts or a `datasets.Dataset`, and come back
    as the same. Every method takes a stage's settings as keywords, under the names that they have
    in a recipe. A row stage adds columns and never drops a row: one that it can't process has nulls
    and a status with the reason. Models are loaded when they are first asked for and kept; stages
    that name the same one share it.

    Close a session, or use it in `with`: models are freed, and its temporary files removed.
    """

    def __init__(
        self,
        models: Mapping[str, ModelLike] | None = None,
        *,
        seed: int = 0,
        rows_per_step: int = 32,
        progress: bool = True,
        make: MakeEngine = make_engine,
    ) -> None:
        """Open nothing yet.

        Args:
            models: by the name that stages call them (`student`, `teacher`, `encoder` by default):
                a reference, or the fields of a recipe's `models` entry.
            seed: every sample and generation is drawn from it.
            rows_per_step: rows that a stage processes at a time; progress moves as often. Scores
                differ between sizes by rounding alone.
            progress: show a bar for every stage.
            make: makes an engine of a kind for a model.

        Raises:
            ConfigError: a model's fields are wrong.
        """
        self.seed = seed
        self._step, self._progress = rows_per_step, progress
        self._models = {n: model_settings(n, value) for n, value in (models or {}).items()}
        folder = tempfile.TemporaryDirectory(prefix="tamis-")
        self._store = Store(folder.name)
        self._loop = BackgroundLoop()
        self._open = OpenModels(self._store.child("generations"), make)
        self._types: dict[str, pa.DataType] = dict(zip(TARGETS.names, TARGETS.types, strict=True))
        self._sections: dict[str, Settings] = {}
        self._records: dict[str, Store] = {}
        self._sources: dict[str, dict[str, Any]] = {}
        self._pools: list[Source] = []
        self._unseen: ContaminationSettings | None = None
        self._unseen_rows = self._store.child(UNSEEN)
        self._made = 0
        self._end = weakref.finalize(self, _end, self._open, self._loop, folder)

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Free the models and remove temporary files; the session can't be used again."""
        self._end()

    def load_models(self, stage: RowStage | FitStage) -> None:
        """Load the models of a stage, where they aren't yet."""
        self._check(stage)
        self._open.loaded(stage.engines())

    def free_models(self) -> None:
        """Free the models and keep the rest; what asks next loads its own again."""
        self._open.close()

    @takes(IngestSettings)
    def ingest(
        self,
        sources: Mapping[str, Any],
        targets: Mapping[str, Any] | None = None,
        *,
        contamination: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Ingested[Any]:
        """Rows of one form from sources of many; bad records, duplicates and leaks are rejected.

        Called again, it adds sources; what was to stay unseen stays so. Rows of different calls
        aren't compared with each other.

        Args:
            sources: by name, each a path or URL, a list of them, rows in memory, or the fields of a
                recipe's source with `path`, or with rows under `data`.
            targets: the same for targets.
            contamination: the recipe's section: evaluation sets, and what counts as overlap.
            settings: of `ingest`.

        Returns:
            The kind that the first rows in memory are of; Arrow tables where all are files.

        Raises:
            ConfigError: a file isn't there, or a setting is wrong.
            StageError: a source lost more records than it may, or all of its rows.
        """
        started = time.monotonic()
        chosen = self._section("ingest", IngestSettings, settings)
        unseen = _valid(ContaminationSettings, dict(contamination or {}), "contamination")
        pools = [self._source(Source, name, value) for name, value in sources.items()]
        goals = [self._source(Target, name, value) for name, value in (targets or {}).items()]
        folder = self._folder("ingest")
        report = ingest(pools, goals, chosen, folder, contamination=unseen).as_dict()
        if unseen.sets or (unseen.targets and goals):
            self._keep_unseen(unseen, folder.child(UNSEEN))
        self._sources |= {source.name: _facts_of(source) for source in pools}
        known = {source.name for source in pools}
        self._pools = [*(one for one in self._pools if one.name not in known), *pools]
        self._record("ingest", folder, report=report, seconds=time.monotonic() - started)
        kind: Any = next(
            (data for value in sources.values() if (data := _in_memory(value)) is not None),
            ROWS.empty_table(),
        )
        return Ingested(
            same_kind(kind, _parts(folder, ROWS)),
            same_kind(kind, _parts(folder.child("targets"), TARGETS)),
            same_kind(kind, _parts(folder.child("rejects"), REJECTS)),
            report,
        )

    @takes(DifficultySettings)
    def difficulty(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with IFD: how hard each is for the student before any tuning."""
        chosen = self._section("difficulty", DifficultySettings, settings)
        return self.with_columns(DifficultyStage(chosen, self._models), rows)

    @takes(ThinkingSettings)
    def thinking(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with whether an adaptive-thinking model would think about them."""
        chosen = self._section("thinking", ThinkingSettings, settings)
        return self.with_columns(ThinkingStage(chosen, self._models), rows)

    @takes(PassRateSettings)
    def pass_rate(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with the share of a model's own answers that are correct."""
        chosen = self._section("pass_rate", PassRateSettings, settings)
        return self.with_columns(PassRateStage(chosen, self._models, self.seed), rows)

    @takes(AllocationSettings, RolloutsSettings)
    def rollouts(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with further rollouts, of a budget that is shared out where they tell most.

        Args:
            rows: with the columns of `pass_rate`, which this session computed.
            settings: of `allocation` and of `rollouts`.

        Raises:
            ConfigError: this session computed no pass rate.
        """
        pilot = self._sections.get("pass_rate")
        if not isinstance(pilot, PassRateSettings):
            raise ConfigError("rollouts goes on from pass_rate; call session.pass_rate first")
        own = {k: settings.pop(k) for k in RolloutsSettings.model_fields if k in settings}
        shared = self._section("allocation", AllocationSettings, settings)
        drawn = self._section("rollouts", RolloutsSettings, own)
        table = self._table(rows)
        stores = {"allocation": self.fitted(AllocationStage(shared, pilot), table).store}
        return self.with_columns(RolloutsStage(drawn, pilot, self._models, self.seed), rows, stores)

    @takes(ReasoningSettings)
    def reasoning(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with the structure of their chains of thought, as a judge sees it."""
        chosen = self._section("reasoning", ReasoningSettings, settings)
        return self.with_columns(ReasoningStage(chosen, self._models, self.seed), rows)

    @takes(ReflectionSettings)
    def reflection(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with a teacher's rewrites, where the student's verdict lets them stand.

        No rewrite may bring in a text of the targets or evaluation sets that this session ingested.
        """
        chosen = self._section("reflection", ReflectionSettings, settings)
        table = self._table(rows)
        scored = self._sections.get("difficulty")
        has_losses = {"loss_conditional", "response_tokens"} <= set(table.column_names)
        stage = ReflectionStage(
            chosen,
            self._models,
            self.seed,
            difficulty=scored if isinstance(scored, DifficultySettings) and has_losses else None,
            unseen=self._unseen,
            sources=self._pools if "file" in table.column_names else (),
        )
        stores: dict[str, Store] = {}
        if self._unseen is not None:
            stores[UNSEEN] = self._unseen_rows
        if REPLIES in stage.artifacts():
            replies = RepliesStage(chosen, self._models, self.seed)
            stores[REPLIES] = self.fitted(replies, table).store
        return self.with_columns(stage, rows, stores)

    @takes(PrefixesSettings)
    def prefixes(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with the first tokens of a model's own solutions, to be trained on."""
        chosen = self._section("prefixes", PrefixesSettings, settings)
        return self.with_columns(PrefixesStage(chosen, self._models, self.seed), rows)

    @takes(DictionarySettings)
    def dictionary(self, rows: object, targets: object = None, **settings: Any) -> Fitted:
        """A sparse autoencoder of the student's residual stream, trained on rows or brought along.

        Args:
            rows: it is trained on a sample of them.
            targets: one that is brought (`path`) is measured on them, and needs them.
            settings: of `dictionary`.
        """
        chosen = self._section("dictionary", DictionarySettings, settings)
        if chosen.path is not None and targets is None:
            raise ConfigError("dictionary: an autoencoder that is brought needs targets too")
        stage = DictionaryStage(chosen, self._models, self.seed)
        return self.fitted(stage, self._table(rows), self._targets(targets))

    @takes(FeaturesSettings, leave=("where", "limit"))
    def prototypes(
        self, rows: object, targets: object, dictionary: Fitted, **settings: Any
    ) -> Fitted:
        """What the targets activate.

        Args:
            rows: how often latents are active is counted on a sample of them, where it is asked.
            targets: rows with a `task`.
            dictionary: whose latents are meant.
            settings: of `features`.
        """
        chosen = self._section("features", FeaturesSettings, settings)
        made = cast(DictionarySettings, dictionary.settings)
        stage = PrototypesStage(chosen, made, self._models, self.seed)
        fitted = self.fitted(
            stage, self._table(rows), self._targets(targets), {"dictionary": dictionary}
        )
        return Fitted(fitted.name, fitted.report, fitted.store, chosen, fitted.artifacts)

    def features(
        self,
        rows: Rows,
        prototypes: Fitted,
        *,
        where: str | None = None,
        limit: int | None = None,
    ) -> Rows:
        """Rows with their similarity to the targets by what both activate.

        Args:
            rows: rows or targets.
            prototypes: what the targets activate; its settings are used.
            where: rule over columns; other rows get nulls.
            limit: at most this many rows.
        """
        asked = {"where": where, "limit": limit}
        settings = cast(FeaturesSettings, prototypes.settings).model_dump() | asked
        chosen = self._section("features", FeaturesSettings, settings)
        dictionary = prototypes.artifacts["dictionary"]
        stage = FeaturesStage(chosen, cast(DictionarySettings, dictionary.settings), self._models)
        stores = {"dictionary": dictionary.store, "prototypes": prototypes.store}
        return self.with_columns(stage, rows, stores)

    @takes(EmbeddingSettings)
    def embedding(self, rows: Rows, **settings: Any) -> Rows:
        """Rows (or targets) with a sentence vector each."""
        chosen = self._section("embedding", EmbeddingSettings, settings)
        return self.with_columns(EmbeddingStage(chosen, self._models), rows)

    @takes(SelectionSettings)
    def selection(
        self,
        pool: Rows,
        targets: object = None,
        *,
        license_policy: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Selected[Rows]:
        """What is kept and what is dropped, with a reason for every row.

        Args:
            pool: rows with the columns that its rules and score name.
            targets: with features, to report which of their features kept rows cover.
            license_policy: the recipe's section; others' rows are dropped.
            settings: of `selection`.
        """
        chosen = self._section("selection", SelectionSettings, settings)
        reflection = self._sections.get("reflection")
        if isinstance(reflection, ReflectionSettings) and reflection.require_response_rewrite:
            chosen = chosen.with_filter(RESPONSE_REWRITTEN)
        policy = None
        if license_policy is not None:
            policy = _valid(LicensePolicy, dict(license_policy), "license_policy")
        table = self._table(pool)
        stage = SelectionStage(chosen, self._anchors, frozenset(table.column_names), policy)
        tables, report, _ = self._decided(stage, table, self._targets(targets))
        decisions = tables["decisions.parquet"]
        keep = decisions["keep"]
        dropped = table.append_column("reason", decisions["reason"]).filter(pc.invert(keep))
        return Selected(
            kept=same_kind(pool, table.filter(keep)),
            dropped=same_kind(pool, dropped),
            decisions=decisions,
            report=report,
            table=table,
            policy=policy,
        )

    @takes(MixtureSettings)
    def mixture(
        self,
        selected: Selected[Any],
        targets: object,
        *,
        budget_rows: int | None = None,
        budget_tokens: int | None = None,
        **settings: Any,
    ) -> Mixed:
        """Shares of sources that bring what is emitted near the targets, with bounds on how near.

        Args:
            selected: rows with embeddings.
            targets: with embeddings.
            budget_rows: how many rows will be emitted; a source's share is capped by what it has.
            budget_tokens: the same in tokens.
            settings: of `mixture`.
        """
        budget = _given(budget_rows=budget_rows, budget_tokens=budget_tokens)
        _valid(EmissionSettings, budget, "mixture")
        chosen = self._section("mixture", MixtureSettings, settings)
        supply = Supply(
            budget=float(next(iter(budget.values()))) if budget else None,
            unit="tokens" if "budget_tokens" in budget else "rows",
            repeats={name: float(source["repeats"]) for name, source in self._sources.items()},
            anchors=self._anchors,
        )
        stage = MixtureStage(chosen, supply, self.seed)
        decided = self._written_decisions(selected)
        tables, report, _ = self._decided(
            stage, selected.table, self._targets(targets), {"selection": decided}
        )
        return Mixed(report["weights"], report, tables["weights.parquet"], chosen, budget)

    @takes(EmissionSettings)
    def emission(
        self,
        selected: Selected[Rows],
        targets: object = None,
        mixture: Mixed | None = None,
        *,
        name: str = "dataset",
        **settings: Any,
    ) -> Emitted[Rows]:
        """The data set: a sample of the kept rows by the mixture's shares, with card and report.

        Args:
            selected: the rows.
            targets: for the report, and with a mixture for the value of what is emitted.
            mixture: shares of the sources; None: as many of each as were kept. Its budget holds.
            name: of the data set, in its card.
            settings: of `emission`.

        Raises:
            ConfigError: another budget is given than the mixture was made for.
        """
        budget = dict(mixture.budget) if mixture else {}
        asked = _given(**{k: settings.get(k) for k in ("budget_rows", "budget_tokens")})
        if budget and asked and asked != budget:
            raise ConfigError(f"emission: {asked} isn't the budget of the mixture, {budget}")
        chosen = self._section("emission", EmissionSettings, {**settings, **budget})
        table = selected.table
        found = self._targets(targets)
        recipe = self._recipe(name, selected, mixture)
        stage = EmissionStage(chosen, self.seed, recipe, tuple(table.column_names))
        stores = dict(self._records)
        for later in ("selection", "mixture", "emission"):
            stores.pop(later, None)
        stores["selection"] = self._written_decisions(selected)
        if mixture is not None:
            folder = self._folder("mixture")
            folder.write_json("manifest.json", {"report": mixture.report})
            stores["mixture"] = folder
        tables, report, files = self._decided(stage, table, found, stores)
        shards = [data for file, data in sorted(files.items()) if file.startswith("data/")]
        written = [pq.read_table(io.BytesIO(data)) for data in shards]
        out = same_kind(selected.kept, pa.concat_tables(written).replace_schema_metadata(None))
        return Emitted(out, report, files, tables["emitted.parquet"])

    @property
    def _anchors(self) -> frozenset[str]:
        return frozenset(n for n, source in self._sources.items() if source["role"] == "anchor")

    def _section(self, name: str, section: type[S], given: Mapping[str, Any]) -> S:
        """A stage's settings; models that it names by a reference become models of the session."""
        values = dict(given)
        for role in _MODELS:
            if role in section.model_fields:
                value = values.get(role, section.model_fields[role].default)
                if value is not None:
                    values[role] = self._model_name(name, role, value, given=role in values)
        chosen = _valid(section, values, name)
        self._sections[name] = cast(Settings, chosen)
        return chosen

    def _model_name(self, stage: str, role: str, value: Any, *, given: bool) -> str:
        if isinstance(value, str) and value in self._models:
            return value
        if not given:
            raise ConfigError(
                f"{stage} needs a model as its {role}; give {role}=REFERENCE, or open the session "
                f"with models={{{value!r}: REFERENCE}}"
            )
        settings = model_settings(role, value)
        for name in (role, *(f"{role}_{number}" for number in range(2, 1000))):
            if self._models.setdefault(name, settings) == settings:
                return name
        raise ConfigError(f"{stage}: this session has used a thousand models as {role}")

    def _keep_unseen(self, settings: ContaminationSettings, rows: Store) -> None:
        """Add what one ingest compared with to what rewrites must not hold, by the strictest rule.

        Args:
            settings: of that ingest.
            rows: its folder of unseen rows.
        """
        known = self._unseen or settings
        self._unseen = settings.model_copy(
            update={name: min(getattr(known, name), getattr(settings, name))
                    for name in ("ngram", "short")}
        )  # fmt: skip
        for name in rows.names():
            if name.startswith("part-"):
                copy = name.replace("part-", f"part-{self._made:04}-", 1)
                self._unseen_rows.write_bytes(copy, rows.read_bytes(name))

    def _source(self, kind: type[Any], name: str, value: Any) -> Any:
        fields = dict(value) if isinstance(value, Mapping) else {"path": value}
        data = _in_memory(value)
        if data is not None:
            fields.pop("data", None)
            fields["path"] = self._written_records(name, data)
        return _valid(kind, {"name": name, **fields}, f"source {name}")

    def _written_records(self, name: str, data: Any) -> str:
        """The path of a file with rows in memory as JSON lines."""
        try:
            listed = data if isinstance(data, list | tuple) else arrow_table(data, {}).to_pylist()
            lines = [_json_line(record) for record in listed]
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"source {name}: a text holds a lone surrogate, which no Arrow column can "
                f"({error}); give the rows as a list of dicts (frame.to_dict('records')) to have "
                "it rejected"
            ) from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"source {name}: a record can't be written as JSON: {error}") from (
                error
            )
        folder = self._folder("sources")
        # Called otherwise than its source, so that it is never taken for a file of the catalogue.
        file = f"{name}-in-memory.jsonl"
        folder.write_bytes(file, b"".join(lines))
        return f"{folder.url}/{file}"

    def _table(self, rows: object) -> pa.Table:
        return arrow_table(rows, self._types)

    def _targets(self, targets: object) -> pa.Table:
        return TARGETS.empty_table() if targets is None else self._table(targets)

    def with_columns(
        self, stage: RowStage, rows: Rows, stores: Mapping[str, Store] | None = None
    ) -> Rows:
        """The rows with any row stage's columns; those that it had added before are replaced.

        Args:
            stage: such as one that is no method here.
            rows: with the columns that it reads.
            stores: folders of the artifacts that it reads, by name.
        """
        self._check(stage)
        started = time.monotonic()
        adds = stage.columns().adds
        table = self._table(rows)
        settings = stage.settings
        named = rule_columns(settings.where) if settings.where else set()
        _check_columns(stage.name, table, {"id", *stage.columns().needs, *named})
        asked = pa.array(self._requested(settings, table), pa.bool_())
        view = view_of(table, list(dict.fromkeys(("id", *stage.columns().needs))))
        chosen = view.filter(asked)
        pieces: list[pa.Table] = []
        with self._bar(stage.name, chosen.num_rows) as moved:
            engines = self._open.loaded(stage.engines()) if chosen.num_rows else {}
            for start in range(0, chosen.num_rows, self._step):
                part = chosen.slice(start, self._step)
                made = self._loop.result(stage.process(part, engines, stores or {}))
                pieces.append(checked_columns(stage.name, part.num_rows, adds, made))
                moved(part.num_rows)
        pieces.append(not_requested_columns(stage.name, adds, table.num_rows - chosen.num_rows))
        places = pc.sort_indices(pc.invert(asked).cast(pa.int8()))
        made = pa.concat_tables(pieces).unify_dictionaries().take(pc.sort_indices(places))
        self._types |= dict(zip(adds.names, adds.types, strict=True))
        kept = table.drop_columns([name for name in adds.names if name in table.column_names])
        for field in adds:
            kept = kept.append_column(field, made[field.name])
        if "task" not in table.column_names:
            statuses = made[f"{stage.name}_status"].to_pylist()
            self._record(
                stage.name,
                self._folder(stage.name),
                stage=stage,
                counts=dict(Counter(_code(status) for status in statuses)),
                rows_computed=chosen.num_rows,
                seconds=time.monotonic() - started,
            )
        return same_kind(rows, kept)

    def _requested(self, settings: RowSettings, table: pa.Table) -> list[bool]:
        where, limit, highest = settings.where, settings.limit, None
        if limit is not None:
            met = table.filter(rule_mask(where, table)) if where else table
            keys = lowest_keys(met["id"].to_pylist(), self.seed, limit)
            highest = keys[-1] if keys else 0
        return requested_rows(table, where, highest, self.seed)

    def fitted(
        self,
        stage: FitStage,
        rows: pa.Table,
        targets: pa.Table | None = None,
        artifacts: Mapping[str, Fitted] | None = None,
    ) -> Fitted:
        """What any fit stage makes of rows.

        Args:
            stage: such as one that is no method here.
            rows: an Arrow table.
            targets: rows with a `task`; None: none.
            artifacts: what it reads, by the name of the stage that made it.
        """
        self._check(stage)
        started = time.monotonic()
        goals = TARGETS.empty_table() if targets is None else targets
        _check_columns(stage.name, rows, {*stage.columns().needs})
        found = artifacts or {}
        with self._bar(stage.name, None) as moved:
            engines = self._open.loaded(stage.engines())
            made = self._loop.result(
                stage.fit(
                    MemoryColumns(rows, self._step, moved),
                    MemoryColumns(goals, self._step, moved),
                    engines,
                    {name: fitted.store for name, fitted in found.items()},
                )
            )
        folder = self._folder(stage.name)
        for name, data in made.files.items():
            folder.write_bytes(name, data)
        record = self._folder(stage.name)
        seconds = time.monotonic() - started
        self._record(stage.name, record, stage=stage, report=made.report, seconds=seconds)
        return Fitted(stage.name, made.report, folder, stage.settings, found)

    def _decided(
        self,
        stage: SetStage,
        rows: pa.Table,
        targets: pa.Table,
        stores: Mapping[str, Store] | None = None,
    ) -> tuple[Mapping[str, pa.Table], Mapping[str, Any], Mapping[str, bytes]]:
        _check_columns(stage.name, rows, {*stage.columns().needs})
        with self._bar(stage.name, None) as moved:
            outcome = stage.decide(
                MemoryColumns(rows, self._step, moved),
                MemoryColumns(targets, self._step, moved),
                stores or {},
            )
        return outcome.tables, outcome.report, outcome.files

    def _check(self, stage: RowStage | FitStage) -> None:
        """Refuse what can't work before a model is loaded."""
        check_endpoints(stage.name, stage.engines())
        if isinstance(stage, Checked):
            stage.check()

    def _folder(self, name: str) -> Store:
        """A folder that nothing was written to yet."""
        self._made += 1
        return self._store.child(f"{self._made:04}-{name}")

    def _record(
        self, name: str, folder: Store, stage: RowStage | FitStage | None = None, **facts: Any
    ) -> None:
        """Keep what a data set's card says of a stage."""
        specs = stage.engines() if stage is not None else {}
        identity = {
            "version": stage.version if stage is not None else None,
            "models": {
                role: {
                    "settings": spec.settings.portable(),
                    "weights": f"endpoint:{spec.settings.endpoint.known_as}:{spec.settings.model}"
                    if spec.settings.endpoint
                    else model_identity(spec.settings.model),
                }
                for role, spec in specs.items()
            },
        }
        folder.write_json("identity.json", identity)
        folder.write_json("manifest.json", facts)
        self._records[name] = folder

    def _written_decisions(self, selected: Selected[Any]) -> Store:
        folder = self._folder("selection")
        folder.write_table("decisions.parquet", selected.decisions)
        folder.write_json("manifest.json", {"report": selected.report})
        return folder

    def _recipe(self, name: str, selected: Selected[Any], mixture: Mixed | None) -> dict[str, Any]:
        """What this session did, as a recipe says it."""
        names = pc.unique(selected.decisions["source"].cast(pa.string())).to_pylist()
        every = dict.fromkeys([*self._sources, *sorted(names)])
        sections = {
            section: settings.model_dump(mode="json")
            for section, settings in self._sections.items()
            if section != "mixture" or mixture is not None
        }
        if mixture is not None:
            sections["mixture"] = mixture.settings.model_dump(mode="json")
        return {
            "name": name,
            "seed": self.seed,
            "sources": [self._sources.get(one, {"name": one}) for one in every],
            "models": {
                model: value.portable() | {"terms": value.terms}
                for model, value in self._models.items()
            },
            "license_policy": selected.policy.model_dump(mode="json") if selected.policy else None,
            **sections,
        }

    @contextmanager
    def _bar(self, name: str, rows: int | None) -> Iterator[Any]:
        from tqdm.auto import tqdm

        with tqdm(desc=name, total=rows, unit=" rows", disable=not self._progress) as bar:
            yield bar.update


def _end(
    models: OpenModels, loop: BackgroundLoop, folder: tempfile.TemporaryDirectory[str]
) -> None:
    models.close()
    loop.close()
    folder.cleanup()


def _valid(section: type[S], values: Mapping[str, Any], what: str) -> S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explained(error, what, section)) from error


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def _in_memory(value: Any) -> Any:
    """The rows that a source is given as; None where it is files."""
    if isinstance(value, Mapping):
        return value.get("data")
    return value if is_rows(value) else None


def _json_line(record: Any) -> bytes:
    """A record as a line of JSON; lone surrogates are escaped, for ingest to find and reject.

    Raises:
        TypeError: a value is of no type that JSON has.
        ValueError: a number isn't finite.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        line = json.dumps(record, allow_nan=False).encode()
    return line + b"\n"


def _facts_of(source: Source) -> dict[str, Any]:
    paths = [
        path if "://" in path else path.rstrip("/").rpartition("/")[2] for path in source.paths
    ]
    return source.model_dump(mode="json") | {"path": paths}


def _parts(folder: Store, schema: pa.Schema) -> pa.Table:
    names = [name for name in folder.names() if name.startswith("part-")]
    tables = [folder.read_table(name).cast(schema) for name in names]
    return pa.concat_tables([schema.empty_table(), *tables]).unify_dictionaries()


def _check_columns(stage: str, table: pa.Table, needs: set[str]) -> None:
    if "effective_messages" in needs:
        needs = (needs - {"effective_messages"}) | {"messages"}
    absent = sorted(needs - set(table.column_names))
    if absent:
        first = absent[0]
        hint = f"; session.{_ADDED_BY[first]} adds it" if first in _ADDED_BY else ""
        raise ConfigError(
            f"{stage} reads the column {first!r}, which these rows don't have{hint}; they have "
            f"{', '.join(table.column_names)}"
        )


def _code(status: str) -> str:
    """A status without what belongs to one row alone."""
    return ": ".join(status.split(": ")[:2]) if status.startswith("failed") else status
