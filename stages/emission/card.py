"""The data set card: README.md with the front matter that `datasets` and the Hub read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from stages.emission.certificate import certificate_sentences
from stages.emission.facts import Facts

_KNOWN_LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 epl-2.0 gfdl
    gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 mit mpl-2.0
    odbl odc-by openrail openrail++ pddl postgresql unlicense wtfpl zlib
    """.split()  # noqa: SIM905 - forty names read better as text
)
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
_RECIPE_OWN = ("name", "seed", "sources", "targets", "models")


def card_markdown(facts: Facts, version: int) -> bytes:
    """The card; equal runs give equal bytes.

    Args:
        facts: of the data set.
        version: of the emission stage.
    """
    parts = [
        _front_matter(facts),
        f"# {_cell(facts.name)}",
        _about(facts),
        "## Use\n\n" + _use(facts),
        "## Sources\n\n" + _sources(facts),
        *_reasons(facts),
        *_targets(facts),
        "## Mixture\n\n" + _mixture(facts),
        *_models(facts),
        "## How it was made\n\n" + _stages(facts, version),
        "## Reproduce\n\n" + _reproduce(facts),
        "## Limits\n\n" + "\n".join(f"* {limit}" for limit in _limits(facts)),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def license_tag(licenses: Iterable[str | None]) -> str:
    """The Hub's name of the licence that all rows share, or `other`: unknown or several."""
    names = {name.strip().lower() if name else None for name in licenses}
    only = names.pop() if len(names) == 1 else None
    return only if only in _KNOWN_LICENSES else "other"


def size_category(rows: int) -> str:
    """The Hub's name of a size."""
    return next((name for below, name in _SIZES if rows < below), _LARGEST)


def _front_matter(facts: Facts) -> str:
    value = {
        "license": license_tag(facts.licenses),
        "task_categories": ["text-generation"],
        "size_categories": [size_category(facts.rows)],
        "pretty_name": facts.name,
        "tags": ["instruction-tuning", "tamis"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
    }
    return f"---\n{yaml.safe_dump(value, sort_keys=False, allow_unicode=True)}---"


def _about(facts: Facts) -> str:
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
        f"by *tamis*.{rewritten} `report.html` shows how the rows were chosen, with examples; "
        "`lineage.json` holds the numbers and the SHA-256 of every file."
    )


def _use(facts: Facts) -> str:
    columns = ", ".join(f"`{name}`" for name in facts.columns)
    trainer = {
        "messages": "TRL's `SFTTrainer` takes `messages` as they are. Axolotl: `type: "
        "chat_template`, `field_messages: messages`. LLaMA-Factory: `formatting: sharegpt` "
        "with `columns: {messages: messages}` and `tags: {role_tag: role, content_tag: "
        "content, user_tag: user, assistant_tag: assistant, system_tag: system}`.",
        "prompt_completion": "TRL's `SFTTrainer` takes `prompt` and `completion` as they are, with "
        "the loss on the completion alone.",
        "alpaca": "LLaMA-Factory and Axolotl read these columns as `alpaca`; `input` is always "
        "empty, because ingest joined it to the instruction.",
    }[facts.settings.format]
    load = 'from datasets import load_dataset\n\nrows = load_dataset("PATH", split="train")'
    return f"```python\n{load}\n```\n\nColumns: {columns}. {trainer}"


def _sources(facts: Facts) -> str:
    rows = []
    for source in facts.sources:
        anchor = source.role == "anchor"
        rows.append(
            [
                source.name,
                source.license or "not stated",
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
    return f"{_table(head, rows, left=2)}\n\n{note}"


def _reasons(facts: Facts) -> list[str]:
    parts = []
    for name, title in (("rejected", "Rejected at ingest"), ("dropped", "Dropped by selection")):
        reasons = facts.reasons(name)
        if reasons:
            rows = [[reason, f"{count:,}"] for reason, count in reasons.items()]
            parts.append(f"## {title}\n\n{_table(['reason', 'rows'], rows, left=1)}")
    return parts


def _targets(facts: Facts) -> list[str]:
    if not facts.tasks:
        return []
    rows = [[task, f"{count:,}"] for task, count in facts.tasks.items()]
    return [
        "## Targets\n\nExamples of what the data should serve; none of them is in the data.\n\n"
        + _table(["task", "rows"], rows, left=1)
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
    said = " ".join(certificate_sentences(facts.mixture))
    return (
        f"Weights are shares of the {unit}, chosen by optimal transport to the targets.\n\n"
        f"{_table(head, rows, left=1)}\n\n{said}"
    ).rstrip()


def _models(facts: Facts) -> list[str]:
    models = facts.recipe.get("models") or {}
    entries = models.items() if isinstance(models, Mapping) else enumerate(models)
    rows = []
    for role, entry in entries:
        fields = entry if isinstance(entry, Mapping) else {"model": entry}
        rows.append([str(role), str(fields.get("model")), str(fields.get("dtype") or "-")])
    return [f"## Models\n\n{_table(['name', 'model', 'dtype'], rows, left=3)}"] if rows else []


def _stages(facts: Facts, version: int) -> str:
    rows = [
        [
            stage.name,
            str(stage.version or "-"),
            f"`{stage.fingerprint}`" if stage.fingerprint else "-",
        ]
        for stage in facts.stages
    ]
    rows.append(["emission", str(version), "-"])
    return _table(["stage", "version", "fingerprint"], rows, left=3)


def _reproduce(facts: Facts) -> str:
    sections = {
        key: value for key, value in facts.recipe.items() if key not in _RECIPE_OWN and value
    }
    text = yaml.safe_dump(_plain(sections), sort_keys=True, allow_unicode=True).rstrip()
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=2) + 1)
    fence = max(fence, "```", key=len)
    shown = f"\n\nSettings of the stages:\n\n{fence}yaml\n{text}\n{fence}" if sections else ""
    return (
        f"`tamis run recipe.yaml` with the `recipe.yaml` of the run (seed {facts.seed}) gives the "
        "same rows in the same order from the same sources and models on one machine type; stages "
        f"of equal fingerprint computed the same.{shown}"
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
        f"Rows that share {contamination['ngram']} words in a row with {', '.join(sets)} were "
        "removed; paraphrases and other evaluation sets were not looked for."
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
                f"{_cell(source.name)} gives {source.shortfall:,} {unit} less than its quota of "
                f"{source.quota:,}: the next row would have passed it."
            )
        if source.rows > source.distinct:
            limits.append(
                f"{_cell(source.name)} is repeated: {source.rows:,} lines of {source.distinct:,} "
                "rows."
            )
    if facts.settings.order == "best":
        limits.append(
            f"Sources give their rows by `{facts.settings.score}` from the top, so the emitted "
            "rows aren't a sample of what the mixture weighed."
        )
    if facts.settings.format == "messages" and facts.tools:
        limits.append("`tools` and `tool_calls` are JSON text: parse them before a chat template.")
    return limits


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are aligned left, the rest right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    lines = [head, rule, *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that can't end a table cell or open a tag."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _plain(value: Any) -> Any:
    """The value with only types that YAML's safe dumper knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
