"""`tamis train-sae`: rows through a student cut at a layer, a buffer, a trainer, and its measures.

Everything that training goes on from is in one file, which appears whole or not at all, so that the
same command goes on after an interruption at any moment and ends with the same weights. The
manifest is written last.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.config import changed_fields
from pipeline.rundir import IDENTITY, MANIFEST, RunLock, files_digest
from pipeline.train_sae.checkpoint import (
    CHECKPOINT,
    TrainingState,
    training_state,
    write_checkpoint,
)
from pipeline.train_sae.config import TrainSaeConfig
from pipeline.train_sae.curve import training_curve
from pipeline.train_sae.rows import Pool, Survey
from stages.dictionary.checks import check_active, check_layer
from stages.engines import MaskedSequence
from stages.engines.local import make_engine
from stages.engines.model_files import (
    cached_tokenizer,
    decoder_shape,
    model_identity,
    set_threads,
    threads_of,
)
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.features.tokens import masked_sequence
from stages.ingest.parse import content_of
from stages.rows import Message
from stages.sources.files import files_of
from stages.storage import Store

if TYPE_CHECKING:
    import torch

    from stages.dictionary.evaluate import Reconstruction, SplicedLosses
    from stages.dictionary.sae import SparseAutoencoder
    from stages.dictionary.train import TrainingConfig, TrainingPoint

Make = Callable[[str, ModelSettings], Any]

VERSION = 1
"""Goes up when the same recipe comes to give other weights."""

METRICS, CURVE, REPORT = "metrics.jsonl", "curve.svg", "report.json"
ROWS_AT_ONCE = 128
"""Rows that the student reads in one call; batches are formed inside it."""
POINTS = 1000
"""Steps whose measures are kept, at most."""


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        step: steps done.
        steps: of all.
        tokens: activations trained on.
        tokens_per_second: since this process began.
        fvu: fraction of variance unexplained of the last batch.
        l0: its active latents a token.
        dead_share: share of latents silent for long.
    """

    step: int
    steps: int
    tokens: int
    tokens_per_second: float
    fvu: float
    l0: float
    dead_share: float


Say = Callable[[str], None]
Show = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainedSae:
    """A finished training: its report, a hash of its files, and whether it was there before."""

    report: dict[str, Any]
    digest: str
    was_complete: bool


def train_sae(config: TrainSaeConfig, say: Say, show: Show, make: Make = make_engine) -> TrainedSae:
    """Train an autoencoder, or go on training it.

    Args:
        config: the recipe.
        say: told what goes on, a line a step.
        show: told where training stands, after every optimiser step.
        make: makes engines.

    Raises:
        ConfigError: something that the recipe names is missing or can't be used, or the folder
            holds another recipe's training.
        StageError: training can't go on, or files of a finished one are missing or have changed.
        RunBusy: another process works in the folder.
    """
    return _Training(config, say, show, make).run()


