"""The data set card: README.md with the front matter that `datasets` and the Hub read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from stages.emission.certificate import certificate_sentences, method_words, range_words
from stages.emission.facts import Facts
from stages.emission.markdown import code, escaped, table
from stages.emission.shards import FOLDERS
from stages.emission.splits import TRAIN, VALIDATION
from stages.licenses import card_license, is_noncommercial

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
_LARGEST = "n>1T"
_RECIPE_OWN = ("name", "seed", "sources", "targets", "models", "license_policy")


def card_markdown(facts: Facts, version: int, trainers: Sequence[str]) -> bytes:
    """The card; equal runs give equal bytes.

    Args:
        facts: of the data set.
        version: of the emission stage.
        trainers: which trainers have a file, and why others have none.
    """
    parts = [
        _front_matter(facts),
        f"# {escaped(facts.name)}",
        about(facts),
        *_warnings(facts),
        "## Use\n\n" + _use(facts, trainers),
        "## Sources\n\n" + _sources(facts),
        "## Licences\n\n" + _licenses(facts),
        *_reasons(facts),
        *_targets(facts),
        "## Mixture\n\n" + _mixture(facts),
        *_prefixes(facts),
        *_concepts(facts),
        *_models(facts),
        *_windows(facts),
        "## How it was made\n\n" + _stages(facts, version),
        "## Reproduce\n\n" + _reproduce(facts),
        "## Limits\n\n" + "\n".join(f"* {limit}" for limit in _limits(facts)),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def recipe_yaml(recipe: Mapping[str, Any]) -> bytes:
    """The resolved recipe, files by their names alone."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True).encode()


def size_category(rows: int) -> str:
    """The Hub's name of a size."""
    return next((name for below, name in _SIZES if rows < below), _LARGEST)


def _front_matter(facts: Facts) -> str:
    files = [
        {"split": split, "path": f"{FOLDERS[split]}/{split}-*.parquet"} for split in facts.splits
    ]
    configs: list[dict[str, Any]] = [{"config_name": "default", "data_files": files}]
    if facts.prefix:
        prefixes = [
            {"split": split, "path": f"prefix/{split}-*.parquet"} for split in facts.prefix.lines
        ]
        configs.append({"config_name": "prefix", "data_files": prefixes})
    if facts.concepts:
        concepts = [
            {"split": split, "path": f"concepts/{split}-*.parquet"} for split in facts.concepts
        ]
        configs.append({"config_name": "concepts", "data_files": concepts})
    value = {
        **card_license(facts.names_of_licenses),
        "task_categories": ["text-generation"],
        "size_categories": [size_category(facts.rows)],
        "pretty_name": facts.name,
        "tags": ["instruction-tuning", "tamis"],
        "configs": configs,
    }
    return f"---\n{yaml.safe_dump(value, sort_keys=False, allow_unicode=True)}---"


def about(facts: Facts) -> str:
    """What the data set is, in a paragraph."""
    given = [source for source in facts.offered if source.rows]
    rewritten = (
        f" The text of {facts.rewritten:,} of them was rewritten by a model"
        + (
            "; `provenance.original` holds what it was."
            if facts.settings.provenance
            else " (the originals aren't included)."
        )
        if facts.rewritten
        else ""
    )
    return (
        f"Instruction-tuning data: {facts.rows:,} conversations ({facts.tokens:,} tokens, as "
        f"counted at selection) from {len(given)} source{'s' if len(given) != 1 else ''}, curated "
        f"by *tamis*.{rewritten} `lineage.json` holds the numbers and the SHA-256 of every file, "
        "`recipe.yaml` the recipe; the run's `report.html` shows how the rows were chosen, with "
        "examples."
    )


def _warnings(facts: Facts) -> list[str]:
    lines = [f"> **Before you publish or use this:** {escaped(text)}." for text in facts.warnings]
    return ["\n>\n".join(lines)] if lines else []


