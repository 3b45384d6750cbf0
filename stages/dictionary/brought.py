"""An autoencoder that the user brings: found, checked against the student, and read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.dictionary.settings import DictionarySettings
from stages.engines.model_files import decoder_shape
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError

if TYPE_CHECKING:
    from stages.dictionary.formats.published import Wanted
    from stages.dictionary.sae import SparseAutoencoder


def brought_files(settings: DictionarySettings) -> dict[str, str]:
    """Identities of the files that `path` holds, by name.

    Raises:
        ConfigError: they aren't there, or of no known format.
    """
    from stages.dictionary.formats import file_identities

    url, form = _url_and_format(settings)
    return file_identities(url, form, _wanted(settings))


def check_brought(settings: DictionarySettings, student: ModelSettings) -> None:
    """Refuse an autoencoder that can't be read or isn't this student's; no weight is loaded.

    Raises:
        ConfigError: naming the file, the value and what to do.
    """
    from stages.dictionary.formats import read_published

    url, form = _url_and_format(settings)
    brought_files(settings)
    found = read_published(url, form, _wanted(settings), shapes_only=True)
    blocks, width = decoder_shape(student)
    if found.sae.config.d_in != width:
        raise ConfigError(
            f"dictionary.path {url} holds an autoencoder of activations of width "
            f"{found.sae.config.d_in}, but {settings.student} ({student.model}) has width {width}: "
            "it was made for another model"
        )
    if settings.layer >= blocks:
        raise ConfigError(
            f"dictionary.layer is {settings.layer}, but {settings.student} ({student.model}) has "
            f"blocks 0 to {blocks - 1}"
        )


def brought_sae(settings: DictionarySettings) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The autoencoder in float32, and where it comes from, as JSON values.

    Latents are brought to the scale of the activations (decoder rows of unit norm), since
    similarities compare them; reconstructions stay as they are. A topk one keeps its own scale:
    another would make it select other latents.

    Raises:
        ConfigError: as `check_brought` says, or a weight isn't finite.
    """
    from stages.dictionary.formats import read_published

    url, form = _url_and_format(settings)
    published = read_published(url, form, _wanted(settings))
    sae = published.sae
    if sae.config.architecture != "topk":
        sae.fold_decoder_norm()
    return sae, {
        "source_format": form,
        "source_files": brought_files(settings),
        "source_config": published.config,
    }


def _url_and_format(settings: DictionarySettings) -> tuple[str, str]:
    from stages.dictionary.formats import detected_format

    if settings.path is None:
        raise ConfigError("dictionary.path isn't set: this autoencoder is trained, not brought")
    if settings.format != "auto":
        return settings.path, settings.format
    return settings.path, detected_format(settings.path, _wanted(settings))


def _wanted(settings: DictionarySettings) -> Wanted:
    from stages.dictionary.formats.published import Wanted

    return Wanted(settings.layer, settings.activation_scale)
