"""Published sparse autoencoders, read from a folder into one form; one module a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from stages.dictionary.formats import (
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openai_gpt2,
    saelens,
    sparsify,
)
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.published import Published, Wanted
from stages.errors import ConfigError
from stages.storage import Store, content_identity


class Format(NamedTuple):
    """A format: the files that it needs, and what makes an autoencoder of them."""

    files: Callable[[Folder, Wanted], list[str]]
    read: Callable[[Folder, Wanted], Published]


FORMATS: Mapping[str, Format] = {
    "saelens": Format(saelens.files, saelens.read),
    "sparsify": Format(sparsify.files, sparsify.read),
    "gemma_scope": Format(gemma_scope.files, gemma_scope.read),
    "gemma_scope_2": Format(gemma_scope_2.files, gemma_scope_2.read),
    "llama_scope": Format(llama_scope.files, llama_scope.read),
    "openai_gpt2": Format(openai_gpt2.files, openai_gpt2.read),
}


def detected_format(url: str, wanted: Wanted) -> str:
    """The format of the files in a folder.

    Raises:
        ConfigError: none, or more than one.
    """
    folder = Folder(Store(url))
    needs = {name: form.files(folder, wanted) for name, form in FORMATS.items()}
    found = [name for name, files in needs.items() if all(map(folder.store.exists, files))]
    if len(found) == 1:
        return found[0]
    there = ", ".join(folder.store.names()) or "nothing"
    if found:
        raise ConfigError(
            f"dictionary.path {url} holds files of {' and '.join(found)}: name one as "
            "dictionary.format"
        )
    known = "; ".join(f"{name}: {', '.join(files)}" for name, files in needs.items())
    raise ConfigError(
        f"dictionary.path {url} holds no autoencoder of a known format ({known}); there is {there}"
    )


def file_identities(url: str, form: str, wanted: Wanted) -> dict[str, str]:
    """What identifies the content of the files that a format needs, by name.

    Raises:
        ConfigError: one of them isn't there.
    """
    folder = Folder(Store(url))
    files = FORMATS[form].files(folder, wanted)
    absent = [name for name in files if not folder.store.exists(name)]
    if absent:
        there = ", ".join(folder.store.names()) or "nothing"
        raise ConfigError(
            f"dictionary.path {url} lacks {', '.join(absent)}, which the format {form} needs; "
            f"there is {there}"
        )
    return {name: content_identity(f"{url.rstrip('/')}/{name}") for name in files}


def read_published(url: str, form: str, wanted: Wanted, *, shapes_only: bool = False) -> Published:
    """The autoencoder in a folder.

    Args:
        url: the folder, by path or fsspec URL.
        form: a key of FORMATS.
        wanted: what the recipe says of it.
        shapes_only: on the meta device: everything is checked but the weights' values, which
            aren't read (a pickle is read whole).

    Raises:
        ConfigError: a file is missing or malformed, a setting of it can't be followed exactly,
            or it belongs to another layer.
    """
    if wanted.activation_scale is not None and form != "saelens":
        raise ConfigError(
            "dictionary.activation_scale is for SAELens files that leave it out; those of "
            f"{form} don't: leave it out here"
        )
    folder = Folder(Store(url), shapes_only=shapes_only)
    try:
        published = FORMATS[form].read(folder, wanted)
    except ValueError as error:
        raise ConfigError(f"dictionary.path {url}, read as {form}: {error}") from error
    except OSError as error:
        raise ConfigError(f"dictionary.path {url} can't be read: {error}") from error
    if published.block not in (None, wanted.layer):
        raise ConfigError(
            f"dictionary.layer is {wanted.layer}, but {published.told_by} says that the "
            f"autoencoder reads the output of block {published.block}, Hugging Face's "
            f"hidden_states[{published.block + 1}]: set dictionary.layer to {published.block}, "
            "or name another folder"
        )
    return published
