"""Row stages of other packages: a judge, a reward model, a filter for personal data.

A package offers one by an entry point of the group `tamis.stages`; its name is the stage's, in the
recipe and in the run directory. What it names is a `RowStage` class with two things more: an
attribute `Settings`, a `RowSettings` class that reads its section of the recipe, and a constructor
that takes those settings, the recipe's models by name, and the seed. The stage adds its status as
the column `NAME_status`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol

from pydantic import ValidationError

from stages.base import RowSettings, RowStage
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.explained import explained

GROUP = "tamis.stages"


class StageClass(Protocol):
    """What an entry point names."""

    Settings: type[RowSettings]

    def __call__(
        self, settings: RowSettings, models: Mapping[str, ModelSettings], seed: int, /
    ) -> RowStage:
        """The stage."""
        ...


def extension_stage(
    name: str, section: Mapping[str, Any], models: Mapping[str, ModelSettings], seed: int
) -> RowStage:
    """A row stage that an installed package offers.

    Args:
        name: of the entry point.
        section: its settings, in plain values.
        models: the recipe's models by name.
        seed: the recipe's.

    Raises:
        ConfigError: no package or several offer it, it can't be imported, its settings are wrong,
            or it is no stage as the contract wants it.
    """
    made = stage_class(name)
    try:
        settings = made.Settings.model_validate(dict(section))
    except ValidationError as error:
        raise ConfigError(explained(error, f"stages.{name}", made.Settings)) from error
    stage = made(settings, models, seed)
    if stage.name != name:
        raise ConfigError(
            f"stages.{name}: the stage calls itself {stage.name!r}; its package has to name the "
            "entry point like the stage"
        )
    if f"{name}_status" not in stage.columns().adds.names:
        raise ConfigError(f"stages.{name}: the stage adds no column {name}_status, as it has to")
    return stage


def stage_class(name: str) -> StageClass:
    """The class that an installed package offers under a name.

    Raises:
        ConfigError: none does, several do, or it can't be imported.
    """
    offered = entry_points(group=GROUP)
    found = [entry for entry in offered if entry.name == name]
    if not found:
        names = ", ".join(sorted({entry.name for entry in offered})) or "none"
        raise ConfigError(
            f"stages.{name}: no installed package offers a stage of that name (offered: {names}); "
            "install the package that does, or mend the name"
        )
    if len({entry.value for entry in found}) > 1:
        places = ", ".join(sorted(entry.value for entry in found))
        raise ConfigError(f"stages.{name} is offered by {places}; uninstall all but one of them")
    try:
        made: StageClass = found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"stages.{name}: {found[0].value} can't be imported: {error}; mend or reinstall its "
            "package"
        ) from error
    return made
