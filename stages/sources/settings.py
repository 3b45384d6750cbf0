"""What a recipe says about a source and a target."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from stages.base import Settings

Form = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "problem_solution",
    "columns",
]

ColumnField = Literal[
    "prompt",
    "input",
    "response",
    "system",
    "history",
    "answer",
    "messages",
    "tools",
    "license",
]

BOXED = "boxed"
"""The `answer_pattern` that takes the content of the last LaTeX box, braces balanced."""

Rate = Annotated[float, Field(ge=0, le=1)]


class Source(Settings):
    """A named pool of rows, or an anchor: rows that the user already trains on."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$", description="Name: letters, digits, `_` and `-`."
    )
    path: str | list[str] = Field(
        description="File, glob, folder or fsspec URL (hf://datasets/USER/NAME); or a list."
    )
    form: Form = Field(
        default="auto",
        description="Form of the records. auto: the shipped map of a known file, else by columns.",
    )
    columns: dict[ColumnField, str] | None = Field(
        default=None,
        description="Column map, our field to the record's column; sets form: columns.",
    )
    records: str | None = Field(
        default=None, min_length=1, description="Key of the list of records in a .json object."
    )
    rows: tuple[int, int] | None = Field(
        default=None,
        description="[start, stop]: only these records, counted from 0 over the whole source.",
    )
    license: str | None = Field(
        default=None, min_length=1, description="Licence of records that don't name their own."
    )
    role: Literal["pool", "anchor"] = Field(
        default="pool", description="anchor: rows are deduplicated against it; never emitted."
    )
    preference: Literal["chosen"] | None = Field(
        default=None,
        description="chosen: take the chosen response of preference pairs; else they are rejected.",
    )
    answer_pattern: str | None = Field(
        default=None,
        description="Regular expression with one group (its last match is the reference answer in "
        "the response), or `boxed`: the last LaTeX box. A record's own answer column goes first.",
    )
    repeats: int = Field(
        default=1, ge=1, description="How often a row of this source may be emitted."
    )
    max_reject_rate: Rate | None = Field(
        default=None,
        description="Share of rejected records that fails the run (default: ingest's).",
    )

    @field_validator("path")
    @classmethod
    def _some_path(cls, path: str | list[str]) -> str | list[str]:
        paths = [path] if isinstance(path, str) else path
        if not paths or not all(one.strip() for one in paths):
            raise ValueError("path is empty: give a file, a glob, a folder or a URL")
        return path

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is None or pattern == BOXED:
            return pattern
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern {pattern!r} is no regular expression: {error}") from (
                error
            )
        if groups != 1:
            raise ValueError(
                f"answer_pattern {pattern!r} has {groups} groups; it needs exactly one, around the "
                "answer (write other groups as (?:...))"
            )
        return pattern

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} must be [start, stop] with 0 <= start < stop")
        if self.columns is None:
            if self.form == "columns":
                raise ValueError("form: columns needs a column map in `columns`")
            return self
        if self.form not in ("auto", "columns"):
            raise ValueError(
                f"`columns` is given, so that form: {self.form} would have no effect; "
                "remove one of them"
            )
        self._check_columns(self.columns)
        return self

    def _check_columns(self, columns: dict[ColumnField, str]) -> None:
        turns = {"prompt", "input", "response", "history"} & columns.keys()
        if "messages" in columns and turns:
            raise ValueError(
                f"columns maps both messages and {sorted(turns)}; map one or the other"
            )
        if "messages" not in columns and "prompt" not in columns:
            raise ValueError(
                "columns must map `prompt` or `messages`; its fields are "
                + ", ".join(get_args(ColumnField))
            )
        if "answer" in columns and self.answer_pattern is not None:
            raise ValueError("both columns.answer and answer_pattern are given; remove one of them")
        no_response = not {"messages", "response"} & columns.keys() and self.preference is None
        if no_response and self._needs_response:
            raise ValueError("columns must map `response`: a source's rows end in a response")

    @property
    def _needs_response(self) -> bool:
        return True

    @property
    def paths(self) -> list[str]:
        """The paths as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Target(Source):
    """Rows of the tasks that the data set should serve; the last turn may be the user's."""

    task: str | None = Field(
        default=None,
        min_length=1,
        description="Task of all its rows (default: the target's name); `{file}` stands for the "
        "file's name without its type, for folders with one file a task.",
    )
    task_column: str | None = Field(
        default=None, min_length=1, description="Column of the records that names the task."
    )

    @model_validator(mode="after")
    def _task_once(self) -> Self:
        if self.task is not None and self.task_column is not None:
            raise ValueError("both task and task_column are given; remove one of them")
        if self.role != "pool":
            raise ValueError("a target has no role: only a source can be an anchor")
        return self

    @property
    def _needs_response(self) -> bool:
        return False
