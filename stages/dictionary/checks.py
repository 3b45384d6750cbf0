"""What can be wrong with an autoencoder's settings, found before its student is loaded."""

from __future__ import annotations

from stages.errors import ConfigError


def check_layer(field: str, layer: int, blocks: int, model: str) -> None:
    """Refuse a block that the student doesn't have.

    Args:
        field: what the recipe calls the layer.
        layer: counted from 0.
        blocks: how many the student has.
        model: the student's reference.

    Raises:
        ConfigError: the layer is out of range.
    """
    if layer >= blocks:
        raise ConfigError(
            f"{field}: {layer}, and {model} has {blocks} blocks, counted from 0: at most "
            f"{blocks - 1} (Hugging Face's hidden_states[{blocks}])"
        )


def check_active(field: str, k: int, latents: int) -> None:
    """Refuse more active latents than there are.

    Args:
        field: what the recipe calls k.
        k: active latents a token.
        latents: all latents.

    Raises:
        ConfigError: k exceeds the latents.
    """
    if k > latents:
        raise ConfigError(f"{field}: {k} exceeds the {latents} latents; lower it")
