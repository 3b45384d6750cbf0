"""The prototypes' files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from scipy.sparse import csr_array

from stages.rows import canonical_json
from stages.storage import Store

FILE = "prototypes.safetensors"
TASKS = "tasks.json"


@dataclass(frozen=True)
class Frequencies:
    """How often each latent is active in a sample of rows.

    Attributes:
        rows: rows of the sample.
        row_share: share of them with some token that activates the latent, float32 [latents].
        token_share: share of their tokens that activate it, float32 [latents].
    """

    rows: int
    row_share: NDArray[np.float32]
    token_share: NDArray[np.float32]


@dataclass(frozen=True)
class Prototypes:
    """What rows are compared with.

    Attributes:
        tasks: names, sorted.
        codes: prototype of each task, float32 [tasks, latents].
        targets: pooled code of each target row that has content, float32 [targets, latents],
            in the order of the targets.
        task_of_target: number of each one's task, int64 [targets].
        frequencies: None where they weren't asked for.
    """

    tasks: list[str]
    codes: NDArray[np.float32]
    targets: csr_array
    task_of_target: NDArray[np.int64]
    frequencies: Frequencies | None


def task_prototype(codes: csr_array) -> NDArray[np.float32]:
    r"""The arithmetic mean of a task's codes [examples, latents]; summed in float64.

    .. math:: p = \frac{1}{|T|} \sum_{x \in T} z(x)

    A mean stays on the scale of one code. A sum would be larger than every row by the number of
    examples, and all similarities to it would collapse towards zero.

    Source: MoNA (arXiv 2503.15573), Eq. 8.
    """
    total = np.asarray(codes.astype(np.float64).sum(axis=0))
    mean: NDArray[np.float32] = (total / codes.shape[0]).astype(np.float32)
    return mean


def prototype_files(prototypes: Prototypes) -> dict[str, bytes]:
    """The artifact's files; the same prototypes give the same bytes."""
    targets = prototypes.targets
    tensors = {
        "prototypes": prototypes.codes,
        "target_starts": targets.indptr.astype(np.int64),
        "target_latents": targets.indices.astype(np.int32),
        "target_values": targets.data.astype(np.float32),
        "task_of_target": prototypes.task_of_target,
    }
    if prototypes.frequencies is not None:
        tensors |= {
            "sampled_rows": np.array([prototypes.frequencies.rows], np.int64),
            "row_share": prototypes.frequencies.row_share,
            "token_share": prototypes.frequencies.token_share,
        }
    tasks = canonical_json(prototypes.tasks).encode()
    return {FILE: save({k: np.ascontiguousarray(v) for k, v in tensors.items()}), TASKS: tasks}


def read_prototypes(store: Store) -> Prototypes:
    """The prototypes in an artifact's folder."""
    tensors = load(store.read_bytes(FILE))
    codes = cast("NDArray[np.float32]", tensors["prototypes"])
    parts = (tensors["target_values"], tensors["target_latents"], tensors["target_starts"])
    frequencies = None
    if "row_share" in tensors:
        frequencies = Frequencies(
            int(tensors["sampled_rows"][0]), tensors["row_share"], tensors["token_share"]
        )
    return Prototypes(
        task_names(store),
        codes,
        csr_array(parts, shape=(len(tensors["target_starts"]) - 1, codes.shape[1])),
        tensors["task_of_target"],
        frequencies,
    )


def task_names(store: Store) -> list[str]:
    """Names of the tasks, in the order of the prototypes."""
    return [str(name) for name in store.read_json(TASKS)]
