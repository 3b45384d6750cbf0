"""The flow: which stages a recipe has, in order, and where the columns that they read come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import Config
from stages.allocation.rollouts import RolloutsStage
from stages.allocation.stage import AllocationStage
from stages.base import FitStage, RowStage, SetStage, check_endpoints
from stages.baselines.readers import Readers
from stages.baselines.stage import BaselinesStage
from stages.baselines.targets import BaselineTargetsStage
from stages.concepts.stage import ConceptsStage
from stages.dictionary.stage import DictionaryStage
from stages.difficulty.stage import DifficultyStage
from stages.embedding.stage import EmbeddingStage
from stages.emission.stage import EmissionStage
from stages.errors import ConfigError
from stages.explanation.stage import ExplanationStage
from stages.extensions import extension_stage
from stages.features.stage import FeaturesStage
from stages.ingest.settings import ContaminationSettings
from stages.mixture.on_device import Device
from stages.mixture.stage import MixtureStage, Supply
from stages.pass_rate.stage import PassRateStage
from stages.prefixes.stage import PrefixesStage
from stages.prototypes.stage import PrototypesStage
from stages.reasoning.stage import ReasoningStage
from stages.reflection.probe import RepliesStage
from stages.reflection.stage import ReflectionStage
from stages.rows import ROWS
from stages.rules import rule_columns
from stages.selection.settings import RESPONSE_REWRITTEN, SelectionSettings
from stages.selection.stage import SelectionStage
from stages.thinking.stage import ThinkingStage
from stages.valuation.potentials import PotentialsStage
from stages.valuation.stage import ValuationStage

ROW_STAGES = (
    "difficulty",
    "thinking",
    "pass_rate",
    "rollouts",
    "reasoning",
    "reflection",
    "prefixes",
    "features",
    "concepts",
    "embedding",
    "baselines",
    "valuation",
)
ORDER = (
    "ingest",
    "difficulty",
    "thinking",
    "pass_rate",
    "allocation",
    "rollouts",
    "reasoning",
    "replies",
    "reflection",
    "prefixes",
    "dictionary",
    "prototypes",
    "features",
    "concepts",
    "embedding",
    "baseline_targets",
    "baselines",
    "potentials",
    "valuation",
    "selection",
    "explanation",
    "mixture",
    "emission",
)

FOLDERS = {"emission": "dataset"}
"""Folders in the run directory that aren't called like their stage."""


def with_extensions(order: Sequence[str], extensions: Sequence[str]) -> list[str]:
    """Names of stages in order, with those of other packages before the first set stage."""
    place = order.index("selection") if "selection" in order else len(order)
    return [*order[:place], *extensions, *order[place:]]


def folder_of(stage: str) -> str:
    """A stage's folder in the run directory."""
    return FOLDERS.get(stage, stage)


@dataclass(frozen=True)
class Flow:
    """The stages of one recipe after ingest, by name, in order."""

    rows: Mapping[str, RowStage]
    fits: Mapping[str, FitStage]
    sets: Mapping[str, SetStage]

    @property
    def names(self) -> list[str]:
        """All stages, ingest included, in order."""
        there = {"ingest", *self.rows, *self.fits, *self.sets}
        own = [name for name in ORDER if name in there]
        return with_extensions(own, [name for name in self.rows if name not in ORDER])

    def read_by(self, name: str) -> set[str]:
        """Row stages whose columns a row or fit stage reads, and `ingest`."""
        stage = self.rows.get(name) or self.fits[name]
        homes = self.home_of(name)
        needs = set(stage.columns().needs)
        if "effective_messages" in needs:
            needs.add("messages_reflected")
        return {"ingest"} | {homes[column] for column in needs if column in homes}

    def home_of(self, before: str) -> dict[str, str]:
        """The stage that adds each column that exists before a stage."""
        homes = dict.fromkeys(ROWS.names, "ingest")
        for name in self.names[: self.names.index(before)]:
            if name in self.rows:
                homes |= dict.fromkeys(self.rows[name].columns().adds.names, name)
        return homes


