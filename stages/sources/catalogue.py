"""Shipped maps: what is known of published files by their names.

A map applies where a source's form is `auto` and it has no column map; any field that the recipe
sets goes before the map's. Licences are those that the publishers name (no version where they name
none).
"""

from __future__ import annotations

from typing import Any

from stages.sources.readers import COMPRESSIONS
from stages.sources.settings import Source

_ALPACA = {"form": "alpaca"}
_GSM8K = {"form": "question_answer", "answer_pattern": r"####\s*(.+)$", "license": "MIT"}
_FLAN_COT = {**_ALPACA, "license": "ODC-By"}
_AIME = {
    "form": "columns",
    "columns": {
        "prompt": "problem",
        "response": "reference_solution",
        "answer": "expected_answer",
    },
    "license": "Apache-2.0",
}
_BBH = {
    "form": "columns",
    "columns": {"prompt": "input", "response": "target", "answer": "target"},
    "records": "examples",
    "license": "MIT",
}

_BBH_TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)

KNOWN: dict[str, dict[str, Any]] = {
    "alpaca_5000.json": {**_ALPACA, "license": "CC-BY-NC-4.0"},
    "dolly_3k.json": {**_ALPACA, "license": "CC-BY-SA-3.0"},
    "gpteacher_codegen.json": {**_ALPACA, "license": "MIT"},
    "gpteacher_roleplay.json": {**_ALPACA, "license": "MIT"},
    "gpteacher_toolformer.json": {**_ALPACA, "license": "MIT"},
    "flan_cot_aqua.json": _FLAN_COT,
    "flan_cot_creak.json": _FLAN_COT,
    "flan_cot_ecqa.json": _FLAN_COT,
    "flan_cot_qasc.json": _FLAN_COT,
    "flan_cot_sensemaking.json": _FLAN_COT,
    "flan_cot_strategyqa.json": _FLAN_COT,
    "gsm8k_train.jsonl": _GSM8K,
    "math_5000.jsonl": {"form": "problem_solution", "answer_pattern": "boxed", "license": "MIT"},
    "math_adapters.json": {**_ALPACA, "license": "ODC-By"},
    "new_codealpaca.json": {**_ALPACA, "license": "CC-BY-NC-4.0"},
    "small_instructions.json": {**_ALPACA, "license": "Apache-2.0"},
    "t0_20k.jsonl": {"form": "prompt_completion", "license": "Apache-2.0"},
    # Half of its rows are bad on purpose, which says nothing against the other half.
    "messages_kto_demo.json": {
        "form": "messages",
        "license": "Apache-2.0",
        "max_reject_rate": 0.6,
    },
    "sharegpt_dpo_demo.json": {"form": "sharegpt", "license": "Apache-2.0"},
    "lima_history.json": {**_ALPACA, "license": "CC-BY-NC-SA"},
    "gsm8k_test.jsonl": _GSM8K,
    "math500.jsonl": {"form": "problem_solution", "license": "MIT"},
    "aime24.jsonl": _AIME,
    "aime25.jsonl": _AIME,
    "mbpp.jsonl": {
        "form": "columns",
        "columns": {"prompt": "text", "response": "code"},
        "license": "CC-BY",
    },
    "humaneval.jsonl": {
        "form": "columns",
        "columns": {"prompt": "prompt", "response": "canonical_solution"},
        "license": "MIT",
    },
    "truthfulqa.csv": {
        "form": "columns",
        "columns": {"prompt": "Question", "response": "Best Answer"},
        "license": "Apache-2.0",
    },
    "tydiqa_id_validation.jsonl": {
        "form": "columns",
        "columns": {"prompt": "input", "response": "target"},
        "license": "Apache-2.0",
    },
    # The first question of each; the later ones, which need a model's answers, stay in `extra`.
    "mt_bench_questions.jsonl": {
        "form": "columns",
        "columns": {"prompt": "turns"},
        "license": "Apache-2.0",
    },
    **{f"bbh/{task}.json": _BBH for task in _BBH_TASKS},
}
"""Settings by file name without compression (with its folder, where the name alone says little)."""


def known_source(path: str) -> dict[str, Any]:
    """What is known of a file: settings of a source, empty for other files."""
    name = path.replace("\\", "/")
    for packed in COMPRESSIONS:
        name = name.removesuffix(packed)
    parts = name.rsplit("/", 2)
    return dict(KNOWN.get(parts[-1]) or KNOWN.get("/".join(parts[-2:])) or {})


def resolved(source: Source, url: str) -> Source:
    """The source as it applies to one of its files, with what is known of that file."""
    if source.form != "auto" or source.columns is not None:
        return source
    known = {
        name: value
        for name, value in known_source(url).items()
        if name == "form" or getattr(source, name) is None
    }
    return source.model_copy(update=known)
