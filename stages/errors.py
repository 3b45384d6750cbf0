"""Errors that a person must act on.

TamisError
├── ConfigError     the recipe, or something it names, is wrong: nothing has run yet (exit status 2)
├── StageError      the run stops; finished shards stay committed (exit status 1)
│   ├── EngineError a model cannot be opened, placed or used
│   └── BudgetSpent a declared budget is used up; run again with a larger one to go on
├── RunBusy         another process works in the run directory (exit status 75: try again later)
└── RowError        one row cannot be processed: null columns and a status, never a stopped run

Messages say what, where, and what to do. Errors of other libraries are mapped where they enter,
with ``raise ... from``.
"""


class TamisError(Exception):
    """Root of all errors that tamis raises on purpose."""


class ConfigError(TamisError):
    """The recipe, or a file, model or column it names, is wrong."""


class StageError(TamisError):
    """A stage cannot go on.

    Attributes:
        stage: name of the stage, or None where it isn't known yet.
    """

    def __init__(self, message: str, *, stage: str | None = None) -> None:
        """Keep the stage beside the message, so that callers need not parse it."""
        super().__init__(message)
        self.stage = stage


class EngineError(StageError):
    """A model cannot be opened, placed or used."""


class BudgetSpent(StageError):
    """A budget of the recipe is used up; what is finished is committed."""


class RunBusy(TamisError):
    """Another process holds the lock of the run directory."""


class RowError(TamisError):
    """One row cannot be processed; the reason becomes its status."""
