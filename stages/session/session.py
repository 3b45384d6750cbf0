"""The session: each stage as a method that takes rows and keywords, and gives rows back."""

from __future__ import annotations

import io
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from stages.allocation.rollouts import RolloutsStage
from stages.allocation.settings import AllocationSettings, RolloutsSettings
from stages.allocation.stage import AllocationStage
from stages.base import UNSEEN, Settings
from stages.baselines.readers import Readers
from stages.baselines.settings import BaselinesSettings
from stages.baselines.stage import BaselinesStage
from stages.baselines.targets import BaselineTargetsStage
from stages.concepts.settings import ConceptsSettings
from stages.concepts.stage import ConceptsStage
from stages.dictionary.settings import DictionarySettings
from stages.dictionary.stage import DictionaryStage
from stages.difficulty.settings import DifficultySettings
from stages.difficulty.stage import DifficultyStage
from stages.embedding.settings import EmbeddingSettings
from stages.embedding.stage import EmbeddingStage
from stages.emission.settings import EmissionSettings
from stages.emission.stage import EmissionStage
from stages.engines.local import make_engine
from stages.errors import ConfigError
from stages.explained import explained
from stages.explanation.settings import ExplanationSettings
from stages.explanation.stage import EXPLAINED, EXPLANATIONS, ExplanationStage
from stages.extensions import extension_stage, stage_class
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
from stages.rows import REJECTS, ROWS, TARGETS
from stages.selection.activation_coverage import ACTIVE
from stages.selection.settings import RESPONSE_REWRITTEN, SelectionSettings
from stages.selection.stage import SelectionStage
from stages.session.keywords import takes
from stages.session.kinds import Rows, same_kind
from stages.session.models import MakeEngine, ModelLike, model_settings
from stages.session.results import Emitted, Fitted, Ingested, Mixed, Selected
from stages.session.runner import Runner, check_columns
from stages.session.sources import facts_of, in_memory, json_lines
from stages.sources.settings import Source, Target
from stages.storage import Store
from stages.thinking.settings import ThinkingSettings
from stages.thinking.stage import ThinkingStage
from stages.valuation.potentials import PotentialsStage
from stages.valuation.settings import ValuationSettings
from stages.valuation.stage import ValuationStage

S = TypeVar("S", bound=BaseModel)

_MODELS = ("student", "teacher", "model", "gradient_model", "judge", "encoder")
"""Fields of settings that name a model."""


