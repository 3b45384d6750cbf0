"""What can be wrong with an autoencoder's settings, found before its student is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from stages.dictionary.settings import DictionarySettings
from stages.engines.model_files import decoder_shape
from stages.engines.settings import ModelSettings
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


def check_student(
    section: str,
    student: str,
    dictionary: DictionarySettings,
    models: Mapping[str, ModelSettings],
) -> None:
    """Refuse a model whose states a dictionary's autoencoder wasn't made for.

    Args:
        section: of the recipe that names the model.
        student: the model's name.
        dictionary: its own student and layer.
        models: the recipe's, by name.

    Raises:
        ConfigError: it is another model, its configuration can't be read, or it has no such block.
    """
    own = models[student].model
    # A dictionary that another session made may name a model that isn't known here.
    made_for = models.get(dictionary.student)
    if made_for is not None and made_for.model != own:
        raise ConfigError(
            f"{section}.student is {student} ({own}), and the dictionary's is {dictionary.student} "
            f"({made_for.model}): the latents of one model mean nothing in another; name the same"
        )
    blocks, _ = decoder_shape(models[student])
    check_layer("dictionary.layer", dictionary.layer, blocks, own)


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
