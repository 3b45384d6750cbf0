"""The prototypes stage: pooled codes of the targets, their means by task, latents' frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.dictionary.checks import check_student
from stages.dictionary.settings import DictionarySettings
from stages.engines import FeatureReader, MaskedSequence
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError, StageError
from stages.features.settings import FeaturesSettings
from stages.features.tokens import masked_sequence
from stages.prototypes.settings import PrototypeSettings
from stages.sampling import sampled_ids
from stages.storage import Store

if TYPE_CHECKING:
    from stages.prototypes.artifact import Frequencies


class PrototypesStage:
    """Encodes the targets with the dictionary; runs wherever features does.

    It stands apart from the dictionary, so that other targets or another pooling train nothing
    again. Source: MoNA (arXiv 2503.15573), Eqs. 7 and 8.
    """

    name = "prototypes"
    version = 1
    on_targets = True

    def __init__(
        self,
        features: FeaturesSettings,
        dictionary: DictionarySettings,
        models: Mapping[str, ModelSettings],
        seed: int,
    ) -> None:
        """Keep what bears on prototypes."""
        self.settings = PrototypeSettings(
            student=features.student,
            layer=dictionary.layer,
            part=features.part,
            pooling=features.pooling,
            frequency_rows=features.frequency_rows if features.needs_frequencies else None,
        )
        self._student = models[features.student]
        self._dictionary, self._models = dictionary, models
        self._seed = seed

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), pa.schema([]))

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student's activations."""
        return {"student": EngineSpec("reader", self.settings.student, self._student)}

    def artifacts(self) -> tuple[str, ...]:
        """The dictionary."""
        return ("dictionary",)

    def check(self) -> None:
        """Refuse a student whose states the dictionary wasn't made for.

        Raises:
            ConfigError: it is another model than the dictionary's, or has no such block.
        """
        check_student("features", self.settings.student, self._dictionary, self._models)

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """Prototypes, codes of the target rows, and frequencies where they are asked for.

        Raises:
            StageError: no target row has a content token, or no sampled row has one.
        """
        from scipy.sparse import vstack

        from stages.prototypes.artifact import Prototypes, prototype_files, task_prototype

        reader: FeatureReader = engines["student"]
        settings, url = self.settings, artifacts["dictionary"].url
        names: list[str] = []
        codes = []
        for table in targets.iter(("id", "effective_messages", "task")):
            found = self._sequences(table)
            pairs = zip(table["task"].to_pylist(), found, strict=True)
            names += [task for task, sequence in pairs if sequence is not None]
            usable = [sequence for sequence in found if sequence is not None]
            codes.append(await reader.pooled_codes(usable, settings.layer, url, settings.pooling))
        if not names:
            raise StageError(
                f"no target row has a content token of part {settings.part}; choose another part, "
                "or other targets",
                stage=self.name,
            )
        stacked = vstack(codes, format="csr")
        tasks = sorted(set(names))
        number = np.array([tasks.index(name) for name in names], np.int64)
        made = Prototypes(
            tasks,
            np.stack([task_prototype(stacked[number == task]) for task in range(len(tasks))]),
            stacked,
            number,
            await self._frequencies(columns, reader, url),
        )
        active = np.diff(stacked.indptr)
        report: dict[str, Any] = {
            "target_rows": {task: names.count(task) for task in tasks},
            "latents": stacked.shape[1],
            "active_latents_of_a_target_row": float(active.mean()),
            "active_latents_of_all": len(np.unique(stacked.indices)),
        }
        if made.frequencies is not None:
            share = made.frequencies.token_share
            report |= {
                "sampled_rows": made.frequencies.rows,
                "dead_share": float((share == 0).mean()),
                "active_latents_of_a_token": float(share.sum()),
            }
        return Artifact(prototype_files(made), report)

    async def _frequencies(
        self, columns: ShardedColumns, reader: FeatureReader, dictionary: str
    ) -> Frequencies | None:
        from stages.prototypes.artifact import Frequencies

        if self.settings.frequency_rows is None:
            return None
        wanted = sampled_ids(columns, self.settings.frequency_rows, self._seed)
        rows = tokens = 0
        in_rows: Any = 0
        in_tokens: Any = 0
        for table in columns.iter(("id", "effective_messages")):
            mine = [row in wanted for row in table["id"].to_pylist()]
            found = self._sequences(table.filter(pa.array(mine, pa.bool_())))
            usable = [sequence for sequence in found if sequence is not None]
            if not usable:
                continue
            counts = await reader.latent_counts(usable, self.settings.layer, dictionary)
            rows += len(usable)
            tokens += sum(sum(sequence.keep) for sequence in usable)
            in_rows = in_rows + counts.rows
            in_tokens = in_tokens + counts.tokens
        if not rows:
            raise StageError(
                "no sampled row has a content token to count latents over", stage=self.name
            )
        return Frequencies(
            rows, (in_rows / rows).astype(np.float32), (in_tokens / tokens).astype(np.float32)
        )

    def _sequences(self, table: pa.Table) -> list[MaskedSequence | None]:
        """Ids of each row; None of one without usable tokens (features gives it its status)."""
        tokenizer = cached_tokenizer(self._student)
        part, longest = self.settings.part, self._student.max_length
        sequences: list[MaskedSequence | None] = []
        for messages in table["effective_messages"].to_pylist():
            try:
                sequences.append(masked_sequence(tokenizer, messages, part, longest))
            except RowError:
                sequences.append(None)
        return sequences