def _use(facts: Facts, trainers: Sequence[str]) -> str:
    columns = ", ".join(map(code, facts.columns))
    load = 'from datasets import load_dataset\n\nrows = load_dataset("PATH", split="train")'
    held = ""
    if VALIDATION in facts.splits:
        counts = {name: facts.splits[name] for name in (TRAIN, VALIDATION)}
        held = "\n\n" + table(
            ["split", "rows", "prompts"],
            [
                [name, f"{lines:,}", f"{prompts or 0:,}"]
                for name, (lines, prompts) in counts.items()
            ],
            left=1,
        )
        held += "\n\nBoth splits together have the weights of the mixture."
    if facts.split_note:
        held += f"\n\n{facts.split_note}"
    files = "\n".join(f"* {note}" for note in trainers)
    return f"```python\n{load}\n```\n\nColumns: {columns}.\n\n{files}{held}"


def _sources(facts: Facts) -> str:
    rows = []
    for source in facts.sources:
        anchor = source.role == "anchor"
        rows.append(
            [
                source.name,
                facts.license_of(source),
                "?" if source.records is None else f"{source.records:,}",
                f"{source.kept:,}",
                f"{source.selected:,}",
                "anchor: never" if anchor else f"{source.rows:,}",
                "-" if anchor else f"{source.weight:.4f}",
            ]
        )
    note = (
        "*Records* were read, *ingested* are rows left after rejecting broken, repeated and "
        "overlapping records, *selected* are rows that selection kept."
    )
    head = ["source", "licence", "records", "ingested", "selected", "emitted", "weight"]
    return f"{table(head, rows, left=2)}\n\n{note}"


def _licenses(facts: Facts) -> str:
    counted: dict[str | None, dict[str, int]] = {}
    for source, counts in facts.licenses.items():
        for name, lines in counts.items():
            counted.setdefault(name, {})[source] = lines
    rows = [
        [
            (name or "not stated") + (" (non-commercial)" if is_noncommercial(name) else ""),
            f"{sum(sources.values()):,}",
            ", ".join(sorted(sources)),
        ]
        for name, sources in sorted(
            counted.items(), key=lambda item: (-sum(item[1].values()), item[0] or "")
        )
    ]
    policy = facts.recipe.get("license_policy")
    blocked = sum(n for why, n in facts.reasons("dropped").items() if why.startswith("license: "))
    said = (
        f"\n\nRows of other licences than {escaped(', '.join(policy['allow']))} were blocked: "
        f"{blocked:,}."
        if policy
        else ""
    )
    for model in facts.models:
        lines = sum(count for role, count in facts.written.items() if role in model.roles)
        if lines:
            said += (
                f"\n\nText of {lines:,} lines was written by {code(model.name)} "
                f"({escaped(model.reference)}), whose terms are: "
                f"{escaped(model.terms or 'not stated')}."
            )
    return table(["licence", "emitted rows", "sources"], rows, left=1) + said


def _reasons(facts: Facts) -> list[str]:
    parts = []
    statuses = [
        [stage.name, status, f"{count:,}"]
        for stage in facts.stages
        for status, count in stage.statuses.items()
    ]
    for name, title in (("rejected", "Rejected at ingest"), ("dropped", "Dropped by selection")):
        reasons = facts.reasons(name)
        if reasons:
            rows = [[reason, f"{count:,}"] for reason, count in reasons.items()]
            parts.append(f"## {title}\n\n{table(['reason', 'rows'], rows, left=1)}")
        if name == "rejected" and statuses:
            head = ["stage", "status", "rows"]
            parts.append(f"## Status of rows by stage\n\n{table(head, statuses, left=2)}")
    return parts


def _targets(facts: Facts) -> list[str]:
    if not facts.tasks:
        return []
    rows = [[task, f"{count:,}"] for task, count in facts.tasks.items()]
    return [
        "## Targets\n\nExamples of what the data should serve; none of them is in the data.\n\n"
        + table(["task", "rows"], rows, left=1)
    ]


