"""A synthesis recipe, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from pipeline.recipe_file import name_files, read_recipe
from stages.base import Settings
from stages.engines.settings import ModelSettings
from stages.sources.settings import Source, Target
from stages.synthesis.settings import (
    FilterSettings,
    GeneratorSettings,
    StudentSettings,
    TeacherSettings,
)


class Avoid(Settings):
    """Data that problems mustn't repeat."""

    sources: list[Source] = Field(default_factory=list, description="As in a recipe of a run.")
    targets: list[Target] = Field(
        default_factory=list, description="As in a recipe of a run; evaluation sets too."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [one.name for one in (*self.sources, *self.targets)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources or targets are called {twice[0]}")
        return self


class SynthesisExecution(Settings):
    """The part that bears on no byte of the result."""

    run: str = Field(description="Folder of the new source: a path or an fsspec URL.")
    cache: str = Field(
        default="~/.cache/tamis/generations", description="Where generations are kept between runs."
    )


class SynthesisConfig(BaseModel):
    """A whole synthesis recipe."""

    model_config = {"extra": "forbid", "frozen": True}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    models: dict[str, ModelSettings]
    generator: GeneratorSettings
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings | None = None
    filters: FilterSettings = FilterSettings()
    avoid: Avoid = Avoid()
    execution: SynthesisExecution

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for role, part in self._roles.items():
            if part.model not in self.models:
                raise ValueError(
                    f"{role}.model names the model {part.model!r}, which `models` doesn't declare "
                    f"(declared: {', '.join(sorted(self.models)) or 'none'})"
                )
            if self.models[part.model].endpoint is not None:
                self._check_endpoint(role, part.model)
                continue
            window = self.models[part.model].max_length
            if part.max_new_tokens >= window:
                raise ValueError(
                    f"{role}.max_new_tokens: {part.max_new_tokens} leaves no room for a prompt in "
                    f"models.{part.model}.max_length={window}"
                )
        if self.student and not self.filters.require_answer:
            raise ValueError(
                "the student's answers are compared with the teacher's, so student needs "
                "filters.require_answer: true"
            )
        return self

    def _check_endpoint(self, role: str, model: str) -> None:
        if role != "teacher":
            raise ValueError(
                f"{role}.model: models.{model} is behind an endpoint, and the {role} works with "
                "token ids, which endpoints don't give; only the teacher may be behind one"
            )
        if self.teacher.template:
            raise ValueError(
                "teacher.template: an endpoint applies its own chat template; give variables as "
                f"models.{model}.endpoint.body.chat_template_kwargs, where it takes them"
            )

    @property
    def _roles(self) -> dict[str, GeneratorSettings | TeacherSettings | StudentSettings]:
        student = {"student": self.student} if self.student else {}
        return {"generator": self.generator, "teacher": self.teacher, **student}

    def model_of(self, role: str) -> ModelSettings:
        """The model in a role: generator, teacher or student."""
        return self.models[self._roles[role].model]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that this recipe fills, in the order in which they work."""
        return tuple(self._roles)

    @property
    def portable_recipe(self) -> dict[str, Any]:
        """The recipe without `execution`, files called by their own names."""
        recipe = self.model_dump(mode="json", exclude={"execution"})
        name_files([*recipe["avoid"]["sources"], *recipe["avoid"]["targets"]])
        recipe["models"] = {name: model.portable() for name, model in self.models.items()}
        return recipe


def read_synthesis(path: str, overrides: Sequence[str] = ()) -> SynthesisConfig:
    """A synthesis recipe as a checked config.

    Relative paths of models and of what to avoid are taken from the recipe file's folder; the
    output folder and the cache from the working directory.

    Args:
        path: a YAML file, by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or out of range.
    """
    return read_recipe(SynthesisConfig, path, overrides, within=("avoid",))