class Session(Runner):
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
        self._models = {n: model_settings(n, value) for n, value in (models or {}).items()}
        super().__init__(seed, rows_per_step, progress, make)
        self._sections: dict[str, Settings] = {}
        self._extensions: dict[str, Settings] = {}
        self._sources: dict[str, dict[str, Any]] = {}
        self._pools: list[Source] = []
        self._unseen: ContaminationSettings | None = None
        self._unseen_rows = self._store.child(UNSEEN)
        self._explained: Selected[Any] | None = None

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
        self._sources |= {source.name: facts_of(source) for source in pools}
        known = {source.name for source in pools}
        self._pools = [*(one for one in self._pools if one.name not in known), *pools]
        self._record("ingest", folder, report=report, seconds=time.monotonic() - started)
        kind: Any = next(
            (data for value in sources.values() if (data := in_memory(value)) is not None),
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
        stage = RolloutsStage(drawn, pilot, self._models, self.seed)
        table = self._table(rows)
        self.check(stage, table)
        stores = {"allocation": self.fitted(AllocationStage(shared, pilot), table).store}
        return self.with_columns(stage, rows, stores)

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
            chosen.without_sources(self._anchors),
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
            self.check(stage, table)
            replies = RepliesStage(chosen, self._models, self.seed)
            stores[REPLIES] = self.fitted(replies, table).store
        return self.with_columns(stage, rows, stores)

    @takes(PrefixesSettings)
    def prefixes(self, rows: Rows, **settings: Any) -> Rows:
        """Rows with the first tokens of a model's own solutions, to be trained on."""
        chosen = self._section("prefixes", PrefixesSettings, settings)
        return self.with_columns(
            PrefixesStage(chosen.without_sources(self._anchors), self._models, self.seed), rows
        )

    @takes(DictionarySettings)
    def dictionary(self, pool: object, targets: object = None, **settings: Any) -> Fitted:
        """A sparse autoencoder of the student's residual stream, trained on rows or brought along.

        Args:
            pool: rows; it is trained on a sample of them.
            targets: one that is brought (`path`) is measured on them, and needs them.
            settings: of `dictionary`.
        """
        chosen = self._section("dictionary", DictionarySettings, settings)
        if chosen.path is not None and targets is None:
            raise ConfigError("dictionary: an autoencoder that is brought needs targets too")
        stage = DictionaryStage(chosen, self._models, self.seed)
        return self.fitted(stage, self._table(pool), self._targets(targets))

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
        return replace(fitted, settings=chosen)

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
        dictionary = self._named(prototypes.artifacts["dictionary"])
        stage = FeaturesStage(chosen, dictionary, self._models)
        stores = {name: fitted.store for name, fitted in prototypes.artifacts.items()}
        return self.with_columns(stage, rows, stores | {"prototypes": prototypes.store})

    @takes(ConceptsSettings)
    def concepts(self, rows: Rows, dictionary: Fitted, **settings: Any) -> Rows:
        """Rows with the latents that bear most on what comes after each token.

        Args:
            rows: their text is read forward and backward.
            dictionary: whose latents are meant.
            settings: of `concepts`.
        """
        chosen = self._section("concepts", ConceptsSettings, settings)
        stage = ConceptsStage(
            chosen.without_sources(self._anchors), self._named(dictionary), self._models
        )
        return self.with_columns(stage, rows, {"dictionary": dictionary.store})

    @takes(EmbeddingSettings)
    def embedding(self, rows: Rows, **settings: Any) -> Rows:
        """Rows (or targets) with a sentence vector each."""
        chosen = self._section("embedding", EmbeddingSettings, settings)
        return self.with_columns(EmbeddingStage(chosen, self._models), rows)

    @takes(BaselinesSettings)
    def baselines(self, rows: Rows, targets: object = None, **settings: Any) -> Rows:
        """Rows with the scores that any selection should be compared with.

        Args:
            rows: with sentence vectors, where `embedding` is one of the scores.
            targets: rows with a `task`; the scores that compare rows with targets need them.
            settings: of `baselines`.

        Raises:
            ConfigError: a score needs targets or vectors, and there are none.
        """
        plain = {name: value for name, value in settings.items() if name != "student"}
        unused = () if _valid(BaselinesSettings, plain, "baselines").of_student else ("student",)
        chosen = self._section("baselines", BaselinesSettings, settings, unused)
        vectors = self._sections.get("embedding")
        if "embedding" in chosen.scores and vectors is None:
            raise ConfigError(
                "baselines: embedding compares sentence vectors; call session.embedding first"
            )
        if chosen.to_targets and targets is None:
            raise ConfigError(f"baselines: {chosen.to_targets[0]} compares rows with targets too")
        readers = Readers(
            chosen, cast("EmbeddingSettings | None", vectors), self._models, self.seed
        )
        stage = BaselinesStage(chosen, readers, self.seed)
        stores: dict[str, Store] = {}
        if chosen.to_targets:
            table = self._table(rows)
            self.check(stage, table)
            side = BaselineTargetsStage(readers)
            stores[side.name] = self.fitted(side, table, self._targets(targets)).store
        return self.with_columns(stage, rows, stores)

    @takes(ValuationSettings)
    def valuation(self, rows: Rows, targets: object, **settings: Any) -> Rows:
        """Rows with what each adds to the nearness of the pool, or of a selection, to the targets.

        Args:
            rows: with sentence vectors; the transport is solved on a sample of them.
            targets: with sentence vectors and a `task`.
            settings: of `valuation`.
        """
        chosen = self._section("valuation", ValuationSettings, settings)
        stage = ValuationStage(chosen)
        table = self._table(rows)
        self.check(stage, table)
        solved = self.fitted(PotentialsStage(chosen, self.seed), table, self._targets(targets))
        return self.with_columns(stage, rows, {solved.name: solved.store})

    def extension(self, rows: Rows, name: str, /, **settings: Any) -> Rows:
        """Rows with the columns of a stage that another package offers.

        Args:
            rows: with the columns that it reads.
            name: of its entry point in the group `tamis.stages`.
            settings: its own.

        Raises:
            ConfigError: no installed package offers it, or a setting is wrong.
        """
        chosen = self._chosen(name, stage_class(name).Settings, settings)
        stage = extension_stage(name, chosen.model_dump(), self._models, self.seed)
        self._extensions[name] = chosen
        return self.with_columns(stage, rows)

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
        goals = self._targets(targets)
        if ACTIVE in table.column_names:
            if targets is None:
                none = pa.array([], table.schema.field(ACTIVE).type)
                goals = goals.append_column(ACTIVE, none)
            check_columns("selection", goals, {"task", ACTIVE}, "these targets")
        tables, report, _ = self._decided(stage, table, goals)
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

    @takes(ExplanationSettings)
    def explanation(self, selected: Selected[Rows], prototypes: Fitted, **settings: Any) -> Rows:
        """Some of the kept rows, with the latents that make each similar to its nearest task.

        The report of a data set that is emitted from this selection shows them.

        Args:
            selected: rows with the columns of `features`.
            prototypes: what they were compared with.
            settings: of `explanation`.

        Returns:
            `id`, `source`, `task`, `similarity`, and `latents`, strongest first, each with its
            share of what row and task have in common, and the tokens where it is most active.
        """
        chosen = self._section("explanation", ExplanationSettings, settings)
        features = cast(FeaturesSettings, prototypes.settings)
        dictionary = self._named(prototypes.artifacts["dictionary"])
        stage = ExplanationStage(chosen, features, dictionary, self._models, self.seed)
        read = {**prototypes.artifacts, prototypes.name: prototypes}
        decided = {"selection": self._written_decisions(selected)}
        made = self.fitted(stage, selected.table, artifacts=read, stores=decided)
        self._explained = selected
        explained = made.store.read_json(EXPLANATIONS)
        return same_kind(selected.kept, pa.Table.from_pylist(explained, EXPLAINED))

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
        goals = self._targets(targets)
        check_columns("mixture", goals, {"task", "embedding"}, "these targets")
        decided = self._written_decisions(selected)
        tables, report, _ = self._decided(stage, selected.table, goals, {"selection": decided})
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
        if self._explained is not selected:
            stores.pop("explanation", None)
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

    def _named(self, dictionary: Fitted) -> DictionarySettings:
        """The settings of a dictionary, which is the one that a card names from now on."""
        settings = cast(DictionarySettings, dictionary.settings)
        self._sections["dictionary"] = settings
        self._records["dictionary"] = dictionary.store
        return settings

    def _section(
        self, name: str, section: type[S], given: Mapping[str, Any], unused: Collection[str] = ()
    ) -> S:
        """A stage's settings, kept for the card."""
        chosen = self._chosen(name, section, given, unused)
        self._sections[name] = cast(Settings, chosen)
        return chosen

    def _chosen(
        self, name: str, section: type[S], given: Mapping[str, Any], unused: Collection[str] = ()
    ) -> S:
        """Settings; models that they name by a reference become models of the session.

        Args:
            name: of the stage.
            section: their class.
            given: their values.
            unused: fields whose models won't be asked.
        """
        values = dict(given)
        for role in _MODELS:
            if role in section.model_fields and (role in given or role not in unused):
                value = values.get(role, section.model_fields[role].default)
                if value is not None:
                    values[role] = self._model_name(name, role, value, given=role in values)
        return _valid(section, values, name)

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

    def _source(self, kind: type[Any], name: str, value: Any) -> Any:
        fields = dict(value) if isinstance(value, Mapping) else {"path": value}
        data = in_memory(value)
        if data is not None:
            fields.pop("data", None)
            lines = json_lines(name, data)
            folder = self._folder("sources")
            # Called otherwise than its source, so that it is never taken for a file of the
            # catalogue.
            file = f"{name}-in-memory.jsonl"
            folder.write_bytes(file, lines)
            fields["path"] = f"{folder.url}/{file}"
        return _valid(kind, {"name": name, **fields}, f"source {name}")

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

    def _written_decisions(self, selected: Selected[Any]) -> Store:
        folder = self._folder("selection")
        folder.write_table("decisions.parquet", selected.decisions)
        folder.write_json("manifest.json", {"report": selected.report})
        return folder

    def _recipe(self, name: str, selected: Selected[Any], mixture: Mixed | None) -> dict[str, Any]:
        """What this session did, as a recipe says it."""
        names = pc.unique(selected.decisions["source"].cast(pa.string())).to_pylist()
        every = dict.fromkeys([*self._sources, *sorted(names)])
        chosen = dict(self._sections)
        chosen.pop("mixture", None)
        if mixture is not None:
            chosen["mixture"] = mixture.settings
        if self._explained is not selected:
            chosen.pop("explanation", None)
        sections = {part: settings.model_dump(mode="json") for part, settings in chosen.items()}
        if self._extensions:
            sections["stages"] = {
                stage: settings.model_dump(mode="json")
                for stage, settings in self._extensions.items()
            }
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


def _valid(section: type[S], values: Mapping[str, Any], what: str) -> S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explained(error, what, section)) from error


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def _parts(folder: Store, schema: pa.Schema) -> pa.Table:
    names = [name for name in folder.names() if name.startswith("part-")]
    tables = [folder.read_table(name).cast(schema) for name in names]
    return pa.concat_tables([schema.empty_table(), *tables]).unify_dictionaries()