def _mixture(facts: Facts) -> str:
    unit = facts.settings.unit
    if facts.mixture is None:
        return f"No mixture was fitted: sources are in proportion to their selected {unit}."
    ranges, caps = facts.mixture.get("ranges") or {}, facts.mixture.get("caps") or {}
    rows = []
    for source in sorted(facts.offered, key=lambda source: (-source.weight, source.name)):
        low_high = ranges.get(source.name)
        rows.append(
            [
                source.name,
                f"{source.weight:.4f}",
                f"{low_high[0]:.4f} to {low_high[1]:.4f}" if low_high else "-",
                f"{caps[source.name]:.4f}" if caps.get(source.name) is not None else "-",
                f"{source.quota:,}",
                f"{source.tokens if unit == 'tokens' else source.rows:,}",
            ]
        )
    head = ["source", "weight", "range", "cap", f"quota ({unit})", "emitted"]
    said = escaped(" ".join(certificate_sentences(facts.mixture)))
    spans = f" Ranges are {range_words(facts.mixture)}." if ranges else ""
    return (
        f"Weights are shares of the {unit}, {method_words(facts.mixture)}.{spans}\n\n"
        f"{table(head, rows, left=1)}\n\n{said}"
    ).rstrip()


def _prefixes(facts: Facts) -> list[str]:
    made = facts.prefix
    if made is None:
        return []
    lines = sum(made.lines.values())
    said = (
        f'`load_dataset(PATH, "prefix")` gives {lines:,} prompts with the beginning of a solution '
        f"that the model to be trained wrote itself ({made.kinds.get('prefix', 0):,}), or with the "
        f"whole one ({made.kinds.get('full', 0):,}): {made.trained:,} tokens with a loss. Nobody "
        "checked the solutions. Train on `input_ids` and `labels`; they belong to that model's "
        "tokenizer."
    )
    if made.trained_saving is not None and made.full_trained is not None:
        said += (
            f" Whole solutions of all prompts would have about {made.full_trained:,.0f} tokens "
            f"({made.whole:,.0f} each, by those that are whole): {made.trained_saving:.1%} are "
            f"saved in training, and {made.sampled_saving or 0:.1%} in sampling."
        )
    return [f"## Prefixes\n\n{said}"]


def _concepts(facts: Facts) -> list[str]:
    if not facts.concepts:
        return []
    return [
        "## Concepts\n\n"
        f'`load_dataset(PATH, "concepts")` gives, of {sum(facts.concepts.values()):,} of the rows, '
        "the latents of a sparse autoencoder that bear most on what comes after each token "
        "(`concept_ids`, strongest first, -1 in a slot without one) and on the row as a whole "
        "(`row_concepts`). Tokens are those of `input_ids`, in the tokenizer of the model that was "
        "read; `concepts/dictionary.json` names it and the autoencoder."
    ]


def _models(facts: Facts) -> list[str]:
    rows = [
        [
            model.name,
            model.reference,
            code(model.weights) if model.weights else "-",
            model.dtype or "-",
            ", ".join(model.roles) or "-",
            model.terms or "not stated",
        ]
        for model in facts.models
    ]
    head = ["name", "model", "revision or content", "dtype", "used as", "terms"]
    return [f"## Models\n\n{table(head, rows, left=6)}"] if rows else []


def _windows(facts: Facts) -> list[str]:
    rows = [
        [
            window.stage,
            window.model,
            "its own" if window.window is None else f"{window.window:,}",
            window.what,
            f"{window.cut:,} of {window.asked:,}",
            f"{window.share:.1%}",
        ]
        for window in facts.windows
    ]
    head = ["stage", "model", "window (tokens)", "what happened", "rows", "share"]
    return [f"## Windows\n\n{table(head, rows, left=2)}"] if rows else []


def _stages(facts: Facts, version: int) -> str:
    rows = [
        [
            stage.name,
            str(stage.version or "-"),
            code(stage.fingerprint) if stage.fingerprint else "-",
        ]
        for stage in facts.stages
    ]
    rows.append(["emission", str(version), "-"])
    return table(["stage", "version", "fingerprint"], rows, left=3)


