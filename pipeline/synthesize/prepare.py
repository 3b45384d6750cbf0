"""`tamis synthesize prepare`: a run's difficult problems as training data of a generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, parts, read_columns, read_manifest, row_stages_of
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.rows import ROWS, Message, messages_of
from stages.rules import rule_columns, rule_mask
from stages.storage import Store
from stages.synthesis.headers import special_texts
from stages.synthesis.output import json_lines
from stages.synthesis.training import TrainingForm, training_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = {
    "not_met": "the rule isn't met",
    "multi_turn": "more than one user turn, or a tool's",
    "system_turn": "a system turn, which a bare user header has no place for",
    "special_token": "the text of a special token, which would forge a turn in training",
    "duplicate": "the problem of an earlier row",
}
"""Why a row is no training example."""


@dataclass(frozen=True)
class Prepared:
    """A training file, and what became of the run's rows."""

    data: bytes
    examples: int
    left_out: Counter[str]


def prepared_training_file(run: str, where: str, model: str) -> Prepared:
    """The training file of a generator, from the rows of a run that meet a rule.

    Args:
        run: a run directory whose ingest, and every stage that the rule reads, is complete.
        where: rule over ingest's columns and those of row stages.
        model: reference of the model that will be trained; its chat template is read.

    Raises:
        ConfigError: no run is there, a column isn't, the template has no user header, or no row
            is left.
        StageError: the run's shards don't belong together.
    """
    from stages.engines.model_files import load_tokenizer

    store = opened_run(run)
    homes = _homes(store)
    absent = sorted(rule_columns(where) - set(homes))
    if absent:
        raise ConfigError(
            f"--where reads the column {absent[0]!r}, which no complete stage of {run} adds; "
            f"there are {', '.join(sorted(homes))}"
        )
    tokenizer = load_tokenizer(ModelSettings(model=model))
    form = TrainingForm(tokenizer)
    left_out: Counter[str] = Counter(dict.fromkeys(LEFT_OUT, 0))
    problems = list(_problems(store, where, homes, tokenizer, left_out))
    if not problems:
        counts = ", ".join(f"{reason} {count}" for reason, count in left_out.items() if count)
        raise ConfigError(f"{run}: no row is left to train on ({counts}); change --where")
    data = json_lines(training_example(form, problem) for problem in problems)
    return Prepared(data, len(problems), left_out)


def _homes(run: Store) -> dict[str, str]:
    """The complete stage that each column of the run's rows is in.

    Raises:
        ConfigError: ingest isn't complete.
    """
    if read_manifest(run, "ingest") is None:
        raise ConfigError(f"{run.url}: ingest isn't complete; finish the run first")
    homes = dict.fromkeys(ROWS.names, "ingest")
    first = parts(run, "ingest")[0]
    for stage in row_stages_of(run):
        if read_manifest(run, stage) is not None:
            columns = run.read_table(f"{folder_of(stage)}/{first}").column_names
            homes |= {name: stage for name in columns if name not in (*ROWS.names, "key")}
    return homes


def _problems(
    run: Store,
    where: str,
    homes: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    left_out: Counter[str],
) -> Iterator[str]:
    special = special_texts(tokenizer)
    seen: set[str] = set()
    columns = sorted({"messages", *rule_columns(where)})
    for part in parts(run, "ingest"):
        table = read_columns(run, part, columns, homes)
        met = rule_mask(where, table).to_pylist()
        for is_met, messages in zip(met, messages_of(table), strict=True):
            problem = messages[0]["content"].strip() if messages else ""
            reason = None if is_met else "not_met"
            reason = reason or _unfit(messages or [])
            if reason is None and any(token in problem for token in special):
                reason = "special_token"
            if reason is None and problem in seen:
                reason = "duplicate"
            if reason is not None:
                left_out[reason] += 1
                continue
            seen.add(problem)
            yield problem


def _unfit(messages: list[Message]) -> str | None:
    """Why a conversation isn't one question and its answer, or None."""
    roles = [turn["role"] for turn in messages]
    if "system" in roles:
        return "system_turn"
    return None if roles == ["user", "assistant"] else "multi_turn"