class _Training:
    def __init__(self, config: TrainSaeConfig, say: Say, show: Show, make: Make) -> None:
        self._config, self._say, self._show, self._make = config, say, show, make
        self._store = Store(config.execution.run)
        self._total = config.training.steps * config.training.batch

    def run(self) -> TrainedSae:
        config = self._config
        self._check()
        sources = [(source, files_of(source)) for source in config.sources]
        identity = self._identity()
        with RunLock(self._store):
            if self._is_complete(identity):
                self._check_files()
                self._store.remove(CHECKPOINT)
                return self._finished(was_complete=True)
            tokenizer = cached_tokenizer(config.student)

            def sequenced(messages: Sequence[Message]) -> MaskedSequence:
                part, length = config.autoencoder.part, config.student.max_length
                return masked_sequence(tokenizer, messages, part, length)

            pool = Pool(sources, config.seed, config.training.held_out_share, sequenced)
            survey = self._survey(pool)
            self._store.write_json(IDENTITY, identity)
            set_threads(config.student)
            sae, points, reconstruction = self._trained(pool, survey)
            losses = self._losses(sae, survey.held_out)
            report = self._report(survey, points[-1], reconstruction, losses)
            self._write(sae, points, report, identity)
            return self._finished(was_complete=False)

    def _finished(self, *, was_complete: bool) -> TrainedSae:
        digest = files_digest(self._store.read_json(MANIFEST)["files"])
        return TrainedSae(self._store.read_json(REPORT), digest, was_complete)

    def _check(self) -> None:
        """What can be wrong before a model is loaded."""
        config = self._config
        blocks, width = decoder_shape(config.student)
        settings = config.autoencoder
        check_layer("autoencoder.layer", settings.layer, blocks, config.student.model)
        check_active("autoencoder.k", settings.k, settings.latents_for(width))

    def _survey(self, pool: Pool) -> Survey:
        """What the sources hold.

        Raises:
            ConfigError: they give fewer tokens than are trained on.
        """
        settings = self._config.training
        self._say("reading the sources")
        survey = pool.survey(-(-self._total // settings.passes), settings.evaluation_tokens)
        if survey.tokens * settings.passes < self._total:
            raise ConfigError(
                f"training.tokens: {settings.tokens}, and the sources give {survey.tokens} tokens "
                f"of part: {self._config.autoencoder.part} in a pass, {settings.passes} of which "
                f"are allowed; add rows, raise training.passes, or lower tokens"
            )
        return survey

    def _trained(
        self, pool: Pool, survey: Survey
    ) -> tuple[SparseAutoencoder, list[TrainingPoint], Reconstruction]:
        """The autoencoder, its training's points, and its measures on held-out activations."""
        import torch

        from stages.dictionary.evaluate import evaluate_reconstruction

        training = self._training_config()
        reader = self._make("reader", self._config.student)
        try:
            sae, points = self._fitted(pool, reader, training)
            self._say("measuring on held-out rows")
            held_out = self._activations(reader, survey.held_out)
            batches = torch.split(held_out, self._config.training.batch)
            return sae, points, evaluate_reconstruction(sae, batches)
        except FloatingPointError as error:
            raise StageError(
                f"{error} of {training.steps}: lower training.learning_rate "
                f"({training.peak_learning_rate:.3g} now), or raise warmup_share; at step 1 the "
                "student's activations themselves aren't finite: use dtype float32 or bfloat16",
                stage="train-sae",
            ) from error
        except ValueError as error:
            raise StageError(f"the training can't be finished: {error}", stage="train-sae") from (
                error
            )
        finally:
            reader.close()

    def _fitted(
        self, pool: Pool, reader: Any, training: TrainingConfig
    ) -> tuple[SparseAutoencoder, list[TrainingPoint]]:
        """The autoencoder and its training's points, from the last checkpoint on."""
        from stages.dictionary.buffer import mixed_batches
        from stages.dictionary.train import train

        settings = self._config.training
        state = training_state(self._store, training, settings.buffer, self._config.seed, _device())
        if state.trainer.steps_done:
            self._say(f"going on after step {state.trainer.steps_done} of {settings.steps}")
        else:
            self._say(f"filling the buffer with {settings.buffer:,} tokens")
        began, already = time.monotonic(), state.trainer.steps_done
        every = -(-settings.steps // POINTS)

        def after_step(point: TrainingPoint) -> None:
            done = point.step * settings.batch
            spent = time.monotonic() - began
            speed = (point.step - already) * settings.batch / spent
            self._show(Progress(point.step, settings.steps, done, speed, *point[1:]))
            last = point.step == settings.steps
            if point.step % every == 0 or last:
                state.points.append(point)
            if point.step % self._config.execution.checkpoint_every == 0 or last:
                write_checkpoint(self._store, state)
                self._write_curve(state.points)

        chunks = self._chunks(pool, reader, state)
        sae = train(state.trainer, mixed_batches(state.buffer, chunks, settings.batch), after_step)
        return sae, state.points

    def _chunks(self, pool: Pool, reader: Any, state: TrainingState) -> Iterator[torch.Tensor]:
        """Activations as the buffer asks for them, so many as are trained on and no more."""
        passes = self._config.training.passes
        for sequences, place in pool.chunks(state.place, passes, ROWS_AT_ONCE):
            found = self._activations(reader, sequences)[: self._total - state.read]
            state.place, state.read = place, state.read + len(found)
            yield found
            if state.read == self._total:
                return

    def _activations(self, reader: Any, sequences: Sequence[MaskedSequence]) -> torch.Tensor:
        import torch

        return torch.from_numpy(reader.activations(sequences, self._config.autoencoder.layer))

    def _losses(self, sae: SparseAutoencoder, held_out: list[MaskedSequence]) -> SplicedLosses:
        """What the student loses when the reconstruction, or nothing, takes the output's place."""
        import torch

        from stages.dictionary.evaluate import SplicedLosses

        layer = self._config.autoencoder.layer
        splicer = self._make("splicer", self._config.student)

        def mean_loss(replace: Any = None) -> float:
            found = splicer.spliced(held_out, layer, replace)
            return float(-found.sums.sum() / found.counts.sum())

        try:
            return SplicedLosses(mean_loss(), mean_loss(sae), mean_loss(torch.zeros_like))
        finally:
            splicer.close()

    def _training_config(self) -> TrainingConfig:
        from stages.dictionary.train import TrainingConfig

        _, width = decoder_shape(self._config.student)
        autoencoder, settings = self._config.autoencoder, self._config.training
        return TrainingConfig(
            d_in=width,
            d_sae=autoencoder.latents_for(width),
            k=autoencoder.k,
            steps=settings.steps,
            training=autoencoder.training,
            encoder_start=autoencoder.encoder_start,
            learning_rate=settings.learning_rate,
            warmup_steps=int(settings.warmup_share * settings.steps),
            decay_steps=int(settings.decay_share * settings.steps),
            dead_after_tokens=settings.dead_after_tokens
            or min(10_000_000, max(self._total // 20, settings.batch)),
        )

    def _identity(self) -> dict[str, Any]:
        """What the weights are a function of, in plain values."""
        on_gpu = _device() == "cuda"
        return {
            "version": VERSION,
            "recipe": self._config.portable_recipe,
            "student": {
                "weights": model_identity(self._config.student.model),
                "numerics": {
                    **{library: version(library) for library in ("torch", "transformers")},
                    "machine": platform.machine(),
                    "device": "cuda" if on_gpu else "cpu",
                    **({} if on_gpu else {"threads": threads_of(self._config.student)}),
                },
            },
            "sources": {
                name: dict(files) for name, files in content_of(self._config.sources).items()
            },
        }

    def _is_complete(self, identity: dict[str, Any]) -> bool:
        if self._store.exists(IDENTITY):
            changed = changed_fields(self._store.read_json(IDENTITY), identity)
            if changed:
                raise ConfigError(
                    f"{self._store.url} holds another training: {'; '.join(changed)}; give another "
                    "execution.run, or remove the folder"
                )
        return self._store.exists(MANIFEST)

    def _check_files(self) -> None:
        """Refuse a finished training whose files aren't those that its manifest lists.

        Raises:
            StageError: with their names.
        """
        wrong = []
        for entry in self._store.read_json(MANIFEST)["files"]:
            if not self._store.exists(entry["path"]):
                wrong.append(f"{entry['path']} is missing")
            elif self._store.sha256(entry["path"]) != entry["sha256"]:
                wrong.append(f"{entry['path']} has changed")
        if wrong:
            raise StageError(
                f"{self._store.url} holds a finished training, but {'; '.join(wrong)}: "
                f"put back what {MANIFEST} lists, or remove {MANIFEST} to train again",
                stage="train-sae",
            )

    def _report(
        self,
        survey: Survey,
        last: TrainingPoint,
        reconstruction: Reconstruction,
        losses: SplicedLosses,
    ) -> dict[str, Any]:
        return {
            "name": self._config.name,
            "rows": survey.rows,
            "rejected": survey.rejected,
            "tokens": self._total,
            "steps": self._config.training.steps,
            "dead_share": last.dead_share,
            "held_out": {
                "rows": len(survey.held_out),
                "tokens": sum(sum(sequence.keep) for sequence in survey.held_out),
                "fvu": reconstruction.fvu,
                "l0": reconstruction.l0,
                "unfired_share": reconstruction.dead_share,
                "ce": asdict(losses),
                "ce_recovered": losses.recovered,
            },
        }

    def _write_curve(self, points: list[TrainingPoint]) -> None:
        """Write the measures so far, as numbers and as a picture."""
        batch = self._config.training.batch
        lines = [json.dumps({"tokens": p.step * batch, **p._asdict()}) + "\n" for p in points]
        self._store.write_bytes(METRICS, "".join(lines).encode())
        self._store.write_bytes(CURVE, training_curve(points, batch).encode())

    def _write(
        self,
        sae: SparseAutoencoder,
        points: list[TrainingPoint],
        report: dict[str, Any],
        identity: dict[str, Any],
    ) -> None:
        """Write the result, its manifest last."""
        from stages.dictionary.checkpoint import sae_bytes

        files = {
            **sae_bytes(sae, self._provenance(report, identity)),
            REPORT: (json.dumps(report, indent=2) + "\n").encode(),
        }
        for name, data in files.items():
            self._store.write_bytes(name, data)
        self._write_curve(points)
        listed = [
            {"path": name, "bytes": self._store.size(name), "sha256": self._store.sha256(name)}
            for name in sorted([*files, METRICS, CURVE])
        ]
        self._store.write_json(MANIFEST, {"identity": identity, "files": listed})
        self._store.remove(CHECKPOINT)

    def _provenance(self, report: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
        """What a reader of the autoencoder should know of it, SAELens' own names first."""
        layer = self._config.autoencoder.layer
        return {
            "model_name": identity["recipe"]["models"][self._config.autoencoder.student]["model"],
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hf_hidden_states_index": layer + 1,
            "part": self._config.autoencoder.part,
            "training_tokens": self._total,
            "training": self._config.autoencoder.training,
            "seed": self._config.seed,
            "held_out": report["held_out"],
            "student": identity["student"],
            "sources": identity["sources"],
            "recipe": identity["recipe"],
            "tamis_version": __version__,
        }


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
