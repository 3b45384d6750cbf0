"""A recipe's text from what files hold and what a machine has."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.init.machine import Machine
from pipeline.init.models import (
    CHAT_MODELS_TERMS,
    SMOLLM2,
    encoder_reference,
    proposed_student,
    proposed_teacher,
    reference_of,
)
from pipeline.survey import Survey, surveyed
from stages.engines.model_files import decoder_shape
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.ingest import ContaminationSettings, IngestSettings, Reject, iter_rows
from stages.rows import response
from stages.sources import code_of, known_source
from stages.sources.reasons import NO_FAULT
from stages.sources.settings import BOXED, Source, Target
from stages.storage import Store

SCHEMA_FILE = "tamis.schema.json"
_ENDINGS = re.compile(r"(\.(jsonl?|csv|parquet|gz|bz2|xz|zst))+$")
_HASHES = r"####\s*(.+)$"
_SAMPLE = 400
_ANSWERED_SHARE = 0.9
_DEFAULT_REJECT_RATE = IngestSettings().max_reject_rate
_CHARACTERS_PER_TOKEN = 3


@dataclass(frozen=True)
class Choices:
    """What a user may name instead of leaving it to the proposals.

    Attributes:
        student: a model's reference.
        teacher: a model's reference, to be run by vLLM.
        encoder: a sentence encoder's reference.
    """

    student: str | None = None
    teacher: str | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class _Entry:
    """One source or target as the template writes it."""

    name: str
    path: str
    note: str
    fields: Mapping[str, Any]
    licensed: bool = True


def recipe_text(
    files: Sequence[str],
    targets: Sequence[str],
    output: str,
    machine: Machine,
    choices: Choices,
    scratch: Store,
) -> str:
    """A commented recipe that can be run as it is.

    Args:
        files: paths or URLs of the sources.
        targets: of the targets.
        output: where the recipe will stand; local paths are written relative to it.
        machine: what it has to run models on.
        choices: models that are given.
        scratch: an empty folder, for what is read.

    Raises:
        ConfigError: a file isn't there, or none of its records can be a row.
        StageError: all rows of a source are duplicates or overlap the targets.
    """
    import jinja2

    for file in (*files, *targets):
        if re.search(r"\$\{\w+\}", file):
            raise ConfigError(
                f"{file}: a recipe would put an environment variable's value there; rename the "
                "file, or name its folder"
            )
    pools = _named(Source, files)
    goals = _named(Target, targets)
    limits = IngestSettings(max_reject_rate=1)
    pools = [_readable(pool) for pool in pools]
    found = surveyed(pools, goals, limits, ContaminationSettings(), scratch, sample=_SAMPLE, seed=0)
    folder = None if "://" in output else os.path.dirname(os.path.abspath(output))
    longest = _longest_text(found)
    most = 8192 if machine.gpus_gb else 2048
    max_length = min(most, max(512, 256 * math.ceil(longest / _CHARACTERS_PER_TOKEN / 256)))
    student = proposed_student(machine)
    reference, blocks = reference_of(student), student.blocks
    if choices.student is not None:
        reference, blocks = choices.student, decoder_shape(ModelSettings(model=choices.student))[0]
    teacher = proposed_teacher(machine)
    small = student is SMOLLM2
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.init", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    name = _ENDINGS.sub("", re.sub(r"\.ya?ml$", "", os.path.basename(output)))
    return environment.get_template("recipe.yaml.j2").render(
        schema=SCHEMA_FILE,
        machine=machine,
        file=os.path.basename(output),
        name=_plain(name),
        sources=[_source_entry(pool, found, folder) for pool in pools],
        targets=[_target_entry(goal, found, folder) for goal in goals],
        student=reference,
        teacher=choices.teacher or (teacher.reference if teacher else None),
        teacher_terms=None if choices.teacher else CHAT_MODELS_TERMS,
        encoder=choices.encoder or encoder_reference(),
        max_length=max_length,
        fitting=_share_within(found.lengths, max_length * _CHARACTERS_PER_TOKEN),
        reflect=min(1000, found.rows),
        layer=round(blocks * 2 / 3),
        blocks=blocks,
        expansion=4 if small else 16,
        steps=300 if small else 5000,
        batch=512 if small else 4096,
        gpus=len(machine.gpus_gb),
        run=f"runs/{_plain(name)}",
    )


def _named(kind: type[Any], paths: Sequence[str]) -> list[Any]:
    """Sources called after their files, no two alike."""
    found: dict[str, Any] = {}
    for path in paths:
        base = _plain(_ENDINGS.sub("", re.split(r"[/\\]", path.rstrip("/*"))[-1])) or "source"
        names = [base, *(f"{base}-{number}" for number in range(2, len(paths) + 2))]
        name = next(one for one in names if one not in found)
        found[name] = kind(name=name, path=path, max_reject_rate=1)
    return list(found.values())


def _plain(name: str) -> str:
    """A name that a source and a run may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "recipe"


