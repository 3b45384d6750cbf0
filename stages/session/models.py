"""The models of a session: loaded when a stage first asks for them, and kept for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from stages.base import EngineSpec
from stages.engines.chat_cache import CachedChat
from stages.engines.generation_cache import CachedGenerator
from stages.engines.local import handle_of, make_engine
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.explained import explained
from stages.rows import canonical_json
from stages.storage import Store

MakeEngine = Callable[[str, ModelSettings], Any]
ModelLike = ModelSettings | Mapping[str, Any] | str
"""A model as a user names it: a reference, the fields of a recipe's entry, or settings."""


def model_settings(name: str, value: ModelLike) -> ModelSettings:
    """Settings of a model.

    Raises:
        ConfigError: naming the field that is wrong.
    """
    if isinstance(value, ModelSettings):
        return value
    fields = {"model": value} if isinstance(value, str) else dict(value)
    try:
        return ModelSettings.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(explained(error, f"model {name}", ModelSettings)) from error


class OpenModels:
    """Engines by what they do and by their model's settings; one for all stages that ask alike."""

    def __init__(self, cache: Store, make: MakeEngine = make_engine) -> None:
        """Load nothing yet.

        Args:
            cache: where generated text is kept.
            make: makes an engine of a kind.
        """
        self._cache, self._make = cache, make
        self._engines: dict[tuple[str, ModelSettings], Any] = {}
        self._handles: dict[tuple[str, ModelSettings], Any] = {}

    def loaded(self, engines: Mapping[str, EngineSpec]) -> dict[str, Any]:
        """Engines by role, as stages await them.

        Raises:
            EngineError: a model can't be loaded.
        """
        found = {}
        for role, spec in engines.items():
            key = spec.kind, spec.settings
            if key not in self._engines:
                self._engines[key] = self._make(*key)
                self._handles[key] = handle_of(self._engines[key], spec.settings)
            found[role] = self._cached(spec, self._handles[key])
        return found

    def close(self) -> None:
        """Free all of them; what asks next loads its own again."""
        self._handles.clear()
        while self._engines:
            self._engines.popitem()[1].close()

    def _cached(self, spec: EngineSpec, handle: Any) -> Any:
        if spec.kind != "generator":
            return handle
        identity = canonical_json(spec.settings.portable())
        kept = self._cache, identity, spec.settings.generation_chunk
        return (CachedGenerator if spec.settings.endpoint is None else CachedChat)(handle, *kept)