def flow_of(config: Config) -> Flow:
    """The stages of a recipe, their columns checked against each other.

    Raises:
        ConfigError: a stage or a rule reads a column that nothing before it adds, or a stage needs
            more of a model than an endpoint gives.
    """
    rows: dict[str, RowStage] = {}
    fits: dict[str, FitStage] = {}
    models = config.models
    if config.difficulty:
        rows["difficulty"] = DifficultyStage(config.difficulty, models)
    if config.thinking:
        rows["thinking"] = ThinkingStage(config.thinking, models)
    if config.pass_rate:
        rows["pass_rate"] = PassRateStage(config.pass_rate, models, config.seed)
    if config.pass_rate and config.allocation and config.rollouts:
        fits["allocation"] = AllocationStage(config.allocation, config.pass_rate)
        rows["rollouts"] = RolloutsStage(config.rollouts, config.pass_rate, models, config.seed)
    if config.reasoning:
        rows["reasoning"] = ReasoningStage(config.reasoning, models, config.seed)
    if config.reflection and config.reflection.reply == "auto":
        fits["replies"] = RepliesStage(config.reflection, models, config.seed)
    # What is never emitted needs no new text, and stays as it is trained on.
    anchors = frozenset(source.name for source in config.sources if source.role == "anchor")
    if config.reflection:
        rows["reflection"] = ReflectionStage(
            config.reflection.without_sources(anchors),
            models,
            config.seed,
            difficulty=config.difficulty,
            unseen=_contamination(config),
            sources=config.sources,
        )
    if config.prefixes:
        rows["prefixes"] = PrefixesStage(
            config.prefixes.without_sources(anchors), models, config.seed
        )
    if config.dictionary:
        fits["dictionary"] = DictionaryStage(config.dictionary, models, config.seed)
    if config.features and config.dictionary:
        fits["prototypes"] = PrototypesStage(
            config.features, config.dictionary, models, config.seed
        )
        rows["features"] = FeaturesStage(config.features, config.dictionary, models)
        if config.explanation:
            fits["explanation"] = ExplanationStage(
                config.explanation, config.features, config.dictionary, models, config.seed
            )
    if config.concepts and config.dictionary:
        rows["concepts"] = ConceptsStage(
            config.concepts.without_sources(anchors), config.dictionary, models
        )
    if config.embedding:
        rows["embedding"] = EmbeddingStage(config.embedding, models)
    if config.baselines:
        readers = Readers(config.baselines, config.embedding, models, config.seed)
        if config.baselines.to_targets:
            fits["baseline_targets"] = BaselineTargetsStage(readers)
        rows["baselines"] = BaselinesStage(config.baselines, readers, config.seed)
    if config.valuation:
        fits["potentials"] = PotentialsStage(config.valuation, config.seed)
        rows["valuation"] = ValuationStage(config.valuation)
    for name, section in config.stages.items():
        _add_extension(rows, name, extension_stage(name, section, models, config.seed))
    present = [*ROWS.names, *(n for stage in rows.values() for n in stage.columns().adds.names)]
    flow = Flow(rows, fits, _set_stages(config, tuple(present), anchors))
    asking: dict[str, RowStage | FitStage] = {**rows, **fits}
    for name, one in asking.items():
        check_endpoints(name, one.engines())
    for name, stage in rows.items():
        known = {*flow.home_of(name), "effective_messages"}
        named = set(stage.columns().needs)
        where = rule_columns(stage.settings.where) if stage.settings.where else set()
        absent = sorted((named | where) - known)
        if absent:
            raise ConfigError(
                f"{name} reads the column {absent[0]!r}, which nothing before it adds; "
                f"there are {', '.join(sorted(known))}"
            )
    return flow


def _add_extension(rows: dict[str, RowStage], name: str, stage: RowStage) -> None:
    """Put a stage of another package behind the others.

    Raises:
        ConfigError: it has the name of a stage, or adds a column, that is there already.
    """
    if name in ORDER or name in FOLDERS.values():
        raise ConfigError(f"stages.{name}: {name} is the name of a stage of tamis' own")
    there = {*ROWS.names, *(n for one in rows.values() for n in one.columns().adds.names)}
    twice = sorted(there & set(stage.columns().adds.names))
    if twice:
        raise ConfigError(f"stages.{name} adds the column {twice[0]!r}, which is there already")
    rows[name] = stage


def _set_stages(
    config: Config, present: tuple[str, ...], anchors: frozenset[str]
) -> dict[str, SetStage]:
    sets: dict[str, SetStage] = {
        "selection": SelectionStage(
            _selection(config), anchors, frozenset(present), config.license_policy
        )
    }
    emission = config.emission
    budget = emission.budget_rows if emission.budget_rows else emission.budget_tokens
    if config.mixture:
        names = {source.name for source in config.sources}
        for kind in ("floors", "caps", "keep", "serves"):
            unknown = sorted(set(getattr(config.mixture, kind)) - names)
            if unknown:
                raise ConfigError(
                    f"mixture.{kind} names the source {unknown[0]!r}; there are "
                    f"{', '.join(sorted(names))}"
                )
        supply = Supply(
            budget=float(budget) if budget else None,
            unit="tokens" if emission.budget_tokens else "rows",
            repeats={source.name: float(source.repeats) for source in config.sources},
            anchors=anchors,
        )
        device: Device = "cuda" if config.execution.pass_gpus else "cpu"
        sets["mixture"] = MixtureStage(config.mixture, supply, config.seed, device)
    sets["emission"] = EmissionStage(emission, config.seed, config.portable_recipe, present)
    return sets


def _contamination(config: Config) -> ContaminationSettings | None:
    """How texts that must stay unseen are found; None where there are none."""
    found = config.contamination
    return found if found.sets or (found.targets and config.targets) else None


def _selection(config: Config) -> SelectionSettings:
    """The selection section, with what reflection's asks of it."""
    if not (config.reflection and config.reflection.require_response_rewrite):
        return config.selection
    return config.selection.with_filter(RESPONSE_REWRITTEN)
