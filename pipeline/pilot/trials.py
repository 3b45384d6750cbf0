"""Trials: one training of a proxy on one mixture each, committed to the run by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.pilot.pool import sequences_of, tasks_of, training_rows
from stages.allocation.integers import allocated
from stages.engines.settings import ModelSettings
from stages.errors import StageError
from stages.mixture.simplex import FloatArray
from stages.pilots.settings import ProxySettings, ProxyTrainingSettings
from stages.storage import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trial:
    """A training.

    Attributes:
        weights: the mixture, a number a source, in the order of the recipe.
        rows: how many it is trained on.
        start: which of the random starts.
    """

    weights: tuple[float, ...]
    rows: int
    start: int

    @property
    def file(self) -> str:
        """Where its result is committed; the same training has the same name in any design."""
        text = json.dumps([[round(w, 12) for w in self.weights], self.rows, self.start])
        return f"trials/{self.rows}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def counts(self, sources: Sequence[str]) -> dict[str, int]:
        """Rows of each source, by the method of largest remainders."""
        given = allocated(np.array(self.weights), self.rows)
        return dict(zip(sources, given.tolist(), strict=True))


@dataclass(frozen=True)
class TrialJob:
    """A trial with all that a worker needs to run it."""

    run: str
    trial: Trial
    sources: tuple[str, ...]
    proxy: ProxySettings
    training: ProxyTrainingSettings
    student: ModelSettings | None
    seed: int


def trials_of(mixtures: FloatArray, rows: int, starts: int) -> list[Trial]:
    """Trials of some mixtures at one scale, the starts of a mixture beside each other."""
    return [Trial(tuple(p), rows, start) for p in mixtures.tolist() for start in range(starts)]


def run_trial(job: TrialJob) -> dict[str, Any]:
    """Train, measure, and commit; what is committed already is read.

    Raises:
        StageError: the training diverged.
    """
    store, trial = Store(job.run), job.trial
    if store.exists(trial.file):
        found: dict[str, Any] = store.read_json(trial.file)
        return found
    import torch

    from stages.pilots.proxy import mean_losses, train_proxy

    torch.set_num_threads(job.training.threads)
    counts = trial.counts(job.sources)
    rows = training_rows(store, counts, job.seed)
    targets = store.read_table("pool/targets.parquet")
    tasks, of = tasks_of(targets)
    seed = job.seed + trial.start
    model = _start(store, job, seed)
    try:
        tokens = train_proxy(model, rows, job.training, seed)
    except FloatingPointError as error:
        raise StageError(
            f"the training on {counts} diverged: {error}; lower training.learning_rate "
            f"({job.training.learning_rate:g} now)",
            stage="pilot",
        ) from error
    losses = mean_losses(model, sequences_of(targets), of, len(tasks))
    record = {
        "weights": list(trial.weights),
        "rows": trial.rows,
        "start": trial.start,
        "counts": counts,
        "response_tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(losses.mean()),
        "loss_by_task": dict(zip(tasks, losses.tolist(), strict=True)),
    }
    store.write_json(trial.file, record)
    return record


def _start(store: Store, job: TrialJob, seed: int) -> PreTrainedModel:
    """The model as it is before its training."""
    import torch

    if job.student is not None:
        from stages.engines.model_files import load_causal_lm

        torch.manual_seed(seed)
        return load_causal_lm(job.student)
    from stages.pilots.encoding import read_tokenizer
    from stages.pilots.proxy import small_llama

    vocabulary = read_tokenizer(store.read_bytes("tokenizer.json").decode()).get_vocab_size()
    model = small_llama(job.proxy, vocabulary, seed)
    module: torch.nn.Module = model
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    return model
