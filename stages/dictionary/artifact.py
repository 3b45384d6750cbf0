"""The dictionary's files: a sparse autoencoder in SAELens' format."""

from __future__ import annotations

from stages.dictionary.checkpoint import sae_from_bytes
from stages.dictionary.sae import SparseAutoencoder
from stages.storage import Store

_SAE_FILES = ("cfg.json", "sae_weights.safetensors")


def read_autoencoder(store: Store) -> SparseAutoencoder:
    """The autoencoder, in evaluation mode."""
    return sae_from_bytes({name: store.read_bytes(name) for name in _SAE_FILES}).eval()