def _readable(source: Source) -> Source:
    """The source, preference pairs taken by their chosen response where it holds nothing else.

    Raises:
        ConfigError: none of its records can be a row.
    """
    counts = _alone(source)
    if counts["kept"]:
        return source
    if "preference_pair" in counts["rejected"]:
        chosen = source.model_copy(update={"preference": "chosen"})
        counts = _alone(chosen)
        if counts["kept"]:
            return chosen
    if not counts["in"]:
        raise ConfigError(f"{source.path} holds no record; leave it out")
    raise ConfigError(
        f"{source.path}: none of its {counts['in']} records can be a row "
        f"({_counted(counts['rejected'])}; for example: {counts['example']}); give the recipe a "
        "column map for it by hand (docs/recipe.md, sources), or leave it out"
    )


def _alone(source: Source) -> dict[str, Any]:
    """What becomes of a source's records where there is no other, and the first reject's reason."""
    counts: dict[str, Any] = {"in": 0, "kept": 0, "rejected": {}, "example": ""}
    for item in iter_rows(source):
        counts["in"] += 1
        if isinstance(item, Reject):
            code = code_of(item.reason)
            counts["rejected"][code] = counts["rejected"].get(code, 0) + 1
            counts["example"] = counts["example"] or item.reason
        else:
            counts["kept"] += 1
    return counts


def _source_entry(source: Source, found: Survey, folder: str | None) -> _Entry:
    counts = found.report["sources"][source.name]
    fields: dict[str, Any] = {}
    if source.preference:
        fields["preference"] = source.preference
    rows = [row for row in found.sample.to_pylist() if row["source"] == source.name]
    pattern = None if _is_known(source, "answer_pattern") else _answer_pattern(rows)
    if pattern:
        fields["answer_pattern"] = pattern
    fields |= _reject_rate(source, counts)
    licensed = bool(rows) and all(row["license"] for row in rows)
    return _Entry(source.name, _relative(source.path, folder), _note(counts), fields, licensed)


def _target_entry(target: Target, found: Survey, folder: str | None) -> _Entry:
    counts = found.report["targets"][target.name]
    rows = [row for row in found.targets.to_pylist() if row["source"] == target.name]
    extras = [json.loads(row["extra"] or "{}") for row in rows]
    fields: dict[str, Any] = {}
    if extras and all(isinstance(extra.get("task"), str) and extra["task"] for extra in extras):
        fields["task_column"] = "task"
    fields |= _reject_rate(target, counts)
    return _Entry(target.name, _relative(target.path, folder), _note(counts), fields)


def _reject_rate(source: Source, counts: Mapping[str, Any]) -> dict[str, float]:
    """The rate that lets a source pass which loses more records than the default allows."""
    faulty = sum(n for code, n in counts["rejected"].items() if code not in NO_FAULT)
    share = faulty / counts["in"]
    if share <= _DEFAULT_REJECT_RATE or _is_known(source, "max_reject_rate"):
        return {}
    return {"max_reject_rate": math.ceil(share * 100) / 100}


def _is_known(source: Source, field: str) -> bool:
    """Whether the shipped map of its file says it."""
    return isinstance(source.path, str) and field in known_source(source.path)


def _answer_pattern(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How nearly all responses give an answer that can be checked; None where they don't."""
    texts = [response(row["messages"]) or "" for row in rows]
    for pattern, searched in ((_HASHES, _HASHES), (BOXED, r"\\boxed\{")):
        having = sum(re.search(searched, text, re.MULTILINE) is not None for text in texts)
        if texts and having >= _ANSWERED_SHARE * len(texts):
            return pattern
    return None


def _note(counts: Mapping[str, Any]) -> str:
    rejected = f"; rejected: {_counted(counts['rejected'])}" if counts["rejected"] else ""
    return f"{counts['in']} records, {counts['kept']} rows{rejected}"


def _counted(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {code}" for code, n in sorted(rejected.items()))


def _relative(path: str | list[str], folder: str | None) -> str:
    """A local path as seen from the recipe's folder; whole where that is no local one; or a URL."""
    assert isinstance(path, str)
    if "://" in path:
        return path
    whole = os.path.abspath(os.path.expanduser(path))
    return whole if folder is None else os.path.relpath(whole, folder)


def _longest_text(found: Survey) -> int:
    """Characters of a row that 95 of 100 rows aren't longer than."""
    ordered = sorted([*found.lengths, *found.target_lengths])
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def _share_within(lengths: Sequence[int], longest: int) -> int:
    return math.floor(100 * sum(length <= longest for length in lengths) / len(lengths))
