"""What trials read, written to the run before the first: the pool's token ids, and its vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipeline.config import changed_fields
from pipeline.pilot.config import PilotConfig
from pipeline.pilot.pool import (
    FoundRows,
    Sequenced,
    sequence_table,
    source_rows,
    target_rows,
    texts_of,
)
from stages.embedding.stage import embedded_text
from stages.engines.model_files import cached_tokenizer, model_identity
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError
from stages.features.tokens import masked_sequence
from stages.forecast.transport_value import MixtureTransport
from stages.ingest.parse import Row
from stages.mixture.energy import energy_statistics
from stages.mixture.simplex import FloatArray
from stages.rows import Message
from stages.storage import Store

Make = Callable[[str, ModelSettings], Any]

PREPARED, VECTORS, VECTORS_OF = "prepared.json", "vectors.safetensors", "vectors.json"
TOKENIZER = "tokenizer.json"
_TOKENIZER_ROWS = 1000
"""Of each source, those of lowest hash: the tokenizer is the same whatever the design."""


@dataclass(frozen=True)
class Clouds:
    """Vectors of the sources' rows and of the targets.

    Attributes:
        vectors: of rows, float64 [n, d].
        source: of each row, int64 [n].
        targets: distinct target vectors, float64 [m, d].
        mass: of each, float64 [m]; every task has the same in sum.
    """

    vectors: FloatArray
    source: NDArray[np.int64]
    targets: FloatArray
    mass: FloatArray

    def transport(self, config: PilotConfig) -> MixtureTransport:
        """The transport value of mixtures."""
        assert config.transport is not None
        metric = config.transport.metric
        return MixtureTransport(self.vectors, self.source, self.targets, self.mass, metric)

    def energies(self, config: PilotConfig, mixtures: FloatArray) -> FloatArray:
        r"""Energy distances of mixtures [n, K] to the targets: :math:`2 p D - p^T E p - S`."""
        assert config.transport is not None
        to_target, between, within = energy_statistics(
            self.vectors,
            self.source,
            self.targets,
            self.mass,
            config.transport.metric,
            mixtures.shape[1],
        )
        crossed = np.einsum("nk,kl,nl->n", mixtures, between, mixtures)
        return np.asarray(2.0 * mixtures @ to_target - crossed - within, np.float64)


def prepared_pool(
    config: PilotConfig, store: Store, wanted: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Write the rows that trials take, and say what the sources hold.

    Args:
        config: the recipe.
        store: the run.
        wanted: rows of each source.

    Returns:
        By source, and for "targets": rows read, rejected, unusable and kept.

    Raises:
        ConfigError: a source has fewer usable rows than are wanted, or can't be read.
    """
    if store.exists(PREPARED):
        found: dict[str, dict[str, int]] = store.read_json(PREPARED)
        if all(found[name]["kept"] >= count for name, count in wanted.items()):
            return found
    targets = target_rows(config.targets, config.target_rows, config.seed)
    taken = {row.group for row in targets.rows}
    sequenced = _sequenced(config, store, taken)
    survey: dict[str, dict[str, int]] = {}
    for source in config.sources:
        count = wanted[source.name]
        rows = source_rows(source, count, config.seed, taken, lambda row: _fits(sequenced, row))
        if len(rows.rows) < count:
            raise ConfigError(
                f"sources: {source.name} has {len(rows.rows)} usable rows, and a mixture of the "
                f"design asks for {count}; lower design.scales or budget, or add rows"
            )
        store.write_table(f"pool/{source.name}.parquet", sequence_table(rows.rows, sequenced))
        survey[source.name] = _counts(rows)
    table = sequence_table(targets.rows, sequenced)
    if not table.num_rows:
        raise ConfigError(
            "targets: no row has a response token within the longest sequence; raise max_length"
        )
    store.write_table("pool/targets.parquet", table)
    survey["targets"] = _counts(targets) | {"kept": table.num_rows}
    store.write_json(PREPARED, survey)
    return survey


