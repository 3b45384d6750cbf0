"""`tamis init`."""

from __future__ import annotations

import tempfile
from typing import Annotated

import typer
from rich.console import Console

Files = Annotated[
    list[str],
    typer.Argument(metavar="FILES...", help="Files, folders, globs or URLs; a source each."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", "-t", help="Examples of what the data set should serve; repeatable."),
]
Output = Annotated[str, typer.Option("--output", "-o", help="The recipe to write.")]
Model = Annotated[str | None, typer.Option(metavar="REF", help="Instead of the model proposed.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")]


def write_recipe(
    files: list[str],
    targets: list[str],
    output: str,
    student: str | None,
    teacher: str | None,
    encoder: str | None,
    force: bool,
) -> None:
    """Write a recipe and the schema that editors check it by, and say what was found.

    Raises:
        ConfigError: a recipe is there already, or a file can't be used.
    """
    from pipeline.config import read_config
    from pipeline.init.machine import this_machine
    from pipeline.init.recipe import SCHEMA_FILE, Choices, recipe_text
    from pipeline.schema import schema_text
    from stages.errors import ConfigError
    from stages.storage import Store

    folder, _, name = output.rpartition("/")
    store = Store(folder or ".")
    if store.exists(name) and not force:
        raise ConfigError(f"{output} is there already; name another file by -o, or add --force")
    machine = this_machine()
    with tempfile.TemporaryDirectory(prefix="tamis-") as scratch:
        text = recipe_text(
            files, targets, output, machine, Choices(student, teacher, encoder), Store(scratch)
        )
    try:
        store.write_bytes(SCHEMA_FILE, schema_text().encode())
        store.write_bytes(name, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{output} can't be written ({error}); name another file by -o"
        ) from error
    config = read_config(output)
    console = Console()
    models = ", ".join(f"{role} {model.model}" for role, model in config.models.items())
    for line in (
        f"{output}: {len(config.sources)} sources, {len(config.targets)} targets",
        f"machine: {machine}",
        f"models:  {models}",
        f"next:    tamis plan {output}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
