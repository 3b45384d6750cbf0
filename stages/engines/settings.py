"""How a recipe names a model: the reference, and the numerics that bear on its output."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["float32", "bfloat16", "float16"]


BESIDE_BYTES = frozenset({"terms"})
"""Fields of a model that bear on no number or text that it gives."""


class ModelSettings(BaseModel):
    """One entry of a recipe's `models`.

    Where a model runs (GPUs, replicas) is no part of it: that is `execution.engines`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="Hub name (with optional @revision), local directory, .gguf file, or "
        "package://PACKAGE/FILE for a file that ships inside an installed package."
    )
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="What generates text; scoring uses transformers."
    )
    dtype: DType = Field(default="float32", description="Weights and activations.")
    trust_remote_code: bool = Field(
        default=False, description="Let the model's repository run its own Python code."
    )
    max_length: int = Field(default=2048, ge=8, description="Longest sequence, in tokens.")
    batch_tokens: int = Field(
        default=4096, ge=8, description="Tokens in one forward batch, padding included."
    )
    generation_chunk: int = Field(
        default=16, ge=1, description="Prompts generated, and committed to the cache, together."
    )
    terms: str | None = Field(
        default=None,
        min_length=1,
        description="Licence or terms that bind text which the model writes, by a licence's Hub "
        "name; `unrestricted` where its maker claims nothing. Unset: unknown.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of one engine; unset: all cores of the node."
    )
