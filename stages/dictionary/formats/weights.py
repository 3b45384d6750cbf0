"""Weights of a published autoencoder under our names and in our orientation."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from stages.dictionary.sae import (
    Architecture,
    Normalisation,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    filled_sae,
)


def check_names(
    file: str, tensors: Collection[str], needed: Collection[str], ignored: Collection[str] = ()
) -> None:
    """Refuse a file that lacks a weight, or holds one that would have to be applied.

    Raises:
        ValueError: With the names.
    """
    missing = set(needed) - set(tensors)
    unexpected = set(tensors) - set(needed) - set(ignored)
    if missing or unexpected:
        raise ValueError(
            f"{file}: missing {sorted(missing)}, unexpected {sorted(unexpected)}; an autoencoder "
            f"of this format holds {sorted(needed)}"
        )


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights of integers, or with a NaN or an infinity (none on the meta device).

    Raises:
        ValueError: With the weight's name.
    """
    for name, weight in tensors.items():
        if not weight.is_floating_point():
            raise ValueError(f"{name} holds no floating-point numbers")
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError(f"{name} holds a NaN or an infinity")


def oriented(name: str, weight: Tensor, rows: int, columns: int, *, transposed: bool) -> Tensor:
    """A matrix as [rows, columns], whichever way round it is stored.

    Publishers differ in orientation under the same names, so the shape decides.

    Args:
        name: In the file.
        weight: Of shape [rows, columns] or [columns, rows].
        rows: Wanted.
        columns: Wanted.
        transposed: Whether the format documents [columns, rows]; decides where both are equal.

    Raises:
        ValueError: Neither fits.
    """
    shape = tuple(weight.shape)
    if shape not in ((rows, columns), (columns, rows)):
        raise ValueError(
            f"{name} has shape {shape}, but the biases tell of {(rows, columns)} "
            f"or {(columns, rows)}"
        )
    turned = transposed if rows == columns else shape != (rows, columns)
    return weight.T.contiguous() if turned else weight


def assembled_sae(
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    encoder_transposed: bool,
    decoder_transposed: bool,
    k: int | None = None,
    normalisation: Normalisation = "none",
) -> SparseAutoencoder:
    """The autoencoder that a file's tensors make; the biases tell its width and latents.

    Args:
        names: Ours (W_enc, W_dec, b_enc, b_dec, and threshold for a jumprelu one) to the file's.
        tensors: By the file's names.
        encoder_transposed: Whether the format documents the encoder as [n, d].
        decoder_transposed: Whether the format documents the decoder as [d, n].
        k: Active latents per token, for a topk one.
        normalisation: Of its input.

    Raises:
        ValueError: A shape is wrong, or a weight isn't floating-point or not finite.
    """
    check_values({name: tensors[name] for name in names.values()})
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    for ours in ("b_enc", "b_dec"):
        if found[ours].ndim != 1:
            raise ValueError(f"{names[ours]} has shape {tuple(found[ours].shape)}, not one axis")
    n, d = found["b_enc"].shape[0], found["b_dec"].shape[0]
    found["W_enc"] = oriented(names["W_enc"], found["W_enc"], d, n, transposed=encoder_transposed)
    found["W_dec"] = oriented(names["W_dec"], found["W_dec"], n, d, transposed=decoder_transposed)
    if "threshold" in found and tuple(found["threshold"].shape) != (n,):
        raise ValueError(
            f"{names['threshold']} has shape {tuple(found['threshold'].shape)}, but there are "
            f"{n} latents"
        )
    architecture: Architecture = "jumprelu" if "threshold" in found else "standard"
    if k is not None:
        architecture = "topk"
    return filled_sae(SparseAutoencoderConfig(d, n, architecture, k, normalisation), found)


def agree(file: str, key: str, value: object, found: int) -> None:
    """Refuse a size in a configuration that isn't that of the weights.

    Raises:
        ValueError: With both.
    """
    if value != found:
        raise ValueError(f"{file}: {key} = {value!r}, but the weights have {found}")
