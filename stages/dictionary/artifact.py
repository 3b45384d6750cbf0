"""The dictionary's files: a sparse autoencoder in SAELens' format, and prototypes of the tasks."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor

from stages.dictionary.checkpoint import sae_from_bytes
from stages.dictionary.sae import SparseAutoencoder
from stages.rows import canonical_json
from stages.storage import Store

PROTOTYPES = "prototypes.safetensors"
TASKS = "tasks.json"
_SAE_FILES = ("cfg.json", "sae_weights.safetensors")


def prototype_files(prototypes: Tensor, tasks: Sequence[str]) -> dict[str, bytes]:
    """Prototypes [tasks, latents] and the tasks' names, as files."""
    return {
        PROTOTYPES: save({"prototypes": prototypes.contiguous()}),
        TASKS: canonical_json(list(tasks)).encode(),
    }


def read_autoencoder(store: Store) -> SparseAutoencoder:
    """The autoencoder, in evaluation mode."""
    return sae_from_bytes({name: store.read_bytes(name) for name in _SAE_FILES}).eval()