def _reproduce(facts: Facts) -> str:
    run = f"runs/{facts.name}"
    commands = "\n".join(
        [
            f"tamis plan recipe.yaml --set execution.run={run}",
            f"tamis run recipe.yaml --set execution.run={run}",
            f"tamis verify {run}",
        ]
    )
    sections = {
        key: value for key, value in facts.recipe.items() if key not in _RECIPE_OWN and value
    }
    text = yaml.safe_dump(_plain(sections), sort_keys=True, allow_unicode=True).rstrip()
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=2) + 1)
    fence = max(fence, "```", key=len)
    shown = f"\n\nSettings of the stages:\n\n{fence}yaml\n{text}\n{fence}" if sections else ""
    return (
        "`recipe.yaml` beside this card names sources and models; files are called by their names "
        f"alone, so put them beside it or mend the paths.\n\n```sh\n{commands}\n```\n\n"
        f"That gives the same rows in the same order (seed {facts.seed}) from the same sources and "
        "models on one machine type; stages of equal fingerprint computed the same. Rows that a "
        "GPU, vLLM or an endpoint generated anew may differ. A model behind an endpoint needs its "
        "address: `--set models.NAME.endpoint.base_url=URL`."
        f"{shown}"
    )


def _looked_for(recipe: Mapping[str, Any]) -> str:
    """Which duplicates and which overlaps were removed, and which were not looked for."""
    near = (recipe.get("ingest") or {}).get("near_duplicates")
    contamination = recipe.get("contamination") or {}
    sets = [str(one["name"]) for one in contamination.get("sets") or []]
    if contamination.get("targets") and recipe.get("targets"):
        sets.insert(0, "the targets")
    return (
        f"Exact duplicates were removed, and near ones (Jaccard similarity of {near['threshold']} "
        "and more). "
        if near
        else "Exact duplicates were removed; near ones were not looked for. "
    ) + (
        f"Rows that share {contamination['ngram']} words in a row with "
        f"{escaped(', '.join(sets))} were removed; paraphrases and other evaluation sets were not "
        "looked for."
        if sets
        else "Overlap with targets or evaluation sets was not looked for: check before you "
        "report scores on them."
    )


def _limits(facts: Facts) -> list[str]:
    unit = facts.settings.unit
    limits = [
        "Rows were chosen by models' scores and by distance to the targets. Nobody read them all: "
        "wrong answers, personal data, bias and harmful text that the sources hold may be here.",
        _looked_for(facts.recipe),
        "Licences are what sources and records declare. A source without one is marked so: find "
        "out before you publish.",
    ]
    if facts.rewritten:
        limits.append(
            f"{facts.rewritten:,} rows hold text that a model wrote. It may be wrong, and the "
            "terms of that model may apply to it."
        )
    if facts.prefix:
        limits.append("Prefixes and whole solutions of the prefix data set weren't checked.")
    if facts.mixture is not None:
        limits.append(
            "The mixture's certificate is about distance between embeddings of rows and targets. "
            "It doesn't promise the accuracy of a model trained on the data."
        )
        limits.append(
            f"Weights were fitted over rows and are applied as shares of {unit}."
            if unit == "tokens"
            else "Quotas are whole rows: shares differ from the weights by less than one row."
        )
    limits.append(
        "Token counts are those that selection used; they may be estimates, and depend on the "
        "student's tokenizer."
    )
    for source in facts.offered:
        if source.shortfall > 0:
            limits.append(
                f"The source {code(source.name)} gives {source.shortfall:,} {unit} less than its "
                f"quota of {source.quota:,}: the next row would have passed it."
            )
        if source.rows > source.distinct:
            limits.append(
                f"The source {code(source.name)} is repeated: {source.rows:,} lines of "
                f"{source.distinct:,} rows."
            )
    if facts.settings.order == "best":
        limits.append(
            f"Sources give their rows by {code(facts.settings.score or '')} from the top, so the "
            "emitted rows aren't a sample of what the mixture weighed."
        )
    if facts.settings.format == "messages" and "tools" in facts.columns:
        limits.append("`tools` and `tool_calls` are JSON text: parse them before a chat template.")
    return limits


def _plain(value: Any) -> Any:
    """The value with only types that YAML's safe dumper knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
