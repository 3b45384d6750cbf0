"""Names of a package that are imported from their modules when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose modules would load more than most users need.

    Args:
        package: its `__name__`.
        homes: by public name, the module of the package that defines it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package} has no attribute {name}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