def clouds(config: PilotConfig, store: Store, make: Make) -> Clouds:
    """Vectors of the rows of lowest hash and of the targets; embedded once, kept in the run."""
    settings = config.transport
    assert settings is not None
    encoder = config.models[settings.encoder]
    identity = {
        "encoder": model_identity(encoder.model),
        "settings": encoder.portable(),
        "part": settings.part,
        "rows_per_source": settings.rows_per_source,
        "library": version("sentence-transformers"),
    }
    if not store.exists(VECTORS) or changed_fields(_read(store, VECTORS_OF), identity):
        store.remove(VECTORS)
        store.write_bytes(VECTORS, save(_embedded(config, make)))
        store.write_json(VECTORS_OF, identity)
    found = load(store.read_bytes(VECTORS))
    distinct, place = np.unique(found["targets"].astype(np.float64), axis=0, return_inverse=True)
    task = found["task"]
    mass = (1.0 / np.bincount(task))[task]
    joint = np.bincount(place.ravel(), weights=mass)
    return Clouds(
        found["vectors"].astype(np.float64), found["source"], distinct, joint / joint.sum()
    )


def _embedded(config: PilotConfig, make: Make) -> dict[str, NDArray[Any]]:
    settings = config.transport
    assert settings is not None
    targets = target_rows(config.targets, config.target_rows, config.seed).rows
    taken = {row.group for row in targets}
    texts: list[str] = []
    source: list[int] = []
    for place, one in enumerate(config.sources):
        found = source_rows(
            one,
            settings.rows_per_source,
            config.seed,
            taken,
            lambda row: bool(embedded_text(row.messages, settings.part).strip()),
        ).rows
        texts += [embedded_text(row.messages, settings.part) for row in found]
        source += [place] * len(found)
    tasks = sorted({row.task for row in targets if row.task is not None})
    told = [row for row in targets if embedded_text(row.messages, settings.part).strip()]
    engine = make("embedder", config.models[settings.encoder])
    try:
        vectors = engine.embed(texts).vectors
        to = engine.embed([embedded_text(row.messages, settings.part) for row in told]).vectors
    finally:
        engine.close()
    return {
        "vectors": vectors,
        "source": np.array(source, np.int64),
        "targets": to,
        "task": np.array([tasks.index(row.task or "") for row in told], np.int64),
    }


def _sequenced(config: PilotConfig, store: Store, taken: set[str]) -> Sequenced:
    """How conversations become token ids; a small tokenizer is trained where none was yet."""
    if config.student is not None:
        student = config.student
        tokenizer = cached_tokenizer(student)
        return lambda messages: masked_sequence(tokenizer, messages, "response", student.max_length)
    from stages.pilots.encoding import read_tokenizer, response_sequence, trained_tokenizer

    if not store.exists(TOKENIZER):
        sample = [
            source_rows(source, _TOKENIZER_ROWS, config.seed, taken, lambda row: True).rows
            for source in config.sources
        ]
        texts = (text for rows in sample for text in texts_of(rows))
        made = trained_tokenizer(texts, config.proxy.vocabulary)
        store.write_bytes(TOKENIZER, made.to_str().encode())
    small = read_tokenizer(store.read_bytes(TOKENIZER).decode())
    return lambda messages: response_sequence(small, messages, config.proxy.max_length)


def _fits(sequenced: Callable[[list[Message]], Any], row: Row) -> bool:
    try:
        sequenced(row.messages)
    except RowError:
        return False
    return True


def _counts(found: FoundRows) -> dict[str, int]:
    return {
        "read": found.read,
        "rejected": found.rejected,
        "unusable": found.unusable,
        "kept": len(found.rows),
    }


def _read(store: Store, name: str) -> Any:
    return store.read_json(name) if store.exists(name) else {}
