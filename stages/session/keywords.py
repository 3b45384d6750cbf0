"""Settings as keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

Function = TypeVar("Function", bound=Callable[..., Any])


def takes(
    *sections: type[BaseModel], leave: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Show the fields of settings as keywords in the signature of a function with `**settings`.

    Args:
        sections: of a recipe, whose fields the function takes.
        leave: fields that it doesn't take.
    """
    fields = {
        name: field
        for section in sections
        for name, field in section.model_fields.items()
        if name not in leave
    }

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty
                if field.is_required()
                else field.get_default(call_default_factory=True),
                annotation=field.annotation,
            )
            for name, field in fields.items()
            if name not in signature.parameters
        ]
        function.__dict__["__signature__"] = signature.replace(parameters=[*own, *keywords])
        return function

    return shown
