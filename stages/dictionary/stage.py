"""The dictionary stage: train or read a sparse autoencoder, find each task's prototype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.dictionary.brought import brought_files, brought_sae, check_brought
from stages.dictionary.checks import check_active, check_layer
from stages.dictionary.settings import DictionarySettings
from stages.engines import FeatureReader, MaskedSequence
from stages.engines.model_files import cached_tokenizer, decoder_shape, set_threads
from stages.engines.settings import ModelSettings
from stages.errors import RowError, StageError
from stages.features.tokens import masked_sequence
from stages.sampling import sampled_ids
from stages.storage import Store

if TYPE_CHECKING:
    import torch

    from stages.dictionary.sae import SparseAutoencoder


_JUDGED_ROWS = 16
"""Target rows on which an autoencoder that was brought is measured."""


class DictionaryStage:
    """Trains on activations of a sample of rows, or reads files; encodes the targets."""

    name = "dictionary"
    version = 2

    def __init__(
        self, settings: DictionarySettings, models: Mapping[str, ModelSettings], seed: int
    ) -> None:
        """Keep the settings, the student's, and the seed."""
        self.settings = settings
        self._student = models[settings.student]
        self._seed = seed

    @property
    def on_targets(self) -> bool:
        """Whether target rows are reconstructed, to judge a dictionary that was brought."""
        return self.settings.path is not None

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), pa.schema([]))

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student's activations."""
        return {"student": EngineSpec("reader", self.settings.student, self._student)}

    def check(self) -> None:
        """Refuse what the student doesn't have, and files that can't be read or aren't its own.

        Raises:
            ConfigError: naming the value or the file, and what to do.
        """
        settings = self.settings
        blocks, width = decoder_shape(self._student)
        check_layer("dictionary.layer", settings.layer, blocks, self._student.model)
        if settings.path is None:
            check_active("dictionary.k", settings.k, width * settings.expansion)
        else:
            check_brought(settings, self._student)

    def file_contents(self) -> Mapping[str, Any]:
        """The files that `path` names count by what they hold, wherever they lie.

        Raises:
            ConfigError: they aren't there.
        """
        if self.settings.path is None:
            return {}
        return {"path": brought_files(self.settings)}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """The autoencoder's files.

        Raises:
            ConfigError: an autoencoder that was brought can't be read.
            StageError: the rows have no token to train on.
        """
        from stages.dictionary.checkpoint import sae_bytes

        set_threads(self._student)
        reader: FeatureReader = engines["student"]
        if self.settings.path is None:
            sae, provenance, report = await self._made(columns, reader)
        else:
            sae, provenance = brought_sae(self.settings)
            report = {"quality": await self._quality(targets, reader, sae)}
        files = sae_bytes(
            sae,
            {
                "model_name": self._student.model,
                "hook_name": f"blocks.{self.settings.layer}.hook_resid_post",
                "hf_hidden_states_index": self.settings.layer + 1,
                "part": self.settings.part,
                **provenance,
            },
        )
        return Artifact(files, report | {"latents": sae.config.d_sae})

    async def _made(
        self, columns: ShardedColumns, reader: FeatureReader
    ) -> tuple[SparseAutoencoder, dict[str, Any], dict[str, Any]]:
        """An autoencoder trained on the rows, how it was made, and how good it is."""
        from stages.dictionary.evaluate import evaluate_reconstruction

        activations = await self._training_activations(columns, reader)
        train, held_out = _split(activations, self._seed)
        sae, curve = self._trained(train)
        quality = evaluate_reconstruction(sae, _batches_of(held_out, self.settings.batch))
        provenance = {
            "training_tokens": len(train),
            "training": self.settings.training,
            "seed": self._seed,
        }
        report = {
            "tokens": len(activations),
            "held_out_tokens": len(held_out),
            "quality": asdict(quality),
            "curve": curve,
        }
        return sae, provenance, report

    async def _quality(
        self, targets: ShardedColumns, reader: FeatureReader, sae: SparseAutoencoder
    ) -> dict[str, float] | None:
        """How well it reconstructs the first target rows: FVU near 1 tells of a wrong layer."""
        from stages.dictionary.evaluate import evaluate_reconstruction

        sequences: list[MaskedSequence] = []
        for table in targets.iter(("effective_messages",)):
            found = self._sequences(table.slice(0, _JUDGED_ROWS - len(sequences)))
            sequences += [sequence for sequence in found if sequence is not None]
            if len(sequences) >= _JUDGED_ROWS:
                break
        states = await reader.activations(sequences, self.settings.layer)
        # The variance of a single token is zero, and its FVU undefined.
        if len(states) < 2:
            return None
        return asdict(evaluate_reconstruction(sae, _batches_of(states, 256)))

    async def _training_activations(
        self, columns: ShardedColumns, reader: FeatureReader
    ) -> NDArray[np.float32]:
        """Activations of `tokens` tokens drawn without bias from the sampled rows, [tokens, d]."""
        sampled = sampled_ids(columns, self.settings.rows, self._seed)
        draws = np.random.default_rng([self._seed, 1])
        kept: NDArray[np.float32] | None = None
        keys: NDArray[np.float64] = np.zeros(0)
        for table in columns.iter(("id", "effective_messages")):
            sequences = [
                sequence
                for row, sequence in zip(
                    table["id"].to_pylist(), self._sequences(table), strict=True
                )
                if row in sampled and sequence is not None
            ]
            if not sequences:
                continue
            found = await reader.activations(sequences, self.settings.layer)
            kept = found if kept is None else np.concatenate([kept, found])
            keys = np.concatenate([keys, draws.random(len(found))])
            if len(kept) > self.settings.tokens:
                # The lowest keys are a uniform sample, whatever the shards.
                lowest = np.sort(
                    np.argpartition(keys, self.settings.tokens)[: self.settings.tokens]
                )
                kept, keys = kept[lowest], keys[lowest]
        if kept is None or not len(kept):
            raise StageError("no row has a content token to train on", stage=self.name)
        return kept

    def _trained(
        self, activations: NDArray[np.float32]
    ) -> tuple[SparseAutoencoder, dict[str, list[float]]]:
        """The autoencoder, and measures of about fifty of its training steps."""
        from stages.dictionary.train import Trainer, TrainingConfig, TrainingPoint, train

        settings = self.settings
        points: list[TrainingPoint] = []

        def note(point: TrainingPoint) -> None:
            if point.step % max(1, settings.steps // 50) == 0 or point.step == settings.steps:
                points.append(point)

        batches = _shuffled_batches(activations, settings.batch, settings.steps, self._seed)
        try:
            config = TrainingConfig(
                d_in=activations.shape[1],
                d_sae=activations.shape[1] * settings.expansion,
                k=settings.k,
                steps=settings.steps,
                training=settings.training,
                encoder_start=settings.encoder_start,
                learning_rate=settings.learning_rate,
                warmup_steps=int(settings.warmup_share * settings.steps),
                # A latent that hasn't fired in a twentieth of the training is revived by AuxK.
                dead_after_tokens=max(settings.steps * settings.batch // 20, settings.batch),
            )
            sae = train(Trainer(config, self._seed), batches, note)
        except (ValueError, FloatingPointError) as error:
            raise StageError(
                f"the autoencoder can't be trained on {len(activations)} tokens: {error}",
                stage=self.name,
            ) from error
        columns = zip(*points, strict=True)
        return sae, {
            name: list(values) for name, values in zip(TrainingPoint._fields, columns, strict=True)
        }

    def _sequences(self, table: pa.Table) -> list[MaskedSequence | None]:
        tokenizer = cached_tokenizer(self._student)
        sequences: list[MaskedSequence | None] = []
        for messages in table["effective_messages"].to_pylist():
            try:
                sequences.append(
                    masked_sequence(
                        tokenizer, messages, self.settings.part, self._student.max_length
                    )
                )
            except RowError:
                # A row without usable tokens teaches nothing; features gives it its status.
                sequences.append(None)
        return sequences


def _split(
    activations: NDArray[np.float32], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tokens to train on, and a tenth (at least one) that training never sees."""
    order = np.random.default_rng([seed, 3]).permutation(len(activations))
    held_out = max(1, len(order) // 10)
    return activations[np.sort(order[held_out:])], activations[np.sort(order[:held_out])]


def _shuffled_batches(
    activations: NDArray[np.float32], batch: int, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """`steps` batches, each pass over the tokens in a new seeded order."""
    import torch

    order = np.random.default_rng([seed, 2])
    size = min(batch, len(activations))
    queue: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < size:
            queue = np.concatenate([queue, order.permutation(len(activations))])
        chosen, queue = queue[:size], queue[size:]
        yield torch.from_numpy(activations[chosen])


def _batches_of(activations: NDArray[np.float32], batch: int) -> Iterator[torch.Tensor]:
    import torch

    for start in range(0, len(activations), batch):
        yield torch.from_numpy(activations[start : start + batch])
