"""How a recipe names a model: the reference, and the numerics that bear on its output."""

from __future__ import annotations

import os
import re
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    field_validator,
    model_validator,
)

from stages.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]

_OWN_FIELDS = {
    "model",
    "messages",
    "seed",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "n",
    "stream",
}
"""Fields of a request that are set from elsewhere."""


class EndpointSettings(BaseModel):
    """Where and how a model behind an OpenAI-compatible endpoint is asked.

    `identity`, `json_schema` and `body` bear on the text that comes back; the rest is transport.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(description="Address up to what precedes /chat/completions.")
    identity: str | None = Field(
        default=None,
        min_length=1,
        description="Name under which replies count as this model's; unset: base_url. Set it where "
        "the address changes and the model behind it doesn't.",
    )
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key; unset: none is sent.",
    )
    json_schema: bool = Field(
        default=False,
        description="It takes response_format: json_schema; replies asked for as JSON are then "
        "held to their schema.",
    )
    body: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Further fields of every request, such as reasoning_effort or "
        "chat_template_kwargs.",
    )
    limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="What it calls the longest reply."
    )
    concurrency: int = Field(default=16, ge=1, le=4096, description="Requests at once, at most.")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="Requests started a minute, at most, evenly spaced."
    )
    tokens_per_minute: float | None = Field(
        default=None,
        gt=0,
        description="Tokens a minute, prompts and replies, on average: charged as replies come.",
    )
    timeout_s: float = Field(default=300, gt=0, description="Longest wait for one whole reply.")
    max_retries: int = Field(default=5, ge=0, description="Further tries of a request that failed.")
    max_retry_wait_s: float = Field(
        default=60, gt=0, description="Longest wait before a further try, Retry-After included."
    )
    max_reply_bytes: int = Field(
        default=4_000_000, ge=1024, description="A longer reply isn't read to its end, and fails."
    )
    price_in: float | None = Field(
        default=None, ge=0, description="Price of a million prompt tokens."
    )
    price_out: float | None = Field(
        default=None, ge=0, description="Price of a million generated tokens."
    )

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("has to begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("may hold no user, password or query: name the key by api_key_env")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("is the address before /chat/completions, such as https://HOST/v1")
        return url.rstrip("/")

    @field_validator("body")
    @classmethod
    def _leaves_own_fields(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(_OWN_FIELDS & set(body))
        if taken:
            raise ValueError(f"{taken[0]} is set by the recipe's other fields")
        return body

    @model_validator(mode="after")
    def _priced_in_full(self) -> Self:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out go together")
        return self

    def __hash__(self) -> int:
        """Of all fields; `body` alone couldn't be hashed."""
        return hash(self.model_dump_json())

    @property
    def known_as(self) -> str:
        """What identifies the model behind the endpoint, beside its name."""
        return self.identity or self.base_url

    def determining(self) -> dict[str, Any]:
        """What bears on the text that comes back, in plain values."""
        return {"identity": self.known_as, "json_schema": self.json_schema, "body": self.body}

    def api_key(self) -> SecretStr | None:
        """The key in the environment; None where none is needed.

        Raises:
            ConfigError: the variable isn't set, or holds what no header can.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise ConfigError(
                f"the environment variable {self.api_key_env} isn't set; it has to hold the key "
                f"for {self.base_url}"
            )
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(
                f"the environment variable {self.api_key_env} holds a space, a line end or another "
                "character that no key has; set it anew"
            )
        return SecretStr(key)

    def cost(self, prompt_tokens: int, generated_tokens: int) -> float | None:
        """Price of so many tokens; None where the recipe gives no prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + generated_tokens * self.price_out) / 1e6


BESIDE_BYTES = frozenset({"terms"})
"""Fields of a model that bear on no number or text that it gives."""


class ModelSettings(BaseModel):
    """One entry of a recipe's `models`.

    Where a model runs (GPUs, replicas) is no part of it: that is `execution.engines`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="Hub name (with optional @revision), local directory, .gguf file, or "
        "package://PACKAGE/FILE for a file that ships inside an installed package. With "
        "engine: openai, the name that is sent to the endpoint."
    )
    engine: Literal["transformers", "vllm", "openai"] = Field(
        default="transformers",
        description="What generates text; scoring uses transformers. openai: an OpenAI-compatible "
        "endpoint.",
    )
    dtype: DType = Field(default="float32", description="Weights and activations.")
    trust_remote_code: bool = Field(
        default=False, description="Let the model's repository run its own Python code."
    )
    max_length: int = Field(default=2048, ge=8, description="Longest sequence, in tokens.")
    batch_tokens: int = Field(
        default=2048, ge=8, description="Tokens in one forward batch, padding included."
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
    endpoint: EndpointSettings | None = Field(
        default=None,
        # Recipes without an endpoint keep the identities that they had before there were any.
        exclude_if=lambda value: value is None,
        description="Where and how the model is asked; with engine: openai, and only there.",
    )

    @model_validator(mode="after")
    def _asked_as_it_can_be(self) -> Self:
        if (self.engine == "openai") != (self.endpoint is not None):
            raise ValueError("engine: openai and endpoint go together")
        if self.endpoint is None:
            return self
        for name in _LOCAL_FIELDS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning for a model behind an endpoint")
        return self

    def portable(self) -> dict[str, Any]:
        """What bears on the bytes that come out, files called by their own names."""
        if self.endpoint is not None:
            determining = self.endpoint.determining()
            own = {"model": self.model, "engine": self.engine, "terms": self.terms}
            return own | {"endpoint": determining}
        return self.model_dump(mode="json") | {"model": self.portable_name}

    @property
    def portable_name(self) -> str:
        """The reference, a local one by its own name: the same wherever a project lies."""
        local = os.path.isabs(self.model) or self.model.startswith(".")
        return os.path.basename(self.model.rstrip("/")) if local else self.model

    @property
    def takes_schema(self) -> bool:
        """Whether replies can be held to a JSON schema."""
        return self.endpoint.json_schema if self.endpoint else self.engine == "vllm"


_LOCAL_FIELDS = ("dtype", "trust_remote_code", "max_length", "batch_tokens", "threads")
