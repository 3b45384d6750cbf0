"""Facts that bear on publishing a data set: licences, models, and what windows cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.emission.gather import Gathered
from stages.emission.records import StageRecord
from stages.emission.sample import IntArray
from stages.licenses import UNRESTRICTED, is_noncommercial, license_name, license_names

_CUT = {
    "response_truncated": ("difficulty", "student", "responses cut"),
    "features_truncated": ("features", "student", "conversations cut"),
    "embedding_chunks": ("embedding", "encoder", "texts embedded in chunks"),
}
"""Columns on what a window held: stage, its field that names the model, and what happened."""

_ROLES = ("student", "teacher", "model", "gradient_model", "judge", "encoder")
"""Fields of a recipe's sections that name a model."""


@dataclass(frozen=True)
class ModelFacts:
    """A model of the recipe.

    Attributes:
        name: in the recipe.
        reference: hub name, folder, file or package.
        weights: content hash or hub revision, None where no stage says it.
        dtype: of weights and activations.
        window: longest sequence, in tokens, None where the recipe doesn't say.
        roles: what it did, as `stage.field`.
        terms: that bind what it writes, None where none are stated.
    """

    name: str
    reference: str
    weights: str | None
    dtype: str | None
    window: int | None
    roles: tuple[str, ...]
    terms: str | None


@dataclass(frozen=True)
class WindowFacts:
    """Rows that a model's window didn't hold whole.

    Attributes:
        stage: that asked the model.
        model: its name in the recipe.
        window: tokens; None for an encoder, which has a window of its own.
        asked: rows that the stage was asked for (of a teacher: requests).
        cut: those of which something was left out, or embedded apart.
        what: what became of them.
    """

    stage: str
    model: str
    window: int | None
    asked: int
    cut: int
    what: str

    @property
    def share(self) -> float:
        """Of the rows asked for."""
        return self.cut / self.asked if self.asked else 0.0


def model_facts(recipe: Mapping[str, Any], records: Sequence[StageRecord]) -> list[ModelFacts]:
    """The recipe's models, in its order."""
    weights: dict[str, str] = {}
    for record in records:
        for model in record.models.values():
            weights[model["settings"]["model"]] = model["weights"]
    found = []
    for name, entry in (recipe.get("models") or {}).items():
        roles = [
            f"{section}.{role}"
            for section, settings in recipe.items()
            if isinstance(settings, Mapping) and section != "models"
            for role in _ROLES
            if settings.get(role) == name
        ]
        found.append(
            ModelFacts(
                name=name,
                reference=entry["model"],
                weights=weights.get(entry["model"]),
                dtype=entry.get("dtype"),
                window=entry.get("max_length"),
                roles=tuple(roles),
                terms=license_name(entry.get("terms")),
            )
        )
    return found


def window_facts(
    recipe: Mapping[str, Any], records: Sequence[StageRecord], gathered: Gathered
) -> list[WindowFacts]:
    """By stage and model: rows that were cut, and rows or requests too long to be processed."""
    models = recipe.get("models") or {}

    def window(name: str) -> int | None:
        return (models.get(name) or {}).get("max_length")

    found = []
    for column, (stage, role, what) in _CUT.items():
        if column in gathered.cut:
            asked, cut = gathered.cut[column]
            name = str((recipe.get(stage) or {}).get(role))
            size = None if role == "encoder" else window(name)
            found.append(WindowFacts(stage, name, size, asked, cut, what))
    for record in records:
        long = sum(n for status, n in record.statuses.items() if "prompt_too_long" in status)
        section = recipe.get(record.name) or {}
        names = [str(section[role]) for role in _ROLES if section.get(role)]
        if long and names:
            found.append(
                WindowFacts(
                    record.name, names[0], window(names[0]), record.asked, long, "rows left out"
                )
            )
    replies = sum(gathered.audit.results.values(), Counter[str]())
    if replies["prompt_too_long"]:
        name = str((recipe.get("reflection") or {}).get("teacher"))
        long, asked = replies["prompt_too_long"], replies.total()
        found.append(
            WindowFacts("reflection", name, window(name), asked, long, "requests left out")
        )
    return found


def emitted_licenses(
    gathered: Gathered, order: IntArray, recipe: Mapping[str, Any]
) -> dict[str, Counter[str | None]]:
    """Emitted lines by source and licence: the record's own, else its source's, else None."""
    declared = {entry["name"]: entry.get("license") for entry in recipe.get("sources") or []}
    columns = ["source", *(["license"] if gathered.holds("license") else [])]
    groups = gathered.rows(order, columns).group_by(columns).aggregate([([], "count_all")])
    counted: dict[str, Counter[str | None]] = {}
    for group in groups.to_pylist():
        source = group["source"]
        name = license_name(group.get("license") or declared.get(source))
        counted.setdefault(source, Counter())[name] += group["count_all"]
    return dict(sorted(counted.items()))


def license_warnings(
    by_source: Mapping[str, Mapping[str | None, int]],
    models: Sequence[ModelFacts],
    written: Mapping[str, int],
) -> list[str]:
    """What a person has to find out, or to heed, before the data set is published.

    Args:
        by_source: emitted lines by source and licence.
        models: of the recipe.
        written: emitted lines whose text a model wrote, by its role (`stage.field`).
    """
    said = []
    silent: Counter[str] = Counter()
    for source, counts in by_source.items():
        silent[source] += sum(n for name, n in counts.items() if None in license_names(name))
    silent = +silent
    if silent:
        said.append(
            f"{silent.total():,} emitted rows state no licence (of {', '.join(silent)}): "
            "find out which they are under, and state it as the source's license"
        )
    strict: Counter[str] = Counter()
    for counts in by_source.values():
        strict.update({name: n for name, n in counts.items() if name and is_noncommercial(name)})
    if strict:
        said.append(
            f"{strict.total():,} emitted rows are under non-commercial licences "
            f"({', '.join(sorted(strict))}): the data set as a whole may not be used commercially"
        )
    for model in models:
        lines = sum(count for role, count in written.items() if role in model.roles)
        if lines and model.terms is None:
            said.append(
                f"models.{model.name} wrote text of {lines:,} emitted lines and states no terms: "
                "read its maker's, and state them as the model's terms"
            )
    return said


def written_terms(models: Sequence[ModelFacts], written: Mapping[str, int]) -> set[str]:
    """Stated terms of the models whose text is emitted, as they bind the data set."""
    return {
        model.terms
        for model in models
        if model.terms and model.terms != UNRESTRICTED
        if any(count for role, count in written.items() if role in model.roles)
    }
