"""Comparison of rows' codes with the targets'."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stages.features.distances import cosine_similarity, negative_distance
from stages.features.jaccard import generalised_jaccard
from stages.features.pairwise import PairwiseJaccard
from stages.features.settings import FeaturesSettings, Metric
from stages.features.weights import latent_weights
from stages.prototypes.artifact import Prototypes

_METRICS: dict[Metric, Callable[[Tensor, Tensor], Tensor]] = {
    "jaccard": generalised_jaccard,
    "cosine": cosine_similarity,
    "euclidean": negative_distance,
}


class Similarities(NamedTuple):
    """Of a batch of rows, on the CPU.

    Attributes:
        by_task: float64 [rows, tasks].
        by_target: float64 [rows, targets]; None unless target rows were compared with.
    """

    by_task: Tensor
    by_target: Tensor | None


class References:
    """Prototypes and target rows under one metric and one set of weights."""

    def __init__(
        self, prototypes: Prototypes, settings: FeaturesSettings, device: torch.device
    ) -> None:
        """Weight them, and lay out the target rows where they are needed.

        Raises:
            StageError: the weights leave no latent.
        """
        weights = latent_weights(settings, prototypes.frequencies)
        self._weights = None if weights is None else torch.from_numpy(weights).to(device)
        self._metric = _METRICS[settings.metric]
        self._how = settings.target_rows
        self._prototypes = self.weighted(torch.from_numpy(prototypes.codes).to(device))
        self._tasks = len(prototypes.tasks)
        self._task_of_target = torch.from_numpy(prototypes.task_of_target)
        self._to_targets: Callable[[Tensor], Tensor] | None = None
        if settings.needs_target_rows:
            targets = self.weighted(torch.from_numpy(prototypes.targets.toarray()).to(device))
            self._to_targets = (
                PairwiseJaccard(targets)
                if settings.metric == "jaccard"
                else lambda z: self._metric(z, targets)
            )

    def weighted(self, codes: Tensor) -> Tensor:
        """Codes times the latents' weights."""
        return codes if self._weights is None else codes * self._weights

    def similarities(self, codes: Tensor) -> Similarities:
        """Of these codes to every task, and to every target row where those are needed.

        Args:
            codes: unweighted, float32 [rows, latents].
        """
        z = self.weighted(codes)
        by_target = None if self._to_targets is None else self._to_targets(z).cpu()
        if self._how == "prototype" or by_target is None:
            return Similarities(self._metric(z, self._prototypes).cpu(), by_target)
        by_task = torch.empty(len(z), self._tasks, dtype=torch.float64)
        for task in range(self._tasks):
            mine = by_target[:, self._task_of_target == task]
            by_task[:, task] = mine.mean(dim=1) if self._how == "mean" else mine.amax(dim=1)
        return Similarities(by_task, by_target)

    def active(self, peaks: Tensor, above: float) -> list[Tensor]:
        """Latents of each row that exceed a threshold somewhere and that no mask leaves out.

        Args:
            peaks: max-pooled codes, float32 [rows, latents].
            above: the threshold.

        Returns:
            int32, one tensor a row, ascending.
        """
        active = peaks > above
        if self._weights is not None:
            active &= self._weights > 0
        return [row.nonzero().squeeze(1).int().cpu() for row in active]
